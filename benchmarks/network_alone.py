"""What everything around the network costs: every train script against its network alone, on the CPU or one GPU.

    python benchmarks/network_alone.py --data CIFAR_TREE       # or without --data: generated 32-pixel pictures

whole         the script as it is: loading, augmentation, the step, what it tracks and logs.
network alone the same script on one fixed batch of views: what is left is the step.

ResNet-18 at 32 pixels, batch 256, in all of them. The sides alternate, each repeat is a process of its own, warm before the
clock runs. The ratio is that of a pair of neighbours; its median must reach --at-least.
The exit code is the number of scripts that miss it. Peak memory is the process and the largest of its workers.
"""

import argparse
import importlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.side_by_side import WARM, add_arguments, in_a_process, peak, pictures

SMALL = "--input-res 32 -b 256 --seed 0 --print-freq 1000000 --epochs 1"
BANK = f"{SMALL} --dataset folder --softmax --nce_k 4096 --nce_t 0.1"
SCRIPTS = {  # name: (module, the flag of the data, other flags)
    "CMC": ("cmc.train_CMC", ["--data_folder"], f"{BANK} --model resnet18v1"),
    "InsDis": ("moco_insdis.train_moco_ins", ["--data_folder"], f"{BANK} --model resnet18"),
    "MoCo": ("moco_insdis.train_moco_ins", ["--data_folder"], f"{BANK} --model resnet18 --moco"),
    "MoCo + patch": (
        "nonsem_neg.moco_non_sem_neg", [],
        f"{SMALL} -a resnet18 --moco-k 4096 --moco-t 0.2 --mlp --aug-plus",
    ),
    "MoCo + FT": (
        "feature_transform.main_contrast", ["--data_folder"],
        f"{SMALL} --dataset folder --arch resnet18 --method MoCov2 --nce_k 4096 --preset ft --save_score",
    ),
    "debiased": (
        "debiased.main", ["--data_folder"],
        f"{SMALL} --dataset folder --model resnet18 --no-small-stem --knn-every 0",
    ),
}  # fmt: skip


class Timed:
    """A loader of WARM + `steps` batches, fixed or not, that looks at the clock when the warm-up and the end are reached."""

    def __init__(self, loader, steps: int, fixed: bool):
        self.loader, self.steps, self.fixed, self.seconds, self.spent = loader, steps, fixed, 0.0, 0.0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return WARM + self.steps

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), self.loader.view_seconds + self.loader.wait_seconds

    def __iter__(self):
        epochs = itertools.chain.from_iterable(self.loader for _ in itertools.count())
        batches = itertools.repeat(next(epochs)) if self.fixed else epochs
        for step, batch in zip(range(len(self)), batches):
            if step == WARM:
                began = self._now()
            yield batch
        self.seconds, self.spent = (b - a for a, b in zip(began, self._now()))


def measure(module: str, flags: list[str], steps: int, fixed: bool) -> dict:
    """Images per second of a train script's own worker, and the share of the time in which views are made or awaited."""
    script = importlib.import_module(module)
    build, made = script.build_loader, []

    def timed(args, process):
        began = time.perf_counter()
        made.append(Timed(build(args, process), steps, fixed))
        made[0].loading = time.perf_counter() - began
        return made[0]

    script.build_loader = timed
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        place = "--ckpt_path" if "nonsem" in module else "--model_path"
        standard, sys.stdout = sys.stdout, quiet
        try:
            script.main([*flags, place, folder])
        finally:
            sys.stdout = standard
    (loader,) = made
    rate = loader.batch_size * steps / loader.seconds
    return {"rate": rate, "views": loader.spent / loader.seconds, "loading": loader.loading, "peak": peak()}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--at-least", type=float, default=0.92, help="least ratio of whole to network alone")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        name, side = args.one
        module, flag, flags = SCRIPTS[name]
        print(json.dumps(measure(module, [*flag, args.data, *flags.split()], args.steps, side == "alone")))
        return 0
    missed = []
    with pictures(args) as tree:
        for name in args.scripts:
            found = {"whole": [], "alone": []}
            for _ in range(args.repeats):
                for side, results in found.items():
                    flags = f"--data={tree}", f"--steps={args.steps}", "--one", name, side
                    results.append(in_a_process(__file__, *flags))
            ratios = [a["rate"] / b["rate"] for a, b in zip(found["whole"], found["alone"])]
            ratio = statistics.median(ratios)
            rates = {side: statistics.median(r["rate"] for r in results) for side, results in found.items()}
            views = statistics.median(r["views"] for r in found["whole"])
            print(
                f"{name:13} {rates['whole']:6.0f} images/s, network alone {rates['alone']:6.0f}: {ratio:.3f} of it "
                f"({min(ratios):.3f} to {max(ratios):.3f}), aim {args.at_least}; views and waiting {views:.1%} of a step, "
                f"peak memory {max(r['peak'] for r in found['whole']):.0f} MiB",
                flush=True,
            )
            if ratio < args.at_least:
                missed.append(name)
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
