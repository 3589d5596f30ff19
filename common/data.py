"""Pictures in, views out.

    train_set = sets.open_set("/data/imagenet-100", "train")
    loader = Loader(train_set, views=(recipe, recipe), batch_size=128, device="cuda", seed=0)
    for epoch in range(200):
        loader.set_epoch(epoch)
        for views, target, index in loader:      # views: list of float (B, 3, S, S) on the device
            ...

Two ways to feed a step, chosen by `data_device`:

- device: equal-sized pictures live on the device as one uint8 tensor; a step gathers rows, no workers.
- host:   a worker makes a whole batch: one call samples the crop boxes of all pictures, each file is read and decoded
          once, and the crops of every view are cut from it as uint8. Colour, blur and the rest run on the device.

Every draw is a function of (seed, epoch, step, rank), so the views depend neither on the number of workers nor on the
way of feeding (host crops are rounded to uint8, device crops are not), and an epoch can be entered in the middle.

JPEGs are decoded by torchvision.io where it still has its decoder (Pillow's pixels, a fifth to a quarter faster), all
other kinds by Pillow; crops are cut by torch's integer resize, two to three times as fast as Pillow's and within one grey
level of it (benchmarks/decode_jpeg.py). JPEG's reduced-size decoding would change the pixels and is not used.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from common import UsageError, UserError, processes
from common.augment import Compose, Geometry
from common.bar import Bar
from common.sets import ArraySet, BadPicture, PictureSet

try:  # deprecated since torchvision 0.29, its named successor needs FFmpeg: used for as long as it is there
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# Which random stream of a step: each has its own generator, so adding a colour operation never moves a crop.
CROPS, COLOURS, ORDER = 0, 1, 2
CPU_BYTES = 4 << 30  # 'auto' keeps up to this much uint8 in main memory; on CUDA up to a third of what is free


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: int) -> torch.Generator:
    """A CPU generator that belongs to this step alone (SeedSequence mixes the five numbers into one seed)."""
    state = np.random.SeedSequence([abs(seed), epoch, step, rank, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def scale_boxes(boxes: Tensor, heights: Tensor, widths: Tensor, to_heights: Tensor, to_widths: Tensor) -> Tensor:
    """The same part of another picture: boxes (N, 4) top, left, height, width carried from one size to another.

    Rounded to whole pixels, at least one pixel, inside the other picture; equal sizes give the boxes unchanged.
    """
    top, left, height, width = boxes.double().unbind(1)

    def carry(start, length, old, new):
        length = (length * new / old).round().clamp(min=1).minimum(new)
        return (start * new / old).round().minimum(new - length), length

    top, height = carry(top, height, heights.double(), to_heights.double())
    left, width = carry(left, width, widths.double(), to_widths.double())
    return torch.stack((top, left, height, width), 1).long()


def decoded(source: PictureSet, row: int, image: Image.Image | Tensor) -> Tensor:
    """Pixels of what source.open(row) gave as RGB: uint8 (3, H, W), in memory as H, W, 3 where it had to be decoded.

    EXIF orientation is ignored. Raises BadPicture.
    """
    if isinstance(image, Tensor):
        return image
    try:
        if decode_jpeg is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            encoded = torch.frombuffer(image.fp.getbuffer(), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise source.bad_picture(row, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def cut(picture: Tensor, box: Sequence[int], target: Sequence[int], size: int) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): Geometry.apply for one picture, in integers.

    box: top, left, height, width; target: Geometry.target of it (height and width to resize to, top and left of the
    part to keep, negative where the result is padded with zeros).
    """
    top, left, height, width = box
    new_height, new_width, cut_top, cut_left = target
    part = picture[:, top : top + height, left : left + width]
    if (height, width) != (new_height, new_width):
        part = interpolate(part[None], (new_height, new_width), mode="bilinear", antialias=True)[0]
    if (new_height, new_width) == (size, size):
        return part
    part = part[:, max(cut_top, 0) : max(cut_top, 0) + size, max(cut_left, 0) : max(cut_left, 0) + size]
    out = torch.zeros((3, size, size), dtype=torch.uint8)
    top, left = max(-cut_top, 0), max(-cut_left, 0)
    out[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return out


# ------------------------------------------------------------------------------------------------------ crops of a step


class _HostCrops(torch.utils.data.Dataset):
    """Item (epoch, step, rows) is one step, as a worker makes it: (crops, target, index, paths found bad), or a UserError.

    crops: uint8 (B, 3, S, S) of every geometry, then of the partner. An error is returned, not raised: the DataLoader would
    wrap it in a traceback. bad: rows known to be unreadable, to be replaced by the next row that is not.
    """

    def __init__(self, source, partner, geometries: Sequence[Geometry], seed: int, rank: int, skip_bad: bool, bad=()):
        self.source, self.partner, self.geometries = source, partner, geometries
        self.seed, self.rank, self.skip_bad, self.bad = seed, rank, skip_bad, set(bad)

    def __getitem__(self, request):
        (epoch, step, rows), crops, bad_paths = request, None, []
        try:
            while crops is None:
                index = torch.tensor(self._readable(rows))
                try:
                    crops = self._draw(epoch, step, index)
                except BadPicture as error:  # rare: start the batch anew, so that the boxes belong to the final rows
                    if not self.skip_bad:
                        raise
                    self.bad.add(error.row)
                    bad_paths.append(error.path)
        except UserError as error:
            return error
        return crops, self.source.targets[index], index, bad_paths

    def _readable(self, rows: np.ndarray) -> list[int]:
        n = len(self.source)
        if len(self.bad) == n:
            raise UserError(f"{self.source.name}: no readable picture in it")
        return [next(r % n for r in range(row, row + n) if r % n not in self.bad) for row in rows.tolist()]

    def _draw(self, epoch: int, step: int, index: Tensor) -> list[Tensor]:
        pictures, heights, widths = self._open(self.source, index)
        generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
        boxes = [geometry.sample(heights, widths, generator) for geometry in self.geometries]
        crops = self._cut(pictures, self.geometries, boxes)
        if self.partner is not None:
            twins, to_heights, to_widths = self._open(self.partner, index)
            twin_boxes = scale_boxes(boxes[0], heights, widths, to_heights, to_widths)
            crops += self._cut(twins, self.geometries[:1], [twin_boxes])
        return crops

    def _open(self, source: PictureSet, index: Tensor):
        """Pictures for `_cut`, their heights and their widths, int64 (B,)."""
        pictures = [(source, row, source.open(row)) for row in index.tolist()]
        sizes = [p.shape[1:] if isinstance(p, Tensor) else p.size[::-1] for _, _, p in pictures]
        return pictures, *torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(1)

    def _cut(self, pictures, geometries: Sequence[Geometry], boxes: list[Tensor]) -> list[Tensor]:
        crops = [torch.empty((len(pictures), 3, g.size, g.size), dtype=torch.uint8) for g in geometries]
        targets = [torch.stack(g.target(b[:, 2], b[:, 3]), 1).tolist() for g, b in zip(geometries, boxes)]
        boxes = [b.tolist() for b in boxes]
        for i, opened in enumerate(pictures):
            picture = decoded(*opened)
            pictures[i] = opened = None  # the decoded pixels go as soon as the crops are cut
            for view, geometry in enumerate(geometries):
                crops[view][i] = cut(picture, boxes[view][i], targets[view][i], geometry.size)
        return crops


class _DeviceCrops(_HostCrops):
    """The same from ArraySets on the device, all pictures at once: float crops in [0, 1]."""

    def _open(self, source: ArraySet, index: Tensor):
        return source[index], *(torch.full((len(index),), side) for side in source.size)

    def _cut(self, pictures, geometries, boxes):
        return [geometry.apply(pictures, box) for geometry, box in zip(geometries, boxes)]


class _Requests:
    """The sampler of the DataLoader: the requests of the epoch that is about to start."""

    pending: list[tuple[int, int, np.ndarray]] = []

    def __iter__(self):
        return iter(self.pending)


def _quiet_worker(_: int) -> None:
    """Ctrl-C and a job's SIGTERM reach the workers too; the main process still needs them for the step it finishes.

    So Ctrl-C and SIGUSR1 are left to the main process, and a SIGTERM only starts a minute of grace. Workers also end when
    the main process asks them to, and when it is gone.
    """

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


# Loaders whose workers run. A loader kept in a global would otherwise meet the end of the interpreter with them alive.
_working: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_working):
        loader.close()


