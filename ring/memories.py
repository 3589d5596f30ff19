"""A memory bank (IR, CMC) and a queue of keys (MoCo), under their published names.

They follow src/objectives/memory.py and src/systems/systems.py of mhw32/contrastive-ring-public at
fb3e1c2, with two differences: memories are written after the backward pass from the features of all
ranks, so that every rank has the same; a queue knows the pictures of its keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import memory


class MemoryBank(nn.Module):
    """One unit row per training picture, addressed by its number: `_bank` (n, dim)."""

    def __init__(self, n: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("_bank", F.normalize(memory.random_rows(n, dim), dim=1))

    def update(self, feat: Tensor, index: Tensor) -> None:
        """Set row i to unit(m * row i + (1 - m) * feature).

        feat (B, dim), index (B,): unit features and picture numbers of all ranks.
        """
        memory.update_rows(self._bank, index, feat, self.momentum)


class KeyQueue(memory.Queue):
    """A queue (k, dim) that knows the pictures of its keys.

    `pictures` (k,): their numbers, -1 for the random rows of the start. It is not in the published
    file and is saved beside the state dict.
    """

    def __init__(self, k: int, dim: int):
        super().__init__(k, dim)
        self.register_buffer("pictures", torch.full((k,), -1), persistent=False)

    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Write the keys (B, dim) of the pictures (B,) of all ranks over the oldest rows."""
        memory.enqueue(self.pictures, self.queue_ptr.clone(), index)
        super().enqueue(keys)

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
