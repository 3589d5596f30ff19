"""Make a small object detection set of textured shapes in the layout of Pascal VOC.

    OUT/Annotations/000001.xml              boxes, 1-based and inclusive as in VOC; a shape that is
                                            mostly hidden is marked `difficult`
    OUT/ImageSets/Main/{trainval,test}.txt  numbers of the pictures of a split
    OUT/JPEGImages/000001.jpg
    OUT/classes.txt                         the classes, one per line; written last, so a folder
                                            that has it is complete

Shapes and textures are those of preprocess/demo_shapes.py. Every picture depends only on the
seed and its number.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common import UsageError, UserError
from common.files import only_writer, replacing
from preprocess import demo_shapes
from preprocess.demo_textures import TEXTURE_NAMES, pattern, to_uint8
from preprocess.workers import is_empty

CLASSES = ("disc", "heart", "square", "star")
SEEN = 0.5  # a shape with a smaller visible share is marked difficult
MARK = "classes.txt"
UNFINISHED = "classes.txt.partial"


def draw(seed: int, number: int, size: int) -> tuple[np.ndarray, list[tuple[str, list[int], bool]]]:
    """Draw picture `number`: (size, size, 3) uint8, and its one to three shapes.

    A shape is (class, [xmin, ymin, xmax, ymax], difficult).
    """
    rng = np.random.default_rng([seed, number])
    names = [CLASSES[kind] for kind in rng.integers(0, len(CLASSES), rng.integers(1, 4))]
    specs = [demo_shapes.draw(rng, demo_shapes.CLASSES.index(name)) for name in names]
    # all shapes have the colours of the first: all are lighter than the ground, or all are darker
    shape, shape_too, ground, ground_too = specs[0].colours
    kind = int(rng.integers(len(TEXTURE_NAMES)))  # independent of the shapes
    texture = replace(specs[0].bg, kind=kind)
    picture = ground + (ground_too - ground) * pattern(texture, size)[..., None]
    insides = []
    for spec in specs:
        radius = rng.uniform(0.15, 0.27)
        centre = tuple(rng.uniform(1.15 * radius, 1 - 1.15 * radius, 2))
        placed = replace(spec, radius=radius, centre=centre)
        mask = demo_shapes.mask_of(demo_shapes.outlines_of(placed, size), size)
        colour = shape + (shape_too - shape) * pattern(spec.fg, size)[..., None]
        picture = picture + (colour - picture) * mask[..., None]
        insides.append(mask > 0.5)
    objects = []
    for i, (name, inside) in enumerate(zip(names, insides)):
        ys = inside.any(1).nonzero()[0] + 1
        xs = inside.any(0).nonzero()[0] + 1
        box = [int(value) for value in (xs[0], ys[0], xs[-1], ys[-1])]
        visible = inside
        for later in insides[i + 1 :]:
            visible = visible & ~later
        objects.append((name, box, bool(visible.sum() < SEEN * inside.sum())))
    return to_uint8(picture), objects


def annotation(name: str, size: int, objects) -> str:
    """Return the VOC annotation (XML) of a picture. objects: the shapes that `draw` returned."""
    sides = f"<width>{size}</width><height>{size}</height><depth>3</depth>"
    lines = ["<annotation>", f"  <filename>{name}</filename>", f"  <size>{sides}</size>"]
    for kind, box, difficult in objects:
        corners = "".join(
            f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box)
        )
        label = f"<name>{kind}</name><difficult>{int(difficult)}</difficult>"
        lines.append(f"  <object>{label}<bndbox>{corners}</bndbox></object>")
    return "\n".join([*lines, "</annotation>\n"])


def ensure(
    out: str | Path, trainval: int = 240, test: int = 60, size: int = 96, seed: int = 0
) -> Path:
    """Make the set in folder `out` unless a complete one of any size exists.

    Raises UsageError if `out` holds other files, UserError if it cannot write.
    """
    out = Path(out)
    if (out / MARK).exists():
        return out
    if out.exists() and not (out / UNFINISHED).exists() and not is_empty(out):
        raise UsageError(f"{out} is not a demo data set: name a new or empty folder")
    try:
        with only_writer(out, wait=True):  # several programs may want it at once
            if not (out / MARK).exists():
                _make(out, {"trainval": trainval, "test": test}, size, seed)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; name another folder"
        ) from None
    return out


def _make(out: Path, splits: dict[str, int], size: int, seed: int) -> None:
    """Write all files in place; the folder counts as unfinished until all are complete."""
    (out / UNFINISHED).touch()
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in splits.items():
        ids = [f"{number + i + 1:06d}" for i in range(count)]
        for name in ids:
            number += 1
            picture, objects = draw(seed, number, size)
            Image.fromarray(picture).save(out / "JPEGImages" / f"{name}.jpg", quality=95)
            xml = annotation(f"{name}.jpg", size, objects)
            (out / "Annotations" / f"{name}.xml").write_text(xml)
        listing = out / "ImageSets" / "Main" / f"{split}.txt"
        listing.write_text("".join(f"{name}\n" for name in ids))
    with replacing(out / MARK, "w") as file:
        file.write("".join(f"{name}\n" for name in CLASSES))
    (out / UNFINISHED).unlink()
