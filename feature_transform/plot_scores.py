#!/usr/bin/env python
"""Figures of the scores that runs have kept: what contrastive learning does to positive and negative similarities.

Rui Zhu, Bingchen Zhao, Jingen Liu, Zhenglong Sun, Chang Wen Chen. Improving Contrastive Learning by Visualizing Feature
Transformation. ICCV 2021, arXiv:2108.02982. Runs of every paper here, trained with --save_score, and the authors' own files;
runs of different methods and lengths go into one figure. What is written: a figure of each statistic over iterations, all of
them in a panel, histograms at some epochs, with --sweep a waterfall over a setting.

    python feature_transform/plot_scores.py runs/moco0.99 runs/moco0.5 --out figures
    python feature_transform/plot_scores.py runs --sweep alpha --smooth 50 --epochs 1,5,10 --formats png,pdf
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import textwrap
from pathlib import Path

import numpy as np

from common import UsageError, UserError, cli, files, printable
from feature_transform.score_files import STATISTICS, Run, read_runs

FORMATS = ("png", "pdf", "svg")
NAMES = list(STATISTICS)
LOGARITHMIC = ("exp_neg", "exp_pos")  # their sizes differ by orders of magnitude between temperatures
# From dark to light, so that they differ in grey, too; together with seven markers of 56 kinds of lines.
COLOURS = ("#000000", "#0a5ea8", "#c8371a", "#0f9172", "#b3629b", "#e08f00", "#4fb0e6", "#8c8c8c")
MARKERS = {"o": 6, "s": 5.5, "^": 6.5, "D": 5.5, "v": 6.5, "P": 8, "X": 8}  # and their sizes
DASHES = ("-", "--", ":", "-.")  # of histograms
MARKS, BINS, THIN = 9, 50, 800  # markers on a line; bins of a histogram; points on a line of the waterfall
DROP = dict(linestyle=(0, (4, 3)), linewidth=0.9, zorder=0.5)


def numbers(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers from 1, with commas: 1,5,10")
    return found


def formats(text: str) -> list[str]:
    found = [part.strip().lower() for part in text.split(",")]
    if not set(found) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(FORMATS)}")
    return list(dict.fromkeys(found))


def parse_args(argv=None):
    parser = cli.Parser(prog="plot_scores.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    parser.add_argument("--out", default="figures", metavar="DIR", help="folder for the figures")
    parser.add_argument("--formats", type=formats, default="png", help=f"with commas: {', '.join(FORMATS)}")
    about = "the runs' names, with commas; default: what differs between their settings"
    parser.add_argument("--labels", metavar="A,B,...", help=about)
    about = "a waterfall of curves over this flag of the runs, such as alpha (MoCo's momentum)"
    parser.add_argument("--sweep", metavar="FLAG", help=about)
    about = (
        "histograms at these epochs, from 1, with commas; default: the first and the last that all runs have. The files hold "
        "statistics of each query: these are histograms of its similarity to the positive, and of its mean over the negatives"
    )
    parser.add_argument("--epochs", type=numbers, metavar="N,N,...", help=about)
    about = "moving average over so many iterations, what it smooths behind it; default: off, as published"
    parser.add_argument("--smooth", type=cli.positive_int, default=1, metavar="N", help=about)
    about = "first iteration that is drawn (published: 550); a start from random weights dwarfs the rest"
    parser.add_argument("--start", type=cli.positive_int, default=1, metavar="N", help=about)
    about = "also write the curves as TensorBoard scalars, beside those of each run, or below DIR"
    parser.add_argument("--tensorboard", nargs="?", const=True, metavar="DIR", help=about)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------- figures


def style(number: int, points: int, runs: int) -> dict:
    """Of a run's line in every figure: colour and marker, markers of different runs at different places."""
    step, marker = max(1, points // MARKS), list(MARKERS)[number % len(MARKERS)]
    return dict(
        color=COLOURS[number % len(COLOURS)],
        marker=marker,
        markevery=(int(step * (number % MARKS + 0.5) / min(runs, MARKS)), step),
        markersize=MARKERS[marker],
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.5,
    )


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` iterations around each, of those that are there; shorter windows at both ends."""
    if width == 1:
        return values
    there = np.isfinite(values)
    sums = np.cumsum(np.concatenate(([0.0], np.where(there, values, 0))))
    counts = np.cumsum(np.concatenate(([0], there)))
    at = np.arange(len(values))
    low, high = np.maximum(at - (width - 1) // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return np.where(there, (sums[high] - sums[low]) / (counts[high] - counts[low]), np.nan)


def draw_curves(axes, runs: list[Run], name: str, args) -> None:
    """One statistic of all runs over iterations, and where learning rates fall."""
    column = NAMES.index(name)
    shared = [tuple(r.drops) for r in runs]
    for number, one in enumerate(runs):
        shown = one.iterations >= args.start
        x, y = one.iterations[shown], one.curves[shown, column]
        look = style(number, len(x), len(runs))
        if args.smooth > 1:
            axes.plot(x, y, color=look["color"], linewidth=0.6, alpha=0.25, zorder=1)
        axes.plot(x, smooth(y, args.smooth), **look | dict(marker="", linewidth=1.5 if args.smooth > 1 else 1))
        axes.plot(x, smooth(y, args.smooth), **look | dict(linestyle="", zorder=3))
        alone = shared.count(shared[number]) == 1 < len(runs)
        for drop in one.drops if shared.index(shared[number]) == number else ():
            if drop >= args.start:
                axes.axvline(drop, color=look["color"] if alone else "0.45", **DROP)
    axes.set(xlabel="iteration", title=STATISTICS[name][1])
    axes.title.set_fontsize(10)
    axes.grid(color="0.92")
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    if name in LOGARITHMIC:
        axes.set_yscale("log")


def entries(runs: list[Run], dashes=("-",)) -> tuple[list, list]:
    """Handles and labels of a legend: the runs, and what vertical lines are."""
    from matplotlib.lines import Line2D

    looks = [style(number, 1, 1) | dict(linestyle=dashes[number % len(dashes)]) for number in range(len(runs))]
    handles, labels = [Line2D([], [], **look) for look in looks], [one.title for one in runs]
    if len(dashes) == 1 and any(one.drops for one in runs):
        handles, labels = [*handles, Line2D([], [], color="0.45", **DROP)], [*labels, "learning rate falls"]
    return handles, labels


def legend_below(figure, width: float, handles: list, labels: list, height: float) -> None:
    """The legend under what is `height` inches high, in as many columns as fit into the width."""
    from matplotlib.textpath import TextPath

    longest = max(TextPath((0, 0), label, size=8).get_extents().width for label in labels) / 72  # inches
    columns = max(1, min(len(labels), int((width - 0.1) / (longest + 0.55))))
    rows = -(-len(labels) // columns)
    figure.set_size_inches(width, height + 0.18 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def curves(runs: list[Run], name: str, args):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, runs, name, args)
    legend_below(figure, 6.0, *entries(runs), 3.7)
    return figure


def panel(runs: list[Run], args):
    """All five statistics; the sixth place is the legend's, where that is small enough."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 6.8), layout="constrained")
    *places, last = figure.subplots(2, 3).flat
    for axes, name in zip(places, NAMES):
        draw_curves(axes, runs, name, args)
    handles, labels = entries(runs)
    last.axis("off")
    wrapped = [textwrap.fill(label, 38, break_on_hyphens=False) for label in labels]
    lines = [line for label in wrapped for line in label.split("\n")]
    size = min(10.5, 200 / (1.3 * len(lines) + 0.7 * len(labels)), 265 / (0.62 * max(map(len, lines)) + 3.5))
    if size < 7:  # more than it has room for
        legend_below(figure, 12.6, handles, labels, 6.8)
    else:
        last.legend(handles, wrapped, loc="center left", fontsize=size, frameon=False, labelspacing=0.7)
    return figure


def histograms(runs: list[Run], epochs: list[int]):
    """A row for each epoch: the queries' similarity to the positive, and their mean similarity to the negatives."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    grid = figure.subplots(len(epochs), 2, squeeze=False, sharex="col")
    for side, (name, what) in enumerate(
        (
            ("pos_mean", "similarity of a query to its positive"),
            ("neg_mean", "mean similarity of a query to its negatives"),
        )
    ):
        column = NAMES.index(name)
        found = {(e, i): r.queries(e, column) for e in epochs for i, r in enumerate(runs) if e in r.files}
        found = {key: values for key, values in found.items() if len(values)}
        low, high = (end(map(end, found.values()), default=0) for end in (min, max))
        width = max(high - low, 1e-3) / BINS  # and an empty bin at each end
        edges = low + width * np.arange(-1, BINS + 2)
        for epoch, axes in zip(epochs, grid[:, side]):
            for number in range(len(runs)):
                if (epoch, number) in found:
                    density, _ = np.histogram(found[epoch, number], edges, density=True)
                    look = style(number, BINS, len(runs)) | dict(linewidth=1.3, linestyle=DASHES[number % len(DASHES)])
                    marked = np.flatnonzero(density)
                    look["markevery"] = marked[number % 4 :: max(3, len(marked) // 5)].tolist()
                    middle = (edges[1:] + edges[:-1]) / 2
                    if len(runs) < 5:
                        axes.fill_between(middle, density, step="mid", color=look["color"], alpha=0.1, linewidth=0)
                    axes.plot(middle, density, drawstyle="steps-mid", **look)
            axes.set_ylim(bottom=0)
            axes.set(yticks=[], ylabel="" if side else "share of queries")
            axes.grid(color="0.92")
            axes.set_title(f"epoch {epoch}", fontsize=10, loc="left")
        grid[-1, side].set_xlabel(what)
    legend_below(figure, 9.2, *entries(runs, DASHES), 0.5 + 2.4 * len(epochs))
    return figure


def waterfall(order: list[tuple[str, int]], runs: list[Run], name: str, flag: str, args):
    """The curves of one statistic one behind the other, by the value of a flag. order: (value, number of the run)."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from mpl_toolkits import mplot3d  # noqa: F401, which makes the projection known

    figure = Figure(figsize=(6.2, 4.5))
    axes = figure.add_axes((-0.07, -0.1, 1.08, 1.15), projection="3d")
    column, lowest, highest = NAMES.index(name), [], []
    lines = []
    for place, (_, number) in enumerate(order):
        one = runs[number]
        shown = (one.iterations >= args.start) & np.isfinite(one.curves[:, column])
        x, z = one.iterations[shown], smooth(one.curves[shown, column], args.smooth)
        if name in LOGARITHMIC:
            z = np.log10(z)
        thin = slice(None, None, max(1, len(x) // THIN))
        if len(x):
            lines.append((place, number, x[thin], z[thin]))
            lowest.append(z.min())
            highest.append(z.max())
    if not lines:
        return None
    low, high = min(lowest), max(highest)
    low = min(low, 0) if name == "neg_variance" else low - 0.05 * (high - low) - 1e-6
    for place, number, x, z in reversed(lines):
        look = style(number, len(x), len(order))
        look.pop("markevery"), look.update(linewidth=1, markersize=4.5)
        outline = [(x[0], low), *zip(x, z), (x[-1], low)]
        under = PolyCollection([outline], facecolors=look["color"], alpha=0.12, linewidths=0)
        axes.add_collection3d(under, zs=place, zdir="y")
        axes.plot(x, np.full(len(x), place), z, **look, markevery=max(1, len(x) // MARKS))
    axes.set(xlim=(args.start, max(x[-1] for _, _, x, _ in lines)), ylim=(-0.4, len(order) - 0.6), zlim=(low, high))
    axes.set_yticks(range(len(order)), [value for value, _ in order])
    axes.set_xlabel("iteration", labelpad=8)
    axes.set_ylabel(flag, labelpad=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((1.35, 1.1, 0.8), zoom=0.95)
    scale = "logarithm to base 10 of " if name in LOGARITHMIC else ""
    figure.suptitle(scale + STATISTICS[name][1], fontsize=10, y=0.97)
    return figure


def swept(runs: list[Run], flag: str) -> list[tuple[str, int]]:
    """(value, number of the run) in order of the values of a flag. UsageError where there is nothing to sweep over."""
    key, found = flag.lstrip("-").replace("-", "_"), []
    for number, one in enumerate(runs):
        if key not in one.options:
            why = "no config.json in it" if not one.options else "its config.json has no such flag"
            raise UsageError(f"--sweep {flag}: {one.folder}: {why}; there is {some_of(runs)}")
        found.append((one.options[key], number))
    if len({str(value) for value, _ in found}) < 2:
        raise UsageError(f"--sweep {flag}: {found[0][0]} in every run; there is {some_of(runs)}")
    is_number = all(isinstance(value, (int, float)) for value, _ in found)
    found.sort(key=lambda pair: (pair[0] if is_number else str(pair[0]), pair[1]))
    return [(f"{value:g}" if isinstance(value, float) else printable(str(value)), number) for value, number in found]


def some_of(runs: list[Run]) -> str:
    """The flags that every run has and that differ."""
    flags = [f for f in runs[0].options if len({str(r.options.get(f, r)) for r in runs}) > 1]
    flags = [f for f in flags if all(f in r.options for r in runs)]
    return ", ".join(flags[:8]) or "none that differs"


# --------------------------------------------------------------------------------------------------- numbers and files


def chosen_epochs(runs: list[Run], asked: list[int] | None) -> list[int]:
    there = [set(r.files) for r in runs]
    if asked:
        if missing := [e for e in asked if not any(e in epochs for epochs in there)]:
            have = sorted(set().union(*there))
            raise UsageError(f"--epochs {missing[0]}: of no run; there are epochs {have[0]} to {have[-1]}")
        return asked
    both = set.intersection(*there) or set.union(*there)
    return sorted({min(both), max(both)})


def table(runs: list[Run]) -> str:
    """First and last values, each a mean over at most 20 iterations."""
    header = ["first and last values", "epochs", "iterations", *NAMES[:3], "top-1"]
    rows = []
    for one in runs:
        cells = [one.label, len(one.files), int(one.iterations[-1])]
        for column in range(3):
            values = one.curves[np.isfinite(one.curves[:, column]), column]
            ends = (values[:20], values[-20:]) if len(values) else ([np.nan], [np.nan])
            means = [np.mean(end) for end in ends]
            cells.append("  ".join(f"{m:.1e}" if 0 < abs(m) < 1e-3 else f"{m:.4f}" for m in means))
        rows.append([*map(str, cells), f"{one.accuracy[0]} {one.accuracy[1]:.2f}" if one.accuracy else "-"])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in [header, *rows]]
    return "\n".join("  ".join(line) for line in lines)


def write_events(one: Run, folder: str | None) -> str:
    """The curves as scalars, where TensorBoard lays them beside those of the run. Earlier ones of this program go."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    events = str(one.folder) if folder is None else os.path.join(folder, one.folder.resolve().name)
    if folder is None and isinstance(path := one.options.get("tb_path"), str):
        there = os.path.join(path, one.folder.resolve().name)
        events = there if os.path.isdir(there) else events
    with files.only_writer(events):
        for old in Path(events).glob("events.out.tfevents.*.scores"):
            old.unlink()
        with SummaryWriter(events, filename_suffix=".scores") as writer:
            for iteration, values in zip(one.iterations.tolist(), one.curves.tolist()):
                for name, value in zip(NAMES, values):
                    if np.isfinite(value):
                        writer.add_scalar(f"scores/{name}", value, iteration)
    return events


def write(figure, args, name: str) -> list[str]:
    written = []
    for kind in args.formats:
        path = os.path.join(args.out, f"{name}.{kind}")
        with files.replacing(path) as file:
            figure.savefig(file, format=kind, dpi=150)
        written.append(os.path.basename(path))
    return written


def main(argv=None) -> None:
    args = parse_args(argv)
    runs = read_runs(args.runs, args.labels.split(",") if args.labels else None)
    order = swept(runs, args.sweep) if args.sweep else []
    epochs, last = chosen_epochs(runs, args.epochs), max(int(r.iterations[-1]) for r in runs)
    if args.start > last:
        raise UsageError(f"--start {args.start}: the runs have {last} iterations")
    files.make_folder(args.out)
    print(table(runs))
    import matplotlib

    try:
        with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "axes.axisbelow": True}):
            written = [write(curves(runs, name, args), args, name) for name in NAMES]
            written.append(write(panel(runs, args), args, "panel"))
            written.append(write(histograms(runs, epochs), args, "histograms"))
            for name in NAMES if order else ():
                if (figure := waterfall(order, runs, name, args.sweep.lstrip("-"), args)) is not None:
                    written.append(write(figure, args, f"waterfall_{name}"))
        if args.tensorboard:
            where = None if args.tensorboard is True else args.tensorboard
            print("TensorBoard: " + ", ".join(write_events(one, where) for one in runs))
    except OSError as error:
        raise UserError(
            f"cannot write to {error.filename or args.out}: {(error.strerror or str(error)).lower()}"
        ) from None
    print(f"figures in {args.out}: {', '.join(name for names in written for name in names)}")


if __name__ == "__main__":
    cli.run(main)
