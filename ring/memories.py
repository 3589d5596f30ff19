"""What is compared with: a memory bank (IR, CMC) and a queue of keys (MoCo), with the published names.

Follows src/objectives/memory.py and src/systems/systems.py of mhw32/contrastive-ring-public at fb3e1c2. Differs: they are
written after the backward pass, from the features of all ranks, so that every rank has the same; a queue knows whose keys
it holds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """One unit row per training picture, addressed by its number: `_bank` (n, dim)."""

    def __init__(self, n: int, dim: int, momentum: float):
        super().__init__()
        self.momentum, bound = momentum, 1 / math.sqrt(dim / 3)
        self.register_buffer("_bank", F.normalize(torch.empty(n, dim).uniform_(-bound, bound), dim=1))

    @torch.no_grad()
    def update(self, feat: Tensor, index: Tensor) -> None:
        """Row i <- unit(m * row i + (1 - m) * feature), for the features (B, dim) and picture numbers (B,) of all ranks."""
        rows = self.momentum * self._bank[index] + (1 - self.momentum) * feat
        self._bank.index_copy_(0, index, F.normalize(rows, dim=1))


class KeyQueue(nn.Module):
    """The last k keys, first in, first out: `queue` (k, dim), `queue_ptr` the next row to be written.

    `pictures` (k,): whose keys these are, -1 where nobody's. It is not in the published file, but is saved beside it.
    """

    def __init__(self, k: int, dim: int):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(k, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("pictures", torch.full((k,), -1), persistent=False)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Write the keys (B, dim) of the pictures (B,) of all ranks over the oldest rows. B divides k."""
        rows = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, keys)
        self.pictures.index_copy_(0, rows, index)
        self.queue_ptr.add_(len(keys)).remainder_(len(self.queue))

    def labels(self, of_pictures: Tensor) -> Tensor:
        """Classes (k,) of the pictures whose keys these are, -1 where unknown. of_pictures (n,): of all pictures."""
        return torch.where(self.pictures >= 0, of_pictures[self.pictures], -1)
