"""Handle the files of a packed split: names, header, settings, and an unfinished pack."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UsageError, UserError, files, printable, sets
from common.sets import PACK_FORMAT, PACK_VERSION, FolderSet
from preprocess.workers import lies_in, split_folders

HEADER_BYTES = 128  # fixed, so that the count can be filled in at the end
SPLITS = ("train", "val")


@dataclass(frozen=True)
class PackFiles:
    """The paths of one split. `partial` and `marker` exist only until it is finished."""

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
    """Return the first HEADER_BYTES of an .npy file (format 1.0) of `count` squares.

    It is padded with spaces, as the format requires.
    """
    shape = f"({count}, {side}, {side}, 3)"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    length = HEADER_BYTES - 10
    padded = text.ljust(length - 1).encode() + b"\n"
    return np.lib.format.magic(1, 0) + length.to_bytes(2, "little") + padded


def size_text(count: int, side: int) -> str:
    """Describe the size of a pack of `count` squares, in decimal and in binary units."""
    total = HEADER_BYTES + count * 3 * side**2
    for unit, binary, power in (("GB", "GiB", 3), ("MB", "MiB", 2)):
        if total >= 1000**power:
            return f"{total / 1000**power:.1f} {unit} ({total / 1024**power:.1f} {binary})"
    return f"{total} bytes"


def check_output(out: Path, source: Path, flag: str = "the output folder") -> None:
    """Raise UsageError if `out`, or a split folder in it, is or lies inside `source`.

    Links are followed.
    """
    for place in (out, *(out / name for name in (*SPLITS, "test", "validation"))):
        if lies_in(place, source, split_folders(source)):
            raise UsageError(
                f"{flag} {printable(place)} lies inside the input {printable(source)}: "
                "choose another folder"
            )


def pack_settings(source: FolderSet, side: int) -> dict:
    """Return the settings that decide a pack.

    An unfinished pack is continued, and a finished one kept, only if these are equal.
    """
    digest = hashlib.sha256(json.dumps([source.classes, source.targets.tolist()]).encode())
    for path in source.paths:
        digest.update(b"\0" + os.fsencode(os.path.relpath(path, source.root)))
    return {
        "version": PACK_VERSION,
        "side": side,
        "pictures": len(source),
        "listing": digest.hexdigest(),
    }


def read_marker(paths: PackFiles) -> dict:
    """Return the marker of an unfinished pack, which records its progress. Raises UserError."""
    try:
        state = files.read_json(paths.marker)
        failed = [[str(name), str(reason)] for name, reason in state["failed"]]
        return state | {"done": int(state["done"]), "count": int(state["count"]), "failed": failed}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{paths.marker} cannot be read: start this pack over with --force"
        ) from None


def _refuse_foreign(listing: Path) -> None:
    """Raise UsageError for a file of this name that another program wrote, such as annotations."""
    with contextlib.suppress(OSError, ValueError):
        content = files.read_json(listing)
        if not isinstance(content, dict) or content.get("format") != PACK_FORMAT:
            raise UsageError(f"{listing} is not the list of a pack: name another folder")


def begin(paths: PackFiles, settings: dict, command: str, force: bool) -> dict | None:
    """Return the marker to continue from, or None where the pack is finished.

    command: the command that finishes this pack after an interruption. force: remove an existing
    pack. Raises UsageError if another pack is in the way, UserError if the marker is damaged.
    """
    _refuse_foreign(paths.listing)
    if force:
        for path in (paths.listing, paths.marker, paths.partial, paths.pixels, paths.failed):
            path.unlink(missing_ok=True)
    place = printable(paths.folder / paths.split)
    differs = "of other pictures or another side: give another folder, or --force to replace it"
    if paths.listing.exists():
        sets.read_pack(paths.listing)  # raises UserError for a damaged one
        if files.read_json(paths.listing).get("settings") != settings:
            raise UsageError(f"{place}.npy is a finished pack {differs}")
        return None
    if paths.marker.exists():
        state = read_marker(paths)
        if state.get("settings") != settings:
            raise UsageError(f"{place}.npy.partial is an unfinished pack {differs}")
        return state
    if paths.pixels.exists():
        raise UsageError(
            f"{place}.npy exists without {paths.listing.name}: "
            "remove it, or replace it with --force"
        )
    state = {"settings": settings, "done": 0, "count": 0, "failed": [], "command": command}
    files.write_json(paths.marker, state)
    return state


def finish(source: FolderSet, paths: PackFiles, side: int, state: dict) -> None:
    """Write the .json file of a pack with complete pixels, which finishes it.

    Raises UserError if no picture of a class could be read.
    """
    left_out = {file for file, _ in state["failed"]}
    sources = [os.path.relpath(path, source.root) for path in source.paths]
    kept = [row for row, file in enumerate(sources) if file not in left_out]
    targets = source.targets[kept].tolist()
    _require_all_classes(source, targets)
    content = {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "split": paths.split,
        "count": len(kept),
        "side": side,
        "bytes_per_picture": 3 * side**2,
        "order": "picture, row, column, RGB; uint8",
        "geometry": f"shorter side resized to {side} (bilinear, antialiased), central square",
        "source": printable(os.path.abspath(source.root)),
        "settings": state["settings"],
        "failed": state["failed"],
        "classes": source.classes,
        "targets": targets,
        "files": [sources[row] for row in kept],
    }
    if paths.partial.exists():
        os.replace(paths.partial, paths.pixels)
    if state["failed"]:
        with files.replacing(paths.failed, "w", encoding="utf-8") as file:
            for name, why in state["failed"]:
                file.write(f"{printable(name)}\t{why}\n")
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    with files.replacing(paths.listing, "w") as file:  # one line per entry, not per picture
        file.write(f"{{\n{lines}\n}}\n")
    paths.marker.unlink(missing_ok=True)


def _require_all_classes(source: FolderSet, targets: Sequence[int]) -> None:
    """Raise UserError if a class has no readable picture."""
    empty = sorted(set(range(len(source.classes))) - set(targets))
    if not empty:
        return
    names = ", ".join(printable(source.classes[label]) for label in empty[:5])
    if len(empty) > 5:
        names += ", ..."
    raise UserError(
        f"{printable(source.root)}: there is no readable picture in {len(empty)} of "
        f"{len(source.classes)} classes ({names}): repair or remove them and pack with --force"
    )


class PixelFile:
    """The pixels of an unfinished pack, and the marker that records how many are on the disk.

    The file is written in place, not by `files.replacing`, because 25 GB must continue where they
    stopped; the marker is written only after a sync and tells which part is valid.
    """

    def __init__(self, source: FolderSet, paths: PackFiles, side: int, state: dict):
        self.source = source
        self.paths = paths
        self.bytes_each = 3 * side**2
        self.side = side
        self.state = state
        self.done = state["done"]
        self.count = state["count"]
        self.failed = list(state["failed"])
        self.handle = os.open(paths.partial, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def end(self) -> int:
        """Return the size in bytes of the header and the squares so far."""
        return HEADER_BYTES + self.count * self.bytes_each

    def cut(self) -> None:
        """Truncate the file to its marker. Raises UserError if it is shorter."""
        if self.count and os.fstat(self.handle).st_size < self.end:
            raise UserError(
                f"{printable(self.paths.partial)} is shorter than its marker says: "
                "start over with --force"
            )
        os.ftruncate(self.handle, self.end)
        self._write(npy_header(0, self.side), 0)

    def append(self, first: int, squares: np.ndarray, failures: list[tuple[int, str]]) -> None:
        """Write the squares of a block. failures: (row in the block, reason) of unreadable rows."""
        if len(squares):
            self._write(squares, self.end)
        count = self.count + len(squares)
        done = first + len(squares) + len(failures)
        names = [self.source.path(first + row) for row, _ in failures]
        names = [os.path.relpath(name, self.source.root) for name in names]
        failed = self.failed + [[name, why] for name, (_, why) in zip(names, failures)]
        # At once, as Ctrl-C may come between two statements, and `save` follows it.
        self.count, self.done, self.failed = count, done, failed

    def complete(self) -> None:
        """Write the final count into the header."""
        self._write(npy_header(self.count, self.side), 0)
        self.save()

    def save(self) -> None:
        """Sync the pixels, then write the marker."""
        os.fsync(self.handle)
        self.state.update(done=self.done, count=self.count, failed=self.failed)
        files.write_json(self.paths.marker, self.state)

    def _write(self, content, offset: int) -> None:
        content = memoryview(content).cast("B")
        while content:
            written = os.pwrite(self.handle, content, offset)
            content = content[written:]
            offset += written

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)
