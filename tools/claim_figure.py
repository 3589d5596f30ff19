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
MOST_GAIN = 10  # points; marks of larger published gains are left out, to show the others


def draw(path: str, setting: Setting | None, claims: list[Comparison]) -> None:
    """Write the figure: one panel for each number of the study, and one for the claims.

    setting: of the study, or None to draw claims alone. A dot is a seed, a bar a mean; the line of
    a claim is the 95 % interval of its difference, and a diamond the published gain. Raises
    UserError where there is nothing to draw.
    """
    from matplotlib.figure import Figure  # this import takes half a second

    told = [claim for claim in claims if claim.sides() and claim.differences()[claim.number]]
    numbers = setting.numbers if setting else []
    runs = [run for run in setting.runs if setting.seeds(run)] if setting else []
    panels = len(numbers) + bool(told)
    if not panels:
        raise UserError("--figure: no claim has records to draw; make them with --run")
    columns = min(panels, COLUMNS)
    rows = -(-panels // COLUMNS)
    height = ROW * max(len(runs), len(told), 3) + 0.8
    width = 3.6 * columns + 1 if setting else 9
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[panels:]:
        axis.remove()
    for number, (axis, key) in enumerate(zip(axes, numbers)):
        _draw_runs(axis, setting, runs, key)
        axis.set_yticks(range(len(runs)), runs if number % columns == 0 else [""] * len(runs))
    if told:
        _draw_claims(axes[panels - 1], told, with_papers=setting is None)
    files.write_figure(figure, path, dpi=150)


def _draw_runs(axis, setting: Setting, runs: list[str], key: str) -> None:
    for row, run in enumerate(runs):
        values = setting.values(run, key)
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
        axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.4, label="a seed")
        mean = statistics.mean(values)
        half = claim_records.interval(values)
        axis.errorbar(mean, row, xerr=half, fmt="|", color="black", capsize=3, label="mean, 95 %")
        number = "" if claim.number == main else f" ({NAMES.get(claim.number, claim.number)})"
        paper = f"{claim.paper}: " if with_papers else ""
        names.append(f"{paper}{claim.pair()}{number}")
        gain = published_gain(claim.claim["published"])
        if gain is not None and gain < MOST_GAIN:
            axis.plot(gain, row, "d", color=ORANGE, label="published, on other data")
    axis.axvline(0, color="black", linewidth=0.8)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles.keys(), fontsize="small", loc="best")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(f"difference in {NAMES.get(main, main)} accuracy, points")
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
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis in axes[len(drawn) :]:
        axis.remove()
    for axis, (paper, curves_of) in zip(axes, drawn.items()):
        for color, (name, curves) in enumerate(curves_of.items()):
            for curve in curves:
                axis.plot(*zip(*curve), "o-", color=f"C{color}", markersize=3, linewidth=1)
            axis.lines[-1].set_label(name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(paper, fontsize="medium")
        axis.legend(fontsize="x-small", loc="best")
        axis.grid(alpha=0.3)
        axis.margins(y=0.2)
        axis.tick_params(labelleft=True)
    figure.supxlabel("k-NN accuracy of the other run at the same epoch", fontsize="medium")
    figure.supylabel("difference in k-NN accuracy, points", fontsize="medium")
    files.write_figure(figure, path, dpi=150)
