"""Compare the pictures per second that preprocess/check_images.py checks with a loop over Pillow.

    python benchmarks/check_images.py --data /data/imagenet-100     # default: generated pictures

plain loop      what one writes by hand: for every file Image.open(path).load() in one process,
                errors caught. It finds unreadable and truncated files, and nothing else.
check_images    one process, and --workers processes: all that the script looks for, content
                compared across splits.

Sides alternate, in the same order of files, read once before so that all come from the page cache.
The processes are started before the clock runs, as for the million pictures that the script is
meant for; starting them is told apart. Ends with 1 if the script with its workers stays below
--at-least pictures per second.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks.photographs import generate
from preprocess import check_images, workers

MIN_SIDE = 32  # pixels, the default of --min-side


def plain_loop(pictures: check_images.Pictures) -> int:
    """Decode every picture; return how many cannot be."""
    bad = 0
    for _, paths, _ in pictures.jobs(MIN_SIDE):
        for path in paths:
            try:
                Image.open(path).load()
            except Exception:
                bad += 1
    return bad


def examine(job) -> tuple:
    """Do a job of the script; return its result, the process, and its seconds of processor time.

    An empty job waits for the other processes to start.
    """
    if not job[1]:
        time.sleep(0.05)
    began = time.process_time()
    return check_images.examine_rows(job), os.getpid(), time.process_time() - began


def script(pictures: check_images.Pictures, processes: int) -> tuple[float, float, float]:
    """Return the seconds of starting, of checking all pictures, and those of processor time.

    Starting ends when all processes have begun to work.
    """
    began = time.perf_counter()
    starting = 0.0
    busy = 0.0
    at_work = set()

    def jobs():
        nonlocal began, starting
        while len(at_work) < processes:
            yield 0, [], MIN_SIDE
        now = time.perf_counter()
        starting = now - began
        began = now
        yield from pictures.jobs(MIN_SIDE)

    for (start, seen), process, seconds in workers.in_processes(examine, jobs(), processes):
        at_work.add(process)
        pictures.record(start, seen)
        busy += seconds
    pictures.find_same()
    return starting, time.perf_counter() - began, busy


def open_pictures(tree: str, count: int) -> tuple[check_images.Pictures, int]:
    """Return the pictures of a tree, repeated until there are `count`, and the number of files."""
    folders = check_images.find_splits(tree)
    splits = [check_images.list_split(name, folder) for name, folder in folders.items()]
    files = sum(len(paths) for split in splits for paths in split.classes.values())
    for split in splits:
        split.classes = {name: paths * -(-count // files) for name, paths in split.classes.items()}
    return check_images.Pictures(splits, count), files


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "JPEG files in class folders, or the folder above with train/"
    parser.add_argument("--data", metavar="TREE", help=about)
    about = "pictures per pass; a smaller set is repeated"
    parser.add_argument("--pictures", type=int, default=1500, help=about)
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    about = "repeats of each side, alternating (default 3)"
    parser.add_argument("--repeats", type=int, default=3, help=about)
    about = "aim: pictures/s with --workers processes"
    parser.add_argument("--at-least", type=float, default=150.0, help=about)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        tree = args.data or str(generate(Path(temporary)))
        pictures, files = open_pictures(tree, args.pictures)
        paths = [path for _, paths, _ in pictures.jobs(MIN_SIDE) for path in paths]
        kilobytes = sum(os.path.getsize(path) for path in paths) / len(pictures) / 1000
        print(
            f"{args.data or 'generated pictures'}: {files} files, mean {kilobytes:.0f} kB, "
            f"{len(pictures)} per pass; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
            f"Pillow {Image.__version__}",
            flush=True,
        )
        plain_loop(pictures)  # into the page cache
        several = f"check_images, {args.workers} processes"
        sides = {"check_images, 1 process": 1, several: args.workers}
        rates = {side: [] for side in ("plain loop", *sides)}
        starts = []
        busy_rates = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            plain_loop(pictures)
            rates["plain loop"].append(len(pictures) / (time.perf_counter() - began))
            for side, processes in sides.items():
                starting, seconds, busy = script(pictures, processes)
                rates[side].append(len(pictures) / seconds)
            starts.append(starting)  # of several processes
            busy_rates.append(len(pictures) / busy)
    for side, values in rates.items():
        spread = f"({min(values):.0f} to {max(values):.0f})"
        print(f"{side:28}{statistics.median(values):7.0f} pictures/s  {spread}")
    rate = statistics.median(rates[several])
    ratio = statistics.median(b / a for a, b in zip(rates["plain loop"], rates[several]))
    print(f"starting {args.workers} processes: {statistics.median(starts):.1f} s")
    free = statistics.median(busy_rates)
    print(f"per second of processor time, whatever else runs: {free:.0f} pictures")
    print(
        f"result: {rate:.0f} pictures/s, {ratio:.2f} x the plain loop; "
        f"wanted: {args.at_least:g} pictures/s"
    )
    return 0 if rate >= args.at_least else 1


if __name__ == "__main__":
    raise SystemExit(main())