# -------------------------------------------------------------------------------------------- pictures on the device


class _SizesDiffer(UsageError):
    pass


def _common_size(source: PictureSet, most: int = 512) -> tuple[int, int] | None:
    """(height, width) if `most` pictures spread over the set agree; None if they do not. Reads headers only."""
    if isinstance(source, ArraySet):
        return source.size
    sizes = set()
    for row in range(0, len(source), max(1, len(source) // most)):
        with contextlib.suppress(Exception), Image.open(source.path(row)) as image:  # decoding will say what is wrong
            sizes.add(image.size[::-1])
        if len(sizes) > 1:
            break
    return sizes.pop() if len(sizes) == 1 else None


def _fits(sources: list[PictureSet], device: torch.device) -> bool:
    """Whether 'auto' keeps these sets on the device. A pack is, on a CPU, read faster by workers: integers, no decoding."""
    sizes = [_common_size(source) for source in sources]
    if None in sizes or (device.type == "cpu" and any(isinstance(s, ArraySet) and s.file for s in sources)):
        return False
    total = sum(len(source) * 3 * height * width for source, (height, width) in zip(sources, sizes))
    return total <= (torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else CPU_BYTES)


def _hold(
    source: PictureSet, device: torch.device, threads: int, skip_bad: bool, progress: bool
) -> tuple[ArraySet, dict[int, BadPicture]]:
    """(the set on the device, what could not be read by row); read once per set and device, then remembered.

    Raises _SizesDiffer, BadPicture (unless skip_bad), UserError when the memory does not suffice.
    """
    if isinstance(source, ArraySet) and device.type == "cpu":
        return source, {}
    if source.held is None or source.held[0] != device:
        try:
            images, bad = _load(source, device, threads, skip_bad, progress)
        except (torch.OutOfMemoryError, MemoryError):
            raise UserError(f"{source.name}: its pictures do not fit on {device}: use --data-device host") from None
        source.held = device, ArraySet(images, source.targets, source.classes, source.name), bad
    _, held, bad = source.held
    if bad and not skip_bad:
        raise next(iter(bad.values()))
    return held, bad


def _load(source: PictureSet, device: torch.device, threads: int, skip_bad: bool, progress: bool):
    """(uint8 (N, 3, H, W) on the device, {bad row: BadPicture})."""
    bad = {}

    def decode(row: int) -> Tensor | None:  # in a thread: decoders release the interpreter lock
        try:
            return decoded(source, row, source.open(row))
        except BadPicture as error:
            if not skip_bad:
                raise
            bad[row] = error

    first = next((row for row in range(len(source)) if decode(row) is not None), None)
    if first is None:
        raise UserError(f"{source.name}: no readable picture in it")
    blank = torch.zeros_like(decode(first))
    images = torch.empty((len(source), *blank.shape), dtype=torch.uint8, device=device)
    bar = Bar(f"reading {source.name}", len(source), "pictures", enabled=progress)
    with contextlib.closing(bar), ThreadPoolExecutor(threads) as pool:
        for rows in torch.arange(len(source)).split(512):
            if isinstance(source, ArraySet):
                block = source[rows]
            else:
                pictures = [blank if picture is None else picture for picture in pool.map(decode, rows.tolist())]
                for row, picture in zip(rows.tolist(), pictures):
                    if picture.shape != blank.shape:
                        raise _SizesDiffer(
                            f"{source.path(row)} is {picture.shape[2]}x{picture.shape[1]}, {source.path(first)} is "
                            f"{blank.shape[2]}x{blank.shape[1]}: pictures of different sizes need --data-device host"
                        )
                block = torch.stack(pictures)
            images[rows[0] : rows[-1] + 1] = block.to(device)  # rows stored as H, W, RGB become planes there
            bar.add(len(rows))
    return images, dict(sorted(bad.items()))


# -------------------------------------------------------------------------------------------------------------- loader


class Loader:
    """Iterates over (views, target, index), all on `device`; see the top of this file.

    views       one augment.Compose per view; its first operation is the geometry.
    batch_size  per process. The global batch of step s is order[s*B*W : (s+1)*B*W], rank r takes its r-th slice.
    shuffle     order = permutation drawn from (seed, epoch); otherwise the rows in order.
    drop_last   drop the incomplete global batch. When kept, it is split as evenly as can be over the ranks (and dropped
                after all if it has fewer rows than there are ranks: every rank makes the same number of steps).
    shuffle=False, drop_last=False is the evaluation loader: rank r takes rows r, r+W, r+2W, ...: every row exactly
                once over all ranks; ranks may differ by one step.
    workers     host mode: worker processes of this process (0: in this process); device mode: decoding threads.
    data_device auto, host or device.
    partner     a set of equal length, row by row the twin of `dataset` (texture images): one more view follows, the
                twin under exactly the parameters of view 0, the crop box scaled to the twin's size.
    skip_bad    an unreadable picture is replaced by the next readable row of the set (index and target are the
                replacement's) and its path is kept in `bad_images`; otherwise it ends the run with a UserError.
    progress    show the decoding bar and notes; default: on rank 0.

    mode is 'host' or 'device'. bad_images: paths replaced so far. wait_seconds: time spent waiting for workers,
    view_seconds: time spent issuing the view operations (neither waits for the device); set them to 0 to start anew.
    """

    def __init__(
        self,
        dataset: PictureSet,
        views: Sequence[Compose],
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 2,
        data_device: str = "auto",
        partner: PictureSet | None = None,
        skip_bad: bool = False,
        progress: bool | None = None,
    ):
        if partner is not None and len(partner) != len(dataset):
            raise ValueError(f"the partner set has {len(partner)} pictures, the set {len(dataset)}")
        if len(dataset) == 0:
            raise UsageError(f"{dataset.name}: no pictures in it")
        if drop_last and len(dataset) < batch_size * world_size:
            raise UsageError(
                f"{dataset.name}: its {len(dataset)} pictures do not fill one batch of {batch_size * world_size}: "
                f"use --batch-size {len(dataset) // world_size * world_size} or less"
            )
        self.dataset, self.partner, self.views = dataset, partner, tuple(views)
        self.batch_size, self.device, self.seed = batch_size, torch.device(device), seed
        self.rank, self.world_size, self.shuffle, self.drop_last = rank, world_size, shuffle, drop_last
        self.workers, self.skip_bad = workers, skip_bad
        self.progress = rank == 0 if progress is None else progress
        self.epoch = self.start_step = 0
        self.bad_images: list[str] = []
        self.wait_seconds = self.view_seconds = 0.0
        self._workers, self._requests = None, _Requests()
        self._crops = self._crops_from(data_device)
        self.mode = "device" if isinstance(self._crops, _DeviceCrops) else "host"

    def _crops_from(self, data_device: str) -> _HostCrops:
        options = [view.geometry for view in self.views], self.seed, self.rank, self.skip_bad
        sources = [self.dataset] + [self.partner] * (self.partner is not None)
        if data_device == "device" or (data_device == "auto" and _fits(sources, self.device)):
            threads = min(max(1, self.workers), processes.cores())
            try:
                parts = [_hold(s, self.device, threads, self.skip_bad, self.progress) for s in sources]
            except _SizesDiffer as error:
                if data_device == "device":
                    raise
                if self.progress:
                    print(f"note: decoding step by step instead of once: {error}", flush=True)
            else:
                held, bad = zip(*parts)
                self.bad_images += [error.path for part in bad for error in part.values()]
                return _DeviceCrops(held[0], held[1] if len(held) > 1 else None, *options, bad=set().union(*bad))
        return _HostCrops(self.dataset, self.partner, *options)

    def __repr__(self) -> str:
        how = f"{self.workers} workers" if self.mode == "host" else f"held on {self.device}"
        return f"{self.dataset.name}: {len(self.dataset)} pictures, {len(self.dataset.classes)} classes, {how}"

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration runs the steps start_step, start_step + 1, ... of this epoch."""
        self.epoch, self.start_step = epoch, start_step

    @property
    def _evaluates(self) -> bool:
        return not self.shuffle and not self.drop_last

    def __len__(self) -> int:
        """Steps of a whole epoch (of this rank, for the evaluation loader)."""
        if self._evaluates:
            return -(-len(range(self.rank, len(self.dataset), self.world_size)) // self.batch_size)
        whole, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        return whole + (not self.drop_last and rest >= self.world_size)

    def _steps(self) -> list[tuple[int, int, np.ndarray]]:
        """(epoch, step, this rank's rows) from start_step to the end of the epoch."""
        n, batch, world = len(self.dataset), self.batch_size, self.world_size
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(n, generator=step_generator(self.seed, self.epoch, 0, 0, ORDER))
        if self._evaluates:
            parts = order[self.rank :: world].split(batch)
        else:
            parts = [part.tensor_split(world)[self.rank] for part in order.split(batch * world)]
        return [(self.epoch, step, parts[step].numpy()) for step in range(self.start_step, len(self))]

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        epoch = self.epoch
        for step, crops, target, index in self.batches():
            started = time.perf_counter()
            if self.mode == "host":
                crops = [crop.to(self.device, non_blocking=True).to(torch.float32).div_(255) for crop in crops]
            target, index = (t.to(self.device, non_blocking=True) for t in (target, index))
            generator = step_generator(self.seed, epoch, step, self.rank, COLOURS)
            recipes = [(view, view.sample(len(index), generator)) for view in self.views]
            if self.partner is not None:
                recipes.append(recipes[0])
            views = [view.apply(crop, params) for crop, (view, params) in zip(crops, recipes, strict=True)]
            self.view_seconds += time.perf_counter() - started
            yield views, target, index

    def batches(self) -> Iterator[tuple[int, list[Tensor], Tensor, Tensor]]:
        """The geometry alone: (step, crops (B, 3, S, S) of every view, target, index), what views are made of.

        Host mode: uint8 on the host, as the workers hand them over. Device mode: float in [0, 1] on the device.
        """
        requests, started = self._steps(), time.perf_counter()
        batches = self._from_workers(requests) if self.mode == "host" else map(self._crops.__getitem__, requests)
        for _, step, _ in requests:
            batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            crops, target, index, bad = batch
            self.bad_images += [path for path in bad if path not in self.bad_images]  # workers find them separately
            seconds = time.perf_counter() - started
            self.wait_seconds += seconds * (self.mode == "host")
            self.view_seconds += seconds * (self.mode == "device")
            yield step, crops, target, index
            started = time.perf_counter()

    def _from_workers(self, requests) -> Iterator:
        if self._workers is None:
            several = {"persistent_workers": True, "prefetch_factor": 2} if self.workers else {}
            self._workers = torch.utils.data.DataLoader(
                self._crops,
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),  # it draws a base seed at every epoch: not from the global generator
                **several,
            )
            _working.add(self)
        self._requests.pending = requests
        return iter(self._workers)

    def close(self) -> None:
        """End the workers now instead of when the loader is forgotten."""
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._workers = None
