"""Make ImageNet-100 from ImageNet: the 100 classes of preprocess/imagenet100.txt, train and val.

    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path IMAGENET100
    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path OUT --copy
    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path PACK --pack

By default nothing is copied: each class folder becomes one symbolic link, which is instant. Links
are absolute, because the two trees are usually on different disks. So the new tree can be moved; if
the old one moves, run this command again to repair the links. A program that writes into a linked
folder writes into ImageNet, and tar and rsync copy links as links by default; --copy makes an
independent tree. --pack writes one memory-mapped file per split (preprocess/pack.py).

The val folder may be sorted into class folders or flat, as ILSVRC ships it
(val/ILSVRC2012_val_00000001.JPEG, ...). A flat one needs the official labels, --val_labels FILE, in
one of two forms:
  - imagenet_2012_validation_synset_labels.txt: 50,000 lines, of which line i is the WordNet id of
    ILSVRC2012_val_0000000i;
  - LOC_val_solution.csv of the Kaggle competition, or any text with a file name and a WordNet id on
    each line.
The development kit's ILSVRC2012_validation_ground_truth.txt cannot be used, because its numbers
have no meaning without meta.mat.

The same command adds missing files and keeps the others. It ends with the counts: 126,689 train
and 5,000 val pictures.
"""

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UsageError, UserError, cli, launch, printable, sets
from common.files import only_writer
from preprocess.imagenet_splits import Split, find_splits, list_missing, missing_file
from preprocess.pack import SIDE, command_line, pack_splits
from preprocess.pack_files import PackFiles, check_output
from preprocess.place_pictures import check_other_classes, copy_split, link_split
from preprocess.workers import add_workers_argument, continue_hint, system_reason

EXPECTED = {"train": 126_689, "val": 5_000}  # of the 100 classes in ILSVRC 2012
VAL_PER_CLASS = 50
SMALLEST = 5  # number of classes that a warning names
COPIED_AT_ONCE = 8


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--imagenet_path",
        required=True,
        help="ImageNet, with train/CLASS/* and val/ (sorted or flat)",
    )
    parser.add_argument("--imagenet100_path", required=True, help="folder to make")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--copy", action="store_true", help="copy the pictures instead of linking to them"
    )
    form.add_argument(
        "--pack",
        type=cli.positive_int,
        nargs="?",
        const=SIDE,
        default=None,
        metavar="SIDE",
        help=f"write squares of this side ({SIDE}) to train.npy and val.npy for --dataset packed",
    )
    parser.add_argument(
        "--class_list",
        default=None,
        metavar="FILE",
        help="another list of classes, one folder name per line",
    )
    parser.add_argument(
        "--val_labels",
        default=None,
        metavar="FILE",
        help="labels of a flat val folder: a WordNet id per line, or LOC_val_solution.csv; if not "
        "given, searched for in and above the input",
    )
    text = (
        f"files copied at once (default {COPIED_AT_ONCE}), or processes that decode (default: one "
        "per core)"
    )
    add_workers_argument(parser, text)
    parser.add_argument(
        "--force", action="store_true", help="with --pack: replace a pack, finished or not"
    )
    args = parser.parse_args(argv)
    if args.force and not args.pack:
        raise UsageError("--force needs --pack; correct links and copies are always kept")
    return cli.freeze(args)


def report(
    splits: list[Split],
    counted: dict[str, Counter],
    out: Path,
    default_list: bool,
    ending: str = "",
) -> None:
    """Print the counts, and warn on standard error if they differ from those of ImageNet-100.

    counted: {split: {class: pictures}}. ending: appended to the path of the split in OUT.
    """
    for split in splits:
        counts = counted[split.name]
        total = sum(counts.values())
        wanted = f" (expected {EXPECTED[split.name]:,})" if default_list else ""
        print(
            f"{split.name}: {len(counts)} classes, {total:,} pictures{wanted} in "
            f"{printable(out / split.name)}{ending}"
        )
        if default_list and total != EXPECTED[split.name]:
            _warn_of_counts(split, counts, out)


