"""The figures of plot_scores.py: curves of the statistics, a panel, histograms, a waterfall."""

from __future__ import annotations

import textwrap

import numpy as np

from common.figures import plain
from feature_transform.score_files import STATISTICS, Run

NAMES = list(STATISTICS)
LOGARITHMIC = ("exp_neg", "exp_pos")  # temperature changes their sizes by orders of magnitude
# Colours go from dark to light, so that they differ in grey, too; seven markers make 56 kinds.
COLOURS = (
    "#000000", "#0a5ea8", "#c8371a", "#0f9172", "#b3629b", "#e08f00", "#4fb0e6", "#8c8c8c",
)  # fmt: skip
MARKERS = {"o": 6, "s": 5.5, "^": 6.5, "D": 5.5, "v": 6.5, "P": 8, "X": 8}  # {marker: size}
DASHES = ("-", "--", ":", "-.")  # line styles of histograms
MARKS = 9  # the number of markers on a line
BINS = 50  # the number of bins of a histogram
THIN = 800  # the number of points on a line of the waterfall
DROP = {"linestyle": (0, (4, 3)), "linewidth": 0.9, "zorder": 0.5}  # line at a learning rate's fall
SIDES = {  # {statistic in a histogram: its description}
    "pos_mean": "similarity of a query to its positive",
    "neg_mean": "mean similarity of a query to its negatives",
}


def style(number: int, points: int, runs: int) -> dict:
    """Return the style of a run's line in every figure: its colour and its marker.

    Markers of different runs are at different places. number: that of the run. points: those on the
    line. runs: the number of runs in the figure.
    """
    step = max(1, points // MARKS)
    marker = list(MARKERS)[number % len(MARKERS)]
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": marker,
        "markevery": (int(step * (number % MARKS + 0.5) / min(runs, MARKS)), step),
        "markersize": MARKERS[marker],
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "linewidth": 1.5,
    }


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return for each iteration the mean of the finite values within `width` iterations around it.

    Windows are shorter at both ends.
    """
    if width == 1:
        return values
    there = np.isfinite(values)
    sums = np.cumsum(np.concatenate(([0.0], np.where(there, values, 0))))
    counts = np.cumsum(np.concatenate(([0], there)))
    at = np.arange(len(values))
    low = np.maximum(at - (width - 1) // 2, 0)
    high = np.minimum(at + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(there, means, np.nan)


def draw_curves(axes, runs: list[Run], name: str, args) -> None:
    """Draw one statistic of all runs over iterations, and where learning rates fall."""
    column = NAMES.index(name)
    for number, run in enumerate(runs):
        shown = run.iterations >= args.start
        x = run.iterations[shown]
        y = run.curves[shown, column]
        look = style(number, len(x), len(runs))
        if args.smooth > 1:
            axes.plot(x, y, color=look["color"], linewidth=0.6, alpha=0.25, zorder=1)
        line = {"marker": "", "linewidth": 1.5 if args.smooth > 1 else 1}
        axes.plot(x, smooth(y, args.smooth), **look | line)
        axes.plot(x, smooth(y, args.smooth), **look | {"linestyle": "", "zorder": 3})
    _draw_drops(axes, runs, args.start)
    axes.set(xlabel="iteration", title=STATISTICS[name][1])
    axes.title.set_fontsize(10)
    axes.grid(color="0.92")
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5, min_n_ticks=1)
    if name in LOGARITHMIC:
        axes.set_yscale("log")


def _draw_drops(axes, runs: list[Run], start: int) -> None:
    """Draw a vertical line where a learning rate falls, in a run's colour if it is its alone."""
    schedules = [tuple(run.drops) for run in runs]
    for number, drops in enumerate(schedules):
        if schedules.index(drops) != number:
            continue
        colour = "0.45"
        if schedules.count(drops) == 1 and len(runs) > 1:
            colour = style(number, 1, 1)["color"]
        for drop in drops:
            if drop >= start:
                axes.axvline(drop, color=colour, **DROP)


