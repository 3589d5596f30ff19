"""Open and decode every picture of a data set and say what is wrong with it, before a training run finds out.

    python preprocess/check_images.py IMAGENET100
    python preprocess/check_images.py IMAGENET100/val --json val.json

TREE is a root with train/ and val/ (or test/, validation/), or one folder of class folders, or of pictures without
classes, which pre-training takes. Pictures are read as the data loader reads them; nothing is changed. The exit code is 1
if something would break training:

    unreadable       not a picture, an empty file, a broken link, no permission
    truncated        the header is whole, the pixels end early or cannot be decoded
    too large        more pixels than Pillow takes, or than the memory holds
    empty class      a class folder without any picture (.ipynb_checkpoints is a usual one)
    class mismatch   a class that only one of train and val has

and 0 otherwise, whatever else is told: pictures that train and val share (by content), one picture in two classes,
duplicates, JPEGs damaged inside, tiny pictures, classes with few or many, files that the loader ignores, and how
many pictures are grey, CMYK, palette, transparent, 16-bit (with their values), turned by EXIF, animated, or not what
their name says; and of ImageNet classes, which of the lists called ImageNet-100 they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UsageError, UserError, cli, crops, files, launch, printable, sets
from common.sets import SPLIT_NAMES
from preprocess import demo, workers

# What can be found, gravest first: {kind: (level, what the table calls it)}
ERROR, WARNING, NOTE = "breaks training", "worth a look", "notes"
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
    "damaged": (WARNING, "JPEG damaged inside, decodes with wrong parts"),
    "tiny": (WARNING, "a side shorter than --min-side"),
    "few": (WARNING, "class with under half the median count"),
    "many": (WARNING, "class with over twice the median count"),
    "outside": (WARNING, "picture outside any class folder, ignored"),
    "not read": (WARNING, "file of another kind, ignored"),
    "not a file": (WARNING, "pipe, device, or link to a folder it lies in, ignored"),
    "dark": (WARNING, "more than 8 bits with values of 8: read as black"),
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
MODES = {
    "RGB": None,
    "1": "grey",
    "L": "grey",
    "LA": "alpha",
    "La": "alpha",
    "RGBA": "alpha",
    "RGBa": "alpha",
    "RGBX": "alpha",
    "PA": "alpha",
    "P": "palette",
    "CMYK": "CMYK",
    "F": "float",
}
JPEG_SIGNATURE, PNG_SIGNATURE, PNG_BIT_DEPTH = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", 24  # the last: its place
EXIF_ORIENTATION = 0x0112
CHUNK = 32  # pictures per job
WORDNET_ID, NAMED = re.compile(r"n\d{8}"), 3  # the latter: how many classes a line names
# The list of CMC, MoCo / InsDis and the papers after them. Read and found the same, in another order or not: solo-learn,
# solo/data/dataset_subset/imagenet100_classes.txt at 9187ea3; ssnl/moco_align_uniform, scripts/imagenet100_classes.txt at
# 7698785; danielchyeh/ImageNet-100-Pytorch, IN100.txt at 5ae5a42.
CMC = "CMC", "also of solo-learn and of moco_align_uniform"

PRESETS = {"demo": dict(tree="data/demo", workers=2)}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument(
        "tree", nargs="?", metavar="TREE", help="root with train/CLASS/* and val/CLASS/*, or a folder of class folders"
    )
    g.add_argument("--class-list", metavar="FILE", help="look at these class folders only, one name a line")
    g.add_argument("--min-side", type=cli.count, default=32, metavar="PIXELS", help="a shorter side is called tiny")
    g.add_argument(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="open only N pictures, spread evenly over the tree "
        "(a quick look; class counts stay complete, duplicates are sought among these)",
    )
    g = parser.add_argument_group("report")
    g.add_argument("--json", metavar="FILE", help="also write everything found, file by file, to FILE")
    g.add_argument("--examples", type=cli.count, default=3, metavar="N", help="files named per kind in the table")
    g = parser.add_argument_group("run")
    g.add_argument("-j", "--workers", type=cli.positive_int, metavar="N", help="processes (one per core)")
    args = parser.parse_args(argv)
    if not args.tree:
        raise UsageError("no TREE to check: give a folder with train/ and val/ or with class folders, or --demo")
    return args


# ---------------------------------------------------------------------------------------------------------- one picture


class Seen(NamedTuple):
    """What one file turned out to be. findings: (kind, detail) each; the rest is 0 or empty where it could not be read."""

    findings: list[tuple[str, str]]
    width: int = 0
    height: int = 0
    bytes: int = 0
    digest: bytes = b""  # 16 bytes, of the file's content


def examine(path: str, min_side: int = 32) -> Seen:
    """Read, decode and describe one picture. Everything wrong with it is in the findings; nothing is raised."""
    try:
        return _examine(path, min_side)
    except MemoryError:
        return Seen([("too large", "for the memory that was free")])


def _examine(path: str, min_side: int) -> Seen:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        broken_link = os.path.islink(path) and not os.path.exists(path)
        return Seen([("unreadable", "broken link" if broken_link else error.strerror.lower())])
    digest = hashlib.blake2b(content, digest_size=16).digest()
    findings, turned = [], 1
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = Image.open(BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Seen([_why_not_a_picture(content, error)], bytes=len(content))
    width, height = image.size
    seen = Seen(findings, width, height, len(content), digest)
    try:
        complaint = _decode(image, content)
    except MemoryError:
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch's MemoryError
            raise MemoryError from None
        return seen._replace(findings=[("truncated", _why_not_decoded(image, content, error))])
    with warnings.catch_warnings(record=True) as caught_later, contextlib.suppress(Exception):
        warnings.simplefilter("always")
        turned = image.getexif().get(EXIF_ORIENTATION, 1)
    findings += [("metadata", _one_line(str(w.message))) for w in (caught + caught_later)[:1]]
    if complaint:
        findings.append(("damaged", complaint))
    if min(width, height) < min_side:
        findings.append(("tiny", f"{width} x {height}"))
    findings += _describe(image, content, path, turned)
    return seen


def _decode(image: Image.Image, content: bytes) -> str:
    """All pixels, by the decoder that training uses. Returns libjpeg's complaint about a damaged stream, or ''."""
    if crops.decode_jpeg is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with _caught_stderr() as complaint:
            crops.decode_jpeg(encoded, crops.ImageReadMode.RGB)
        return _one_line("; ".join(complaint))
    image.load()
    return ""


