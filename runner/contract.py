"""What a script's method is, and what a step gets: the contract between scripts and the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class At:
    """What time it is: complete epochs (from 0), the part of this one that is done, all steps."""

    epoch: int
    part: float
    global_step: int


class Batch(NamedTuple):
    """What a step gets. views: a list of images (B, 3, S, S) on the device, or features (B, D).

    target (B,): class numbers, -1 for none. index (B,): row numbers of the pictures in their set.
    """

    views: list[Tensor] | Tensor
    target: Tensor
    index: Tensor
    at: At


class Method(Protocol):
    """What a script's method says of itself. Other than `step` and the two states, all is read."""

    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]  # whose draws must go on exactly after a resume
    network: nn.Module  # what k-NN evaluates, in training mode between evaluations
    precision: Any  # common.precision.Precision; a linear evaluation has none

    def step(self, batch: Batch) -> dict:
        """Take one optimizer step and return the values to log.

        0-dim tensors are means over the batch, plain numbers are shown as they are, and `scores`
        (B, 5), of common.metrics.score_statistics, are kept for --save_score.
        """

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (N, D) that k-NN compares, of images (N, 3, S, S)."""

    def pictures(self, views: list[Tensor]) -> dict[str, Tensor]:
        """Return {label: images (N, C, H, W) in [0, 1]} of a batch, for --show-views."""

    def state_dict(self) -> dict:
        """Return the authors' keys and values, and what they lack for an exact resume."""

    def load_state_dict(self, saved) -> None:
        """Put that back, from our files or the authors'. Raises UserError if it does not fit."""
