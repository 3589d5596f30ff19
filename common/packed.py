"""A data set packed into one file of equal squares, read through a memory map. preprocess/pack.py writes it.

    PACK/train.npy   uint8 (count, side, side, 3); any program opens it: numpy.load(path, mmap_mode="r")
    PACK/train.json  class names; class index and source file of each picture; geometry. Written last: without it the
                     pack is unfinished and is not read
    PACK/val.npy, PACK/val.json

A picture takes 3 * side^2 bytes: 196,608 at side 256, so the 126,689 of ImageNet-100 take 24.9 GB (23.2 GiB). Rows are
stored as height, width, RGB, as decoders deliver them: torch's integer resize cuts crops from that order faster than from
planes (benchmarks/pack.py: 1.4 to 1.5 times as fast on two busy CPU cores).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UsageError, UserError
from common.bar import Bar

FORMAT, VERSION = "packed pictures", 1
HEADER_BYTES = 128  # of the .npy file; fixed, so that the count can be filled in at the end
SPLITS = ("train", "val")


@dataclass(frozen=True)
class PackFiles:
    """The files of one split. `partial` and `marker` exist while it is being written."""

    folder: Path
    split: str

    @property
    def pixels(self) -> Path:
        return self.folder / f"{self.split}.npy"

    @property
    def listing(self) -> Path:
        return self.folder / f"{self.split}.json"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.split}.npy.partial"

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.split}.packing.json"

    @property
    def failed(self) -> Path:
        return self.folder / f"{self.split}.failed.txt"


def npy_header(count: int, side: int) -> bytes:
    """The first HEADER_BYTES of an .npy file (format 1.0) of `count` squares; padded with spaces as the format asks."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {side}, {side}, 3), }}"
    length = HEADER_BYTES - 10
    return np.lib.format.magic(1, 0) + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


