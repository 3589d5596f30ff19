"""Read pictures and their objects in the layout of Pascal VOC.

ROOT/Annotations/ID.xml         objects: name, bndbox (from 1, its last pixel included), difficult
ROOT/ImageSets/Main/SPLIT.txt   IDs, one a line; what follows an ID is ignored
ROOT/JPEGImages/ID.jpg

A picture is turned as its EXIF tag says, since annotation tools show it that way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common import UsageError, UserError, printable, sets
from common.pictures import as_rgb

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
CORNERS = ("xmin", "ymin", "xmax", "ymax")
PARTS = (("Annotations", "*.xml"), ("ImageSets/Main", "*.txt"), ("JPEGImages", "*.jpg"))
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of a picture
ON_THE_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def class_names(text: str) -> list[str]:
    """Return the names in --classes, "a,b" or a file of one a line; VOC's where it is empty.

    Lines of a file that begin with # are comments.
    """
    if os.path.isfile(text):
        lines = Path(text).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        text = ",".join(line for line in lines if not line.lstrip().startswith("#"))
    names = [name.strip() for name in text.split(",") if name.strip()] or list(CLASSES)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--classes: {twice[0]} comes twice; name each class once")
    return names


class Objects(NamedTuple):
    """The objects of one picture.

    boxes (n, 4): float32 (x1, y1, x2, y2) in pixels, from 0 at the left and upper edge to width and
    height. labels (n,): classes from 1, as 0 is the background. difficult (n,): True for objects
    that VOC does not count, found or not.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Pictures:
    """The pictures of the splits `(root, split)` in order, and their objects.

    classes: names in label order. Raises UsageError for a folder that is not VOC's or a split
    without pictures, and UserError for a broken annotation.
    """

    def __init__(self, places: Sequence[tuple[str, str]], classes: Sequence[str]):
        self.classes = list(classes)
        self.notes: list[str] = []
        self.paths: list[str] = []
        self.objects: list[Objects] = []
        self.sizes: list[tuple[int, int]] = []
        for root, split in places:
            self._open(Path(root), split)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return self.paths[row]

    def _open(self, root: Path, split: str) -> None:
        for part, pattern in PARTS:
            if not (root / part).is_dir():
                below = [*sorted(root.glob("VOC*")), *sorted(root.glob("*/VOC*"))]
                inside = [folder for folder in below if folder.is_dir()]
                hint = f"; give the folders in it, such as {inside[0]}" if inside else ""
                raise UsageError(f"{root} has no {part}/{pattern}, as Pascal VOC has{hint}")
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        pictures = {path.stem: path for path in sorted((root / "JPEGImages").iterdir())}
        for name in read_split(listed):
            if name not in pictures:
                missing = f"{root / 'JPEGImages' / name}.jpg"
                raise UsageError(f"{listed} names {printable(name)}, but there is no {missing}")
            self.paths.append(str(pictures[name]))
            annotation = root / "Annotations" / f"{name}.xml"
            size, objects = read_annotation(annotation, self.paths[-1], self.classes)
            self.sizes.append(size)
            self.objects.append(objects)

    def require_objects(self, split: str) -> None:
        """Raise UsageError where no picture has an object that counts."""
        if all(bool(things.difficult.all()) for things in self.objects):
            raise UsageError(
                f"the {len(self)} pictures of split {split} have no objects, or difficult ones "
                "only: give another split, or check the <object> entries of the annotations"
            )

    def decode(self, row: int, flip: bool = False) -> tuple[Tensor, Objects]:
        """Return a picture (3, H, W) uint8 and its objects, both mirrored with `flip`.

        Raises UserError where it cannot be read.
        """
        path = self.paths[row]
        try:
            with Image.open(path) as picture:
                upright = as_rgb(ImageOps.exif_transpose(picture))
                pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        except UNREADABLE as error:
            raise UserError(f"cannot read the picture {path}: {str(error)[:100]}") from None
        _, height, width = pixels.shape
        boxes, labels, difficult = self.objects[row]
        if (width, height) != self.sizes[row]:
            annotated = "{} x {}".format(*self.sizes[row])
            raise UserError(
                f"{path} has {width} x {height} pixels when turned as its EXIF tag says, but "
                f"{annotated} in its annotation, which may be of another picture"
            )
        if flip:
            pixels = pixels.flip(2)
            left, top, right, bottom = boxes.unbind(1)
            boxes = torch.stack((width - right, top, width - left, bottom), 1)
        return pixels, Objects(boxes, labels, difficult)


