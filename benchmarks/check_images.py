"""Pictures per second that preprocess/check_images.py opens, decodes and compares, beside a plain loop over Pillow.

    python benchmarks/check_images.py --data /data/imagenet-100     # or without --data: generated pictures

plain loop      what one writes by hand: for every file Image.open(path).load() in one process, errors caught. It finds
                unreadable and truncated files, and nothing else.
check_images    one process, and --workers processes: all that the script looks for, content compared across splits.

Sides alternate, in the same order of files, read once before so that all come from the page cache. The processes are
started before the clock runs, as for the million pictures the script is meant for; starting them is told apart.
Ends with 1 if the script with its workers stays below --at-least pictures per second.
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

from benchmarks.decode_jpeg import generate
from preprocess import check_images, workers


def plain_loop(pictures: check_images.Pictures) -> int:
    bad = 0
    for _, paths, _ in pictures.jobs(32):
        for path in paths:
            try:
                Image.open(path).load()
            except Exception:
                bad += 1
    return bad


def examine(job):
    """A job of the script, which process did it, and its seconds of processor time. An empty one waits for the others."""
    if not job[1]:
        time.sleep(0.05)
    began = time.process_time()
    return check_images.examine_rows(job), os.getpid(), time.process_time() - began


def script(pictures: check_images.Pictures, processes: int) -> tuple[float, float, float]:
    """Seconds until all processes have begun to work, then of checking all pictures with them, and of processor time."""
    began, starting, seen_at_work, busy = time.perf_counter(), 0.0, set(), 0.0

    def jobs():
        nonlocal began, starting
        while len(seen_at_work) < processes:
            yield 0, [], 32
        starting, began = time.perf_counter() - began, time.perf_counter()
        yield from pictures.jobs(32)

    for (start, seen), process, seconds in workers.in_processes(examine, jobs(), processes):
        seen_at_work.add(process)
        pictures.record(start, seen)
        busy += seconds
    pictures.find_same()
    return starting, time.perf_counter() - began, busy


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="TREE", help="JPEG files in class folders, or the folder above with train/")
    parser.add_argument("--pictures", type=int, default=1500, help="pictures per pass; a smaller set is repeated")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each side, alternating (default 3)")
    parser.add_argument("--at-least", type=float, default=150.0, help="aim: pictures/s with --workers processes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        tree = args.data or str(generate(Path(temporary)))
        splits = [check_images.list_split(name, folder) for name, folder in check_images.find_splits(tree).items()]
        files = sum(len(paths) for split in splits for paths in split.classes.values())
        for split in splits:  # the same files again, until there are enough
            split.classes = {name: paths * -(-args.pictures // files) for name, paths in split.classes.items()}
        pictures = check_images.Pictures(splits, args.pictures)
        size = sum(os.path.getsize(path) for _, paths, _ in pictures.jobs(32) for path in paths) / len(pictures)
        print(
            f"{args.data or 'generated pictures'}: {files} files, mean {size / 1000:.0f} kB, {len(pictures)} per pass; "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Pillow {Image.__version__}",
            flush=True,
        )
        plain_loop(pictures)  # into the page cache
        sides = ["plain loop", "check_images, 1 process", f"check_images, {args.workers} processes"]
        rates, starts, cores = {side: [] for side in sides}, [], []
        for _ in range(args.repeats):
            began = time.perf_counter()
            plain_loop(pictures)
            rates[sides[0]].append(len(pictures) / (time.perf_counter() - began))
            for side, processes in zip(sides[1:], (1, args.workers)):
                starting, seconds, busy = script(pictures, processes)
                rates[side].append(len(pictures) / seconds)
                starts, cores = (
                    ([*starts, starting], [*cores, len(pictures) / busy]) if processes > 1 else (starts, cores)
                )
    for side, found in rates.items():
        print(f"{side:28}{statistics.median(found):7.0f} pictures/s  ({min(found):.0f} to {max(found):.0f})")
    rate = statistics.median(rates[sides[-1]])
    ratio = statistics.median(b / a for a, b in zip(rates[sides[0]], rates[sides[-1]]))
    if starts:
        print(f"starting {args.workers} processes: {statistics.median(starts):.1f} s")
        print(f"per second of processor time, whatever else runs: {statistics.median(cores):.0f} pictures")
    print(f"result: {rate:.0f} pictures/s, {ratio:.2f} x the plain loop; wanted: {args.at_least:g} pictures/s")
    return 0 if rate >= args.at_least else 1


if __name__ == "__main__":
    raise SystemExit(main())
