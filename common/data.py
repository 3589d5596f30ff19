"""Pictures in, views out.

    train_set = open_set("/data/imagenet-100", "train")
    loader = Loader(train_set, views=(recipe, recipe), batch_size=128, device="cuda", seed=0)
    for epoch in range(200):
        loader.set_epoch(epoch)
        for views, target, index in loader:      # views: list of float (B, 3, S, S) on the device
            ...

Two ways to feed a step, chosen by `data_device`:

- device: equal-sized pictures live on the device as one uint8 tensor; a step gathers rows, no workers.
- host:   a worker builds a whole batch: one call samples the crop boxes of all pictures, each file is read and decoded
          once, and the crops of every view are cut from it as uint8. Colour, blur and the rest run on the device.

A packed set (common/packed.py) is fed both ways: from a GPU's memory where it fits, else by workers that cut the crops
from its memory map, without decoding. On a CPU 'auto' means the workers: their integer resize is the faster by far.

Every draw is a function of (seed, epoch, step, rank), so the views depend neither on the number of workers nor on the
way of feeding (host crops are rounded to uint8, device crops are not), and an epoch can be entered in the middle.

Pillow opens files. JPEGs are decoded by torchvision.io where it still has its decoder (the same pixels, a fifth to a
quarter faster, and it refuses truncated files as well), all other kinds by Pillow. Crops are cut by torch's integer
resize, two to three times as fast as Pillow's and within one grey level of it; benchmarks/decode_jpeg.py measures both.
JPEG's reduced-size decoding (Image.draft) is not used: on photographs of 500x375 few crops shrink by a factor of two,
and where they do it would change the pixels.
"""

from __future__ import annotations

import atexit
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from common import UsageError, UserError, processes
from common.augment import Compose, ResizeCenterCrop
from common.bar import Bar
from common.packed import PackedSet
from common.sets import (
    ArraySet,
    BadPicture,
    FolderSet,
    PictureSet,
    open_set,
    open_tree,
    original_root_of,
    pair_by_path,
    read_class_list,
    split_folder,
)

__all__ = [
    "ArraySet",
    "FolderSet",
    "Loader",
    "PackedSet",
    "PictureSet",
    "open_set",
    "open_tree",
    "original_root_of",
    "pair_by_path",
    "read_class_list",
    "split_folder",
    "square",
]


try:  # deprecated since torchvision 0.29, its named successor needs FFmpeg: used for as long as it is there
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# Which random stream of a step: each has its own generator, so adding a colour operation never moves a crop.
CROPS, COLOURS, ORDER = 0, 1, 2
CPU_BYTES = 4 << 30  # 'auto' keeps up to this much uint8 in main memory; on CUDA up to a third of what is free


