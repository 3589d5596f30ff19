"""Make a set like Stylized-ImageNet from your own pictures: textures of another class.

    python preprocess/swap_textures.py IMAGENET100 IMAGENET100-stylized
    python preprocess/swap_textures.py CIFAR10/val CIFAR10-stylized

TREE is a root, whose val/ (else test/, validation/) is taken, or a folder of class folders such as
a val/ itself. It writes OUT/CLASS/NAME.png, which `tools/evaluate.py --stylized OUT` and
`eval_robustness.py --stylized OUT` read. Each picture keeps its class and its shapes, but is put
together from small blocks of a picture of another class: texture transfer as in Efros & Freeman,
"Image Quilting for Texture Synthesis and Transfer" (2001), Sec. 4. Stylized-ImageNet was made with
paintings and a network instead (Geirhos et al., 2019): numbers of the two cannot be compared.
Pictures whose shorter side is above 256 pixels are reduced to that.

Each file depends only on the seed, its class and name, and the list of pictures. Existing files are
kept, so the same command continues where it stopped. OUT/swapped.json holds the settings.
"""

from __future__ import annotations

import hashlib
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps

from common import UsageError, UserError, cli, printable, sets
from common.pictures import as_rgb
from preprocess import corruption_tree, workers

SETTINGS = "swapped.json"
SHORTER_SIDE = 256  # pixels; larger pictures are reduced to it
BLOCKS = 8  # to the shorter side of a picture
CANDIDATES = 4096  # blocks of the other picture that are compared
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
STREAM = 6  # separates these draws from others with the same key


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0])
    about = "folder of class folders, or a root with val/"
    parser.add_argument("tree", metavar="TREE", help=about)
    about = "output folder, new or from an earlier run"
    parser.add_argument("out", metavar="OUT", help=about)
    parser.add_argument("--seed", type=cli.count, default=0, help="seed of the other pictures")
    workers.add_workers_argument(parser)
    return cli.freeze(parser.parse_args(argv))


class Job(NamedTuple):
    """A picture, the one whose texture it takes, and the file to write."""

    source: str
    texture: str
    target: str


def match_histogram(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return `values` with the distribution of `like`, which may have another size."""
    ranks = np.empty(values.size, np.int64)
    ranks[values.ravel().argsort(kind="stable")] = np.arange(values.size)
    quantiles = np.linspace(0, 1, values.size)
    return np.quantile(like, quantiles)[ranks].reshape(values.shape)


def transfer(picture: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Return a picture put together from blocks of another one: (H, W, 3) uint8.

    picture: (H, W, 3) uint8, whose shapes stay. texture: (h, w, 3) uint8, which is enlarged if it
    is smaller than a block. The brightness of the picture is matched to that of the texture; every
    block, half of which overlaps the next, is then the one of nearest brightness. Overlaps are
    averaged.
    """
    height, width = picture.shape[:2]
    side = max(2, min(height, width) // BLOCKS)
    if min(texture.shape[:2]) < side:
        texture = np.asarray(scaled(Image.fromarray(texture), side))
    wanted = match_histogram(picture @ LUMA, texture @ LUMA).astype(np.float32)
    rows = np.unique(np.append(np.arange(0, height - side, side // 2), height - side))
    columns = np.unique(np.append(np.arange(0, width - side, side // 2), width - side))
    blocks = sliding_window_view(wanted, (side, side))[np.ix_(rows, columns)]
    colours = sliding_window_view(texture.astype(np.float32), (side, side), (0, 1))
    stride = max(1, round((colours[..., 0, 0, 0].size / CANDIDATES) ** 0.5))
    colours = colours[::stride, ::stride].reshape(-1, 3, side, side)
    found = np.einsum("nchw,c->nhw", colours, LUMA).reshape(len(colours), -1)
    scores = blocks.reshape(-1, side * side) @ found.T - (found**2).sum(1) / 2
    nearest = scores.argmax(1).reshape(len(rows), len(columns))
    total = np.zeros((3, height, width), np.float32)
    count = np.zeros((height, width), np.float32)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            total[:, row : row + side, column : column + side] += colours[nearest[i, j]]
            count[row : row + side, column : column + side] += 1
    return (total / count).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture with a shorter side of `side` pixels."""
    return ImageOps.scale(picture, side / min(picture.size), Image.Resampling.BILINEAR)


def read_picture(path: str) -> np.ndarray:
    """Return a picture (H, W, 3) uint8. Raises any error of Pillow for damaged files."""
    picture = as_rgb(Image.open(workers.read(path)))
    if min(picture.size) > SHORTER_SIDE:
        picture = scaled(picture, SHORTER_SIDE)
    return np.asarray(picture)


def do(job: Job) -> str:
    """Write the file of a job; return why that failed, or "". Raises OSError if writing fails."""
    try:
        swapped = transfer(read_picture(job.source), read_picture(job.texture))
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return f"{printable(job.source)} or {printable(job.texture)}: {workers.reason(error)}"
    encoded = BytesIO()
    Image.fromarray(swapped).save(encoded, "PNG")
    workers.write_picture(job.target, encoded.getbuffer())
    return ""


def plan(source: Path, out: Path, seed: int) -> list[Job]:
    """Return the jobs of all pictures below `source`; every texture is of another class.

    Raises UsageError for a single class.
    """
    opened = sets.open_tree(source)
    if len(opened.classes) < 2:
        raise UsageError(f"{source} has one class: textures of another class need two or more")
    labels = np.asarray(opened.targets)
    paths = [str(path) for path in opened.paths]
    relative = [os.path.relpath(path, opened.root) for path in paths]
    targets = corruption_tree.target_names(relative, "png")
    counts = np.bincount(labels, minlength=len(opened.classes))
    firsts = np.cumsum(counts) - counts  # pictures are in the order of their classes
    jobs = []
    for path, name, label in zip(paths, relative, labels):
        draws = np.random.default_rng([*corruption_tree.key_of(seed, name), STREAM])
        row = draws.integers(len(paths) - counts[label])  # among those of the other classes
        row += counts[label] * (row >= firsts[label])
        jobs.append(Job(path, paths[row], str(out / targets[name])))
    return jobs


def listing(jobs: list[Job], source: Path) -> str:
    """Return the number of pictures and a digest of their names, on which every texture depends."""
    names = [os.fsencode(os.path.relpath(job.source, source)) for job in jobs]
    digest = hashlib.sha256(b"\0".join(names)).hexdigest()
    return f"{len(jobs)} with names {digest[:12]}"


def main(argv=None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    source = corruption_tree.source_folder(args.tree)
    corruption_tree.check_out(out, source, Path(args.tree), SETTINGS)
    jobs = plan(source, out, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    record = {"seed": args.seed, "pictures": listing(jobs, source), "shorter_side": SHORTER_SIDE}
    for line in corruption_tree.settle(out / SETTINGS, record, source):
        print(line, flush=True)
    for folder in {os.path.dirname(job.target) for job in jobs}:
        os.makedirs(folder, exist_ok=True)
    missing = [job for job in jobs if not os.path.exists(job.target)]
    processes = args.workers or workers.default_workers(len(missing), 500)
    bar = workers.Rate("swapping textures", len(missing), "pictures")
    failures = [*filter(None, workers.do_all(do, missing, processes, bar))]
    made = len(missing) - len(failures)
    there = f"{len(jobs) - len(failures)} of {len(jobs)} pictures in {printable(out)}"
    print(f"result: {there}; {made} made now")
    if failures:
        raise UserError(f"{len(failures)} pictures failed; the first: {failures[0]}")


if __name__ == "__main__":
    cli.run(main)