@functools.cache
def _scratch_file():
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def _caught_stderr() -> Iterator[list[str]]:
    """What C code prints on file descriptor 2 meanwhile; libjpeg tells of damage in no other way."""
    lines, file, saved = [], _scratch_file(), os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        if os.fstat(file.fileno()).st_size:
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()
            file.seek(0)
            file.truncate()


def _why_not_a_picture(content: bytes, error: Exception) -> tuple[str, str]:
    if not content:
        return "unreadable", "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return "too large", _one_line(str(error))
    if content.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)):
        return "truncated", f"damaged or ended in its header; {len(content)} bytes"
    if isinstance(error, Image.UnidentifiedImageError):
        return "unreadable", "not a picture"
    return "unreadable", _one_line(str(error)) or type(error).__name__


def _why_not_decoded(image: Image.Image, content: bytes, error: Exception) -> str:
    if image.format == "JPEG" and not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        return f"JPEG ends early, after {len(content)} bytes"
    return f"{image.format}: {_one_line(str(error)) or type(error).__name__}"


def _describe(image: Image.Image, content: bytes, path: str, turned: int) -> list[tuple[str, str]]:
    found = []
    deep_png = content.startswith(PNG_SIGNATURE) and content[PNG_BIT_DEPTH] == 16  # opened as 8-bit RGB
    deep_grey = image.mode == "I" or image.mode.startswith("I;16")
    kind = "16-bit" if deep_png or deep_grey else MODES.get(image.mode, "colour mode")
    detail = f"{image.format} {image.mode}"
    if deep_grey:
        values = np.asarray(image)
        detail += f", values {values.min()} to {values.max()}"
        if values.max() < 256:
            found.append(("dark", detail))
    if kind:
        found.append((kind, detail))
    by_name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if image.format != by_name and (image.format, by_name) != ("MPO", "JPEG"):  # MPO: JPEGs in one file, from cameras
        found.append(("wrong extension", f"{image.format} data"))
    if turned in range(2, 9):
        found.append(("EXIF rotation", f"orientation {turned}"))
    if image.format != "JPEG":
        with contextlib.suppress(Exception):  # looks for a second frame: what is wrong there matters to nobody
            if getattr(image, "is_animated", False):
                found.append(("animated", f"{image.n_frames} frames"))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())[:150]


