"""A contact sheet: what the networks see, as a picture to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from common import UsageError, checkpoint, printable

ROWS, SIDE, GAP, TOP = 8, 96, 6, 18  # pictures of a sheet, least side of one, space between, height of the labels


def write(path: str | Path, columns: dict[str, Tensor], names: Sequence[str] = ()) -> None:
    """Write the first rows of several pictures side by side, a labelled column each.

    columns: label -> (N, C, H, W) in [0, 1], C 1 (grey) or 3. names: of the rows, e.g. paths. Small pictures are enlarged by
    a whole factor without smoothing. Raises UsageError where `path` cannot be written.
    """
    path, pen = Path(path), ImageDraw.Draw(Image.new("L", (1, 1)))
    first = next(iter(columns.values()))
    factor = max(1, -(-SIDE // first.shape[-1]))
    cell = max([first.shape[-1] * factor, *(int(pen.textlength(label)) + 2 for label in columns)]) + GAP
    rows = min(ROWS, len(first))
    below = [os.path.join(*Path(printable(name)).parts[-2:]) for name in names[:rows]]
    margin = GAP + max((int(pen.textlength(name)) for name in below), default=0)
    size = margin + GAP + cell * len(columns), TOP + (first.shape[-2] * factor + GAP) * rows
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for column, (label, images) in enumerate(columns.items()):
        left = margin + GAP + cell * column
        pen.text((left, 3), label, fill="black")
        large = interpolate(images[:rows].detach().float().cpu(), scale_factor=factor)
        pixels = large.expand(-1, 3, -1, -1).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        for row, image in enumerate(pixels.numpy()):
            picture.paste(Image.fromarray(image), (left, TOP + (image.shape[0] + GAP) * row))
    for row, name in enumerate(below):
        pen.text((GAP, TOP + (first.shape[-2] * factor + GAP) * row), name, fill="black")
    try:
        with checkpoint.replacing(path) as file:
            picture.save(file, "PNG")
    except OSError as error:
        raise UsageError(f"--show-views {path}: {error.strerror or error}") from None
