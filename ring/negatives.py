"""Which negatives: the ring around an anchor, and the loss over it. Needs torch alone.

Wu, Mosse, Zhuang, Yamins and Goodman, arXiv:2010.02037: of all candidates the most similar ones are
kept (the ball), and the very nearest of these, which are likely to show the same thing, are left
out (the ring). Follows src/objectives/ of mhw32/contrastive-ring-public at fb3e1c2 in its counts,
draws and numerators. Differs:

- the nearest are found by a top-k, not by sorting all candidates, which gives the same ranks;
- a few anchors are scored at a time, so that a batch needs less than 64 MB beside a bank of up to
  two million rows (and 24 bytes for each row of a longer one);
- a ball is a share of its bank, where the published one of IR is a share of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 10 << 20  # bytes of scores held at once, and again as much for finding and comparing
DENSE_FROM = 4  # from a quarter of the bank's rows in a sum, the product with all rows is faster


class Ring(NamedTuple):
    """The candidates of B anchors, the nearest first: those cut out, and those left as negatives.

    inner (B, i), scores (B, o - i): their scores. inner_rows, rows: their rows in the bank.
    """

    inner: Tensor
    scores: Tensor
    inner_rows: Tensor
    rows: Tensor


def select(scores: Tensor, inner: int, outer: int) -> Ring:
    """Select the ring of scores (B, n): the ranks [inner, outer), rank 0 being the largest score.

    0 <= inner < outer <= n. With (0, n) all candidates are returned as they stand, without an
    order.
    """
    if (inner, outer) == (0, scores.shape[1]):
        rows = torch.arange(outer, device=scores.device).expand_as(scores)
        return Ring(scores[:, :0], scores, rows[:, :0], rows)
    near, rows = scores.topk(outer)
    return Ring(near[:, :inner], near[:, inner:], rows[:, :inner], rows[:, inner:])


@dataclass(frozen=True)
class Rule:
    """Which candidates are negatives, and what is positive; published names and defaults.

    kind: "all" candidates, the "ball" of the nearest, or the "ring".
    thres_inner: share that is cut out, of the ball (dynamic_inner), or of all candidates.
    neighbor_views: what was cut out counts as positive, too. The numerator is then the logsumexp of
    the positive and of these, or with logsumexp_inner False the mean of their scores.
    self_negative: the positive is in the denominator.
    ball_of_batch: the published slip of IR's ball, whose size is a share of the batch.
    """

    kind: str = "ring"
    thres_inner: float = 0.1
    dynamic_inner: bool = True
    neighbor_views: bool = False
    logsumexp_inner: bool = True
    self_negative: bool = True
    ball_of_batch: bool = False

    def inside(self, outer: int, n: int) -> int:
        """Return how many of the nearest candidates thres_inner means."""
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
                f"an empty ring: of {n} candidates, outer threshold {thres_outer:.4g} and inner "
                f"{self.thres_inner:.4g} leave the ranks {inner} to {outer}"
            )
        return inner, outer

    def narrowest(self, thres_outer: float, n: int, batch: int) -> tuple[int, int]:
        """Return `ranks` of the least thres_outer of a training.

        Also raises ValueError where neighbor_views would have no neighbours.
        """
        inner, outer = self.ranks(thres_outer, n, batch)
        if self.neighbor_views and self.inside(outer, n) == 0:
            raise ValueError(
                f"no neighbor_views: of {n} candidates, outer threshold {thres_outer:.4g} and "
                f"inner {self.thres_inner:.4g} cut out none"
            )
        return inner, outer


@dataclass(frozen=True)
class Comparison:
    """What the B queries of a step are compared with.

    ranks: (inner, outer), of `Rule.ranks`. temperature: divides the cosines.
    draws (B, k): positions among the negatives of `select` to compare with; None: all of them.
    """

    rule: Rule
    ranks: tuple[int, int]
    temperature: float
    draws: Tensor | None = None


# observer(ring, positive (B,), negatives (B, J)), the scores divided by the temperature
Observer = Callable[[Ring, Tensor, Tensor], None]


def draw(b: int, k: int, ranks: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw positions (b, k) among the negatives of b anchors, uniform, with replacement.

    generator: on the device that the positions are wanted on. As published.
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
    A block of anchors is scored, and a part of it is compared and differentiated before the next
    one, so that of B x n scores only a few rows exist at a time.
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

    scores (b, n), divided by the temperature, and positive (b,): of these anchors of the batch.
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

    negatives (B, J), all or drawn ones, inner (B, i), what was cut out, and positive (B,): scores
    divided by the temperature. `Rule` says what else the numerator and the denominator can be.
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
    """Describe the rings of B anchors in 0-dim tensors, for the logs.

    ring_lowest, ring_highest: cosine of the last and of the first candidate, mean over anchors.
    With own (B,) and labels (n,), classes of the anchors and of the candidates, -1 where there is
    none: ring_own_class, the share of the ring that is of its anchor's class, and with has_cut
    inner_own_class, the same share of what was cut out.
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
    """Return the share of classes (B, J) that equal own (B,), where both are known; 0 for none."""
    own = own[: len(classes), None]
    is_known = (classes >= 0) & (own >= 0)
    return ((classes == own) & is_known).sum() / is_known.sum().clamp(min=1)
