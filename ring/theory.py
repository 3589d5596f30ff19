#!/usr/bin/env python
"""Test the theory of conditional negatives: is the ring's estimate a lower bound of less variance?

Conditional Negative Sampling (Wu et al., ICLR 2021, arXiv:2010.02037) proves that an estimate of
mutual information whose negatives are drawn near the anchor stays below the one with random
negatives (NCE), and so below mutual information, with more bias and less variance. The proof
requires that exp(score) of every candidate is above its mean over all negatives. Here both sides
are known, as the data are a Gaussian pair and the critic is optimal for it; the ring is selected by
the function that trains (`ring.negatives`).

    python ring/theory.py --out runs/ring-theory
    python ring/theory.py --out runs/ring-theory-easy --dim 8 --rho 0.5
"""

import math
import os
import shlex
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from torch import Tensor

from common import UsageError, cli, files
from ring import negatives, theory_output
from runner.folder import environment
from runner.progress import Progress

RESAMPLES = 1000  # the number of samples in the bootstrap over repeats
LEVEL = (2.5, 97.5)  # percentiles of its interval


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0])
    g = parser.add_argument_group("the pair")
    text = "independent coordinates of each vector"
    g.add_argument("--dim", type=cli.positive_int, default=8, help=text)
    rho = cli.number(float, above=0, most=0.999)
    g.add_argument("--rho", type=rho, default=0.7, help="correlation in each coordinate")
    g = parser.add_argument_group("the estimators")
    text = "sizes of the set of the positive and its negatives"
    sizes = [4, 16, 64, 256, 1024, 4096]
    g.add_argument("--k", type=cli.number(int, least=2), nargs="+", default=sizes, help=text)
    text = "outer thresholds: shares of the pool, most similar first, that form the ball"
    shares = [0.5, 0.2, 0.1, 0.05, 0.02]
    g.add_argument("--outer", type=cli.share, nargs="+", default=shares, help=text)
    text = "inner thresholds: shares of the ball, most similar first, that are cut out; 0: the ball"
    inner = cli.number(float, least=0, most=0.99)
    g.add_argument("--inner", type=inner, nargs="+", default=[0, 0.1], help=text)
    text = "number of candidates (the bank)"
    g.add_argument("--pool", type=cli.number(int, least=2), default=8192, help=text)
    g = parser.add_argument_group("run")
    text = "folder for theory.png, theory.md and theory.json"
    g.add_argument("--out", required=True, metavar="DIR", help=text)
    text = "number of batches, each with two fresh pools"
    g.add_argument("--repeats", type=cli.number(int, least=3), default=200, help=text)
    g.add_argument("--pairs", type=cli.positive_int, default=64, help="anchors in a batch")
    g.add_argument("--seed", type=cli.seed, default=0, help="seed of all draws")
    text = "repeats between progress lines"
    g.add_argument("-p", "--print-freq", type=cli.positive_int, default=20, help=text)
    args = parser.parse_args(argv)
    args.k = sorted(set(args.k))
    args.outer = sorted(set(args.outer), reverse=True)
    args.inner = sorted(set(args.inner))
    for outer, inner in settings(args):
        candidates = int(outer * args.pool)
        if candidates - int(inner * candidates) < 1:
            raise UsageError(
                f"--outer {outer} --inner {inner}: a pool of {args.pool} has no candidate; "
                "raise --pool"
            )
    return cli.freeze(args)


def settings(args) -> list[tuple[float, float]]:
    """Return (outer, inner) of every estimator; the first is NCE, whose ring is the whole pool."""
    nce = (1.0, 0.0)
    rings = [(outer, inner) for inner in args.inner for outer in args.outer]
    return [nce, *(ring for ring in rings if ring != nce)]


def name(outer: float, inner: float) -> str:
    if (outer, inner) == (1.0, 0.0):
        return "NCE"
    return f"ring {outer:g}/{inner:g}" if inner else f"ball {outer:g}"


