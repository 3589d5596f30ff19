"""Draw the pictures of the demo data set: a textured shape on a textured ground.

A picture is described by a `Spec` (what is drawn, drawn at random from a seed) and made from it by one of the
`render_*` functions (how it is drawn). Lengths in a `Spec` are fractions of the picture side, so one `Spec` gives the
same picture at every size. Only NumPy and Pillow; no fonts, no files.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3  # texture values are computed at 3x and averaged; masks are drawn at 4x
MASK_SUPERSAMPLING = 4
OWN_TEXTURE = 0.9  # probability that a picture of train or val has its class's texture, for shape and ground each


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: closed outlines in the plane, y downwards, inside [-1, 1]^2. The second outline of the ring is a hole.


def _arc(radius, start, stop, n=64, centre=(0.0, 0.0)):
    angle = np.radians(np.linspace(start, stop, n))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _regular(n, radius=1.0, start=-90.0):
    return _arc(radius, start, start + 360.0, n + 1)[:-1]


def _star(points=5, inner=0.42):
    outline = _regular(2 * points)
    outline[1::2] *= inner
    return outline


def _cross(half_width=0.32):
    a = half_width
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


def _crescent():
    # A unit disc minus a disc of radius 0.8 whose centre lies 0.5 to the right; they meet at (0.61, +-0.79).
    outer = _arc(1.0, 52.4, 307.6)
    inner = _arc(0.8, 278.0, 82.0, centre=(0.5, 0.0))
    return np.concatenate([outer, inner]) + (0.2, 0.0)


def _heart():
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y - 0.15], axis=1)


SHAPES = {
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
SHAPES = {name: [np.asarray(outline, dtype=np.float64) for outline in outlines] for name, outlines in SHAPES.items()}
CLASSES = tuple(sorted(SHAPES))  # folder names; sorted, so that the index here is ImageFolder's class index


# ---------------------------------------------------------------------------------------------------------------------
# Textures: two-colour patterns. Each takes coordinates (u, v) in periods and gives the share of the second colour.


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
    # A sum of plane waves of about one period in random directions: a random field without a lattice.
    directions, phases = rng.uniform(0, 2 * np.pi, (2, 10))
    frequencies = rng.uniform(0.6, 0.9, 10)
    field = np.zeros_like(u)
    for angle, phase, frequency in zip(directions, phases, frequencies):
        field += np.cos(2 * np.pi * frequency * (u * np.cos(angle) + v * np.sin(angle)) + phase, dtype=u.dtype)
    return field > 0


def _grid(u, v, rng):
    return (_fraction(u) < 0.26) | (_fraction(v) < 0.26)


def _scales(u, v, rng):
    # Rows of discs, half a disc apart, each row on top of the one above it; only their rims are drawn.
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
# Class i owns one texture for the shape and another for the ground: with one for both, the shape would hide in it.
SHAPE_TEXTURE = tuple(range(10))
GROUND_TEXTURE = tuple((i + 3) % 10 for i in range(10))


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


@dataclass(frozen=True)
class TextureSpec:
    """One texture: `kind` indexes TEXTURE_NAMES, `period` is a fraction of the side, `angle` is in degrees."""

    kind: int
    period: float
    angle: float
    phase: tuple[float, float]
    seed: int


@dataclass(frozen=True, eq=False)
class Spec:
    """One picture: `shape` indexes CLASSES; `colours` (4, 3) in [0, 1] are two of the shape, then two of the ground."""

    shape: int
    centre: tuple[float, float]
    radius: float
    angle: float
    colours: np.ndarray
    fg: TextureSpec
    bg: TextureSpec
    texture_class: int  # class whose textures were meant; the class itself except in the stylized and cue-conflict sets


def _draw_texture(kind, rng):
    # At least 0.115 * 64 = 7.4 pixels a period: it survives a reduction from 64 to 32 pixels.
    phase = tuple(rng.uniform(0, 4, 2).tolist())
    return TextureSpec(int(kind), rng.uniform(0.115, 0.16), rng.uniform(-20, 20), phase, int(rng.integers(2**31)))


def _draw_colours(rng):
    """Four nearly grey colours: a light pair and a dark pair, for shape and ground or the other way round.

    Vivid colours would name the picture: contrastive learning then tells pictures apart by their colours alone and has no
    use for textures or shapes. The draw is the same for every class, and which colour of a pair is the pattern's is a fair
    coin, so the mean colour of a picture says nothing of its class.
    """
    pairs = [rng.permutation([0.95, 0.58]), rng.permutation([0.42, 0.05])]
    grey = np.concatenate(pairs if rng.random() < 0.5 else pairs[::-1])
    return np.clip(grey[:, None] + rng.uniform(-0.03, 0.03, (4, 1)) + rng.uniform(-0.03, 0.03, (4, 3)), 0, 1)


def _own_or_other(own, rng):
    if rng.random() < OWN_TEXTURE:
        return own
    return (own + int(rng.integers(1, 10))) % 10


def draw(rng, shape):
    """Draw a picture of class `shape` as in train and val: each of the two textures is its own with probability 0.9."""
    radius = rng.uniform(0.3, 0.42)
    centre = tuple(rng.uniform(radius, 1 - radius, 2).tolist())
    angle = rng.uniform(-15, 15)
    fg = _draw_texture(_own_or_other(SHAPE_TEXTURE[shape], rng), rng)
    bg = _draw_texture(_own_or_other(GROUND_TEXTURE[shape], rng), rng)
    return Spec(shape, centre, radius, angle, _draw_colours(rng), fg, bg, shape)


def others(shape):
    """Classes that share neither of their textures with class `shape`."""
    own = {SHAPE_TEXTURE[shape], GROUND_TEXTURE[shape]}
    return [c for c in range(10) if not own & {SHAPE_TEXTURE[c], GROUND_TEXTURE[c]}]


def restyle(spec, rng, other=None):
    """The same shape in the same place and colours with both textures of class `other`; default: drawn from `others`."""
    other = int(rng.choice(others(spec.shape))) if other is None else other
    fg, bg = _draw_texture(SHAPE_TEXTURE[other], rng), _draw_texture(GROUND_TEXTURE[other], rng)
    return replace(spec, fg=fg, bg=bg, texture_class=other)


# ---------------------------------------------------------------------------------------------------------------------
# How it is drawn: every function returns (size, size, 3) uint8


def _outlines(spec, size):
    """The outlines of the shape in pixels of a picture of `size`."""
    angle = np.radians(spec.angle)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [(np.asarray(spec.centre) + spec.radius * outline @ turn) * size for outline in SHAPES[CLASSES[spec.shape]]]


def _mask(outlines, size):
    """Share of each pixel inside the shape, (size, size) in [0, 1]."""
    canvas = Image.new("L", (size * MASK_SUPERSAMPLING,) * 2)
    pen = ImageDraw.Draw(canvas)
    for i, outline in enumerate(outlines):
        pen.polygon([tuple(p) for p in (outline * MASK_SUPERSAMPLING).tolist()], fill=0 if i else 255)
    return np.asarray(canvas.reduce(MASK_SUPERSAMPLING), dtype=np.float32) / 255


def _stroke(outlines, size, width):
    """Share of each pixel under a pen of `width` pixels that follows the outlines, (size, size) in [0, 1]."""
    canvas = Image.new("L", (size * MASK_SUPERSAMPLING,) * 2)
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        closed = np.concatenate([outline, outline[:2]]) * MASK_SUPERSAMPLING
        pen.line([tuple(p) for p in closed.tolist()], fill=255, width=round(width * MASK_SUPERSAMPLING), joint="curve")
    return np.asarray(canvas.reduce(MASK_SUPERSAMPLING), dtype=np.float32) / 255


def _pattern(texture, size):
    """Share of the texture's second colour in each pixel, (size, size) in [0, 1]."""
    n = size * SUPERSAMPLING
    at = (np.arange(n, dtype=np.float32) + 0.5) / n
    x, y = at[None, :], at[:, None]
    c, s = np.cos(np.radians(texture.angle)), np.sin(np.radians(texture.angle))
    u = ((c * x + s * y) / texture.period + texture.phase[0]).astype(np.float32)
    v = ((c * y - s * x) / texture.period + texture.phase[1]).astype(np.float32)
    value = TEXTURES[TEXTURE_NAMES[texture.kind]](u, v, np.random.default_rng(texture.seed)).astype(np.float32)
    return value.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))


