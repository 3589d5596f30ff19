"""Load pictures as views.

    train_set = sets.open_set("/data/imagenet-100", "train")
    loader = Loader(train_set, (recipe, recipe), batch_size=128, device="cuda", seed=0)
    for epoch in range(200):
        loader.set_epoch(epoch)
        for views, target, index in loader:  # views: list of float (B, 3, S, S) on the device
            ...

A step is fed in one of two ways, chosen by `data_device`:

- device: pictures of one size are kept on the device as one uint8 tensor (common.resident); a
          step gathers rows, without workers.
- host:   a worker makes a whole batch (common.crops): it samples all crop boxes, reads and decodes
          each file once, and cuts the crops of every view as uint8. Colour, blur and the rest run
          on the device.

Every draw is a function of (seed, epoch, step, rank). So the views depend neither on the number of
workers nor on `data_device` (except that host crops are rounded to uint8), and a run can resume in
the middle of an epoch.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing.queues
import os
import signal
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import UsageError, UserError, launch, resident
from common.augment import Compose, Params
from common.crops import COLOURS, ORDER, DeviceCrops, HostCrops, step_generator, to_device
from common.pictures import PictureSet


def quiet_worker(_: int) -> None:
    """Make a worker survive the signals sent to its job, and compute in one thread.

    A scheduler signals the workers too, but the main process still needs them to finish its step.
    Only SIGTERM ends a worker, after an hour; normally the main process ends it sooner.
    A worker that cannot hand over a batch, as where /dev/shm is full, ends too: otherwise the main
    process would wait for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(3600))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    torch.set_num_threads(1)


# Loaders with running workers, which are ended before the interpreter exits.
_working: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_working):
        loader.close()


def of_all_images(n: int, params: Params) -> Params:
    """Return `params` of an operation on chosen rows as those of n images.

    The operation then changes all images and keeps the chosen ones: more work, but in fixed shapes,
    which a compiler makes one graph of. Images that do not change have ones as parameters.
    """
    if params:
        rows = params["rows"]
        place = torch.full((n,), len(rows))
        place[rows] = torch.arange(len(rows))
        drawn = {name: value for name, value in params.items() if name != "rows"}
        ones = {name: value.new_ones(1, *value.shape[1:]) for name, value in drawn.items()}
        params = {name: torch.cat((drawn[name], ones[name]))[place] for name in drawn}
        params["chosen"] = place < len(rows)
    return params


def sent_together(params: list[Params], device: torch.device) -> list[Params]:
    """Return the parameters on the device, where they arrive as one tensor.

    They are some kilobytes, and each copy to a GPU takes as long to launch as a larger one.
    """
    parts = [
        F.pad(value.flatten().view(torch.uint8), (0, -value.nbytes % 8))  # numbers of 8 bytes fit
        for own in params
        for value in own.values()
    ]
    if not parts:
        return params
    packed = torch.cat(parts)
    if device.type == "cuda":
        packed = packed.pin_memory()
    pieces = iter(packed.to(device, non_blocking=True).split([len(part) for part in parts]))
    return [
        {
            name: next(pieces)[: value.nbytes].view(value.dtype).view(value.shape)
            for name, value in own.items()
        }
        for own in params
    ]