# --------------------------------------------------------------------------- known quantities


def mutual_information(dim: int, rho: float) -> float:
    """Return the mutual information of the pair, -dim/2 log(1 - rho^2), in nats."""
    return -0.5 * dim * math.log1p(-rho * rho)


def draw_pairs(n: int, dim: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw x, y (n, dim), each standard normal.

    Coordinate i of x has correlation rho with coordinate i of y alone.
    """
    x, noise = torch.randn(2, n, dim, generator=generator)
    return x, rho * x + math.sqrt(1 - rho * rho) * noise


def critic(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """Return log p(y|x) / p(y) of every x (B, dim) with every y (N, dim): (B, N).

    The mean of its exponential over p(y) is 1.
    """
    dim = x.shape[1]
    rest = 1 - rho * rho
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return mutual_information(dim, rho) - (rho * rho * squares - 2 * rho * (x @ y.T)) / (2 * rest)


# ---------------------------------------------------------------------------------- estimators


def estimates(
    positive: Tensor, candidates: Tensor, sizes: list[int], generator: torch.Generator
) -> Tensor:
    """Return log K minus the loss, in nats, for every K of `sizes` and anchor: (len(sizes), B).

    positive (B,), candidates (B, M): scores of the positives and of their candidates. The set is
    the positive and K - 1 draws with replacement, as in IR; a smaller set is the beginning of a
    larger one.
    """
    b, m = candidates.shape
    rows = torch.randint(m, (b, max(sizes) - 1), generator=generator)
    drawn = candidates.gather(1, rows)
    nothing = candidates[:, :0]
    rule = negatives.Rule("all")
    values = []
    for k in sizes:
        loss = negatives.row_losses(drawn[:, : k - 1], nothing, positive, rule)
        values.append(math.log(k) - loss)
    return torch.stack(values)


def candidates(scores: Tensor, outer: float, inner: float) -> Tensor:
    """Return the scores (B, M) in the ring, from those (B, N) of a pool."""
    ranks = negatives.Rule("ring", inner).ranks(outer, scores.shape[1], len(scores))
    return negatives.select(scores, *ranks).scores


def simulate(args) -> dict[str, np.ndarray]:
    """Return means over a batch, for S settings, K sizes and R repeats.

    bias (S, K, R): the estimate minus the positives' own log ratio. The expectation of that ratio
    is exactly mutual information, so that the luck of the pairs drops out.
    whole (S, K, R): the estimate.
    given (S, K, R): the variance over pools and draws with the pair held fixed: half the squared
    difference between two estimates.
    above (S,): the share of anchors whose ring lies above the mean of exp(score), as the proof
    requires.
    """
    generator = torch.Generator().manual_seed(args.seed)
    rings = settings(args)
    bias, whole, given = torch.zeros(3, len(rings), len(args.k), args.repeats).double()
    above = torch.zeros(len(rings)).double()
    progress = Progress("Repeats: ", args.repeats, args.print_freq)
    for repeat in range(args.repeats):
        x, y = draw_pairs(args.pairs, args.dim, args.rho, generator)
        positive = critic(x, y, args.rho).diagonal()
        pools = []
        for _ in range(2):
            pool = torch.randn(args.pool, args.dim, generator=generator)
            pools.append(critic(x, pool, args.rho))
        for s, (outer, inner) in enumerate(rings):
            inside = [candidates(scores, outer, inner) for scores in pools]
            one, two = (estimates(positive, c, args.k, generator).double() for c in inside)
            bias[s, :, repeat] = (one - positive).mean(1)
            whole[s, :, repeat] = one.mean(1)
            given[s, :, repeat] = ((one - two).square() / 2).mean(1)
            above[s] += (inside[0].amin(1) > 0).double().mean() / args.repeats
        progress.update(args.pairs)
    progress.close()
    values = {"bias": bias, "whole": whole, "given": given, "above": above}
    return {key: value.numpy() for key, value in values.items()}


# ----------------------------------------------------------------------------------- intervals


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of the repeats (R,) and its 95 % interval (normal)."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def spread(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the standard deviation over repeats of `values` (R,), for every resample: (n,).

    weights (n, R): weights of the repeats in each resample, with the sum 1.
    """
    return np.sqrt(np.maximum(weights @ values**2 - (weights @ values) ** 2, 0))


def with_interval(values: np.ndarray) -> list[float]:
    """Return [values[0], low, high]: a value, and the interval of its resamples, the others."""
    return [values[0], *np.percentile(values[1:], LEVEL)]


def compare(args, means: dict[str, np.ndarray]) -> list[dict]:
    """Return one row for every setting and size, compared with mutual information and with NCE.

    means: the result of `simulate`.
    """
    information = mutual_information(args.dim, args.rho)
    equal = [1 / args.repeats] * args.repeats
    draws = np.random.default_rng(args.seed).multinomial(args.repeats, equal, RESAMPLES)
    # The first resample is the repeats as they are.
    weights = np.concatenate([np.ones((1, args.repeats)), draws]) / args.repeats
    rows = []
    for s, (outer, inner) in enumerate(settings(args)):
        for at, k in enumerate(args.k):
            bias = interval(means["bias"][s, at])
            minus_nce = interval(means["bias"][s, at] - means["bias"][0, at])
            given = np.sqrt(weights @ means["given"][s, at])
            given_ratio = with_interval(given / np.sqrt(weights @ means["given"][0, at]))
            batch = spread(means["whole"][s, at], weights)
            batch_ratio = with_interval(batch / spread(means["whole"][0, at], weights))
            row = {
                "estimator": name(outer, inner),
                "outer": outer,
                "inner": inner,
                "k": k,
                "above_mean": means["above"][s],
                "bias": bias,
                "estimate": [information + value for value in bias],
                "minus_nce": minus_nce,
                "sd_given_pair": with_interval(given),
                "sd_ratio_given_pair": given_ratio,
                "sd_batch": with_interval(batch),
                "sd_ratio_batch": batch_ratio,
                "below_mi": verdict(bias, 0),
                "below_nce": verdict(minus_nce, 0) if s else "-",
                "steadier_given_pair": verdict(given_ratio, 1) if s else "-",
                "steadier_batch": verdict(batch_ratio, 1) if s else "-",
            }
            rows.append(row)
    return rows


def verdict(value, bound: float) -> str:
    """Return whether a (value, low, high) is below the bound: "yes", "no", or "?" for both."""
    _, low, high = value
    if high <= bound:
        return "yes"
    return "no" if low > bound else "?"


def main(argv=None) -> None:
    args = parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    information = mutual_information(args.dim, args.rho)
    pair = f"{args.dim} coordinates, correlation {args.rho:g}"
    print(f"mutual information of the pair: {information:.4f} nats ({pair})")
    rows = compare(args, simulate(args))
    typed = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "ring/theory.py", *typed])
    text = theory_output.table(rows)
    batches = f"{args.repeats} repeats of {args.pairs} pairs; 95 % intervals"
    with files.replacing(os.path.join(args.out, "theory.md"), "w") as file:
        file.write(f"Mutual information {information:.4f} nats; {batches}.\n\n{text}\n\n")
        file.write(f"Made by `{command}`.\n")
    record = {
        "command": command,
        **environment(),
        "options": cli.flags(args),
        "mutual_information": information,
        "rows": rows,
    }
    files.write_json(os.path.join(args.out, "theory.json"), record)
    print(text)
    theory_output.draw(args, rows, information, os.path.join(args.out, "theory.png"))
    outputs = f"{args.out}/theory.png, theory.md, theory.json"
    print(f"result: mutual information {information:.3f}; {theory_output.tally(rows)} ({outputs})")


if __name__ == "__main__":
    cli.run(main)
