"""Two processes are one: the same losses, memories and gradients for the same global batch, and
exact resumes. One job of two processes makes all that is compared here.

The networks compute in float64, features and losses in float32 as ever. So rounding enters where
features are compared, and is not blown up by batch-norm over few numbers on its way through the
layers: what agrees, agrees to four digits on every processor seen, and what is wrong (the planted
mistakes show it) is a thousand times further away.
"""

import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import warnings
from unittest import mock

import numpy as np
import papers
import pytest
import torch
from conftest import equal, inside, run_script, slim_networks
from papers import BATCH, CASES, STEPS, WHOLE, checkpoints
from torch import nn

from common import batchnorm, cli, collectives, launch, options
from runner import checkpoint
from runner.contract import At, Batch

TOLERANCE = 1e-3  # relative; measured: at most 2.3e-4, by processor. The mistakes: 0.2 to 2
ROWS = 8  # of the global batch of a step
TORCHRUN = "patch"  # the Case that torchrun starts, too
SMALL = ("-a", "resnet18-small")  # its network, as a process of torchrun has no slim ones
MISTAKES = [(mistake, name) for name, case in CASES.items() for mistake in case.mistakes]


# --------------------------------------------------------------------- steps on fixed views


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def modules(method) -> dict[str, nn.Module]:
    """Return {path: module} of everything in a method, each once."""
    own = [(name, part) for name, part in vars(method).items() if isinstance(part, nn.Module)]
    found, seen = {}, set()
    for name, part in own:
        for path, module in part.named_modules(prefix=name):
            if id(module) not in seen:
                seen.add(id(module))
                found[path] = module
    return found


def weights(method) -> dict[str, torch.Tensor]:
    """Return {path: parameter} of all networks, those that only follow another one too."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in modules(method).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def memories(method) -> dict[str, torch.Tensor]:
    """Return {path: buffer} of everything that is no statistic of a batch-norm layer."""
    norms = nn.modules.batchnorm._BatchNorm
    return {
        f"{path}.{name}": buffer
        for path, module in modules(method).items()
        if not isinstance(module, norms)
        for name, buffer in module.named_buffers(recurse=False)
    }


def build(name: str, process):
    """Return the method of a Case with float64 networks and float32 memories, and two batches.

    The batches (views, target, index) are global ones, as one process has them. Adam would hide
    the scale of a gradient, so every optimizer is SGD.
    """
    case = CASES[name]
    args = case.module.parse_args(case.steps())
    loader = case.module.build_loader(args, launch.Process())
    loader.set_epoch(1)
    batches = list(itertools.islice(loader, 2))
    torch.manual_seed(0)
    with float64():
        method = case.module.build_method(args, loader.dataset, len(loader), process)
    for path, buffer in memories(method).items():
        owner, _, attribute = path.rpartition(".")
        if buffer.is_floating_point():
            setattr(modules(method)[owner], attribute, buffer.float())
    if not isinstance(method.optimizer, torch.optim.SGD):
        method.optimizer = torch.optim.SGD(method.optimizer.param_groups[0]["params"], 0.1)
    return method, batches


def without_others(x):
    """What `all_gather_with_grad` returns, with a gradient for this rank's own rows alone."""
    rows = list(collectives.all_gather(x).chunk(collectives.world_size()))
    rows[collectives.rank()] = x
    return torch.cat(rows)


