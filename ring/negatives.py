"""The ring of negatives around an anchor, and the loss over it. This file needs torch alone.

Wu, Mosse, Zhuang, Yamins and Goodman, arXiv:2010.02037, keep the most similar of all candidates
(the ball), and leave out the very nearest of these, which are likely to show the same thing (the
ring). Counts, draws and numerators are those of src/objectives/ of mhw32/contrastive-ring-public at
fb3e1c2. It differs from that code in these ways:

- the nearest are found by a top-k, not by sorting all candidates, which gives the same ranks;
- a few anchors are scored at a time, so that a batch needs less than 64 MB beside a bank of up to
  two million rows of which a tenth is near enough (less than 100 MB where all are; and 24 bytes
  for each row of a longer bank), or on CUDA 1 GiB;
- the size of a ball is a share of its bank, where IR's published one is a share of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 10 << 20  # bytes of scores held at once, and as many for selecting and comparing
CUDA_HALF = 512 << 20  # the same on CUDA, where a launch costs more than memory
DENSE_FROM = 4  # with 1/4 of the bank's rows or more in a sum, the product with all is faster
UNIT = 0.01  # how far the length of a unit row may be from 1; bfloat16 needs 0.004


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

    0 <= inner <= outer <= n. With (0, n) all candidates are returned, in the order of the bank.
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

        batch: rows of the global batch. Raises ValueError, with the numbers, for an empty ring,
        whose loss the published code computes.
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


def ring_loss(
    query: Tensor,
    key: Tensor,
    memory: Tensor,
    *,
    outer: float,
    inner: float = 0.0,
    temperature: float = 0.07,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the loss of queries against the ring of their nearest rows in a memory, in nats.

    It is `conditional_loss` with the ring of Wu et al., which has the formula. query, key (B, D):
    unit rows; row i of key is the positive of row i of query. memory (K, D): unit rows without
    gradient, a queue or a bank.
    outer: share of the memory that is near enough. inner: share of these that are too near, and are
    cut out. temperature T > 0. count: compare with so many rows of the ring, drawn with replacement
    by the generator, which is on the device of query; None compares with all of the ring.
    Gradient flows to query and key. Raises ValueError where a shape or a number does not fit.

    >>> query, key, memory = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 100))
    >>> ring_loss(query, key, memory, outer=0.2, inner=0.1, temperature=0.1).shape
    torch.Size([])
    """
    if query.shape != key.shape:
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}: expected one shape"
        )
    if count is not None and (count < 1 or generator is None):
        raise ValueError(f"count {count} must be at least 1, and needs a generator to draw with")
    rule = Rule("ring", inner)
    ranks = rule.ranks(outer, len(memory), len(query))
    draws = None if count is None else draw(len(query), count, ranks, generator)
    positive = (query.float() * key.float()).sum(1)
    return conditional_loss(query, positive, memory, Comparison(rule, ranks, temperature, draws))


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
    gradient. bank (n, D): unit rows of all candidates, float32, without a gradient. The loss is
    float32 also under autocast.
    observer: called once for each block of anchors, in order.
    Anchors are scored in blocks, and each part of a block is compared and differentiated before the
    next one, so that only a few rows of the B x n scores exist at a time. Raises ValueError where
    shapes or ranks do not fit.
    """
    _check(query, positive, bank, comparison)
    with torch.autocast(query.device.type, enabled=False):
        query, positive, bank = query.float(), positive.float(), bank.float()
        parts = [
            _compare(scores, positive[anchors], bank, comparison, anchors, observer)
            for anchors, scores in _scored(query.detach(), bank, comparison)
        ]
        losses, *gradients = map(torch.cat, zip(*parts))
        if gradients:
            losses = _Differentiated.apply(query, positive, losses, *gradients)
        return losses.mean()


def _check(query: Tensor, positive: Tensor, bank: Tensor, comparison: Comparison) -> None:
    """Raise ValueError where the arguments of `conditional_loss` do not fit each other.

    In debug, which is without python -O, queries on a CPU must also have unit rows, or zeros: what
    F.normalize returns. Any other device would have to be waited for.
    """
    if bank.dim() != 2 or not len(bank):
        raise ValueError(f"the memory is {tuple(bank.shape)}: expected (K, D), at least one row")
    if query.dim() != 2 or query.shape[1] != bank.shape[1] or positive.shape != query.shape[:1]:
        raise ValueError(
            f"query is {tuple(query.shape)} with positives {tuple(positive.shape)}: expected (B, "
            f"{bank.shape[1]}) and (B,), since the memory is {tuple(bank.shape)}"
        )
    inner, outer = comparison.ranks
    if not 0 <= inner <= outer <= len(bank):
        raise ValueError(f"ranks {inner} to {outer} are no ring among {len(bank)} candidates")
    if not comparison.temperature > 0:
        raise ValueError(f"temperature {comparison.temperature} must be above 0")
    if __debug__ and query.device.type == "cpu" and not torch.compiler.is_compiling():
        length = query.detach().float().norm(dim=1)
        wrong = ((length - 1).abs() > UNIT) & (length > 0)
        if wrong.any():
            raise ValueError(
                f"query has a row of length {length[wrong][0]:.4g}, expected unit rows: apply "
                "torch.nn.functional.normalize(query, dim=1)"
            )


def _scored(query: Tensor, bank: Tensor, comparison: Comparison) -> Iterator[tuple[slice, Tensor]]:
    """Yield (place in the batch, scores (b, n) over the temperature) of a few anchors at a time."""
    n = len(bank)
    half = CUDA_HALF if query.device.type == "cuda" else HALF
    drawn = 0 if comparison.draws is None else comparison.draws.shape[1]
    scored = max(1, half // (4 * n))  # anchors
    # A top-k copies 16 bytes for each candidate.
    compared = max(1, half // (16 * n + 28 * comparison.ranks[1] + 24 * drawn))
    for first in range(0, len(query), scored):
        scores = (query[first : first + scored] / comparison.temperature) @ bank.T
        for start in range(0, len(scores), compared):
            stop = min(start + compared, len(scores))
            yield slice(first + start, first + stop), scores[start:stop]


def _compare(
    scores: Tensor,
    positive: Tensor,
    bank: Tensor,
    comparison: Comparison,
    anchors: slice,
    observer: Observer | None,
) -> tuple[Tensor, ...]:
    """Return losses (b,) and, where gradients are enabled, those to queries and positives.

    scores (b, n): divided by the temperature. positive (b,): cosines. anchors: the place of these b
    anchors in the batch. The gradients are (b, D) and (b,).
    """
    rule = comparison.rule
    inner, outer = comparison.ranks
    positive = positive / comparison.temperature
    ring = select(scores, inner, outer)
    negatives, rows = ring.scores, ring.rows
    if comparison.draws is not None:
        draws = comparison.draws[anchors]
        negatives = negatives.gather(1, draws)
        rows = rows.gather(1, draws)
    near, near_rows = ring.inner, ring.inner_rows
    if rule.kind == "ball" and rule.neighbor_views and not rule.dynamic_inner:
        near, near_rows = scores.topk(rule.inside(outer, len(bank)))  # published: of all candidates
    if observer is not None:
        observer(ring, positive.detach(), negatives)
    if not torch.is_grad_enabled():
        return (row_losses(negatives, near, positive, rule),)
    inputs = (negatives.detach(), near.detach(), positive.detach())
    losses, gradients = torch.func.vjp(lambda *scores: row_losses(*scores, rule), *inputs)
    of_negatives, of_near, of_positive = gradients(torch.ones_like(losses))
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
    """Return sums (B, D) of bank rows (B, J), each times its weight (B, J).

    `embedding_bag` on CUDA walks the J rows of a sum one after the other, so that there a product
    with the whole bank is always faster.
    """
    if rows.shape[1] == 0:
        return weights.new_zeros(len(rows), bank.shape[1])
    if bank.device.type != "cuda" and DENSE_FROM * rows.shape[1] <= len(bank):
        return F.embedding_bag(rows, bank, per_sample_weights=weights, mode="sum")
    return weights.new_zeros(len(rows), len(bank)).scatter_add_(1, rows, weights) @ bank
