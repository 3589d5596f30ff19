"""Draw the runs of a study with every seed, and the differences that claims are about.

The differences are those at the end of training, and for k-NN also those during it.
"""

from __future__ import annotations

import re
import statistics

from common import UserError, files
from tools import claim_records
from tools.claim_records import NAMES, Comparison, Setting

ROW = 0.32  # inches
BLUE = "#0072b2"
ORANGE = "#d55e00"
COLUMNS = 4  # of panels
MOST_GAIN = 10  # points; larger published gains are written, to show the others
VERDICTS = {"agrees": "#009e73", "does not agree": "#cc3311", "cannot be told": "black"}
STYLES = ("-", "--", ":")  # of the lines of seeds


def draw(path: str, setting: Setting | None, claims: list[Comparison]) -> None:
    """Write the figure: one panel for each number of the study, and below them one for the claims.

    setting: of the study, or None to draw claims alone. A dot is a seed, a bar a mean; the line of
    a claim is the 95 % interval of its difference in the colour of its verdict, and a diamond the
    published gain. Dots are hollow where there are too few seeds for an interval. Raises UserError
    where there is nothing to draw.
    """
    from matplotlib.figure import Figure  # this import takes half a second

    told = [claim for claim in claims if claim.sides() and claim.differences()[claim.number]]
    numbers = setting.numbers if setting else []
    runs = [run for run in setting.runs if setting.seeds(run)] if setting else []
    if not numbers and not told:
        raise UserError("--figure: no claim has records to draw; make them with --run")
    columns = min(max(len(numbers), 1), COLUMNS)
    rows = -(-len(numbers) // columns)
    heights = [max(len(runs), 3)] * rows + ([max(len(told), 3)] if told else [])
    width = 3.6 * columns + 1 if setting else 9
    size = (width, ROW * sum(heights) + 0.8 * len(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for number, key in enumerate(numbers):
        row, column = divmod(number, columns)
        axis = figure.add_subplot(grid[row, column])
        _draw_runs(axis, setting, runs, key)
        axis.set_yticks(range(len(runs)), [""] * len(runs) if column else runs)
    if told:
        _draw_claims(figure.add_subplot(grid[rows, :]), told, with_papers=setting is None)
    files.write_figure(figure, path, dpi=150)


def _draw_runs(axis, setting: Setting, runs: list[str], key: str) -> None:
    for row, run in enumerate(runs):
        try:
            values = setting.values(run, key)
        except UserError:  # its steps do not record this number
            continue
        axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.5, markersize=5)
        axis.plot(statistics.mean(values), row, "|", color="black", markersize=14)
    axis.invert_yaxis()
    axis.set_xlabel(NAMES.get(key, key))
    axis.grid(axis="x", alpha=0.3)


def published_gain(text: str) -> float | None:
    """Return the points between two published numbers, "77.88 to 79.35 (...)"; None of others."""
    numbers = re.match(r"([\d.]+) to ([\d.]+)", text)
    return abs(float(numbers[2]) - float(numbers[1])) if numbers else None


def _draw_claims(axis, claims: list[Comparison], with_papers: bool) -> None:
    main = claims[0].setting.numbers[0]
    names = []
    for row, claim in enumerate(claims):
        values = claim.differences()[claim.number]
        verdict = claim_records.verdict(values)
        if verdict in VERDICTS:
            bar = dict(fmt="|", color=VERDICTS[verdict], capsize=3, label=f"95 %: {verdict}")
            half = claim_records.interval(values)
            axis.errorbar(statistics.mean(values), row, xerr=half, **bar)
            axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.4, label="a seed")
        else:
            hollow = dict(color=BLUE, fillstyle="none", label="a seed, too few for an interval")
            axis.plot(values, [row] * len(values), "o", **hollow)
        number = "" if claim.number == main else f" ({NAMES.get(claim.number, claim.number)})"
        paper = f"{claim.paper}: " if with_papers else ""
        names.append(f"{paper}{claim.pair()}{number}")
        gain = published_gain(claim.claim["published"])
        if gain is not None and gain < MOST_GAIN:
            axis.plot(gain, row, "d", color=ORANGE, label="published, on other data")
        elif gain is not None:
            place = dict(transform=axis.get_yaxis_transform(), va="center", fontsize="small")
            axis.text(0.01, row, f"published, on other data: {gain:.1f}", color=ORANGE, **place)
    axis.axvline(0, color="black", linewidth=0.8)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles.keys(), fontsize="small", loc="best")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    others = ", unless another is named" if {claim.number for claim in claims} != {main} else ""
    axis.set_xlabel(f"difference in points, {NAMES.get(main, main)} accuracy{others}")
    axis.grid(axis="x", alpha=0.3)


def draw_curves(path: str, claims: list[Comparison]) -> None:
    """Write the figure of differences in k-NN in the course of training: one panel for each paper.

    A line is a seed, and a dot an epoch at which both runs were evaluated, at the k-NN accuracy
    that the other run had then. Raises UserError where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn: dict[str, dict[str, list]] = {}
    for claim in claims:
        curves = claim.courses("knn_acc1")
        if curves:
            drawn.setdefault(claim.paper, {})[claim.pair()] = curves
    if not drawn:
        raise UserError("--curves: no claim has runs that logged k-NN in the course of training")
    rows = -(-len(drawn) // (COLUMNS - 1))
    columns = -(-len(drawn) // rows)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(drawn) :]:
        axis.remove()
    for axis, (paper, curves_of) in zip(axes, drawn.items()):
        for color, (name, curves) in enumerate(curves_of.items()):
            for seed, curve in enumerate(curves):
                style = STYLES[seed % len(STYLES)]
                line = dict(marker="o", markersize=3, linewidth=1, linestyle=style)
                label = name if seed == 0 else None
                axis.plot(*zip(*curve), color=f"C{color}", label=label, **line)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(paper, fontsize="medium")
        axis.legend(fontsize="x-small", loc="best")
        axis.grid(alpha=0.3)
        axis.margins(y=0.3)
    figure.supxlabel("k-NN accuracy of the other run at the same epoch", fontsize="medium")
    figure.supylabel("difference in k-NN accuracy, points", fontsize="medium")
    files.write_figure(figure, path, dpi=150)
