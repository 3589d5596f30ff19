"""Pack a tree of pictures: decoded once, squares of one size, one memory-mapped file for train/ and one for val/.

    python preprocess/pack.py IMAGENET100 PACK --side 256
    python nonsem_neg/moco_non_sem_neg.py PACK --dataset packed

Each picture's shorter side is resized to SIDE (antialiased, as torchvision's Resize) and the central square is kept:
3 * SIDE^2 bytes, 196,608 at 256. The 126,689 + 5,000 pictures of ImageNet-100 take 25.9 GB (24.1 GiB).

    PACK/train.npy   uint8 (count, side, side, 3); any program opens it: numpy.load(path, mmap_mode="r")
    PACK/train.json  class names; class index and source file of each picture; geometry. Written last: without it the
                     pack is unfinished and is not read
    PACK/val.npy, PACK/val.json

Training reads them without decoding, from GPU memory where they fit, else from the page cache. Rows are stored as height,
width, RGB, as decoders deliver them: torch's integer resize cuts crops from that order faster than from planes
(benchmarks/pack.py: 1.4 to 1.5 times as fast on two busy CPU cores).

An evaluation at --input-res 224 sees exactly what it would see of the tree (resize to 256, central 224). Training does not
quite: random crops are cut from the central square instead of the whole picture, and small crops from fewer pixels.

Run again after an interruption it goes on where it stopped; a finished pack is left as it is. A picture that cannot be
read is left out and listed in PACK/train.failed.txt, and the exit code is 1.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

import numpy as np
import torch
from torch.nn.functional import interpolate

from common import UsageError, UserError, cli, launch, printable, sets
from runner.progress import clock
from common.augment import ResizeCenterCrop
from common.crops import decoded
from common.files import only_writer
from common.sets import PACK_FORMAT, PACK_VERSION, BadPicture, FolderSet
from preprocess.workers import Rate, again, lies_in, split_folders, start_worker

SIDE = 256  # pixels; what evaluation at 224 resizes to
SAVE_EVERY = 5.0  # seconds between markers: at most this much work is done again after a crash
CHUNK = 64  # most pictures of one job
SPLITS = ("train", "val")
HEADER_BYTES = 128  # of the .npy file; fixed, so that the count can be filled in at the end


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


def read_marker(files: PackFiles) -> dict:
    """How far an unfinished pack has come. Raises UserError."""
    try:
        return dict(json.loads(files.marker.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{files.marker}: cannot be read; start this pack over with --force") from None


# ----------------------------------------------------------------------------------------------- shared with the subset


def reason_of(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def check_output(out: Path, source: Path, flag: str = "the output folder") -> None:
    """UsageError where `out`, or a split folder in it, lies inside `source` or is it (links followed)."""
    for place in (out, *(out / name for name in (*SPLITS, "test", "validation"))):
        if lies_in(place, source, split_folders(source)):
            raise UsageError(
                f"{flag} {printable(place)} lies inside the input {printable(source)}: choose another folder"
            )


# ------------------------------------------------------------------------------------------------------------- decoding


def square(source: FolderSet, row: int, side: int) -> torch.Tensor:
    """The picture with its shorter side resized to `side`, the central square of it: uint8 (3, side, side), stored as RGB.

    The pixels that host mode makes with ResizeCenterCrop(side, side): torchvision's Resize(side), antialiased, and
    CenterCrop(side). Raises BadPicture.
    """
    picture = decoded(source, row, source.open(row))
    sides = torch.tensor(picture.shape[1:]).view(2, 1)
    height, width, top, left = (int(t) for t in ResizeCenterCrop(side, side).target(*sides))
    if picture.shape[1:] != (height, width):
        rows = picture.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides that resize RGB by RGB, and keep that order
        picture = interpolate(rows, (height, width), mode="bilinear", antialias=True)[0]
    return picture[:, top : top + side, left : left + side]


def pack_rows(source: FolderSet, side: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(uint8 (readable, side, side, 3), [(row, reason)] of the others)."""
    squares, failed = np.empty((len(source), side, side, 3), dtype=np.uint8), []
    for row in range(len(source)):
        try:
            squares[row - len(failed)] = square(source, row, side).permute(1, 2, 0).numpy()
        except BadPicture as error:
            failed.append((row, error.reason))
    return squares[: len(source) - len(failed)], failed


