"""The table and the picture of ring/theory.py: estimates and their standard deviations."""

from __future__ import annotations

import numpy as np

from common import files

LINE = {"markersize": 5, "capsize": 2.5, "linewidth": 1.4}
GREYS = ("0.0", "0.0", "0.35", "0.35", "0.6", "0.6")  # line and marker tell equal ones apart
MARKERS = "oosDv^"
LINES = ("-", "--", "-", "-.", ":", "--")
OVER_MARKERS = "sD^v"  # in the panel over the outer threshold, one for each inner threshold
OVER_LINES = ("-", "--", "-.", ":")


def draw(args, rows: list[dict], information: float, path: str) -> None:
    """Draw four panels with 95 % intervals.

    They show the estimate over K, its standard deviation with the pair fixed and over batches, and
    the estimate over the outer threshold. rows: those of `theory.compare`. information: the mutual
    information.
    """
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    figure = Figure(figsize=(11, 8.6), layout="constrained")
    (top, given), (over, batch) = figure.subplots(2, 2)
    top.set_title("Estimate (nats)")
    given.set_title("Standard deviation, the pair held fixed (nats)")
    batch.set_title(f"Standard deviation of the mean over {args.pairs} pairs (nats)")
    keys = ("estimate", "sd_given_pair", "sd_batch")
    _over_sizes(args, rows, information, dict(zip(keys, (top, given, batch))))
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    _over_thresholds(args, rows, information, over)
    for axes in (top, given, over, batch):
        axes.minorticks_off()
        axes.grid(color="0.9")
    figure.suptitle(
        f"Gaussian pair, {args.dim} coordinates, correlation {args.rho:g}: {information:.2f} nats; "
        f"{args.repeats} repeats, 95 % intervals"
    )
    files.write_figure(figure, path, dpi=100)


def _over_sizes(args, rows: list[dict], information: float, panels: dict) -> None:
    """Draw values over K. panels: {key of a row: axes}."""
    estimators = chosen(rows)
    for number, estimator in enumerate(estimators):
        mine = [row for row in rows if row["estimator"] == estimator]
        shift = 1.07 ** (number - len(estimators) / 2)  # so that bars do not cover each other
        for key, axes in panels.items():
            _bars(
                axes,
                np.array(args.k) * shift,
                [row[key] for row in mine],
                label=estimator,
                color=GREYS[number],
                marker=MARKERS[number],
                linestyle=LINES[number],
                markerfacecolor="white" if mine[0]["inner"] else None,
                **LINE,
            )
    panels["estimate"].axhline(information, color="0.0", linewidth=2.5, label="mutual information")
    for axes in panels.values():
        ticks = {"xticks": args.k, "xticklabels": list(map(str, args.k))}
        axes.set(xscale="log", xlabel="K, the positive included", **ticks)


def _over_thresholds(args, rows: list[dict], information: float, axes) -> None:
    """Draw the estimates of a middle K over the outer threshold."""
    k = args.k[len(args.k) // 2]
    rows = [row for row in rows if row["k"] == k]
    axes.set(
        title=f"Estimate over the outer threshold, K {k} (nats)",
        xscale="log",
        xlabel="outer threshold, share of the pool",
    )
    axes.set(xticks=args.outer, xticklabels=[f"{outer:g}" for outer in args.outer])
    for number, inner in enumerate(args.inner):
        mine = [row for row in rows if row["inner"] == inner and row["estimator"] != "NCE"]
        if not mine:  # everything: that is NCE
            continue
        _bars(
            axes,
            [row["outer"] for row in mine],
            [row["estimate"] for row in mine],
            label=f"inner {inner:g}" if inner else "inner 0 (ball)",
            color=GREYS[2 * number % 6],
            marker=OVER_MARKERS[number % 4],
            linestyle=OVER_LINES[number % 4],
            markerfacecolor="white" if inner else None,
            **LINE,
        )
    axes.axhline(information, color="0.0", linewidth=2.5, label="mutual information")
    (nce,) = (row["estimate"][0] for row in rows if row["estimator"] == "NCE")
    axes.axhline(nce, color="0.0", linestyle=":", linewidth=1.4, label="NCE")
    axes.legend(fontsize=9, framealpha=1)


def _bars(axes, x, values, **style) -> None:
    """Draw a line with intervals. values: a (value, low, high) for each x."""
    middle, low, high = np.array(values).T
    axes.errorbar(x, middle, yerr=np.maximum([middle - low, high - middle], 0), **style)


def chosen(rows: list[dict]) -> list[str]:
    """Return the estimators of the panels over K, at most six.

    They are NCE, and the widest, a middle and the narrowest outer threshold with the largest inner
    one; the widest and the middle one come with the smallest inner one, too.
    """
    names = {(row["outer"], row["inner"]): row["estimator"] for row in rows}
    thresholds = [pair for pair, name in names.items() if name != "NCE"]
    outers = sorted({outer for outer, _ in thresholds}, reverse=True)
    inners = sorted({inner for _, inner in thresholds})
    places = (0, len(outers) // 2, len(outers) - 1)
    outers = [outer for place, outer in enumerate(outers) if place in places]
    picked = [(1.0, 0.0)]
    for outer in outers:
        picked.append((outer, inners[-1]))
        if outer != outers[-1]:
            picked.append((outer, inners[0]))
    return list(dict.fromkeys(names[pair] for pair in picked if pair in names))[:6]


COLUMNS = (
    "estimator | K | estimate (nats) | below MI | minus NCE | below NCE | sd, pair fixed, / NCE | "
    "lower | sd of the batch mean / NCE | lower | ring above the mean"
)


def table(rows: list[dict]) -> str:
    """Return a Markdown table of the rows, with 95 % intervals."""

    def cell(value, digits=3) -> str:
        mean, low, high = (f"{v:.{digits}f}" for v in value)
        return f"{mean} ({low} to {high})"

    lines = [f"| {COLUMNS} |", "|" + "---|" * len(COLUMNS.split("|"))]
    for row in rows:
        cells = [
            row["estimator"],
            str(row["k"]),
            cell(row["estimate"]),
            row["below_mi"],
            cell(row["minus_nce"]),
            row["below_nce"],
            cell(row["sd_ratio_given_pair"], 2),
            row["steadier_given_pair"],
            cell(row["sd_ratio_batch"], 2),
            row["steadier_batch"],
            f"{100 * row['above_mean']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tally(rows: list[dict]) -> str:
    """Return, as text, the number of rings for which each statement of the theory holds."""
    rings = [row for row in rows if row["estimator"] != "NCE"]
    questions = {
        "below_mi": "below it",
        "below_nce": "below NCE",
        "steadier_given_pair": "steadier with the pair fixed",
        "steadier_batch": "steadier over batches",
    }
    counts = {key: sum(row[key] == "yes" for row in rings) for key in questions}
    return ", ".join(f"{text} {counts[key]} of {len(rings)}" for key, text in questions.items())
