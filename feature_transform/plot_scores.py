#!/usr/bin/env python
"""Draw the scores that runs have kept: similarities of positives and of negatives.

Rui Zhu, Bingchen Zhao, Jingen Liu, Zhenglong Sun, Chang Wen Chen. Improving Contrastive Learning by
Visualizing Feature Transformation. ICCV 2021, arXiv:2108.02982. The script draws runs of every
paper here that were trained with --save_score, and the authors' own files; runs of different
methods and lengths go into one figure. It writes a figure of each statistic over iterations, a
panel of all of them, histograms at some epochs, and with --sweep a waterfall over a setting.

    python feature_transform/plot_scores.py runs/moco0.99 runs/moco0.5 --out figures
    python feature_transform/plot_scores.py runs --sweep alpha --smooth 50 --epochs 1,5,10 \\
        --formats png,pdf
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import numpy as np

from common import UsageError, cli, files, printable
from feature_transform import score_figures
from feature_transform.score_figures import NAMES
from feature_transform.score_files import Run
from feature_transform.score_labels import differing, read_runs
from runner.events import own_events

FORMATS = tuple(suffix.removeprefix(".") for suffix in cli.FIGURES)


def numbers(text: str) -> list[int]:
    """Parse "1,5,10" for argparse."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole numbers from 1, with commas: 1,5,10"
        )
    return values


def formats(text: str) -> list[str]:
    """Parse "png,pdf" for argparse."""
    names = [part.strip().lower() for part in text.split(",")]
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r} must be some of {','.join(FORMATS)}")
    return list(dict.fromkeys(names))


def names_of_runs(text: str) -> list[str]:
    """Parse "A,B" for argparse."""
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} must be names with commas, such as A,B")
    return names


def parse_args(argv=None):
    parser = cli.Parser(prog="plot_scores.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders, or folders of them")
    text = "folder for the figures"
    parser.add_argument("--out", default="figures", metavar="DIR", help=text)
    text = f"formats of the figures, with commas: {', '.join(FORMATS)}"
    parser.add_argument("--formats", type=formats, default="png", help=text)
    text = "names of the runs, with commas; default: the settings in which they differ"
    parser.add_argument("--labels", type=names_of_runs, metavar="A,B,...", help=text)
    text = "a waterfall of curves over this flag of the runs, such as alpha (MoCo's momentum)"
    parser.add_argument("--sweep", metavar="FLAG", help=text)
    text = (
        "histograms at these epochs, from 1, with commas; default: the first and the last that all "
        "runs have. They are of each query's similarity to its positive, and of its mean "
        "similarity to the negatives"
    )
    parser.add_argument("--epochs", type=numbers, metavar="N,N,...", help=text)
    text = "moving average over N iterations; default: off, as published"
    parser.add_argument("--smooth", type=cli.positive_int, default=1, metavar="N", help=text)
    text = "first iteration that is drawn (published: 550), as the first ones dwarf the rest"
    parser.add_argument("--start", type=cli.positive_int, default=1, metavar="N", help=text)
    text = "also write the curves as TensorBoard scalars, beside those of each run, or below DIR"
    parser.add_argument("--tensorboard", nargs="?", const=True, metavar="DIR", help=text)
    return cli.freeze(parser.parse_args(argv))


def swept(runs: list[Run], flag: str) -> list[tuple[str, int]]:
    """Return (value, number of the run) in order of the values of a flag.

    Raises UsageError where there is nothing to sweep over.
    """
    name = flag.lstrip("-").replace("-", "_")
    told = ", ".join(differing(runs)) or "no flag"
    values = []
    for number, run in enumerate(runs):
        if name not in run.options:
            reason = "has no such flag in its config.json"
            if not run.options:
                reason = "has no config.json"
            raise UsageError(f"--sweep {flag}: {run.folder} {reason}; runs differ in {told}")
        values.append((run.options[name], number))
    if len({str(value) for value, _ in values}) < 2:
        raise UsageError(f"--sweep {flag} is {values[0][0]} in every run; runs differ in {told}")
    if all(isinstance(value, (int, float)) for value, _ in values):
        values.sort()
    else:
        values.sort(key=lambda pair: (str(pair[0]), pair[1]))
    return [(_worded(value), number) for value, number in values]