def entries(runs: list[Run], dashes=("-",)) -> tuple[list, list]:
    """Return handles and labels of a legend: the runs, and the vertical lines if there are any.

    dashes: line styles of the runs in turn; with several styles there are no vertical lines.
    """
    from matplotlib.lines import Line2D

    handles = []
    for number in range(len(runs)):
        look = style(number, 1, 1) | {"linestyle": dashes[number % len(dashes)]}
        handles.append(Line2D([], [], **look))
    labels = [run.title for run in runs]
    if len(dashes) == 1 and any(run.drops for run in runs):
        handles.append(Line2D([], [], color="0.45", **DROP))
        labels.append("learning rate falls")
    return handles, labels


def legend_below(figure, width: float, handles: list, labels: list, height: float) -> None:
    """Put the legend below axes `height` inches high, in as many columns as fit in `width`."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    labels = [plain(label) for label in labels]
    font = FontProperties(size=8)
    sizes = [text_to_path.get_text_width_height_descent(label, font, False) for label in labels]
    longest = max(width for width, *_ in sizes) / 72  # inches
    columns = max(1, min(len(labels), int((width - 0.1) / (longest + 0.55))))
    rows = -(-len(labels) // columns)
    figure.set_size_inches(width, height + 0.18 * rows)
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=columns, fontsize=8, frameon=False)


def curves(runs: list[Run], name: str, args):
    """Return the figure of one statistic."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw_curves(figure.subplots(), runs, name, args)
    legend_below(figure, 6.0, *entries(runs), 3.7)
    return figure


def panel(runs: list[Run], args):
    """Return the figure of all five statistics; the legend takes the sixth place if it fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 6.8), layout="constrained")
    *places, last = figure.subplots(2, 3).flat
    for axes, name in zip(places, NAMES):
        draw_curves(axes, runs, name, args)
    handles, labels = entries(runs)
    last.axis("off")
    wrapped = [textwrap.fill(label, 38, break_on_hyphens=False) for label in labels]
    lines = [line for label in wrapped for line in label.split("\n")]
    wrapped = [plain(label) for label in wrapped]
    high = 200 / (1.3 * len(lines) + 0.7 * len(labels))
    wide = 265 / (0.62 * max(map(len, lines)) + 3.5)
    size = min(10.5, high, wide)
    if size < 7:  # the legend does not fit
        legend_below(figure, 12.6, handles, labels, 6.8)
    else:
        last.legend(
            handles, wrapped, loc="center left", fontsize=size, frameon=False, labelspacing=0.7
        )
    return figure


# -------------------------------------------------------------------------------------- histograms


def histograms(runs: list[Run], epochs: list[int]):
    """Return the figure of the histograms over all queries, with a row for each epoch.

    They show the similarity to the positive, and the mean similarity to the negatives.
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    grid = figure.subplots(len(epochs), 2, squeeze=False, sharex="col")
    for side, (name, title) in enumerate(SIDES.items()):
        column = NAMES.index(name)
        values = {
            (epoch, number): run.queries(epoch, column)
            for epoch in epochs
            for number, run in enumerate(runs)
            if epoch in run.files
        }
        values = {place: queries for place, queries in values.items() if len(queries)}
        edges = _edges(values)
        for epoch, axes in zip(epochs, grid[:, side]):
            for number in range(len(runs)):
                if (epoch, number) in values:
                    _draw_histogram(axes, values[epoch, number], edges, number, len(runs))
            axes.set_ylim(bottom=0)
            axes.set(yticks=[], ylabel="" if side else "share of queries")
            axes.grid(color="0.92")
            axes.set_title(f"epoch {epoch}", fontsize=10, loc="left")
        grid[-1, side].set_xlabel(title)
    legend_below(figure, 9.2, *entries(runs, DASHES), 0.5 + 2.4 * len(epochs))
    return figure


def _edges(values: dict) -> np.ndarray:
    """Return the edges of BINS bins over all values, with an empty bin at each end."""
    low = min((queries.min() for queries in values.values()), default=0)
    high = max((queries.max() for queries in values.values()), default=0)
    width = max(high - low, 1e-3) / BINS
    return low + width * np.arange(-1, BINS + 2)