def read_split(path: Path) -> list[str]:
    """Return the pictures' names in a split. Raises UsageError where there are none."""
    try:
        names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        splits = [file.stem for file in sorted(path.parent.glob("*.txt")) if "_" not in file.stem]
        reason = getattr(error, "strerror", None) or "not a text file"
        listed = sets.few(splits) or "none"
        raise UsageError(f"{path}: {reason}; the splits there are {listed}") from None
    if not names:
        raise UsageError(f"{path} names no pictures; it must have one picture's name a line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} names {printable(twice)} twice; each picture counts once")
    return names


# ------------------------------------------------------------------------------------- annotations


def read_annotation(
    path: Path, picture: str, classes: Sequence[str]
) -> tuple[tuple[int, int], Objects]:
    """Return ((width, height), objects) of an annotation, or if it has no size the picture's.

    Names count without their XML namespace. Raises UserError for a broken file, an unknown class,
    or a box outside the picture.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not a whole XML file ({error})") from None
    size = _size(root, picture)
    boxes, labels, difficult = [], [], []
    for thing in root.iterfind("{*}object"):
        name = (thing.findtext("{*}name") or "").strip()
        if name not in classes:
            raise UserError(
                f"{path} has an object of class {name!r}, which is not one of "
                f"{sets.few(classes)}; name all classes with --classes"
            )
        try:
            corners = [float(thing.findtext(f"{{*}}bndbox/{{*}}{corner}")) for corner in CORNERS]
            difficult.append(bool(int(thing.findtext("{*}difficult") or 0)))
        except (TypeError, ValueError):
            wanted = f"no bndbox of four numbers ({', '.join(CORNERS)})"
            raise UserError(f"{path}: its {name} has {wanted}") from None
        boxes.append(_box(corners, size, f"{path}: the box of its {name}"))
        labels.append(list(classes).index(name) + 1)
    flags = torch.tensor(difficult, dtype=torch.bool)
    numbers = torch.tensor(labels, dtype=torch.int64)
    return size, Objects(torch.tensor(boxes).reshape(-1, 4).float(), numbers, flags)


def _size(root: ElementTree.Element, picture: str) -> tuple[int, int]:
    """Return (width, height) from an annotation, or if it has none from the picture."""
    try:
        sides = (root.findtext(f"{{*}}size/{{*}}{side}") for side in ("width", "height"))
        size = tuple(int(float(side)) for side in sides)
    except (TypeError, ValueError, OverflowError):
        size = (0, 0)
    if min(size) >= 1:
        return size
    try:
        with Image.open(picture) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in ON_THE_SIDE
            return image.size[::-1] if is_turned else image.size
    except UNREADABLE as error:
        raise UserError(f"cannot read the picture {picture}: {str(error)[:100]}") from None


def _box(corners: list[float], size: tuple[int, int], subject: str) -> tuple[float, ...]:
    """Return the box of VOC's corners, from 0 at the left and upper edge, cut to the picture.

    VOC's corners are pixels that belong to the box, counted from 1, so 1 is subtracted from the
    left and upper ones. A box may begin at pixel 0, or end one pixel late. Raises UserError, whose
    message begins with `subject`, where the box is outside the picture or empty.
    """
    width, height = size
    left, top = corners[0] - 1, corners[1] - 1
    right, bottom = corners[2:]
    shown = ", ".join(f"{key} {value:g}" for key, value in zip(CORNERS, corners))
    if not (left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1):
        raise UserError(f"{subject} ({shown}) is outside the picture of {width} x {height} pixels")
    box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    if not (box[2] > box[0] and box[3] > box[1]):
        raise UserError(f"{subject} ({shown}) has no size")
    return box
