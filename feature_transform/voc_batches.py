"""Load batches of pictures of different sizes, with their objects, for a detector."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common import UserError
from common.data import quiet_worker
from feature_transform.voc import Objects, Pictures


class View(NamedTuple):
    """The view of a picture.

    flip: probability of mirroring. min_size: shorter sides in pixels, of which one is drawn.
    max_size: the most that the longer side has.
    """

    flip: float
    min_size: tuple[int, ...]
    max_size: int


class Loader:
    """Batches of (pictures, objects, rows) on the device, for runner.loop.Job.

    Pictures (3, H, W) in [0, 1] have different sizes. They form an endless stream: all pictures in
    an order drawn from `seed`, then all in another one. Step i of the run takes the next
    `batch_size` pictures of each rank, wherever the run was stopped. schedule: the steps of the
    run, and of one "epoch" of the job.
    """

    mode = "host"  # the job reads this, `view_seconds` and `bad_images`
    view_seconds = 0.0

    def __init__(
        self,
        pictures: Pictures,
        view: View,
        schedule: tuple[int, int],
        batch_size: int,
        seed: int,
        process,
        workers: int,
    ):
        self.dataset = pictures
        self.views = (view,)
        self.steps, self.part = schedule
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self.workers = workers
        self.wait_seconds = 0.0
        self.bad_images: set[str] = set()  # paths of the pictures replaced so far
        self.rounds: dict[int, tuple[Tensor, Tensor]] = {}  # the last two: (order, mirrored)
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.first = (epoch - 1) * self.part
        self.start = start

    def __len__(self) -> int:
        return min(self.part, self.steps - self.first)

    def plan(self, step: int) -> list[tuple[int, bool]]:
        """Return (row, mirrored) of this rank's pictures at global step `step` (from 0)."""
        planned = []
        for i in range(self.batch_size):
            place = (step * self.batch_size + i) * self.process.world_size + self.process.rank
            number, place = divmod(place, len(self.dataset))
            order, flips = self._round(number)
            planned.append((int(order[place]), bool(flips[place])))
        return planned

    def _round(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the order of the pictures in a round, and the mask of its mirrored places."""
        if number not in self.rounds:
            n = len(self.dataset)
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * number)
            flips = torch.rand(n, generator=generator) < self.views[0].flip
            kept = dict(list(self.rounds.items())[-1:])
            self.rounds = {**kept, number: (torch.randperm(n, generator=generator), flips)}
        return self.rounds[number]

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Objects], Tensor]]:
        plans = [self.plan(step) for step in range(self.first + self.start, self.first + len(self))]
        batches = decoded(self.dataset, plans, self.workers, self.process.device)
        for plan in plans:
            began = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - began
            for (planned, _), row in zip(plan, batch[2].tolist()):
                if row != planned:
                    self.bad_images.add(self.dataset.path(planned))
            yield batch


class _Decoded:
    """A data set that maps an item of the plan to a picture, or to the error in reading it.

    With `pictures.skip_bad` the next picture that can be read stands for one that cannot.
    """

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitem__(self, planned: tuple[int, bool]):
        first, is_mirrored = planned
        tries = len(self.pictures) if self.pictures.skip_bad else 1
        for i in range(tries):
            row = (first + i) % len(self.pictures)
            try:
                return row, *self.pictures.decode(row, is_mirrored)
            except UserError as error:
                unread = error
        return unread


def decoded(pictures: Pictures, plans: list, workers: int, device) -> Iterator:
    """Yield (pictures, objects, rows) of every list of (row, mirrored) in `plans`, in order.

    Raises UserError for a picture that cannot be read, unless it is replaced: see `_Decoded`.
    """
    batches = DataLoader(
        _Decoded(pictures),
        batch_sampler=plans,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # DataLoader draws a number from it, not from the run's own
    )
    for items in batches:
        for item in items:
            if isinstance(item, UserError):
                raise item
        rows, images, objects = zip(*items)
        images = [image.to(device, non_blocking=True).float().div_(255) for image in images]
        objects = [Objects(*(part.to(device) for part in thing)) for thing in objects]
        yield images, objects, torch.tensor(rows)
