"""Draw a sheet of the first batch as the networks see it, for --show-views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from common import figures, files, printable

ROWS = 8  # pictures per sheet, at most
INCHES = 1.2  # side of a picture


def write(path: str | Path, columns: dict[str, Tensor], names: Sequence[str] = ()) -> None:
    """Write the first rows of several batches as labelled columns of a PNG.

    columns: label -> (N, C, H, W) in [0, 1] with C 1 (grey) or 3. names: paths of the rows, whose
    last two parts are shown. Raises UsageError if `path` cannot be written.
    """
    from matplotlib.figure import Figure  # this import takes half a second

    rows = min(ROWS, *(len(images) for images in columns.values()))
    size = (INCHES * (len(columns) + 1), INCHES * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (label, images) in enumerate(columns.items()):
        axes[0, column].set_title(figures.plain(label), fontsize=8)
        pixels = images[:rows].detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for row, image in enumerate(pixels):
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], names):
        label = "/\n".join(Path(printable(name)).parts[-2:])
        axis.set_ylabel(figures.plain(label), fontsize=6, rotation=0, ha="right", va="center")
    files.write_figure(figure, path)


def write_first_batch(path: str, loader, method, is_main: bool) -> None:
    """Write the sheet of the loader's first batch, with the columns of `method.pictures`."""
    seen, _, index = next(iter(loader))
    columns = method.pictures(seen)
    if is_main:
        write(path, columns, [loader.dataset.path(row) for row in index.tolist()])
        print(f"wrote the first batch as the networks see it to {path}")
