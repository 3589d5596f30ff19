"""Define the contract between scripts and the loop: a method, and the batch that a step gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class At:
    """The time of a step: complete epochs, the finished part of this epoch, steps of the run."""

    epoch: int
    part: float
    global_step: int


class Batch(NamedTuple):
    """The input of a step. views: a list of images (B, 3, S, S) on the device, or features (B, D).

    target (B,): class numbers, -1 for none. index (B,): rows of the pictures in their set.
    """

    views: list[Tensor] | Tensor
    target: Tensor
    index: Tensor
    at: At


class Method(Protocol):
    """The members of a script's method that the loop uses."""

    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]  # saved, so that a resume continues their draws
    network: nn.Module  # the network of k-NN, in training mode otherwise
    precision: Any  # common.precision.Precision; a linear evaluation has none
    equal_loss: float  # of equal scores, above which a run learns nothing; a pre-training's alone
    remedies: str  # what to try where it learns nothing; optional

    def step(self, batch: Batch) -> dict:
        """Take one optimizer step and return the values to log.

        0-dim tensors are means over the batch, and plain numbers are shown as they are. `scores`
        (B, 5), from common.metrics.score_statistics, are kept for --save_score. A pre-training
        returns `loss`, `feature_spread` (common.metrics.spread) and `negative_similarity`.
        """

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images (N, 3, S, S) for k-NN."""

    def pictures(self, views: list[Tensor]) -> dict[str, Tensor]:
        """Return {label: images (N, C, H, W) in [0, 1]} for --show-views."""

    def state_dict(self) -> dict:
        """Return the authors' keys, and what an exact resume needs besides."""

    def load_state_dict(self, saved) -> None:
        """Load a state, from our files or the authors'. Raises UserError if it does not fit."""
