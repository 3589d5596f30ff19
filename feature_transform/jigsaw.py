"""Cut a picture into the nine patches of a jigsaw (Misra, van der Maaten, arXiv:1912.01991)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common import collectives

GRID = 3  # a jigsaw has 3 x 3 cells


def cut_patches(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Cut images (N, 3, S, S) into nine patches each: (N, 9, 3, s, s).

    A patch lies at a random place in its cell of a 3 x 3 grid. generator: on the CPU, in the same
    state on every rank, so that the places are drawn for the global batch. Cells of 85 pixels give
    patches of 64, at offsets of 0 to 21; others are in proportion (cells of 12 give 9). Every
    network takes them, as its pooling is adaptive. A ResNet's strides leave one pixel of a patch
    of 32 or less; --small-stem, with a quarter of the strides, leaves more.
    """
    n, cell = len(images), images.shape[-1] // GRID
    size = max(1, round(cell * 64 / 85))
    shape = (2, n * collectives.world_size(), GRID, GRID)
    everyone = torch.randint(cell - size + 1, shape, generator=generator)
    offset = everyone.chunk(collectives.world_size(), 1)[collectives.rank()]
    cells = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    corner = offset + cell * torch.stack(cells)[:, None]
    corner = corner.flatten(2).to(images.device, non_blocking=True)  # top and left, (2, N, 9)
    pixel = torch.arange(size, device=images.device)
    rows = corner[0, :, :, None, None] + pixel[:, None]
    columns = corner[1, :, :, None, None] + pixel
    picture = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    return images[picture, :, rows, columns].permute(0, 1, 4, 2, 3)


def draw(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the patches of `cut_patches`, and the order (N, 9) in which the head takes them.

    Each row of the order is a permutation. generator: as in `cut_patches`.
    """
    patches = cut_patches(images, generator)
    rows = len(images) * collectives.world_size()
    order = collectives.own_rows(torch.rand(rows, GRID**2, generator=generator).argsort(1))
    return patches, order.to(images.device, non_blocking=True)


def lay_out(patches: Tensor) -> Tensor:
    """Lay patches (N, 9, C, s, s) out as sheets (N, C, S, S) of 3 x 3, with white gaps of s / 3."""
    gap = max(1, patches.shape[-1] // GRID)
    cells = F.pad(patches, (0, gap, 0, gap), value=1.0).unflatten(1, (GRID, GRID))
    sheets = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return sheets[..., :-gap, :-gap]
