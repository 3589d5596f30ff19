"""Make ImageNet-100 from ImageNet: the 100 classes of preprocess/imagenet100.txt, train and val.

    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path IMAGENET100
    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path IMAGENET100 --copy
    python preprocess/imagenet100_subset.py --imagenet_path IMAGENET --imagenet100_path PACK --pack 256

By default nothing is copied: each class folder becomes one symbolic link, which is instant. The links are absolute: the two
trees are usually on different disks, and either the new one can be moved, or the old one, after which this command mends
the links. A program that writes into a linked folder writes into ImageNet, and tar or rsync copy links as links unless told
otherwise: --copy makes a tree of its own. --pack writes one memory-mapped file instead (preprocess/pack.py).

The val folder may be sorted into class folders or flat, as ILSVRC ships it (val/ILSVRC2012_val_00000001.JPEG, ...). A flat
one needs the official labels, --val_labels FILE, in one of two forms:
  - imagenet_2012_validation_synset_labels.txt: 50,000 lines, line i is the WordNet id of ILSVRC2012_val_0000000i;
  - LOC_val_solution.csv of the Kaggle competition, or any text with a file name and a WordNet id on each line.
The development kit's ILSVRC2012_validation_ground_truth.txt is not one: its numbers only mean something with meta.mat.

Run again it adds what is missing and leaves the rest. It ends with the counts: 126,689 train and 5,000 val pictures.
"""

import argparse
import contextlib
import filecmp
import json
import os
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

from common import UsageError, UserError, cli, launch, printable, sets
from common.files import only_writer
from common.sets import FolderSet
from preprocess.pack import SIDE, PackFiles, check_output, command_line, pack_splits, reason_of
from preprocess.workers import Rate, again

CLASS_LIST = Path(__file__).resolve().with_name("imagenet100.txt")
EXPECTED = {"train": 126_689, "val": 5_000}  # of the 100 classes in ILSVRC 2012
VAL_PER_CLASS, VAL_PICTURES = 50, 50_000
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
WORDNET_ID = re.compile(r"n\d{8}")
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where the competition's archive keeps train/, val/ and test/
FEW = 5  # names that a message shows
LABEL_FILES = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")


