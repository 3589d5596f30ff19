"""Conditional negatives in two processes are those in one: as tests/test_two_processes.py has it for the other papers."""

import contextlib
from unittest import mock

import pytest
import torch
from conftest import equal, slim_networks
from test_two_processes import DEMO, TOLERANCE, digest, distances, float64, one_and_two, scale, some

from common import launch, sets
from runner import checkpoint
from ring import train_ring

STEP = "-b 8 --k 16 --t .5 --lr .01 --bn-splits 2 --thres-outer .6 --thres-inner .25".split()
CASES = {  # name: flags
    "ir ring": ["--anneal", "loss"],
    "ir all": ["--negatives", "all"],
    "cmc ring": ["--method", "cmc", "--neighbor-views"],
    "moco ring": ["--method", "moco"],
    "moco ball": ["--method", "moco", "--negatives", "ball", "--no-shuffle-bn"],
}
MISTAKES = {  # planted in two processes: in which cases it is one
    "gradients are summed": ["ir ring", "moco ring"],
    "the rows of rank 1 are those of rank 0": ["ir ring", "cmc ring"],
    "every rank draws for itself": ["ir ring", "ir all"],
    "a rank keeps its own keys": ["moco ring"],
}
LONG = "-b 32 --epochs 2 --print-freq 2 --k 64 --thres-outer .5 --method moco --anneal loss --nn-every 1 --exp-base".split()


def steps(case: str, process, mistake: str | None = None) -> dict:
    """Two steps on fixed views of which every rank has its share."""
    args = train_ring.parse_args([*DEMO, *STEP, *CASES[case]])
    pictures = sets.ArraySet(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), [i % 4 for i in range(40)], list("abcd"))
    torch.manual_seed(0)
    with float64():
        make = {"ir": train_ring.IR, "cmc": train_ring.CMC, "moco": train_ring.MoCo}[args.method]
        method = make(args, pictures, 5, process)
    for module in method.system.modules():
        for name in ("_bank", "queue"):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name).float())
    before = {k: v.detach().clone() for k, v in method.system.named_parameters()}
    if mistake == "gradients are summed":
        method.optimizer.register_step_pre_hook(lambda optimizer, *_: scale(optimizer, process.world_size))
    if mistake == "every rank draws for itself":
        method.generators["draws"].manual_seed(process.rank)
    rank, losses = 0 if mistake == "the rows of rank 1 are those of rank 0" else process.rank, []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2 if args.method == "moco" else 1, 8, 3, 32, 32, generator=generator).double()
        index = torch.randperm(40, generator=generator)[:8]
        mine = slice(4 * rank, 4 * rank + 8 // process.world_size)
        unshuffled = mock.patch.object(torch, "randperm", lambda n, **_: torch.arange(n))
        with unshuffled if mistake == "a rank keeps its own keys" else contextlib.nullcontext():
            said = method.step(list(images[:, mine]), index[mine], step)
        losses.append(launch.mean_ranks(said["loss"]))
    after = {k: v.detach() for k, v in method.system.named_parameters()}
    memory = dict(method.system.named_buffers())
    memory = {k: v for k, v in memory.items() if "bn" not in k and ".features." not in k and "downsample" not in k}
    return {
        "losses": torch.stack(losses).double(),
        "threshold": torch.tensor(method.policy(1)).double(),
        "moved": torch.cat([some(after[k] - before[k]) for k in after]),
        **{k: v.double() for k, v in memory.items()},
        "ranks": launch.gather_objects([digest(v) for v in (*after.values(), *memory.values())]),
    }


def job(args, process) -> None:
    with slim_networks():
        found = {case: steps(case, process) for case in CASES}
        if process.world_size == 2:
            for mistake, cases in MISTAKES.items():
                found |= {(case, mistake): steps(case, process, mistake) for case in cases}
            for where, *more in (("whole",), ("parts", "--epochs", "1"), ("parts", "--resume", "auto")):
                train_ring.worker(train_ring.parse_args([*DEMO, *LONG, where, *more]), process)
    if process.is_main:
        torch.save(found, f"{process.world_size}.pt")


@pytest.fixture(scope="module")
def both(module_folder):
    return one_and_two(job, module_folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(both, case):
    one, two, _ = both
    found = distances(one[case], two[case])
    assert max(found.values()) < TOLERANCE, found
    assert len(found) >= 4 and two[case]["ranks"][0] == two[case]["ranks"][1]


@pytest.mark.parametrize("mistake, case", [(m, c) for m, cases in MISTAKES.items() for c in cases])
def test_a_mistake_is_far_off(both, mistake, case):
    one, two, _ = both
    assert distances(one[case], two[case, mistake])["moved"] > 100 * TOLERANCE


def test_a_run_of_two_processes_resumes(both):
    whole, parts = (
        checkpoint.load(both[2] / f"{where}/pretrain_moco_ring_loss_seed_0_folder/last.ckpt")
        for where in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and len(whole["generators"]) == 2 and parts["epoch"] == 2
    for key in whole.keys() - {"opt", "scaler"}:
        assert equal(whole[key], parts[key]), key