# ------------------------------------------------------------------------------------------------------------ the tree


@dataclass
class Split:
    """A folder of class folders: its pictures by class, and what lies beside them."""

    name: str
    folder: Path
    classes: dict[str, list[str]] = field(default_factory=dict)  # class -> paths below folder, as the loader lists them
    findings: list[tuple[str, str, str]] = field(default_factory=list)  # (kind, path below folder, detail)


def find_splits(tree: str | Path) -> dict[str, Path]:
    """{"train": folder, "val": folder} of a root (one may be missing), or {name: folder} of a folder of classes.

    A folder called train or val counts as a split if it has folders in it, or if there is the other one, too, or nothing
    else (a class may be called train). Raises UsageError.
    """
    tree = Path(tree)
    if not tree.is_dir():
        raise UsageError(f"{tree}: {'is a file, not a folder' if tree.exists() else 'no such folder'}")
    splits = {}
    for split, names in (("train", ("train",)), ("val", SPLIT_NAMES["val"])):
        found = [tree / name for name in names if (tree / name).is_dir()]
        if found:
            splits[split] = next((folder for folder in found if sets.folders_in(folder)), found[0])
    if len(splits) == 1 and not sets.folders_in(*splits.values()) and len(sets.folders_in(tree)) > 1:
        splits = {}
    if not splits and not sets.folders_in(tree) and not sets.pictures_below(tree):
        raise UsageError(f"{tree}: no class folders in it; expected {tree}/train/CLASS/*, or {tree}/CLASS/*")
    return splits or {os.path.basename(os.path.abspath(tree)): tree}


def list_split(name: str, folder: Path, class_list: list[str] | None = None, unlabelled: bool = False) -> Split:
    """Walk a split once; symbolic links are followed, as the loader does. Raises UsageError.

    unlabelled: pictures without class folders are those of one class without a name, except in val/.
    """
    split = Split(name, folder)
    classes = sets.folders_in(folder)
    if not classes:
        count = len(sets.pictures_below(folder))
        if count and unlabelled and name not in SPLIT_NAMES["val"]:
            split.findings.append(("unlabelled", folder.name, f"{count} pictures"))
            classes = [""]
    if not classes:
        flat = f"{count} pictures lie in it directly" + "; imagenet100_subset.py sorts ILSVRC's flat val" * (
            name == "val"
        )
        split.findings.append(("no classes", folder.name, flat if count else "it is empty"))
        return split
    if class_list is not None:
        unknown = sorted(set(class_list) - set(classes))
        if unknown:
            raise UsageError(
                f"--class-list: no such class folder in {folder}: {', '.join(unknown[:5])}"
                + (f", ... ({len(unknown)} in all)" if len(unknown) > 5 else "")
            )
        classes = class_list
    else:
        for beside in sorted(set(os.listdir(folder)) - set(classes)) if any(classes) else ():
            if os.path.isdir(folder / beside):
                split.findings.append(("not a file", beside, ""))
            elif beside.lower().endswith(IMG_EXTENSIONS):
                split.findings.append(("outside", beside, ""))
    for class_name in classes:
        pictures, found = [], []
        try:
            found = sets.walk(folder, class_name)
        except OSError as error:
            split.findings.append(("unreadable", os.path.relpath(error.filename, folder), error.strerror.lower()))
        for relative, below, files, others in found:
            if below and relative == class_name:
                split.findings.append(("nested", class_name, ", ".join(sorted(below)[:3])))
            split.findings += [("not a file", os.path.join(relative, other), "") for other in sorted(others)]
            for file in sorted(files):
                if file.lower().endswith(IMG_EXTENSIONS):
                    pictures.append(os.path.join(relative, file))
                else:
                    kind = os.path.splitext(file)[1].lower() or "no extension"
                    split.findings.append(("not read", os.path.join(relative, file), kind))
        stems = Counter(os.path.splitext(path)[0] for path in pictures)
        split.findings += [("same name", p, "") for p in pictures if stems[os.path.splitext(p)[0]] > 1]
        split.classes[class_name] = pictures
        if found and not pictures:
            split.findings.append(("empty class", class_name, ""))
    counts = {name: len(pictures) for name, pictures in split.classes.items() if pictures}
    median = float(np.median(list(counts.values()))) if counts else 0
    for class_name, n in counts.items():
        if 2 * n < median or n > 2 * median:
            kind = "few" if n < median else "many"
            split.findings.append((kind, class_name, f"{n}, median {median:g}"))
    return split


