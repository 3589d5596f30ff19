"""Memory banks and queues: draw rows, score queries against them, write. Needs torch alone.

Samples and memories are rows: queries and keys (B, D) of unit length, memories (K, D), float32. A
memory carries no gradient and is written after the backward pass. In a job of several processes
the draws and writes are those of the global batch, so that every process holds the same memory.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 32 << 20  # most bytes of scores against the whole bank at once
CUDA_BYTES = 1 << 30  # the same on CUDA, where a launch costs more than memory
CHUNK_ROWS = 32  # but at least this many queries at once
GATHER_FROM = 256  # with more bank rows per drawn row, fetching beats scoring, but not on CUDA
UNIT = 0.01  # how far the length of a unit row may be from 1; bfloat16 needs 0.004


class _BankScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank, rows):
        ctx.save_for_backward(rows)
        ctx.bank = bank  # save_for_backward would forbid the in-place write that follows
        if bank.device.type != "cuda" and len(bank) > GATHER_FROM * rows.shape[1]:
            return torch.stack([bank[r] @ q for q, r in zip(query, rows)])
        count = _queries_at_once(bank)
        chunks = zip(query.split(count), rows.split(count))
        return torch.cat([(q @ bank.T).gather(1, r) for q, r in chunks])

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        weights = grad.contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.bank.device.type == "cuda":
                sums = dense_sums(rows, ctx.bank, weights)
            else:
                sums = F.embedding_bag(rows, ctx.bank, per_sample_weights=weights, mode="sum")
        return sums, None, None


def _queries_at_once(bank: Tensor) -> int:
    budget = CUDA_BYTES if bank.device.type == "cuda" else CHUNK_BYTES
    return max(CHUNK_ROWS, budget // (4 * len(bank)))


def dense_sums(rows: Tensor, bank: Tensor, weights: Tensor) -> Tensor:
    """Return the sums (B, D) of bank rows (B, J), each times its weight (B, J).

    A product with the whole bank replaces `embedding_bag`, whose CUDA kernel walks the J rows of a
    sum one after the other.
    """
    count = _queries_at_once(bank)
    sums = []
    for r, w in zip(rows.split(count), weights.split(count)):
        sums.append(w.new_zeros(len(r), len(bank)).scatter_add_(1, r, w) @ bank)
    return torch.cat(sums)


def bank_scores(query: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Score every query against its drawn bank rows: out[b, j] = query[b] . bank[rows[b, j]].

    query (B, D), bank (n, D) without gradient, rows (B, J) of int64 -> (B, J), float32 also under
    autocast. The published code gathers B x J x D numbers (1 GB for B 128, J 16,385, D 128). Here
    the drawn scores are picked out of the product with the whole bank; if few rows of a huge bank
    are drawn, they are fetched query by query instead, but not on CUDA. The values are equal.
    The bank must not be written between this call and the backward pass. Raises ValueError where
    shapes do not fit.

    >>> query, bank = torch.eye(3), torch.eye(3)
    >>> bank_scores(query, bank, torch.tensor([[0, 1], [0, 1], [2, 2]])).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """
    _check_memory("bank", bank, query=query)
    if rows.shape[:-1] != query.shape[:-1]:
        raise ValueError(f"rows are {tuple(rows.shape)}: expected (B, J) with B = {len(query)}")
    with torch.autocast(query.device.type, enabled=False):
        return _BankScores.apply(query.float(), bank.float(), rows)


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
    world = dist.get_world_size() if dist.is_initialized() else 1
    shape = (len(index) * world, k + 1)
    rows = n - 1 if exclude_self else n
    drawn = torch.randint(rows, shape, generator=generator, device=index.device)
    if world > 1:
        drawn = drawn.chunk(world)[dist.get_rank()]
    if exclude_self:
        drawn += drawn >= index[:, None]
    drawn[:, 0] = index
    return drawn


def queue_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return s / T (B, 1+K): each query with its key in column 0, then with the K rows of a queue.

    query, key (B, D): unit rows; equal rows are positive pairs. queue (K, D). T > 0. The result is
    float32 also under autocast. Cross-entropy with label 0 is the InfoNCE loss of MoCo, Eq. (1) of
    He et al., arXiv:1911.05722. Raises ValueError where shapes do not fit.

    >>> query, queue = torch.eye(2), torch.eye(2)
    >>> queue_logits(query, query, queue, temperature=0.5).tolist()
    [[2.0, 2.0, 0.0], [2.0, 0.0, 2.0]]
    """
    _check_memory("queue", queue, query=query, key=key)
    if query.shape != key.shape:
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}: expected one shape"
        )
    _check_temperature(temperature)
    _check_unit(query=query, key=key)
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        positive = (query * key).sum(1, keepdim=True)
        return torch.cat([positive, query @ queue.float().T], 1).div_(temperature)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write keys (B, D) over the oldest rows of a queue (K, D) and advance its pointer, in place.

    The queue may be a transposed view, as MoCo's published (D, K) is. pointer: an integer tensor
    with one element, the row to write next; it wraps at K. B is at most K and need not divide it.
    Raises ValueError, before anything is written, where shapes do not fit.
    """
    if keys.shape[1:] != queue.shape[1:] or len(keys) > len(queue):
        raise ValueError(
            f"keys are {tuple(keys.shape)} and the queue {tuple(queue.shape)}: expected rows of "
            "one length, and at most as many keys as the queue holds"
        )
    places = (pointer + torch.arange(len(keys), device=keys.device)) % len(queue)
    queue.index_copy_(0, places, keys.to(queue.dtype))
    pointer.add_(len(keys)).remainder_(len(queue))