def _draw_histogram(axes, queries: np.ndarray, edges: np.ndarray, number: int, runs: int) -> None:
    """Draw the histogram of run `number` of `runs`."""
    density, _ = np.histogram(queries, edges, density=True)
    look = style(number, BINS, runs)
    look |= {"linewidth": 1.3, "linestyle": DASHES[number % len(DASHES)]}
    filled = np.flatnonzero(density)
    look["markevery"] = filled[number % 4 :: max(3, len(filled) // 5)].tolist()
    middle = (edges[1:] + edges[:-1]) / 2
    if runs < 5:
        colour = look["color"]
        axes.fill_between(middle, density, step="mid", color=colour, alpha=0.1, linewidth=0)
    axes.plot(middle, density, drawstyle="steps-mid", **look)


# --------------------------------------------------------------------------------------- waterfall


def waterfall(order: list[tuple[str, int]], runs: list[Run], name: str, flag: str, args):
    """Return the figure of one statistic's curves, one behind the other, by the value of a flag.

    order: (value, number of the run). Return None where no run has values.
    """
    from matplotlib.figure import Figure
    from mpl_toolkits import mplot3d  # noqa: F401, which makes the projection known

    lines = [_line(runs[number], name, args) for _, number in order]
    drawn = [line for line in lines if len(line[0])]
    if not drawn:
        return None
    crowd = max(1, len(order) / 8)  # so that each line and its value have the room of one of eight
    figure = Figure(figsize=(6.2 * crowd**0.5, 4.5 * crowd**0.5))
    axes = figure.add_axes((-0.1, -0.07, 1.08, 1.15), projection="3d")
    low = min(z.min() for _, z in drawn)
    high = max(z.max() for _, z in drawn)
    low = min(low, 0) if name == "neg_variance" else low - 0.05 * (high - low) - 1e-6
    thinned = [(x[_thin(x)], z[_thin(x)]) for x, z in lines]
    for place in reversed(range(len(order))):
        if len(thinned[place][0]):
            look = style(order[place][1], len(thinned[place][0]), len(order))
            _draw_line(axes, place, *thinned[place], low, look)
    end = max(args.start + 1, *(x[-1] for x, _ in thinned if len(x)))
    axes.set(xlim=(args.start, end), ylim=(-0.4, len(order) - 0.6), zlim=(low, high))
    axes.set_yticks(range(len(order)), [plain(value) for value, _ in order], ha="left")
    axes.set_xlabel("iteration", labelpad=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5, min_n_ticks=1)
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((1.35, 1.1 * crowd, 0.8), zoom=0.95)
    scale = "logarithm to base 10 of " if name in LOGARITHMIC else ""
    title = f"{scale}{STATISTICS[name][1]}, by {flag}"
    figure.suptitle(plain(title), fontsize=10, y=0.97)
    return figure


def _line(run: Run, name: str, args) -> tuple[np.ndarray, np.ndarray]:
    """Return the iterations and values of a run's line in the waterfall."""
    column = NAMES.index(name)
    shown = (run.iterations >= args.start) & np.isfinite(run.curves[:, column])
    values = smooth(run.curves[shown, column], args.smooth)
    if name in LOGARITHMIC:
        values = np.log10(values)
    return run.iterations[shown], values


def _thin(x: np.ndarray) -> slice:
    """Return a slice that leaves about THIN places of x."""
    return slice(None, None, max(1, len(x) // THIN))


def _draw_line(axes, place: int, x: np.ndarray, z: np.ndarray, low: float, look: dict) -> None:
    """Draw one line of the waterfall, and shade the area under it down to `low`."""
    from matplotlib.collections import PolyCollection

    outline = [(x[0], low), *zip(x, z), (x[-1], low)]
    under = PolyCollection([outline], facecolors=look["color"], alpha=0.12, linewidths=0)
    axes.add_collection3d(under, zs=place, zdir="y")
    look |= {"linewidth": 1, "markersize": 4.5, "markevery": max(1, len(x) // MARKS)}
    axes.plot(x, np.full(len(x), place), z, **look)
