"""Open and decode every picture of a data set, and report what would stop or spoil training.

    python preprocess/check_images.py IMAGENET100
    python preprocess/check_images.py IMAGENET100/val --json val.json

TREE is a root with train/ and val/ (or test/, validation/), one folder of class folders, or a
folder of pictures without classes, for pre-training. Pictures are read as the data loader reads
them, and nothing is changed. The exit code is 1 if something would break training:

    unreadable       not a picture, an empty file, a broken link, no permission
    truncated        the header is whole, the pixels end early or cannot be decoded
    too large        more pixels than Pillow takes, or than the memory holds
    empty class      a class folder without any picture (.ipynb_checkpoints is a usual one)
    class mismatch   a class that only one of train and val has

and 0 otherwise, whatever else is reported: pictures that train and val share (by content), one
picture in two classes, duplicates, JPEGs damaged inside, tiny pictures, classes with few or many,
files that the loader ignores, and how many pictures are grey, CMYK, palette, transparent, 16-bit
(with their values), turned by EXIF, animated, or not what their name says; and of ImageNet classes,
which of the lists called ImageNet-100 they are.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import UsageError, UserError, cli, files, launch, printable, sets
from preprocess import demo, workers
from preprocess.check_tree import (
    Pictures,
    Split,
    compare_classes,
    examine_rows,
    find_splits,
    list_split,
)
from preprocess.imagenet100_lists import compare_with_lists, in_words

ERROR = "breaks training"
WARNING = "worth a look"
NOTE = "notes"
# Findings, gravest first: {kind: (level, title in the table)}
KINDS = {
    "unreadable": (ERROR, "unreadable"),
    "truncated": (ERROR, "truncated or not decodable"),
    "too large": (ERROR, "too large for the memory or for Pillow"),
    "no classes": (ERROR, "train/ or val/ without class folders"),
    "empty class": (ERROR, "class folder without a picture"),
    "class mismatch": (ERROR, "class in only one of train and val"),
    "leak": (WARNING, "LEAK: the same picture in train and val"),
    "two classes": (WARNING, "the same picture in two classes"),
    "duplicate": (WARNING, "the same picture twice in a class"),
    "damaged": (WARNING, "JPEG damaged inside: parts of it decode wrongly"),
    "tiny": (WARNING, "a side shorter than --min-side"),
    "few": (WARNING, "class with under half the median count"),
    "many": (WARNING, "class with over twice the median count"),
    "outside": (WARNING, "picture outside any class folder, ignored"),
    "not read": (WARNING, "file of another kind, ignored"),
    "not a file": (WARNING, "pipe, device, or link to a folder it lies in, ignored"),
    "dark": (WARNING, "16 bits, but only low values: read as nearly black"),
    "float": (WARNING, "floating point: cut to whole numbers from 0 to 255"),
    "same name": (WARNING, "same name with another extension"),
    "unlabelled": (NOTE, "no class folders: for pre-training only"),
    "nested": (NOTE, "class folder with folders in it, read as one class"),
    "grey": (NOTE, "greyscale"),
    "CMYK": (NOTE, "CMYK"),
    "palette": (NOTE, "palette"),
    "alpha": (NOTE, "transparent (the alpha channel is dropped)"),
    "16-bit": (NOTE, "more than 8 bits (the highest 8 are read)"),
    "colour mode": (NOTE, "another colour mode"),
    "wrong extension": (NOTE, "not what its extension says"),
    "EXIF rotation": (NOTE, "turned by EXIF (read as stored, not turned)"),
    "animated": (NOTE, "several frames (the first is read)"),
    "metadata": (NOTE, "Pillow warns about its metadata or size"),
}
PRESETS = {"demo": {"tree": "data/demo", "workers": 2}}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    group = parser.add_argument_group("data")
    group.add_argument(
        "tree",
        nargs="?",
        metavar="TREE",
        help="root with train/CLASS/* and val/CLASS/*, or a folder of class folders",
    )
    group.add_argument(
        "--class-list", metavar="FILE", help="check only the class folders in FILE, one per line"
    )
    group.add_argument(
        "--min-side",
        type=cli.count,
        default=32,
        metavar="PIXELS",
        help="pictures with a shorter side are reported as tiny",
    )
    group.add_argument(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="open only N pictures, spread evenly over the tree "
        "for a quick check (class counts stay complete, duplicates are sought among these)",
    )
    group = parser.add_argument_group("report")
    group.add_argument(
        "--json", metavar="FILE", help="also write all findings, file by file, to FILE"
    )
    group.add_argument(
        "--examples",
        type=cli.count,
        default=3,
        metavar="N",
        help="example files per kind of finding",
    )
    group = parser.add_argument_group("run")
    workers.add_workers_argument(group)
    args = parser.parse_args(argv)
    if not args.tree:
        raise UsageError(
            "no TREE to check: give a folder with train/ and val/ or with class folders, or --demo"
        )
    return cli.freeze(args)


def open_splits(args) -> list[Split]:
    """Return the splits of the tree, with findings about their folders. Raises UsageError."""
    folders = find_splits(args.tree)
    class_list = None
    if args.class_list:
        present = {name for folder in folders.values() for name in sets.folders_in(folder)}
        class_list = sets.listed(Path(args.tree), sorted(present), args.class_list)
    unlabelled = not (class_list or sets.folders_in(folders.get("train") or args.tree))
    splits = [list_split(name, folder, class_list, unlabelled) for name, folder in folders.items()]
    compare_classes(splits)
    return splits


def open_pictures(pictures: Pictures, min_side: int, processes: int) -> float:
    """Examine all pictures and return the seconds that it took. Raises Interrupted on Ctrl-C."""
    bar = workers.Rate("checking", len(pictures), "pictures")
    try:
        for start, seen in workers.in_processes(examine_rows, pictures.jobs(min_side), processes):
            pictures.record(start, seen)
            bar.add(len(seen))
    except KeyboardInterrupt:
        raise workers.Interrupted(
            f"interrupted after {bar.done} of {len(pictures)} pictures; nothing was changed"
        ) from None
    finally:
        bar.close()
    return bar.seconds


def summary(split: Split, pictures: Pictures, number: int) -> dict:
    """Return the numbers of a split as plain ints, for the table and the JSON file."""
    counts = [len(paths) for paths in split.classes.values()]
    is_here = pictures.split == number
    sides = pictures.sides[is_here & (pictures.sides[:, 0] > 0)]
    return {
        "folder": str(split.folder),
        "classes": sum(map(bool, split.classes)),
        "pictures": sum(counts),
        "bytes": int(pictures.bytes[is_here].sum()),
        "per_class_min_median_max": _min_median_max(counts),
        "width_min_median_max": _min_median_max(sides[:, 0]),
        "height_min_median_max": _min_median_max(sides[:, 1]),
        "per_class": {name: len(paths) for name, paths in split.classes.items()},
    }


def _min_median_max(values) -> list[int]:
    if not len(values):
        return [0, 0, 0]
    values = np.asarray(values)
    return [int(values.min()), int(np.median(values)), int(values.max())]


def print_report(splits: list[Split], numbers: list[dict], examples: int) -> None:
    """Print the table of the splits, then the findings by level with some examples each."""
    _print_splits(splits, numbers)
    by_kind = defaultdict(list)
    for split in splits:
        for kind, path, detail in split.findings:
            by_kind[kind].append((os.path.join(split.name, path), detail))
    for level in (ERROR, WARNING, NOTE):
        kinds = [kind for kind in KINDS if KINDS[kind][0] == level and kind in by_kind]
        print(f"\n{level}" if kinds else f"\n{level}: nothing")
        for kind in kinds:
            findings = sorted(by_kind[kind])
            print(f"{len(findings):>8}  {KINDS[kind][1]}")
            for path, detail in findings[:examples]:
                ending = f": {printable(detail)}" if detail else ""
                print(f"{'':<12}{printable(path)}{ending}")
            if 0 < examples < len(findings):
                print(f"{'':<12}... {len(findings) - examples} more")


def _print_splits(splits: list[Split], numbers: list[dict]) -> None:
    columns = ("per_class_min_median_max", "width_min_median_max", "height_min_median_max")
    print(
        f"{'':<8}{'classes':>8}{'pictures':>10}{'MB read':>9}   "
        f"{'per class':<18}{'width':<18}{'height':<18}"
    )
    for split, values in zip(splits, numbers):
        ranges = [" / ".join(map(str, values[column])) for column in columns]
        print(
            f"{printable(split.name):<8}{values['classes']:>8}{values['pictures']:>10}"
            f"{values['bytes'] / 1e6:>9.1f}   {ranges[0]:<18}{ranges[1]:<18}{ranges[2]:<18}"
        )
    print(f"{'':<38}(smallest / median / largest)")


def list_findings(splits: list[Split]) -> list[dict]:
    """Return all findings, for the JSON file."""
    return [
        {
            "kind": kind,
            "level": KINDS[kind][0],
            "split": split.name,
            "path": path,
            "detail": detail,
        }
        for split in splits
        for kind, path, detail in split.findings
    ]


def write_report(path: str, content: dict) -> None:
    """Write the file of --json. Raises UserError."""
    try:
        files.write_json(path, content)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from None


def print_result(pictures: Pictures, errors: int, seconds: float, processes: int) -> None:
    """Print the last line: the verdict, and the rate."""
    verdict = "nothing breaks training"
    if errors == 1:
        verdict = "1 thing breaks training"
    elif errors:
        verdict = f"{errors} things break training"
    opened = f"{len(pictures)} pictures"
    if len(pictures) < pictures.total:
        opened = f"{len(pictures)} of {pictures.total} pictures"
    print(
        f"\nresult: {verdict}; {opened} opened in {seconds:.1f} s "
        f"({len(pictures) / max(seconds, 1e-6):.0f}/s, {workers.count_processes(processes)})"
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.demo:
        demo.ensure_for(cli.replace(args, data=args.tree), launch.Process())
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: no such folder to write it in")
    splits = open_splits(args)
    pictures = Pictures(splits, args.limit)
    processes = args.workers or workers.default_workers(len(pictures), 1000)
    seconds = open_pictures(pictures, args.min_side, processes)
    same = pictures.find_same()
    numbers = [summary(split, pictures, i) for i, split in enumerate(splits)]
    print_report(splits, numbers, args.examples)
    imagenet100 = compare_with_lists(name for name, paths in splits[0].classes.items() if paths)
    if imagenet100:
        print(f"\n{in_words(imagenet100)}")
    findings = list_findings(splits)
    errors = sum(finding["level"] == ERROR for finding in findings)
    if args.json:
        content = {
            "tree": str(args.tree),
            "checked": len(pictures),
            "pictures": pictures.total,
            "seconds": round(seconds, 2),
            "errors": errors,
            "imagenet100": imagenet100,
            "splits": {split.name: values for split, values in zip(splits, numbers)},
            "counts": dict(Counter(finding["kind"] for finding in findings)),
            "findings": findings,
            "same_content": same,
        }
        write_report(args.json, content)
    print_result(pictures, errors, seconds, processes)
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
