"""Which negatives: the ring around an anchor, and the loss over it.

Wu, Mosse, Zhuang, Yamins & Goodman, arXiv:2010.02037: of all candidates the most similar ones are kept (the ball), and of
these the very nearest are left out, which are likely to show the same thing (the ring). Follows src/objectives/ of
mhw32/contrastive-ring-public at fb3e1c2: counts, draws, numerators. Differs: the nearest are found by a top-k instead of
sorting all candidates, which gives the same ranks; a few anchors at a time, so that a batch needs less than 64 MB beside a
bank of up to two million rows (and 24 bytes for each row of a longer one); a ball counts in its bank, where the published one
of IR counts in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, launch, metrics

HALF = 10 << 20  # bytes of scores held at once, and again as much for finding and comparing
DENSE_FROM = 4  # where a quarter of a bank's rows enters a sum, the product with the whole bank is faster
LOOKED_AT = 32  # anchors of a batch whose ring is described in the logs


class Ring(NamedTuple):
    """Of every anchor (B rows), nearest first: candidates that were cut out, and those that are left as negatives.

    inner (B, i) and scores (B, o - i): their scores. inner_rows, rows: which candidates these are.
    """

    inner: Tensor
    scores: Tensor
    inner_rows: Tensor
    rows: Tensor


def select(scores: Tensor, inner: int, outer: int) -> Ring:
    """Of these scores (B, n), which are the ring: those of the ranks [inner, outer), the largest score having rank 0.

    0 <= inner < outer <= n. With (0, n) all of them, as they stand, without an order.
    """
    if (inner, outer) == (0, scores.shape[1]):
        rows = torch.arange(outer, device=scores.device).expand_as(scores)
        return Ring(scores[:, :0], scores, rows[:, :0], rows)
    near, rows = scores.topk(outer)
    return Ring(near[:, :inner], near[:, inner:], rows[:, :inner], rows[:, inner:])


@dataclass(frozen=True)
class Rule:
    """What is a negative, and what is a positive. Names and defaults of the published settings.

    kind: "all" candidates, the "ball" of the nearest, or the "ring". thres_inner: share of the ball that is cut out of it
    (dynamic_inner), or share of all candidates. neighbor_views: what was cut out counts as positive, too: the numerator is
    the logsumexp of the positive and of these, or with logsumexp_inner False the mean of their scores. self_negative: the
    positive is in the denominator. ball_of_batch: the published slip of IR's ball, whose size is a share of the batch.
    """

    kind: str = "ring"
    thres_inner: float = 0.1
    dynamic_inner: bool = True
    neighbor_views: bool = False
    logsumexp_inner: bool = True
    self_negative: bool = True
    ball_of_batch: bool = False

    @classmethod
    def of(cls, args) -> Rule:
        """What the flags of train_ring.py say."""
        inner = (args.thres_inner, args.dynamic_inner, args.neighbor_views, args.logsumexp_inner)
        return cls(args.negatives, *inner, args.self_negative, args.ball_bank_size == "batch")

    def inside(self, outer: int, n: int) -> int:
        """How many of the nearest --thres-inner means."""
        return int(self.thres_inner * (outer if self.dynamic_inner else n))

    def ranks(self, thres_outer: float, n: int, batch: int) -> tuple[int, int]:
        """(inner, outer) ranks among n candidates, shares rounded down. batch: the global one.

        Raises UserError, with the numbers, where nothing is left between them.
        """
        if self.kind == "all":
            return 0, n
        outer = min(int(thres_outer * (batch if self.ball_of_batch and self.kind == "ball" else n)), n)
        inner = 0 if self.kind == "ball" else self.inside(outer, n)
        if inner >= outer:
            raise UserError(
                f"an empty ring: of {n} candidates, outer threshold {thres_outer:.4g} and inner {self.thres_inner:.4g} leave "
                f"the ranks {inner} to {outer}; raise --thres-outer, lower --thres-inner, or take a longer queue or more data"
            )
        return inner, outer

    def narrowest(self, thres_outer: float, n: int, batch: int) -> tuple[int, int]:
        """As `ranks`, and UserError where neighbor_views would have no neighbour: to be asked before a training."""
        inner, outer = self.ranks(thres_outer, n, batch)
        if self.neighbor_views and self.inside(outer, n) == 0:
            raise UserError(
                f"--neighbor-views: of {n} candidates, outer threshold {thres_outer:.4g} and inner {self.thres_inner:.4g} cut "
                "out none; raise --thres-inner, or take a longer queue or more data"
            )
        return inner, outer


def row_losses(part: Tensor, inner: Tensor, positive: Tensor, rule: Rule) -> Tensor:
    """The loss of every anchor (B,), in nats, from scores divided by the temperature.

    part (B, J): of its negatives, all or drawn ones. inner (B, i): of what was cut out, for neighbor_views. positive (B,).
    loss = logsumexp(negatives and positive) - positive; the numerator as `Rule` says.
    """
    positive = positive[:, None]
    if rule.self_negative:
        part = torch.cat([positive, part], 1)
    numerator = positive[:, 0]
    if rule.neighbor_views:
        if rule.kind == "ball" and rule.dynamic_inner:  # published: among the negatives themselves
            inner = part.topk(int(rule.thres_inner * part.shape[1])).values
        views = torch.cat([positive, inner], 1)
        numerator = views.logsumexp(1) if rule.logsumexp_inner else views.mean(1)
    return part.logsumexp(1) - numerator


class _Known(torch.autograd.Function):
    """Losses (B,) whose gradients with respect to queries (B, D) and positives (B,) are known already."""

    @staticmethod
    def forward(ctx, query, positive, losses, of_query, of_positive):
        ctx.save_for_backward(of_query, of_positive)
        return losses

    @staticmethod
    def backward(ctx, grad):
        of_query, of_positive = ctx.saved_tensors
        return grad[:, None] * of_query, grad * of_positive, None, None, None


def conditional_loss(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    temperature: float,
    rule: Rule,
    ranks: tuple[int, int],
    draws: Tensor | None = None,
    describe=None,
    statistics: list | None = None,
) -> Tensor:
    """The mean loss of unit queries (B, D) whose candidates are all rows of the bank (n, D), float32.

    positive (B,): their inner product with what they belong to; it may carry a gradient. ranks: of `Rule.ranks`. draws (B, k):
    positions among the negatives of `select` to compare with; None: all of them (MoCo). describe: called once with the Ring
    of the first anchors, at most LOOKED_AT. statistics: gets metrics.score_statistics (B, 5) of those compared with.
    A block of anchors is scored, and a part of it compared and differentiated before the next one, so that of (B, n) scores
    only a few rows exist at a time. The bank has no gradient.
    """
    (inner, outer), n, results, looked = ranks, len(bank), [], []
    drawn = 0 if draws is None else draws.shape[1]
    scored = max(1, HALF // (4 * n))  # anchors; below, with 16 bytes for each candidate, which is what a top-k copies
    compared = max(1, HALF // (16 * n + 28 * outer + 24 * drawn))
    for first in range(0, len(query), scored):
        scores = (query[first : first + scored].detach() / temperature) @ bank.T
        for some in range(first, min(first + scored, len(query)), compared):
            block = slice(some, min(some + compared, first + scored))
            mine = scores[block.start - first : block.stop - first]
            ring = select(mine, inner, outer)
            if some == 0 and describe is not None:
                describe(Ring(*(x[:LOOKED_AT] for x in ring)))
            part, part_rows, near, near_rows = ring.scores, ring.rows, ring.inner, ring.inner_rows
            if drawn:
                part, part_rows = part.gather(1, draws[block]), part_rows.gather(1, draws[block])
            if rule.kind == "ball" and rule.neighbor_views and not rule.dynamic_inner:  # published: of all candidates
                near, near_rows = mine.topk(rule.inside(outer, n))
            if statistics is not None:
                looked.append(metrics.score_statistics(positive[block] / temperature, part, temperature))
            leaves = [x.detach().requires_grad_() for x in (part, near, positive[block] / temperature)]
            with torch.enable_grad():
                losses = row_losses(*leaves, rule)
            of_part, of_near, of_positive = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
            of_query = _weighted_rows(bank, part_rows, of_part)
            if rule.neighbor_views:
                of_query += _weighted_rows(bank, near_rows, of_near)
            results.append((losses.detach(), of_query / temperature, of_positive / temperature))
            del ring, part, part_rows, near, near_rows, leaves, losses, of_part, of_near
    if statistics is not None:
        statistics.append(torch.cat(looked))
    return _Known.apply(query, positive, *map(torch.cat, zip(*results))).mean()


def _weighted_rows(bank: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums (B, D) of the bank rows (B, J), each times its weight: the few that are named, or from DENSE_FROM on a product
    with the whole bank, which is then faster."""
    if rows.shape[1] == 0:
        return weights.new_zeros(len(rows), bank.shape[1])
    if DENSE_FROM * rows.shape[1] <= len(bank):
        return F.embedding_bag(rows, bank, per_sample_weights=weights, mode="sum")
    return weights.new_zeros(len(rows), len(bank)).scatter_add_(1, rows, weights) @ bank