class PackedSet:
    """Squares in a memory-mapped file: as `sets.FolderSet`, with pictures of one size that need no decoding.

    pixels, rows: the file, and which of its rows are the pictures of this set (None: all, in order). Only the rows that
    are asked for are read; what was read stays in the system's page cache, shared by all processes.
    """

    def __init__(
        self,
        pixels: Path,
        side: int,
        targets: Sequence[int],
        classes: Sequence[str],
        files: Sequence[str],
        rows: torch.Tensor | None = None,
        name: str = "",
    ):
        self.pixels_path, self.side = Path(pixels), side
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes = list(classes)
        self.name = name or f"{self.pixels_path.parent.name}/{self.pixels_path.stem} (packed)"
        self.notes: list[str] = []
        self._files, self._rows = files, rows
        self._map: torch.Tensor | None = None  # opened at first use, and again in every process that gets a copy
        self._resident = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return self.side, self.side

    def path(self, row: int) -> str:
        """Where the picture lies, and the file it was made from."""
        row = self._row(row)
        return f"{self.pixels_path}[{row}] ({self._files[row]})"

    def pixels(self, row: int) -> torch.Tensor:
        """uint8 (3, side, side), in memory as height, width, 3; part of the map: not to be written to."""
        return self._mapped()[self._row(row)].permute(2, 0, 1)

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self._mapped()[self._row(row)].numpy())

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 (len(rows), 3, side, side), read from the file."""
        rows = rows.cpu() if self._rows is None else self._rows[rows.cpu()]
        return self._mapped().index_select(0, rows).permute(0, 3, 1, 2)

    def resident(self, device: torch.device, progress: bool = True) -> torch.Tensor | PackedSet:
        """Something that gives uint8 (B, 3, side, side) for an index (B,): a tensor on the device; on the CPU this set."""
        if device.type == "cpu":
            return self
        images = torch.empty((len(self), 3, *self.size), dtype=torch.uint8, device=device)
        chunk = max(1, (64 << 20) // (3 * self.side**2))
        bar = Bar(f"reading {self.name}", len(self), "pictures", enabled=progress)
        try:
            for rows in torch.arange(len(self)).split(chunk):
                block = self[rows].permute(0, 2, 3, 1).to(device)  # planes are made on the device
                images[rows[0] : rows[-1] + 1] = block.permute(0, 3, 1, 2)
                bar.add(len(rows))
        finally:
            bar.close()
        return images

    def bad_picture(self, row: int, error: Exception):
        raise error  # nothing is decoded: whatever went wrong is a programming error

    def select(self, rows: Sequence[int]) -> PackedSet:
        """The same set restricted to these rows, in this order; class indices stay."""
        return self._restricted(torch.as_tensor(rows, dtype=torch.int64), self.targets, self.classes)

    def with_classes(self, classes: Sequence[str]) -> PackedSet:
        """The pictures of these classes, which must be among its own; labels follow the order given."""
        label = {name: i for i, name in enumerate(classes)}
        relabel = torch.tensor([label.get(name, -1) for name in self.classes])
        targets = relabel[self.targets]
        return self._restricted((targets >= 0).nonzero().flatten(), targets, classes)

    def _restricted(self, rows: torch.Tensor, targets: torch.Tensor, classes: Sequence[str]) -> PackedSet:
        in_file = rows if self._rows is None else self._rows[rows]
        part = PackedSet(self.pixels_path, self.side, targets[rows], classes, self._files, in_file, self.name)
        part.notes = list(self.notes)
        return part

    def _row(self, row: int) -> int:
        return int(row if self._rows is None else self._rows[row])

    def _mapped(self) -> torch.Tensor:
        if self._map is None:
            pixels = np.load(self.pixels_path, mmap_mode="r")
            with warnings.catch_warnings():  # torch has no read-only tensors and warns of that
                warnings.simplefilter("ignore", UserWarning)
                self._map = torch.from_numpy(pixels)
        return self._map

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None, "_resident": None}  # a copy of the map would be a copy of the pixels


def open_packed(root: str | Path, split: str) -> PackedSet:
    """A split ("train", "val"; "test" means val) of the pack in `root`.

    Raises UsageError where there is none, UserError where it is unfinished or damaged.
    """
    root = Path(root)
    split = "val" if split == "test" else split
    if split not in SPLITS:
        raise UsageError(f"a packed set has the splits {' and '.join(SPLITS)}, not {split!r}")
    if not root.is_dir():
        raise UsageError(f"{root}: {'is a file, not a folder' if root.exists() else 'no such folder'}")
    files = PackFiles(root, split)
    if not files.listing.exists():
        raise _no_listing(files)
    try:
        content = json.loads(files.listing.read_text())
        if content["format"] != FORMAT or content["version"] > VERSION:
            raise UserError(f"{files.listing}: not a list of packed pictures that this version reads")
        count, side = content["count"], content["side"]
        targets, classes, sources = content["targets"], content["classes"], content["files"]
        fits = len(targets) == len(sources) == count and all(0 <= t < len(classes) for t in targets)
        failed = len(content["failed"])
    except OSError as error:
        raise UserError(f"{files.listing}: {error.strerror.lower()}") from None
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{files.listing}: damaged; pack again with --force")
    _check_pixels(files, count, side)
    opened = PackedSet(files.pixels, side, targets, classes, sources)
    if failed:
        opened.notes.append(f"{files.listing}: {failed} pictures could not be read when it was packed")
    return opened


def read_marker(files: PackFiles) -> dict:
    """How far an unfinished pack has come. Raises UserError."""
    try:
        return dict(json.loads(files.marker.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{files.marker}: cannot be read; start this pack over with --force") from None


def _no_listing(files: PackFiles) -> UserError:
    root, split = files.folder, files.split
    if files.marker.exists():
        state = read_marker(files)
        done = f"{state.get('done')} of {state.get('settings', {}).get('pictures')} pictures"
        return UserError(f"{root}: packing of {split} is unfinished ({done}); finish it with: {state.get('command')}")
    if files.pixels.exists():
        return UserError(
            f"{root}: {files.pixels.name} is there and {files.listing.name} is not, which is written last: "
            f"pack again with: python preprocess/pack.py TREE {root} --force"
        )
    if (root / split).is_dir():
        return UsageError(
            f"{root}: class folders, not a packed set: leave out --dataset packed, or pack them with: "
            f"python preprocess/pack.py {root} PACK"
        )
    there = [s for s in SPLITS if PackFiles(root, s).listing.exists()]
    has = f"it has only {there[0]}" if there else "nothing is packed here"
    return UsageError(f"{root}: no packed {split} ({files.listing.name}): {has}; python preprocess/pack.py TREE {root}")


def _check_pixels(files: PackFiles, count: int, side: int) -> None:
    try:
        expected = npy_header(count, side)
        with open(files.pixels, "rb") as file:
            fits = file.read(HEADER_BYTES) == expected
        fits = fits and os.path.getsize(files.pixels) == HEADER_BYTES + count * 3 * side**2
    except OSError as error:
        raise UserError(f"{files.pixels}: {error.strerror.lower()}") from None
    if not fits:
        raise UserError(
            f"{files.pixels}: not the {count} squares of side {side} that {files.listing.name} lists: "
            "a broken copy; copy it again, or pack again with --force"
        )