def compare_classes(splits: list[Split]) -> None:
    """Adds a class mismatch to the split that lacks the class."""
    both = len(splits) == 2 and all(any(s.classes) for s in splits)
    for one, other in (splits, splits[::-1]) if both else ():
        one.findings += [
            ("class mismatch", name, f"not in {one.name}/, {len(other.classes[name])} pictures in {other.name}/")
            for name in sorted(set(other.classes) - set(one.classes))
        ]


@functools.cache
def imagenet100_lists() -> dict[str, frozenset[str]]:
    """{name: its WordNet ids} of the lists called ImageNet-100; the first is CMC's."""
    here = Path(__file__).parent
    lists, name = {CMC[0]: (here / "imagenet100.txt").read_text().split()}, ""
    for line in (here / "imagenet100_lists.txt").read_text().splitlines():
        if line.startswith("["):
            name = line[1 : line.index("]")]
        elif line and not line.startswith("#"):
            lists.setdefault(name, []).extend(line.split())
    return {name: frozenset(ids) for name, ids in lists.items()}


def which_imagenet100(split: Split) -> dict | None:
    """Which list of 100 ImageNet classes these are, and how they differ; None unless they are 2 to 999 WordNet ids.

    list: its name, or None; compared_with: CMC's, or another one that they nearly are; in_both, extra, missing: of that.
    """
    classes, lists = {name for name, pictures in split.classes.items() if pictures}, imagenet100_lists()
    if not (2 <= len(classes) <= 999 and all(map(WORDNET_ID.fullmatch, classes))):
        return None
    nearest = max(lists, key=lambda name: len(classes & lists[name]))
    same = classes == lists[nearest]
    close = 2 * len(classes & lists[nearest]) > len(classes | lists[nearest])
    other = nearest if close and not same else CMC[0]
    found = dict(list=nearest if same else None, compared_with=other, in_both=len(classes & lists[other]))
    return found | dict(extra=sorted(classes - lists[other]), missing=sorted(lists[other] - classes))


def in_words(found: dict) -> str:
    """What `which_imagenet100` found, in one line."""
    if found["list"] == CMC[0]:
        return f"ImageNet-100: the list of {CMC[0]} ({CMC[1]}), as in the papers here"
    what = f"the list of {found['list']}" if found["list"] else "no known list"
    if not found["list"] and found["compared_with"] != CMC[0]:
        what += f", nearest is that of {found['compared_with']}"
    parts = [f"{found['in_both']} classes are in both"]
    for word in ("extra", "missing"):
        if names := found[word]:
            more = f", ... ({len(names)} in all)" if len(names) > NAMED else ""
            parts.append(f"{word} {', '.join(names[:NAMED])}{more}")
    return f"ImageNet-100: {what}; beside that of {found['compared_with']}: {'; '.join(parts)}"


