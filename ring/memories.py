"""A memory bank (IR, CMC) and a queue of keys (MoCo), under their published names.

They follow src/objectives/memory.py and src/systems/systems.py of mhw32/contrastive-ring-public at
fb3e1c2, with two differences: memories are written after the backward pass from the features of all
ranks, so that every rank has the same; a queue knows the pictures of its keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import memory


class MemoryBank(nn.Module):
    """One unit row per training picture, addressed by its number: `_bank` (n, dim)."""

    def __init__(self, n: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        bound = 1 / math.sqrt(dim / 3)
        rows = torch.empty(n, dim).uniform_(-bound, bound)
        self.register_buffer("_bank", F.normalize(rows, dim=1))

    @torch.no_grad()
    def update(self, feat: Tensor, index: Tensor) -> None:
        """Set row i to unit(m * row i + (1 - m) * feature).

        feat (B, dim), index (B,): unit features and picture numbers of all ranks.
        """
        rows = self.momentum * self._bank[index] + (1 - self.momentum) * feat
        self._bank.index_copy_(0, index, F.normalize(rows, dim=1))


class KeyQueue(nn.Module):
    """The last k keys, first in, first out.

    Buffers: `queue` (k, dim), and `queue_ptr`, the next row to write. `pictures` (k,): the numbers
    of the keys' pictures, -1 for the random rows of the start. It is not in the published file and
    is saved beside the state dict.
    """

    def __init__(self, k: int, dim: int):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(k, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("pictures", torch.full((k,), -1), persistent=False)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Write the keys (B, dim) of the pictures (B,) of all ranks over the oldest rows."""
        memory.enqueue(self.pictures, self.queue_ptr.clone(), index)
        memory.enqueue(self.queue, self.queue_ptr, keys)

    def labels(self, of_pictures: Tensor) -> Tensor:
        """Return the classes (k,) of the keys, -1 where unknown.

        of_pictures (n,): classes of all training pictures.
        """
        return torch.where(self.pictures >= 0, of_pictures[self.pictures], -1)

    def load_pictures(self, pictures: Tensor, n: int) -> None:
        """Load the numbers (k,) of the keys' pictures, or -1 for all. n: number of pictures.

        Raises ValueError for other numbers.
        """
        if pictures.is_floating_point() or not ((pictures >= -1) & (pictures < n)).all():
            raise ValueError(f"the pictures of a queue must be numbers from -1 to {n - 1}")
        self.pictures.copy_(pictures)
