"""Draw the pictures of the demo data set: a textured shape on a textured ground.

A `Spec`, drawn at random from a seed, describes a picture, and one of the `render_*` functions
draws it. Lengths in a `Spec` are fractions of the picture side, so one `Spec` gives
the same picture at every size. Only NumPy and Pillow are used; no fonts, no files.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from preprocess.demo_textures import TextureSpec, pattern, to_uint8

MASK_SUPERSAMPLING = 4  # masks are drawn at four times the size
OWN_TEXTURE = 0.9  # probability of the class's texture in train and val, for shape and ground each
OUTLINE_COLOUR = (0.06, 0.06, 0.08)  # of cartoons


# Shapes: closed outlines in the plane, y downwards, inside [-1, 1]^2. The second one is a hole.


def _arc(radius, start, stop, n=64, centre=(0.0, 0.0)):
    angle = np.radians(np.linspace(start, stop, n))
    x = centre[0] + radius * np.cos(angle)
    y = centre[1] + radius * np.sin(angle)
    return np.stack([x, y], axis=1)


def _regular(n, radius=1.0, start=-90.0):
    return _arc(radius, start, start + 360.0, n + 1)[:-1]


def _star(points=5, inner=0.42):
    outline = _regular(2 * points)
    outline[1::2] *= inner
    return outline


def _cross(half_width=0.32):
    a = half_width
    right = [(a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1)]
    left = [(-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    return [(-a, -1), *right, *left]


def _crescent():
    """Return a unit disc minus a disc of radius 0.8 whose centre lies 0.5 to the right.

    They meet at (0.61, +-0.79).
    """
    outer = _arc(1.0, 52.4, 307.6)
    inner = _arc(0.8, 278.0, 82.0, centre=(0.5, 0.0))
    return np.concatenate([outer, inner]) + (0.2, 0.0)


def _heart():
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y - 0.15], axis=1)


_OUTLINES = {
    "arrow": [[(-1, -0.3), (0, -0.3), (0, -0.8), (1, 0), (0, 0.8), (0, 0.3), (-1, 0.3)]],
    "crescent": [_crescent()],
    "cross": [_cross()],
    "disc": [_regular(72, 0.9)],
    "heart": [_heart()],
    "hexagon": [_regular(6)],
    "ring": [_regular(72), _regular(72, 0.52)],
    "square": [_regular(4, 1.15, start=45.0)],
    "star": [_star() * 1.1],
    "triangle": [_regular(3, 1.15) + (0, 0.2)],
}
SHAPES = {
    name: [np.asarray(outline, dtype=np.float64) for outline in outlines]
    for name, outlines in _OUTLINES.items()
}
CLASSES = tuple(sorted(SHAPES))  # folder names; sorted, so that an index is ImageFolder's label
# Class i owns one texture for the shape and another for the ground: with the same one, the shape
# would be invisible.
SHAPE_TEXTURE = tuple(range(10))
GROUND_TEXTURE = tuple((i + 3) % 10 for i in range(10))


@dataclass(frozen=True, eq=False)
class Spec:
    """The content of one picture.

    `shape` indexes CLASSES. `colours` (4, 3) in [0, 1]: two of the shape, then two of the ground.
    `texture_class`: the class that owns the intended textures, which differs from the class itself
    only in the stylized and cue-conflict sets.
    """

    shape: int
    centre: tuple[float, float]
    radius: float
    angle: float
    colours: np.ndarray
    fg: TextureSpec
    bg: TextureSpec
    texture_class: int


def _draw_texture(kind, rng):
    """Draw a texture whose period, at least 0.115 * 64 = 7.4 pixels, survives a halving."""
    phase = tuple(rng.uniform(0, 4, 2).tolist())
    period = rng.uniform(0.115, 0.16)
    angle = rng.uniform(-20, 20)
    return TextureSpec(int(kind), period, angle, phase, int(rng.integers(2**31)))


def _draw_colours(rng):
    """Draw four nearly grey colours: a light and a dark pair, for shape and ground or reversed.

    Vivid colours would identify the picture: contrastive learning would then distinguish pictures
    by colour alone and ignore textures and shapes. The draw is the same for every class, and a fair
    coin decides which colour of a pair the pattern has, so the mean colour of a picture reveals
    nothing about its class.
    """
    pairs = [rng.permutation([0.95, 0.58]), rng.permutation([0.42, 0.05])]
    grey = np.concatenate(pairs if rng.random() < 0.5 else pairs[::-1])
    brighter = rng.uniform(-0.03, 0.03, (4, 1))
    tinted = rng.uniform(-0.03, 0.03, (4, 3))
    return np.clip(grey[:, None] + brighter + tinted, 0, 1)


def _own_or_other(own, rng):
    if rng.random() < OWN_TEXTURE:
        return own
    return (own + int(rng.integers(1, 10))) % 10


def draw(rng, shape: int) -> Spec:
    """Draw a picture of class `shape` as in train and val.

    Each of the two textures is its own with probability 0.9.
    """
    radius = rng.uniform(0.3, 0.42)
    centre = tuple(rng.uniform(radius, 1 - radius, 2).tolist())
    angle = rng.uniform(-15, 15)
    fg = _draw_texture(_own_or_other(SHAPE_TEXTURE[shape], rng), rng)
    bg = _draw_texture(_own_or_other(GROUND_TEXTURE[shape], rng), rng)
    return Spec(shape, centre, radius, angle, _draw_colours(rng), fg, bg, shape)


def others(shape: int) -> list[int]:
    """Return the classes that share neither of their textures with class `shape`."""
    own = {SHAPE_TEXTURE[shape], GROUND_TEXTURE[shape]}
    return [c for c in range(10) if not own & {SHAPE_TEXTURE[c], GROUND_TEXTURE[c]}]


def restyle(spec: Spec, rng, other: int | None = None) -> Spec:
    """Return the same shape, place and colours with both textures of class `other`.

    By default that class is drawn from `others`.
    """
    if other is None:
        other = int(rng.choice(others(spec.shape)))
    fg = _draw_texture(SHAPE_TEXTURE[other], rng)
    bg = _draw_texture(GROUND_TEXTURE[other], rng)
    return replace(spec, fg=fg, bg=bg, texture_class=other)


def outlines_of(spec: Spec, size: int) -> list[np.ndarray]:
    """Return the outlines of the shape in pixels of a picture of `size`."""
    angle = np.radians(spec.angle)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.asarray(spec.centre)
    return [
        (centre + spec.radius * outline @ turn) * size for outline in SHAPES[CLASSES[spec.shape]]
    ]


def mask_of(outlines: list[np.ndarray], size: int) -> np.ndarray:
    """Return the share of each pixel inside the shape, (size, size) in [0, 1]."""
    side = size * MASK_SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for i, outline in enumerate(outlines):
        points = [tuple(point) for point in (outline * MASK_SUPERSAMPLING).tolist()]
        pen.polygon(points, fill=0 if i else 255)
    return np.asarray(canvas.reduce(MASK_SUPERSAMPLING), dtype=np.float32) / 255


def _stroke(outlines, size, width):
    """Return the share of each pixel under a pen of `width` pixels that follows the outlines."""
    side = size * MASK_SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        closed = np.concatenate([outline, outline[:2]]) * MASK_SUPERSAMPLING
        points = [tuple(point) for point in closed.tolist()]
        pen.line(points, fill=255, width=round(width * MASK_SUPERSAMPLING), joint="curve")
    return np.asarray(canvas.reduce(MASK_SUPERSAMPLING), dtype=np.float32) / 255


def render_textured(spec: Spec, size: int) -> np.ndarray:
    """Draw the picture as in train, val, stylized and cue-conflict: (size, size, 3) uint8."""
    fg = pattern(spec.fg, size)[..., None]
    bg = pattern(spec.bg, size)[..., None]
    colours = spec.colours.astype(np.float32)
    shape = colours[0] + (colours[1] - colours[0]) * fg
    ground = colours[2] + (colours[3] - colours[2]) * bg
    return to_uint8(ground + (shape - ground) * mask_of(outlines_of(spec, size), size)[..., None])


def _by_hand(outline, rng, size):
    """Return the outline with a point every two pixels or so, moved by a slow wobble."""
    following = np.roll(outline, -1, axis=0)
    length = np.linalg.norm(following - outline, axis=1)
    pieces = [
        a + (b - a) * np.linspace(0, 1, max(1, round(d * 32 / size)), endpoint=False)[:, None]
        for a, b, d in zip(outline, following, length)
    ]
    points = np.concatenate(pieces)
    t = np.linspace(0, 2 * np.pi, len(points), endpoint=False)[:, None]
    for waves in (1, 2, 3, 5):
        amplitude = rng.normal(0, 0.005 * size, 2)
        phase = rng.uniform(0, 2 * np.pi, 2)
        points = points + amplitude * np.sin(waves * t + phase)
    return points


def render_sketch(spec: Spec, size: int, rng) -> np.ndarray:
    """Draw the outline black on white, by an unsteady hand: (size, size, 3) uint8."""
    outlines = [_by_hand(outline, rng, size) for outline in outlines_of(spec, size)]
    ink = _stroke(outlines, size, size * rng.uniform(0.03, 0.05))
    return to_uint8(np.repeat(1 - ink[..., None], 3, axis=2))


def render_rendition(spec: Spec, size: int) -> np.ndarray:
    """Draw a cartoon, (size, size, 3) uint8: flat colours, a thick dark outline, no texture."""
    outlines = outlines_of(spec, size)
    shape = spec.colours[0]
    grounds = spec.colours[2:]
    ground = grounds[np.argmax(np.linalg.norm(grounds - shape, axis=1))]
    picture = ground + (shape - ground) * mask_of(outlines, size)[..., None]
    ink = _stroke(outlines, size, size * 0.055)[..., None]
    return to_uint8(picture + (np.array(OUTLINE_COLOUR) - picture) * ink)
