"""Reading a memory bank: scores against drawn rows, and which rows are drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common import launch

CHUNK_BYTES, CHUNK_ROWS = 32 << 20, 32  # of scores against the whole bank held at once: so much, but this many queries
GATHER_FROM = 256  # bank rows per drawn row above which fetching the drawn rows beats scoring the whole bank


class _BankScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank, rows):
        ctx.save_for_backward(rows)
        ctx.bank = bank  # not saved for backward: it is written in place after the step, never before its backward pass
        if len(bank) > GATHER_FROM * rows.shape[1]:
            return torch.stack([bank[r] @ q for q, r in zip(query, rows)])
        chunk = max(CHUNK_ROWS, CHUNK_BYTES // (4 * len(bank)))
        return torch.cat([(q @ bank.T).gather(1, r) for q, r in zip(query.split(chunk), rows.split(chunk))])

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return F.embedding_bag(rows, ctx.bank, per_sample_weights=grad.contiguous(), mode="sum"), None, None


def bank_scores(query: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Inner products of every query with the bank rows drawn for it: (B, J), out[b, j] = query[b] . bank[rows[b, j]].

    query (B, D) float32, bank (n, D) float32 without gradient, rows (B, J) of int64. The published code gathers
    B x J x D numbers (1 GB for B 128, J 16,385, D 128). Here the drawn scores are picked out of the product with the
    whole bank, or where few rows of a huge bank are drawn, these are fetched query by query: equal values either way.
    The bank must not be written between this call and the backward pass.
    """
    return _BankScores.apply(query, bank, rows)


def draw_rows(
    index: Tensor, n: int, k: int, generator: torch.Generator | None = None, exclude_self: bool = False
) -> Tensor:
    """Bank rows to compare with: (B, K+1), column 0 the picture's own row, then K drawn uniformly with replacement.

    index (B,) of this rank; generator on its device, in the same state on every rank (the draws are those of the global
    batch, so that one and several processes see the same negatives). As published, the own row may be drawn as a negative,
    with chance 1 - (1 - 1/n)^K per picture (12 % for n = 126,689 and K = 16,384); exclude_self draws from the others.
    """
    b, world = len(index), launch.world_size()
    drawn = torch.randint(n - exclude_self, (b * world, k + 1), generator=generator, device=index.device)
    drawn = drawn[launch.rank() * b : (launch.rank() + 1) * b]
    if exclude_self:
        drawn += drawn >= index[:, None]
    drawn[:, 0] = index
    return drawn


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, dim: int = 0) -> None:
    """Write keys (B, D) over the oldest entries of a queue and move its pointer on, in place.

    queue: (K, D), or (D, K) with dim=1. pointer: an integer tensor of one element, the entry to be
    written next. B need not divide K.
    """
    length = queue.shape[dim]
    places = (pointer + torch.arange(len(keys), device=keys.device)) % length
    queue.index_copy_(dim, places, keys if dim == 0 else keys.T)
    pointer.add_(len(keys)).remainder_(length)
