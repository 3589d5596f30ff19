"""InsDis and MoCo against the published code's numbers (tests/golden/README.md, sections 2, 4)."""

import pytest
import torch
from vectors import close, keys, names, published_keys, read

from common import memory as memory_module
from common import nce
from moco_insdis import contrast


@pytest.mark.parametrize("name", names("moco_insdis_insdis_*"))
@pytest.mark.parametrize("gather_from", [0, 10**9], ids=["rows fetched", "whole bank"])
def test_insdis_step_by_step(name, gather_from, monkeypatch):
    monkeypatch.setattr(memory_module, "GATHER_FROM", gather_from)
    monkeypatch.setattr(memory_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(memory_module, "CHUNK_BYTES", 0)  # three queries at a time, fewer at last
    g = read(name)
    settings = (g["K"], g["T"], g["momentum"], bool(g["use_softmax"]), "oneshot")
    bank = contrast.MemoryBank(g["n_data"], g["x"].shape[-1], *settings)
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


@pytest.mark.parametrize("name", names("moco_insdis_moco_*"))
def test_moco_step_by_step(name):
    g = read(name)
    settings = (g["K"], g["T"], bool(g["use_softmax"]), "oneshot")
    queue = contrast.KeyQueue(g["n_data"], g["q"].shape[-1], *settings)
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
        if "Z_int" in g:
            assert queue.params.tolist() == [g["Z_int"]]


@pytest.mark.parametrize("method", ["insdis", "moco"])
def test_buffers_are_the_published_ones(method):
    if method == "insdis":
        memory = contrast.MemoryBank(1000, 128, 64, 0.07, 0.5, True, "ema")
    else:
        memory = contrast.KeyQueue(1000, 128, 64, 0.07, True, "ema")
    assert keys(memory.state_dict()) == published_keys(f"moco_insdis_contrast_{method}")


def test_moving_average_of_every_z_starts_as_one_shot_and_then_follows():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 2.0])
    z = nce.next_z(torch.tensor([-1.0, -1.0]), first, 10, "ema", 0)
    assert z.tolist() == [10, 20]
    old = nce.next_z(z, second, 10, "ema", 10**6).tolist()
    assert old == pytest.approx([0.99 * 10 + 0.01 * 50, 20], rel=1e-6)
    young = nce.next_z(z, second, 10, "ema", 8).tolist()  # follows faster
    assert young == pytest.approx([0.5 * 10 + 0.5 * 50, 20], rel=1e-6)
    assert nce.next_z(z, second, 10, "oneshot", 0).tolist() == [10, 20]


def test_queue_refills_whole_and_wraps():
    queue = contrast.KeyQueue(100, 4, 7, 0.1, True, "ema")
    keys = torch.arange(20.0)[:, None].expand(20, 4)
    for start in range(0, 20, 5):
        queue.enqueue(keys[start : start + 5])
    assert queue.pointer == 20 % 7
    assert sorted(queue.memory[:, 0].tolist()) == list(range(13, 20))
    other = contrast.KeyQueue(100, 4, 7, 0.1, True, "ema")
    other.load(queue.state_dict(), queue.extra_state(), "a file")
    assert other.pointer == queue.pointer and torch.equal(other.memory, queue.memory)
