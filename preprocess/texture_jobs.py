"""Turn a picture into the file of its texture: read, cut two patches, synthesise, save."""

from __future__ import annotations

import errno
import functools
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from common.pictures import as_rgb
from preprocess import workers
from preprocess.texture_engines import EngineError, Settings, engine_of

LOSSLESS_EFFORT = 3  # zlib level of the PNG files


class Job(NamedTuple):
    """A picture whose texture is missing."""

    source: str  # full path
    name: str  # path below A, with /
    target: str  # full path


class Done(NamedTuple):
    """The outcome of a job."""

    name: str
    failure: str  # "" where all went well


Loaded = tuple[torch.Tensor, int]  # patches, seed


def draws_of(name: str, seed: int) -> tuple[int, int, int]:
    """Return the seed of the engine, and two numbers that choose the place of the random patch.

    They depend on `seed` and on `name`, the path of the picture below A.
    """
    digest = hashlib.blake2b(b"%d/%s" % (seed, os.fsencode(name)), digest_size=24).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    return a >> 2, b, c  # the first fits into an int64


def read_rgb(path: str) -> Image.Image:
    """Read a picture as 8-bit RGB. Raises any error of Pillow for damaged files."""
    return as_rgb(Image.open(workers.read(path)))


def patches_of(
    picture: Image.Image, patch: int, down: int, right: int, scale: float | None = None
) -> torch.Tensor:
    """Cut two patches, uint8 (2, 3, patch, patch).

    The first is the centre; the second lies at `down` and `right`, modulo the number of places.
    scale: factor by which the picture is enlarged first (only the part that the patches need); by
    default as much as the patches need.
    """
    if scale is None:
        scale = max(1.0, patch / min(picture.size))
    width, height = (max(patch, round(side * scale)) for side in picture.size)
    places = [
        ((width - patch) // 2, (height - patch) // 2),
        (right % (width - patch + 1), down % (height - patch + 1)),
    ]
    cut = []
    for left, top in places:
        if scale == 1:
            part = picture.crop((left, top, left + patch, top + patch))
        else:
            across = picture.width / width
            along = picture.height / height
            box = (
                left * across,
                top * along,
                min((left + patch) * across, picture.width),
                min((top + patch) * along, picture.height),
            )
            part = picture.resize((patch, patch), Image.Resampling.BICUBIC, box=box)
        cut.append(np.asarray(part))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)


def load(settings: Settings, job: Job) -> Loaded | Done:
    """Return (patches, seed) of a picture, or the failure if it cannot be read."""
    seed, down, right = draws_of(job.name, settings.seed)
    try:
        picture = read_rgb(job.source)
        scale = settings.scale(min(picture.size))
        return patches_of(picture, settings.patch, down, right, scale), seed
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Done(job.name, workers.reason(error))


def save(job: Job, texture: torch.Tensor) -> Done:
    """Write a texture uint8 (3, S, S). Raises OSError, except for a name that is too long."""
    encoded = BytesIO()
    picture = Image.fromarray(texture.permute(1, 2, 0).contiguous().numpy())
    picture.save(encoded, "PNG", compress_level=LOSSLESS_EFFORT)
    try:
        workers.write_picture(job.target, encoded.getbuffer())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return Done(job.name, workers.reason(error))
        raise
    return Done(job.name, "")


def synthesise(
    settings: Settings, device: str, loaded: list[Loaded]
) -> list[torch.Tensor | Exception]:
    """Return the textures; an error takes the place of a texture that failed."""
    if not loaded:
        return []
    patches = torch.stack([patches for patches, _ in loaded])
    seeds = torch.tensor([seed for _, seed in loaded])
    try:
        return list(engine_of(settings, device)(patches, seeds))
    except EngineError as error:
        if len(loaded) == 1:
            return [error]
        return [synthesise(settings, device, [one])[0] for one in loaded]


def do(settings: Settings, jobs: list[Job]) -> list[Done]:
    """Make the textures of several pictures on the CPU. Raises OSError if writing fails."""
    # a batch system signals all processes, and the parent handles it
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loaded = [load(settings, job) for job in jobs]
    textures = synthesise(settings, "cpu", _readable(loaded))
    return _store_all(jobs, loaded, textures, save)


def _readable(loaded: list[Loaded | Done]) -> list[Loaded]:
    return [one for one in loaded if not isinstance(one, Done)]


def _store_all(
    jobs: list[Job],
    loaded: list[Loaded | Done],
    textures: list[torch.Tensor | Exception],
    store: Callable,
) -> list:
    """Return store(job, texture) for each texture and a Done for the others, in order of jobs."""
    textures = iter(textures)
    outcomes = []
    for job, one in zip(jobs, loaded):
        if isinstance(one, Done):
            outcomes.append(one)
            continue
        texture = next(textures)
        if isinstance(texture, Exception):
            outcomes.append(Done(job.name, str(texture)))
        else:
            outcomes.append(store(job, texture))
    return outcomes


def in_threads(
    settings: Settings, batches: list[list[Job]], device: str, threads: int
) -> Iterator[list[Done]]:
    """Yield the result of `do` for each batch, for a GPU.

    Threads read the next batch and write the previous one during the synthesis.
    """
    with ThreadPoolExecutor(threads) as pool:
        reading: list[Future] = []
        writing: list[Future | Done] = []
        try:
            for jobs, following in zip(batches, [*batches[1:], []]):
                if not reading:
                    reading = [pool.submit(load, settings, job) for job in jobs]
                loaded = [future.result() for future in reading]
                reading = [pool.submit(load, settings, job) for job in following]
                textures = synthesise(settings, device, _readable(loaded))
                yield _written(writing)
                writing = _store_all(jobs, loaded, textures, functools.partial(pool.submit, save))
            yield _written(writing)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _written(waiting: list[Future | Done]) -> list[Done]:
    return [one if isinstance(one, Done) else one.result() for one in waiting]
