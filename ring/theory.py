#!/usr/bin/env python
"""The theory of conditional negatives by numbers: is the ring's estimate a lower bound, and does it vary less?

Conditional Negative Sampling (Wu et al., ICLR 2021, arXiv:2010.02037) proves that an estimate of mutual information whose
negatives are drawn near the anchor stays below the one with random negatives (NCE), and so below mutual information, with
more bias and less variance. The proof asks that every candidate scores above the mean of exp(score) over all. Here the two
sides are known: a Gaussian pair, the critic that is optimal for it, and the ring that trains (`ring.negatives`).

    python ring/theory.py --out runs/ring-theory
    python ring/theory.py --out runs/ring-theory-easy --dim 8 --rho 0.5
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import shlex

import numpy as np
import torch
from torch import Tensor

from common import UsageError, cli, files
from runner.progress import Progress
from runner.folder import environment
from ring import negatives

RESAMPLES, LEVEL = 1000, (2.5, 97.5)  # of the bootstrap over repeats; percentiles of its interval
LINE = dict(markersize=5, capsize=2.5, linewidth=1.4)
GREYS = ("0.0", "0.0", "0.35", "0.35", "0.6", "0.6")  # told apart without colour: by line and marker


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0])
    g = parser.add_argument_group("the pair")
    g.add_argument("--dim", type=cli.positive_int, default=8, help="independent coordinates of each of the two")
    g.add_argument("--rho", type=cli.number(float, above=0, most=0.999), default=0.7, help="correlation in each")
    g = parser.add_argument_group("the estimators")
    about = "sizes of the set that the positive is told from, itself included"
    g.add_argument("--k", type=cli.number(int, least=2), nargs="+", default=[4, 16, 64, 256, 1024, 4096], help=about)
    about = "outer thresholds: share of the pool that may be drawn, most similar first"
    g.add_argument("--outer", type=cli.share, nargs="+", default=[0.5, 0.2, 0.1, 0.05, 0.02], help=about)
    about = "inner thresholds: share of those that is left out, most similar first; 0 is the ball"
    g.add_argument("--inner", type=cli.number(float, least=0, most=0.99), nargs="+", default=[0, 0.1], help=about)
    g.add_argument("--pool", type=cli.number(int, least=2), default=8192, help="negatives to draw from (the bank)")
    g = parser.add_argument_group("run")
    g.add_argument("--out", required=True, metavar="DIR", help="folder for theory.png, theory.md and theory.json")
    g.add_argument("--repeats", type=cli.number(int, least=3), default=200, help="batches, each with two fresh pools")
    g.add_argument("--pairs", type=cli.positive_int, default=64, help="anchors in a batch")
    g.add_argument("--seed", type=cli.seed, default=0, help="of all draws")
    g.add_argument("-p", "--print-freq", type=cli.positive_int, default=20, help="repeats between progress lines")
    args = parser.parse_args(argv)
    args.k, args.outer = sorted(set(args.k)), sorted(set(args.outer), reverse=True)
    args.inner = sorted(set(args.inner))
    for outer, inner in settings(args):
        if int(outer * args.pool) - int(inner * int(outer * args.pool)) < 1:
            raise UsageError(f"--outer {outer} --inner {inner}: no candidate in a pool of {args.pool}; raise --pool")
    return args


def settings(args) -> list[tuple[float, float]]:
    """(outer, inner) of every estimator; the first is NCE, whose ring is the whole pool."""
    return [(1.0, 0.0)] + [(o, i) for i in args.inner for o in args.outer if (o, i) != (1.0, 0.0)]


def name(outer: float, inner: float) -> str:
    return "NCE" if (outer, inner) == (1.0, 0.0) else f"ring {outer:g}/{inner:g}" if inner else f"ball {outer:g}"


# ------------------------------------------------------------------------------------------------- what is known exactly


def mutual_information(dim: int, rho: float) -> float:
    """Of the pair, in nats: -dim/2 log(1 - rho^2)."""
    return -0.5 * dim * math.log1p(-rho * rho)


def draw_pairs(n: int, dim: int, rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x, y (n, dim): standard normal each, coordinate i of x has correlation rho with coordinate i of y alone."""
    x, noise = torch.randn(2, n, dim, generator=generator)
    return x, rho * x + math.sqrt(1 - rho * rho) * noise


