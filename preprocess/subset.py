"""Make a tree of the first pictures of each class: the CIFAR5K and CIFAR10K of RESULTS.md.

    python preprocess/subset.py CIFAR CIFAR10K --per-class 1000
    python preprocess/subset.py data CIFAR5K --per-class 500 --dataset cifar10

SOURCE is a tree with train/CLASS/* and val/ or test/, to whose pictures OUT links, all of those of
val included. Or it is where torchvision keeps a set, whose pictures are written as PNG. Pictures
are taken in the order of their names, or of the set, so OUT is the same every time. RESULTS.md used
a tree of CIFAR-10 as JPEG files, whose pixels differ a little from torchvision's.

The same command adds missing files and keeps the others. It ends with the counts.
"""

import os
import sys
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from common import UsageError, cli, printable, sets, trees
from preprocess import place_pictures, workers

SPLITS = ("train", "val")


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    about = "tree with train/CLASS/* and val/ or test/, or where torchvision keeps its sets"
    parser.add_argument("source", metavar="SOURCE", help=about)
    parser.add_argument("out", metavar="OUT", help="tree to make")
    about = "pictures of each class in train/"
    parser.add_argument("--per-class", type=cli.positive_int, required=True, help=about)
    about = "a set of torchvision below SOURCE, downloaded if missing; folder: class folders"
    choices = ["folder", *sets.TORCHVISION_SETS]
    parser.add_argument("--dataset", choices=choices, default="folder", help=about)
    return cli.freeze(parser.parse_args(argv))


def link_tree(source: Path, out: Path, per_class: int) -> int:
    """Link to the first pictures of each class of a tree, and to its val/; return their number.

    Raises UsageError for a source that is no such tree, or has fewer pictures, and for an OUT with
    others.
    """
    source = source.resolve()
    train = trees.split_folder(source, "train")
    val = trees.split_folder(source, "val")
    count = link_classes(train, out / "train", per_class)
    place_pictures.link(str(val), out / "val")
    return count


def link_classes(source: Path, out: Path, per_class: int) -> int:
    """Link to the first pictures of each class folder of a split; return their number.

    Raises UsageError for a class with fewer pictures, and for an OUT with others.
    """
    chosen = {}
    for name in trees.folders_in(source):
        pictures = trees.pictures_below(source, name)[:per_class]
        if len(pictures) < per_class:
            raise UsageError(
                f"--per-class {per_class}: {printable(source / name)} has {len(pictures)} pictures"
            )
        chosen[name] = pictures
    _check_others(out, {*chosen})
    for name, pictures in chosen.items():
        _check_others(out / name, {Path(picture).parts[1] for picture in pictures})
        for picture in pictures:
            (out / picture).parent.mkdir(parents=True, exist_ok=True)
            place_pictures.link(str(source / picture), out / picture)
    return sum(map(len, chosen.values()))


def write_split(pictures: sets.PictureSet, out: Path, per_class: int | None) -> int:
    """Write the first pictures of each class (None: all) of a set as PNG; return their number.

    Raises UsageError for a class with fewer pictures, and for an OUT with others.
    """
    _check_others(out, {*pictures.classes})
    written = 0
    for label, name in enumerate(pictures.classes):
        rows = np.flatnonzero(np.asarray(pictures.targets) == label)[:per_class]
        if per_class and len(rows) < per_class:
            raise UsageError(f"--per-class {per_class}: {name} has {len(rows)} pictures")
        names = [f"{number:05d}.png" for number in range(len(rows))]
        _check_others(out / name, {*names})
        for row, file in zip(rows, names):
            if not (out / name / file).exists():
                pixels = pictures.images[int(row)].permute(1, 2, 0).numpy()
                encoded = BytesIO()
                Image.fromarray(pixels).save(encoded, "PNG")
                workers.write_picture(str(out / name / file), encoded.getbuffer())
        written += len(rows)
    return written


def _check_others(folder: Path, names: set[str]) -> None:
    """Make a folder. Raises UsageError where it holds other files than `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(set(os.listdir(folder)) - names)
    others = [name for name in others if not workers.unfinished(name)]
    if others:
        raise UsageError(
            f"{printable(folder)} holds other files, such as {printable(others[0])}: choose "
            "another OUT"
        )


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    if args.dataset == "folder":
        source = trees.existing(args.source)
        if workers.lies_in(out, source, workers.split_folders(source)):
            raise UsageError(f"OUT {out} lies inside SOURCE {source}: choose another folder")
        train = link_tree(source, out, args.per_class)
        print(f"result: {train} train pictures linked in {printable(out)}, and all of val")
        return
    opened = {split: sets.open_set(args.source, split, dataset=args.dataset) for split in SPLITS}
    train = write_split(opened["train"], out / "train", args.per_class)
    val = write_split(opened["val"], out / "val", None)
    print(f"result: {train} train and {val} val pictures in {printable(out)}")


if __name__ == "__main__":
    cli.run(main)
