"""Measure training steps on a GPU: MoCo and MoCo + patch negatives beside supervised training.

    python benchmarks/gpu_throughput.py                # ResNet-50, 224 pixels, batch 256, bfloat16
    python benchmarks/gpu_throughput.py --data TREE    # and from JPEG files, read by workers
    python benchmarks/gpu_throughput.py --arch resnet18 --size 32 --batch 8 --steps 2 --repeats 1

supervised    a ResNet-50 with cross-entropy on one fixed batch that lies on the device: no loading,
              no augmentation.
MoCo          nonsem_neg's script as it is: its loader (pictures as uint8 on the device), its
              MoCo-v2 recipe, its step.
MoCo + patch  the same with one patch-based negative for each picture.
MoCo, files   MoCo, its pictures decoded and cropped by workers.
views         the loader of MoCo alone: two views of a batch.

All sides use one card, one precision and channels-last tensors, in one process; repeats alternate,
the ratio is that of neighbours. The clock stops when the device has done its work.

Counted in forward passes, a backward pass being two, supervised training costs 1 + 2 = 3. MoCo has
the forward pass of the key encoder besides, 4: at best it makes 3/4 of the pictures in a second. A
patch negative is one more pass of the key encoder, 5: 3/5. Wanted is --at-least of that; what is
left pays for the views, the queue, the momentum update and batch-norm in groups, as on several
GPUs. Views may take 15 ms and 10 % of MoCo's step. For 2 % of a step the script may wait for its
workers, which is at most how long the device waits; what they have ready is used up before the
clock runs.

The exit code is 1 where an aim is missed. --json FILE writes the numbers.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import cross_entropy

from benchmarks import photographs
from benchmarks.side_by_side import WARM
from common import backbones, inputs, launch
from common.precision import Precision
from nonsem_neg import moco_non_sem_neg as script
from tools.trial import Trial, generated, timed

SHARES = {"MoCo": 3 / 4, "MoCo + patch": 3 / 5}  # of the supervised rate, at best
SHORT = {"MoCo": "moco", "MoCo + patch": "patch"}  # in the names of numbers
AIMS = {  # number: (least, most); the first two are --at-least
    "moco_of_its_share": (0.8, math.inf),
    "patch_of_its_share": (0.8, math.inf),
    "waiting": (0, 0.02),
    "views_ms": (0, 15),
    "views_share": (0, 0.1),
}


def flags(args, kind: str, place: list[str]) -> list[str]:
    """Return the command line of nonsem_neg's script for one side. place: data and its device."""
    settings = (
        f"-a {args.arch} --input-res {args.size} -b {args.batch} --moco-k {args.moco_k} "
        f"-j {args.workers} --seed 0 --mlp --aug-plus --moco-t 0.2 --robust {kind} "
        f"--bn-splits {args.bn_splits}"
    ).split()
    if args.precision == "bfloat16":
        settings.append("--amp")
    if args.compile:
        settings.append("--compile")
    return [*settings, *place]


class Pretraining(Trial):
    """nonsem_neg's script without its run folder.

    `step()` fetches a batch and trains on it, `fetch()` only fetches. pictures: on the device;
    None: the files of the tree `data`, as often as it takes that no epoch ends.
    """

    def __init__(self, args, kind: str, device: torch.device, pictures=None, data: str = "-"):
        where = "device" if pictures is not None else "host"
        own = script.parse_args(flags(args, kind, [data, "--data-device", where]))
        self.ready = 0  # batches that workers make ahead
        if pictures is None:
            self.ready = 2 * inputs.reading_workers(own)
            calls = WARM + args.repeats * (args.steps + self.ready)
            files = inputs.open_pretraining(own)
            count = max(len(files), args.batch * calls)
            pictures = files.select([row % len(files) for row in range(count)])
        super().__init__(script, own, launch.Process(device=device), pictures)


