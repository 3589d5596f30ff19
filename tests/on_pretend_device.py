"""Whole runs of the scripts on the pretend accelerator; test_pretend_device.py starts this once and reads its answers.

python tests/on_pretend_device.py     # in a folder with data/demo; one JSON object per check on standard output
"""

import contextlib
import io
import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import pretend_device
import torch
from conftest import ROOT, compute_on, slim_networks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu_throughput
from common import data
from preprocess import demo_voc

TRAIN = "--demo --epochs 2 -b 32 --seed 0 --knn-every 1 --save_score".split()
BANK = [*TRAIN, *"--nce_k 40 --model_path".split()]
FT = ["--no-cosine", "--name", "run", *BANK]  # at the same rate and in one folder, whatever the number of epochs
RING = [*TRAIN, *"--k 64 --thres-inner .3 --anneal loss --nn-every 1 --exp-base".split()]
PATCH = [*TRAIN, *"--moco-k 64 --bn-splits 2 --ckpt_path".split()]
RUNS = {  # name: (script, flags; the last of them names the folder)
    "cmc-nce": ("cmc.train_CMC", ["--exclude-self", *BANK]),
    "cmc-softmax": ("cmc.train_CMC", ["--softmax", "--amp", *BANK]),
    "insdis": ("moco_insdis.train_moco_ins", ["--data-device", "host", "-j", "0", *BANK]),
    "moco": ("moco_insdis.train_moco_ins", ["--moco", *BANK]),
    "patch": ("nonsem_neg.moco_non_sem_neg", PATCH),
    "ring-ir": ("ring.train_ring", ["--neighbor-views", *RING]),
    "ring-cmc": ("ring.train_ring", ["--method", "cmc", "--all-ring", *RING]),
    "ring-moco": ("ring.train_ring", ["--method", "moco", *RING]),
    "ft-moco": ("feature_transform.main_contrast", ["--dim_mask", "both", *FT]),
    "ft-pirl": (
        "feature_transform.main_contrast",
        ["--method", "PIRL", "--dim_mask", "sample", *FT],
    ),
    "ft-cmc": ("feature_transform.main_contrast", ["--method", "CMCv2", *FT]),
    "debiased": ("debiased.main", ["--M", "2", *TRAIN, "--model_path"]),
    "unbiased": ("debiased.main", ["--loss", "unbiased", "--amp", *TRAIN, "--model_path"]),
}
LINEAR = "--demo --epochs 1 -b 64 --seed 0 --lr 0.1".split()
EVALUATIONS = {  # name: (script, flags, the last of which names the folder); they read what a run above has left
    "cmc-cached": ("cmc.LinearProbing", "--model_path HERE/cmc-nce --cache-views 1 --save_path"),
    "cmc-fresh": ("cmc.LinearProbing", "--amp --model_path HERE/cmc-softmax --cache-views 0 --save_path"),
    "moco-cached": ("moco_insdis.eval_moco_ins", "--model_path HERE/moco --cache-views 1 --save_path"),
    "insdis-fresh": ("moco_insdis.eval_moco_ins", "--bn --model_path HERE/insdis --cache-views 0 --save_path"),
    "patch-cached": ("nonsem_neg.main_lincls", "--pretrained HERE/patch --cache-views 2 --ckpt_path"),
    "debiased-cached": ("debiased.linear", "--model_path HERE/debiased --cache-views 1 --save_path"),
    "debiased-fresh": ("debiased.linear", "--protocol published --model_path HERE/unbiased --save_path"),
    "patch-fresh": ("nonsem_neg.main_lincls", "--amp --pretrained HERE/patch --cache-views 0 --ckpt_path"),
}
EVALUATIONS = {name: (script, [*LINEAR, *flags.split()]) for name, (script, flags) in EVALUATIONS.items()}
ROBUSTNESS = ["--demo", "--classifier", "HERE/patch-cached", "--ckpt_path"]
EVALUATIONS["robustness"] = "nonsem_neg.eval_robustness", ROBUSTNESS
DETECTION = (
    "--demo --pretrained none -b 2 --iterations 3 --checkpoint_every 2 --min-size 48 --test-size 48 --rois 16 -j 0"
)
EVALUATIONS["detection"] = "feature_transform.eval_detection", [*DETECTION.split(), "--save_path"]
COMPARED = ("moco-cached", "patch-cached", "robustness", "detection")  # these are made on the CPU, too
PLANTED = {  # run: what of (views, target, index) is left on the host
    "cmc-nce": "index", "insdis": "index", "moco": "view", "patch": "view", "cmc-fresh": "target", "patch-fresh": "view",
    "ring-ir": "index", "ring-moco": "view", "ft-moco": "view", "ft-pirl": "index",
    "debiased": "view", "unbiased": "target", "debiased-fresh": "view",
}  # fmt: skip
BENCHMARK = "--arch resnet18 --size 32 --batch 8 --bn-splits 2 --moco-k 64 --pictures 16 --steps 1 --repeats 1"
FILES = "--data data/demo --workers 0"


