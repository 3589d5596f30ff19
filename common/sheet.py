"""A contact sheet: what the networks see, as a picture to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from common import UsageError, checkpoint, printable

ROWS, INCHES = 8, 1.2  # pictures of a sheet, side of one


def write(path: str | Path, columns: dict[str, Tensor], names: Sequence[str] = ()) -> None:
    """Write the first rows of several pictures side by side, a labelled column each, as PNG.

    columns: label -> (N, C, H, W) in [0, 1], C 1 (grey) or 3. names: of the rows, such as paths; their last two parts are
    shown. Raises UsageError where `path` cannot be written.
    """
    from matplotlib.figure import Figure  # half a second to import: not at start

    rows = min(ROWS, *(len(images) for images in columns.values()))
    figure = Figure(figsize=(INCHES * (len(columns) + 1), INCHES * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (label, images) in enumerate(columns.items()):
        axes[0, column].set_title(label, fontsize=8)
        for row, image in enumerate(images[:rows].detach().float().cpu().permute(0, 2, 3, 1).clamp(0, 1).numpy()):
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], names):
        shown = "/\n".join(Path(printable(name)).parts[-2:])
        axis.set_ylabel(shown, fontsize=6, rotation=0, ha="right", va="center")
    try:
        with checkpoint.replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise UsageError(f"--show-views {path}: {error.strerror or error}") from None
