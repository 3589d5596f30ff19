"""Feature transformation: harder positives by extrapolation, more diverse negatives by mixing.

Zhu, Zhao, Liu, Sun and Chen, arXiv:2108.02982, sections 4.1 and 4.2. This file needs torch alone.

    q' = m q + (1 - m) k
    k' = m k + (1 - m) q                        a positive pair: m in [1, 2] moves the two apart,
                                                m in [0, 1] moves them towards each other
    queue' = m queue + (1 - m) queue[order]     negatives: `order` is one permutation of the rows

The mixtures, their normalisation, and the comparison of the transformed query with the negatives
are those of memory/mem_moco.py of DTennant/CL-Visualizing-Feature-Transformation at c53d1be. It
differs from that code in these ways: coefficients are drawn on the device from the run's generator
(there by NumPy, without a seed, on each rank); there may be one coefficient for each row; the
negatives may be compared with the original query, and may be normalised again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # the number of quantiles of a Beta distribution in its table
KNOTS = 2**17  # the number of points at which its density is evaluated
SHAPES = ("scalar", "sample", "element")  # one coefficient for all rows, each row, each number


class Draws(NamedTuple):
    """The random numbers of a step. A side whose coefficients are None is not transformed.

    positive: coefficients () or (B, 1) or (B, D), in [0, 1], or in [1, 1 + reach] with
    extrapolation.
    negative: coefficients () or (n, 1) or (n, D), in [0, 1].
    order (n,): the row that each of the n candidates for negatives is mixed with.
    """

    positive: Tensor | None = None
    negative: Tensor | None = None
    order: Tensor | None = None

    def part(self, number: int, count: int) -> Draws:
        """Return the draws of process `number` of `count`, with its share of the positive pairs.

        A scalar, and the draws for the candidates for negatives, are the same for all processes.
        """
        if self.positive is None or self.positive.dim() == 0:
            return self
        return self._replace(positive=self.positive.chunk(count)[number])


NOTHING = Draws()


@dataclass(frozen=True)
class Rule:
    """Which sides are transformed, and how their coefficients are distributed.

    positives, negatives: one of SHAPES, or None for a side that stays as it is.
    extrapolate: coefficients of the positives are from 1 to 1 + reach instead of 0 to 1.
    distribution: "beta" for Beta(a, a), with a = pos_alpha or neg_alpha, or "uniform".
    normalise: sides, "pos" or "neg", that are brought back to unit length.
    original_query: compare the negatives with the original query (published: the transformed one).
    Raises ValueError where a value is none of these.

    >>> rule = Rule(positives="sample", negatives="scalar")
    >>> draws = rule.draw(4, 8, 100, torch.Generator().manual_seed(0))
    >>> draws.positive.shape, draws.negative.shape, draws.order.shape
    (torch.Size([4, 1]), torch.Size([]), torch.Size([100]))
    """

    positives: str | None = "scalar"
    negatives: str | None = "scalar"
    extrapolate: bool = True
    distribution: str = "beta"
    pos_alpha: float = 2.0
    neg_alpha: float = 1.6
    normalise: tuple[str, ...] = ()
    original_query: bool = False
    reach: float = 1.0

    def __post_init__(self):
        for name in ("positives", "negatives"):
            value = getattr(self, name)
            if value not in (None, *SHAPES):
                raise ValueError(f"{name} {value!r} must be None or one of {', '.join(SHAPES)}")
        if self.distribution not in ("beta", "uniform"):
            raise ValueError(f"distribution {self.distribution!r} must be 'beta' or 'uniform'")
        if not min(self.pos_alpha, self.neg_alpha) > 0:
            raise ValueError(f"alphas {self.pos_alpha} and {self.neg_alpha} must be above 0")
        if not isinstance(self.normalise, tuple) or not set(self.normalise) <= {"pos", "neg"}:
            raise ValueError(f"normalise {self.normalise!r} must be a tuple of 'pos' and 'neg'")
        if not self.reach > 0:
            raise ValueError(f"reach {self.reach} must be above 0")

    @functools.cached_property
    def tables(self) -> dict:
        """The tables of `coefficients`. They go with the rule, since no tensor is kept for good."""
        return {}

    def draw(self, pairs: int, dim: int, candidates: int, generator: torch.Generator) -> Draws:
        """Draw the coefficients of a step, and the permutation of the candidates for negatives.

        pairs: number of positive pairs in the global batch. dim: feature size. candidates: number
        of rows that become negatives. generator: on the device; in the same state on every process,
        so that several processes draw the same as one (see `Draws.part`).
        """
        positive = negative = order = None
        if self.positives:
            shape = _shape(self.positives, pairs, dim)
            positive = coefficients(
                shape, self.distribution, self.pos_alpha, generator, self.tables
            )
            if self.extrapolate:
                positive = 1 + self.reach * positive
        if self.negatives:
            shape = _shape(self.negatives, candidates, dim)
            negative = coefficients(
                shape, self.distribution, self.neg_alpha, generator, self.tables
            )
            order = torch.randperm(candidates, generator=generator, device=generator.device)
        return Draws(positive, negative, order)


def _shape(kind: str, rows: int, dim: int) -> tuple[int, ...]:
    return {"scalar": (), "sample": (rows, 1), "element": (rows, dim)}[kind]


def coefficients(
    shape: tuple[int, ...],
    distribution: str,
    alpha: float,
    generator: torch.Generator,
    tables: dict | None = None,
) -> Tensor:
    """Draw independent numbers in [0, 1], float32, on the generator's device.

    distribution: "uniform", or "beta" for Beta(alpha, alpha). tables: keeps the tables of Beta
    distributions, {(alpha, device): table}, for later calls.
    A Beta draw is a uniform draw that looks up its quantile in a table of 65,536. The distribution
    function is then at most 1/131,072 away from the true one, and the mean is exact. torch's own
    way, two Gamma draws, takes some thirty times as long.
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    if distribution == "uniform":
        return uniform
    # The draws are multiples of 2^-24 below 1, so that no place is LEVELS itself.
    places = uniform.mul_(LEVELS).long().view(-1)
    tables = {} if tables is None else tables
    key = (alpha, generator.device)
    if key not in tables:
        with torch.inference_mode(False):
            tables[key] = beta_quantiles(*key)
    return tables[key].index_select(0, places).view(shape)


def beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Return quantiles of Beta(alpha, alpha) at the middles of LEVELS equal steps from 0 to 1.

    They are (LEVELS,) float32 on `device`. With x = t^(1 / min(alpha, 1)) / 2 the density of the
    lower half is bounded in t for every alpha > 0: up to a factor it is (4 x (1 - x))^(alpha - 1),
    and (1 - x)^(alpha - 1) for alpha below 1. It is summed by trapezoids, and the upper half is the
    mirror image of the lower one.
    """
    t = torch.linspace(0, 1, KNOTS + 1, dtype=torch.float64)
    power = 1 / min(alpha, 1.0)
    x = t**power / 2
    density = (4 * x * (1 - x) if alpha >= 1 else 1 - x) ** (alpha - 1)
    below = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density, t)])
    middles = (torch.arange(LEVELS // 2, dtype=torch.float64) + 0.5) * (2 / LEVELS)
    wanted = middles * below[-1]
    right = torch.searchsorted(below, wanted).clamp(1, KNOTS)
    share = (wanted - below[right - 1]) / (below[right] - below[right - 1])
    half = ((right - 1 + share) / KNOTS) ** power / 2
    return torch.cat([half, 1 - half.flip(0)]).float().to(device)


def pair(
    query: Tensor, key: Tensor, coefficient: Tensor | None, normalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (query', key') of positive pairs (B, D): m query + (1 - m) key and the reverse.

    coefficient: m, of shape () or (B, 1) or (B, D); None or 1 leaves the pair as it is.
    normalise: bring both to unit length afterwards. The gradient flows from both to the query.
    Check: for unit vectors, a scalar m and S = query . key,
    query' . key' = S + 2 m (1 - m) (1 - S).
    The rows may be of any length, though the closed form and the paper need unit rows. Raises
    ValueError where shapes do not fit.

    >>> query, key = torch.eye(2), torch.eye(2).flip(0)
    >>> moved, positive = pair(query, key, torch.tensor(1.5))
    >>> (moved * positive).sum(1).tolist()  # the cosines were 0
    [-1.5, -1.5]
    """
    if query.dim() < 2 or query.shape != key.shape:
        raise ValueError(
            f"query is {tuple(query.shape)} and key {tuple(key.shape)}: expected (B, D) twice"
        )
    _check_coefficient(coefficient, query)
    moved, positive = query, key
    if coefficient is not None:
        moved = torch.lerp(key, query, coefficient)
        positive = torch.lerp(query, key, coefficient)
    if normalise:
        return F.normalize(moved, dim=-1), F.normalize(positive, dim=-1)
    return moved, positive


def negatives(
    rows: Tensor,
    coefficient: Tensor | None,
    order: Tensor | None,
    normalise: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return m rows + (1 - m) rows[order]: (n, D), without gradient. `rows` are not changed.

    coefficient: m, of shape () or (n, 1) or (n, D); None returns the rows themselves. order (n,).
    normalise: bring the result to unit length. out (n, D): storage of the result, the only copy of
    the rows that is made. Raises ValueError, before anything is written, where shapes do not fit.

    >>> rows, order = torch.eye(2), torch.tensor([1, 0])
    >>> negatives(rows, torch.tensor(0.75), order).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    if rows.dim() != 2 or not len(rows):
        raise ValueError(f"rows are {tuple(rows.shape)}: expected (n, D) with at least one row")
    if coefficient is not None and (order is None or order.shape != rows.shape[:1]):
        shape = None if order is None else tuple(order.shape)
        raise ValueError(f"order is {shape}: expected a permutation of the {len(rows)} rows")
    _check_coefficient(coefficient, rows)
    if coefficient is None:
        return F.normalize(rows, dim=1) if normalise else rows
    mixed = torch.index_select(rows, 0, order, out=out).lerp_(rows, coefficient)
    if normalise:
        return mixed.div_(mixed.norm(dim=1, keepdim=True).clamp_(min=1e-12))
    return mixed


@torch.no_grad()
def view_correlation(query: Tensor, key: Tensor) -> Tensor:
    """Return the correlation of two views' features (B, D) of the same B pictures, 0-dim.

    Each side is centred at its mean over the batch: 1 where the views of a picture deviate from the
    mean alike, 0 where they have no more in common than those of different pictures.
    """
    query, key = (x.detach() - x.detach().mean(0) for x in (query, key))
    norms = torch.linalg.vector_norm(query) * torch.linalg.vector_norm(key)
    return (query * key).sum() / norms.clamp(min=torch.finfo(query.dtype).tiny)


def _check_coefficient(coefficient: Tensor | None, rows: Tensor) -> None:
    shapes = ((), (*rows.shape[:-1], 1), tuple(rows.shape))
    if coefficient is not None and tuple(coefficient.shape) not in shapes:
        raise ValueError(
            f"coefficient is {tuple(coefficient.shape)}: expected one of {shapes} for rows "
            f"{tuple(rows.shape)}"
        )
