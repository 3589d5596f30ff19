"""Patch-based non-semantic negatives (Ge et al., NeurIPS 2021, arXiv:2110.14189).

A picture is cut up and laid out again from random square patches of itself: its textures survive, its shapes do not.
Follows `NonSemanticAug` of SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives, moco/loader.py at 5fbdc4d, for the
ranges; differs: the whole batch at once by one gather on the device, instead of up to 225 copies per picture in a loader.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PatchGrid(NamedTuple):
    """Where the patches of N pictures come from. The cells of one picture share one size.

    side (N,): patch side in pixels. top, left (N, G, G): upper left corner of the patch that fills grid cell (row,
    column); cells beyond a picture's own grid are unused. turn (N, G, G): 0 keeps a patch as it is; bit 1 mirrors it
    left-right, bit 2 upside down, bit 4 swaps its axes.
    """

    side: Tensor
    top: Tensor
    left: Tensor
    turn: Tensor | None = None


def check_patch_range(smallest: int, largest: int, size: int, inclusive: bool = False) -> None:
    """ValueError unless patches of `smallest` to `largest` pixels can be drawn from a picture of `size` pixels."""
    limit = size if inclusive else size - 1
    if not 1 <= smallest <= largest <= limit:
        raise ValueError(
            f"patch sides {smallest} to {largest} do not fit pictures of {size} pixels: need 1 <= min <= max <= {limit}"
        )


def sample_patches(
    n: int,
    size: int,
    patch_range: tuple[int, int],
    generator: torch.Generator,
    *,
    inclusive: bool = False,
    turn: bool = False,
) -> PatchGrid:
    """Draw where the patches of `n` negatives of `size` x `size` pixels come from.

    patch_range: smallest and largest patch side, both drawn. As published, an offset is uniform over 0 .. size - side - 1:
    the last one that would fit is never drawn; `inclusive` draws it as well. `turn` also mirrors and rotates every patch
    by chance (the published code has this commented out). Draws are made on the generator's device.
    """
    smallest, largest = patch_range
    check_patch_range(smallest, largest, size, inclusive)
    device = generator.device
    side = torch.randint(smallest, largest + 1, (n,), generator=generator, device=device)
    cells = size // smallest + 1  # of the finest grid; a coarser one uses its upper left part
    span = (size - side + inclusive).view(n, 1, 1)
    top, left = (torch.rand((2, n, cells, cells), generator=generator, device=device) * span).long()
    # float32 can round the product up to `span` itself, once in some million draws
    top, left = torch.minimum(top, span - 1), torch.minimum(left, span - 1)
    code = torch.randint(0, 8, (n, cells, cells), generator=generator, device=device) if turn else None
    return PatchGrid(side, top, left, code)


def tile_patches(images: Tensor, grid: PatchGrid) -> Tensor:
    """Lay out every picture from patches of itself: (N, C, S, S) -> (N, C, S, S), memory in channels-last order.

    Row r, column c of the grid of side p holds images[:, top : top + p, left : left + p]; what the last row and column
    have too much is cut off. One index per pixel and one gather: N * S * S * (8 + 8 C) bytes move for float32.
    """
    n, channels, size, _ = images.shape
    grid = PatchGrid(*(None if t is None else t.to(images.device, non_blocking=True) for t in grid))
    pixel = torch.arange(size, device=images.device)
    side = grid.side.view(n, 1)
    cell, inside = pixel // side, pixel % side  # (N, S): grid cell of a row or column, and position in the patch
    picture = torch.arange(n, device=images.device).view(n, 1, 1)
    rows, columns = cell.view(n, size, 1), cell.view(n, 1, size)
    dy, dx = inside.view(n, size, 1), inside.view(n, 1, size)
    if grid.turn is not None:
        code, end = grid.turn[picture, rows, columns], side.view(n, 1, 1) - 1
        dx, dy = torch.where(code & 1 > 0, end - dx, dx), torch.where(code & 2 > 0, end - dy, dy)
        dx, dy = torch.where(code & 4 > 0, dy, dx), torch.where(code & 4 > 0, dx, dy)
    source_y = grid.top[picture, rows, columns] + dy
    source_x = grid.left[picture, rows, columns] + dx
    index = (picture * size + source_y) * size + source_x  # (N, S, S), into the pixels of the whole batch
    pixels = images.permute(0, 2, 3, 1).reshape(n * size * size, channels)
    return pixels[index.view(-1)].view(n, size, size, channels).permute(0, 3, 1, 2)


def patch_negatives(
    images: Tensor,
    count: int,
    patch_range: tuple[int, int],
    generator: torch.Generator,
    *,
    rank: int = 0,
    world_size: int = 1,
    **options,
) -> Tensor:
    """`count` patch-based negatives of every picture: (N, C, S, S) -> (N, count, C, S, S). Options: `sample_patches`.

    The input is the augmented and normalised query view, so a negative shares the crop, colours and flip of its query.
    generator is in the same state on every rank: each draws for the global batch and keeps its own rows, so that N
    processes make the negatives that one would make.
    """
    n, size = images.shape[0], images.shape[-1]
    mine = slice(rank * n, (rank + 1) * n)
    made = []
    for _ in range(count):
        grid = sample_patches(n * world_size, size, patch_range, generator, **options)
        made.append(tile_patches(images, PatchGrid(*(None if t is None else t[mine] for t in grid))))
    return torch.stack(made, dim=1)