def _to_uint8(picture):
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def render_textured(spec, size):
    """The picture as in train, val, stylized and cue-conflict."""
    fg, bg = _pattern(spec.fg, size)[..., None], _pattern(spec.bg, size)[..., None]
    colours = spec.colours.astype(np.float32)
    shape = colours[0] + (colours[1] - colours[0]) * fg
    ground = colours[2] + (colours[3] - colours[2]) * bg
    return _to_uint8(ground + (shape - ground) * _mask(_outlines(spec, size), size)[..., None])


def _by_hand(outline, rng, size):
    """The outline with a point every two pixels or so, moved by a slow wobble, as drawn by hand."""
    following = np.roll(outline, -1, axis=0)
    length = np.linalg.norm(following - outline, axis=1)
    pieces = [
        a + (b - a) * np.linspace(0, 1, max(1, round(d * 32 / size)), endpoint=False)[:, None]
        for a, b, d in zip(outline, following, length)
    ]
    points = np.concatenate(pieces)
    t = np.linspace(0, 2 * np.pi, len(points), endpoint=False)[:, None]
    for waves in (1, 2, 3, 5):
        points = points + rng.normal(0, 0.005 * size, 2) * np.sin(waves * t + rng.uniform(0, 2 * np.pi, 2))
    return points


