"""Provide pictures, alternating sides, clocks and memory readings to the benchmarks of steps."""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from tools.trial import synchronize

WARM = 3  # steps before the clock runs


def add_arguments(parser) -> None:
    """Add the pictures, and how often and how long each side is measured."""
    about = "tree with train/CLASS/*, 32-pixel pictures (CIFAR-10 as files)"
    parser.add_argument("--data", help=about)
    about = "timed steps of each repeat"
    parser.add_argument("--steps", type=int, default=20, help=about)
    about = "repeats of each side, alternating"
    parser.add_argument("--repeats", type=int, default=3, help=about)


# --------------------------------------------------------------------------------------- pictures


@contextlib.contextmanager
def pictures(args) -> Iterator[str]:
    """Give the tree that --data names, or one of generated pictures, and say what is measured."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = args.data or str(generate(Path(temporary)))
        print(
            f"pictures: {args.data or 'generated, 2560 of 32 x 32'}; {os.cpu_count()} cores, "
            f"torch {torch.__version__}, {args.repeats} repeats of {args.steps} steps",
            flush=True,
        )
        yield tree


def generate(folder: Path, count: int = 2560) -> Path:
    """Write a tree of 32-pixel JPEG files: blurred noise in ten classes."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    for i, small in enumerate(pixels.numpy()):
        target = folder / "train" / f"class{i % 10}"
        target.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(small).resize((32, 32), Image.BICUBIC)
        picture.save(target / f"{i:05d}.jpg", quality=90)
    return folder


# ------------------------------------------------------------------------------------------ sides


def in_a_process(script: str, *flags) -> dict:
    """Return the JSON that `script` with these flags prints last; its peak memory is its own."""
    command = [sys.executable, script, *map(str, flags)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def alternate(script: str, sides: Iterable[str], tree: str, args) -> dict[str, list[dict]]:
    """Return the results of every side, --repeats each, of `script --side SIDE ...`.

    A result has `rate`, `loading` and `peak`, and may have `precision`.
    """
    results = {side: [] for side in sides}
    flags = (f"--data={tree}", f"--steps={args.steps}", f"--workers={args.workers}")
    for repeat in range(args.repeats):
        for side in results:
            result = in_a_process(script, f"--side={side}", *flags)
            results[side].append(result)
            print(f"  repeat {repeat + 1} {side:8} {result['rate']:7.1f} images/s", flush=True)
    for side, own in results.items():
        rates = [result["rate"] for result in own]
        loading = statistics.median(result["loading"] for result in own)
        print(
            f"{side:8} {statistics.median(rates):7.1f} images/s "
            f"({min(rates):.1f} to {max(rates):.1f}), {own[0].get('precision', 'float32')}, "
            f"start {loading:.1f} s, peak memory {max(r['peak'] for r in own):.0f} MiB"
        )
    return results


def ratios(results: dict[str, list[dict]], side: str, other: str, key: str = "rate") -> list[float]:
    """Return `side` over `other` for each pair of neighbours."""
    return [a[key] / b[key] for a, b in zip(results[side], results[other])]


# -------------------------------------------------------------------------------- time and memory


def peak() -> float:
    """Return the most memory of this process and its children so far, MiB."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(who).ru_maxrss for who in both) / 1024


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """Look at `resident()` every two milliseconds until `over` is set; `most` is the largest."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = resident()
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.most = max(self.most, resident())
            time.sleep(0.002)


def seconds(step: Callable, loader: Iterable, steps: int, device: str) -> float:
    """Return the seconds of `steps` calls of step(batch), after WARM others.

    They take as many epochs of the loader as they need.
    """
    done = 0
    started = 0.0
    while True:
        for batch in loader:
            step(batch)
            done += 1
            if done in (WARM, WARM + steps):
                synchronize(device)
                started = time.perf_counter() - started
            if done == WARM + steps:
                return started