def _blocks(source: FolderSet, start: int, side: int, workers: int) -> Iterator[tuple[int, np.ndarray, list]]:
    """(first row, squares, failures) for the rows from `start` on, in order, whatever the number of workers."""
    length = max(1, min(CHUNK, (4 << 20) // (3 * side**2)))
    chunks = (np.arange(at, min(at + length, len(source))) for at in range(start, len(source), length))
    if workers <= 1:
        for rows in chunks:
            yield int(rows[0]), *pack_rows(source.select(rows), side)
        return
    context = multiprocessing.get_context("spawn")  # safe in a program that has started threads, the same everywhere
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        waiting: deque = deque()
        try:
            for rows in chunks:
                waiting.append((int(rows[0]), pool.submit(pack_rows, source.select(rows), side)))
                if len(waiting) > 3 * workers:
                    first, future = waiting.popleft()
                    yield first, *future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, *future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended, perhaps for its memory: try again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# -------------------------------------------------------------------------------------------------------------- writing


def _write_all(handle: int, content, at: int) -> None:
    content = memoryview(content).cast("B")
    while content:
        written = os.pwrite(handle, content, at)
        content, at = content[written:], at + written


def _write_text(path: Path, text: str) -> None:
    """Replace a small file in one step that also outlives a power cut."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _settings(source: FolderSet, side: int) -> dict:
    """What a pack depends on: an unfinished one is only continued, a finished one only kept, where this is the same."""
    digest = hashlib.sha256(json.dumps([source.classes, source.targets.tolist()]).encode())
    for path in source.paths:
        digest.update(b"\0" + os.fsencode(os.path.relpath(path, source.root)))
    return {"version": PACK_VERSION, "side": side, "pictures": len(source), "listing": digest.hexdigest()}


def _begin(files: PackFiles, settings: dict, command: str, force: bool) -> dict | None:
    """The marker to go on from, or None where the pack is finished."""
    if force:
        for path in (files.listing, files.marker, files.partial, files.pixels, files.failed):
            path.unlink(missing_ok=True)
    where = printable(files.folder / files.split)
    differs = "of other pictures or another side; give another folder, or --force to replace it"
    if files.listing.exists():
        if json.loads(files.listing.read_text()).get("settings") != settings:
            raise UsageError(f"{where}.npy is a finished pack {differs}")
        return None
    if files.marker.exists():
        state = read_marker(files)
        if state.get("settings") != settings:
            raise UsageError(f"{where}.npy.partial is an unfinished pack {differs}")
        return state
    if files.pixels.exists():
        raise UsageError(f"{where}.npy is there without {files.listing.name}: remove it, or --force to replace it")
    state = {"settings": settings, "done": 0, "count": 0, "failed": [], "command": command}
    _write_text(files.marker, json.dumps(state, indent=1) + "\n")
    return state


def pack_split(
    source: FolderSet, out: Path, split: str, side: int = SIDE, workers: int = 1, force: bool = False, command: str = ""
) -> list[list[str]]:
    """Write out/<split>.npy and out/<split>.json; returns [file, reason] of the pictures that could not be read.

    The files do not depend on `workers`, nor on interruptions. command: what an unfinished pack tells to run again.
    Raises UsageError where another pack is in the way, UserError where writing or a whole class fails.
    """
    files, settings = PackFiles(Path(out), split), _settings(source, side)
    try:
        state = _begin(files, settings, command, force)
        if state is None:
            content = json.loads(files.listing.read_text())
            print(f"{split}: {content['count']:,} pictures are packed already ({printable(files.pixels)})")
            return content["failed"]
        began, start = time.monotonic(), state["done"]
        if files.partial.exists() or not files.pixels.exists():  # else only the listing is missing
            _write_pixels(source, files, side, workers, state)
        _finish(source, files, side, state)
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(files.folder)}: {reason_of(error)}; {again('--force', force)}"
        ) from None
    seconds = time.monotonic() - began
    print(
        f"{split}: {state['count']:,} pictures, {len(source.classes)} classes, {size_text(state['count'], side)} in "
        f"{printable(files.pixels)}; {clock(seconds)}, {(len(source) - start) / seconds:.0f} pictures/s",
        flush=True,
    )
    return state["failed"]


def _write_pixels(source: FolderSet, files: PackFiles, side: int, workers: int, state: dict) -> None:
    each = 3 * side**2
    free, needed = shutil.disk_usage(files.folder).free, (len(source) - state["done"]) * each
    if needed > free:
        raise UserError(f"{printable(files.folder)}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
    done, count, failed = state["done"], state["count"], list(state["failed"])
    handle = os.open(files.partial, os.O_RDWR | os.O_CREAT, 0o666)

    def save():
        os.fsync(handle)
        state.update(done=done, count=count, failed=failed)
        _write_text(files.marker, json.dumps(state, indent=1) + "\n")

    progress = Rate(f"packing {files.split}", len(source), "pictures", start=done)
    try:
        end = HEADER_BYTES + count * each
        if count and os.fstat(handle).st_size < end:
            raise UserError(f"{printable(files.partial)}: shorter than its marker says; start over with --force")
        os.ftruncate(handle, end)
        _write_all(handle, npy_header(0, side), 0)
        saved = time.monotonic()
        try:
            with contextlib.closing(_blocks(source, done, side, workers)) as blocks:
                for first, squares, bad in blocks:
                    if len(squares):
                        _write_all(handle, squares, HEADER_BYTES + count * each)
                    count += len(squares)
                    failed = failed + [[os.path.relpath(source.path(first + r), source.root), why] for r, why in bad]
                    done = first + len(squares) + len(bad)
                    progress.add(len(squares) + len(bad))
                    if time.monotonic() - saved > SAVE_EVERY:
                        save()
                        saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk may refuse the marker too: the one before is still good
                save()
            raise
        _write_all(handle, npy_header(count, side), 0)
        save()
    finally:
        progress.close()
        os.close(handle)


def _finish(source: FolderSet, files: PackFiles, side: int, state: dict) -> None:
    left_out = {file for file, _ in state["failed"]}
    sources = [os.path.relpath(path, source.root) for path in source.paths]
    kept = [row for row, file in enumerate(sources) if file not in left_out]
    targets = source.targets[kept].tolist()
    empty = sorted(set(range(len(source.classes))) - set(targets))
    if empty:
        names = ", ".join(printable(source.classes[c]) for c in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise UserError(
            f"{printable(source.root)}: no readable picture in {len(empty)} of {len(source.classes)} classes ({names}): "
            "repair or remove them and pack with --force"
        )
    content = {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "split": files.split,
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
    if files.partial.exists():
        os.replace(files.partial, files.pixels)
    if state["failed"]:
        _write_text(files.failed, "".join(f"{printable(file)}\t{why}\n" for file, why in state["failed"]))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    _write_text(files.listing, f"{{\n{lines}\n}}\n")
    files.marker.unlink(missing_ok=True)


def size_text(count: int, side: int) -> str:
    total = HEADER_BYTES + count * 3 * side**2
    for unit, binary, power in (("GB", "GiB", 3), ("MB", "MiB", 2)):
        if total >= 1000**power:
            return f"{total / 1000**power:.1f} {unit} ({total / 1024**power:.1f} {binary})"
    return f"{total} bytes"


def pack_splits(sources: dict[str, FolderSet], out: Path, side: int, workers: int, force: bool, command: str) -> None:
    """Pack every split; UserError at the end where pictures could not be read. The caller holds the folder."""
    failed, total = {}, 0
    for split, source in sources.items():
        total += len(source)
        unreadable = pack_split(source, out, split, side, workers, force, command)
        if unreadable:
            failed[split] = len(unreadable)
    if failed:
        lists = " and ".join(printable(PackFiles(out, split).failed) for split in failed)
        raise UserError(
            f"{sum(failed.values())} of {total} pictures could not be read and are not in the pack: listed in {lists}; "
            "it can be used as it is, or repair them and pack with --force"
        )


# ----------------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", metavar="TREE", help="root with train/CLASS/* and val/CLASS/* (or test/)")
    parser.add_argument("out", metavar="PACK", help="folder to write to")
    parser.add_argument("--side", type=cli.positive_int, default=SIDE, help="pixels of a square's side")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="what to pack (default: both)"
    )
    parser.add_argument("--class-list", default=None, metavar="FILE", help="pack these class folders only, one a line")
    parser.add_argument("--workers", type=cli.positive_int, default=launch.cores(), help="processes that decode")
    parser.add_argument("--force", action="store_true", help="replace a pack, finished or not")
    return parser.parse_args(argv)


def command_line(script: str, argv) -> str:
    """What finishes an unfinished pack: the command that was given, without --force, which would start over."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv) if word != "--force"]
    return shlex.join(["python", f"preprocess/{script}", *words])


def main(argv=None) -> None:
    args = parse_args(argv)
    out, sources = Path(args.out), {}
    check_output(out, Path(args.data), "PACK")
    for split in sorted(set(args.splits), key=SPLITS.index):
        try:
            folder = sets.split_folder(args.data, split)
        except UsageError as error:
            raise UsageError(f"{error} (--splits chooses what to pack)") from None
        classes = sources["train"].classes if "train" in sources else None
        sources[split] = sets.open_tree(folder, class_list=args.class_list, classes=classes)
    with only_writer(out):
        try:
            pack_splits(sources, out, args.side, args.workers, args.force, command_line("pack.py", argv))
        except KeyboardInterrupt:
            print(f"\ninterrupted; {again('--force', args.force)}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    cli.run(main)