def render_sketch(spec, size, rng):
    """A drawing of the outline, black on white, by an unsteady hand."""
    outlines = [_by_hand(outline, rng, size) for outline in _outlines(spec, size)]
    ink = _stroke(outlines, size, size * rng.uniform(0.03, 0.05))
    return _to_uint8(np.repeat(1 - ink[..., None], 3, axis=2))


def render_rendition(spec, size):
    """A cartoon: one flat colour each for shape and ground, a thick dark outline, no texture."""
    outlines = _outlines(spec, size)
    shape, grounds = spec.colours[0], spec.colours[2:]
    ground = grounds[np.argmax(np.linalg.norm(grounds - shape, axis=1))]
    picture = ground + (shape - ground) * _mask(outlines, size)[..., None]
    ink = _stroke(outlines, size, size * 0.055)[..., None]
    return _to_uint8(picture + (np.array([0.06, 0.06, 0.08]) - picture) * ink)


def texture_twin(picture, rng, block=None, tries=12):
    """A picture (H, W, 3) uint8 of the same texture without the shape, quilted from two patches of `picture`.

    Patch A is the centre and patch B a random place, 3/7 of the side each (96 of 224 pixels in the paper's texture
    data). Blocks are laid in rows; each is the best of `tries` random cuts at continuing what lies left and above.
    """
    side = picture.shape[0]
    patch = max(8, round(side * 96 / 224))
    block = block or max(6, round(side / 5))
    overlap = max(2, block // 4)
    corners = [((side - patch) // 2,) * 2, tuple(rng.integers(0, side - patch + 1, 2))]
    patches = [picture[top : top + patch, left : left + patch].astype(np.float32) for top, left in corners]
    step = block - overlap
    cells = -(-(side - overlap) // step)
    canvas = np.zeros((cells * step + overlap, cells * step + overlap, 3), dtype=np.float32)
    for row in range(cells):
        for column in range(cells):
            picks = np.concatenate([rng.integers(0, 2, (tries, 1)), rng.integers(0, patch - block + 1, (tries, 2))], 1)
            cuts = np.stack([patches[k][y : y + block, x : x + block] for k, y, x in picks])
            target = canvas[row * step : row * step + block, column * step : column * step + block]
            seen = np.zeros((block, block, 1), dtype=np.float32)
            seen[:overlap] = row > 0
            seen[:, :overlap] = np.maximum(seen[:, :overlap], column > 0)
            error = (np.square(cuts - target) * seen).sum((1, 2, 3))
            target[:] = cuts[np.argmin(error)]
    return _to_uint8(canvas[:side, :side] / 255)