def critic(x: Tensor, y: Tensor, rho: float) -> Tensor:
    """log p(y|x) / p(y) of every x (B, dim) with every y (N, dim): (B, N). The mean of its exponential over p(y) is 1."""
    dim, rest = x.shape[1], 1 - rho * rho
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return mutual_information(dim, rho) - (rho * rho * squares - 2 * rho * (x @ y.T)) / (2 * rest)


# ---------------------------------------------------------------------------------------------------------- estimators


def estimates(positive: Tensor, candidates: Tensor, sizes: list[int], generator: torch.Generator) -> Tensor:
    """log K minus the loss that trains, for every anchor and every K of `sizes`: (len(sizes), B), in nats.

    positive (B,) scores; candidates (B, M) scores of the negatives that may be drawn. The set is the positive and K - 1
    draws with replacement (as IR draws them); a smaller set is the beginning of a larger one.
    """
    b, m = candidates.shape
    drawn = candidates.gather(1, torch.randint(m, (b, max(sizes) - 1), generator=generator))
    nothing, rule = candidates[:, :0], negatives.Rule("all")
    losses = (negatives.row_losses(drawn[:, : k - 1], nothing, positive, rule) for k in sizes)
    return torch.stack([math.log(k) - loss for k, loss in zip(sizes, losses)])


def simulate(args) -> dict[str, np.ndarray]:
    """Means over a batch, for every setting S, size K and repeat R.

    bias (S, K, R): estimate minus the positives' own log ratio, whose expectation is mutual information exactly, so that
    the luck of the pairs drops out. whole (S, K, R): the estimate as it is. given (S, K, R): variance over pools and draws
    with the pair held fixed, half the squared difference between two. above (S,): share of anchors whose ring lies above
    the mean of exp(score), which the proof asks for.
    """
    generator, rings = torch.Generator().manual_seed(args.seed), settings(args)
    bias, whole, given = torch.zeros(3, len(rings), len(args.k), args.repeats).double()
    above = torch.zeros(len(rings)).double()
    progress = Progress("Repeats: ", args.repeats, args.print_freq)
    for repeat in range(args.repeats):
        x, y = draw_pairs(args.pairs, args.dim, args.rho, generator)
        positive = critic(x, y, args.rho).diagonal()
        pools = [critic(x, torch.randn(args.pool, args.dim, generator=generator), args.rho) for _ in range(2)]
        for s, (outer, inner) in enumerate(rings):
            found = [candidates(scores, outer, inner) for scores in pools]
            one, two = (estimates(positive, scores, args.k, generator).double() for scores in found)
            bias[s, :, repeat] = (one - positive).mean(1)
            whole[s, :, repeat] = one.mean(1)
            given[s, :, repeat] = ((one - two).square() / 2).mean(1)
            above[s] += (found[0].amin(1) > 0).double().mean() / args.repeats
        progress.update(args.pairs)
    progress.close()
    return {"bias": bias.numpy(), "whole": whole.numpy(), "given": given.numpy(), "above": above.numpy()}


def candidates(scores: Tensor, outer: float, inner: float) -> Tensor:
    """The scores (B, M) in the ring, of the scores (B, N) of a pool."""
    ranks = negatives.Rule("ring", inner).ranks(outer, scores.shape[1], len(scores))
    return negatives.select(scores, *ranks).scores


# ------------------------------------------------------------------------------------------------------------ intervals


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of the repeats (R,), and its 95 % interval (normal)."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def spread(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Standard deviation over repeats of `values` (R,), under each of the resamples' `weights` (n, R), which sum to 1."""
    return np.sqrt(np.maximum(weights @ values**2 - (weights @ values) ** 2, 0))