@dataclass
class Split:
    """What a split of the subset is made of. flat: the pictures of all classes lie in one folder."""

    name: str
    folder: Path
    pictures: FolderSet
    flat: bool


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--imagenet_path", required=True, help="ImageNet: holds train/CLASS/* and val/ (sorted or flat)"
    )
    parser.add_argument("--imagenet100_path", required=True, help="folder to make")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="copy the pictures instead of linking to them")
    how.add_argument(
        "--pack",
        type=cli.positive_int,
        nargs="?",
        const=SIDE,
        default=None,
        metavar="SIDE",
        help=f"write squares of this side ({SIDE}) to train.npy and val.npy for --dataset packed",
    )
    parser.add_argument("--class_list", default=None, metavar="FILE", help="another list, one class folder per line")
    parser.add_argument(
        "--val_labels",
        default=None,
        metavar="FILE",
        help="labels of a flat val folder: a WordNet id per "
        "line, or LOC_val_solution.csv; looked for in and above the input if not given",
    )
    parser.add_argument(
        "--workers",
        type=cli.positive_int,
        default=None,
        help="files copied at once (default 8), or processes that decode (default: one per core)",
    )
    parser.add_argument("--force", action="store_true", help="with --pack: replace a pack, finished or not")
    args = parser.parse_args(argv)
    if args.force and not args.pack:
        raise UsageError("--force goes with --pack; links and copies that are right are kept")
    return args


# ------------------------------------------------------------------------------------------------------------ the input


def find_splits(args) -> list[Split]:
    """Both splits with all their pictures. Raises UserError where class folders are missing, UsageError for the rest."""
    root = Path(args.imagenet_path)
    if not (root / "train").is_dir() and (root / KAGGLE / "train").is_dir():
        root = root / KAGGLE
    train, val = (sets.split_folder(root, name) for name in ("train", "val"))
    ids = sets.read_class_list(args.class_list or CLASS_LIST, {entry.name for entry in os.scandir(train)})
    if not ids:
        raise UsageError(f"--class_list {args.class_list}: names no class; expected one class folder per line")
    missing = {train: _missing(train, ids)}
    flat = _is_flat(val, ids)
    if not flat:
        missing[val] = _missing(val, ids)
    out = Path(args.imagenet100_path)
    if any(missing.values()):
        most, end = list_missing(out, [str(folder / name) for folder, names in missing.items() for name in names])
        listed = "; ".join(
            f"{printable(folder)} lacks {len(names)} of the {len(ids)}: {sets.few(names, most)}"
            for folder, names in missing.items()
            if names
        )
        listed += end
        if args.class_list:
            raise UsageError(f"--class_list {args.class_list} names class folders that are not there: {listed}")
        raise UserError(f"missing class folders: {listed}")
    val_set = _flat_val(val, ids, args.val_labels, root, out) if flat else sets.open_tree(val, class_list=ids)
    return [Split("train", train, sets.open_tree(train, class_list=ids), False), Split("val", val, val_set, flat)]


def missing_file(out: Path) -> Path:
    """OUT-missing.txt, beside the folder to make: there may be nothing to put into that."""
    return Path(f"{os.path.abspath(out)}-missing.txt")


def list_missing(out: Path, lines: list[str]) -> tuple[int, str]:
    """(how many names a message shows, how it ends): if they are many, all lines go to `missing_file`, if that can be."""
    if len(lines) <= FEW:
        return FEW, ""
    try:
        missing_file(out).write_text("".join(f"{printable(line)}\n" for line in lines))
    except OSError:
        return len(lines), ""
    return FEW, f"; all in {printable(missing_file(out))}"


def _missing(folder: Path, ids: list[str]) -> list[str]:
    return [name for name in ids if not (folder / name).is_dir()]


def _is_flat(val: Path, ids: list[str]) -> bool:
    if any((val / name).is_dir() for name in ids):
        return False
    return any(FLAT_NAME.fullmatch(entry.name) for entry in os.scandir(val))


def _flat_val(val: Path, ids: list[str], labels: str | None, root: Path, out: Path) -> FolderSet:
    """The pictures of these classes among val/ILSVRC2012_val_*.JPEG, class by class."""
    if labels is None:
        above = [root, val, *list(root.absolute().parents)[: len(KAGGLE.parts)]]
        found = [folder / name for folder in above for name in LABEL_FILES if (folder / name).is_file()]
        if not found:
            raise UsageError(
                f"{printable(val)} is flat, so its labels are needed: --val_labels FILE, either "
                f"{LABEL_FILES[1]} (a WordNet id per line) or {LABEL_FILES[0]} (from the Kaggle competition)"
            )
        labels = found[0]
        print(f"labels of the flat val folder: {printable(labels)}")
    label_of = read_val_labels(Path(labels))
    index = {name: i for i, name in enumerate(ids)}
    names = sorted(name for name in sets.walk(val)[0][2] if FLAT_NAME.fullmatch(name))
    unlabelled = [name for name in names if _number(name) not in label_of]
    if unlabelled:
        raise UsageError(
            f"--val_labels {labels}: no label for {len(unlabelled)} pictures of {val}, first {unlabelled[0]}"
        )
    rows = sorted((index[label_of[_number(n)]], n) for n in names if label_of[_number(n)] in index)
    if empty := [ids[i] for i in sorted(set(index.values()) - {i for i, _ in rows})]:
        most, end = list_missing(out, [f"{val}: no picture of {name}" for name in empty])
        names = sets.few(empty, most)
        raise UserError(f"{printable(val)} holds no picture of {len(empty)} of the {len(ids)} classes: {names}{end}")
    return FolderSet([n for _, n in rows], [i for i, _ in rows], ids, val)


def _number(name: str) -> int:
    return int(FLAT_NAME.fullmatch(name).group(1))


def read_val_labels(path: Path) -> dict[int, str]:
    """{number of an ILSVRC 2012 val picture, from 1: WordNet id}. Raises UsageError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--val_labels {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    lines = [line for line in lines if line]
    if lines and all(line.isdigit() for line in lines):
        raise UsageError(
            f"--val_labels {path}: the development kit's numbers, which mean nothing without its meta.mat; give "
            f"{LABEL_FILES[1]} (a WordNet id per line) or {LABEL_FILES[0]}"
        )
    if lines and all(WORDNET_ID.fullmatch(line) for line in lines):
        if len(lines) != VAL_PICTURES:
            raise UsageError(f"--val_labels {path}: {len(lines)} lines; the list has {VAL_PICTURES}, one per picture")
        return dict(enumerate(lines, 1))
    found = [re.match(r"(?:.*/)?ILSVRC2012_val_(\d{8})[^\s,]*[\s,]+(n\d{8})\b", line) for line in lines]
    labels = {int(match.group(1)): match.group(2) for match in found if match}
    if len(labels) < max(1, len(lines) - 1):  # all lines but a heading
        raise UsageError(
            f"--val_labels {path}: neither a WordNet id per line ({LABEL_FILES[1]}) nor a picture and its WordNet id "
            f"({LABEL_FILES[0]})"
        )
    return labels


