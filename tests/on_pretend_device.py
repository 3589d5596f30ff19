"""Whole runs on the pretend accelerator; test_pretend_device.py starts this once.

python tests/on_pretend_device.py     # in a folder with data/demo; one JSON object per check
"""

import contextlib
import io
import itertools
import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import pretend_device
import pytest
import torch
from conftest import ROOT, compute_on, slim_networks
from papers import CASES, checkpoints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_throughput
from common import convolution, data
from preprocess import demo_voc
from runner import features, loop

EVALUATED = [name for name, case in CASES.items() if case.linear is not None]
OTHERS = {  # further scripts: (module, flags; the last of them names the folder)
    "robustness": ("nonsem_neg.eval_robustness", "--demo --classifier {side}/patch-linear --out"),
    "detection": (
        "feature_transform.eval_detection",
        "--demo --pretrained none -b 2 --iterations 3 --checkpoint_every 2 --min-size 48 "
        "--test-size 48 --rois 16 -j 0 --out",
    ),
}
BENCHMARK = (
    "--arch resnet18 --size 32 --batch 8 --bn-splits 2 --moco-k 64 --pictures 16 --steps 1 "
    "--repeats 1 --data data/demo --workers 0"
)
DEVICE, HOST = "npu", "cpu"  # the sides, and the folders of their runs


def checks() -> list[tuple[str, str]]:
    """Return (kind, name) of every check."""
    kinds = {
        "train": CASES,
        "evaluate": EVALUATED,
        "fresh": EVALUATED,
        "planted": CASES,
        "others": OTHERS,
        "benchmark": ("throughput",),
    }
    return [(kind, name) for kind, names in kinds.items() for name in names]


def train(name: str, side: str, *more: str) -> None:
    """Run a Case.

    Every fourth one reads from the disk, and every fourth has --amp, which changes no type here.
    """
    number = list(CASES).index(name) % 4
    if number == 0 and side == DEVICE:
        more = ("--amp", *more)
    if number == 1:
        more = ("--data-device", "host", "-j", "0", *more)
    flags = CASES[name].run_in(f"{side}/{name}", "--knn-every", "1", "--save_score", *more)
    CASES[name].module.main(flags)


def evaluate(name: str, side: str, *more: str, folder: str = "linear") -> None:
    """Evaluate the network of that run."""
    case = CASES[name]
    flags = case.linear_of(f"{side}/{name}", f"{side}/{name}-{folder}", *more)
    case.evaluation.main(flags)


def run_other(name: str, side: str) -> None:
    module, flags = OTHERS[name]
    words = [word.format(side=side) for word in flags.split()]
    import_module(module).main([*words, f"{side}/{name}"])


