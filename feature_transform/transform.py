"""Feature transformation: harder positives by extrapolation, more diverse negatives by interpolation.

Zhu, Zhao, Liu, Sun & Chen, arXiv:2108.02982, sections 4.1 and 4.2. Functions of tensors, and the draws that they need:

    q' = m q + (1 - m) k,  k' = m k + (1 - m) q      positives; m in [1, 2] moves the two apart, in [0, 1] towards each other
    queue' = m queue + (1 - m) queue[order]          negatives; `order` is one permutation of the rows

Follows memory/mem_moco.py of DTennant/CL-Visualizing-Feature-Transformation at c53d1be: what is mixed with what, what is
normalised, that the transformed query meets the negatives. Differs: coefficients are drawn on the device, from the run's
generator (published: with NumPy, unseeded, by each rank for itself); one for each row is possible; queries that meet the
negatives as they are; negatives that are normalised again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import launch

LEVELS, KNOTS = 2**16, 2**17  # quantiles of a Beta distribution that are told apart; points of its density
SHAPES = ("scalar", "sample", "element")  # one coefficient for all rows, for each row, for each number


class Draws(NamedTuple):
    """What is drawn for a step. A side whose coefficients are None is not transformed.

    positive: () or (B, 1) or (B, D), from 0 to 1, or with extrapolation to 2. negative: () or (n, 1) or (n, D), from 0 to 1.
    order (n,): the row that each of the n candidates is mixed with.
    """

    positive: Tensor | None = None
    negative: Tensor | None = None
    order: Tensor | None = None


NOTHING = Draws()


@dataclass(frozen=True)
class Rule:
    """Which sides are transformed, and how their coefficients are distributed.

    positives, negatives: one of SHAPES, or None. extrapolate: 1 is added to the coefficients of the positives. distribution:
    "beta", Beta(a, a) with a = pos_alpha or neg_alpha, or "uniform". normalise: of "pos" and "neg" what is brought back to unit
    length. original_query: the negatives meet the query as it was (published: the transformed one).
    """

    positives: str | None = "scalar"
    negatives: str | None = "scalar"
    extrapolate: bool = True
    distribution: str = "beta"
    pos_alpha: float = 2.0
    neg_alpha: float = 1.6
    normalise: tuple[str, ...] = ()
    original_query: bool = False

    @classmethod
    def of(cls, args) -> Rule | None:
        """What the flags of main_contrast.py say; None without --mixnorm."""
        if not args.mixnorm:
            return None
        elements = {"none": (), "sample": (), "both": ("pos", "neg")}.get(args.dim_mask, (args.dim_mask,))
        others = "sample" if args.dim_mask == "sample" else "scalar"
        shapes = {side: "element" if side in elements else others for side in ("pos", "neg")}
        sides = [shapes[side] if side in args.mixnorm_target else None for side in ("pos", "neg")]
        alphas = (args.pos_alpha, args.neg_alpha) if args.sep_alpha else (args.beta_alpha,) * 2
        normalised = {"both": ("pos", "neg")}.get(args.norm_target, (args.norm_target,)) if args.postmix_norm else ()
        how = (args.expolation_mask, args.mask_distribution, *alphas, normalised, args.neg_query == "original")
        return cls(*sides, *how)

    def draw(self, b: int, dim: int, candidates: int, generator: torch.Generator) -> Draws:
        """Of a step with b pairs on this rank, features of size dim and so many candidates for negatives.

        generator: on the device, in the same state on every rank. What belongs to the candidates and a scalar are the same
        everywhere, what belongs to a pair are those of the global batch: several processes draw what one would.
        """
        positive = negative = order = None
        if self.positives:
            shape = _shape(self.positives, b * launch.world_size(), dim)
            positive = coefficients(shape, self.distribution, self.pos_alpha, generator)
            if positive.dim():
                positive = positive.chunk(launch.world_size())[launch.rank()]
            positive = positive + 1 if self.extrapolate else positive
        if self.negatives:
            negative = coefficients(
                _shape(self.negatives, candidates, dim), self.distribution, self.neg_alpha, generator
            )
            order = torch.randperm(candidates, generator=generator, device=generator.device)
        return Draws(positive, negative, order)


def _shape(kind: str, rows: int, dim: int) -> tuple[int, ...]:
    return {"scalar": (), "sample": (rows, 1), "element": (rows, dim)}[kind]


def coefficients(shape: tuple[int, ...], distribution: str, alpha: float, generator: torch.Generator) -> Tensor:
    """Independent draws in [0, 1], float32, on the generator's device: "uniform", or "beta", that is Beta(alpha, alpha).

    A Beta draw is a uniform one that looks up its quantile in a table of 65,536: the largest distance between its distribution
    function and the true one is 1/131,072, as far as float32 can tell numbers near 1 apart, and its mean is exact. (Two Gamma
    draws, which is torch's way, take some thirty times as long.)
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    if distribution == "uniform":
        return uniform
    places = uniform.mul_(LEVELS).long().view(-1)  # float32 holds multiples of 2^-24 below 1: never LEVELS itself
    return beta_quantiles(alpha, generator.device).index_select(0, places).view(shape)


@functools.lru_cache(maxsize=16)
def beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at the middles of LEVELS equal steps from 0 to 1: (LEVELS,) float32 on `device`.

    With x = t^(1/min(alpha, 1)) / 2 the density of the lower half is bounded in t for every alpha > 0: but for a factor it is
    (4 x (1 - x))^(alpha - 1), below alpha 1 (1 - x)^(alpha - 1). It is summed by trapezoids; the upper half mirrors it.
    """
    t, power = torch.linspace(0, 1, KNOTS + 1, dtype=torch.float64), 1 / min(alpha, 1.0)
    x = t**power / 2
    density = (4 * x * (1 - x) if alpha >= 1 else 1 - x) ** (alpha - 1)
    below = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density, t)])
    wanted = (torch.arange(LEVELS // 2, dtype=torch.float64) + 0.5) * (2 / LEVELS) * below[-1]
    right = torch.searchsorted(below, wanted).clamp(1, KNOTS)
    share = (wanted - below[right - 1]) / (below[right] - below[right - 1])
    half = ((right - 1 + share) / KNOTS) ** power / 2
    return torch.cat([half, 1 - half.flip(0)]).float().to(device)


def pair(query: Tensor, key: Tensor, coefficient: Tensor | None, normalise: bool = False) -> tuple[Tensor, Tensor]:
    """(query', key') of a positive pair (B, D): m query + (1 - m) key, and m key + (1 - m) query.

    coefficient m: () or (B, 1) or (B, D); None or 1: the pair as it is. Gradients flow through the query into both. normalise:
    both to unit length afterwards. With unit vectors, a scalar m and S = query . key: query' . key' = S + 2 m (1 - m) (1 - S).
    """
    if coefficient is None:
        made = query, key
    else:
        made = torch.lerp(key, query, coefficient), torch.lerp(query, key, coefficient)
    return tuple(F.normalize(x, dim=1) for x in made) if normalise else made


def negatives(
    rows: Tensor,
    coefficient: Tensor | None,
    order: Tensor | None,
    normalise: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """m rows + (1 - m) rows[order]: (n, D), without gradient. `rows` themselves stay as they are.

    coefficient m: () or (n, 1) or (n, D); None: the rows themselves. order (n,). normalise: to unit length afterwards.
    out (n, D): where the result is written, the only copy of the rows that is made.
    """
    if coefficient is None:
        return F.normalize(rows, dim=1) if normalise else rows
    mixed = torch.index_select(rows, 0, order, out=out).lerp_(rows, coefficient)
    return mixed.div_(mixed.norm(dim=1, keepdim=True).clamp_(min=1e-12)) if normalise else mixed
