"""Keep the pictures of small sets on the device, decoded once into one uint8 tensor."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import UsageError, UserError
from common.crops import decoded
from common.pictures import ArraySet, BadPicture, PictureSet

CPU_BYTES = 4 << 30  # the most that 'auto' keeps in main memory; on CUDA a third of what is free


class SizesDiffer(UsageError):
    """Pictures of different sizes do not make one tensor."""


def fits(sources: list[PictureSet], device: torch.device) -> bool:
    """Return whether 'auto' keeps these sets on the device."""
    if device.type == "cpu" and any(isinstance(s, ArraySet) and s.file for s in sources):
        return False  # on a CPU workers are faster, since they cut crops in integers
    total = 0
    for source in sources:
        size = _common_size(source)
        if size is None:
            return False
        total += len(source) * 3 * size[0] * size[1]
    if device.type == "cuda":
        return total <= torch.cuda.mem_get_info(device)[0] // 3
    return total <= CPU_BYTES


def _common_size(source: PictureSet) -> tuple[int, int] | None:
    """Return the (height, width) shared by 512 pictures spread over the set, or None.

    Only headers are read.
    """
    if isinstance(source, ArraySet):
        return source.size
    sizes = set()
    for row in range(0, len(source), max(1, len(source) // 512)):
        # A damaged file is reported when it is decoded.
        with contextlib.suppress(Exception), Image.open(source.path(row)) as image:
            sizes.add(image.size[::-1])
        if len(sizes) > 1:
            break
    return sizes.pop() if len(sizes) == 1 else None


def hold(
    source: PictureSet, device: torch.device, threads: int, skip_bad: bool, progress: bool
) -> tuple[ArraySet, dict[int, BadPicture]]:
    """Return the set on the device, and {row: error} for the pictures that cannot be read.

    The set is read once per device and kept in source.held. Raises SizesDiffer, BadPicture (without
    skip_bad), and UserError if memory runs out.
    """
    if isinstance(source, ArraySet) and device.type == "cpu":
        return source, {}
    if source.held is None or source.held[0] != device:
        try:
            images, bad = _load(source, device, threads, skip_bad, progress)
        except (torch.OutOfMemoryError, MemoryError):
            raise UserError(
                f"{source.name}: its pictures do not fit on {device}: use --data-device host"
            ) from None
        held = ArraySet(images, source.targets, source.classes, source.name)
        source.held = device, held, bad
    _, held, bad = source.held
    if bad and not skip_bad:
        raise next(iter(bad.values()))
    return held, bad


def _load(
    source: PictureSet, device: torch.device, threads: int, skip_bad: bool, progress: bool
) -> tuple[Tensor, dict[int, BadPicture]]:
    """Decode all pictures into uint8 (N, 3, H, W) on the device; bad ones stay black."""
    bad = {}

    def read(row: int) -> Tensor | None:
        try:
            return decoded(source, row, source.open(row))
        except BadPicture as error:
            if not skip_bad:
                raise
            bad[row] = error
            return None

    first = next((row for row in range(len(source)) if read(row) is not None), None)
    if first is None:
        raise UserError(f"{source.name}: there is no readable picture in it")
    blank = torch.zeros_like(read(first))

    def block(rows: Tensor) -> Tensor:  # in a thread: decoders release the interpreter lock
        pictures = []
        for row in rows.tolist():
            picture = read(row)
            if picture is None:
                picture = blank
            elif picture.shape != blank.shape:
                raise SizesDiffer(
                    f"{source.path(row)} is {picture.shape[2]}x{picture.shape[1]}, "
                    f"{source.path(first)} is {blank.shape[2]}x{blank.shape[1]}"
                )
            pictures.append(picture)
        return torch.stack(pictures)

    images = torch.empty((len(source), *blank.shape), dtype=torch.uint8, device=device)
    chunks = torch.arange(len(source)).split(64)
    bar = tqdm(
        total=len(source),
        desc=f"reading {source.name}",
        unit=" pictures",
        disable=not progress,
        leave=False,
        mininterval=5,
        delay=1,
    )
    with bar, ThreadPoolExecutor(threads) as pool:
        if isinstance(source, ArraySet):
            blocks = map(source.__getitem__, chunks)
        else:
            blocks = pool.map(block, chunks)
        for rows, pictures in zip(chunks, blocks):
            images[rows[0] : rows[-1] + 1] = pictures.to(device)  # H, W, RGB become planes there
            bar.update(len(rows))
    return images, dict(sorted(bad.items()))