# ----------------------------------------------------------------------------------------------------------- the output


def check_other_classes(split: Split, out: Path) -> None:
    """UsageError where the output already has folders of other classes: labels are places in the sorted folder names."""
    folder = out / split.name
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{printable(folder)}: is a file, not a folder")
    others = sorted({entry.name for entry in os.scandir(folder) if entry.is_dir()} - set(split.pictures.classes))
    if others:
        names = ", ".join(map(printable, others[:5])) + (", ..." if len(others) > 5 else "")
        raise UsageError(
            f"{printable(folder)} holds {len(others)} other class folders ({names}): choose another folder"
        )


def link_split(split: Split, out: Path) -> None:
    """One link per class folder; one per picture where the input is flat, or where the class is already a folder here."""
    (out / split.name).mkdir(parents=True, exist_ok=True)
    folders = set()
    for name in split.pictures.classes:
        target, link = os.path.abspath(split.folder / name), out / split.name / name
        if split.flat or (link.is_dir() and not link.is_symlink()):
            link.mkdir(exist_ok=True)
            folders.add(name)
        else:
            _link(target, link)
    for source, place in _places(split, out):
        if place.relative_to(out / split.name).parts[0] in folders:
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_symlink() or not place.exists():
                _link(os.path.abspath(source), place)


def _link(target: str, link: Path) -> None:
    """A link that is right stays, one that leads nowhere is replaced, one to somewhere else is not ours."""
    if link.is_symlink():
        if os.readlink(link) == target:
            return
        if link.exists() and not os.path.samefile(link, target):
            there = printable(os.readlink(link))
            raise UsageError(f"{printable(link)} is a link to {there}: remove it, or choose another folder")
        partial = link.with_name(f".{link.name}.partial")
        partial.unlink(missing_ok=True)
        os.symlink(target, partial)
        os.replace(partial, link)
    elif link.exists():
        raise UsageError(f"{printable(link)} is in the way of a class folder: remove it, or choose another folder")
    else:
        os.symlink(target, link)


def _places(split: Split, out: Path) -> list[tuple[str, Path]]:
    """(source, place in the subset) of every picture."""
    pictures, folder = split.pictures, out / split.name
    if split.flat:
        classes = [pictures.classes[t] for t in pictures.targets.tolist()]
        return [(path, folder / name / os.path.basename(path)) for path, name in zip(pictures.paths, classes)]
    return [(path, folder / os.path.relpath(path, pictures.root)) for path in pictures.paths]


