"""Draw a contact sheet of pictures beside their textures by each engine."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from common import UserError, files
from preprocess.texture_engines import Settings
from preprocess.texture_jobs import Done, Job, load, read_rgb, synthesise

COLUMNS = 4
GAP = 8  # pixels between columns
HEAD = 14  # height of the titles in pixels


def make_sheet(path: str, jobs: list[Job], engines: dict[str, Settings], device: str) -> int:
    """Write the sheet of the readable pictures, and return their number.

    engines: {title: settings}. Raises UserError if no picture can be read or an engine fails.
    """
    rows = []
    for job in jobs:
        row = _row(job, engines, device)
        if row:
            rows.append(row)
    if not rows:
        raise UserError("none of these pictures can be read")
    size = next(iter(engines.values())).size
    columns = min(COLUMNS, len(rows))
    wide = size * (1 + len(engines)) + GAP
    shape = (wide * columns - GAP, HEAD + size * -(-len(rows) // columns))
    sheet = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        for i, title in enumerate(("picture", *engines)):
            pen.text((wide * column + size * i + 2, 1), title, fill="black")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            left = wide * (i % columns) + size * j
            sheet.paste(image, (left, HEAD + size * (i // columns)))
    with files.replacing(path) as file:
        sheet.save(file, "PNG")
    return len(rows)


def _row(job: Job, engines: dict[str, Settings], device: str) -> list[Image.Image]:
    """Return the centre square of a picture and its textures, or [] if it cannot be read."""
    first = next(iter(engines.values()))
    loaded = load(first, job)  # every engine uses the same patches
    if isinstance(loaded, Done):
        print(f"left out: {job.name}: {loaded.failure}", file=sys.stderr)
        return []
    row = [_centre(read_rgb(job.source), first.size)]
    for settings in engines.values():
        texture = synthesise(settings, device, [loaded])[0]
        if isinstance(texture, Exception):
            raise UserError(str(texture))
        row.append(Image.fromarray(texture.permute(1, 2, 0).numpy()))
    return row


def _centre(picture: Image.Image, size: int) -> Image.Image:
    """Return the central square of a picture, resized to `size`."""
    side = min(picture.size)
    left = (picture.width - side) // 2
    top = (picture.height - side) // 2
    return picture.resize((size, size), box=(left, top, left + side, top + side))