def leaves(value, path=""):
    """Yield (path, value) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in items:
        yield from leaves(inner, f"{path}/{key}")


def all_leaves(folder: str) -> dict:
    """Return {file and path in it: value} of all checkpoints below a folder."""
    values = {}
    for file, path in checkpoints(folder).items():
        content = torch.load(path, weights_only=True)  # where the tensors say they were
        values |= {f"{Path(file).name}{at}": value for at, value in leaves(content)}
    return values


def compare(name: str) -> dict:
    """Compare the checkpoints of the device's run with those of the host's."""
    there, here = (all_leaves(f"{side}/{name}") for side in (DEVICE, HOST))
    tensors = {key for key, value in there.items() if isinstance(value, torch.Tensor)}
    differing = [key for key in tensors & here.keys() if not torch.equal(there[key], here[key])]
    return {
        "keys": sorted(there.keys() ^ here.keys()),
        "not on the CPU": [key for key in tensors if there[key].device.type != "cpu"],
        "tensors": len(tensors),
        "differing": sorted(differing),
    }


def results(name: str) -> list[dict]:
    """Return the numbers in the results of the device and of the host."""
    values = []
    for side in (DEVICE, HOST):
        for path in Path(side, name).rglob("result*.json"):
            result = json.loads(path.read_text())
            values.append({key: value for key, value in result.items() if isinstance(value, float)})
    return values


def planted(name: str) -> None:
    """Run a Case with a loader that leaves something of a batch on the host."""
    batches = data.Loader.__iter__
    left = CASES[name].on_device

    def forgets(self):
        for views, target, index in batches(self):
            if left == "view":
                views = [views[0].cpu(), *views[1:]]
            if left == "target":
                target = target.cpu()
            if left == "index":
                index = index.cpu()
            yield views, target, index

    data.Loader.__iter__ = forgets
    try:
        train(name, DEVICE, "--overwrite")
    finally:
        data.Loader.__iter__ = batches


def benchmark() -> dict:
    gpu_throughput.WARM = 1
    args = gpu_throughput.parse_args(BENCHMARK.split())
    device = torch.device(pretend_device.NAME, 0)
    pictures = gpu_throughput.generated(16, 36, device)
    side = gpu_throughput.Pretraining(args, "patch", device, pictures)
    side.step()
    with Waits() as waits:
        side.step()
    return {"numbers": gpu_throughput.measure(args, device), "waits": sorted(waits.places)}


class Waits(TorchDispatchMode):
    """Note where a GPU would be waited for.

    That is where its values are read, a copy to it is not told to be non_blocking, or a large copy
    comes from memory that is not pinned: CUDA hands over 64 KB without waiting, and these batches
    are at least eight times as small as the published ones.
    """

    READS = "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"
    UNPINNED = 8 << 10  # bytes

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        if self.waits(name, args, kwargs):
            self.places.add(f"{name} at {own_frames(traceback.extract_stack())[-1]}")
        return operation(*args, **kwargs)

    def waits(self, name: str, args: tuple, kwargs: dict) -> bool:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, pretend_device.DeviceTensor)]
        if name == "_to_copy":
            to = kwargs.get("device")
            if to is None or bool(there) == (torch.device(to).type == pretend_device.NAME):
                return False
            is_fed = kwargs.get("non_blocking") and not there
            return not is_fed or self.is_large(args[0])
        if name == "copy_" and len(there) == 1 and there[0] is args[0] and args[1].dim() > 0:
            return not (args[2:] or kwargs.get("non_blocking")) or self.is_large(args[1])
        has_mask = name == "index" and any(x.dtype == torch.bool for x in tensors[1:])
        return bool(there) and (name in self.READS or has_mask)

    def is_large(self, x: torch.Tensor) -> bool:
        return x.nbytes > self.UNPINNED and not pretend_device.is_pinned(x)

    @contextlib.contextmanager
    def in_steps(self):
        """Watch the second step of the runs in this block: of their loaders and methods."""
        begin = loop.Job.begin

        def watched_begin(job, loader, method, /, **derived):
            step = method.step
            number = itertools.count()

            def watched_step(batch):
                with self if next(number) == 1 else contextlib.nullcontext():
                    return step(batch)

            method.step = watched_step
            begin(job, loader, method, **derived)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Job, "begin", watched_begin)
            for source in (data.Loader, features.CachedViews):
                patch.setattr(source, "__iter__", self.watched(source.__iter__))
            yield

    def watched(self, iterate):
        def watched_iterate(source):
            batches = iterate(source)
            yield next(batches)
            with self:
                second = next(batches, None)
            if second is not None:
                yield second
                yield from batches

        return watched_iterate


def own_frames(frames) -> list[str]:
    """Return FOLDER/FILE:LINE of the project's frames, without those of tests."""
    own = [frame for frame in frames if Path(frame.filename).parent.parent == ROOT]
    places = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in own]
    return [place for place in places if not place.startswith("tests/")]


def answer_to(kind: str, name: str) -> dict:
    """Return what a check finds."""
    waits = Waits()
    if kind == "train":
        with waits.in_steps():
            train(name, DEVICE, "--stop-after", "1")
        train(name, DEVICE, "--resume", "auto")
        return compare(name) | {"waits": sorted(waits.places)}
    if kind == "evaluate":
        with waits.in_steps():
            evaluate(name, DEVICE)
        answer = compare(f"{name}-linear") | {"numbers": results(f"{name}-linear")}
        return answer | {"waits": sorted(waits.places)}
    if kind == "fresh":
        with waits.in_steps():
            evaluate(name, DEVICE, "--amp", "--cache-views", "0", folder="fresh")
        return {"numbers": results(f"{name}-fresh"), "waits": sorted(waits.places)}
    if kind == "others":
        run_other(name, DEVICE)
        return {"numbers": results(name)}
    if kind == "planted":
        planted(name)
        return {}
    return benchmark()


def check(kind: str, name: str) -> dict:
    began = time.perf_counter()
    answer = {"check": f"{kind} {name}", "error": None}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            answer |= answer_to(kind, name)
    except Exception as error:
        places = " > ".join(own_frames(traceback.extract_tb(error.__traceback__)))
        answer["error"] = f"{places}: {type(error).__name__}: {error}"
    return answer | {"seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    out = sys.stdout
    demo_voc.ensure("data/demo-voc", trainval=6, test=3, size=64)
    convolution.FEW = 0  # only a CPU computes products in their place, and all bits are compared
    device = pretend_device.switch_on()  # before a backward pass, which counts the devices
    with contextlib.redirect_stdout(io.StringIO()):
        for name in CASES:
            train(name, HOST)
        for name in EVALUATED:
            evaluate(name, HOST)
        for name in OTHERS:
            run_other(name, HOST)
    compute_on(device)
    for kind, name in checks():
        print(json.dumps(check(kind, name)), file=out, flush=True)


if __name__ == "__main__":
    with slim_networks():
        main()