def names() -> list[str]:
    scripts = [
        f"{kind} {n}" for kind, all in (("train", RUNS), ("evaluate", EVALUATIONS), ("planted", PLANTED)) for n in all
    ]
    return [*scripts, "benchmark throughput"]


def start(name: str, side: str, *more: str) -> None:
    script, flags = (RUNS | EVALUATIONS)[name]
    flags = [
        flag.replace("HERE", side) for flag in flags if side == "npu" or flag != "--amp"
    ]  # which changes no type there
    import_module(script).main([*flags, f"{side}/{name}", *more])


def newest(name: str, side: str) -> dict:
    (path,) = [
        p
        for last in ("current.pth", "last.ckpt", "checkpoint_last.pth.tar", "checkpoint_robust_*")
        for p in Path(side, name).rglob(last)
    ]
    return torch.load(path, weights_only=True)  # no map_location: where the tensors say they were


def leaves(value, at=""):
    """(path, value) of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield at, value
    else:
        for key, inner in items:
            yield from leaves(inner, f"{at}/{key}")


def compare(name: str) -> dict:
    """The checkpoint of the device's run, which was interrupted, beside that of the CPU's, which was not."""
    there, here = (dict(leaves(newest(name, side))) for side in ("npu", "cpu"))
    tensors = {k for k, v in there.items() if isinstance(v, torch.Tensor)}
    differing = [k for k in tensors & here.keys() if not torch.equal(there[k], here[k])]
    return {
        "keys": sorted(there.keys() ^ here.keys()),
        "not on the CPU": [k for k in tensors if there[k].device.type != "cpu"],
        "tensors": len(tensors),
        "differing": sorted(differing),
    }


def train(name: str) -> dict:
    start(name, "npu", "--epochs", "1")
    start(name, "npu", "--resume", "auto")
    return compare(name)


def evaluate(name: str) -> dict:
    start(name, "npu")
    sides = [json.loads(path.read_text()) for s in ("npu", "cpu") for path in Path(s, name).rglob("result*.json")]
    numbers = [{k: v for k, v in side.items() if isinstance(v, float)} for side in sides]
    return {"numbers": numbers} | (compare(name) if name in COMPARED[:2] else {})


def planted(name: str) -> dict:
    """The same run with a loader that leaves something where it was."""
    batches = data.Loader.__iter__

    def forgets(self):
        for views, target, index in batches(self):
            if PLANTED[name] == "view":
                views = [views[0].cpu(), *views[1:]]
            target = target.cpu() if PLANTED[name] == "target" else target
            yield views, target, index.cpu() if PLANTED[name] == "index" else index

    data.Loader.__iter__ = forgets
    try:
        start(name, "npu", "--overwrite")
    finally:
        data.Loader.__iter__ = batches
    return {}


def benchmark(name: str) -> dict:
    gpu_throughput.WARM = 1
    args = gpu_throughput.parse_args(f"{BENCHMARK} {FILES}".split())
    device = torch.device(pretend_device.NAME, 0)
    side = gpu_throughput.Pretraining(args, "patch", device, gpu_throughput.generated(16, 36, device))
    side.step()
    with Waits() as waits:
        side.step()
    return {"numbers": gpu_throughput.measure(args, device), "waits": waits.found}


class Waits(TorchDispatchMode):
    """Where a GPU would be waited for: its values read, or a copy to it that is not told to be non_blocking."""

    READS = "_local_scalar_dense", "nonzero", "masked_select", "equal"

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        there = any(isinstance(x, pretend_device.DeviceTensor) for x in tree_leaves((args, kwargs)))
        to = kwargs.get("device") if name == "_to_copy" else None
        crosses = to is not None and (torch.device(to).type == pretend_device.NAME) != there
        if there and (name in self.READS or crosses) or crosses and not kwargs.get("non_blocking"):
            frames = [f for f in traceback.extract_stack() if Path(f.filename).parent.parent == ROOT]
            self.found.append(
                f"{name} at {[f'{Path(f.filename).name}:{f.lineno}' for f in frames if 'tests' not in f.filename][-1]}"
            )
        return operation(*args, **kwargs)


def check(kind: str, name: str) -> dict:
    began, said = time.perf_counter(), io.StringIO()
    answer = {"check": f"{kind} {name}", "error": None}
    try:
        with contextlib.redirect_stdout(said):
            does = {"train": train, "evaluate": evaluate, "planted": planted, "benchmark": benchmark}
            answer |= does[kind](name)
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.parent == ROOT]
        ours = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in ours if "tests/" not in f.filename]
        answer["error"] = f"{' > '.join(ours)}: {type(error).__name__}: {error}"
    return answer | {"seconds": round(time.perf_counter() - began, 2)}


def main() -> None:
    out = sys.stdout
    demo_voc.ensure("data/demo-voc", trainval=6, test=3, size=64)
    device = pretend_device.switch_on()  # before the first backward pass, which counts the devices
    with contextlib.redirect_stdout(io.StringIO()):
        for name in (*RUNS, *COMPARED):
            start(name, "cpu", "--device", "cpu")
    compute_on(device)
    for line in names():
        print(json.dumps(check(*line.split())), file=out, flush=True)


if __name__ == "__main__":
    with slim_networks():
        main()
