"""Read the objects of a picture from its annotation in Pascal VOC's XML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from common import UserError, sets

CORNERS = ("xmin", "ymin", "xmax", "ymax")
IS_DIFFICULT = {"": 0, "unspecified": 0, "false": 0, "true": 1}  # what is written beside numbers


class Objects(NamedTuple):
    """The objects of one picture.

    boxes (n, 4): float32 (x1, y1, x2, y2) in pixels, from 0 at the left and upper edge to width and
    height. labels (n,): classes from 1, as 0 is the background. difficult (n,): True for objects
    that VOC does not count, found or not.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def read_annotation(
    path: Path, picture: str, size: tuple[int, int], classes: Sequence[str]
) -> Objects:
    """Return the objects of a picture of `size` (width, height) in pixels.

    Names count without their XML namespace. Raises UserError, which names all faults, for a broken
    file, the size of another picture, an unknown class, or a box outside the picture.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also of encodings
        raise UserError(f"{path}: not a whole XML file in UTF-8 ({error})") from None
    faults = _faults_of_size(root, picture, size)
    rows = []
    for thing in root.iterfind("{*}object"):
        try:
            rows.append(_object(thing, size, classes))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
    boxes, labels, difficult = zip(*rows) if rows else ((), (), ())
    return Objects(
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _faults_of_size(root: ElementTree.Element, picture: str, size: tuple[int, int]) -> list[str]:
    """Return a message if the annotation has another size than the picture, else []."""
    try:
        sides = (root.findtext(f"{{*}}size/{{*}}{side}") for side in ("width", "height"))
        annotated = tuple(int(float(side)) for side in sides)
    except (TypeError, ValueError, OverflowError):
        return []
    if min(annotated) < 1 or annotated == size:
        return []
    return [
        f"its size is {annotated[0]} x {annotated[1]}, but {picture} has {size[0]} x {size[1]} "
        "pixels when turned as its EXIF tag says: it may be of another picture"
    ]


def _object(thing: ElementTree.Element, size: tuple[int, int], classes: Sequence[str]) -> tuple:
    """Return (box, label, difficult) of an object. Raises ValueError with what is wrong with it."""
    name = (thing.findtext("{*}name") or "").strip()
    if name not in classes:
        for known in classes:
            if known.lower() == name.lower():
                raise ValueError(f"its class {name!r} is written {known!r} in the list of classes")
        raise ValueError(
            f"it has an object of class {name!r}, which is not one of {sets.few(classes)} (name "
            "all classes with --classes)"
        )
    try:
        corners = [float(thing.findtext(f"{{*}}bndbox/{{*}}{corner}")) for corner in CORNERS]
    except (TypeError, ValueError):
        wanted = f"no bndbox of four numbers ({', '.join(CORNERS)})"
        raise ValueError(f"its {name} has {wanted}") from None
    word = (thing.findtext("{*}difficult") or "").strip().lower()
    try:
        is_difficult = bool(float(IS_DIFFICULT.get(word, word)))
    except ValueError:
        raise ValueError(f"its {name} has difficult {word!r}, which must be 0 or 1") from None
    return (
        _box(corners, size, f"the box of its {name}"),
        list(classes).index(name) + 1,
        is_difficult,
    )


def _box(corners: list[float], size: tuple[int, int], subject: str) -> tuple[float, ...]:
    """Return the box of VOC's corners, from 0 at the left and upper edge, cut to the picture.

    VOC's corners are pixels that belong to the box, counted from 1, so 1 is subtracted from the
    left and upper ones. A box may begin at pixel 0, or end one pixel late. Raises ValueError, whose
    message begins with `subject`, where the box is outside the picture or empty.
    """
    width, height = size
    left, top = corners[0] - 1, corners[1] - 1
    right, bottom = corners[2:]
    shown = ", ".join(f"{key} {value:g}" for key, value in zip(CORNERS, corners))
    if not (left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1):
        raise ValueError(f"{subject} ({shown}) is outside the picture of {width} x {height} pixels")
    box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    if not (box[2] > box[0] and box[3] > box[1]):
        raise ValueError(f"{subject} ({shown}) has no size")
    return box