# -------------------------------------------------------------------------------------------------------------- drawing


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: int) -> torch.Generator:
    """A CPU generator that belongs to this step alone (SeedSequence mixes the five numbers into one seed)."""
    state = np.random.SeedSequence([abs(seed), epoch, step, rank, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def scale_boxes(
    boxes: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor, to_heights: torch.Tensor, to_widths: torch.Tensor
) -> torch.Tensor:
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


def _decoded(source: PictureSet, row: int, image: Image.Image) -> torch.Tensor:
    """Pixels of an opened picture as RGB: uint8 (3, H, W), in memory as H, W, 3. EXIF orientation is ignored."""
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


def _cut(picture: torch.Tensor, box: Sequence[int], target: Sequence[int], size: int) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, size, size): geometry.apply for one picture, in integers.

    box: top, left, height, width; target: geometry.target of it (height and width to resize to, top and left of the
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


def square(source: FolderSet, row: int, side: int) -> torch.Tensor:
    """The picture with its shorter side resized to `side`, the central square of it: uint8 (3, side, side), stored as RGB.

    The pixels that host mode makes with ResizeCenterCrop(side, side): torchvision's Resize(side), antialiased, and
    CenterCrop(side). Raises BadPicture.
    """
    picture = _decoded(source, row, source.open(row))
    sides = torch.tensor(picture.shape[1:]).view(2, 1)
    height, width, top, left = (int(t) for t in ResizeCenterCrop(side, side).target(*sides))
    if picture.shape[1:] != (height, width):
        rows = picture.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides that resize RGB by RGB, and keep that order
        picture = interpolate(rows, (height, width), mode="bilinear", antialias=True)[0]
    return picture[:, top : top + side, left : left + side]


def _next_good(rows: Sequence[int], bad: set[int], length: int, name: str) -> list[int]:
    """Replace every bad row by the next one of the set that is not bad."""
    if len(bad) == length:
        raise UserError(f"{name}: no readable picture in it")
    good = []
    for row in rows:
        while row in bad:
            row = (row + 1) % length
        good.append(row)
    return good


# ------------------------------------------------------------------------------------------------------------ host mode


class _HostBatches(torch.utils.data.Dataset):
    """One item is one batch: request (epoch, step, rows) -> (crops, target, rows, bad paths), or the UserError.

    crops: one uint8 (B, 3, S, S) per view, the partner's last. An error is returned, not raised: the DataLoader would
    wrap it in a traceback of the worker.
    """

    def __init__(self, source, partner, geometries, seed, rank, skip_bad):
        self.source, self.partner, self.geometries = source, partner, geometries
        self.seed, self.rank, self.skip_bad = seed, rank, skip_bad
        self.bad: set[int] = set()

    def __getitem__(self, request):
        epoch, step, rows = request
        rows, bad_paths = [int(r) for r in rows], []
        try:
            while True:
                rows = _next_good(rows, self.bad, len(self.source), self.source.name) if self.bad else rows
                try:
                    crops = self._cut(epoch, step, rows)
                    break
                except BadPicture as error:  # rare: start the batch anew, so that the boxes belong to the final rows
                    if not self.skip_bad:
                        raise
                    self.bad.add(error.row)
                    bad_paths.append(error.path)
        except UserError as error:
            return UserError(str(error))
        rows = torch.tensor(rows, dtype=torch.int64)
        return crops, self.source.targets[rows], rows, bad_paths

    def _cut(self, epoch: int, step: int, rows: list[int]) -> list[torch.Tensor]:
        images, heights, widths = self._headers(self.source, rows)
        generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
        boxes = [geometry.sample(heights, widths, generator) for geometry in self.geometries]
        crops = self._decode_and_cut(self.source, rows, images, self.geometries, boxes)
        if self.partner is not None:
            images, to_heights, to_widths = self._headers(self.partner, rows)
            twin_boxes = scale_boxes(boxes[0], heights, widths, to_heights, to_widths)
            crops += self._decode_and_cut(self.partner, rows, images, self.geometries[:1], [twin_boxes])
        return crops

    @staticmethod
    def _headers(source, rows):
        if isinstance(source, PackedSet):
            sides = torch.full((len(rows),), source.side)
            return [source.pixels(row) for row in rows], sides, sides
        images = [source.open(row) for row in rows]
        widths, heights = torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2).unbind(1)
        return images, heights, widths

    @staticmethod
    def _decode_and_cut(source, rows, images, geometries, boxes):
        crops = [torch.empty((len(rows), 3, g.size, g.size), dtype=torch.uint8) for g in geometries]
        targets = [torch.stack(g.target(b[:, 2], b[:, 3]), 1).tolist() for g, b in zip(geometries, boxes)]
        boxes = [b.tolist() for b in boxes]
        for i, row in enumerate(rows):
            picture = images[i] if isinstance(images[i], torch.Tensor) else _decoded(source, row, images[i])
            images[i] = None  # the decoded pixels go as soon as the crops are cut
            for view, geometry in enumerate(geometries):
                crops[view][i] = _cut(picture, boxes[view][i], targets[view][i], geometry.size)
        return crops


class _Requests:
    """The sampler of the DataLoader: the requests of the epoch that is about to start."""

    def __init__(self):
        self.pending: list[tuple[int, int, np.ndarray]] = []

    def __iter__(self):
        return iter(self.pending)


def _as_is(item):
    return item


def _quiet_worker(_: int) -> None:
    """Ctrl-C and a job's SIGTERM reach the workers too; the main process still needs them for the step it finishes.

    So Ctrl-C and SIGUSR1 are left to the main process, and a SIGTERM only starts a minute of grace. Workers also end when
    the main process asks them to, and when it is gone.
    """

    def grace(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(60)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, grace)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


# Loaders whose workers run. A loader kept in a global would otherwise meet the end of the interpreter with them alive.
_working: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_working):
        loader.close()


# ---------------------------------------------------------------------------------------------------------- device mode


class _SizesDiffer(UsageError):
    pass


