"""Make the demo data set: ten textured shapes and five shifted test sets, drawn by the program.

    python preprocess/make_demo.py data/demo
    python preprocess/make_demo.py data/demo --sheet docs/demo_pictures.png

It writes 7,000 files of 28 MB in all, in about twenty seconds of processor time over all cores. If
the set is complete, it only prints the table; after an interruption it starts over.
preprocess/demo.py describes the sets. --texture adds the tree OUT-texture: a quick stand-in for
texture synthesis, enough to try training with texture negatives.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw

from common import UserError, cli, printable
from common.files import replacing
from preprocess import demo
from preprocess.corruptions import CORRUPTIONS
from preprocess.demo_pictures import SHIFTED
from preprocess.demo_shapes import CLASSES
from preprocess.workers import add_workers_argument, count_processes

LABEL_WIDTH = 76  # pixels left of the contact sheet's rows
HEAD = 16  # pixels above its first row
ROWS_PER_SET = 2  # of train and val


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "out", metavar="OUT", help="output folder: new, empty, or an earlier demo data set"
    )
    parser.add_argument("--train-per-class", type=int, metavar="N", help="train pictures per class")
    parser.add_argument(
        "--val-per-class",
        type=int,
        metavar="N",
        help="pictures per class of val, sketch, stylized, rendition and cue-conflict",
    )
    parser.add_argument(
        "--corruption-per-class", type=int, metavar="N", help="val pictures per class to corrupt"
    )
    levels = " ".join(map(str, demo.DEFAULTS["severities"]))
    parser.add_argument(
        "--severities",
        type=int,
        nargs="*",
        metavar="1-5",
        help=f"severities of the corruptions; default {levels}; without a value, none",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, help="random seed; another seed gives other pictures")
    parser.add_argument(
        "--texture",
        action="store_true",
        help="also make OUT-texture: the texture of each train picture without its shape",
    )
    add_workers_argument(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a demo data set that is complete, whatever its settings",
    )
    parser.add_argument(
        "--sheet",
        metavar="PNG",
        help="also write a contact sheet with one row per set to this file",
    )
    parser.set_defaults(**demo.DEFAULTS)
    return cli.freeze(parser.parse_args(argv))


def _rows(out: Path, content: dict) -> Iterator[tuple[str, list[Path]]]:
    """Yield (label, files) for every row of the contact sheet, with one file per class."""
    for name in ("train", "val"):
        columns = [sorted((out / name / shape).iterdir()) for shape in CLASSES]
        for i in range(min(ROWS_PER_SET, *map(len, columns))):
            yield name, [column[i] for column in columns]
    levels = content["settings"]["severities"]
    if levels:
        yield from _corruption_rows(out, levels[len(levels) // 2])
    for name in SHIFTED:
        yield name, _first_files(out / name)
    if content["settings"]["texture"]:
        yield "texture\n(of train)", _first_files(Path(f"{os.path.abspath(out)}-texture", "train"))


def _corruption_rows(out: Path, level: int) -> Iterator[tuple[str, list[Path]]]:
    """Yield rows with one corruption per column at this severity, over the classes in turn."""
    columns = len(CLASSES)
    files = [
        min((out / "corruption" / name / str(level) / CLASSES[i % columns]).iterdir())
        for i, name in enumerate(CORRUPTIONS)
    ]
    for start in range(0, len(files), columns):
        yield f"corruption\nseverity {level}", files[start : start + columns]


def _first_files(folder: Path) -> list[Path]:
    return [min((folder / shape).iterdir()) for shape in CLASSES]


def write_sheet(out: Path, content: dict, path: str) -> None:
    """Write the contact sheet, a row per set and a column per class, in 256 colours."""
    size = content["settings"]["size"]
    rows = list(_rows(out, content))
    shape = (LABEL_WIDTH + size * len(CLASSES), size * len(rows) + HEAD)
    sheet = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(CLASSES):
        pen.text((LABEL_WIDTH + size * column + 4, 2), name, fill="black")
    for row, (label, files) in enumerate(rows):
        top = HEAD + size * row
        pen.text((4, top + size // 3), label, fill="black")
        for column, file in enumerate(files):
            with Image.open(file) as picture:
                sheet.paste(picture, (LABEL_WIDTH + size * column, top))
    sheet = sheet.quantize(256, dither=Image.Dither.NONE)
    with replacing(path) as file:
        sheet.save(file, "PNG", optimize=True)


def print_table(content: dict) -> None:
    """Print the number of files and the size of every set and of all sets."""
    classes = len(CLASSES)
    levels = len(content["settings"]["severities"])
    print(f"{'set':<12}{'files':>8}{'MB':>8}   folders")
    for name, count in content["counts"].items():
        if not count:
            continue
        folders = f"{classes} classes"
        if name == "corruption":
            corruptions = len(CORRUPTIONS)
            folders = f"{corruptions} corruptions x {levels} severities x {classes} classes"
        print(f"{name:<12}{count:>8}{content['bytes'][name] / 1e6:>8.1f}   {folders}")
    total = sum(content["counts"].values())
    print(f"{'all':<12}{total:>8}{sum(content['bytes'].values()) / 1e6:>8.1f}")
    processes = count_processes(content["workers"])
    print(f"result: {total} files, made in {content['seconds']} s by {processes}")


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    make = demo.make if args.force else demo.ensure
    settings = {name: getattr(args, name) for name in demo.DEFAULTS}
    try:
        make(out, workers=args.workers, **settings)
        content = demo.read(out)
        if args.sheet:
            try:
                write_sheet(out, content, args.sheet)
            except OSError as error:
                raise UserError(
                    f"{error.filename or args.sheet}: {error.strerror or error}"
                ) from None
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to start over", file=sys.stderr)
        sys.exit(130)
    print_table(content)
    if args.sheet:
        print(f"contact sheet: {printable(args.sheet)}")


if __name__ == "__main__":
    cli.run(main)
