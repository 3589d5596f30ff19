"""Compare the pictures per second that workers deliver from JPEG files with a Pillow pipeline's.

    python benchmarks/decode_jpeg.py --data /data/imagenet-100     # default: generated pictures

published style  The published training code of the patch negatives, in torchvision and numpy: each
                 worker decodes a picture, makes two MoCo v2 views of it with Pillow (crop, jitter,
                 grey, blur, flip), normalises them, and builds one patch-based negative from the
                 first, patch by patch.
this loader      common.data in host mode: each worker decodes a picture once and cuts two crops as
                 uint8; the main process receives them. Floats, colours, blur and negatives are not
                 in this number: with a GPU they are made there, batched; see
                 benchmarks/augment_kornia.py.

Both sides get the same pictures, the same number of workers and the same batch size; workers are
started and warm before the clock runs. Sides alternate, each repeat in a process of its own so that
its memory can be told. Before that, one thread measures what decoding a picture and cutting two
crops costs in each of the ways considered for the loader.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.functional import interpolate
from torchvision import io, transforms

from benchmarks import photographs
from benchmarks.photographs import spread
from common.augment import IMAGENET_MEAN, IMAGENET_STD, Compose, RandomResizedCrop
from common.data import Loader
from common.sets import FolderSet, open_tree

SIZE = 224  # crop side
PATCH_SIDES = (16, 72)  # smallest and largest patch of the ImageNet-100 runs


# ---------------------------------------------------------------------------------- published style


class PatchNegative:
    """Make a mosaic (3, S, S) of square patches of one random side, cut anywhere from a view."""

    def __init__(self, sides: tuple[int, int], rng: np.random.Generator):
        self.sides = sides
        self.rng = rng

    def __call__(self, view: torch.Tensor) -> torch.Tensor:
        view = view.numpy()
        size = view.shape[-1]
        side = int(self.rng.integers(self.sides[0], self.sides[1] + 1))
        cells = size // side + 1
        mosaic = np.empty((3, cells * side, cells * side), dtype=view.dtype)
        for row in range(cells):
            for column in range(cells):
                top, left = self.rng.integers(0, size - side, 2)
                patch = view[:, top : top + side, left : left + side]
                y, x = row * side, column * side
                mosaic[:, y : y + side, x : x + side] = patch
        return torch.from_numpy(mosaic[:, :size, :size].copy())


def pil_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


class PublishedStyle(torch.utils.data.Dataset):
    def __init__(self, pictures: FolderSet):
        self.pictures = pictures
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([pil_blur], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        self.negative = PatchNegative(PATCH_SIDES, np.random.default_rng(0))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int):
        with open(self.pictures.path(row), "rb") as file:
            picture = Image.open(file).convert("RGB")
        query, key = self.view(picture), self.view(picture)
        return query, key, self.negative(query)[None], int(self.pictures.targets[row])


def published_style(pictures: FolderSet, workers: int, batch_size: int):
    return torch.utils.data.DataLoader(
        PublishedStyle(pictures),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


# -------------------------------------------------------------------------------------- this loader


def this_loader(pictures: FolderSet, workers: int, batch_size: int) -> Loader:
    crop = Compose(RandomResizedCrop(SIZE, (0.2, 1.0)))
    options = {"workers": workers, "data_device": "host", "progress": False}
    return Loader(pictures, (crop, crop), batch_size, device="cpu", seed=0, **options)


def run_side(side: str, pictures: FolderSet, workers: int, batch_size: int, answer) -> None:
    """Run one repeat in a process of its own: put (pictures/s, peak memory in MiB) on `answer`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision.io")
    if side == "this loader":
        loader = this_loader(pictures, workers, batch_size)
    else:
        loader = published_style(pictures, workers, batch_size)

    def receive(loader) -> int:
        if side == "this loader":
            return sum(len(crops[0]) for _, crops, _, _ in loader.batches())
        return sum(len(query) for query, *_ in loader)

    receive(loader)  # start the workers, fill the caches
    started = time.perf_counter()
    rate = receive(loader) / (time.perf_counter() - started)
    if side == "this loader":
        loader.close()
    del loader  # ends the workers: the memory of children is known once they have ended
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    answer.put((rate, own + workers * worker))


# ----------------------------------------------------------------------------------------- decoders


