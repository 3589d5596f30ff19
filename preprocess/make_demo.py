"""Make the demo data set: ten textured shapes and six shifted test sets, drawn by the program itself.

    python preprocess/make_demo.py data/demo
    python preprocess/make_demo.py data/demo --sheet docs/demo_pictures.png

7,000 files, 28 MB, about twenty seconds of processor time shared by the cores. Run again it finds the set complete and only
prints its table; after an interruption it starts over. preprocess/demo.py describes the sets. --texture adds the tree
OUT-texture: a quick stand-in for texture synthesis, enough to try training with texture negatives.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

from PIL import Image, ImageDraw

from common import UserError, cli
from common.files import replacing
from preprocess import demo

LABEL_WIDTH = 76  # pixels left of the contact sheet's rows


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", help="folder to make: new, empty, or an earlier demo data set")
    add, levels = parser.add_argument, " ".join(map(str, demo.DEFAULTS["severities"]))
    add("--train-per-class", type=int, metavar="N", help="train pictures of each of the 10 classes")
    add("--val-per-class", type=int, metavar="N", help="of val, sketch, stylized, rendition and cue-conflict")
    add("--corruption-per-class", type=int, metavar="N", help="val pictures per class to corrupt")
    add("--severities", type=int, nargs="*", metavar="1-5", help=f"of the corruptions; default {levels}; empty: none")
    add("--size", type=int, metavar="PIXELS", help="side of the pictures in pixels")
    add("--seed", type=int, help="another seed gives other pictures")
    add(
        "--texture",
        action="store_true",
        help="also make OUT-texture: the texture of each train picture without its shape",
    )
    add("--workers", type=int, metavar="N", help="processes (one per core)")
    add("--force", action="store_true", help="replace a demo data set that is complete, whatever its settings")
    add("--sheet", metavar="PNG", help="also write a contact sheet, a row per set, to this file")
    parser.set_defaults(**demo.DEFAULTS)
    return parser.parse_args(argv)


def _examples(out, content):
    """Yield (label, the files of one row), one file per class, for the rows of the contact sheet."""
    per_set = 2
    for name in ("train", "val"):
        columns = [sorted((out / name / shape).iterdir())[:per_set] for shape in demo.CLASSES]
        for i in range(min(per_set, *map(len, columns))):
            yield name, [column[i] for column in columns]
    levels = content["settings"]["severities"]
    if levels:  # every corruption at a middle severity, one per column, going through the classes
        level = levels[len(levels) // 2]
        cells = [out / "corruption" / name / str(level) for name in demo.CORRUPTIONS]
        columns = len(demo.CLASSES)
        files = [sorted((cell / demo.CLASSES[i % columns]).iterdir())[0] for i, cell in enumerate(cells)]
        for i in range(0, len(files), columns):
            yield f"corruption\nseverity {level}", files[i : i + columns]
    for name in demo.SHIFTED:
        yield name, [sorted((out / name / shape).iterdir())[0] for shape in demo.CLASSES]
    twin = Path(f"{os.path.abspath(out)}-texture")
    if content["settings"]["texture"]:
        yield "texture\n(of train)", [sorted((twin / "train" / shape).iterdir())[0] for shape in demo.CLASSES]


def write_sheet(out, content, path):
    """Write the contact sheet: a row per set, a column per class. 256 colours keep it small."""
    size = content["settings"]["size"]
    rows = list(_examples(out, content))
    sheet = Image.new("RGB", (LABEL_WIDTH + size * len(demo.CLASSES), size * len(rows) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for column, shape in enumerate(demo.CLASSES):
        pen.text((LABEL_WIDTH + size * column + 4, 2), shape, fill="black")
    for row, (label, files) in enumerate(rows):
        pen.text((4, 16 + size * row + size // 3), label, fill="black")
        for column, file in enumerate(files):
            with Image.open(file) as picture:
                sheet.paste(picture, (LABEL_WIDTH + size * column, 16 + size * row))
    sheet = sheet.quantize(256, dither=Image.Dither.NONE)
    with replacing(path) as file:
        sheet.save(file, "PNG", optimize=True)


def print_table(content):
    classes, levels = len(demo.CLASSES), len(content["settings"]["severities"])
    folders = {"corruption": f"{len(demo.CORRUPTIONS)} corruptions x {levels} severities x {classes} classes"}
    print(f"{'set':<12}{'files':>8}{'MB':>8}   folders")
    for name, count in content["counts"].items():
        print(f"{name:<12}{count:>8}{content['bytes'][name] / 1e6:>8.1f}   {folders.get(name, f'{classes} classes')}")
    total = sum(content["counts"].values())
    print(f"{'all':<12}{total:>8}{sum(content['bytes'].values()) / 1e6:>8.1f}")
    print(f"result: {total} files, made in {content['seconds']} s by {content['workers']} process(es)")


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    try:
        settings = {name: getattr(args, name) for name in demo.DEFAULTS}
        (demo.make if args.force else demo.ensure)(out, workers=args.workers, **settings)
        content = demo.read(out)
        if args.sheet:
            try:
                write_sheet(out, content, args.sheet)
            except OSError as error:
                raise UserError(f"{error.filename or args.sheet}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to start over", file=sys.stderr)
        sys.exit(130)
    print_table(content)
    if args.sheet:
        print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    cli.run(main)
