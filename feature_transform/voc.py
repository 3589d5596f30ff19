"""Read pictures and their objects in the layout of Pascal VOC.

ROOT/Annotations/ID.xml         objects: name, bndbox (from 1, its last pixel included), difficult
ROOT/ImageSets/Main/SPLIT.txt   IDs, one a line; a suffix (.jpg) and what follows are ignored
ROOT/JPEGImages/ID.jpg          or another suffix that Pillow reads

A picture is turned as its EXIF tag says, since annotation tools show it that way.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common import UsageError, UserError, printable, sets
from common.pictures import as_rgb
from feature_transform.voc_annotations import Objects, read_annotation

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
PARTS = (("Annotations", "*.xml"), ("ImageSets/Main", "*.txt"), ("JPEGImages", "*.jpg"))
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of a picture
ON_THE_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
LISTED = 100  # the most faults in a report


def class_names(text: str) -> list[str]:
    """Return the names in --classes, "a,b" or a file of one a line; VOC's where it is empty.

    Lines of a file that begin with # are comments.
    """
    looks_like_a_file = "," not in text and (os.sep in text or Path(text).suffix)
    if looks_like_a_file and not os.path.isfile(text):
        raise UsageError(f"--classes {text}: no such file")
    if os.path.isfile(text):
        text = ",".join(sets.read_names(text, "--classes"))
    names = [name.strip() for name in text.split(",") if name.strip()] or list(CLASSES)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--classes: {twice[0]} comes twice; name each class once")
    return names


class Pictures:
    """The pictures of the splits `(root, split)` in order, and their objects.

    classes: names in label order. skip_bad: whether a picture that cannot be decoded is replaced.
    faults: a message for each picture that is left out because it or its annotation is broken; see
    `report_faults`. Raises UsageError for a folder that is not VOC's or a split without pictures.
    """

    def __init__(
        self, places: Sequence[tuple[str, str]], classes: Sequence[str], skip_bad: bool = False
    ):
        self.classes = list(classes)
        self.skip_bad = skip_bad
        self.notes: list[str] = []
        self.faults: list[str] = []
        self.paths: list[str] = []
        self.objects: list[Objects] = []
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
                whole = [tree for tree in below if all((tree / part).is_dir() for part, _ in PARTS)]
                hint = f"; give the folders in it, such as {whole[0]}" if whole else ""
                raise UsageError(f"{root} has no {part}/{pattern}, as Pascal VOC has{hint}")
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        readable = Image.registered_extensions()
        files = (root / "JPEGImages").iterdir()
        files = [path for path in files if path.suffix.lower() in readable]
        files.sort(key=lambda path: path.suffix == ".jpg")  # which is taken before others
        pictures = {path.stem: str(path) for path in files}
        for name in read_split(listed, pictures):
            annotation = root / "Annotations" / f"{name}.xml"
            try:
                if name not in pictures:
                    raise UserError(f"{listed} names {name}, which {root}/JPEGImages lacks")
                size = upright_size(pictures[name])
                objects = read_annotation(annotation, pictures[name], size, self.classes)
            except UserError as error:
                self.faults.append(str(error))
                continue
            self.paths.append(pictures[name])
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
        boxes, labels, difficult = self.objects[row]
        if flip:
            width = pixels.shape[2]
            pixels = pixels.flip(2)
            left, top, right, bottom = boxes.unbind(1)
            boxes = torch.stack((width - right, top, width - left, bottom), 1)
        return pixels, Objects(boxes, labels, difficult)


def open_sets(args, is_main: bool) -> tuple[Pictures, Pictures]:
    """Return the pictures to train on and to test on. Raises UsageError if one has no objects.

    args: its data, split, test_data, test_split, classes and skip_bad_images are used.
    """
    names = class_names(args.classes)
    train_places = [(root, args.split) for root in args.data]
    test_place = (args.test_data or args.data[0], args.test_split)
    train_set = Pictures(train_places, names, args.skip_bad_images)
    test_set = Pictures([test_place], names, args.skip_bad_images)
    report_faults((train_set, test_set), is_main)
    train_set.require_objects(args.split)
    test_set.require_objects(args.test_split)
    return train_set, test_set


def report_faults(opened: Sequence[Pictures], is_main: bool) -> None:
    """Print the faults of all these pictures as one report, in the main process.

    Raises UserError, unless pictures with faults may be left out.
    """
    faults = list(dict.fromkeys(fault for pictures in opened for fault in pictures.faults))
    if not faults:
        return
    if is_main:
        print("\n".join(faults[:LISTED]), file=sys.stderr)
    listed = f"{len(faults)} pictures have faults, of which at most {LISTED} are listed above"
    if not all(pictures.skip_bad for pictures in opened):
        raise UserError(f"{listed}: mend them, or leave them out with --skip-bad-images")
    if is_main:
        print(f"{listed}; they are left out", file=sys.stderr)


def read_split(path: Path, pictures: Collection[str]) -> list[str]:
    """Return the names of the pictures in a split. Raises UsageError where there are none.

    pictures: the names that exist, which may have spaces.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        splits = [file.stem for file in sorted(path.parent.glob("*.txt")) if "_" not in file.stem]
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        listed = sets.few(splits) or "none"
        raise UsageError(f"{path}: {reason}; the splits there are {listed}") from None
    names = [_name(line.strip(), pictures) for line in lines if line.strip()]
    if not names:
        raise UsageError(f"{path} names no pictures; it must have one picture's name a line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} names {printable(twice)} twice; each picture counts once")
    return names


def _name(line: str, pictures: Collection[str]) -> str:
    """Return the name in a line of a split, which may have a suffix and VOC's 1, 0 or -1 after it.

    It is the longest beginning of the line that names a picture.
    """
    without_number = re.sub(r"\s+(1|0|-1)$", "", line)
    for words in (line, without_number, line.split()[0]):
        for name in (words, os.path.splitext(words)[0]):
            if name in pictures:
                return name
    return without_number


def upright_size(picture: str) -> tuple[int, int]:
    """Return (width, height) of a picture turned as its EXIF tag says, from the file's header.

    Raises UserError where it cannot be read.
    """
    try:
        with Image.open(picture) as image:
            exif = Image.Image.getexif(image)  # that of a PNG would decode its pixels
            is_turned = exif.get(ExifTags.Base.Orientation) in ON_THE_SIDE
            return image.size[::-1] if is_turned else image.size
    except UNREADABLE as error:
        raise UserError(f"cannot read the picture {picture}: {str(error)[:100]}") from None
