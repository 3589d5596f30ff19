"""Pictures in, views out.

    train_set = sets.open_set("/data/imagenet-100", "train")
    loader = Loader(train_set, views=(recipe, recipe), batch_size=128, device="cuda", seed=0)
    for epoch in range(200):
        loader.set_epoch(epoch)
        for views, target, index in loader:      # views: list of float (B, 3, S, S) on the device
            ...

Two ways to feed a step, chosen by `data_device`:

- device: equal-sized pictures live on the device as one uint8 tensor; a step gathers rows, no workers.
- host:   a worker makes a whole batch: it samples all crop boxes, reads and decodes each file once, and cuts the crops of
          every view from it as uint8. Colour, blur and the rest run on the device. With a `decoder` (nvJPEG) it reads the
          files only; they are decoded and cut on the device, too.

Every draw is a function of (seed, epoch, step, rank), so the views depend neither on the number of workers nor on the
way of feeding (host crops are rounded to uint8, device crops are not), and an epoch can be entered in the middle.
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
from tqdm import tqdm

from common import UsageError, UserError, launch
from common.augment import Compose
from common.crops import COLOURS, ORDER, Decoder, DeviceCrops, EncodedCrops, HostCrops, decoded, step_generator
from common.sets import ArraySet, BadPicture, PictureSet

CPU_BYTES = 4 << 30  # 'auto' keeps up to this much uint8 in main memory; on CUDA up to a third of what is free


def quiet_worker(_: int) -> None:
    """Signals to the whole job reach the workers too, which the main process still needs for the step it finishes: only
    SIGTERM ends a worker, after a minute of grace (else the main process ends it, or its absence)."""
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


class _SizesDiffer(UsageError):
    pass


def _common_size(source: PictureSet) -> tuple[int, int] | None:
    """(height, width) if 512 pictures spread over the set agree; None if they do not. Reads headers only."""
    if isinstance(source, ArraySet):
        return source.size
    sizes = set()
    for row in range(0, len(source), max(1, len(source) // 512)):
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


def _hold(source: PictureSet, device: torch.device, threads: int, skip_bad: bool, progress: bool):
    """(ArraySet on the device, {bad row: BadPicture}); read once per set and device, then remembered.

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
    bad, blank = {}, None

    def read(row: int) -> Tensor | None:
        try:
            picture = decoded(source, row, source.open(row))
        except BadPicture as error:
            if not skip_bad:
                raise
            bad[row] = error
            return blank
        if blank is not None and picture.shape != blank.shape:
            raise _SizesDiffer(
                f"{source.path(row)} is {picture.shape[2]}x{picture.shape[1]}, {source.path(first)} is "
                f"{blank.shape[2]}x{blank.shape[1]}: pictures of different sizes need --data-device host"
            )
        return picture

    def block(rows: Tensor) -> Tensor:  # in a thread: decoders release the interpreter lock
        return torch.stack([read(row) for row in rows.tolist()])

    first = next((row for row in range(len(source)) if read(row) is not None), None)
    if first is None:
        raise UserError(f"{source.name}: no readable picture in it")
    blank = torch.zeros_like(read(first))
    images = torch.empty((len(source), *blank.shape), dtype=torch.uint8, device=device)
    chunks = torch.arange(len(source)).split(64)
    label = dict(desc=f"reading {source.name}", unit=" pictures", disable=not progress, leave=False)
    with tqdm(total=len(source), mininterval=5, delay=1, **label) as bar, ThreadPoolExecutor(threads) as pool:
        blocks = map(source.__getitem__, chunks) if isinstance(source, ArraySet) else pool.map(block, chunks)
        for rows, pictures in zip(chunks, blocks):
            images[rows[0] : rows[-1] + 1] = pictures.to(device)  # rows stored as H, W, RGB become planes there
            bar.update(len(rows))
    return images, dict(sorted(bad.items()))


