"""Write a report as one HTML page, which opens from a disk without a server: table, curves, sheets.

tools/report.py finds the rows. The curves are drawn as SVG and pictures are embedded, so that the
page needs no other file; its template is report_page.html.
"""

from __future__ import annotations

import base64
import json
import math
import statistics
import string
from html import escape
from pathlib import Path

import numpy as np

from common import files
from runner.records import read as read_records
from runner.scores import numbered
from tools.report_runs import HEADINGS, Row, epochs_of, seed_of, seed_word, unfinished

TEMPLATE = Path(__file__).with_suffix(".html")
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000",
    "#7f7f7f", "#6a3d9a",
)  # fmt: skip
CURVES = {  # {title: keys in metrics.jsonl, of which the first recorded one is drawn}
    "k-NN of the monitor, top-1 in %": ("knn_acc1",),
    "spread of the features (0: collapsed, 1: spread out)": (
        "feature_spread",
        "epoch_feature_spread",
    ),
}
SCORES = {  # {title: column of common.metrics.score_statistics}
    "similarity to the positive": 2,
    "mean similarity to the negatives": 0,
    "variance of the similarities to the negatives": 1,
}
POINTS = 300  # of a curve, at most
WIDTH, HEIGHT = 420, 250  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 24, 34  # margins around its axes

Points = list[tuple[float, float]]


def write(path: str, rows: list[Row], columns: list[str]) -> None:
    """Write the page of these rows, whose table has these columns."""
    curves = _panels(rows, curves_of)
    scores = _panels(rows, _scores_of)
    page = string.Template(TEMPLATE.read_text()).substitute(
        table=_table(rows, columns),
        curves=curves or "<p>No metrics.jsonl of a pre-training was found.</p>",
        scores=scores or "<p>No run has kept its scores (--save_score).</p>",
        pictures=_pictures(rows) or "<p>There is no PNG file in the run folders.</p>",
    )
    with files.replacing(path, "w", encoding="utf-8") as file:
        file.write(page)


# ------------------------------------------------------------------------------------------ table


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _table(rows: list[Row], columns: list[str]) -> str:
    """Return the rows of an HTML table; a cell has its number to sort by as `data-value`."""
    heads = ["run", "seeds", "data", "epochs", *(HEADINGS.get(name, name) for name in columns)]
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for number, row in enumerate(rows):
        first = row.results[0]
        swatch = f'<span style="background:{_colour(number)}"></span>'
        texts = [", ".join(seed_word(seed_of(result)) for result in row.results)]
        texts += [str(first.get("data") or "-"), str(epochs_of(first) or "-")]
        cells = [f"<td>{swatch}{escape(row.name + unfinished(row.results))}</td>"]
        cells += [f"<td>{escape(text)}</td>" for text in texts]
        cells += [_cell(row.values(column)) for column in columns]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "<td>-</td>"
    mean = statistics.mean(values)
    spread = f"<small> ± {statistics.stdev(values):.2f}</small>" if len(values) > 1 else ""
    return f'<td data-value="{mean:.4f}">{mean:.2f}{spread}</td>'


# ----------------------------------------------------------------------------------------- curves


def _panels(rows: list[Row], read) -> str:
    """Return SVG panels. read(folder) -> {title: points of a curve} of a run folder."""
    panels: dict[str, list[tuple[str, str, Points]]] = {}
    for number, row in enumerate(rows):
        for folder in dict.fromkeys(row.folders):
            for title, points in read(folder).items():
                panels.setdefault(title, []).append((_colour(number), folder.name, points))
    return "\n".join(_panel(title, lines) for title, lines in panels.items())


def curves_of(folder: Path) -> dict[str, Points]:
    """Return {title: (epochs, value) points} of a run's metrics.jsonl."""
    steps = _derived(folder).get("steps_per_epoch") or 1
    records = [r for r in read_records(folder / "metrics.jsonl") if "step" in r]
    curves = {"loss of the pre-training": [(r["step"] / steps, r.get("loss")) for r in records]}
    for title, keys in CURVES.items():
        key = next((key for key in keys if any(key in record for record in records)), None)
        curves[title] = [(record["step"] / steps, record.get(key)) for record in records]
    return {title: kept for title, points in curves.items() if (kept := _finite(points))}


def _derived(folder: Path) -> dict:
    """Return the settings that a run has worked out, from its config.json."""
    return json.loads((folder / "config.json").read_text()).get("derived", {})


def _finite(points) -> Points:
    """Return the points that have a finite value, at most POINTS of them."""
    kept = [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
    return kept[:: math.ceil(len(kept) / POINTS) or 1]


def _scores_of(folder: Path) -> dict[str, Points]:
    """Return {title: (epochs, mean over the batch) points} of the scores that a run has kept."""
    curves: dict[str, Points] = {}
    paths = numbered(folder)
    first = _derived(folder).get("first_epoch", min(paths, default=0))
    for number, path in paths.items():
        scores = np.load(path, allow_pickle=False).astype(np.float64)  # (steps, batch, 5)
        valid = np.isfinite(scores)
        means = np.where(valid, scores, 0).sum(1) / np.where(valid.any(1), valid.sum(1), np.nan)
        for title, column in SCORES.items():
            points = curves.setdefault(title, [])
            values = means[:, column]
            points += [(number - first + (i + 1) / len(values), v) for i, v in enumerate(values)]
    return {title: kept for title, points in curves.items() if (kept := _finite(points))}


def _panel(title: str, lines: list[tuple[str, str, Points]]) -> str:
    """Return an SVG with axes and curves. lines: (colour, name, points) of each curve."""
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.5
    low, high, last = low - margin, high + margin, max(xs) or 1

    def at(x: float, y: float) -> str:
        right = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f},{down:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">']
    parts.append(f'<text x="{LEFT}" y="14" class="title">{escape(title)}</text>')
    for y in _ticks(low, high):
        place = at(0, y).split(",")[1]
        parts.append(f'<path d="M{at(0, y)} L{at(last, y)}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{place}" class="y">{y:g}</text>')
    for x in _ticks(0, last):
        place = at(x, low).split(",")[0]
        parts.append(f'<text x="{place}" y="{HEIGHT - 18}" class="x">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" class="x">epochs</text>')
    for colour, name, points in lines:
        places = " ".join(at(x, y) for x, y in points)
        tip = f"<title>{escape(name)}</title>"
        style = f'stroke="{colour}"'
        if len(points) == 1:
            x, y = places.split(",")
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}" {style}>{tip}</circle>'
            )
        else:
            parts.append(f'<polyline points="{places}" {style}>{tip}</polyline>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, four to ten of them."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(part for part in (0.1, 0.2, 0.5, 1) if (high - low) / (step * part) <= 10)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]


# --------------------------------------------------------------------------------------- pictures


def _pictures(rows: list[Row]) -> str:
    """Return every PNG in the run folders: sheets of views, and scores of tools/evaluate.py."""
    figures = []
    for row in rows:
        folders = [*row.folders, *(result["file"].parent for result in row.results)]
        paths = [path for folder in folders for path in sorted(folder.glob("*.png"))]
        for path in dict.fromkeys(path.resolve() for path in paths):
            data = base64.b64encode(path.read_bytes()).decode()
            caption = escape(f"{row.name}: {path.parent.name}/{path.name}")
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(figures)