def scale(optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.mul_(factor)


def plant(mistake: str | None, method, process) -> contextlib.AbstractContextManager:
    """Make a mistake in a method. Returns a context in which its steps are to be taken."""
    if mistake == papers.SUMMED:
        factor = process.world_size
        method.optimizer.register_step_pre_hook(lambda optimizer, *_: scale(optimizer, factor))
    if mistake == papers.OWN_DRAWS:
        for generator in method.generators.values():
            generator.manual_seed(process.rank)
    if mistake == papers.OWN_KEYS:
        return mock.patch.object(torch, "randperm", lambda n, **_: torch.arange(n))
    if mistake == papers.OWN_NEGATIVES:
        return mock.patch.object(collectives, "all_gather_with_grad", lambda x: x)
    if mistake == papers.CUT:
        return mock.patch.object(collectives, "all_gather_with_grad", without_others)
    return contextlib.nullcontext()


def steps(name: str, process, mistake: str | None = None) -> dict:
    """Take two steps of which every rank has its share of the rows.

    Returns the values that are logged, how far the weights moved, the scores and the memories, and
    digests of what all ranks must have alike.
    """
    method, batches = build(name, process)
    before = {path: value.clone() for path, value in weights(method).items()}
    planted = plant(mistake, method, process)
    share = ROWS // process.world_size
    rank = 0 if mistake == papers.SAME_ROWS else process.rank
    mine = slice(share * rank, share * (rank + 1))
    logged, scores = [], []
    for step, (views, *rest) in enumerate(batches):
        own = [view[mine].to(process.device).double() for view in views]
        target, index = (rows[mine].to(process.device) for rows in rest)
        with planted:
            said = method.step(Batch(own, target, index, At(0, step / 20, step)))
        scores.append(collectives.all_gather(said.pop("scores")))
        for name in ("feature_spread", "view_correlation"):  # of a rank's own features
            said.pop(name, None)
        logged.append(
            [collectives.averaged(torch.as_tensor(value).double()).cpu() for value in said.values()]
        )
    after, memory = weights(method), memories(method)
    digests = [digest(value) for value in (*after.values(), *memory.values())]
    moved = torch.cat([some(after[path] - before[path]) for path in after])
    return {
        "logged": torch.tensor(logged).double(),
        "moved": moved.cpu(),
        "scores": torch.stack(scores).double().cpu().sort(1).values,  # ranks order them otherwise
        **{path: value.double().cpu() for path, value in memory.items()},
        "ranks": collectives.gather_objects(digests),
    }


def some(x):
    """Return at most 2,000 or so numbers of x, taken evenly."""
    return x.flatten()[:: max(1, x.numel() // 2000)]


def digest(x) -> str:
    return hashlib.sha1(x.cpu().contiguous().numpy().tobytes()).hexdigest()


def exchanged(process) -> dict:
    x = torch.arange(3.0)[:, None] + 10 * process.rank
    seen = []
    draws = torch.Generator().manual_seed(1)
    own, gathered = batchnorm.encode_shuffled(lambda rows: seen.append(rows) or rows, x, draws)
    assert torch.equal(own, x) and torch.equal(gathered, collectives.all_gather(x))
    z = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # torch's own function is deprecated
        (collectives.all_gather_with_grad(z) ** 2).sum().backward()
    return {
        "shuffled": collectives.all_gather(seen[0]),
        "grad": z.grad,
        "ragged": collectives.gather_ragged(torch.arange(1.0 + 2 * process.rank)),
        "any": collectives.any_rank(process.rank == 1),
    }


def job(args, process) -> None:
    """Take the steps of all Cases, in two processes with every mistake as well, and some runs."""
    with slim_networks():
        answers = {name: steps(name, process) for name in CASES}
        answers["collectives"] = exchanged(process)
        if process.world_size == 2:
            for mistake, name in MISTAKES:
                answers[name, mistake] = steps(name, process, mistake)
    for name in WHOLE if process.world_size == 2 else ():
        script, parts = CASES[name].module, f"{name}-parts"
        runs = [
            (f"{name}-whole", "--save_score"),
            (parts, "--save_score", "--stop-after", "1"),
            (parts, "--save_score", "--resume", "auto"),
        ]
        is_repeated = name == TORCHRUN
        with contextlib.nullcontext() if is_repeated else slim_networks():
            for run in runs:
                flags = CASES[name].run_in(*run, *(SMALL if is_repeated else ()))
                script.worker(script.parse_args(flags), process)
    if process.is_main:
        torch.save(answers, f"{process.world_size}.pt")


def steps_on_gpu(args, process) -> None:
    """Take the steps of all Cases on the device of this process."""
    with slim_networks():
        answers = {name: steps(name, process) for name in CASES}
    if process.is_main:
        torch.save(answers, f"{process.world_size}-gpu.pt")


@pytest.fixture(scope="module")
def both(module_folder):
    """What `job` found in one process and in two, and the folder of the runs of two."""
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    with inside(module_folder):
        for count in ("1", "2"):
            launch.start(job, parser.parse_args(["--device", "cpu", "--nproc", count]))
        return torch.load("1.pt"), torch.load("2.pt"), module_folder


def distances(a: dict, b: dict) -> dict:
    """Return the relative distance of everything that must agree."""
    a, b = ({**side} for side in (a, b))
    for side in (a, b):  # each logged value on its own, as some are percentages
        side |= {
            f"logged {i}": values
            for i, values in enumerate(side.pop("logged", torch.empty(0, 0)).T)
        }
    return {
        k: ((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-12)).item()
        for k in a.keys() - {"ranks"}
    }


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(both, name):
    one, two, _ = both
    apart = distances(one[name], two[name])
    assert max(apart.values()) < TOLERANCE, apart
    first, second = two[name]["ranks"]
    assert first == second  # weights and memories agree on all ranks


@pytest.mark.parametrize("mistake, name", MISTAKES)
def test_a_mistake_is_far_off(both, mistake, name):
    one, two, _ = both
    moved = ({"moved": side["moved"]} for side in (one[name], two[name, mistake]))
    assert distances(*moved)["moved"] > 100 * TOLERANCE


def test_collectives(both):
    one, two = (answers["collectives"] for answers in both[:2])
    assert sorted(two["shuffled"].flatten().tolist()) == [0, 1, 2, 10, 11, 12]
    assert two["shuffled"].flatten().tolist() != [0, 1, 2, 10, 11, 12]
    assert two["ragged"].tolist() == [0, 0, 1, 2] and two["any"] is True and one["any"] is False
    torch.testing.assert_close(two["grad"], 2 * one["grad"])  # each rank's copy contributes


# ------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_resume(both, name):
    whole, parts = (checkpoints(both[2] / f"{name}-{part}") for part in ("whole", "parts"))
    assert whole.keys() == parts.keys() and whole
    for file in whole:
        a, b = (checkpoint.load(side[file]) for side in (whole, parts))
        assert a.keys() == b.keys() and len(a.get("generators", (1, 2))) == 2
        for key in a.keys() - {"opt", "args"}:
            assert equal(a[key], b[key]), (file, key)
    folders = (both[2] / f"{name}-{part}" for part in ("whole", "parts"))
    here, there = ({p.name: np.load(p) for p in folder.rglob("score_*.npy")} for folder in folders)
    assert len(here) == 2 and here.keys() == there.keys()
    for file, scores in here.items():
        steps, rows, statistics = scores.shape
        assert (steps, statistics) == (STEPS, 5) and rows % BATCH == 0
        assert np.array_equal(scores, there[file])


@pytest.mark.gpu
def test_two_processes_on_one_gpu_take_the_steps_of_one(module_folder):
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    shared = ["--device", "cuda", "--dist-backend", "gloo", "--nproc"]
    with inside(module_folder):
        for count in ("1", "2"):
            launch.start(steps_on_gpu, parser.parse_args([*shared, count]))
        one, two = torch.load("1-gpu.pt"), torch.load("2-gpu.pt")
    for name in CASES:
        apart = distances(one[name], two[name])
        assert max(apart.values()) < TOLERANCE, (name, apart)


def test_torchrun_gives_what_nproc_gives(both):
    folder, case = both[2], CASES[TORCHRUN]
    script = case.module.__file__
    start = [script, *case.run_in("torchrun", "--save_score", "--stop-after", "1", *SMALL)]
    runner = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *runner, *start]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ours = checkpoints(folder / f"{TORCHRUN}-whole")
    (numbered,) = [file for file in checkpoints(folder / "torchrun") if "last" not in file]
    a, b = checkpoint.load(ours[numbered]), checkpoint.load(folder / "torchrun" / numbered)
    assert equal(a["state_dict"], b["state_dict"])
    assert json.loads((folder / "torchrun" / "config.json").read_text())["world_size"] == 2


def test_a_slurm_step_without_torchrun_is_one_line(workspace):
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    script = CASES[TORCHRUN].module.__file__
    done = run_script(script, *CASES[TORCHRUN].run_in("run"), cwd=workspace, timeout=240, **slurm)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "srun torchrun" in done.stderr