@torch.no_grad()
def update_rows(bank: Tensor, index: Tensor, feat: Tensor, momentum: float) -> None:
    """Set row i of a bank (n, D) to unit(m * row i + (1 - m) * its feature), in place.

    feat (B, D), index (B,): features and row numbers of all ranks. Where a number stands twice its
    last feature is taken, on every device. Raises ValueError, before anything is written, where
    shapes do not fit.
    """
    if feat.shape[1:] != bank.shape[1:] or index.shape != feat.shape[:1]:
        raise ValueError(
            f"feat is {tuple(feat.shape)} and index {tuple(index.shape)}: expected (B, "
            f"{bank.shape[1]}) and (B,) for a bank of {tuple(bank.shape)}"
        )
    if bank.device.type != "cpu":  # other devices write equal rows in no certain order
        feat = feat[last_of_equals(index)]
    mixed = momentum * bank[index].float() + (1 - momentum) * feat.float()
    bank.index_copy_(0, index, F.normalize(mixed, dim=1).to(bank.dtype))


def last_of_equals(index: Tensor) -> Tensor:
    """Return for every element of index (B,) the last place (B,) where its value stands."""
    places = torch.arange(len(index), device=index.device)
    return torch.where(index[:, None] == index, places, -1).amax(1)


def random_rows(n: int, dim: int) -> Tensor:
    """Draw the rows (n, dim) of an untrained memory, uniform in +-sqrt(3 / dim): norms near one."""
    bound = 1 / math.sqrt(dim / 3)
    return torch.empty(n, dim).uniform_(-bound, bound)


class Queue(nn.Module):
    """The last k keys, first in, first out: MoCo's memory, He et al., arXiv:1911.05722.

    Buffers, under MoCo's names: `queue` (k, dim), which starts with random unit rows, and
    `queue_ptr` (1,), the row to write next.

    >>> queue = Queue(8, dim=4)
    >>> queue.enqueue(F.normalize(torch.randn(3, 4), dim=1))
    >>> int(queue.queue_ptr)
    3
    """

    def __init__(self, k: int, dim: int):
        super().__init__()
        _check_sizes(k=k, dim=dim)
        self.register_buffer("queue", F.normalize(torch.randn(k, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def logits(self, query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
        """Return `queue_logits` (B, 1+k) of unit rows (B, dim), the positive in column 0."""
        return queue_logits(query, key, self.queue, temperature)

    def enqueue(self, keys: Tensor) -> None:
        """Write the keys (B, dim) of all ranks over the oldest rows, after the backward pass."""
        enqueue(self.queue, self.queue_ptr, keys)


class MemoryBank(nn.Module):
    """One row per training picture, at its number: Wu et al., arXiv:1805.01978.

    n: number of pictures. dim: feature size. momentum: m of a row. Buffer: `memory` (n, dim), which
    starts with random unit rows.

    >>> bank, index = MemoryBank(100, dim=4), torch.tensor([7, 9])
    >>> bank.logits(F.normalize(torch.randn(2, 4), dim=1), draw_rows(index, 100, k=16)).shape
    torch.Size([2, 17])
    """

    def __init__(self, n: int, dim: int, momentum: float = 0.5):
        super().__init__()
        _check_sizes(n=n, dim=dim)
        self.momentum = momentum
        self.register_buffer("memory", F.normalize(random_rows(n, dim), dim=1))

    def logits(self, feat: Tensor, rows: Tensor, temperature: float = 0.07) -> Tensor:
        """Return s / T (B, K+1) of unit rows (B, dim) with rows (B, K+1) of `draw_rows`."""
        _check_temperature(temperature)
        _check_unit(feat=feat)
        return bank_scores(feat, self.memory, rows).div_(temperature)

    def update(self, feat: Tensor, index: Tensor) -> None:
        """Apply `update_rows` with features (B, dim) of all ranks, after the backward pass."""
        update_rows(self.memory, index, feat.detach(), self.momentum)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size} must be at least 1")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")


def _check_memory(name: str, memory: Tensor, **samples: Tensor) -> None:
    """Raise ValueError unless a memory (K, D), K > 0, and samples (B, D) fit each other."""
    if memory.dim() != 2 or not len(memory):
        raise ValueError(f"{name} is {tuple(memory.shape)}: expected (K, D) with at least one row")
    for key, rows in samples.items():
        if rows.dim() != 2 or rows.shape[1] != memory.shape[1]:
            raise ValueError(
                f"{key} is {tuple(rows.shape)}: expected (B, {memory.shape[1]}), since {name} is "
                f"{tuple(memory.shape)}"
            )


def _check_unit(**samples: Tensor) -> None:
    """Raise ValueError where rows are neither of unit length nor zeros, as F.normalize returns.

    Only in debug, which is without python -O, and on a CPU: other devices would be waited for.
    """
    for name, rows in samples.items():
        if __debug__ and rows.device.type == "cpu" and not torch.compiler.is_compiling():
            length = rows.detach().float().norm(dim=1)
            wrong = ((length - 1).abs() > UNIT) & (length > 0)
            if wrong.any():
                raise ValueError(
                    f"{name} has a row of length {length[wrong][0]:.4g}, expected unit rows: apply "
                    "torch.nn.functional.normalize(rows, dim=1)"
                )
