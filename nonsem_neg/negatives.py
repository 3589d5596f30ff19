"""Negatives with diminished semantics (Ge et al., arXiv:2110.14189): the logits, and patches.

A picture is laid out anew from random square patches of itself: its textures survive, its shapes do
not. The ranges are those of `NonSemanticAug`, the logits those of moco/builder.py, of
SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives at 5fbdc4d. It differs from that code in
laying out the whole batch by one gather on the device, where the published loader makes up to 225
copies per picture. This file needs torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def contrast_logits(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    nonsem: Tensor | None,
    temperature: float,
    alpha: float = 1.0,
) -> Tensor:
    """Return the logits of InfoNCE with non-semantic negatives, the positive in column 0.

    query (N, D), key (N, D), nonsem (N, M, D) or None: unit rows, float32. queue (D, K): unit
    columns. Returns (N, 1 + K + M) = [q.k, q.queue, alpha * q.t_1 .. alpha * q.t_M] / temperature;
    cross-entropy with label 0 gives the loss in nats.
    alpha is inside the exponent: it is an inverse temperature of these negatives, not a weight of
    their terms. The rows nonsem[i] are negatives of query i alone. None, or M = 0, gives MoCo,
    Eq. (1) of He et al., arXiv:1911.05722.
    """
    columns = [(query * key).sum(dim=1, keepdim=True), query @ queue]
    if nonsem is not None:
        columns.append(alpha * torch.einsum("nd,nmd->nm", query, nonsem))
    return torch.cat(columns, dim=1).div_(temperature)


class PatchGrid(NamedTuple):
    """The sources of the patches of N pictures; the patches of one picture share one size.

    side (N,): side of a patch in pixels. top, left (N, G, G): upper left corner of the patch that
    fills grid cell (row, column); cells beyond a picture's own grid are unused. turn (N, G, G): 0
    keeps a patch as it is; bit 1 mirrors it left-right, bit 2 upside down, bit 4 swaps its axes.
    """

    side: Tensor
    top: Tensor
    left: Tensor
    turn: Tensor | None = None

    def rows(self, part: slice) -> PatchGrid:
        """Return the grids of the pictures in a slice."""
        return PatchGrid(*(None if field is None else field[part] for field in self))

    def to(self, device: torch.device) -> PatchGrid:
        fields = (None if f is None else f.to(device, non_blocking=True) for f in self)
        return PatchGrid(*fields)


def check_patch_range(smallest: int, largest: int, size: int, inclusive: bool = False) -> None:
    """Raise ValueError unless patches of these sides fit a picture; all sizes are in pixels."""
    limit = size if inclusive else size - 1
    if not 1 <= smallest <= largest <= limit:
        raise ValueError(
            f"patch sides {smallest} to {largest} do not fit pictures of {size} pixels: "
            f"need 1 <= min <= max <= {limit}"
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
    """Draw the sources of the patches of `n` negatives of `size` x `size` pixels.

    patch_range: smallest and largest patch side; both can be drawn. As published, an offset is
    uniform over 0 .. size - side - 1, so that the last one that fits is never drawn; with
    `inclusive` it is. With `turn` every patch is mirrored and rotated at random (the published code
    has this commented out). Draws are made on the generator's device.
    """
    smallest, largest = patch_range
    check_patch_range(smallest, largest, size, inclusive)
    device = generator.device
    side = torch.randint(smallest, largest + 1, (n,), generator=generator, device=device)
    cells = size // smallest + 1  # a side of the finest grid; coarser ones use its upper left part
    offsets = size - side + 1 if inclusive else size - side
    span = offsets.view(n, 1, 1)
    drawn = torch.rand((2, n, cells, cells), generator=generator, device=device)
    # float32 can round the product up to `span` itself, once in some million draws
    top, left = torch.minimum((drawn * span).long(), span - 1)
    code = None
    if turn:
        code = torch.randint(0, 8, (n, cells, cells), generator=generator, device=device)
    return PatchGrid(side, top, left, code)


def tile_patches(images: Tensor, grid: PatchGrid) -> Tensor:
    """Lay out every picture from patches of itself: (N, C, S, S) -> (N, C, S, S), channels last.

    With patches of side p, cell (r, c) of a picture's grid shows its pixels [top : top + p,
    left : left + p]; the last row and column are cut off at S. There is one index per pixel and one
    gather, which moves N * S * S * (8 + 8 C) bytes for float32.
    """
    n, channels, size, _ = images.shape
    grid = grid.to(images.device)
    pixel = torch.arange(size, device=images.device)
    side = grid.side.view(n, 1)
    cell = pixel // side  # (N, S): the grid cell of a row or column
    inside = pixel % side  # (N, S): the position in its patch
    picture = torch.arange(n, device=images.device).view(n, 1, 1)
    rows = cell.view(n, size, 1)
    columns = cell.view(n, 1, size)
    dy = inside.view(n, size, 1)
    dx = inside.view(n, 1, size)
    if grid.turn is not None:
        code = grid.turn[picture, rows, columns]
        dy, dx = _turned(dy, dx, code, side.view(n, 1, 1) - 1)
    source_y = grid.top[picture, rows, columns] + dy
    source_x = grid.left[picture, rows, columns] + dx
    index = (picture * size + source_y) * size + source_x  # (N, S, S), pixels of the whole batch
    pixels = images.permute(0, 2, 3, 1).reshape(n * size * size, channels)
    return pixels[index.view(-1)].view(n, size, size, channels).permute(0, 3, 1, 2)


def _turned(dy: Tensor, dx: Tensor, code: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions in mirrored and rotated patches, (N, S, S) each. end: the last position."""
    dx = torch.where(code & 1 > 0, end - dx, dx)
    dy = torch.where(code & 2 > 0, end - dy, dy)
    is_swapped = code & 4 > 0
    return torch.where(is_swapped, dx, dy), torch.where(is_swapped, dy, dx)


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
    """Return `count` patch negatives of every picture: (N, C, S, S) -> (N, count, C, S, S).

    images: the augmented and normalised query view, so that a negative shares the crop, colours and
    flip of its query. generator: in the same state on every rank; each rank draws for the global
    batch and keeps its own rows, so that N processes make the same negatives as one.
    options: passed on to `sample_patches`.
    """
    n = images.shape[0]
    size = images.shape[-1]
    own = slice(rank * n, (rank + 1) * n)
    negatives = []
    for _ in range(count):
        grid = sample_patches(n * world_size, size, patch_range, generator, **options)
        negatives.append(tile_patches(images, grid.rows(own)))
    return torch.stack(negatives, dim=1)
