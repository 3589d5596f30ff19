"""What a training step costs on a GPU: MoCo and MoCo + patch negatives beside plain supervised training.

    python benchmarks/gpu_throughput.py                                  # ResNet-50, 224 pixels, batch 256, bfloat16
    python benchmarks/gpu_throughput.py --data TREE                      # and once more from JPEG files, read by workers
    python benchmarks/gpu_throughput.py --arch resnet18 --size 32 --batch 8 --steps 2 --repeats 1     # anywhere

supervised    a ResNet-50 with cross-entropy on one fixed batch that lies on the device: no loading, no augmentation.
MoCo          nonsem_neg's script as it is: its loader (pictures as uint8 on the device), its MoCo-v2 recipe, its step.
MoCo + patch  the same with one patch-based negative for each picture.
MoCo, files   MoCo, its pictures decoded and cropped by workers.
views         the loader of MoCo alone: two views of a batch.

All sides use one card, one precision and channels-last tensors, in one process; repeats alternate, the ratio is that of
neighbours. The clock stops when the device has done its work.

Counted in forward passes, a backward pass being two, supervised training costs 1 + 2 = 3. MoCo has the forward pass of the key
encoder besides, 4: at best it makes 3/4 of the pictures in a second. A patch negative is one more pass of the key encoder, 5:
3/5. Wanted is --at-least of that; what is left pays for the views, the queue, the momentum update and batch-norm in groups, as
on several GPUs. Views may take 15 ms and 10 % of MoCo's step. For 2 % of a step the script may wait for its workers, which is
at most how long the device waits; what they have ready is used up before the clock runs.

The exit code is 1 where an aim is missed. --json FILE writes the numbers.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import cross_entropy, interpolate

from common import backbones, launch, options
from common.precision import Precision
from common.sets import ArraySet
from nonsem_neg import moco_non_sem_neg as script

WARM = 3  # steps of each side before the clock runs
SHARES = {"MoCo": 3 / 4, "MoCo + patch": 3 / 5}  # of the supervised rate, at best
AIMS = {  # number: (least, most); the first two are --at-least
    "moco_of_its_share": (0.8, math.inf),
    "patch_of_its_share": (0.8, math.inf),
    "waiting": (0, 0.02),
    "views_ms": (0, 15),
    "views_share": (0, 0.1),
}


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given. The CPU has when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generated(count: int, side: int, device: torch.device) -> ArraySet:
    """`count` pictures of `side` x `side` pixels on the device: blurred noise in ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(count, 3, side, side, dtype=torch.uint8, device=device)
    for rows in torch.arange(count).split(256):
        small = torch.rand(len(rows), 3, 8, 8, generator=generator).to(device)
        images[rows[0] : rows[-1] + 1] = interpolate(small, (side, side), mode="bilinear").mul_(255).to(torch.uint8)
    return ArraySet(images, [i % 10 for i in range(count)], [f"class{i}" for i in range(10)], "generated pictures")


def flags(args, kind: str, *more: str) -> list[str]:
    """The command line of nonsem_neg's script for one side."""
    settings = (
        f"-a {args.arch} --input-res {args.size} -b {args.batch} --moco-k {args.moco_k} -j {args.workers} --seed 0"
    )
    switches = ["--amp"] * (args.precision == "bfloat16") + ["--compile"] * args.compile
    return [*settings.split(), *switches, "--mlp", "--aug-plus", "--moco-t", "0.2", "--robust", kind, *more]


class Pretraining:
    """nonsem_neg's script without its run folder: `step()` fetches a batch and trains on it, `fetch()` only fetches.

    pictures: on the device; None: the files of --data, as often as it takes that no epoch ends.
    """

    def __init__(self, args, kind: str, device: torch.device, pictures: ArraySet | None = None):
        where = [str(args.data), "--data-device", "host"] if pictures is None else ["-", "--data-device", "device"]
        self.args = script.parse_args(flags(args, kind, "--bn-splits", str(args.bn_splits), *where))
        process, opened = launch.Process(device=device), options.open_pretraining
        self.ready = 2 * options.reading(self.args) if pictures is None else 0  # batches that workers make ahead
        calls = WARM + args.repeats * (args.steps + self.ready)

        def repeated(args):
            files = opened(args)
            return files.select([row % len(files) for row in range(max(len(files), args.batch_size * calls))])

        options.open_pretraining = repeated if pictures is None else lambda _: pictures
        try:
            self.loader = script.build_loader(self.args, process)
        finally:
            options.open_pretraining = opened
        self.method, self.batches = script.NonSemantic(self.args, process), self._batches()

    def _batches(self):
        for epoch in itertools.count():
            self.loader.set_epoch(epoch)
            yield from self.loader

    def fetch(self) -> None:
        next(self.batches)

    def step(self) -> None:
        views, _, index = next(self.batches)
        self.method.step(views, index)