class Loader:
    """Iterate over (views, target, index), all on `device`; index holds rows of the set.

    views       one augment.Compose per view; its first operation is the geometry.
    batch_size  per process. With W ranks, the global batch of step s is
                order[s * batch_size * W : (s + 1) * batch_size * W]; rank r takes its r-th slice.
    shuffle     order is a permutation drawn from (seed, epoch); otherwise the rows in order.
    drop_last   drop the incomplete global batch. When kept, it is split as evenly as can be over
                the ranks, but dropped if it has fewer rows than there are ranks: every rank makes
                the same number of steps. With neither shuffle nor drop_last (evaluation) rank r
                takes rows r, r + W, r + 2W, ...: every row once, and ranks may differ by a step.
    workers     host mode: worker processes (0: decode in this process); device mode: threads.
    data_device auto, host or device.
    partner     a set of equal length whose rows are the twins of those of `dataset` (texture
                images). It adds one view: the twin under the parameters of view 0, with its crop
                box scaled.
    skip_bad    replace an unreadable picture by the next readable row of the set (index and target
                are those of the replacement); otherwise it ends the run with a UserError.
    progress    show the decoding bar and notes; default: on rank 0.
    compile     compile the operations after the crop, which then change every picture of a batch.

    Attributes: mode is 'host' or 'device'; bad_images lists the paths replaced so far; wait_seconds
    is the time spent waiting for workers, and view_seconds the time spent issuing view operations
    (neither waits for the device; set them to 0 to restart the count).

    Raises UsageError if the set is empty or does not fill one batch, or if its pictures differ in
    size and data_device is 'device'.
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
        compile: bool = False,
    ):
        if partner is not None and len(partner) != len(dataset):
            raise ValueError(f"the partner set has {len(partner)} pictures, the set {len(dataset)}")
        if len(dataset) == 0:
            raise UsageError(f"{dataset.name}: there are no pictures in it")
        if drop_last and len(dataset) < batch_size * world_size:
            fitting = world_size * 2 ** int(math.log2(max(2, len(dataset) // world_size)))
            raise UsageError(
                f"{dataset.name}: its {len(dataset)} pictures do not fill one batch of "
                f"{batch_size * world_size}: give more, or --batch-size {fitting} (in a train "
                f"script with --bn-splits {max(1, fitting // 8)} and a queue of a multiple of "
                f"{fitting} keys); --preset photos sets these for 40 pictures or more"
            )
        if not drop_last and len(dataset) < world_size:
            raise UsageError(
                f"{dataset.name}: its {len(dataset)} pictures are fewer than the {world_size} "
                "processes"
            )
        self.dataset = dataset
        self.partner = partner
        self.views = tuple(views)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.workers = workers
        self.skip_bad = skip_bad
        self.progress = rank == 0 if progress is None else progress
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._apply = self._apply_compiled if compile else Compose.apply_
        if compile:
            self._compiled = torch.compile(Compose.apply_)
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        self.epoch = 0
        self.start_step = 0
        self.bad_images: list[str] = []
        self.wait_seconds = 0.0
        self.view_seconds = 0.0
        self._evaluates = not shuffle and not drop_last
        self._workers = None
        self._requests = []  # the sampler of the workers: the steps of the next epoch
        self._crops = self._choose_crops(data_device)
        self.mode = "device" if isinstance(self._crops, DeviceCrops) else "host"

    def _choose_crops(self, data_device: str) -> HostCrops:
        """Return the source of crops; in device mode, read all pictures first."""
        options = [view.geometry for view in self.views], self.seed, self.rank, self.skip_bad
        sources = [self.dataset] if self.partner is None else [self.dataset, self.partner]
        on_host = HostCrops(self.dataset, self.partner, *options)
        if data_device == "host":
            return on_host
        if data_device == "auto" and not resident.fits(sources, self.device):
            return on_host
        threads = min(max(1, self.workers), launch.cores())
        try:
            parts = [
                resident.hold(source, self.device, threads, self.skip_bad, self.progress)
                for source in sources
            ]
        except resident.SizesDiffer as error:
            if data_device == "device":
                raise UsageError(f"{error}: they need --data-device host") from None
            if self.progress:
                print(
                    f"note: pictures are decoded at every step instead of once: {error}", flush=True
                )
            return on_host
        bad = set()
        for _, errors in parts:
            bad.update(errors)
            self.bad_images += [error.path for error in errors.values()]
        partner = None if self.partner is None else parts[1][0]
        return DeviceCrops(parts[0][0], partner, *options, bad=bad)

    def __repr__(self) -> str:
        place = f"{self.workers} workers" if self.mode == "host" else f"held on {self.device}"
        size = f"{len(self.dataset)} pictures, {len(self.dataset.classes)} classes"
        return f"{self.dataset.name}: {size}, {place}"

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration run the steps start_step, start_step + 1, ... of this epoch."""
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Return the number of steps of an epoch (for the evaluation loader, on this rank)."""
        if self._evaluates:
            rows = len(range(self.rank, len(self.dataset), self.world_size))
            return -(-rows // self.batch_size)
        steps, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        if rest >= self.world_size and not self.drop_last:
            steps += 1
        return steps

    def _steps(self) -> list[tuple[int, int, np.ndarray]]:
        """Return (epoch, step, this rank's rows) from start_step to the end of the epoch."""
        n = len(self.dataset)
        if self.shuffle:
            generator = step_generator(self.seed, self.epoch, 0, 0, ORDER)
            order = torch.randperm(n, generator=generator)
        else:
            order = torch.arange(n)
        if self._evaluates:
            parts = order[self.rank :: self.world_size].split(self.batch_size)
        else:
            batches = order.split(self.batch_size * self.world_size)
            parts = [batch.tensor_split(self.world_size)[self.rank] for batch in batches]
        steps = range(self.start_step, len(self))
        return [(self.epoch, step, parts[step].numpy()) for step in steps]

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        epoch = self.epoch
        for step, crops, target, index in self.batches():
            started = time.perf_counter()
            if self.mode == "host":
                crops = to_device(crops, self.device, self._copies)
                crops = [crop.to(torch.float32).div_(255) for crop in crops]
            target = target.to(self.device, non_blocking=True)
            index = index.to(self.device, non_blocking=True)
            generator = step_generator(self.seed, epoch, step, self.rank, COLOURS)
            recipes = [(view, view.sample(len(index), generator)) for view in self.views]
            if self.partner is not None:
                recipes.append(recipes[0])
            views = [
                self._apply(view, crop, params)
                for crop, (view, params) in zip(crops, recipes, strict=True)
            ]
            self.view_seconds += time.perf_counter() - started
            yield views, target, index

    def _apply_compiled(self, view: Compose, crop: Tensor, params: list[Params]) -> Tensor:
        """Do what Compose.apply_ does, as one graph of fixed shapes if that is possible."""
        if not view.is_compilable:
            return view.apply_(crop, params)
        everyone = [of_all_images(len(crop), own) for own in params]
        return self._compiled(view, crop, sent_together(everyone, self.device))

    def batches(self) -> Iterator[tuple[int, list[Tensor], Tensor, Tensor]]:
        """Iterate over (step, crops, target, index): the crops before colour operations.

        crops: a list of (B, 3, S, S), one for each view; uint8 on the host in host mode, float in
        [0, 1] on the device in device mode.
        """
        requests = self._steps()
        started = time.perf_counter()
        if self.mode == "host":
            batches = self._from_workers(requests)
        else:
            batches = map(self._crops.__getitem__, requests)
        for _, step, _ in requests:
            batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            crops, target, index, bad_paths = batch
            # Several workers may report the same bad picture.
            self.bad_images += [path for path in bad_paths if path not in self.bad_images]
            if self.mode == "host":
                self.wait_seconds += time.perf_counter() - started
            else:
                self.view_seconds += time.perf_counter() - started
            yield step, crops, target, index
            started = time.perf_counter()

    def _from_workers(self, requests: list[tuple[int, int, np.ndarray]]) -> Iterator:
        """Give the steps of an epoch to the workers, started if needed, and return the batches."""
        if self._workers is None:
            self._workers = torch.utils.data.DataLoader(
                self._crops,
                batch_size=None,
                sampler=self._requests,
                num_workers=self.workers,
                pin_memory=self.device.type != "cpu",
                worker_init_fn=quiet_worker,
                generator=torch.Generator(),  # so that no base seed is drawn globally
                persistent_workers=self.workers > 0,
            )
            _working.add(self)
        self._requests[:] = requests
        return iter(self._workers)

    def close(self) -> None:
        """End the workers now rather than when the loader is garbage collected."""
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._workers = None
