"""Compare every train script with its network alone: the rest is loading, views and logging.

    python benchmarks/network_alone.py --data CIFAR_TREE     # default: generated 32-pixel pictures

whole         the script as it is: loading, augmentation, the step, what it tracks and logs.
network alone the same script on one fixed batch of views: what is left is the step.

ResNet-18 at 32 pixels, batch 256, in all of them, on the CPU or one GPU. The sides alternate, each
repeat is a process of its own, warm before the clock runs. The ratio is that of a pair of
neighbours; its median must reach --at-least. The exit code is the number of scripts that miss it.
Peak memory is the process and the largest of its workers.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import side_by_side
from benchmarks.side_by_side import WARM, in_a_process, peak, pictures, synchronize

SMALL = "--input-res 32 -b 256 --seed 0 --print-freq 1000000 --epochs 1 --dataset folder"
BANK = f"{SMALL} --softmax --nce_k 4096 --nce_t 0.1"
SCRIPTS = {  # name: (script, flags)
    "CMC": ("cmc.train_CMC", f"{BANK} --model resnet18v1"),
    "InsDis": ("moco_insdis.train_moco_ins", f"{BANK} --model resnet18"),
    "MoCo": ("moco_insdis.train_moco_ins", f"{BANK} --model resnet18 --moco"),
    "MoCo + patch": (
        "nonsem_neg.moco_non_sem_neg",
        f"{SMALL} -a resnet18 --moco-k 4096 --moco-t 0.2 --mlp --aug-plus",
    ),
    "MoCo + FT": (
        "feature_transform.main_contrast",
        f"{SMALL} --arch resnet18 --method MoCov2 --nce_k 4096 --preset ft --save_score",
    ),
    "debiased": (
        "debiased.main",
        f"{SMALL} --model resnet18 --no-small-stem --knn-every 0",
    ),
    "ring": (
        "ring.train_ring",
        f"{SMALL} --k 512 --thres-outer 0.5 --nn-every 0 --no-conv3x3",
    ),
}


class Timed:
    """A loader of WARM + `steps` batches that reads the clock after the warm-up and at the end.

    fixed: give the first batch again and again.
    """

    def __init__(self, loader, steps: int, fixed: bool):
        self.loader = loader
        self.steps = steps
        self.fixed = fixed
        self.seconds = 0.0  # of the timed steps
        self.view_seconds = 0.0  # of them, making views and waiting for them

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return WARM + self.steps

    def _now(self) -> tuple[float, float]:
        synchronize(self.device)
        return time.perf_counter(), self.loader.view_seconds + self.loader.wait_seconds

    def __iter__(self):
        epochs = itertools.chain.from_iterable(self.loader for _ in itertools.count())
        batches = itertools.repeat(next(epochs)) if self.fixed else epochs
        for step, batch in zip(range(len(self)), batches):
            if step == WARM:
                began, spent = self._now()
            yield batch
        now, all_spent = self._now()
        self.seconds = now - began
        self.view_seconds = all_spent - spent


def measure(module: str, tree: str, flags: list[str], steps: int, fixed: bool) -> dict:
    """Return the images per second of a train script's own worker on the pictures `tree`.

    Also the share of the time in which views are made or awaited, the seconds of loading, and the
    peak memory. flags: others than that of the data.
    """
    script = importlib.import_module(module)
    build = script.build_loader
    loaders = []

    def timed(args, process):
        began = time.perf_counter()
        loader = Timed(build(args, process), steps, fixed)
        loader.loading = time.perf_counter() - began
        loaders.append(loader)
        return loader

    with tempfile.TemporaryDirectory() as folder:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with mock.patch.object(script, "build_loader", timed), quiet:
            script.main(["--data", tree, "--out", folder, *flags])
    (loader,) = loaders
    return {
        "rate": loader.batch_size * steps / loader.seconds,
        "views": loader.view_seconds / loader.seconds,
        "loading": loader.loading,
        "peak": peak(),
    }


def compare(name: str, tree: str, args) -> bool:
    """Measure both sides of a script, print them, and return whether the aim is met."""
    results = {"whole": [], "alone": []}
    for _ in range(args.repeats):
        for side, own in results.items():
            flags = (f"--data={tree}", f"--steps={args.steps}", "--one", name, side)
            own.append(in_a_process(__file__, *flags))
    ratios = side_by_side.ratios(results, "whole", "alone")
    ratio = statistics.median(ratios)
    whole, alone = (statistics.median(r["rate"] for r in own) for own in results.values())
    views = statistics.median(result["views"] for result in results["whole"])
    memory = max(result["peak"] for result in results["whole"])
    print(
        f"{name:13} {whole:6.0f} images/s, network alone {alone:6.0f}: {ratio:.3f} of it "
        f"({min(ratios):.3f} to {max(ratios):.3f}), aim {args.at_least}; views and waiting "
        f"{views:.1%} of a step, peak memory {memory:.0f} MiB",
        flush=True,
    )
    return ratio >= args.at_least


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    side_by_side.add_arguments(parser)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    about = "least ratio of whole to network alone"
    parser.add_argument("--at-least", type=float, default=0.92, help=about)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        name, side = args.one
        module, flags = SCRIPTS[name]
        result = measure(module, args.data, flags.split(), args.steps, side == "alone")
        print(json.dumps(result))
        return 0
    with pictures(args) as tree:
        return sum(not compare(name, tree, args) for name in args.scripts)


if __name__ == "__main__":
    sys.exit(main())
