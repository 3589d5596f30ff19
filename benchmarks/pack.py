"""Pictures per second of preprocess/pack.py, and of training from what it wrote.

    python benchmarks/pack.py --data /data/imagenet-100     # or without --data: generated pictures

packing   one process packs pictures at --side, against the same process doing only the decoding,
          resizing and cutting, and then only writing as many bytes and waiting for the disk. What
          is missing to 1 is the cost of packing itself. With more workers decoding and writing
          overlap.
reading   common.data in host mode cuts two 224-pixel crops per picture, shuffled, with --workers
          processes: from the pack's memory map, and from the JPEG files. Both are in the page
          cache, so disks are not in these numbers.
order     one thread cuts one crop from rows stored as height, width, RGB (as packs are) and as
          three planes.

Sides alternate; workers are started and warm before the clock runs. Medians of --repeats, with the
range.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import photographs
from benchmarks.photographs import spread
from common.augment import Compose, RandomResizedCrop
from common.crops import cut
from common.data import Loader
from common.sets import ArraySet, FolderSet, open_set, open_tree
from preprocess.pack import pack_split, square

SIZE = 224


def rate_of(count: int, function) -> float:
    """Return `count` over the seconds of a call."""
    started = time.perf_counter()
    function()
    return count / (time.perf_counter() - started)


def packing(pictures: FolderSet, side: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Return the rates of packing, and of its parts alone."""

    def decode_only():
        for row in range(len(pictures)):
            square(pictures, row, side)

    def pack(target: Path):
        with contextlib.redirect_stdout(io.StringIO()):
            pack_split(pictures, target, "train", side)

    def write_only(target: Path):
        block = bytes(3 * side**2)
        with open(target / "written", "wb", buffering=0) as file:
            for _ in range(len(pictures)):
                file.write(block)
            os.fsync(file.fileno())

    rates = {"decode, resize, cut": [], "write and sync": [], "both in turn": [], "packing": []}
    decode_only()
    for repeat in range(repeats):
        target = folder / f"pack{repeat}"
        target.mkdir()
        decode = rate_of(len(pictures), decode_only)
        write = rate_of(len(pictures), lambda t=target: write_only(t))
        rates["decode, resize, cut"].append(decode)
        rates["write and sync"].append(write)
        rates["both in turn"].append(1 / (1 / decode + 1 / write))
        rates["packing"].append(rate_of(len(pictures), lambda t=target: pack(t)))
    return rates


def reading(
    pictures: FolderSet, packed: ArraySet, workers: int, repeats: int
) -> dict[str, list[float]]:
    """Return the rates of cutting two crops from each source."""
    crop = Compose(RandomResizedCrop(SIZE, (0.2, 1.0)))
    options = {
        "device": "cpu",
        "seed": 0,
        "workers": workers,
        "data_device": "host",
        "progress": False,
    }
    sides = {"JPEG files": pictures, "packed": packed}
    loaders = {name: Loader(s, (crop, crop), 16, **options) for name, s in sides.items()}
    rates = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, loader in loaders.items():
            loader.set_epoch(repeat)
            rate = rate_of(len(loader) * 16, lambda loader=loader: [None for _ in loader.batches()])
            if repeat:  # the first starts the workers and fills the caches
                rates[name].append(rate)
    for loader in loaders.values():
        loader.close()
    return rates


def orders(packed: ArraySet, repeats: int) -> dict[str, list[float]]:
    """Return the rates of cutting a crop from rows in either order of numbers."""
    rows = torch.arange(min(len(packed), 200))
    sides = {"three planes": packed[rows].contiguous(), "height, width, RGB": packed[rows]}
    heights = torch.full((len(rows),), packed.size[0])
    generator = torch.Generator().manual_seed(0)
    crop = RandomResizedCrop(SIZE, (0.2, 1.0))
    boxes = crop.sample(heights, heights, generator).tolist()
    target = (SIZE, SIZE, 0, 0)
    rates = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, images in sides.items():

            def cut_all(images=images):
                return [cut(image, box, target, SIZE) for image, box in zip(images, boxes)]

            rate = rate_of(len(rows), cut_all)
            if repeat:
                rates[name].append(rate)
    return rates


def show(title: str, rates: dict[str, list[float]]) -> float:
    """Print rates; return the ratio of the last to the one before, median of pairs."""
    print(f"\n{title:<50}pictures/s, median (range)")
    for name, values in rates.items():
        print(f"  {name:<38}{spread(values):>40}")
    (old_name, old), (new_name, new) = list(rates.items())[-2:]
    ratio = statistics.median(b / a for a, b in zip(old, new))
    print(f"  ratio {ratio:.2f} ({new_name} / {old_name}, median of pairs)")
    return ratio


def measure(args, tree: Path, title: str) -> int:
    """Measure all parts, print them, and return the exit code."""
    torch.set_num_threads(1)
    pictures = open_tree(tree)
    files = len(pictures)
    pictures = pictures.select([i * files // args.pictures for i in range(args.pictures)])
    setting = f"{args.pictures} pictures per pass, side {args.side}"
    print(f"{title}: {files} files, {setting}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        rates = packing(pictures, args.side, args.repeats, Path(folder))
        packed = show("one process", rates)
        opened = open_set(Path(folder) / "pack0", "train", dataset="packed")
        rates = reading(pictures, opened, args.workers, args.repeats)
        read = show(f"two crops each, {args.workers} workers", rates)
        show("one crop each, one thread", orders(opened, args.repeats))
    print(
        f"\nresult: packing at {packed:.2f} of the rate of decoding and writing "
        f"(wanted: {args.packing_at_least:g}), reading at {read:.2f} times that of JPEG files "
        f"(wanted: {args.reading_at_least:g})"
    )
    return 0 if packed >= args.packing_at_least and read >= args.reading_at_least else 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="TREE", help=photographs.ABOUT)
    about = "side of the packed squares (default 256)"
    parser.add_argument("--side", type=int, default=256, help=about)
    about = "repeats of each side, alternating (default 3)"
    parser.add_argument("--repeats", type=int, default=3, help=about)
    about = "worker processes that read (default 2)"
    parser.add_argument("--workers", type=int, default=2, help=about)
    about = "pictures per pass; a smaller set is repeated"
    parser.add_argument("--pictures", type=int, default=400, help=about)
    about = "exit with 1 below this (default 0.8)"
    parser.add_argument("--packing-at-least", type=float, default=0.8, help=about)
    about = "exit with 1 below this (default 2)"
    parser.add_argument("--reading-at-least", type=float, default=2.0, help=about)
    args = parser.parse_args(argv)
    with photographs.tree(args.data) as (tree, title):
        return measure(args, tree, title)


if __name__ == "__main__":
    raise SystemExit(main())
