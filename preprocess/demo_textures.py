"""Draw the textures of the built-in pictures, and quilt a texture from a picture."""

from dataclasses import dataclass

import numpy as np

SUPERSAMPLING = 3  # textures are computed at three times the size and averaged
TWIN_PATCH = 96 / 224  # fraction of the side, as in the paper's texture data


@dataclass(frozen=True)
class TextureSpec:
    """One texture.

    `kind` indexes TEXTURE_NAMES, `period` is a fraction of the side, `angle` is in degrees.
    """

    kind: int
    period: float
    angle: float
    phase: tuple[float, float]
    seed: int


# Each pattern maps coordinates (u, v) in periods to the share of the second colour.


def _fraction(x):
    return x - np.floor(x)


def _stripes(u, v, rng):
    return _fraction(v) < 0.5


def _checker(u, v, rng):
    return (np.floor(1.6 * u) + np.floor(1.6 * v)) % 2 < 1


def _dots(u, v, rng):
    row = np.floor(v)
    return np.hypot(_fraction(u + row / 2) - 0.5, _fraction(v) - 0.5) < 0.34


def _bricks(u, v, rng):
    row = np.floor(1.4 * v)
    return (_fraction(1.4 * v) < 0.26) | (_fraction(0.62 * u + row / 2) < 0.12)


def _waves(u, v, rng):
    return _fraction(v + 0.38 * np.sin(2 * np.pi * u / 1.8)) < 0.5


def _zigzag(u, v, rng):
    return _fraction(v + 1.1 * np.abs(2 * _fraction(u / 1.8) - 1)) < 0.5


def _rings(u, v, rng):
    distance = np.hypot(_fraction(0.7 * u) - 0.5, _fraction(0.7 * v) - 0.5)
    return (np.abs(distance - 0.33) < 0.1) | (distance < 0.1)


def _blobs(u, v, rng):
    """Sum plane waves of about one period in random directions: a field without a lattice."""
    directions, phases = rng.uniform(0, 2 * np.pi, (2, 10))
    frequencies = rng.uniform(0.6, 0.9, 10)
    field = np.zeros_like(u)
    for angle, phase, frequency in zip(directions, phases, frequencies):
        distance = u * np.cos(angle) + v * np.sin(angle)
        field += np.cos(2 * np.pi * frequency * distance + phase, dtype=u.dtype)
    return field > 0


def _grid(u, v, rng):
    return (_fraction(u) < 0.26) | (_fraction(v) < 0.26)


def _scales(u, v, rng):
    """Draw the rims of rows of discs, half a disc apart, each row on top of the one above it."""
    scaled = 0.75 * u
    row = np.floor(1.5 * v)
    below = np.hypot(_fraction(scaled + row / 2) - 0.5, 0.75 * v - row / 2)
    above = np.hypot(_fraction(scaled + (row - 1) / 2) - 0.5, 0.75 * v - (row - 1) / 2)
    return np.abs(np.where(below < 0.5, below, above) - 0.42) < 0.1


TEXTURES = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "bricks": _bricks,
    "waves": _waves,
    "zigzag": _zigzag,
    "rings": _rings,
    "blobs": _blobs,
    "grid": _grid,
    "scales": _scales,
}
TEXTURE_NAMES = tuple(TEXTURES)


def pattern(texture: TextureSpec, size: int) -> np.ndarray:
    """Return the share of the texture's second colour in each pixel, (size, size) in [0, 1]."""
    n = size * SUPERSAMPLING
    centres = (np.arange(n, dtype=np.float32) + 0.5) / n
    x = centres[None, :]
    y = centres[:, None]
    cosine = np.cos(np.radians(texture.angle))
    sine = np.sin(np.radians(texture.angle))
    u = ((cosine * x + sine * y) / texture.period + texture.phase[0]).astype(np.float32)
    v = ((cosine * y - sine * x) / texture.period + texture.phase[1]).astype(np.float32)
    function = TEXTURES[TEXTURE_NAMES[texture.kind]]
    value = function(u, v, np.random.default_rng(texture.seed)).astype(np.float32)
    return value.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8 levels."""
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def texture_twin(picture: np.ndarray, rng, block: int | None = None, tries: int = 12) -> np.ndarray:
    """Quilt a picture (H, W, 3) uint8 with the same texture but without the shape.

    It consists of two patches of `picture`, 3/7 of the side each: the centre and a random place.
    Blocks are placed in rows; of `tries` random cuts, each block is the one that best continues the
    pixels to its left and above.
    """
    side = picture.shape[0]
    patch = max(8, round(side * TWIN_PATCH))
    block = block or max(6, round(side / 5))
    overlap = max(2, block // 4)
    centre = (side - patch) // 2
    corners = [(centre, centre), tuple(rng.integers(0, side - patch + 1, 2))]
    patches = [
        picture[top : top + patch, left : left + patch].astype(np.float32) for top, left in corners
    ]
    step = block - overlap
    cells = -(-(side - overlap) // step)
    whole = cells * step + overlap
    canvas = np.zeros((whole, whole, 3), dtype=np.float32)
    for row in range(cells):
        for column in range(cells):
            chosen = rng.integers(0, 2, (tries, 1))
            places = rng.integers(0, patch - block + 1, (tries, 2))
            cuts = np.stack(
                [
                    patches[k][y : y + block, x : x + block]
                    for k, y, x in np.concatenate([chosen, places], 1)
                ]
            )
            top = row * step
            left = column * step
            target = canvas[top : top + block, left : left + block]
            overlapped = np.zeros((block, block, 1), dtype=np.float32)
            overlapped[:overlap] = row > 0
            overlapped[:, :overlap] = np.maximum(overlapped[:, :overlap], column > 0)
            error = (np.square(cuts - target) * overlapped).sum((1, 2, 3))
            target[:] = cuts[np.argmin(error)]
    return to_uint8(canvas[:side, :side] / 255)
