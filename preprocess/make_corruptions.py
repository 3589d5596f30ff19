"""Make an ImageNet-C style benchmark of your own pictures: 15 corruptions at 5 severities.

    python preprocess/make_corruptions.py IMAGENET100 IMAGENET100-C
    python preprocess/make_corruptions.py CIFAR10/val CIFAR10-C --size 0 --format png

TREE is a root, whose val/ (else test/, validation/) is taken, or a folder of class folders such as a val/ itself. Written
are OUT/<corruption>/<severity>/<class>/<name>, what `eval_robustness.py --corruption OUT` reads. As ImageNet-C was made:
pictures are resized to 256 and centre-cropped to 224 first, and saved as JPEG of quality 85. --size 0 leaves them as they
are, for sets of small pictures; strengths that are lengths in pixels then go with the picture.

The corruptions have the strengths and operations of Hendrycks & Dietterich (2019) on today's libraries, not the pixels of
the published files (preprocess/corruptions.py; preprocess/README.md lists what differs). A number to stand beside a
published one needs the published files; a comparison of models on one set of pictures does not.

Each file depends on the seed, its class and name, the corruption and the severity, and on nothing else: reruns, any number
of --workers and any --shard give the same bytes. Files that are there are left alone, so the same command goes on where
it was stopped. OUT/corruptions.json holds the settings, OUT/failed.txt the pictures that could not be read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import json
import time
from collections import Counter
from importlib import metadata
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from common import UsageError, UserError, cli, crops, launch, options, printable, sets
from runner.progress import clock
from common.sets import SPLIT_NAMES
from preprocess import demo, workers
from preprocess.corruptions import CORRUPTIONS, corrupt

FORMAT = 2  # raise it when the same settings give other pictures
ENDINGS = {"jpeg": (".JPEG", (".jpeg", ".jpg")), "png": (".png", (".png",))}  # what is written, what may stay
JPEG_QUALITY = 85  # ImageNet-C's
PRESETS = {
    "demo": dict(tree="data/demo", out="runs/try-corruptions", size=0, format="png", severities=[3], limit=2, workers=2)
}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("tree", nargs="?", metavar="TREE", help="folder of class folders, or a root whose val/ is taken")
    g.add_argument("out", nargs="?", metavar="OUT", help="folder to make, or one that an earlier run began")
    g.add_argument("--class-list", metavar="FILE", help="these class folders only, one name a line")
    g.add_argument("--limit", type=cli.positive_int, metavar="N", help="only the first N pictures of each class")
    g = parser.add_argument_group("pictures")
    g.add_argument(
        "--corruptions",
        nargs="+",
        metavar="NAME",
        choices=CORRUPTIONS,
        default=list(CORRUPTIONS),
        help="of " + ", ".join(CORRUPTIONS) + " (default all)",
    )
    g.add_argument("--severities", nargs="+", type=int, metavar="1-5", choices=range(1, 6), default=[1, 2, 3, 4, 5])
    g.add_argument(
        "--size",
        type=cli.count,
        default=224,
        metavar="PIXELS",
        help="side of the centre crop, after a resize to 256/224 of it; 0: leave pictures as they are",
    )
    g.add_argument("--no-resize", action="store_const", const=0, dest="size", help="the same as --size 0")
    g.add_argument(
        "--format", choices=list(ENDINGS), default="jpeg", help=f"jpeg: quality {JPEG_QUALITY}; png: no loss"
    )
    g.add_argument("--seed", type=cli.count, default=0)
    g = parser.add_argument_group("run")
    g.add_argument("-j", "--workers", type=cli.positive_int, metavar="N", help="processes (one per core)")
    g.add_argument(
        "--shard",
        type=workers.shard,
        default=(1, 1),
        metavar="I/N",
        help="do part I of N, 1/N to N/N: one per machine (default 1/1)",
    )
    args = parser.parse_args(argv)
    if not args.tree or not args.out:
        raise UsageError("give TREE (pictures in class folders) and OUT (a folder to make), or --demo")
    args.corruptions = [name for name in CORRUPTIONS if name in args.corruptions]
    args.severities = sorted(set(args.severities))
    return args


def key_of(seed: int, relative: str) -> tuple[int, int]:
    """What the random draws of a picture depend on, besides corruption and severity: the seed, and its class and name."""
    name = os.fsencode(relative.replace(os.sep, "/"))
    return seed, int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")


# ----------------------------------------------------------------------------------------------------------- one picture


class Settings(NamedTuple):
    root: str  # of the pictures
    out: str
    size: int
    format: str
    seed: int


class Job(NamedTuple):
    settings: Settings
    source: str  # below root
    target: str  # below OUT/<corruption>/<severity>
    variants: list[tuple[str, int]]


class Done(NamedTuple):
    source: str
    files: int
    bytes: int
    seconds: float  # of processor time
    failure: str  # '' where all went well


def read_picture(path: str, size: int) -> np.ndarray:
    """(H, W, 3) uint8: resized and cropped as ImageNet-C's sources were, or as it is (size 0)."""
    image = crops.as_rgb(Image.open(workers.read(path)))
    if size:
        image = transforms.functional.resize(image, options.eval_resize(size))  # Pillow's bilinear filter
        image = transforms.functional.center_crop(image, size)
    return np.asarray(image)


