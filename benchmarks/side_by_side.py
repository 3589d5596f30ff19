"""What benchmarks of whole training steps share: the pictures, sides that alternate in processes of their own, the clock."""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

WARM = 3  # steps before the clock runs


def add_arguments(parser) -> None:
    parser.add_argument("--data", help="tree with train/CLASS/*, 32-pixel pictures (CIFAR-10 as files)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each side, alternating")


@contextlib.contextmanager
def pictures(args) -> Iterator[str]:
    """The tree that --data names, or one of generated pictures. Says what is measured."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = args.data or str(generate(Path(temporary)))
        print(
            f"pictures: {args.data or 'generated, 2560 of 32 x 32'}; {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{args.repeats} repeats of {args.steps} steps",
            flush=True,
        )
        yield tree


def generate(folder: Path, count: int = 2560) -> Path:
    """A tree of 32-pixel JPEGs: blurred noise in ten classes."""
    from PIL import Image

    pixels = torch.randint(0, 256, (count, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, small in enumerate(pixels.numpy()):
        target = folder / "train" / f"class{i % 10}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((32, 32), Image.BICUBIC).save(target / f"{i:05d}.jpg", quality=90)
    return folder


def in_a_process(script: str, *flags) -> dict:
    """What `script` with these flags prints last, as JSON; so that its peak memory is its own."""
    command = [sys.executable, script, *map(str, flags)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def alternate(script: str, sides: Iterable[str], tree: str, args) -> dict[str, list[dict]]:
    """The findings of every side, --repeats each, of `script --side SIDE ...`, which prints what `peak` adds to."""
    results = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side, found in results.items():
            how = f"--side={side}", f"--data={tree}", f"--steps={args.steps}", f"--workers={args.workers}"
            found.append(in_a_process(script, *how))
            print(f"  repeat {repeat + 1} {side:8} {found[-1]['rate']:7.1f} images/s", flush=True)
    for side, found in results.items():
        rates = [f["rate"] for f in found]
        print(
            f"{side:8} {statistics.median(rates):7.1f} images/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"{found[0].get('precision', 'float32')}, "
            f"start {statistics.median(f['loading'] for f in found):.1f} s, "
            f"peak memory {max(f['peak'] for f in found):.0f} MiB"
        )
    return results


def peak() -> float:
    """Most memory of this process and its children so far, MiB."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def seconds(step: Callable, loader: Iterable, steps: int, device: str) -> float:
    """Of `steps` calls of step(batch), after WARM others, over as many epochs of the loader as that takes."""
    done, started = 0, 0.0
    while True:
        for batch in loader:
            step(batch)
            done += 1
            if done in (WARM, WARM + steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter() - started
            if done == WARM + steps:
                return started