def decoders(pictures: FolderSet, most: int = 100) -> dict[str, list[float]]:
    """Return the rates of one thread that decodes each picture once and cuts the same two crops."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision.io")
    paths = pictures.paths[:most]
    geometry = RandomResizedCrop(SIZE, (0.2, 1.0))
    heights, widths = torch.tensor([Image.open(p).size[::-1] for p in paths]).unbind(1)
    generator = torch.Generator().manual_seed(0)
    boxes = [geometry.sample(heights, widths, generator).tolist() for _ in range(2)]

    def pillow(row):
        with open(paths[row], "rb") as file:
            return Image.open(file).convert("RGB")

    def torchvision_io(row):
        return io.decode_jpeg(io.read_file(paths[row]), mode=io.ImageReadMode.RGB)

    def pillow_crops(picture, row):
        corners = [box[row] for box in boxes]
        parts = [picture.crop((left, top, left + w, top + h)) for top, left, h, w in corners]
        parts = [part.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for part in parts]
        return [torch.from_numpy(np.array(part).transpose(2, 0, 1).copy()) for part in parts]

    def torch_crops(picture, row):
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        corners = [box[row] for box in boxes]
        parts = [picture[None, :, t : t + h, left : left + w] for t, left, h, w in corners]
        return [interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True) for part in parts]

    ways = {
        "Pillow, crops by Pillow": (pillow, pillow_crops),
        "Pillow, crops by torch": (pillow, torch_crops),
        "torchvision.io, crops by torch (this loader)": (torchvision_io, torch_crops),
    }
    rates = {name: [] for name in ways}
    for repeat in range(4):
        for name, (decode, crop) in ways.items():
            started = time.perf_counter()
            for row in range(len(paths)):
                crop(decode(row), row)
            if repeat:  # the first is the warm-up
                rates[name].append(len(paths) / (time.perf_counter() - started))
    return rates


# --------------------------------------------------------------------------------------------- main


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="TREE", help=photographs.ABOUT)
    parser.add_argument("--repeats", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="in pictures (default 16)")
    parser.add_argument(
        "--pictures", type=int, default=384, help="pictures per pass; a smaller set is repeated"
    )
    parser.add_argument(
        "--at-least", type=float, default=3.0, help="exit with 1 if the ratio is lower (default 3)"
    )
    return parser.parse_args(argv)


def print_decoders(pictures: FolderSet) -> None:
    print(
        f"\none thread, decode once, cut two crops at {SIZE}            pictures/s, median (range)"
    )
    torch.set_num_threads(1)
    for name, rates in decoders(pictures).items():
        print(f"  {name:<38}{spread(rates):>40}")


def in_a_process(target, *inputs):
    """Return what `target` puts on its last argument, run in a process of its own."""
    answer = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=target, args=(*inputs, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{inputs[0]}: ended with status {process.exitcode}")
    return answer.get()


def measure(args: argparse.Namespace, tree: Path, title: str) -> int:
    pictures = open_tree(tree)
    files = len(pictures)
    kilobytes = statistics.median(Path(path).stat().st_size for path in pictures.paths) / 1000
    versions = f"Pillow {Image.__version__}, torch {torch.__version__}"
    print(f"{title}: {files} files, median {kilobytes:.0f} kB; {versions}")
    print_decoders(pictures)

    count = max(args.pictures, args.batch_size * max(1, args.workers))
    pictures = pictures.select([i % files for i in range(count)])
    sides = ("published style", "this loader")
    rates = {side: [] for side in sides}
    memory = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side in sides:
            rate, mebibytes = in_a_process(run_side, side, pictures, args.workers, args.batch_size)
            rates[side].append(rate)
            memory[side].append(mebibytes)
    print(
        f"\n{args.workers} workers, batch {args.batch_size}, {args.repeats} repeats, alternating"
        "       pictures/s, median (range)    peak memory, MiB"
    )
    for side in sides:
        print(f"  {side:<38}{spread(rates[side]):>40}{max(memory[side]):>20.0f}")
    print(
        "peak memory: the process plus its workers, each at its own peak; "
        "pages they share are counted repeatedly"
    )
    pairs = zip(rates["this loader"], rates["published style"])
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(
        f"\nresult: ratio {ratio:.2f} (this loader / published style, median of pairs; "
        f"wanted: {args.at_least:g})"
    )
    return 0 if ratio >= args.at_least else 1


def main(argv=None) -> int:
    args = parse_args(argv)
    with photographs.tree(args.data) as (tree, title):
        return measure(args, tree, title)


if __name__ == "__main__":
    raise SystemExit(main())
