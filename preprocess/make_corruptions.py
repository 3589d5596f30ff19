"""Make a benchmark like ImageNet-C from your own pictures: 15 corruptions at 5 severities.

    python preprocess/make_corruptions.py IMAGENET100 IMAGENET100-C
    python preprocess/make_corruptions.py CIFAR10/val CIFAR10-C --size 0 --format png

TREE is a root, whose val/ (else test/, validation/) is taken, or a folder of class folders such as
a val/ itself. It writes OUT/<corruption>/<severity>/<class>/<name>, which
`eval_robustness.py --corruption OUT` reads. As for ImageNet-C, pictures are resized to 256 and
centre-cropped to 224 first, and saved as JPEG of quality 85. For sets of small pictures, --size 0
leaves them as they are; strengths that are lengths in pixels then scale with the picture.

The corruptions have the strengths and operations of Hendrycks & Dietterich (2019) on today's
libraries, not the pixels of the published files (preprocess/corruptions.py; preprocess/README.md
lists what differs). Numbers that are compared with published ones need the published files;
comparing models with each other on one set does not.

Each file depends only on the seed, its class and name, the corruption and the severity: reruns, any
number of --workers and any --shard give the same bytes. Existing files are kept, so the same
command continues where it stopped. OUT/corruptions.json holds the
settings, OUT/failed.txt the pictures that could not be read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from io import BytesIO
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from torchvision import transforms

from common import UsageError, UserError, cli, clock, inputs, launch, options, printable, sets
from common.pictures import as_rgb
from preprocess import demo, workers
from preprocess.corruption_tree import (
    ENDINGS,
    Job,
    Settings,
    check_out,
    key_of,
    plan,
    settle,
    source_folder,
    target_names,
)
from preprocess.corruptions import CORRUPTIONS, corrupt

FORMAT = 2  # increase it if the same settings give other pictures
SETTINGS = "corruptions.json"
JPEG_QUALITY = 85  # ImageNet-C's
PRESETS = {
    "demo": {
        "tree": "data/demo",
        "out": "runs/try-corruptions",
        "size": 0,
        "format": "png",
        "severities": [3],
        "limit": 2,
        "workers": 2,
    }
}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    group = parser.add_argument_group("data")
    group.add_argument(
        "tree",
        nargs="?",
        metavar="TREE",
        help="folder of class folders, or a root with val/",
    )
    group.add_argument(
        "out", nargs="?", metavar="OUT", help="output folder, new or from an earlier run"
    )
    group.add_argument(
        "--class-list", metavar="FILE", help="use only the class folders in FILE, one per line"
    )
    group.add_argument(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="use only the first N pictures of each class",
    )
    _add_picture_arguments(parser.add_argument_group("pictures"))
    group = parser.add_argument_group("run")
    workers.add_workers_argument(group)
    workers.add_shard_argument(group)
    args = parser.parse_args(argv)
    if not args.tree or not args.out:
        raise UsageError(
            "give TREE (pictures in class folders) and OUT (a folder to make), or --demo"
        )
    corruptions = [name for name in CORRUPTIONS if name in args.corruptions]
    return cli.replace(args, corruptions=corruptions, severities=sorted(set(args.severities)))


def _add_picture_arguments(group) -> None:
    group.add_argument(
        "--corruptions",
        nargs="+",
        metavar="NAME",
        choices=CORRUPTIONS,
        default=list(CORRUPTIONS),
        help=f"some of {', '.join(CORRUPTIONS)} (default: all)",
    )
    group.add_argument(
        "--severities",
        nargs="+",
        type=int,
        metavar="1-5",
        choices=range(1, 6),
        default=[1, 2, 3, 4, 5],
    )
    group.add_argument(
        "--size",
        type=cli.count,
        default=224,
        metavar="PIXELS",
        help="side of the centre crop, after a resize of the shorter side to 256/224 of it "
        f"(up to {options.WHOLE_UP_TO}: to the side itself); 0: leave pictures as they are",
    )
    group.add_argument(
        "--no-resize", action="store_const", const=0, dest="size", help="the same as --size 0"
    )
    group.add_argument(
        "--format",
        choices=list(ENDINGS),
        default="jpeg",
        help=f"jpeg: quality {JPEG_QUALITY}; png: no loss",
    )
    group.add_argument("--seed", type=cli.count, default=0)


class Done(NamedTuple):
    """The outcome of a job."""

    source: str
    files: int
    bytes: int
    seconds: float  # of processor time
    failure: str  # "" where all went well


def read_picture(path: str, size: int) -> np.ndarray:
    """Return the picture (H, W, 3) uint8, resized and cropped as ImageNet-C's sources were.

    size 0 leaves the picture as it is. Raises any error of Pillow for damaged files.
    """
    image = as_rgb(Image.open(workers.read(path)))
    if size:
        image = transforms.functional.resize(image, inputs.eval_resize(size))  # Pillow's bilinear
        image = transforms.functional.center_crop(image, size)
    return np.asarray(image)


def do(job: Job) -> Done:
    """Write the missing variants of one picture; report an unreadable one as a failure.

    Raises OSError if writing fails.
    """
    began = time.process_time()
    settings = job.settings
    try:
        picture = read_picture(os.path.join(settings.root, job.source), settings.size)
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Done(job.source, 0, 0, time.process_time() - began, workers.reason(error))
    key = key_of(settings.seed, job.source)
    count = 0
    size = 0
    failures = []
    for name, severity in job.variants:
        try:
            corrupted = corrupt(picture, name, severity, key)
        except Exception as error:  # pixelate reduces a picture of a few pixels to none
            failures.append(f"{name} {severity}: {workers.reason(error)}")
            if isinstance(error, MemoryError):
                break
            continue
        encoded = BytesIO()
        if settings.format == "png":
            Image.fromarray(corrupted).save(encoded, "PNG")
        else:
            Image.fromarray(corrupted).save(encoded, "JPEG", quality=JPEG_QUALITY, optimize=True)
        target = os.path.join(settings.out, name, str(severity), job.target)
        workers.write_picture(target, encoded.getbuffer())
        count += 1
        size += encoded.tell()
    return Done(job.source, count, size, time.process_time() - began, "; ".join(failures))


def finish(args, source: Path, out: Path, sources: list[str], targets: dict[str, str]) -> None:
    """Write the missing files in OUT and print the result.

    sources: the pictures of this shard, below `source`. targets: file names of all pictures.
    Raises OSError if writing fails, UserError if pictures failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "seed": args.seed, "size": args.size, "files": args.format}
    for line in settle(out / SETTINGS, record, source):
        print(line, flush=True)
    variants = [(name, severity) for name in args.corruptions for severity in args.severities]
    settings = Settings(str(source), str(out), args.size, args.format, args.seed)
    jobs = plan(sources, targets, variants, settings)
    wanted = len(sources) * len(variants)
    missing = sum(len(job.variants) for job in jobs)
    processes = args.workers or workers.default_workers(missing, 1000)
    print(
        f"corrupting {len(sources)} pictures of {printable(source)}: {wanted} files, "
        f"{wanted - missing} exist; {workers.count_processes(processes)}",
        flush=True,
    )
    if args.size and jobs:
        _note_enlarged(os.path.join(source, jobs[0].source), args.size)
    bar = workers.Rate("corrupting", missing, "files")
    done = workers.do_all(do, jobs, processes, bar, files=attrgetter("files"))
    failures = {one.source: one.failure for one in done if one.failure}
    listing = workers.list_failures(out, "failed", args.shard, failures)
    count = sum(one.files for one in done)
    size = sum(one.bytes for one in done)
    per_picture = ""
    if jobs:
        mean = sum(one.seconds for one in done) / len(jobs)
        per_picture = f" ({mean:.2f} s of processor time per picture)"
    print(
        f"result: {wanted - missing + count} of {wanted} files in {printable(out)}, "
        f"{len(args.corruptions)} corruptions x {len(args.severities)} severities; "
        f"{count} made now, {size / 1e6:.1f} MB, "
        f"in {clock(bar.seconds)}{per_picture}"
    )
    if failures:
        path, reason = sorted(failures.items())[0]
        raise UserError(
            f"{len(failures)} of {len(sources)} pictures failed, listed in {listing}; "
            f"the first: {printable(path)}: {reason}"
        )


