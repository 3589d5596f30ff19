"""The 15 corruptions of ImageNet-C (Hendrycks & Dietterich, ICLR 2019) at its five strengths.

    corrupted = corrupt(picture, "motion_blur", 3, key=(0, 17))  # uint8 (H, W, 3), in and out

arXiv:1903.12261. Nine come from the package corrupt-tta. Six are written here, because
the package has other strengths than ImageNet-C (fog, glass blur, motion blur, snow, elastic
transform) or is slow (zoom blur). The constants and operations were compared with those of
hendrycks/robustness, ImageNet-C/create_c/make_imagenet_c.py at 8190fe3; preprocess/README.md lists
the remaining differences. The picture's own height and width replace the 224 of that code.
"""

from __future__ import annotations

import contextlib
import functools
import math

import cv2
import numpy as np
from PIL import Image

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
# The strengths of these corruptions are lengths in pixels of a 224-pixel picture: a defocus of
# radius 10 would destroy a 64-pixel one. A smaller picture is enlarged to 224 pixels, corrupted,
# and reduced again.
AT_224 = ("defocus_blur", "glass_blur", "motion_blur", "snow", "frost", "elastic_transform")
STREAM = 4  # separates these draws from others with the same key
# Strengths, severities 1 to 5
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma, reach, rounds
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius, sigma
# zoom factors go from 1 to below the first number, in steps of the second
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
SNOW = (  # mean, deviation, zoom, threshold, radius, sigma, weight of the picture
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # amount, decay of the roughness
ELASTIC = (  # amplitude, sigma and shift of the corners, in units of ELASTIC_UNIT
    (2, 0.7, 0.1),
    (2, 0.08, 0.2),
    (0.05, 0.01, 0.02),
    (0.07, 0.01, 0.02),
    (0.12, 0.01, 0.02),
)
ELASTIC_UNIT = 244  # pixels (meant was 224, the authors say)


def corrupt(picture: np.ndarray, name: str, severity: int, key: tuple[int, ...]) -> np.ndarray:
    """Corrupt a picture uint8 (H, W, 3) and return one of the same shape.

    name: one of CORRUPTIONS. severity: 1 to 5. key: whole numbers of at least 0; the same key gives
    the same result.
    """
    from corrupt_tta import corruptions as package  # imports scikit-image, which takes a second

    size = (picture.shape[1], picture.shape[0])
    is_enlarged = name in AT_224 and max(size) < 224
    if is_enlarged:
        big = tuple(round(side * 224 / max(size)) for side in size)
        picture = np.asarray(Image.fromarray(picture).resize(big, Image.Resampling.BICUBIC))
    function = OWN.get(name) or getattr(package, name)
    entropy = np.random.SeedSequence([*key, STREAM, CORRUPTIONS.index(name), severity])
    with _seeded(package, entropy.generate_state(1)[0]):
        corrupted = np.asarray(function(picture, severity), dtype=np.float64)
    corrupted = np.clip(np.rint(corrupted), 0, 255).astype(np.uint8)
    if is_enlarged:
        corrupted = np.asarray(Image.fromarray(corrupted).resize(size, Image.Resampling.BOX))
    return corrupted


@contextlib.contextmanager
def _seeded(module, seed):
    """Make the corruptions in `module` draw from `seed`, then restore NumPy's generator.

    They draw from NumPy's global generator, except impulse noise: its `random_noise` (scikit-image)
    makes an unseeded generator unless it gets one, so it gets one inside this context.
    """
    state = np.random.get_state()
    random_noise = getattr(module, "random_noise", None)
    np.random.seed(seed)
    if random_noise is not None:
        generator = np.random.default_rng(int(seed))
        module.random_noise = functools.partial(random_noise, rng=generator)
    try:
        yield
    finally:
        np.random.set_state(state)
        if random_noise is not None:
            module.random_noise = random_noise


# The corruptions below take (picture uint8 (H, W, 3), severity) and return (H, W, 3), 0 to 255.


def motion_kernel(radius: float, sigma: float) -> np.ndarray:
    """Return the weights of a streak at 0, 1, 2, ... pixels from its start.

    float64 (2 ceil(radius) + 1,), sum 1. They are one side of a Gaussian, as in ImageMagick's
    MotionBlurImage (MagickCore/effect.c at 00bb7ed), which made ImageNet-C:
    w(i) ~ exp(-i^2 / (2 sigma^2)). `radius` refers to the whole Gaussian, hence twice as many
    pixels.
    """
    weights = np.exp(-((np.arange(2 * math.ceil(radius) + 1) / sigma) ** 2) / 2)
    return weights / weights.sum()


def streak(pixels: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Blur uint8 (H, W) or (H, W, 3) along `angle` (degrees), as ImageMagick does.

    Returns the same shape, again in whole levels. Each pixel is the weighted sum of those at
    i (cos angle, sin angle) to the right and below, rounded to whole pixels (halves down); pixels
    beyond the edge repeat the edge.
    """
    weights = motion_kernel(radius, sigma)
    i = np.arange(len(weights))
    far = len(weights) - 1
    turn = math.radians(angle)
    right = np.ceil(i * math.cos(turn) - 0.5).astype(int)
    down = np.ceil(i * math.sin(turn) - 0.5).astype(int)
    kernel = np.zeros((2 * far + 1, 2 * far + 1))
    np.add.at(kernel, (far + down, far + right), weights)
    blurred = cv2.filter2D(pixels, cv2.CV_64F, kernel, borderType=cv2.BORDER_REPLICATE)
    return np.rint(blurred).clip(0, 255)


def motion_blur(picture, severity):
    """Blur along a random direction."""
    return streak(picture, *MOTION[severity - 1], np.random.uniform(-45, 45))


def snow(picture, severity):
    """Whiten the picture and add streaks of flakes."""
    mean, deviation, zoom, threshold, radius, sigma, weight = SNOW[severity - 1]
    flakes = np.random.normal(mean, deviation, picture.shape[:2])
    flakes = clipped_zoom(flakes[..., None], zoom)[..., 0]
    flakes = (np.where(flakes < threshold, 0, flakes).clip(0, 1) * 255).astype(np.uint8)
    flakes = streak(flakes, radius, sigma, np.random.uniform(-135, -45))[..., None] / 255
    picture = picture.astype(np.float32) / 255
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]
    whiter = np.maximum(picture, grey * 1.5 + 0.5)
    picture = weight * picture + (1 - weight) * whiter
    return (picture + flakes + np.rot90(flakes, 2)).clip(0, 1) * 255


def glass_blur(picture, severity):
    """Copy pixels over others nearby, between two blurs.

    The published line that should swap two pixels copies one over the other, because both sides are
    views. This code copies as well.
    """
    from skimage.filters import gaussian

    sigma, far, rounds = GLASS[severity - 1]
    picture = np.uint8(gaussian(picture / 255.0, sigma=sigma, channel_axis=-1) * 255)
    height, width = picture.shape[:2]
    places = np.arange(height * width).reshape(height, width)
    visited = places[far + 1 : height - far + 1, far + 1 : width - far + 1]
    visited = visited[::-1, ::-1]  # from the last to the first
    shown = list(
        range(height * width)
    )  # source index of every place: indices are moved, not pixels
    for _ in range(rounds):
        right, down = np.random.randint(-far, far, (2, *visited.shape))
        sources = visited + down * width + right
        for here, there in zip(visited.ravel().tolist(), sources.ravel().tolist()):
            shown[here] = shown[there]
    picture = picture.reshape(-1, 3)[shown].reshape(picture.shape)
    return gaussian(picture / 255.0, sigma=sigma, channel_axis=-1).clip(0, 1) * 255


def zoom_blur(picture, severity):
    """Average the picture and enlargements of its middle."""
    picture = (picture / 255.0).astype(np.float32)
    zoomed = [clipped_zoom(picture, factor) for factor in np.arange(1, *ZOOM[severity - 1])]
    total = picture + sum(zoomed, np.zeros_like(picture))
    return (total / (len(zoomed) + 1)).clip(0, 1) * 255


def clipped_zoom(image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the middle of (H, W, C) to H x W.

    Working on one channel at a time takes half the time and gives the same sums.
    """
    from scipy.ndimage import zoom

    height, width = image.shape[:2]
    kept_height = math.ceil(height / factor)
    kept_width = math.ceil(width / factor)
    top = (height - kept_height) // 2
    left = (width - kept_width) // 2
    part = image[top : top + kept_height, left : left + kept_width]
    channels = [np.ascontiguousarray(part[..., c]) for c in range(part.shape[-1])]
    big = np.stack([zoom(channel, (factor, factor), order=1) for channel in channels], -1)
    top = (big.shape[0] - height) // 2
    left = (big.shape[1] - width) // 2
    return big[top : top + height, left : left + width]


def fog(picture, severity):
    """Add clouds of plasma noise."""
    from corrupt_tta.corruptions import plasma_fractal

    amount, decay = FOG[severity - 1]
    height, width = picture.shape[:2]
    picture = picture / 255.0
    side = 1 << max(1, (max(height, width) - 1).bit_length())  # ImageNet-C's 256 for its 224
    clouds = plasma_fractal(side, wibbledecay=decay)[:height, :width, None]
    top = picture.max()
    return ((picture + amount * clouds) * top / (top + amount)).clip(0, 1) * 255


def elastic_transform(picture, severity):
    """Move the corners, then every pixel along a smooth random field."""
    from scipy.ndimage import map_coordinates
    from skimage.filters import gaussian

    amplitude, sigma, shift = (ELASTIC_UNIT * value for value in ELASTIC[severity - 1])
    height, width = picture.shape[:2]
    picture = picture.astype(np.float32) / 255
    centre = np.float32((height, width)) // 2
    third = min(height, width) // 3
    corners = centre + np.float32(((third, third), (third, -third), (-third, -third)))
    moved = corners + np.random.uniform(-shift, shift, corners.shape).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    reflect = cv2.BORDER_REFLECT_101
    picture = cv2.warpAffine(picture, affine, (width, height), borderMode=reflect)

    def field():
        noise = np.random.uniform(-1, 1, (height, width))
        return gaussian(noise, sigma, mode="reflect", truncate=3) * amplitude

    right = field()  # drawn first, as published
    down = field()
    rows, columns = np.mgrid[:height, :width]
    places = (rows + down.astype(np.float32), columns + right.astype(np.float32))
    channels = [map_coordinates(picture[..., c], places, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, -1).clip(0, 1) * 255


OWN = {
    function.__name__: function
    for function in (glass_blur, motion_blur, zoom_blur, snow, fog, elastic_transform)
}
