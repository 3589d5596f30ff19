"""Draw docs/begin.png, when extrapolated positives collapse: `python docs/draw_begin.py`.

The curves are the records in results/small-collapse, a line for each seed.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

RECORDS = Path(__file__).resolve().parents[1] / "results/small-collapse"
RUNS = {  # name: (label, colour)
    "none": ("not transformed", "0.55"),
    "both": ("transformed from the start", "#d55e00"),
    "both-start1": ("from step 157 on", "#0072b2"),
    "both-init": ("from a trained backbone", "#009e73"),
}
PANELS = {"feature_spread": "feature spread", "view_correlation": "view correlation r"}
BOUND = 1 - 1.5 / 2.6  # of r, below which nearly equal features become more alike


def main() -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (key, title) in zip(axes, PANELS.items()):
        for run, (label, colour) in RUNS.items():
            for seed, folder in enumerate(sorted(RECORDS.glob(f"{run}-s[0-9]"))):
                lines = (folder / "metrics.jsonl").read_text().splitlines()
                records = [record for record in map(json.loads, lines) if key in record]
                steps = [record["step"] for record in records]
                values = [record[key] for record in records]
                axis.plot(steps, values, color=colour, lw=1.1, label="" if seed else label)
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].axhline(BOUND, color="black", lw=1, ls="--")
    axes[1].text(0, BOUND + 0.01, f"bound {BOUND:.2f}", fontsize="small")
    axes[0].legend(fontsize="small", loc="lower right", bbox_to_anchor=(1, 0.09))
    figure.savefig(Path(__file__).with_name("begin.png"), dpi=130)


if __name__ == "__main__":
    main()