def _warn_of_counts(split: Split, counts: Counter, out: Path) -> None:
    """Warn of classes whose number of pictures differs from ImageNet-100."""
    odd = []
    if split.name == "val":
        odd = [f"{name} {n}" for name, n in counts.items() if n != VAL_PER_CLASS]
    most, end = list_missing(out, odd)
    if odd:
        classes = f"not {VAL_PER_CLASS}: {sets.few(odd, most)}{end}"
    else:
        fewest = sorted(counts.items(), key=lambda item: item[1])[:SMALLEST]
        classes = "smallest classes: " + ", ".join(f"{name} {n}" for name, n in fewest)
    print(
        f"warning: {split.name} has {sum(counts.values()):,} pictures, ImageNet-100 has "
        f"{EXPECTED[split.name]:,}; {classes}",
        file=sys.stderr,
    )


def count_tree(split: Split, out: Path) -> Counter:
    """Count the pictures of each class in OUT."""
    opened = sets.open_tree(out / split.name, classes=split.pictures.classes)
    return Counter(opened.classes[label] for label in opened.targets.tolist())


def count_pack(split: Split, out: Path) -> Counter:
    """Count the pictures of each class in the pack."""
    pack = sets.read_pack(PackFiles(out, split.name).listing)
    return Counter(pack.classes[label] for label in pack.targets.tolist())


def make_pack(args, splits: list[Split], out: Path, command: str) -> None:
    """Pack both splits, and print the counts of finished ones even after an error."""
    sources = {split.name: split.pictures for split in splits}
    try:
        workers = args.workers or launch.cores()
        pack_splits(sources, out, args.pack, workers, args.force, command)
    finally:
        packed = [split for split in splits if PackFiles(out, split.name).listing.exists()]
        counted = {split.name: count_pack(split, out) for split in packed}
        report(packed, counted, out, args.class_list is None, ".npy")


def make_tree(args, splits: list[Split], out: Path) -> list[str]:
    """Link or copy both splits, and return the pictures that cannot be opened."""
    for split in splits:
        check_other_classes(split, out)
    unreadable = []
    for split in splits:
        if args.copy:
            unreadable += copy_split(split, out, args.workers or COPIED_AT_ONCE)
        else:
            link_split(split, out)
    return unreadable


def report_tree(args, splits: list[Split], out: Path, unreadable: list[str]) -> None:
    """Print the counts of a tree. Raises UserError if pictures could not be copied."""
    for path in unreadable:
        print(f"not copied: {printable(path)}", file=sys.stderr)
    try:
        counted = {split.name: count_tree(split, out) for split in splits}
        report(splits, counted, out, args.class_list is None)
    except UsageError:  # no picture of a class could be copied
        if not unreadable:
            raise
    if unreadable:
        raise UserError(
            f"{len(unreadable)} pictures could not be opened and were not copied: "
            "they are listed above"
        )


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.imagenet100_path)
    check_output(out, Path(args.imagenet_path), "--imagenet100_path")
    with contextlib.suppress(OSError):
        missing_file(out).unlink()
    splits = find_splits(args)
    with only_writer(out):
        try:
            if args.pack:
                make_pack(args, splits, out, command_line("imagenet100_subset.py", argv))
                return
            unreadable = make_tree(args, splits, out)
        except OSError as error:
            name = f" ({printable(error.filename)})" if error.filename else ""
            raise UserError(
                f"cannot write to {printable(out)}: {system_reason(error)}{name}; "
                f"{continue_hint('--force', args.force)}"
            ) from None
        except KeyboardInterrupt:
            print(f"\ninterrupted; {continue_hint('--force', args.force)}", file=sys.stderr)
            sys.exit(130)
    report_tree(args, splits, out, unreadable)


if __name__ == "__main__":
    cli.run(main)