class Supervised:
    """Cross-entropy of 1000 classes on one fixed batch on the device."""

    def __init__(self, args, device: torch.device):
        network = backbones.build(args.arch, 1000)
        self.network = network.to(device, memory_format=torch.channels_last).train()
        if args.compile:
            self.network.compile()
        self.precision = Precision(args.precision == "bfloat16", device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.target = (torch.arange(args.batch) % 1000).to(device)

    def step(self) -> None:
        with self.precision.autocast():
            logits = self.network(self.images)
        self.precision.step(cross_entropy(logits.float(), self.target), self.optimizer)


def measure(args, device: torch.device, data: str | None = None) -> dict[str, float]:
    """Return the numbers of all sides: pictures a second, shares between 0 and 1, milliseconds.

    data: tree of the side that reads files; default: --data, if any.
    """
    data = data or args.data
    side = args.side or round(args.size * 256 / 224)
    pictures = generated(max(args.pictures, args.batch), side, device)
    sides = {
        "MoCo": Pretraining(args, "none", device, pictures),
        "MoCo + patch": Pretraining(args, "patch", device, pictures),
    }
    if data:
        sides["MoCo, files"] = Pretraining(args, "none", device, data=data)
    calls = {"supervised": Supervised(args, device).step}
    calls |= {name: own.step for name, own in sides.items()}
    calls["views"] = sides["MoCo"].fetch
    for name, call in calls.items():
        print(f"  warming up: {name}, {timed(call, WARM, device):.1f} s", flush=True)
    seconds = {name: [] for name in calls}
    waited = {name: [] for name in sides}  # share of the seconds
    for repeat in range(args.repeats):
        for name, call in calls.items():
            own = sides.get(name)
            if own:
                for _ in range(own.ready):
                    own.fetch()
                own.loader.wait_seconds = 0.0
            seconds[name].append(timed(call, args.steps, device))
            if own:
                waited[name].append(own.loader.wait_seconds / seconds[name][-1])
            rate = args.batch * args.steps / seconds[name][-1]
            print(f"  repeat {repeat + 1} {name:12} {rate:8.0f} pictures/s", flush=True)
    for own in sides.values():
        own.loader.close()
    numbers = summary(args, seconds, waited)
    if device.type == "cuda":
        numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return {name: round(value, 4) for name, value in numbers.items()}


def summary(args, seconds: dict[str, list[float]], waited: dict[str, list[float]]) -> dict:
    """Return the numbers from the seconds of each repeat and the shares that were waited."""
    step = {name: statistics.median(values) / args.steps for name, values in seconds.items()}
    numbers = {
        f"{name}, pictures/s": args.batch / step[name] for name in seconds if name != "views"
    }
    for name, short in SHORT.items():
        pairs = zip(seconds["supervised"], seconds[name])
        ratio = statistics.median(supervised / own for supervised, own in pairs)
        numbers[f"{short}_of_supervised"] = ratio
        numbers[f"{short}_of_its_share"] = ratio / SHARES[name]
    numbers["waiting"] = max(statistics.median(shares) for shares in waited.values())
    numbers["views_ms"] = 1000 * step["views"]
    numbers["views_share"] = step["views"] / step["MoCo"]
    return numbers


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet50", help="torchvision ResNet")
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step")
    precisions = ("bfloat16", "float32")
    parser.add_argument("--precision", choices=precisions, default="bfloat16", help="of encoders")
    about = "torch.compile the networks of all sides"
    parser.add_argument("--compile", action="store_true", help=about)
    about = "batch-norm groups of MoCo, as on so many GPUs"
    parser.add_argument("--bn-splits", type=int, default=8, help=about)
    parser.add_argument("--moco-k", type=int, default=65536, help="queue of MoCo")
    about = "tree with train/CLASS/* of photographs, for the side that reads files"
    parser.add_argument("--data", help=about)
    about = "generate so many JPEG files for that side, where --data is not given"
    parser.add_argument("--photographs", type=int, default=0, help=about)
    about = "of that side; at most one a core is started"
    parser.add_argument("--workers", type=int, default=16, help=about)
    about = "generated pictures on the device"
    parser.add_argument("--pictures", type=int, default=2048, help=about)
    about = "of those, pixels; default: 256 for 224, else in proportion"
    parser.add_argument("--side", type=int, help=about)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each repeat")
    about = "repeats of each side, alternating"
    parser.add_argument("--repeats", type=int, default=3, help=about)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="auto", help="where to compute")
    about = "of 3/4 and 3/5 of the supervised rate"
    parser.add_argument("--at-least", type=float, default=0.8, help=about)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is usable here")
    return args


@contextlib.contextmanager
def tree_of_files(args) -> Iterator[str | None]:
    """Give the tree of the side that reads files: --data, or generated ones, or None."""
    if args.data or not args.photographs:
        yield args.data
        return
    with tempfile.TemporaryDirectory() as folder:
        photographs.generate(Path(folder) / "train", args.photographs)
        yield folder


def main(argv=None) -> int:
    args = parse_args(argv)
    use_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_gpu else "cpu")
    card = f"the CPU, {launch.cores()} cores"
    if use_gpu:
        card = torch.cuda.get_device_name(device)
    compiled = ", compiled" if args.compile else ""
    print(
        f"{args.arch}, {args.size} pixels, batch {args.batch}, {args.precision}{compiled}, on "
        f"{card}; torch {torch.__version__}, {args.repeats} x {args.steps} steps",
        flush=True,
    )
    with tree_of_files(args) as data:
        numbers = measure(args, device, data)
    aims = dict(AIMS)
    for short in SHORT.values():
        aims[f"{short}_of_its_share"] = (args.at_least, math.inf)
    missed = [name for name, (least, most) in aims.items() if not least <= numbers[name] <= most]
    for name, value in numbers.items():
        wanted = ""
        if name in aims:
            least, most = aims[name]
            bound = f"at most {most}" if math.isfinite(most) else f"at least {least}"
            wanted = f"   wanted: {bound}"
        print(f"{name:28}{value:10.4g}{wanted}")
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"missed: {', '.join(missed)}" if missed else "all aims met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
