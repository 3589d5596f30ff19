"""Measure a model: accuracy, score statistics, features of a data set, k-NN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(logits: Tensor, target: Tensor, topk: tuple[int, ...] = (1, 5)) -> list[Tensor]:
    """Return the percentage of rows whose target is among the k highest logits, for each k.

    logits (N, C), target (N,) class numbers -> one 0-dim tensor on their device for each k. A k
    above C counts as C, so top-5 of four classes is 100. N = 0 gives 0.
    This does not wait for the device.
    """
    n, classes = logits.shape
    best = logits.topk(min(max(topk), classes), dim=1).indices  # (N, max k)
    hits = best == target[:, None]
    return [hits[:, :k].sum() * (100.0 / max(n, 1)) for k in topk]


def named(top1, top5, classes: int) -> dict:
    """Return {"acc1": top1, "acc5": top5}; without top-5 up to five classes, where it is 100."""
    return {"acc1": top1, "acc5": top5} if classes > 5 else {"acc1": top1}


def in_words(accuracies: dict, digits: int = 2) -> str:
    """Return "Acc@1 51.20 Acc@5 93.00" for the result of `named`."""
    words = [f"{name.replace('acc', 'Acc@')} {v:.{digits}f}" for name, v in accuracies.items()]
    return " ".join(words)


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Return how far the directions of features (B, D) spread: 1 evenly, 0 where all are equal.

    It is the mean over dimensions of the standard deviation of the features at unit length, times
    sqrt(D); 0-dim, on the device.
    """
    units = F.normalize(features.detach(), dim=1)
    return units.std(0, correction=0).mean() * units.shape[1] ** 0.5


@torch.no_grad()
def score_statistics(
    positive: Tensor, negatives: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Return five statistics of every query's scores: (B, 5), float32, on their device.

    positive (B,), negatives (B, K): logits, that is similarities divided by `temperature`.
    mask (B, K): True where a column is a negative of that row; None: everywhere.
    Columns: mean and unbiased variance of the negative similarities; the positive similarity; mean
    of exp(negative logit); exp(positive logit). Zhu et al., arXiv:2108.02982, save the same five
    (the first three in float16).
    The means of a query without negatives are NaN, and so is the variance of fewer than two.
    """
    positive = positive.detach().float()
    negatives = negatives.detach().float()
    count = negatives.new_full((), negatives.shape[1]) if mask is None else mask.sum(1)

    def masked(x: Tensor) -> Tensor:
        return x if mask is None else x.where(mask, 0)

    mean = masked(negatives).sum(1) / count
    exponential = masked(negatives.exp()).sum(1) / count
    # torch.var takes five times as long.
    distance = torch.linalg.vector_norm(masked(negatives - mean[:, None]), dim=1)
    variance = distance.square() / (count - 1).clamp(min=0)
    similarities = (mean * temperature, variance * temperature**2, positive * temperature)
    return torch.stack((*similarities, exponential, positive.exp()), 1)


@torch.no_grad()
def knn(
    bank_features: Tensor,
    bank_targets: Tensor,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
    chunk_elements: int = 2**26,
) -> tuple[Tensor, Tensor]:
    """Classify by the k nearest neighbours; return top-1 and top-5 accuracy in percent.

    bank_features (M, D) with bank_targets (M,) vote; features (N, D) with targets (N,) are
    classified. Each of the k nearest bank rows adds exp(cosine / temperature) to the score of its
    class (Wu et al., arXiv:1805.01978, section 3.4). Equal scores rank the lower class number
    first, and a class without a vote is never right. Rows labelled -1 (unlabelled pictures) are
    left out on both sides. A k above the number of labelled bank rows means all of them.

    Works on the device of the bank, one chunk of queries at a time, with about 4 * chunk_elements
    bytes of cosines (256 MiB). Returns 0-dim tensors. Raises ValueError if no labelled row is left.
    """
    device = bank_features.device
    bank, bank_targets = _labelled(bank_features, bank_targets, "bank")
    features, targets = _labelled(features, targets, "query")
    bank = bank.float()
    k = neighbours_used(k, bank_targets)
    bank_scale = 1 / bank.norm(dim=1).clamp_min(1e-12)  # (M,), instead of a normalised copy
    rows = max(1, chunk_elements // len(bank))
    hits = torch.zeros(2, device=device)
    for queries, labels in zip(features.split(rows), targets.split(rows)):
        labels = labels.to(device)
        queries = F.normalize(queries.to(device).float(), dim=1)
        cosines = (queries @ bank.T).mul_(bank_scale)  # (n, M)
        nearest, neighbours = cosines.topk(k, dim=1)  # (n, k) each
        # Without a common factor per row, exp would overflow at small temperatures.
        weights = torch.exp((nearest - nearest[:, :1]) / temperature)
        votes = torch.zeros(len(queries), num_classes, device=device)
        voters = bank_targets[neighbours]
        votes.scatter_add_(1, voters, weights)
        ranked = votes.sort(dim=1, descending=True, stable=True).indices[:, :5]
        voted = (voters == labels[:, None]).any(1, keepdim=True)
        right = (ranked == labels[:, None]) & voted
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = hits * (100.0 / len(features))
    return top1, top5


def neighbours_used(k: int, bank_targets: Tensor) -> int:
    """Return the number of neighbours that vote: k, or all labelled rows where they are fewer."""
    return min(k, int((bank_targets >= 0).sum()))


def _labelled(features: Tensor, targets: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return the labelled rows. side: the name of the rows in the ValueError if none is left."""
    targets = targets.to(features.device)
    keep = targets >= 0
    if not keep.any():
        raise ValueError(f"k-NN needs labelled {side} rows, all {len(targets)} are unlabelled")
    return (features, targets) if keep.all() else (features[keep], targets[keep])
