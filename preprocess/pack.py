"""Pack a tree of pictures: decode it once into squares in a memory-mapped file per split.

    python preprocess/pack.py IMAGENET100 PACK --side 256
    python nonsem_neg/moco_non_sem_neg.py PACK --dataset packed

Each picture's shorter side is resized to SIDE (antialiased, as torchvision's Resize) and the
central square is kept: 3 * SIDE^2 bytes, 196,608 at 256. The 126,689 + 5,000 pictures of
ImageNet-100 take 25.9 GB (24.1 GiB).

    PACK/train.npy   uint8 (count, side, side, 3), for numpy.load(path, mmap_mode="r")
    PACK/train.json  class names; class index and source file of each picture; geometry. It is
                     written last: a pack without it is unfinished and is not read
    PACK/val.npy, PACK/val.json

Training reads them without decoding, from GPU memory if they fit, otherwise from the page cache.
Rows are stored in the order height, width, RGB, because torch's integer resize cuts crops from it
faster than from planes (benchmarks/pack.py: 1.4 to 1.5 times as fast on two busy cores).

An evaluation at --input-res 224 gets exactly the same pixels as from the tree (resize to 256,
central 224). Training differs slightly: random crops are cut from the central square instead of the
whole picture, and small crops from fewer pixels.

The same command continues after an interruption and leaves a finished pack as it is. A picture that
cannot be read is left out and listed in PACK/train.failed.txt, and the exit code is 1.
"""

import argparse
import contextlib
import multiprocessing
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn.functional import interpolate

from common import UsageError, UserError, cli, clock, files, launch, printable, sets
from common.augment import ResizeCenterCrop
from common.crops import decoded
from common.files import only_writer
from common.sets import BadPicture, FolderSet
from preprocess.pack_files import (
    SPLITS,
    PackFiles,
    PixelFile,
    begin,
    check_output,
    finish,
    pack_settings,
    size_text,
)
from preprocess.workers import (
    Rate,
    add_workers_argument,
    continue_hint,
    start_worker,
    system_reason,
)

SIDE = 256  # pixels; an evaluation at 224 resizes to this
SAVE_EVERY = 5.0  # seconds between markers, the most work that a crash repeats
CHUNK = 64  # most pictures per job
CHUNK_BYTES = 4 << 20  # most bytes per job
AHEAD = 3  # chunks per process that are decoded ahead of writing


def square(source: FolderSet, row: int, side: int) -> torch.Tensor:
    """Resize the shorter side of a picture to `side`, and return its central square.

    The result is uint8 (3, side, side), stored in RGB order. Its pixels are those of
    ResizeCenterCrop(side, side), and of torchvision's antialiased Resize(side) and
    CenterCrop(side). Raises BadPicture.
    """
    picture = decoded(source, row, source.open(row))
    sides = torch.tensor(picture.shape[1:]).view(2, 1)
    height, width, top, left = (int(t) for t in ResizeCenterCrop(side, side).target(*sides))
    if picture.shape[1:] != (height, width):
        # with these strides interpolate keeps the RGB order
        rows = picture.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        picture = interpolate(rows, (height, width), mode="bilinear", antialias=True)[0]
    return picture[:, top : top + side, left : left + side]