class Pictures:
    """All pictures of the splits in one row of arrays: what `examine` saw of each. A million take about 100 MB."""

    def __init__(self, splits: list[Split], limit: int | None = None):
        self.splits = splits
        rows = [
            (s, c, p) for s, split in enumerate(splits) for c, paths in enumerate(split.classes.values()) for p in paths
        ]
        self.total = len(rows)
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        self.split = np.array([s for s, _, _ in rows], np.int8)
        self.label = np.array([c for _, c, _ in rows], np.int32)
        self.paths = [p for _, _, p in rows]
        self.sides = np.zeros((len(rows), 2), np.int32)
        self.bytes = np.zeros(len(rows), np.int64)
        self.digest = np.zeros(len(rows), "S32")  # hexadecimal: NumPy cuts zero bytes off the end of a byte string

    def __len__(self) -> int:
        return len(self.paths)

    def jobs(self, min_side: int):
        for start in range(0, len(self), CHUNK):
            rows = range(start, min(start + CHUNK, len(self)))
            yield start, [os.path.join(self.splits[self.split[i]].folder, self.paths[i]) for i in rows], min_side

    def record(self, start: int, seen: list[Seen]) -> None:
        for i, one in enumerate(seen, start):
            self.sides[i], self.bytes[i], self.digest[i] = (one.width, one.height), one.bytes, one.digest.hex()
            self.splits[self.split[i]].findings += [(kind, self.paths[i], detail) for kind, detail in one.findings]

    def name(self, i: int) -> str:
        return os.path.join(self.splits[self.split[i]].name, self.paths[i])

    def find_same(self) -> list[list[str]]:
        """Groups of files of equal content; each is one finding per file beyond the first, of the gravest kind."""
        whole = np.flatnonzero(self.digest != b"")
        order = whole[np.argsort(self.digest[whole], kind="stable")]
        equal = self.digest[order][1:] == self.digest[order][:-1]
        groups = []
        for group in np.split(order, np.flatnonzero(~equal) + 1):
            if len(group) < 2:
                continue
            group = np.sort(group).tolist()
            first = self.name(group[0])
            groups.append([self.name(i) for i in group])
            if len({self.split[i] for i in group}) > 1:
                kind = "leak"
            else:
                kind = "two classes" if len({self.label[i] for i in group}) > 1 else "duplicate"
            for i in group[1:]:
                self.splits[self.split[i]].findings.append((kind, self.paths[i], f"as {first}"))
        return sorted(groups)


def _examine_rows(job: tuple[int, list[str], int]) -> tuple[int, list[Seen]]:
    start, paths, min_side = job
    return start, [examine(path, min_side) for path in paths]


# ---------------------------------------------------------------------------------------------------------- the report


def summary(split: Split, pictures: Pictures, number: int) -> dict:
    """The split's numbers: plain ints, for the table and the JSON file."""
    counts = [len(paths) for paths in split.classes.values()]
    sides = pictures.sides[(pictures.split == number) & (pictures.sides[:, 0] > 0)]

    def three(values):
        values = np.asarray(values)
        return [int(values.min()), int(np.median(values)), int(values.max())] if len(values) else [0, 0, 0]

    return {
        "folder": str(split.folder),
        "classes": sum(map(bool, split.classes)),
        "pictures": sum(counts),
        "bytes": int(pictures.bytes[pictures.split == number].sum()),
        "per_class_min_median_max": three(counts),
        "width_min_median_max": three(sides[:, 0]),
        "height_min_median_max": three(sides[:, 1]),
        "per_class": {name: len(paths) for name, paths in split.classes.items()},
    }


