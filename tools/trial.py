"""Take steps of a train script without its data set and its run folder, to measure them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import torch
from torch.nn.functional import interpolate

from common import inputs, launch
from common.sets import ArraySet, PictureSet
from runner.contract import At, Batch


def generated(count: int, side: int, device: torch.device) -> ArraySet:
    """Return `count` pictures of `side` pixels on the device: blurred noise in ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(count, 3, side, side, dtype=torch.uint8, device=device)
    for rows in torch.arange(count).split(256):
        small = torch.rand(len(rows), 3, 8, 8, generator=generator).to(device)
        large = interpolate(small, (side, side), mode="bilinear")
        images[rows[0] : rows[-1] + 1] = large.mul_(255).to(torch.uint8)
    classes = [f"class{i}" for i in range(10)]
    return ArraySet(images, [i % 10 for i in range(count)], classes, "generated pictures")


class Trial:
    """The loader and the method of a train script, with `pictures` in place of those of its flags.

    script: its module, with `build_loader` and `build_method`. args: its flags, with a seed.
    count: number of the training pictures for which the method is built, as a memory bank has a row
    for each; default: those that are given.
    """

    def __init__(
        self,
        script: ModuleType,
        args,
        process: launch.Process,
        pictures: PictureSet,
        count: int | None = None,
    ):
        self.args = args
        with mock.patch.object(inputs, "open_split", lambda *_, **__: pictures):
            self.loader = script.build_loader(args, process)
        trained = pictures
        if count is not None:
            trained = pictures.select([row % len(pictures) for row in range(count)])
        steps = len(trained) // args.batch_size
        self.method = script.build_method(args, trained, steps, process)
        self._batches = self._endless()

    def _endless(self) -> Iterator:
        for epoch in itertools.count():
            self.loader.set_epoch(epoch)
            yield from self.loader

    def fetch(self) -> Batch:
        """Return the next batch of views."""
        return Batch(*next(self._batches), At(0, 0.0, 0))

    def step(self) -> None:
        """Train on the next batch."""
        self.method.step(self.fetch())


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given. The CPU has when a call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable, steps: int, device: torch.device) -> float:
    """Return the seconds of `steps` calls, to the end of the device's work."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return time.perf_counter() - began
