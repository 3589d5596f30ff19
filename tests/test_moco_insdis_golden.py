"""InsDis and MoCo against the published code's own numbers (tests/golden/README.md, sections 2 and 4)."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from common import memory as memory_module
from common.memory import bank_scores, draw_rows
from moco_insdis import contrast

GOLDEN = ROOT / "tests" / "golden"


def read(name):
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", ["softmax", "nce"])
@pytest.mark.parametrize("gather_from", [0, 10**9], ids=["rows fetched", "whole bank"])
def test_insdis_step_by_step(loss, gather_from, monkeypatch):
    monkeypatch.setattr(memory_module, "GATHER_FROM", gather_from)
    monkeypatch.setattr(memory_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(memory_module, "CHUNK_BYTES", 0)  # three queries at a time: the last chunk is shorter
    g = read(f"moco_insdis_insdis_{loss}")
    bank = contrast.MemoryBank(200, 16, 32, 0.07, 0.5, loss == "softmax", "oneshot")
    close(bank.params, g["params_init"])
    bank.memory.copy_(g["memory_init"])
    for step in range(len(g["x"])):
        x = g["x"][step].requires_grad_()
        value, out = bank(x, g["idx"][step])
        value.backward()
        bank.update(x, g["y"][step])
        close(out.detach(), g["out"][step])
        close(value.detach(), g["loss"][step], atol=1e-6)
        close(x.grad, g["grad_x"][step], rtol=2e-4)
        close(bank.memory, g["memory"][step])
        close(bank.params, g["params"][step], atol=0)


@pytest.mark.parametrize("case", ["softmax", "nce", "nce_smallz"])
def test_moco_step_by_step(case):
    g = read(f"moco_insdis_moco_{case}")
    queue = contrast.KeyQueue(g["n_data"], 16, 26, g["T"], case == "softmax", "oneshot")
    assert torch.equal(queue.params, g["params_init"])
    queue.memory.copy_(g["memory_init"])
    for step in range(len(g["q"])):
        q = g["q"][step].requires_grad_()
        value, out = queue(q, g["k"][step])
        value.backward()
        queue.enqueue(g["k"][step])
        close(out.detach(), g["out"][step])
        close(value.detach(), g["loss"][step], atol=1e-6)
        close(q.grad, g["grad_q"][step], rtol=2e-4)
        close(queue.memory, g["memory"][step])
        assert queue.pointer == g["index_after"][step]
        if case != "softmax":
            assert queue.params.tolist() == [g["Z_int"]]


@pytest.mark.parametrize("method", ["insdis", "moco"])
def test_buffers_are_the_published_ones(method):
    memory = (contrast.MemoryBank(1000, 128, 64, 0.07, 0.5, True, "ema") if method == "insdis"
              else contrast.KeyQueue(1000, 128, 64, 0.07, True, "ema"))  # fmt: skip
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in memory.state_dict().items()]
    assert found == json.loads((GOLDEN / f"moco_insdis_contrast_{method}_keys.json").read_text())


def test_closed_forms():
    assert math.isclose(contrast.softmax_loss(torch.zeros(3, 65)).item(), math.log(65), rel_tol=1e-6)
    # Where every estimate equals K / n the data and the noise are told apart at chance: (K + 1) log 2.
    assert math.isclose(contrast.nce_loss(torch.full((5, 9), 8 / 40), 40).item(), 9 * math.log(2), rel_tol=1e-5)


def test_scores_of_the_whole_bank_and_of_fetched_rows_agree_with_gradients(monkeypatch):
    x, bank = F.normalize(torch.randn(6, 8), dim=1), torch.randn(50, 8)
    rows = torch.randint(50, (6, 12))
    slow = x.clone().requires_grad_()
    (slow[:, None] * bank[rows]).sum(-1).square().sum().backward()
    for gather_from in (0, 10**9):
        monkeypatch.setattr(memory_module, "GATHER_FROM", gather_from)
        fast = x.clone().requires_grad_()
        bank_scores(fast, bank, rows).square().sum().backward()
        close(fast.grad, slow.grad)


def test_draws_hold_the_own_row_first_and_can_exclude_it():
    index = torch.tensor([3, 0, 9])
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(index, 10, 4000, generator)
    assert torch.equal(rows[:, 0], index) and rows.min() == 0 and rows.max() == 9
    counts = torch.stack([torch.bincount(r[1:], minlength=10) for r in rows])
    assert (counts > 300).all()  # uniform over all, the own row included
    others = draw_rows(index, 10, 4000, generator, exclude_self=True)
    counts = torch.stack([torch.bincount(r[1:], minlength=10) for r in others])
    assert (counts.gather(1, index[:, None]) == 0).all() and ((counts > 300).sum(1) == 9).all()


def test_moving_average_of_z_starts_as_one_shot_and_then_follows():
    raw = [torch.full((2, 3), 1.0), torch.full((2, 3), 5.0)]
    z = contrast.next_z(torch.tensor(-1.0), raw[0], 10, "ema", 0)
    assert z == 10
    assert math.isclose(contrast.next_z(z, raw[1], 10, "ema", 10**6).item(), 0.99 * 10 + 0.01 * 50, rel_tol=1e-6)
    assert math.isclose(
        contrast.next_z(z, raw[1], 10, "ema", 8).item(), 0.5 * 10 + 0.5 * 50, rel_tol=1e-6
    )  # young: fast
    assert contrast.next_z(z, raw[1], 10, "oneshot", 0) == 10


def test_queue_refills_whole_and_wraps():
    queue = contrast.KeyQueue(100, 4, 7, 0.1, True, "ema")
    keys = torch.arange(20.0)[:, None].expand(20, 4)
    for start in range(0, 20, 5):
        queue.enqueue(keys[start : start + 5])
    assert queue.pointer == 20 % 7
    assert sorted(queue.memory[:, 0].tolist()) == list(range(13, 20))
    other = contrast.KeyQueue(100, 4, 7, 0.1, True, "ema")
    other.load_state_dict(queue.state_dict())
    other.load_extra_state(queue.extra_state())
    assert other.pointer == queue.pointer
