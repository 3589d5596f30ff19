"""Two processes are one: the same losses, memories and gradients for the same global batch, a resume that is exact,
torchrun as `--nproc`. One job of two processes makes all that is compared here.

The networks compute in float64, features and losses in float32 as ever. So rounding enters where features are compared, and is
not blown up by batch-norm over few numbers on its way through the layers: what agrees, agrees to six digits, and what is wrong
(the planted mistakes show it) is a thousand times further away.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Net, equal, inside, run_script, slim_networks
from torch import nn

from cmc import train_CMC
from common import batchnorm, cli, launch, options
from runner import checkpoint
from debiased import main as debiased
from feature_transform import main_contrast
from moco_insdis import train_moco_ins
from nonsem_neg import moco_non_sem_neg, negatives
from nonsem_neg.moco import MoCo

DEMO = "--demo --device cpu --seed 0".split()
STEP = "-b 8 --nce_k 24 --nce_t .5 --learning_rate .01 --bn-splits 2 --save_score".split()
CASES = {  # name: (how a step is taken, flags)
    "cmc softmax": ("cmc", ["--softmax", "--view", "YCbCr"]),
    "cmc nce": ("cmc", ["--views", "L,a,b", "--exclude-self"]),
    "insdis softmax": ("insdis", ["--softmax", "--exclude-self"]),
    "insdis nce": ("insdis", []),
    "moco": ("moco", ["--moco"]),
    "patch": ("patch", []),
    "patch symmetric": ("patch", ["--symmetric"]),
    "debiased": ("debiased", ["--M", "2"]),
    "unbiased": ("debiased", ["--loss", "unbiased"]),
    "ft moco": ("ft", ["--dim_mask", "both"]),
    "ft cmc": ("ft", ["--method", "CMCv2"]),
    "ft pirl": ("ft", ["--method", "PIRL", "--dim_mask", "sample"]),
}
MISTAKES = {  # planted in two processes: in which cases it is one
    "gradients are summed": ["cmc softmax", "insdis nce", "moco", "patch", "debiased"],
    "the rows of rank 1 are those of rank 0": ["cmc softmax", "insdis nce", "moco", "patch", "debiased"],
    "a rank keeps its own keys": ["moco", "patch"],
    "negatives are those of the rank": ["debiased"],
    "coefficients are those of the rank": ["ft moco", "ft pirl"],
    "the others' features have no gradient": ["debiased", "unbiased"],
}
TOLERANCE = 2e-4  # relative; measured: 1e-5 of the movement of all weights, 1e-6 of memories. The mistakes: 0.2 to 2
LONG = "-b 32 --epochs 2 --print_freq 2 --save_score".split()
RUNS = {  # name: (script, flags, the flag that names the folder)
    "cmc": (train_CMC, [*LONG, "--nce_k", "24"], "--model_path"),
    "moco": (train_moco_ins, [*LONG, "--nce_k", "40", "--moco"], "--model_path"),
    "patch": (moco_non_sem_neg, "-b 32 --epochs 2 --moco-k 64 --bn-splits 2".split(), "--ckpt_path"),
    "debiased": (debiased, LONG, "--model_path"),
}


# ------------------------------------------------------------------------------------------------ steps on fixed views


class Bank:
    """CMC, InsDis or MoCo as their scripts make them, with a float64 network."""

    def __init__(self, kind, flags, process):
        script = train_CMC if kind == "cmc" else train_moco_ins
        args = script.parse_args([*DEMO, *STEP, *flags])
        make = {"cmc": "CMC", "insdis": "InsDis", "moco": "MoCo"}[kind]
        with float64():
            self.method = getattr(script, make)(args, 40, process)
        self.method.memory.float()
        self.optimizer, self.views = self.method.optimizer, 2 if kind == "moco" else 1

    def step(self, views, index):
        loss, _ = self.method.step(list(views), index)
        return loss.detach(), self.method.scores.pop()

    def weights(self) -> dict:
        networks = {"": self.method.encoder, "key ": getattr(self.method, "encoder_ema", None)}
        return {f"{k}{name}": v for k, net in networks.items() if net for name, v in net.named_parameters()}

    def memory(self) -> dict:
        return self.method.memory.state_dict()


class Patch:
    """MoCo with patch negatives on a small float64 network."""

    views = 2

    def __init__(self, kind, flags, process):
        how = dict(bn_splits=2 // process.world_size, symmetric="--symmetric" in flags)
        with float64():
            self.model = MoCo(Net, 8, queue_size=16, momentum=0.5, temperature=0.5, alpha=2.0, **how)
        self.model.queue = self.model.queue.float()
        self.wrapped, self.process = self.model, process
        if process.world_size > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.generator = torch.Generator().manual_seed(9)

    def step(self, views, index):
        ranks = dict(rank=self.process.rank, world_size=self.process.world_size)
        made = negatives.patch_negatives(views[0], 2, (4, 9), self.generator, **ranks)
        if self.model.symmetric:
            made = made, negatives.patch_negatives(views[1], 2, (4, 9), self.generator, **ranks)
        logits, keys = self.wrapped(*views, made, self.generator)
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.enqueue(keys)
        return loss.detach(), logits.detach()[: len(views[0])]  # in the order of the pictures

    def weights(self) -> dict:
        return dict(self.model.named_parameters())

    def memory(self) -> dict:
        return {"queue": self.model.queue}


class Transformed(Bank):
    """A method of feature transformation, likewise."""

    def __init__(self, kind, flags, process):
        args = main_contrast.parse_args([*DEMO, *STEP, *flags])
        with float64():
            self.method = (main_contrast.MoCo if args.mem == "moco" else main_contrast.Bank)(args, 40, process)
        self.method.memory.float()
        self.optimizer, self.views = self.method.optimizer, 1 + (args.mem == "moco") + args.jigsaw

    def step(self, views, index):
        return self.method.step(list(views), index, 1)["loss"], self.method.scores


class Pairs:
    """The debiased loss or its oracle on a float64 network; SGD, because Adam would hide the scale of a gradient."""

    def __init__(self, kind, flags, process):
        args = debiased.parse_args([*DEMO, *"-b 8 --feature_dim 16 --bn-splits 2 --save_score".split(), *flags])
        with float64():
            self.method = debiased.Debiased(args, process)
        self.optimizer = self.method.optimizer = torch.optim.SGD(self.method.model.parameters(), 0.1)
        self.views = 1 + args.M

    def step(self, views, index):
        return self.method.step(list(views), index % 3)["loss"], self.method.scores

    def weights(self) -> dict:
        return dict(self.method.model.named_parameters())

    def memory(self) -> dict:
        return {}


def without_others(x):
    """What `all_gather_with_grad` returns, with a gradient for this rank's own rows alone."""
    rows = list(launch.all_gather(x).chunk(launch.world_size()))
    rows[launch.rank()] = x
    return torch.cat(rows)


