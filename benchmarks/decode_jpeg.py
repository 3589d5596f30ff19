"""Pictures per second from JPEG files on the host: one Pillow pipeline per view, or decode once and cut the crops.

    python benchmarks/decode_jpeg.py --data /data/imagenet-100     # or without --data: generated pictures
    python benchmarks/decode_jpeg.py --data /data/imagenet-100 --device cuda

published style  what the published training code of the patch negatives does, in torchvision and numpy: each worker
                 decodes a picture, makes two MoCo v2 views of it with PIL (crop, jitter, grey, blur, flip), normalises
                 them, and builds one patch-based negative from the first, patch by patch.
this loader      common.data in host mode: each worker decodes a picture once and cuts two crops as uint8; the main
                 process receives them. Floats, colours, blur and negatives are not in this number: with a GPU they are
                 made there, batched; see benchmarks/augment_kornia.py.
on the device    with --device: what `--decode cuda` does. A worker reads the files, the main process has a batch of them
                 decoded (by nvJPEG, on `cpu` by a stand-in, one after the other) and cuts the crops there, as floats.
                 Both sides of this loader then end with crops on that device.

Both sides get the same pictures, the same number of workers and the same batch size; workers are started and warm
before the clock runs. Sides alternate, each repeat in a process of its own so that its memory can be told. Before
that, one thread: what decoding a picture and cutting two crops costs in each of the ways considered for the loader.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.functional import interpolate
from torchvision import io, transforms

from common import crops
from common.augment import IMAGENET_MEAN, IMAGENET_STD, Compose, RandomResizedCrop
from common.data import Loader
from common.sets import FolderSet, open_tree

SIZE, PATCH_SIDES = 224, (16, 72)  # crop side; smallest and largest patch of the ImageNet-100 runs


# ------------------------------------------------------------------------------------------------------ published style


class PatchNegative:
    """View (3, S, S) -> (3, S, S): a mosaic of square patches, all of one random side, cut from the view anywhere."""

    def __init__(self, sides: tuple[int, int], rng: np.random.Generator):
        self.sides, self.rng = sides, rng

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
                mosaic[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
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


# ---------------------------------------------------------------------------------------------------------- this loader


def this_loader(pictures: FolderSet, workers: int, batch_size: int, device: str, decoder=None) -> Loader:
    crop = Compose(RandomResizedCrop(SIZE, (0.2, 1.0)))
    how = dict(seed=0, workers=workers, data_device="host", progress=False, decoder=decoder)
    return Loader(pictures, (crop, crop), batch_size, device=device, **how)


def decoder_on(device: str) -> crops.Decoder:
    """nvJPEG, or what stands in for it."""
    if torch.device(device).type == "cuda":
        return crops.nvjpeg(torch.device(device))
    return lambda files: [io.decode_jpeg(file, io.ImageReadMode.RGB) for file in files]


def on_the_device(pictures: FolderSet, workers: int, batch_size: int, device: str) -> Loader:
    return this_loader(pictures, workers, batch_size, device, decoder_on(device))


OURS = {"this loader": this_loader, "on the device": on_the_device}


def run_side(side: str, pictures: FolderSet, workers: int, batch_size: int, device: str, answer) -> None:
    """One repeat, in a process of its own: puts (pictures/s, peak memory in MiB) on `answer`."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision.io")
    ours = side in OURS
    loader = (
        OURS[side](pictures, workers, batch_size, device) if ours else published_style(pictures, workers, batch_size)
    )

    def received(batches) -> int:
        count = 0
        for batch in batches:
            views = [crop.to(device, non_blocking=True) for crop in batch[1]] if ours else batch
            count += len(views[0])
        wait_for(device)
        return count

    received(loader.batches() if ours else loader)  # start the workers, fill the caches
    started = time.perf_counter()
    rate = received(loader.batches() if ours else loader) / (time.perf_counter() - started)
    if ours:
        loader.close()
    del loader  # ends the workers: the memory of children is known once they have ended
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, worker = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    answer.put((rate, own + workers * worker))


def wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def on_device_alone(pictures: FolderSet, batch_size: int, device: str, answer) -> None:
    """Puts {what: pictures per second} of batches whose files are read already on `answer`."""
    decoder, geometry = decoder_on(device), RandomResizedCrop(SIZE, (0.2, 1.0))
    both = crops.EncodedCrops(
        pictures, None, (geometry, geometry), 0, 0, False, decoder=decoder, device=torch.device(device)
    )
    requests = [(0, step, rows.numpy()) for step, rows in enumerate(torch.arange(len(pictures)).split(batch_size))]
    files = [[io.read_file(pictures.path(row)) for row in rows] for _, _, rows in requests]
    items = [both[request] for request in requests]
    ways = {
        f"batches of {batch_size}, decode": lambda: [decoder(batch) for batch in files],
        f"batches of {batch_size}, decode and cut": lambda: [both.finished(*pair) for pair in zip(requests, items)],
    }
    rates = {name: [] for name in ways}
    for repeat in range(4):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            wait_for(device)
            if repeat:
                rates[name].append(len(pictures) / (time.perf_counter() - started))
    answer.put(rates)