def compare(args, found: dict[str, np.ndarray]) -> list[dict]:
    """One row for every setting and size: what is estimated, and where it stands to mutual information and to NCE."""
    known = mutual_information(args.dim, args.rho)
    draws = np.random.default_rng(args.seed).multinomial(args.repeats, [1 / args.repeats] * args.repeats, RESAMPLES)
    weights = np.concatenate([np.ones((1, args.repeats)), draws]) / args.repeats  # the first: the repeats as they are

    def with_interval(values: np.ndarray) -> list[float]:
        return [values[0], *np.percentile(values[1:], LEVEL)]

    rows = []
    for s, (outer, inner) in enumerate(settings(args)):
        for at, k in enumerate(args.k):
            bias, whole, given = (found[key][s, at] for key in ("bias", "whole", "given"))
            nce = {key: found[key][0, at] for key in ("bias", "whole", "given")}
            row = dict(estimator=name(outer, inner), outer=outer, inner=inner, k=k, above_mean=found["above"][s])
            row["bias"] = interval(bias)
            row["estimate"] = [known + v for v in row["bias"]]
            row["minus_nce"] = interval(bias - nce["bias"])
            one, other = np.sqrt(weights @ given), np.sqrt(weights @ nce["given"])
            row |= dict(sd_given_pair=with_interval(one), sd_ratio_given_pair=with_interval(one / other))
            one, other = spread(whole, weights), spread(nce["whole"], weights)
            row |= dict(sd_batch=with_interval(one), sd_ratio_batch=with_interval(one / other))
            row["below_mi"] = verdict(row["bias"], 0)
            row["below_nce"] = verdict(row["minus_nce"], 0) if s else "-"
            row["steadier_given_pair"] = verdict(row["sd_ratio_given_pair"], 1) if s else "-"
            row["steadier_batch"] = verdict(row["sd_ratio_batch"], 1) if s else "-"
            rows.append(row)
    return rows


def verdict(value, bound: float) -> str:
    """Is it below the bound: yes, no, or the interval holds both."""
    _, low, high = value
    return "yes" if high <= bound else "no" if low > bound else "?"


# --------------------------------------------------------------------------------------------------------------- output

COLUMNS = (
    "estimator | K | estimate (nats) | below MI | minus NCE | below NCE | sd, pair fixed, / NCE | lower | "
    "sd of the batch mean / NCE | lower | ring above the mean"
)