def _common_size(source: PictureSet, most: int = 512) -> tuple[int, int] | None:
    """(height, width) if `most` pictures spread over the set agree; None if they do not. Reads headers only."""
    if not isinstance(source, FolderSet):
        return source.size
    size = None
    for row in range(0, len(source), max(1, len(source) // most)):
        try:
            with Image.open(source.path(row)) as image:
                width, height = image.size
        except Exception:  # reported, or replaced, when it is decoded
            continue
        if size is not None and size != (height, width):
            return None
        size = (height, width)
    return size


def _fits(sources: list[PictureSet], device: torch.device) -> bool:
    total = 0
    for source in sources:
        if device.type == "cpu" and isinstance(source, PackedSet):
            return False
        size = _common_size(source)
        if size is None:
            return False
        total += len(source) * 3 * size[0] * size[1]
    return total <= (torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else CPU_BYTES)


def _resident(source: PictureSet, device: torch.device, workers: int, skip_bad: bool, progress: bool):
    """(uint8 (N, 3, H, W) on device, {bad row: BadPicture}); decoded once per set and device, then remembered.

    Raises _SizesDiffer, BadPicture (unless skip_bad), UserError when the memory does not suffice.
    """
    if source._resident is None or source._resident[0] != device:
        try:
            if isinstance(source, ArraySet):
                source._resident = (device, source.images.to(device), {})
            elif isinstance(source, PackedSet):
                source._resident = (device, source.resident(device, progress), {})
            else:
                source._resident = (device, *_decode_all(source, device, workers, skip_bad, progress))
        except (torch.OutOfMemoryError, MemoryError):
            raise UserError(f"{source.name}: its pictures do not fit on {device}: use --data-device host") from None
    _, images, bad = source._resident
    if bad and not skip_bad:
        raise next(iter(bad.values()))
    return images, bad


def _decode_all(source: FolderSet, device: torch.device, workers: int, skip_bad: bool, progress: bool):
    size, first = None, None  # of the first readable picture
    images, bad, chunk = None, {}, 64

    def decode(rows: range):  # runs in a thread: Pillow releases the interpreter lock while it decodes
        done = []
        for row in rows:
            try:
                done.append((row, _decoded(source, row, source.open(row))))
            except BadPicture as error:
                done.append((row, error))
        return done

    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    bar = Bar(f"decoding {source.name}", len(source), "pictures", enabled=progress)
    try:
        parts = (range(start, min(start + chunk, len(source))) for start in range(0, len(source), chunk))
        for done in pool.map(decode, parts):
            good = []
            for row, pixels in done:
                if isinstance(pixels, BadPicture):
                    if not skip_bad:
                        raise pixels
                    bad[row] = pixels
                elif size not in (None, pixels.shape[1:]):
                    raise _SizesDiffer(
                        f"{source.path(row)} is {pixels.shape[2]}x{pixels.shape[1]}, {source.path(first)} is "
                        f"{size[1]}x{size[0]}: pictures of different sizes need --data-device host"
                    )
                else:
                    size, first = pixels.shape[1:], row if first is None else first
                    good.append((row, pixels))
            if good:
                if images is None:
                    images = torch.zeros((len(source), 3, *size), dtype=torch.uint8, device=device)
                block = torch.stack([pixels for _, pixels in good])
                if len(good) == len(done):
                    images[done[0][0] : done[-1][0] + 1] = block.to(device)
                else:
                    images[torch.tensor([row for row, _ in good], device=device)] = block.to(device)
            bar.add(len(done))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if images is None:
        raise UserError(f"{source.name}: no readable picture in it")
    return images, bad


# --------------------------------------------------------------------------------------------------------------- loader


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
        if data_device not in ("auto", "host", "device"):
            raise UsageError(f"--data-device {data_device}: choose auto, host or device")
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size * world_size}: at least one picture per process is needed")
        if workers < 0:
            raise UsageError(f"--workers {workers} must be 0 or more")
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
        self._requests = _Requests()
        self._workers = None
        self.mode = self._choose_mode(data_device)

    def _choose_mode(self, wish: str) -> str:
        sources = [self.dataset] + ([self.partner] if self.partner is not None else [])
        if wish == "host" or (wish == "auto" and not _fits(sources, self.device)):
            return "host"
        threads = min(max(1, self.workers), processes.cores())
        try:
            held = [_resident(s, self.device, threads, self.skip_bad, self.progress) for s in sources]
        except _SizesDiffer as error:
            if wish == "device":
                raise
            if self.progress:
                print(f"note: decoding step by step instead of once: {error}", flush=True)
            return "host"
        self._images = [images for images, _ in held]
        bad = {row: error for _, part in held for row, error in part.items()}
        self.bad_images += [error.path for _, part in held for error in part.values()]
        self._replacement = None
        if bad:
            rows = _next_good(range(len(self.dataset)), set(bad), len(self.dataset), self.dataset.name)
            self._replacement = torch.tensor(rows, dtype=torch.int64)
        return "device"

    def __repr__(self) -> str:
        how = f"{self.workers} workers" if self.mode == "host" else f"held on {self.device}"
        return f"{self.dataset.name}: {len(self.dataset)} pictures, {len(self.dataset.classes)} classes, {how}"

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration runs the steps start_step, start_step + 1, ... of this epoch."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch (of this rank, for the evaluation loader)."""
        n, batch, world = len(self.dataset), self.batch_size, self.world_size
        if self.drop_last:
            return n // (batch * world)
        if not self.shuffle:
            return -(-len(range(self.rank, n, world)) // batch)
        return n // (batch * world) + (n % (batch * world) >= world)

    def _steps(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, this rank's rows) from start_step to the end of the epoch."""
        n, batch, world = len(self.dataset), self.batch_size, self.world_size
        if not self.shuffle and not self.drop_last:
            mine = torch.arange(self.rank, n, world)
            for step in range(self.start_step, len(self)):
                yield step, mine[step * batch : (step + 1) * batch]
            return
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(n, generator=step_generator(self.seed, self.epoch, 0, 0, ORDER))
        for step in range(self.start_step, len(self)):
            yield step, order[step * batch * world : (step + 1) * batch * world].tensor_split(world)[self.rank]

    def __iter__(self) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
        epoch = self.epoch
        for step, crops, target, index in self.host_batches() if self.mode == "host" else self._from_device():
            started = time.perf_counter()
            if self.mode == "host":
                crops = [crop.to(self.device, non_blocking=True).to(torch.float32).div_(255) for crop in crops]
                target, index = (t.to(self.device, non_blocking=True) for t in (target, index))
            generator = step_generator(self.seed, epoch, step, self.rank, COLOURS)
            params = [view.sample(len(index), generator) for view in self.views]
            pairs = list(zip(self.views, params))
            if self.partner is not None:
                pairs.append(pairs[0])
            out = [view.apply(crop, param) for crop, (view, param) in zip(crops, pairs)]
            self.view_seconds += time.perf_counter() - started
            yield out, target, index

    def _from_device(self):
        epoch = self.epoch
        for step, rows in self._steps():
            started = time.perf_counter()
            if self._replacement is not None:
                rows = self._replacement[rows]
            generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
            index = rows.to(self.device)
            pictures = self._images[0][index]
            sizes = [torch.full((len(rows),), side) for side in pictures.shape[-2:]]
            boxes = [view.geometry.sample(*sizes, generator) for view in self.views]
            crops = [view.geometry.apply(pictures, box) for view, box in zip(self.views, boxes)]
            if self.partner is not None:
                twins = self._images[1][index]
                box = scale_boxes(boxes[0], *sizes, *(torch.full_like(sizes[0], s) for s in twins.shape[-2:]))
                crops.append(self.views[0].geometry.apply(twins, box))
            target = self.dataset.targets[rows].to(self.device)
            self.view_seconds += time.perf_counter() - started
            yield step, crops, target, index

    def host_batches(self) -> Iterator[tuple[int, list[torch.Tensor], torch.Tensor, torch.Tensor]]:
        """What the workers hand over: (step, uint8 crops (B, 3, S, S) of every view, target, index), on the host."""
        epoch = self.epoch
        if self._workers is None:
            self._workers = self._start_workers()
            _working.add(self)
        self._requests.pending = [(epoch, step, rows.numpy()) for step, rows in self._steps()]
        steps = [step for _, step, _ in self._requests.pending]
        started = time.perf_counter()
        batches = iter(self._workers)
        for step in steps:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                reason = str(error).split("\n")[0].rstrip(". ")
                raise UserError(f"{reason}: with too little memory or /dev/shm, use fewer --workers") from error
            if isinstance(batch, UserError):
                raise batch
            crops, target, index, bad = batch
            self.bad_images += [path for path in bad if path not in self.bad_images]  # workers find them separately
            self.wait_seconds += time.perf_counter() - started

            yield step, crops, target, index
            started = time.perf_counter()

    def _start_workers(self) -> torch.utils.data.DataLoader:
        geometries = [view.geometry for view in self.views]
        batches = _HostBatches(self.dataset, self.partner, geometries, self.seed, self.rank, self.skip_bad)
        several = {"persistent_workers": True, "prefetch_factor": 2} if self.workers else {}
        return torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=self._requests,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # it draws a base seed at every epoch: not from the global generator
            **several,
        )

    def close(self) -> None:
        """End the workers now instead of when the loader is forgotten."""
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._workers = None
