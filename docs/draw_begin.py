"""Draw logged numbers of three studies, a line for each seed: `python docs/draw_begin.py`.

docs/begin.png shows when extrapolated positives collapse (results/small-collapse), docs/patches.png
when patches outweigh the queue (results/small-patches), and docs/ages.png how the age of the rows
enters CMC's loss (results/small-tuning).
"""

import json
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
BEGIN = {  # name: (label, colour)
    "none": ("not transformed", "0.55"),
    "both": ("transformed from the start", "#d55e00"),
    "both-start1": ("from step 157 on", "#0072b2"),
    "both-init": ("from a trained backbone", "#009e73"),
}
BOUND = 1 - 1.5 / 2.6  # of r, below which nearly equal features become more alike
PATCHES = {
    "alpha0": ("no patches", "0.55"),
    "alpha1": ("alpha 1", "#0072b2"),
    "alpha2-t.2": ("alpha 2, temperature .2", "#009e73"),
    "alpha2": ("alpha 2", "#d55e00"),
    "alpha2-init": ("alpha 2, from a trained backbone", "#cc79a7"),
}

AGES = {
    "cmc": ("rows as they are", "#d55e00"),
    "cmc-epoch-rows": ("rows of the epoch's start", "#0072b2"),
}
EQUAL = 2 * math.log(4097)  # the loss of CMC where all scores are equal


def draw(axis: Axes, study: str, runs: dict, key: str, title: str) -> None:
    """Draw a logged number of the runs of a study over the steps."""
    for run, (label, colour) in runs.items():
        folders = sorted((HERE.parent / "results" / study).glob(f"{run}-s[0-9]"))
        for seed, folder in enumerate(folders):
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            records = [record for record in map(json.loads, lines) if key in record]
            steps = [record["step"] for record in records]
            values = [record[key] for record in records]
            axis.plot(steps, values, color=colour, lw=1.1, label="" if seed else label)
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    axis.grid(alpha=0.3)


def main() -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    spread, correlation = figure.subplots(1, 2)
    draw(spread, "small-collapse", BEGIN, "feature_spread", "feature spread")
    draw(correlation, "small-collapse", BEGIN, "view_correlation", "view correlation r")
    spread.set_yscale("log")
    correlation.axhline(BOUND, color="black", lw=1, ls="--")
    correlation.text(0, BOUND + 0.01, f"bound {BOUND:.2f}", fontsize="small")
    spread.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.09))
    figure.savefig(HERE / "begin.png", dpi=130)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    spread, share = figure.subplots(1, 2)
    draw(spread, "small-patches", PATCHES, "feature_spread", "feature spread")
    draw(share, "small-patches", PATCHES, "nonsem_share", "share of the patches")
    spread.set_yscale("log")
    share.axhline(0.5, color="black", lw=1, ls="--")
    share.legend(fontsize="small")
    figure.savefig(HERE / "patches.png", dpi=130)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, spread = figure.subplots(1, 2)
    draw(loss, "small-tuning", AGES, "loss", "loss")
    draw(spread, "small-tuning", AGES, "epoch_feature_spread", "feature spread, mean of an epoch")
    loss.axhline(EQUAL, color="black", lw=1, ls="--")
    loss.legend(fontsize="small", loc="lower left")
    figure.savefig(HERE / "ages.png", dpi=130)


if __name__ == "__main__":
    main()
