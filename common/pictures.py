"""Represent sets of pictures for the loader: files to decode, or arrays of one size."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common import UserError, files, printable

UNKNOWN_KIND = "damaged in its header, or of a kind that Pillow does not read (as 12-bit JPEG)"


def is_of_known_format(content: bytes) -> bool:
    """Return whether a file begins like one of the formats that Pillow opens."""
    Image.init()
    start = content[:16].ljust(16, b"\0")
    return any(accept(start) for _, accept in Image.OPEN.values() if accept is not None)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB; values of 16 bits keep their high byte.

    Pillow does this for 16-bit colour itself, but clips 16-bit grey at 255.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


class BadPicture(UserError):
    """A file that cannot be decoded. It has a `row`, a `path` and a short `reason`."""


class PictureSet:
    """Pictures with labels.

    targets: int64 (N,), the class index of each picture, or -1 for an unlabelled one.
    classes: class names in the order of their indices.
    notes: lines to print at the start of a run.

    A subclass has `open(row)`, which returns a picture, and `path(row)`, which names its place.
    """

    def __init__(
        self, targets: Sequence[int], classes: Sequence[str], name: str, places: np.ndarray
    ):
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes = list(classes)
        self.name = name
        self.notes = []
        self.held = None  # common.data keeps the decoded pictures here
        self._places = places  # the place of every picture: a path or a row

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "held": None}  # the copy on the device stays in this process

    def select(self, rows: Sequence[int]) -> PictureSet:
        """Return this set restricted to these rows, in this order; class indices do not change."""
        rows = np.asarray(rows, dtype=np.int64)
        part = copy.copy(self)  # without `held`, by __getstate__
        part.targets = self.targets[torch.from_numpy(rows)]
        part.notes = list(self.notes)
        part._places = self._places[rows]
        return part


class FolderSet(PictureSet):
    """Picture files on disk; paths are relative to root, or absolute."""

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int],
        classes: Sequence[str],
        root: str | Path,
    ):
        # Workers share one byte array without copying it. With a million str objects they would
        # copy the memory pages of reference counts, and pickling would take long.
        places = np.array([os.fsencode(path) for path in paths] or [b""])
        super().__init__(targets, classes, "/".join(Path(root).parts[-2:]), places)
        self.root = str(root)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._places[row]))

    @property
    def paths(self) -> list[str]:
        """All full paths, a new list at every call."""
        return [self.path(row) for row in range(len(self))]

    def open(self, row: int) -> Image.Image:
        """Open the picture: read its header, but do not decode pixels. Raises BadPicture."""
        try:
            with open(self.path(row), "rb") as file:
                return Image.open(BytesIO(file.read()))
        except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
            raise self.bad_picture(row, error) from None

    def _is_of_known_format(self, row: int) -> bool:
        with open(self.path(row), "rb") as file:
            return is_of_known_format(file.read(16))

    def bad_picture(self, row: int, error: Exception) -> UserError:
        """Return the error to raise after a decoder raised `error`.

        It is a BadPicture, which may be skipped, unless memory ran out.
        """
        path = printable(self.path(row))
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch says this
            return UserError(f"{path}: the picture does not fit in memory: remove or shrink it")
        if isinstance(error, Image.DecompressionBombError):
            reason = f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow refuses"
        elif isinstance(error, UnidentifiedImageError) and self._is_of_known_format(row):
            reason = UNKNOWN_KIND
        elif isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror.lower()  # missing, no permission, input/output error
        else:
            reason = "not a picture or truncated"
        bad = BadPicture(
            f"{path}: {reason} (--skip-bad-images replaces such files and counts them)"
        )
        bad.row = row
        bad.path = self.path(row)
        bad.reason = reason
        return bad


class ArraySet(PictureSet):
    """Pictures of one size that need no decoding, in memory or in a memory-mapped file.

    images: uint8 (N, 3, H, W), or the path of an .npy file (N, H, W, 3), which is read on demand
    and shared by processes. sources: the file that each picture was made from.
    """

    def __init__(
        self,
        images: Tensor | Path,
        targets: Sequence[int],
        classes: Sequence[str],
        name: str = "pictures",
        sources: Sequence[str] = (),
    ):
        super().__init__(targets, classes, name, np.arange(len(targets)))
        self.file = images if isinstance(images, Path) else None
        self._images = None if isinstance(images, Path) else images
        self._sources = sources
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[:2] != (len(self), 3):
            raise ValueError(
                f"images must be uint8 (N, 3, H, W) with N targets, got {self.images.dtype} {shape}"
            )

    @property
    def images(self) -> Tensor:
        """All pictures uint8 (M, 3, H, W), before `select`; a file is mapped read-only."""
        if self._images is None:  # every process maps the file itself
            with warnings.catch_warnings():  # torch warns that the array is read-only
                warnings.simplefilter("ignore", UserWarning)
                pixels = torch.from_numpy(files.read_array(self.file))
            self._images = pixels.permute(0, 3, 1, 2)
        return self._images

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every picture."""
        return tuple(self.images.shape[-2:])

    def path(self, row: int) -> str:
        place = self._places[row]
        text = f"{self.file or self.name}[{place}]"
        return f"{text} ({self._sources[place]})" if self._sources else text

    def open(self, row: int) -> Tensor:
        """Return a picture uint8 (3, H, W), a slice of `images`."""
        return self.images[self._places[row]]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return a copy of these rows, uint8 (len(rows), 3, H, W), on the device of `images`."""
        rows = torch.from_numpy(self._places[rows.numpy()])
        rows = rows.to(self.images.device, non_blocking=True)
        if self.file is None:
            return self.images.index_select(0, rows)
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, rows)  # in the order of the file
        return pixels.permute(0, 3, 1, 2)

    def __getstate__(self) -> dict:
        # A map is not pickled, since that would copy all pixels.
        return {**super().__getstate__(), "_images": self._images if self.file is None else None}