GATHERED = {"negatives are those of the rank": lambda x: x, "the others' features have no gradient": without_others}


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def scale(optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.mul_(factor)


def steps(case: str, process, mistake: str | None = None) -> dict:
    """Two steps on fixed views of which every rank has its share: losses, how far the weights moved, scores, the memory."""
    kind, flags = CASES[case]
    torch.manual_seed(0)
    method = {"patch": Patch, "debiased": Pairs, "ft": Transformed}.get(kind, Bank)(kind, flags, process)
    before = {k: v.detach().clone() for k, v in method.weights().items()}
    rank = 0 if mistake == "the rows of rank 1 are those of rank 0" else process.rank
    if mistake == "gradients are summed":
        method.optimizer.register_step_pre_hook(lambda optimizer, *_: scale(optimizer, process.world_size))
    if mistake == "coefficients are those of the rank":
        method.method.generators["mixing"].manual_seed(process.rank)
    losses = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(method.views, 8, 3, 32, 32, generator=generator).double()
        index = torch.randperm(40, generator=generator)[:8]
        mine = slice(4 * rank, 4 * rank + 8 // process.world_size)
        planted = contextlib.nullcontext()
        if mistake == "a rank keeps its own keys":
            planted = mock.patch.object(torch, "randperm", lambda n, **_: torch.arange(n))
        elif mistake in GATHERED:
            planted = mock.patch.object(processes, "all_gather_with_grad", GATHERED[mistake])
        with planted:
            loss, scores = method.step(images[:, mine], index[mine])
            losses.append(launch.mean_ranks(loss))
    after, memory = {k: v.detach() for k, v in method.weights().items()}, method.memory()
    moved = torch.cat([some(after[k] - before[k]) for k in after])
    return {
        "losses": torch.stack(losses).double(),
        "moved": moved,
        "scores": launch.all_gather(scores).double(),
        **{k: v.double() for k, v in memory.items()},
        "ranks": launch.gather_objects([digest(v) for v in (*after.values(), *memory.values())]),
    }


def some(x):
    """At most 2,000 or so numbers, taken evenly."""
    return x.flatten()[:: max(1, x.numel() // 2000)]


def digest(x) -> str:
    return hashlib.sha1(x.contiguous().numpy().tobytes()).hexdigest()


def collectives(process) -> dict:
    x = torch.arange(3.0)[:, None] + 10 * process.rank
    shuffle = batchnorm.BatchShuffle(3, torch.Generator().manual_seed(1))
    spread = shuffle.spread(x)
    z = x.clone().requires_grad_()
    (launch.all_gather_with_grad(z) ** 2).sum().backward()
    assert torch.equal(shuffle.own(shuffle.collect(spread)), x)
    return {
        "shuffled": launch.all_gather(spread),
        "grad": z.grad,
        "ragged": launch.gather_ragged(torch.arange(1.0 + 2 * process.rank)),
        "any": launch.any_rank(process.rank == 1),
    }


def job(args, process) -> None:
    with slim_networks():
        found = {case: steps(case, process) for case in CASES} | {"collectives": collectives(process)}
        if process.world_size == 2:
            for mistake, cases in MISTAKES.items():
                found |= {(case, mistake): steps(case, process, mistake) for case in cases}
    for name, (script, flags, folder) in RUNS.items() if process.world_size == 2 else ():
        for where, *more in (("whole",), ("parts", "--epochs", "1"), ("parts", "--resume", "auto")):
            start = [*DEMO, *flags, folder, f"{name}-{where}", *more]
            width = contextlib.nullcontext() if name == "patch" else slim_networks()  # torchrun repeats that run
            with width:
                script.worker(script.parse_args(start), process)
    if process.is_main:
        torch.save(found, f"{process.world_size}.pt")


def one_and_two(job, folder):
    """What `job` found in one process and in two, each of which has saved it as N.pt; and the folder of the runs of two."""
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    with inside(folder):
        for count in ("1", "2"):
            launch.start(job, parser.parse_args(["--device", "cpu", "--nproc", count]))
        return torch.load("1.pt"), torch.load("2.pt"), folder


@pytest.fixture(scope="module")
def both(module_folder):
    return one_and_two(job, module_folder)


def distances(a: dict, b: dict) -> dict:
    """Relative distance of everything that must agree."""
    return {k: ((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-12)).item() for k in a.keys() - {"ranks"}}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(both, case):
    one, two, _ = both
    found = distances(one[case], two[case])
    assert max(found.values()) < TOLERANCE, found
    first, second = two[case]["ranks"]
    assert first == second  # weights and memories agree on all ranks


@pytest.mark.parametrize("mistake, case", [(m, c) for m, cases in MISTAKES.items() for c in cases])
def test_a_mistake_is_far_off(both, mistake, case):
    one, two, _ = both
    moved = ({"moved": side["moved"]} for side in (one[case], two[case, mistake]))
    assert distances(*moved)["moved"] > 100 * TOLERANCE


def test_collectives(both):
    one, two, _ = (answers["collectives"] if isinstance(answers, dict) else None for answers in both)
    assert sorted(two["shuffled"].flatten().tolist()) == [0, 1, 2, 10, 11, 12]
    assert two["shuffled"].flatten().tolist() != [0, 1, 2, 10, 11, 12]
    assert two["ragged"].tolist() == [0, 0, 1, 2] and two["any"] is True and one["any"] is False
    torch.testing.assert_close(two["grad"], 2 * one["grad"])  # each rank's copy of the sum contributes


# ---------------------------------------------------------------------------------------------------------- whole runs


def newest(folder) -> dict:
    (path,) = [p for name in ("current.pth", "checkpoint_last.pth.tar") for p in folder.rglob(name)]
    return checkpoint.load(path)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_resume(both, name):
    whole, parts = (newest(both[2] / f"{name}-{where}") for where in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len(whole["generators"]) == 2 and parts["epoch"] == 2
    for key in whole.keys() - {"opt", "args", "scaler"}:
        assert equal(whole[key], parts[key]), key
    written = [{p.name: np.load(p) for p in both[2].rglob(f"{name}-{w}/**/score_*.npy")} for w in ("whole", "parts")]
    assert len(written[0]) == 2 * (name != "patch") and written[0].keys() == written[1].keys()
    for file, scores in written[0].items():
        assert scores.shape == (5, 32 * (1 + (name == "debiased")), 5) and np.array_equal(scores, written[1][file])


def test_torchrun_gives_what_nproc_gives(both):
    folder = both[2]
    script, flags, where = RUNS["patch"]
    start = [script.__file__, *DEMO, *flags, where, "torchrun", "--epochs", "1"]
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*runner, *start], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ours = checkpoint.load(folder / "patch-parts" / "checkpoint_0000.pth.tar")
    assert equal(newest(folder / "torchrun")["state_dict"], ours["state_dict"])
    assert json.loads((folder / "torchrun" / "config.json").read_text())["world_size"] == 2


def test_a_slurm_step_without_torchrun_is_one_line(workspace):
    slurm = dict(SLURM_STEP_NUM_TASKS="2", SLURM_JOB_ID="4711", SLURM_PROCID="0", SLURM_LOCALID="0")
    host = dict(SLURM_STEP_NODELIST="localhost")
    done = run_script("moco_insdis/train_moco_ins.py", *DEMO, cwd=workspace, timeout=30, **slurm, **host)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "srun torchrun" in done.stderr