def draw(b: int, k: int, ranks: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Positions (b, k) among the negatives of b anchors of this rank, uniform, with replacement, as published.

    generator: on the device, in the same state on every rank: the draws are those of the global batch.
    """
    everyone = (b * launch.world_size(), k)
    drawn = torch.randint(ranks[1] - ranks[0], everyone, generator=generator, device=generator.device)
    return drawn.chunk(launch.world_size())[launch.rank()]


def description(
    ring: Ring, temperature: float, own: Tensor | None = None, labels: Tensor | None = None, cut: bool = True
) -> dict:
    """What the ring of some anchors is like, as 0-dim tensors: the similarity of its last and its first, mean over anchors.

    own (B,), labels (n,): classes of the anchors and of the candidates, -1 where there is none; then also the share of
    candidates that are of the anchor's own class, in the ring and, where there is an inner cut, among those cut out of it.
    """
    found = {
        "ring_lowest": ring.scores.amin(1).mean() * temperature,
        "ring_highest": ring.scores.amax(1).mean() * temperature,
    }
    if labels is not None:
        for name, rows in (("ring_own_class", ring.rows), ("inner_own_class", ring.inner_rows)):
            if name == "inner_own_class" and not cut:
                continue
            classes, mine = labels[rows], own[: len(rows), None]
            known = (classes >= 0) & (mine >= 0)
            found[name] = ((classes == mine) & known).sum() / known.sum().clamp(min=1)  # 0 where there are none
    return found