def copy_split(split: Split, out: Path, workers: int) -> list[str]:
    """Copy what is not there yet; returns the pictures that cannot be opened.

    A picture is written under a temporary name and renamed when it is whole.
    """
    by_folder: dict[Path, list[tuple[str, Path]]] = {}
    for source, place in _places(split, out):
        by_folder.setdefault(place.parent, []).append((source, place))
    for name in split.pictures.classes:
        link = out / split.name / name
        if link.is_symlink():  # of an earlier run without --copy: writing through it would write into ImageNet
            link.unlink()
    progress = Rate(f"copying {split.name}", len(split.pictures), "pictures")
    pool = ThreadPoolExecutor(workers)
    stop: list[bool] = []
    unreadable: list[str] = []

    def copy_folder(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".partial"  # one thread per folder, and only_writer keeps other processes out
        try:
            for source, place in by_folder[folder]:
                if stop:
                    return
                if not _opens(source):
                    unreadable.append(source)
                elif not _is_copied(source, place):
                    shutil.copyfile(source, partial)
                    shutil.copystat(source, partial)
                    os.replace(partial, place)
                progress.add(1)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    try:
        for _ in pool.map(copy_folder, by_folder):
            pass
    finally:
        stop.append(True)
        pool.shutdown(cancel_futures=True)
        progress.close()
    return sorted(unreadable)


def _opens(source: str) -> bool:
    try:
        with open(source, "rb"):
            return True
    except OSError:
        return False


def _is_copied(source: str, place: Path) -> bool:
    """Whether the copy is there, by size and time (copies keep the time), or by content where the times differ."""
    if place.is_symlink() or not place.exists():
        return False
    if os.path.getsize(source) != os.path.getsize(place):
        return False
    same_time = int(os.path.getmtime(source)) == int(os.path.getmtime(place))
    return same_time or filecmp.cmp(source, place, shallow=False)


# ----------------------------------------------------------------------------------------------------------- the counts


def report(splits: list[Split], counted: dict[str, Counter], out: Path, default_list: bool, ending: str = "") -> None:
    """Print the counts, and warn on standard error where they are not those of ImageNet-100."""
    for split in splits:
        counts = counted[split.name]
        total, expected = sum(counts.values()), EXPECTED[split.name] if default_list else None
        wanted = f" (expected {expected:,})" if default_list else ""
        print(
            f"{split.name}: {len(counts)} classes, {total:,} pictures{wanted} in {printable(out / split.name)}{ending}"
        )
        odd = {} if split.name == "train" else {c: n for c, n in counts.items() if n != VAL_PER_CLASS}
        if default_list and total != expected:
            told = [f"{c} {n}" for c, n in odd.items()]
            most, end = list_missing(out, told)
            which = f"; not {VAL_PER_CLASS}: {sets.few(told, most)}{end}" if odd else ""
            fewest = ", ".join(f"{c} {n}" for c, n in sorted(counts.items(), key=lambda item: item[1])[:5])
            which = which or f"; smallest classes: {fewest}"
            print(
                f"warning: {split.name} has {total:,} pictures, ImageNet-100 has {expected:,}{which}", file=sys.stderr
            )


def count_tree(split: Split, out: Path) -> Counter:
    found = sets.open_tree(out / split.name, classes=split.pictures.classes)
    return Counter(found.classes[t] for t in found.targets.tolist())


def count_pack(split: Split, out: Path) -> Counter:
    targets = json.loads(PackFiles(out, split.name).listing.read_text())["targets"]
    return Counter(split.pictures.classes[t] for t in targets)


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.imagenet100_path)
    check_output(out, Path(args.imagenet_path), "--imagenet100_path")
    with contextlib.suppress(OSError):
        missing_file(out).unlink()
    splits = find_splits(args)
    default_list = args.class_list is None
    with only_writer(out):
        try:
            if args.pack:
                sources = {split.name: split.pictures for split in splits}
                command = command_line("imagenet100_subset.py", argv)
                try:
                    pack_splits(sources, out, args.pack, args.workers or launch.cores(), args.force, command)
                finally:
                    packed = [split for split in splits if PackFiles(out, split.name).listing.exists()]
                    report(packed, {split.name: count_pack(split, out) for split in packed}, out, default_list, ".npy")
                return
            for split in splits:
                check_other_classes(split, out)
            unreadable = []
            for split in splits:
                if args.copy:
                    unreadable += copy_split(split, out, args.workers or 8)
                else:
                    link_split(split, out)
        except OSError as error:
            name = f" ({printable(error.filename)})" if error.filename else ""
            raise UserError(
                f"cannot write to {printable(out)}: {reason_of(error)}{name}; {again('--force', args.force)}"
            ) from None
        except KeyboardInterrupt:
            print(f"\ninterrupted; {again('--force', args.force)}", file=sys.stderr)
            sys.exit(130)
    for path in unreadable:
        print(f"not copied: {printable(path)}", file=sys.stderr)
    try:
        report(splits, {split.name: count_tree(split, out) for split in splits}, out, default_list)
    except UsageError:  # a class of which nothing could be copied
        if not unreadable:
            raise
    if unreadable:
        raise UserError(f"{len(unreadable)} pictures could not be opened and were not copied: they are listed above")


if __name__ == "__main__":
    cli.run(main)