def _note_enlarged(path: str, size: int) -> None:
    """If this picture is small, print how to keep small pictures as they are."""
    with contextlib.suppress(Exception), Image.open(workers.read(path)) as image:
        if min(image.size) < size // 2:
            print(
                f"note: small pictures, such as {printable(path)} ({image.width} x "
                f"{image.height}), are enlarged to {size}; --size 0 leaves them as they are",
                flush=True,
            )


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.demo:
        demo.ensure_for(cli.replace(args, data=args.tree), launch.Process())
    tree = Path(args.tree)
    out = Path(args.out)
    source = source_folder(args.tree)
    check_out(out, source, tree, SETTINGS)
    opened = sets.open_tree(source, class_list=args.class_list)
    sources = sorted(os.path.relpath(path, opened.root) for path in opened.paths)
    # for all pictures: a name does not depend on --limit or --shard
    targets = target_names(sources, args.format)
    if args.limit:
        of_class = groupby(sources, key=lambda path: path.split(os.sep)[0])
        sources = [path for _, paths in of_class for path in islice(paths, args.limit)]
    sources = sources[args.shard[0] - 1 :: args.shard[1]]
    try:
        finish(args, source, out, sources, targets)
    except OSError as error:
        hint = ""
        if error.errno == errno.ENOSPC:
            hint = "; free some space and run the same command again to continue"
        raise UserError(f"{error.filename or out}: {error.strerror or error}{hint}") from None


if __name__ == "__main__":
    cli.run(main)