class Supervised:
    """Cross-entropy of 1000 classes on one fixed batch on the device."""

    def __init__(self, args, device: torch.device):
        network = backbones.build(args.arch, 1000).to(device, memory_format=torch.channels_last).train()
        if args.compile:
            network.compile()
        self.network, self.precision = network, Precision(args.precision == "bfloat16", device)
        self.optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)
        images = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(device, memory_format=torch.channels_last)
        self.target = (torch.arange(args.batch) % 1000).to(device)

    def step(self) -> None:
        with self.precision.autocast():
            logits = self.network(self.images)
        self.precision.step(cross_entropy(logits.float(), self.target), self.optimizer)


def timed(step: Callable, steps: int, device: torch.device) -> float:
    """Seconds of `steps` calls, to the end of the device's work."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - began


def measure(args, device: torch.device) -> dict[str, float]:
    """The numbers of every side: rates in pictures a second, shares between 0 and 1, milliseconds."""
    pictures = generated(max(args.pictures, args.batch), args.side or round(args.size * 256 / 224), device)
    kinds = {"MoCo": "none", "MoCo + patch": "patch"}
    ours = {name: Pretraining(args, kind, device, pictures) for name, kind in kinds.items()}
    if args.data:
        ours["MoCo, files"] = Pretraining(args, "none", device)
    calls = {"supervised": Supervised(args, device).step} | {name: side.step for name, side in ours.items()}
    calls["views"] = ours["MoCo"].fetch
    for name, call in calls.items():
        print(f"  warming up: {name}, {timed(call, WARM, device):.1f} s", flush=True)
    seconds, waited = ({name: [] for name in calls} for _ in range(2))
    for repeat in range(args.repeats):
        for name, call in calls.items():
            for _ in range(ours[name].ready if name in ours else 0):
                ours[name].fetch()
            before = ours[name].loader.wait_seconds if name in ours else 0
            seconds[name].append(timed(call, args.steps, device))
            waited[name].append(ours[name].loader.wait_seconds - before if name in ours else 0)
            print(
                f"  repeat {repeat + 1} {name:12} {args.batch * args.steps / seconds[name][-1]:8.0f} pictures/s",
                flush=True,
            )
    for side in ours.values():
        side.loader.close()
    step = {name: statistics.median(values) / args.steps for name, values in seconds.items()}
    numbers = {f"{name}, pictures/s": args.batch / step[name] for name in calls if name != "views"}
    for name, short in (("MoCo", "moco"), ("MoCo + patch", "patch")):
        ratio = statistics.median(plain / own for plain, own in zip(seconds["supervised"], seconds[name]))
        numbers |= {f"{short}_of_supervised": ratio, f"{short}_of_its_share": ratio / SHARES[name]}
    numbers["waiting"] = max(statistics.median(w / s for w, s in zip(waited[name], seconds[name])) for name in ours)
    numbers |= {"views_ms": 1000 * step["views"], "views_share": step["views"] / step["MoCo"]}
    if device.type == "cuda":
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return {name: round(value, 4) for name, value in numbers.items()}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="torchvision ResNet")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the encoders")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks of all sides")
    parser.add_argument("--bn-splits", type=int, default=8, help="batch-norm groups of MoCo, as on so many GPUs")
    parser.add_argument("--moco-k", type=int, default=65536, help="queue of MoCo")
    parser.add_argument("--data", help="tree with train/CLASS/* of photographs, for the side that reads files")
    parser.add_argument("--workers", type=int, default=16, help="of that side; at most one a core is started")
    parser.add_argument("--pictures", type=int, default=2048, help="generated pictures on the device")
    parser.add_argument("--side", type=int, help="of those, pixels; default: 256 for 224, else in proportion")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each side, alternating")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--at-least", type=float, default=0.8, help="of 3/4 and 3/5 of the supervised rate")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is usable here")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU, {launch.cores()} cores"
    print(
        f"{args.arch}, {args.size} pixels, batch {args.batch}, {args.precision}{', compiled' * args.compile}, on {card}; "
        f"torch {torch.__version__}, {args.repeats} x {args.steps} steps",
        flush=True,
    )
    numbers = measure(args, device)
    aims = AIMS | dict.fromkeys(list(AIMS)[:2], (args.at_least, math.inf))
    missed = [name for name, (least, most) in aims.items() if not least <= numbers[name] <= most]
    for name, value in numbers.items():
        least, most = aims.get(name, (0, 0))
        wanted = (
            "" if name not in aims else f"   wanted: at {f'most {most}' if math.isfinite(most) else f'least {least}'}"
        )
        print(f"{name:28}{value:10.4g}{wanted}")
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"missed: {', '.join(missed)}" if missed else "all aims met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
