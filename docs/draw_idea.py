"""Draw docs/idea.png, the picture of the README: `python docs/draw_idea.py`.

One anchor with its positive on the unit circle, and five ways to choose or change its negatives.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Wedge

BLUE, GREEN, RED, GREY = "#0072b2", "#009e73", "#d55e00", "0.62"
ANCHOR, POSITIVE = 90.0, 66.0  # angles on the circle, in degrees
OTHERS = [113, 129, 141, 158, 176, 199, 222, 251, 283, 305, 331, 352, 12, 31, 44]
SAME_CLASS = (113, 44)  # other pictures of the anchor's class
TITLES = {
    "bank": "MoCo: all of a queue; CMC and\nInsDis: drawn rows of a memory bank",
    "ring": "ring\nnear ones, but not the nearest",
    "debiased": "debiased\nthe share of the same class\nis taken off the sum",
    "nonsem": "diminished semantics\nadded: textures of the anchor\nwithout its object",
    "transform": "feature transformation\nnegatives mixed,\npositives moved apart",
}


def at(angle: float, radius: float = 1.0) -> tuple[float, float]:
    radians = np.deg2rad(angle)
    return radius * np.cos(radians), radius * np.sin(radians)


def dot(axes, angle: float, colour: str, size: float = 46, **options) -> None:
    axes.scatter(*at(angle), s=size, color=colour, zorder=3, **options)


def arrow(axes, start: float, end: float, colour: str, bend: float) -> None:
    axes.add_patch(
        FancyArrowPatch(
            at(start, 1.13),
            at(end, 1.13),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            color=colour,
            zorder=2,
        )
    )


def panel(axes, kind: str) -> None:
    circle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(circle), np.sin(circle), color="0.85", linewidth=1, zorder=0)
    for angle in OTHERS:
        distance = min(abs(angle - ANCHOR), 360 - abs(angle - ANCHOR))
        colour = RED
        if kind == "ring" and not 35 < distance < 95:
            colour = GREY
        if kind == "debiased" and angle in SAME_CLASS:
            axes.scatter(*at(angle), s=46, facecolor="white", edgecolor=RED, zorder=3)
            continue
        dot(axes, angle, colour)
    if kind == "ring":
        for start, end in ((125, 185), (-5, 55)):
            wedge = Wedge((0, 0), 1.14, start, end, width=0.28, color=RED, alpha=0.12, zorder=1)
            axes.add_patch(wedge)
    if kind == "nonsem":
        for angle in (78, 102):
            dot(axes, angle, RED, 70, marker="s")
    if kind == "transform":
        arrow(axes, POSITIVE, POSITIVE - 24, GREEN, -0.15)
        arrow(axes, ANCHOR, ANCHOR + 18, BLUE, 0.15)
        for first, second in ((176, 199), (222, 251), (283, 305)):
            axes.plot(*zip(at(first), at(second)), color=RED, linewidth=1, linestyle=":")
            axes.scatter(*np.mean([at(first), at(second)], axis=0), s=30, color=RED, marker="x")
    dot(axes, POSITIVE, GREEN)
    dot(axes, ANCHOR, BLUE, 150, marker="*")
    axes.set_title(TITLES[kind], fontsize=8.5)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.25, 1.35), aspect="equal")
    axes.axis("off")


def main() -> None:
    figure = Figure(figsize=(11, 3.25), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(TITLES)), TITLES):
        panel(axes, kind)
    handles = [
        figure.axes[0].scatter([], [], s=110, color=BLUE, marker="*", label="anchor"),
        figure.axes[0].scatter([], [], s=46, color=GREEN, label="its positive"),
        figure.axes[0].scatter([], [], s=46, color=RED, label="negatives"),
        figure.axes[0].scatter([], [], s=46, color=GREY, label="not used"),
        figure.axes[0].scatter([], [], s=46, facecolor="white", edgecolor=RED, label="same class"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=140, bbox_inches="tight")


if __name__ == "__main__":
    main()
