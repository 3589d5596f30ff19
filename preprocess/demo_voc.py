"""A small set for object detection in the layout of Pascal VOC, drawn by the program: textured shapes on textured grounds.

    OUT/Annotations/000001.xml              boxes, 1-based and inclusive as in VOC; `difficult`: mostly behind another shape
    OUT/ImageSets/Main/{trainval,test}.txt  numbers of the pictures of a split
    OUT/JPEGImages/000001.jpg
    OUT/classes.txt                         the classes, one a line; written last: a folder that has it is complete

Shapes and textures are those of preprocess/demo_shapes.py. Every picture depends on the seed and its own number only.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common import UsageError, UserError
from common.files import replacing
from common.files import only_writer
from preprocess import demo_shapes

CLASSES = ("disc", "heart", "square", "star")
SEEN = 0.5  # a shape of which less is seen is marked difficult
MARK, UNFINISHED = "classes.txt", "classes.txt.partial"


def draw(seed: int, number: int, size: int) -> tuple[np.ndarray, list[tuple[str, list[int], bool]]]:
    """Picture `number`: (size, size, 3) uint8, and of its one to three shapes (class, [xmin, ymin, xmax, ymax], difficult)."""
    rng = np.random.default_rng([seed, number])
    names = [CLASSES[kind] for kind in rng.integers(0, len(CLASSES), rng.integers(1, 4))]
    specs = [demo_shapes.draw(rng, demo_shapes.CLASSES.index(name)) for name in names]
    shape, shape_too, ground, ground_too = specs[
        0
    ].colours  # of all shapes: they are lighter than the ground, or darker
    texture = replace(specs[0].bg, kind=int(rng.integers(len(demo_shapes.TEXTURE_NAMES))))  # says nothing of the shapes
    picture = ground + (ground_too - ground) * demo_shapes._pattern(texture, size)[..., None]
    insides = []
    for spec in specs:
        radius = rng.uniform(0.15, 0.27)
        placed = replace(spec, radius=radius, centre=tuple(rng.uniform(1.15 * radius, 1 - 1.15 * radius, 2)))
        mask = demo_shapes._mask(demo_shapes._outlines(placed, size), size)
        colour = shape + (shape_too - shape) * demo_shapes._pattern(spec.fg, size)[..., None]
        picture = picture + (colour - picture) * mask[..., None]
        insides.append(mask > 0.5)
    objects = []
    for i, (name, inside) in enumerate(zip(names, insides)):
        ys, xs = (inside.any(axis).nonzero()[0] + 1 for axis in (1, 0))
        seen = inside & ~np.any(insides[i + 1 :], axis=0) if i + 1 < len(insides) else inside
        box = [int(v) for v in (xs[0], ys[0], xs[-1], ys[-1])]
        objects.append((name, box, bool(seen.sum() < SEEN * inside.sum())))
    return demo_shapes._to_uint8(picture), objects


def annotation(name: str, size: int, objects) -> str:
    """VOC's XML of a picture: `objects` as `draw` returns them."""
    lines = [f"<annotation>\n  <filename>{name}</filename>"]
    lines += [f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>"]
    for kind, box, difficult in objects:
        corners = "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        about = f"<name>{kind}</name><difficult>{int(difficult)}</difficult>"
        lines += [f"  <object>{about}<bndbox>{corners}</bndbox></object>"]
    return "\n".join([*lines, "</annotation>\n"])


def ensure(out: str | Path, trainval: int = 240, test: int = 60, size: int = 96, seed: int = 0) -> Path:
    """Make the set in folder `out` unless a complete one is there, of whatever size. UsageError where other files are."""
    out = Path(out)
    if (out / MARK).exists():
        return out
    if out.exists() and not (out / UNFINISHED).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not a demo data set; name a new or empty folder")
    try:
        with only_writer(out, wait=True):  # several programs may ask for it at once
            if not (out / MARK).exists():
                _make(out, {"trainval": trainval, "test": test}, size, seed)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; name another folder") from None
    return out


def _make(out: Path, splits: dict[str, int], size: int, seed: int) -> None:
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
            (out / "Annotations" / f"{name}.xml").write_text(annotation(f"{name}.jpg", size, objects))
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    with replacing(out / MARK, "w") as file:
        file.write("".join(f"{name}\n" for name in CLASSES))
    (out / UNFINISHED).unlink()
