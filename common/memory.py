"""Memory banks and queues: draw rows, score queries against them, enqueue keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, launch

CHUNK_BYTES = 32 << 20  # most bytes of scores against the whole bank at once
CHUNK_ROWS = 32  # but at least this many queries at once
GATHER_FROM = 256  # with more bank rows per drawn row, fetching beats scoring the whole bank


class _BankScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank, rows):
        ctx.save_for_backward(rows)
        ctx.bank = bank  # save_for_backward would forbid the in-place write that follows
        if len(bank) > GATHER_FROM * rows.shape[1]:
            return torch.stack([bank[r] @ q for q, r in zip(query, rows)])
        chunk = max(CHUNK_ROWS, CHUNK_BYTES // (4 * len(bank)))
        chunks = zip(query.split(chunk), rows.split(chunk))
        return torch.cat([(q @ bank.T).gather(1, r) for q, r in chunks])

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        weights = grad.contiguous()
        return F.embedding_bag(rows, ctx.bank, per_sample_weights=weights, mode="sum"), None, None


def bank_scores(query: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Score every query against its drawn bank rows: out[b, j] = query[b] . bank[rows[b, j]].

    query (B, D) float32, bank (n, D) float32 without gradient, rows (B, J) of int64 -> (B, J).
    The published code gathers B x J x D numbers (1 GB for B 128, J 16,385, D 128). Here the drawn
    scores are picked out of the product with the whole bank; if few rows of a huge bank are
    drawn, they are fetched query by query instead. The values are equal either way.
    The bank must not be written between this call and the backward pass.
    """
    return _BankScores.apply(query, bank, rows)


def draw_rows(
    index: Tensor,
    n: int,
    k: int,
    generator: torch.Generator | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """Draw bank rows (B, K+1) to compare with: each picture's own row, then K negatives.

    index (B,): the pictures of this rank, which become column 0. n: rows of the bank. Negatives are
    drawn uniformly with replacement for the global batch, so they do not depend on the number of
    processes.
    generator: on the device of `index`, in the same state on every rank. As published, a picture's
    own row may be drawn as a negative, with probability 1 - (1 - 1/n)^K per picture (12 % for n =
    126,689 and K = 16,384); exclude_self draws only other rows.
    """
    shape = (len(index) * launch.world_size(), k + 1)
    rows = n - 1 if exclude_self else n
    drawn = torch.randint(rows, shape, generator=generator, device=index.device)
    drawn = launch.own_rows(drawn)
    if exclude_self:
        drawn += drawn >= index[:, None]
    drawn[:, 0] = index
    return drawn


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, dim: int = 0) -> None:
    """Write keys (B, D) over the oldest entries of a queue and advance its pointer, in place.

    queue: (K, D), or (D, K) with dim=1. pointer: an integer tensor with one element, the entry to
    write next; it wraps at K. B is at most K and need not divide it.
    """
    length = queue.shape[dim]
    places = (pointer + torch.arange(len(keys), device=keys.device)) % length
    queue.index_copy_(dim, places, keys if dim == 0 else keys.T)
    pointer.add_(len(keys)).remainder_(length)


def random_rows(n: int, dim: int) -> Tensor:
    """Draw the rows (n, dim) of an untrained memory, uniform in +-sqrt(3 / dim): norms near one."""
    bound = 1 / math.sqrt(dim / 3)
    return torch.empty(n, dim).uniform_(-bound, bound)


def check_state(state: dict, own: dict, path: str) -> None:
    """Raise UserError unless the memory of `path` has the buffers `own`, with finite values."""
    if state.keys() != own.keys():
        held = ", ".join(state)
        raise UserError(f"{path} is of another method (its memory holds {held})")
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path} is damaged: {name} of its memory is not finite")