def do(job: Job) -> Done:
    """Write the missing variants of one picture. Raises OSError where writing fails; an unreadable picture is a failure."""
    began, s = time.process_time(), job.settings
    path = os.path.join(s.root, job.source)
    try:
        picture = read_picture(path, s.size)
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Done(job.source, 0, 0, time.process_time() - began, workers.reason(error))
    key, made, written, failures = key_of(s.seed, job.source), 0, 0, []
    for name, severity in job.variants:
        try:
            corrupted = corrupt(picture, name, severity, key)
        except Exception as error:  # a picture of a few pixels, which pixelate reduces to none
            failures.append(f"{name} {severity}: {workers.reason(error)}")
            if isinstance(error, MemoryError):
                break
            continue
        encoded = BytesIO()
        if s.format == "png":
            Image.fromarray(corrupted).save(encoded, "PNG")
        else:
            Image.fromarray(corrupted).save(encoded, "JPEG", quality=JPEG_QUALITY, optimize=True)
        workers.write(os.path.join(s.out, name, str(severity), job.target), encoded.getbuffer())
        made, written = made + 1, written + encoded.tell()
    return Done(job.source, made, written, time.process_time() - began, "; ".join(failures))


# -------------------------------------------------------------------------------------------------------------- the tree


def source_folder(tree: str) -> Path:
    """The folder of class folders to corrupt: val/ (else test/, validation/) of a root, or the tree itself. UsageError."""
    tree = Path(tree)
    is_root = bool(workers.split_folders(tree))
    if is_root and not any(entry.is_dir() and _is_split(tree / entry.name) for entry in os.scandir(tree)):
        is_root = False  # class folders, one of them called train
    return sets.split_folder(tree, "val") if is_root else tree


def _is_split(folder: Path) -> bool:
    return folder.name in ("train", *SPLIT_NAMES["val"]) and any(entry.is_dir() for entry in os.scandir(folder))


def target_names(sources: list[str], format: str) -> dict[str, str]:
    """{path of a picture: path of its corrupted file below OUT/<corruption>/<severity>}, all different. UsageError.

    A name keeps its ending where that fits the format, else the ending is replaced; where this would give two pictures
    one name (a.png beside a.JPEG), the new ending is put behind the old one (a.png.JPEG).
    """
    ending, fitting = ENDINGS[format]
    names = {path: path for path in sources if path.lower().endswith(fitting)}
    others = [path for path in sources if path not in names]
    wish = {path: os.path.splitext(path)[0] + ending for path in others}
    counts, taken = Counter(wish.values()), set(names)
    for path in others:
        names[path] = wish[path] if counts[wish[path]] == 1 and wish[path] not in taken else path + ending
    doubled = [name for name, n in Counter(names.values()).items() if n > 1]
    if doubled:
        raise UsageError(f"two pictures would both become {doubled[0]}: rename one of them")
    return names


def check_out(out: Path, source: Path, tree: Path) -> None:
    """UsageError where OUT cannot be: among the pictures, or a folder that holds something else."""
    folder = workers.lies_in(out, source, [source, *workers.split_folders(tree)])
    if folder:
        raise UsageError(
            f"{out}: lies in the folder of the pictures {folder}, where it would become a class: "
            "name a folder outside it"
        )
    workers.check_own(out, "corruptions.json")


