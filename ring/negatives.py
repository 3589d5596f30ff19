"""The ring of negatives around an anchor, and the loss over it. This file needs torch alone.

Wu, Mosse, Zhuang, Yamins and Goodman, arXiv:2010.02037, keep the most similar of all candidates
(the ball), and leave out the very nearest of these, which are likely to show the same thing (the
ring). Counts, draws and numerators are those of src/objectives/ of mhw32/contrastive-ring-public at
fb3e1c2. It differs from that code in these ways:

- the nearest are found by a top-k, not by sorting all candidates, which gives the same ranks;
- a few anchors are scored at a time, so that a batch needs less than 64 MB beside a bank of up to
  two million rows (and 24 bytes for each row of a longer one);
- the size of a ball is a share of its bank, where IR's published one is a share of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 10 << 20  # bytes of scores held at once, and as many for selecting and comparing
DENSE_FROM = 4  # with 1/4 of the bank's rows or more in a sum, the product with all is faster


class Ring(NamedTuple):
    """The nearest candidates of B anchors in order: i that are cut out, then o - i negatives.

    inner (B, i), scores (B, o - i): scores of the two parts. inner_rows, rows: their bank rows.
    """

    inner: Tensor
    scores: Tensor
    inner_rows: Tensor
    rows: Tensor


def select(scores: Tensor, inner: int, outer: int) -> Ring:
    """Select the ring of scores (B, n): the ranks [inner, outer), rank 0 being the largest score.

    0 <= inner < outer <= n. With (0, n) all candidates are returned, in the order of the bank.
    """
    if (inner, outer) == (0, scores.shape[1]):
        rows = torch.arange(outer, device=scores.device).expand_as(scores)
        return Ring(scores[:, :0], scores, rows[:, :0], rows)
    near, rows = scores.topk(outer)
    return Ring(near[:, :inner], near[:, inner:], rows[:, :inner], rows[:, inner:])


@dataclass(frozen=True)
class Rule:
    """The rule that makes candidates negatives or positives; names and defaults are published.

    kind: "all" candidates, the "ball" of the nearest, or the "ring".
    thres_inner: share of the ball (with dynamic_inner), or of all candidates, that is cut out.
    neighbor_views: the candidates that are cut out count as positives, too. The numerator is then
    the logsumexp of the positive and of these, or with logsumexp_inner False their mean score.
    self_negative: the positive is in the denominator.
    ball_of_batch: the size of IR's ball is a share of the batch, a slip of the published code.
    """

    kind: str = "ring"
    thres_inner: float = 0.1
    dynamic_inner: bool = True
    neighbor_views: bool = False
    logsumexp_inner: bool = True
    self_negative: bool = True
    ball_of_batch: bool = False

    def inside(self, outer: int, n: int) -> int:
        """Return the number of nearest candidates that thres_inner cuts out."""
        return int(self.thres_inner * (outer if self.dynamic_inner else n))

    def ranks(self, thres_outer: float, n: int, batch: int) -> tuple[int, int]:
        """Return the (inner, outer) ranks of the ring among n candidates; shares are rounded down.

        batch: rows of the global batch. Raises ValueError, with the numbers, for an empty ring.
        """
        if self.kind == "all":
            return 0, n
        size = batch if self.ball_of_batch and self.kind == "ball" else n
        outer = min(int(thres_outer * size), n)
        inner = 0 if self.kind == "ball" else self.inside(outer, n)
        if inner >= outer:
            raise ValueError(
                f"the ring is empty: of {n} candidates, outer threshold {thres_outer:.4g} and "
                f"inner {self.thres_inner:.4g} leave the ranks {inner} to {outer}"
            )
        return inner, outer

    def narrowest(self, thres_outer: float, n: int, batch: int) -> tuple[int, int]:
        """Return `ranks` of the least thres_outer of a training.

        Also raises ValueError where neighbor_views would have no neighbours.
        """
        inner, outer = self.ranks(thres_outer, n, batch)
        if self.neighbor_views and self.inside(outer, n) == 0:
            raise ValueError(
                f"--neighbor-views has no neighbours: of {n} candidates, outer threshold "
                f"{thres_outer:.4g} and inner {self.thres_inner:.4g} cut out none"
            )
        return inner, outer


@dataclass(frozen=True)
class Comparison:
    """The settings by which the B queries of a step are compared with their candidates.

    ranks: (inner, outer), from `Rule.ranks`. temperature: divides the cosines.
    draws (B, k): positions of the compared ones among the negatives of `select`; None: all.
    """

    rule: Rule
    ranks: tuple[int, int]
    temperature: float
    draws: Tensor | None = None


# observer(ring, positive (B,), negatives (B, J)); all scores are divided by the temperature
Observer = Callable[[Ring, Tensor, Tensor], None]


def draw(b: int, k: int, ranks: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw positions (b, k) among the negatives of b anchors, uniformly with replacement.

    The positions are on the generator's device.
    """
    size = ranks[1] - ranks[0]
    return torch.randint(size, (b, k), generator=generator, device=generator.device)


