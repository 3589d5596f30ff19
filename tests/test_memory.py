"""Test the parts that memories share: scores against a bank, drawn rows, the queue."""

import types

import pytest
import torch
import torch.nn.functional as F
from test_debiased_golden import Operations
from torch._subclasses.fake_tensor import FakeTensorMode
from vectors import close

from common import memory as memory_module
from common.memory import bank_scores, draw_rows, enqueue, update_rows
from feature_transform import transform
from feature_transform.memory import KeyQueue, MemoryBank


@pytest.mark.parametrize("gather_from", [0, 10**9], ids=["rows fetched", "whole bank"])
def test_scores_against_a_bank_agree_with_gradients(gather_from, monkeypatch):
    monkeypatch.setattr(memory_module, "GATHER_FROM", gather_from)
    generator = torch.Generator().manual_seed(0)
    x, bank = (
        F.normalize(torch.randn(6, 8, generator=generator), dim=1),
        torch.randn(50, 8, generator=generator),
    )
    rows = torch.randint(50, (6, 12), generator=generator)
    slow, fast = (x.clone().requires_grad_() for _ in range(2))
    (slow[:, None] * bank[rows]).sum(-1).square().sum().backward()
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


@pytest.mark.parametrize("batch", [1, 4, 5, 12])
def test_a_queue_holds_the_newest_keys_and_its_pointer_wraps(batch):
    generator = torch.Generator().manual_seed(0)
    queue = torch.zeros(12, 3)
    pointer = torch.zeros(1, dtype=torch.long)
    written = []
    for step in range(1, 16):
        keys = torch.randn(batch, 3, generator=generator)
        written += keys
        enqueue(queue, pointer, keys)
        assert pointer == step * batch % 12 and pointer.dtype == torch.long
    entries = {tuple(row) for row in queue.tolist()}
    assert entries == {tuple(key.tolist()) for key in written[-12:]}
    assert torch.equal(queue[pointer - 1], written[-1][None])


def test_a_queue_of_columns_is_the_transposed_queue_of_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 3, generator=generator)
    columns = rows.T.clone()
    pointers = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(7):
        keys = torch.randn(4, 3, generator=generator)
        enqueue(rows, pointers[0], keys)
        enqueue(columns.T, pointers[1], keys.requires_grad_())
        assert torch.equal(rows, columns.T) and pointers[0] == pointers[1]
        assert not columns.requires_grad


def test_cuda_gets_products_with_the_whole_bank_and_few_launches():
    """embedding_bag walks a sum's rows one after the other there, and fetching is a loop."""
    with FakeTensorMode():
        query, bank = (torch.zeros(n, 128, device="cuda:0") for n in (256, 50_000))
        rows = torch.zeros(
            256, 100, dtype=torch.long, device="cuda:0"
        )  # few of many: a CPU fetches
        with Operations() as seen:
            scores = bank_scores(query, bank, rows)
            node = types.SimpleNamespace(saved_tensors=(rows,), bank=bank)
            memory_module._BankScores.backward(node, scores)
    names = [name for name, _ in seen.found if not name.startswith("prim")]
    assert names.count("aten.mm.default") == 2 and len(names) < 16
    assert not any("embedding" in name or "stack" in name for name in names)


def test_the_sums_of_cuda_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(memory_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(memory_module, "CHUNK_BYTES", 0)
    generator = torch.Generator().manual_seed(0)
    bank, weights = torch.randn(50, 8, generator=generator), torch.randn(7, 12, generator=generator)
    rows = torch.randint(50, (7, 12), generator=generator)  # some stand twice
    bags = F.embedding_bag(rows, bank, per_sample_weights=weights, mode="sum")
    close(memory_module.dense_sums(rows, bank, weights), bags)


def test_a_picture_that_stands_twice_in_a_batch_leaves_its_last_feature():
    """On CUDA rows are written in no certain order, so that equal numbers need equal rows."""
    index = torch.tensor([3, 0, 3, 5, 0])
    last = memory_module.last_of_equals(index)
    assert last.tolist() == [2, 4, 2, 3, 4]
    generator = torch.Generator().manual_seed(0)
    feat = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    bank, same = (torch.ones(6, 4) for _ in range(2))
    update_rows(bank, index, feat, 0.5)
    update_rows(same, index, feat[last], 0.5)
    assert torch.equal(bank, same)


HALF = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("of_memory", [torch.float32, torch.bfloat16], ids=str)
def test_features_and_memories_of_any_precision(dtype, of_memory):
    torch.manual_seed(0)
    queue, bank = memory_module.Queue(12, 8).to(of_memory), memory_module.MemoryBank(20, 8)
    bank = bank.to(of_memory)
    query, key = (F.normalize(torch.randn(4, 8), dim=1).to(dtype).requires_grad_() for _ in "qk")
    rows = draw_rows(torch.arange(4), 20, 5)
    positive = (query.float() * key.float()).sum(1)[:, None]
    exact = torch.cat([positive, query.float() @ queue.queue.float().T], 1)
    for logits in (queue.logits(query, key, 1.0), bank.logits(query, rows, 1.0)):
        assert logits.dtype == torch.float32
        logits.sum().backward()
    close(queue.logits(query, key, 1.0), exact)
    queue.enqueue(key.detach())
    bank.update(query, torch.arange(4))
    assert torch.equal(queue.queue[:4], key.detach().to(of_memory))
    close(bank.memory[:4].float().norm(dim=1), torch.ones(4), atol=0.01)


@pytest.mark.parametrize("kind", ["queue", "bank"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_transformed_memories_take_features_of_any_precision(kind, dtype):
    torch.manual_seed(0)
    rule = transform.Rule("scalar", "scalar")
    query, key = (F.normalize(torch.randn(4, 8), dim=1).to(dtype).requires_grad_() for _ in "qk")
    if kind == "queue":
        memory = KeyQueue(1, 12, 8, 1.0)
        compared = key.detach()
    else:
        memory = MemoryBank(1, 12, 8, 1.0, 5, 0.5)
        compared = draw_rows(torch.arange(4), 12, 5)
    draws = memory.draw(rule, 4, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        ((logits,),) = memory([query], compared, rule, draws)
    logits.sum().backward()
    exact = compared.float() if kind == "queue" else compared
    ((expected,),) = memory([query.detach().float()], exact, rule, draws)
    assert logits.dtype == torch.float32
    close(logits, expected, atol=1e-6)
