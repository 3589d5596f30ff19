"""Draw a study: its runs with every seed, and the differences that its claims are about."""

from __future__ import annotations

import statistics

from common import files
from tools import claim_records
from tools.claim_records import NAMES, Comparison, Setting

ROW = 0.32  # inches
BLUE = "#0072b2"


def draw(path: str, setting: Setting, claims: list[Comparison]) -> None:
    """Write the figure: one panel for each number of the study, and one for its claims.

    A dot is a seed, a bar a mean; the line of a claim is the 95 % interval of its difference.
    """
    from matplotlib.figure import Figure  # this import takes half a second

    told = [claim for claim in claims if claim.sides() and claim.differences()[claim.number]]
    runs = [run for run in setting.runs if setting.seeds(run)]
    panels = len(setting.numbers) + bool(told)
    height = ROW * max(len(runs), len(told), 3) + 1
    figure = Figure(figsize=(4.4 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, key in zip(axes, setting.numbers):
        _draw_runs(axis, setting, runs, key)
    if told:
        _draw_claims(axes[-1], told)
    files.write_figure(figure, path, "figure", dpi=150)


def _draw_runs(axis, setting: Setting, runs: list[str], key: str) -> None:
    for row, run in enumerate(runs):
        values = setting.values(run, key)
        axis.plot(values, [row] * len(values), "o", color=BLUE, alpha=0.5, markersize=5)
        axis.plot(statistics.mean(values), row, "|", color="black", markersize=14)
    axis.set_yticks(range(len(runs)), runs)
    axis.invert_yaxis()
    axis.set_xlabel(f"{NAMES.get(key, key)}, %")
    axis.grid(axis="x", alpha=0.3)


def _draw_claims(axis, claims: list[Comparison]) -> None:
    main = claims[0].setting.numbers[0]
    names = []
    for row, claim in enumerate(claims):
        values = claim.differences()[claim.number]
        mean = statistics.mean(values)
        half = claim_records.interval(values)
        axis.errorbar(mean, row, xerr=half, fmt="o", color=BLUE, capsize=3)
        number = "" if claim.number == main else f" ({NAMES.get(claim.number, claim.number)})"
        names.append(f"{claim.claim['better']}\n− {claim.claim['than']}{number}")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(f"difference in {NAMES.get(main, main)}, 95 %")
    axis.grid(axis="x", alpha=0.3)