def _worded(value) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def chosen_epochs(runs: list[Run], asked: list[int] | None) -> list[int]:
    """Return the epochs of the histograms. Raises UsageError for an epoch that no run has."""
    there = [set(run.files) for run in runs]
    every = set().union(*there)
    if asked:
        missing = [epoch for epoch in asked if epoch not in every]
        if missing:
            raise UsageError(
                f"--epochs {missing[0]}: no run has it; they have {min(every)} to {max(every)}"
            )
        return asked
    common_ones = set.intersection(*there) or every
    return sorted({min(common_ones), max(common_ones)})


def table(runs: list[Run]) -> str:
    """Return a table of first and last values, each a mean over at most 20 iterations."""
    header = ["first and last values", "epochs", "iterations", *NAMES[:3], "top-1"]
    rows = [header]
    for run in runs:
        cells = [run.label, str(len(run.files)), str(run.iterations[-1])]
        for column in range(3):
            values = run.curves[np.isfinite(run.curves[:, column]), column]
            ends = (values[:20], values[-20:]) if len(values) else ([np.nan], [np.nan])
            cells.append("  ".join(_short(np.mean(end)) for end in ends))
        cells.append(f"{run.accuracy[0]} {run.accuracy[1]:.2f}" if run.accuracy else "-")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        columns = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(columns))
    return "\n".join(lines)


def _short(mean: float) -> str:
    return f"{mean:.1e}" if 0 < abs(mean) < 1e-3 else f"{mean:.4f}"


def events_folder(run: Run, folder: str | None) -> str:
    """Return the folder of the run's TensorBoard events: below `folder`, or where its flags say.

    Runs of the same name have folders of their own.
    """
    parent = folder or run.options.get("tb_path")
    if folder or (isinstance(parent, str) and os.path.isdir(parent)):
        return own_events(os.path.join(parent, run.folder.resolve().name), run.folder)
    return str(run.folder)


def write_events(run: Run, folder: str | None) -> str:
    """Write the curves as TensorBoard scalars in place of earlier ones; return their folder."""
    from torch.utils.tensorboard import SummaryWriter  # imported here, as it takes a second

    events = events_folder(run, folder)
    with files.only_writer(events):
        for old in Path(events).glob("events.out.tfevents.*.scores"):
            old.unlink()
        with SummaryWriter(events, filename_suffix=".scores") as writer:
            for iteration, values in zip(run.iterations.tolist(), run.curves.tolist()):
                for name, value in zip(NAMES, values):
                    if np.isfinite(value):
                        writer.add_scalar(f"scores/{name}", value, iteration)
    return events


def write(figure, args, name: str) -> list[str]:
    """Write a figure in all formats, and return the names of the files."""
    written = []
    for kind in args.formats:
        path = os.path.join(args.out, f"{name}.{kind}")
        files.write_figure(figure, path, dpi=150)
        written.append(os.path.basename(path))
    return written


def write_figures(runs: list[Run], args, order: list, epochs: list[int]) -> list[str]:
    """Write all figures, and return the names of the files. order: the result of `swept`."""
    import matplotlib

    written = []
    settings = {"pdf.fonttype": 42, "svg.fonttype": "none", "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        for name in NAMES:
            written += write(score_figures.curves(runs, name, args), args, name)
        written += write(score_figures.panel(runs, args), args, "panel")
        written += write(score_figures.histograms(runs, epochs), args, "histograms")
        for name in NAMES if order else ():
            flag = args.sweep.lstrip("-")
            figure = score_figures.waterfall(order, runs, name, flag, args)
            if figure is not None:
                written += write(figure, args, f"waterfall_{name}")
    return written


def main(argv=None) -> None:
    args = parse_args(argv)
    runs = read_runs(args.runs, args.labels)
    order = swept(runs, args.sweep) if args.sweep else []
    epochs = chosen_epochs(runs, args.epochs)
    last = max(int(run.iterations[-1]) for run in runs)
    if args.start > last:
        raise UsageError(f"--start {args.start}: the runs have {last} iterations")
    os.makedirs(args.out, exist_ok=True)
    print(table(runs))
    written = write_figures(runs, args, order, epochs)
    if args.tensorboard:
        folder = None if args.tensorboard is True else args.tensorboard
        print("TensorBoard: " + ", ".join(write_events(run, folder) for run in runs))
    print(f"figures in {args.out}: {', '.join(written)}")


if __name__ == "__main__":
    cli.run(main)