def conditional_loss(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    comparison: Comparison,
    observer: Observer | None = None,
) -> Tensor:
    """Return the mean loss, in nats, of queries against the rings of their candidates.

        L = -log  exp(s+/T) / ( exp(s+/T) + sum over ranks [inner, outer) of exp(s_j/T) )

    query (B, D): unit rows. positive (B,): their cosines with their positives, which may carry a
    gradient. bank (n, D): unit rows of all candidates, float32, without a gradient.
    observer: called once for each block of anchors, in order.
    Anchors are scored in blocks, and each part of a block is compared and differentiated before the
    next one, so that only a few rows of the B x n scores exist at a time.
    """
    n = len(bank)
    drawn = 0 if comparison.draws is None else comparison.draws.shape[1]
    scored = max(1, HALF // (4 * n))  # anchors
    # A top-k copies 16 bytes for each candidate.
    compared = max(1, HALF // (16 * n + 28 * comparison.ranks[1] + 24 * drawn))
    parts = []
    for first in range(0, len(query), scored):
        scores = (query[first : first + scored].detach() / comparison.temperature) @ bank.T
        for start in range(0, len(scores), compared):
            stop = min(start + compared, len(scores))
            anchors = slice(first + start, first + stop)
            part = _compare(
                scores[start:stop], positive[anchors], bank, comparison, anchors, observer
            )
            parts.append(part)
    losses, of_query, of_positive = map(torch.cat, zip(*parts))
    return _Differentiated.apply(query, positive, losses, of_query, of_positive).mean()


def _compare(
    scores: Tensor,
    positive: Tensor,
    bank: Tensor,
    comparison: Comparison,
    anchors: slice,
    observer: Observer | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses (b,) and their gradients to queries (b, D) and positives (b,).

    scores (b, n): divided by the temperature. positive (b,): cosines. anchors: the place of these b
    anchors in the batch.
    """
    rule = comparison.rule
    inner, outer = comparison.ranks
    positive = positive / comparison.temperature
    ring = select(scores, inner, outer)
    negatives, rows = ring.scores, ring.rows
    if comparison.draws is not None and comparison.draws.shape[1]:
        draws = comparison.draws[anchors]
        negatives = negatives.gather(1, draws)
        rows = rows.gather(1, draws)
    near, near_rows = ring.inner, ring.inner_rows
    if rule.kind == "ball" and rule.neighbor_views and not rule.dynamic_inner:
        near, near_rows = scores.topk(rule.inside(outer, len(bank)))  # published: of all candidates
    if observer is not None:
        observer(ring, positive.detach(), negatives)
    leaves = [x.detach().requires_grad_() for x in (negatives, near, positive)]
    with torch.enable_grad():
        losses = row_losses(*leaves, rule)
    grads = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    of_negatives, of_near, of_positive = grads
    of_query = _weighted_rows(bank, rows, of_negatives)
    if rule.neighbor_views:
        of_query += _weighted_rows(bank, near_rows, of_near)
    scale = comparison.temperature
    return losses.detach(), of_query / scale, of_positive / scale


def row_losses(negatives: Tensor, inner: Tensor, positive: Tensor, rule: Rule) -> Tensor:
    """Return the loss of every anchor (B,), in nats: logsumexp(negatives, positive) - positive.

    negatives (B, J), inner (B, i), positive (B,): scores of the compared negatives, of the
    candidates that are cut out, and of the positives, divided by the temperature. `Rule` describes
    the other forms of numerator and denominator.
    """
    positive = positive[:, None]
    if rule.self_negative:
        negatives = torch.cat([positive, negatives], 1)
    numerator = positive[:, 0]
    if rule.neighbor_views:
        if rule.kind == "ball" and rule.dynamic_inner:  # published: among the negatives themselves
            inner = negatives.topk(int(rule.thres_inner * negatives.shape[1])).values
        views = torch.cat([positive, inner], 1)
        numerator = views.logsumexp(1) if rule.logsumexp_inner else views.mean(1)
    return negatives.logsumexp(1) - numerator


class _Differentiated(torch.autograd.Function):
    """Losses (B,) whose gradients to queries (B, D) and positives (B,) are computed already."""

    @staticmethod
    def forward(ctx, query, positive, losses, of_query, of_positive):
        ctx.save_for_backward(of_query, of_positive)
        return losses

    @staticmethod
    def backward(ctx, grad):
        of_query, of_positive = ctx.saved_tensors
        return grad[:, None] * of_query, grad * of_positive, None, None, None


def _weighted_rows(bank: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return sums (B, D) of bank rows (B, J), each times its weight (B, J)."""
    if rows.shape[1] == 0:
        return weights.new_zeros(len(rows), bank.shape[1])
    if DENSE_FROM * rows.shape[1] <= len(bank):
        return F.embedding_bag(rows, bank, per_sample_weights=weights, mode="sum")
    return weights.new_zeros(len(rows), len(bank)).scatter_add_(1, rows, weights) @ bank


def description(
    ring: Ring,
    temperature: float,
    own: Tensor | None = None,
    labels: Tensor | None = None,
    has_cut: bool = True,
) -> dict[str, Tensor]:
    """Return 0-dim tensors that describe the rings of B anchors, for the logs.

    ring_lowest, ring_highest: cosine of the last and of the first candidate, mean over anchors.
    own (B,), labels (n,): classes of the anchors and of the candidates, -1 where unknown. With
    them, ring_own_class is the share of the ring that is of its anchor's class, and with has_cut
    inner_own_class is that share of the candidates that are cut out.
    """
    values = {
        "ring_lowest": ring.scores.amin(1).mean() * temperature,
        "ring_highest": ring.scores.amax(1).mean() * temperature,
    }
    if labels is None:
        return values
    values["ring_own_class"] = _own_share(labels[ring.rows], own)
    if has_cut:
        values["inner_own_class"] = _own_share(labels[ring.inner_rows], own)
    return values


def _own_share(classes: Tensor, own: Tensor) -> Tensor:
    """Return the share of known classes (B, J) that equal own (B,); 0 where none is known."""
    own = own[: len(classes), None]
    is_known = (classes >= 0) & (own >= 0)
    return ((classes == own) & is_known).sum() / is_known.sum().clamp(min=1)