def table(args, rows: list[dict]) -> str:
    """Markdown. Values with their 95 % intervals."""

    def cell(value, digits=3) -> str:
        mean, low, high = (f"{v:.{digits}f}" for v in value)
        return f"{mean} ({low} to {high})"

    lines = [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    for r in rows:
        cells = [r["estimator"], r["k"], cell(r["estimate"]), r["below_mi"], cell(r["minus_nce"]), r["below_nce"]]
        cells += [cell(r["sd_ratio_given_pair"], 2), r["steadier_given_pair"]]
        cells += [cell(r["sd_ratio_batch"], 2), r["steadier_batch"], f"{100 * r['above_mean']:.0f} %"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(args, rows: list[dict], path: str) -> None:
    """Four panels: the estimate over K, its standard deviation with the pair fixed and over batches, and over the outer
    threshold. Bars are 95 % intervals."""
    from matplotlib.figure import Figure  # half a second to import: not at start

    known = mutual_information(args.dim, args.rho)
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    (top, given), (over, batch) = figure.subplots(2, 2)
    top.set_title("Estimate (nats)")
    given.set_title("Standard deviation, the pair held fixed (nats)")
    batch.set_title(f"Standard deviation of the mean over {args.pairs} pairs (nats)")
    for number, setting in enumerate(shown := chosen(args)):
        mine = [r for r in rows if (r["outer"], r["inner"]) == setting]
        style = dict(color=GREYS[number], marker="oosDv^"[number], linestyle=("-", "--", "-", "-.", ":", "--")[number])
        style |= dict(markerfacecolor="white" if setting[1] else None, **LINE)
        beside = np.array(args.k) * 1.07 ** (number - len(shown) / 2)  # so that the bars do not cover each other
        for axes, key in ((top, "estimate"), (given, "sd_given_pair"), (batch, "sd_batch")):
            bars(axes, beside, [r[key] for r in mine], label=name(*setting), **style)
    top.axhline(known, color="0.0", linewidth=2.5, label="mutual information")
    for axes in (top, given, batch):
        axes.set(xscale="log", xlabel="K, the positive included", xticks=args.k, xticklabels=map(str, args.k))
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)

    k = args.k[len(args.k) // 2]
    over.set(
        title=f"Estimate over the outer threshold, K {k} (nats)",
        xscale="log",
        xlabel="outer threshold, share of the pool",
    )
    over.set(xticks=args.outer, xticklabels=[f"{o:g}" for o in args.outer])
    for number, inner in enumerate(args.inner):
        mine = [r for r in rows if r["inner"] == inner and r["estimator"] != "NCE" and r["k"] == k]
        style = dict(
            color=GREYS[2 * number % 6], marker="sD^v"[number % 4], linestyle=("-", "--", "-.", ":")[number % 4]
        )
        style |= dict(markerfacecolor="white" if inner else None, label=f"inner {inner:g}" + " (ball)" * (not inner))
        bars(over, [r["outer"] for r in mine], [r["estimate"] for r in mine], **style, **LINE)
    over.axhline(known, color="0.0", linewidth=2.5, label="mutual information")
    (nce,) = (r["estimate"][0] for r in rows if r["estimator"] == "NCE" and r["k"] == k)
    over.axhline(nce, color="0.0", linestyle=":", linewidth=1.4, label="NCE")
    over.legend(fontsize=9, framealpha=1)
    for axes in (top, given, over, batch):
        axes.minorticks_off()
        axes.grid(color="0.9")
    figure.suptitle(
        f"Gaussian pair, {args.dim} coordinates, correlation {args.rho:g}: {known:.2f} nats; "
        f"{args.repeats} repeats, 95 % intervals"
    )
    figure.savefig(path, dpi=100)


def bars(axes, x, values, **style) -> None:
    """A line with intervals: values are (value, low, high)."""
    middle, low, high = np.array(values).T
    axes.errorbar(x, middle, yerr=np.maximum([middle - low, high - middle], 0), **style)


def chosen(args) -> list[tuple[float, float]]:
    """The estimators of the plots over K, at most six: NCE, and the widest, middle and narrowest thresholds."""
    outer = args.outer[:: max(1, (len(args.outer) - 1) // 2)][:3]
    picked = [(1.0, 0.0)] + [(o, i) for o in outer for i in args.inner[-1:] + args.inner[:1] * (o != outer[-1])]
    return list(dict.fromkeys(s for s in picked if s in settings(args)))[:6]


def main(argv=None) -> None:
    args = parse_args(argv)
    files.make_folder(args.out)
    known = mutual_information(args.dim, args.rho)
    print(f"mutual information of the pair: {known:.4f} nats ({args.dim} coordinates, correlation {args.rho:g})")
    rows = compare(args, simulate(args))
    command = shlex.join(["python", "ring/theory.py", *(sys.argv[1:] if argv is None else argv)])
    text = table(args, rows)
    about = f"Mutual information {known:.4f} nats; {args.repeats} repeats of {args.pairs} pairs; 95 % intervals."
    with files.replacing(os.path.join(args.out, "theory.md"), "w") as file:
        file.write(f"{about}\n\n{text}\n\nMade by `{command}`.\n")
    draw(args, rows, os.path.join(args.out, "theory.png"))
    facts = dict(command=command, **environment(), options=cli.flags(args), mutual_information=known, rows=rows)
    files.write_json(os.path.join(args.out, "theory.json"), facts)
    print(text)
    print(f"result: mutual information {known:.3f}; {tally(rows)} ({args.out}/theory.png, theory.md, theory.json)")


def tally(rows: list[dict]) -> str:
    """How many of the rings are below what the theory puts above them."""
    rings, parts = [r for r in rows if r["estimator"] != "NCE"], []
    for key, what in (
        ("below_mi", "below it"), ("below_nce", "below NCE"), ("steadier_given_pair", "steadier with the pair fixed"),
        ("steadier_batch", "steadier over batches"),
    ):  # fmt: skip
        parts.append(f"{what} {sum(r[key] == 'yes' for r in rings)} of {len(rings)}")
    return ", ".join(parts)


if __name__ == "__main__":
    cli.run(main)