# ------------------------------------------------------------------------------------------------------------- decoders


def decoders(pictures: FolderSet, most: int = 100) -> dict[str, list[float]]:
    """Pictures per second of one thread that decodes each picture once and cuts the same two crops from it."""
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
        parts = [picture.crop((left, top, left + w, top + h)) for top, left, h, w in (box[row] for box in boxes)]
        parts = [part.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for part in parts]
        return [torch.from_numpy(np.array(part).transpose(2, 0, 1).copy()) for part in parts]

    def torch_crops(picture, row):
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        parts = [picture[None, :, t : t + h, le : le + w] for t, le, h, w in (box[row] for box in boxes)]
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


# ----------------------------------------------------------------------------------------------------------------- main


def generate(folder: Path, count: int = 48) -> Path:
    """`count` JPEG files of about 470x400 pixels and 100 kB: shapes on a gradient, and noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = int(rng.integers(420, 521)), int(rng.integers(350, 451))
        corners = rng.integers(40, 216, (2, 2, 3), dtype=np.uint8)
        picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(picture)
        for _ in range(40):
            x, y = rng.integers(0, width), rng.integers(0, height)
            w, h = rng.integers(5, 120, 2)
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
        noisy = np.asarray(picture) + rng.normal(0, 14, (height, width, 1))
        path = folder / f"class{i % 4}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=93)
    return folder


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.1f}  ({min(values):.1f} to {max(values):.1f})"


def ratio_of(rates: dict[str, list[float]], new: str, old: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[new], rates[old]))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        metavar="TREE",
        help="class folders of JPEG files, or the folder above with train/ "
        "(default: pictures generated in a temporary folder)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each side, alternating (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per batch (default 16)")
    parser.add_argument("--pictures", type=int, default=384, help="pictures per pass; a smaller set is repeated")
    parser.add_argument(
        "--device", metavar="cuda|cpu", help="measure decoding there as well; cpu: its code, not its speed"
    )
    parser.add_argument("--at-least", type=float, default=3.0, help="exit with 1 if the ratio is lower (default 3)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, tree: Path, what: str) -> int:
    pictures = open_tree(tree)
    files = len(pictures)
    kilobytes = statistics.median(Path(path).stat().st_size for path in pictures.paths) / 1000
    pictures = pictures.select([i % files for i in range(max(args.pictures, args.batch_size * max(1, args.workers)))])
    print(f"{what}: {files} files, median {kilobytes:.0f} kB; Pillow {Image.__version__}, torch {torch.__version__}")
    print(f"\none thread, decode once, cut two crops at {SIZE}            pictures/s, median (range)")
    torch.set_num_threads(1)
    for name, rates in decoders(pictures.select(range(min(files, len(pictures))))).items():
        print(f"  {name:<38}{spread(rates):>40}")

    context = multiprocessing.get_context("spawn" if args.device else None)  # CUDA does not live through a fork
    how = (args.batch_size, args.device or "cpu")

    def in_a_process(target, *inputs):
        answer = context.SimpleQueue()
        process = context.Process(target=target, args=(*inputs, answer))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{inputs[0]}: ended with status {process.exitcode}")
        return answer.get()

    if args.device:
        print(f"\non {args.device}, files read before")
        for name, found in in_a_process(
            on_device_alone, pictures.select(range(min(files, len(pictures), 512))), *how
        ).items():
            print(f"  {name:<38}{spread(found):>40}")
    sides = ["published style", *(OURS if args.device else ["this loader"])]
    rates, memory = {side: [] for side in sides}, {side: [] for side in sides}
    for _ in range(args.repeats):
        for side in sides:
            rate, mebibytes = in_a_process(run_side, side, pictures, args.workers, *how)
            rates[side].append(rate)
            memory[side].append(mebibytes)
    print(
        f"\n{args.workers} workers, batch {args.batch_size}, {args.repeats} repeats, alternating"
        "       pictures/s, median (range)    peak memory, MiB"
    )
    for side in sides:
        print(f"  {side:<38}{spread(rates[side]):>40}{max(memory[side]):>20.0f}")
    print("peak memory: the process plus its workers, each at its own peak; pages they share are counted repeatedly")
    ratio = ratio_of(rates, "this loader", "published style")
    if args.device:
        print(
            f"on the device / this loader: ratio {ratio_of(rates, 'on the device', 'this loader'):.2f}, median of pairs"
        )
    print(f"\nresult: ratio {ratio:.2f} (this loader / published style, median of pairs; wanted: {args.at_least:g})")
    return 0 if ratio >= args.at_least else 1


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.data is not None:
        tree = Path(args.data)
        return measure(args, tree / "train" if (tree / "train").is_dir() else tree, str(args.data))
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, generate(Path(folder)), "generated pictures (shapes and noise, not photographs)")


if __name__ == "__main__":
    raise SystemExit(main())