def settle(out: Path, settings: dict) -> list[str]:
    """Write OUT/corruptions.json, or compare with the one that is there. Returns lines to print. Raises UsageError."""
    file, versions = out / "corruptions.json", {}
    for package in ("corrupt-tta", "numpy", "pillow", "opencv-python", "scikit-image", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if not file.exists():
        workers.write(str(file), (json.dumps({"settings": settings, "versions": versions}, indent=2) + "\n").encode())
        return []
    try:
        before = json.loads(file.read_text())
        differ = [
            f"{k} {before['settings'].get(k)}, not {v}" for k, v in settings.items() if before["settings"].get(k) != v
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file}: damaged; remove it together with the corrupted pictures") from None
    if differ:
        raise UsageError(f"{out}: was begun with {'; '.join(differ)}: give the same, or name another folder")
    if before.get("versions") != versions:
        return [
            f"note: {out} was begun with other versions of {_changed(before.get('versions') or {}, versions)}; "
            "what is made now may differ in a grey level from what another rerun would have given"
        ]
    return []


def _changed(before: dict, now: dict) -> str:
    return ", ".join(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


def plan(sources: list[str], targets: dict[str, str], variants: list[tuple[str, int]], settings: Settings) -> list[Job]:
    """One job for every picture that lacks a variant. Makes the folders; each is listed once."""
    by_folder: dict[str, list[str]] = {}
    for path in sources:
        by_folder.setdefault(os.path.dirname(targets[path]), []).append(path)
    missing: dict[str, list[tuple[str, int]]] = {path: [] for path in sources}
    for folder, paths in by_folder.items():
        for variant in variants:
            where = os.path.join(settings.out, variant[0], str(variant[1]), folder)
            os.makedirs(where, exist_ok=True)
            there = set(os.listdir(where))
            for name in there:
                if name.endswith(".partial"):
                    workers.remove_stale(os.path.join(where, name))
            for path in paths:
                if os.path.basename(targets[path]) not in there:
                    missing[path].append(variant)
    return [Job(settings, path, targets[path], lacks) for path, lacks in missing.items() if lacks]


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.demo:
        args.data = args.tree
        demo.ensure_for(args, launch.Process(device=torch.device("cpu")))
    tree, out = Path(args.tree), Path(args.out)
    if not tree.is_dir():
        raise UsageError(f"{tree}: {'is a file, not a folder' if tree.exists() else 'no such folder'}")
    source = source_folder(args.tree)
    check_out(out, source, tree)
    opened = sets.open_tree(source, class_list=args.class_list)
    sources = sorted(os.path.relpath(path, opened.root) for path in opened.paths)
    targets = target_names(sources, args.format)  # of all pictures: a name does not depend on --limit or --shard
    if args.limit:
        of_class = groupby(sources, key=lambda path: path.split(os.sep)[0])
        sources = [path for _, paths in of_class for path in islice(paths, args.limit)]
    sources = sources[args.shard[0] - 1 :: args.shard[1]]
    variants = [(name, severity) for name in args.corruptions for severity in args.severities]
    try:
        finish(args, source, out, sources, targets, variants)
    except OSError as error:
        hint = "; free some space and run the same command again: it goes on" if error.errno == errno.ENOSPC else ""
        raise UserError(f"{error.filename or out}: {error.strerror or error}{hint}") from None


def finish(args, source: Path, out: Path, sources: list[str], targets: dict[str, str], variants) -> None:
    """Write what is missing in OUT and report. Raises OSError, UserError; exits with 1 where pictures failed."""
    out.mkdir(parents=True, exist_ok=True)
    for line in settle(out, {"format": FORMAT, "seed": args.seed, "size": args.size, "files": args.format}):
        print(line, flush=True)
    jobs = plan(sources, targets, variants, Settings(str(source), str(out), args.size, args.format, args.seed))
    wanted, missing = len(sources) * len(variants), sum(len(job.variants) for job in jobs)
    processes = args.workers or workers.default_workers(missing, 1000)
    print(
        f"corrupting {len(sources)} pictures of {source}: {wanted} files, {wanted - missing} are there; "
        f"{processes} process{'es' * (processes > 1)}",
        flush=True,
    )
    if args.size and jobs:
        _say_if_enlarged(os.path.join(source, jobs[0].source), args.size)

    bar, failures, made, size, seconds = workers.Rate("corrupting", missing, "files"), {}, 0, 0, 0.0
    try:
        for job_done in workers.in_processes(do, jobs, processes, names=lambda job: [job.source]):
            made, size, seconds = made + job_done.files, size + job_done.bytes, seconds + job_done.seconds
            bar.add(job_done.files)
            if job_done.failure:
                failures[job_done.source] = job_done.failure
    except KeyboardInterrupt:
        raise workers.Interrupted(
            "interrupted; what is written is whole, and the same command goes on from there"
        ) from None
    finally:
        bar.close()
    listing = workers.list_failures(out, "failed", args.shard, failures)
    print(
        f"result: {wanted - missing + made} of {wanted} files in {out}, {len(args.corruptions)} corruptions x "
        f"{len(args.severities)} severities; {made} made now, {size / 1e6:.1f} MB, in {clock(bar.seconds)}"
        + (f" ({seconds / len(jobs):.2f} s of processor time per picture)" if jobs else "")
    )
    if failures:
        path, reason = sorted(failures.items())[0]
        raise UserError(
            f"{len(failures)} of {len(sources)} pictures failed, listed in {listing}; the first: {printable(path)}: {reason}"
        )


def _say_if_enlarged(path: str, size: int) -> None:
    with contextlib.suppress(Exception), Image.open(workers.read(path)) as image:
        if min(image.size) < size // 2:
            print(
                f"note: pictures such as this one, {image.width} x {image.height}, are enlarged to {size}; "
                "--size 0 leaves them as they are",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
