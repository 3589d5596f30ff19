"""Test the parts that memories share: scores against a bank, drawn rows, the queue."""

import pytest
import torch
import torch.nn.functional as F
from vectors import close

from common import memory as memory_module
from common.memory import bank_scores, draw_rows, enqueue


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