def print_report(splits: list[Split], numbers: list[dict], examples: int) -> None:
    def three(values):
        return " / ".join(map(str, values))

    print(f"{'':<8}{'classes':>8}{'pictures':>10}{'MB':>9}   {'per class':<18}{'width':<18}{'height':<18}")
    for split, n in zip(splits, numbers):
        print(
            f"{printable(split.name):<8}{n['classes']:>8}{n['pictures']:>10}{n['bytes'] / 1e6:>9.1f}   "
            f"{three(n['per_class_min_median_max']):<18}{three(n['width_min_median_max']):<18}"
            f"{three(n['height_min_median_max']):<18}"
        )
    print(f"{'':<38}(smallest / median / largest)")
    by_kind = defaultdict(list)
    for split in splits:
        for kind, path, detail in split.findings:
            by_kind[kind].append((os.path.join(split.name, path), detail))
    for level in (ERROR, WARNING, NOTE):
        kinds = [kind for kind in KINDS if KINDS[kind][0] == level and kind in by_kind]
        print(f"\n{level}" + ("" if kinds else ": nothing"))
        for kind in kinds:
            found = sorted(by_kind[kind])
            print(f"{len(found):>8}  {KINDS[kind][1]}")
            for path, detail in found[:examples]:
                print(f"{'':<12}{printable(path)}" + (f": {printable(detail)}" if detail else ""))
            if 0 < examples < len(found):
                print(f"{'':<12}... {len(found) - examples} more")


def write_report(path: str, content: dict) -> None:
    try:
        files.write_json(Path(path), content)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from None


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.demo:
        args.data = args.tree
        demo.ensure_for(args, launch.Process(device=torch.device("cpu")))
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: no such folder to write it in")
    folders = find_splits(args.tree)
    class_list = None
    if args.class_list:
        class_list = sets.read_class_list(
            args.class_list, {name for f in folders.values() for name in sets.folders_in(f)}
        )
    unlabelled = not (class_list or any(map(sets.folders_in, folders.values())))
    splits = [list_split(name, folder, class_list, unlabelled) for name, folder in folders.items()]
    compare_classes(splits)
    pictures = Pictures(splits, args.limit)

    count = args.workers or workers.default_workers(len(pictures), 1000)
    bar = workers.Rate("checking", len(pictures), "pictures")
    try:
        for start, seen in workers.in_processes(_examine_rows, pictures.jobs(args.min_side), count):
            pictures.record(start, seen)
            bar.add(len(seen))
    except KeyboardInterrupt:
        raise workers.Interrupted(
            f"interrupted after {bar.done} of {len(pictures)} pictures; nothing was changed"
        ) from None
    finally:
        bar.close()
    seconds = bar.seconds
    same = pictures.find_same()

    numbers = [summary(split, pictures, i) for i, split in enumerate(splits)]
    print_report(splits, numbers, args.examples)
    imagenet100 = which_imagenet100(splits[0])
    if imagenet100:
        print(f"\n{in_words(imagenet100)}")
    errors = sum(KINDS[kind][0] == ERROR for split in splits for kind, _, _ in split.findings)
    if args.json:
        found = [
            {"kind": kind, "level": KINDS[kind][0], "split": split.name, "path": path, "detail": detail}
            for split in splits
            for kind, path, detail in split.findings
        ]
        write_report(
            args.json,
            {
                "tree": str(args.tree),
                "checked": len(pictures),
                "pictures": pictures.total,
                "seconds": round(seconds, 2),
                "errors": errors,
                "imagenet100": imagenet100,
                "splits": {split.name: n for split, n in zip(splits, numbers)},
                "counts": dict(Counter(f["kind"] for f in found)),
                "findings": found,
                "same_content": same,
            },
        )
    what = (
        f"{len(pictures)} pictures"
        if len(pictures) == pictures.total
        else f"{len(pictures)} of {pictures.total} pictures"
    )
    verdict = f"{errors} things break training" if errors != 1 else "1 thing breaks training"
    print(
        f"\nresult: {verdict if errors else 'nothing breaks training'}; {what} opened in {seconds:.1f} s "
        f"({len(pictures) / max(seconds, 1e-6):.0f}/s, {count} process{'es' * (count > 1)})"
    )
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
