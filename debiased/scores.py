"""The scores that --save_score keeps of a step: statistics for both views of every picture."""

import torch
from torch import Tensor

from common import collectives, metrics


@torch.no_grad()
def pair_statistics(
    z1: Tensor, z2: Tensor, temperature: float, labels: Tensor | None = None
) -> Tensor:
    """Return metrics.score_statistics of this rank's anchors; rows 2b and 2b + 1 are of picture b.

    z1, z2 (B, D): unit rows of all ranks. Negatives are the 2B - 2 vectors of other pictures, or
    with labels (B,) those of other classes.
    """
    z = torch.stack((z1, z2), 1).flatten(0, 1).float()
    group = torch.arange(len(z1), device=z1.device) if labels is None else labels
    group = group.repeat_interleave(2)
    cosines = (z1.float() * z2.float()).sum(1).repeat_interleave(2)
    positive = collectives.own_rows(cosines) / temperature
    scores = collectives.own_rows(z) @ z.T / temperature
    mask = collectives.own_rows(group)[:, None] != group
    return metrics.score_statistics(positive, scores, temperature, mask)