def pack_rows(source: FolderSet, side: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Return the squares uint8 (readable, side, side, 3), and (row, reason) for unreadable rows."""
    squares = np.empty((len(source), side, side, 3), dtype=np.uint8)
    failed = []
    for row in range(len(source)):
        try:
            squares[row - len(failed)] = square(source, row, side).permute(1, 2, 0).numpy()
        except BadPicture as error:
            failed.append((row, error.reason))
    return squares[: len(source) - len(failed)], failed


def _blocks(
    source: FolderSet, start: int, side: int, workers: int
) -> Iterator[tuple[int, np.ndarray, list]]:
    """Yield (first row, squares, failures) for the rows from `start` on, in order."""
    length = max(1, min(CHUNK, CHUNK_BYTES // (3 * side**2)))
    chunks = (
        np.arange(first, min(first + length, len(source)))
        for first in range(start, len(source), length)
    )
    if workers <= 1:
        for rows in chunks:
            yield int(rows[0]), *pack_rows(source.select(rows), side)
        return
    # spawn is safe in a program that has started threads, and the same on every system
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        waiting: deque = deque()
        try:
            for rows in chunks:
                waiting.append((int(rows[0]), pool.submit(pack_rows, source.select(rows), side)))
                if len(waiting) > AHEAD * workers:
                    first, future = waiting.popleft()
                    yield first, *future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, *future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?): try again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_pixels(
    source: FolderSet, paths: PackFiles, side: int, workers: int, state: dict
) -> None:
    """Write the missing squares, and keep `state` in agreement with the disk."""
    needed = (len(source) - state["done"]) * 3 * side**2
    free = shutil.disk_usage(paths.folder).free
    if needed > free:
        raise UserError(
            f"{printable(paths.folder)}: {needed / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB are free"
        )
    pixels = PixelFile(source, paths, side, state)
    progress = Rate(f"packing {paths.split}", len(source), "pictures", start=pixels.done)
    try:
        pixels.cut()
        saved = time.monotonic()
        try:
            with contextlib.closing(_blocks(source, pixels.done, side, workers)) as blocks:
                for first, squares, failures in blocks:
                    pixels.append(first, squares, failures)
                    progress.add(len(squares) + len(failures))
                    if time.monotonic() - saved > SAVE_EVERY:
                        pixels.save()
                        saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(OSError):  # on a full disk the previous marker remains valid
                pixels.save()
            raise
        pixels.complete()
    finally:
        progress.close()
        pixels.close()


def pack_split(
    source: FolderSet,
    out: Path,
    split: str,
    side: int = SIDE,
    workers: int = 1,
    force: bool = False,
    command: str = "",
) -> list[list[str]]:
    """Write out/<split>.npy and out/<split>.json.

    Returns [file, reason] of the pictures that could not be read. The files depend
    neither on `workers` nor on interruptions. command: the command that finishes the pack, for
    messages. Raises UsageError if another pack is in the way, UserError if writing fails or a class
    has no readable picture.
    """
    paths = PackFiles(Path(out), split)
    try:
        state = begin(paths, pack_settings(source, side), command, force)
        if state is None:
            content = files.read_json(paths.listing)
            place = printable(paths.pixels)
            origin = printable(str(content.get("source", "another tree")))
            print(
                f"{split}: {content['count']:,} pictures of {origin} are packed already ({place})"
            )
            return content["failed"]
        began = time.monotonic()
        start = state["done"]
        only_listing_is_missing = paths.pixels.exists() and not paths.partial.exists()
        if not only_listing_is_missing:
            _write_pixels(source, paths, side, workers, state)
        finish(source, paths, side, state)
    except OSError as error:
        raise UserError(
            f"cannot write to {printable(paths.folder)}: {system_reason(error)}; "
            f"{continue_hint('--force', force)}"
        ) from None
    seconds = time.monotonic() - began
    print(
        f"{split}: {state['count']:,} pictures, {len(source.classes)} classes, "
        f"{size_text(state['count'], side)} in {printable(paths.pixels)}; {clock(seconds)}, "
        f"{(len(source) - start) / seconds:.0f} pictures/s",
        flush=True,
    )
    return state["failed"]


def pack_splits(
    sources: dict[str, FolderSet], out: Path, side: int, workers: int, force: bool, command: str
) -> None:
    """Pack every split; the caller must hold the lock of the folder.

    Raises UserError at the end if pictures could not be read.
    """
    files.sweep(out)
    failed = {}
    for split, source in sources.items():
        for note in source.notes:
            print(f"note: {note}")
        unreadable = pack_split(source, out, split, side, workers, force, command)
        if unreadable:
            failed[split] = len(unreadable)
    if failed:
        total = sum(map(len, sources.values()))
        lists = " and ".join(printable(PackFiles(out, split).failed) for split in failed)
        raise UserError(
            f"{sum(failed.values())} of {total} pictures could not be read and are not in the "
            f"pack ({lists}): use the pack as it is, or repair them and pack with --force"
        )


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "data", metavar="TREE", help="root with train/CLASS/* and val/CLASS/* (or test/)"
    )
    parser.add_argument("out", metavar="PACK", help="folder to write to")
    parser.add_argument(
        "--side", type=cli.positive_int, default=SIDE, help="side of a square in pixels"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        default=list(SPLITS),
        help="splits to pack (default: both)",
    )
    parser.add_argument(
        "--class-list",
        default=None,
        metavar="FILE",
        help="pack only the class folders in FILE, one per line",
    )
    add_workers_argument(parser, "processes that decode (default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace a pack, finished or not")
    return cli.freeze(parser.parse_args(argv))


def command_line(script: str, argv) -> str:
    """Return the command that finishes a pack: without --force, which would start over."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv) if word != "--force"]
    return shlex.join(["python", f"preprocess/{script}", *words])


def open_sources(args) -> dict[str, FolderSet]:
    """Open the splits that the flags name. Raises UsageError."""
    sources = {}
    for split in sorted(set(args.splits), key=SPLITS.index):
        try:
            folder = sets.split_folder(args.data, split)
        except UsageError as error:
            raise UsageError(f"{error} (--splits chooses what to pack)") from None
        classes = sources["train"].classes if "train" in sources else None
        sources[split] = sets.open_tree(folder, class_list=args.class_list, classes=classes)
    return sources


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    check_output(out, Path(args.data), "PACK")
    sources = open_sources(args)
    command = command_line("pack.py", argv)
    with only_writer(out):
        try:
            processes = args.workers or launch.cores()
            pack_splits(sources, out, args.side, processes, args.force, command)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {continue_hint('--force', args.force)}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    cli.run(main)