class Loader:
    """Iterates over (views, target, index), all on `device`; see the top of this file.

    views       one augment.Compose per view; its first operation is the geometry.
    batch_size  per process. The global batch of step s is order[s*B*W : (s+1)*B*W], rank r takes its r-th slice.
    shuffle     order = permutation drawn from (seed, epoch); otherwise the rows in order.
    drop_last   drop the incomplete global batch. When kept, it is split as evenly as can be over the ranks (and dropped
                after all if it has fewer rows than there are ranks: every rank makes the same number of steps).
                With neither (evaluation) rank r takes rows r, r+W, r+2W, ...: every row once; ranks may differ by a step.
    workers     host mode: worker processes of this process (0: in this process); device mode: decoding threads.
    data_device auto, host or device.
    decoder     host mode: decodes whole batches of JPEGs onto `device` (crops.nvjpeg); None: the workers decode.
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
        decoder: Decoder | None = None,
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
        self._evaluates = not shuffle and not drop_last
        self.workers, self.skip_bad = workers, skip_bad
        self.progress = rank == 0 if progress is None else progress
        self.epoch = self.start_step = 0
        self.bad_images: list[str] = []
        self.wait_seconds = self.view_seconds = 0.0
        self._workers, self._requests = None, []  # the sampler of the workers: the steps of the epoch about to start
        self._crops = self._crops_from(data_device, decoder)
        self.mode = "device" if isinstance(self._crops, DeviceCrops) else "host"
        if decoder is not None and not isinstance(self._crops, EncodedCrops) and self.progress:
            why = (
                f"{dataset.name} is held on {self.device}" if self.mode == "device" else f"{dataset.name} has no files"
            )
            print(f"note: --decode cuda changes nothing: {why}, so no step decodes anything", flush=True)

    def _crops_from(self, data_device: str, decoder: Decoder | None) -> HostCrops:
        options = [view.geometry for view in self.views], self.seed, self.rank, self.skip_bad
        sources = [self.dataset] + [self.partner] * (self.partner is not None)
        if data_device == "device" or (data_device == "auto" and _fits(sources, self.device)):
            threads = min(max(1, self.workers), launch.cores())
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
                return DeviceCrops(held[0], held[1] if len(held) > 1 else None, *options, bad=set().union(*bad))
        if decoder is not None and not all(isinstance(source, ArraySet) for source in sources):
            return EncodedCrops(self.dataset, self.partner, *options, decoder=decoder, device=self.device)
        return HostCrops(self.dataset, self.partner, *options)

    def __repr__(self) -> str:
        how = f"{self.workers} workers" if self.mode == "host" else f"held on {self.device}"
        return f"{self.dataset.name}: {len(self.dataset)} pictures, {len(self.dataset.classes)} classes, {how}"

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration runs the steps start_step, start_step + 1, ... of this epoch."""
        self.epoch, self.start_step = epoch, start_step

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
                crops = [crop.to(self.device, non_blocking=True) for crop in crops]
                crops = [crop if crop.is_floating_point() else crop.to(torch.float32).div_(255) for crop in crops]
            target, index = (t.to(self.device, non_blocking=True) for t in (target, index))
            generator = step_generator(self.seed, epoch, step, self.rank, COLOURS)
            recipes = [(view, view.sample(len(index), generator)) for view in self.views]
            recipes += recipes[:1] * (self.partner is not None)
            views = [view.apply(crop, params) for crop, (view, params) in zip(crops, recipes, strict=True)]
            self.view_seconds += time.perf_counter() - started
            yield views, target, index

    def batches(self) -> Iterator[tuple[int, list[Tensor], Tensor, Tensor]]:
        """The geometry alone: (step, crops (B, 3, S, S) of every view, target, index), what views are made of.

        Host mode: uint8 on the host, as the workers hand them over. Device mode, or with a decoder: float in [0, 1] on the
        device.
        """
        requests, started = self._steps(), time.perf_counter()
        batches = self._from_workers(requests) if self.mode == "host" else map(self._crops.__getitem__, requests)
        for request in requests:
            batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            if self.mode == "host":
                self.wait_seconds += time.perf_counter() - started
                started = time.perf_counter()
            if isinstance(self._crops, EncodedCrops):
                batch = self._crops.finished(request, batch)
            crops, target, index, bad = batch
            self.bad_images += [path for path in bad if path not in self.bad_images]  # workers find them separately
            self.view_seconds += time.perf_counter() - started
            yield request[1], crops, target, index
            started = time.perf_counter()

    def _from_workers(self, requests) -> Iterator:
        if self._workers is None:
            self._workers = torch.utils.data.DataLoader(
                self._crops,
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=quiet_worker,
                generator=torch.Generator(),  # it draws a base seed at every epoch: not from the global generator
                persistent_workers=self.workers > 0,
            )
            _working.add(self)
        self._requests[:] = requests
        return iter(self._workers)

    def close(self) -> None:
        """End the workers now instead of when the loader is forgotten."""
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._workers = None
