"""Negatives with diminished semantics (Ge et al., arXiv:2110.14189): the logits, and patches.

A picture is laid out anew from random square patches of itself: its textures survive, its shapes do
not. The ranges are those of `NonSemanticAug`, the logits those of moco/builder.py, of
SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives at 5fbdc4d. It differs from that code in
laying out the whole batch by one gather on the device, where the published loader makes up to 225
copies per picture. This file needs torch alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 0.01  # how far the length of a unit row may be from 1; bfloat16 needs 0.004


def contrast_logits(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    nonsem: Tensor | None,
    temperature: float,
    alpha: float = 1.0,
) -> Tensor:
    """Return the logits of InfoNCE with non-semantic negatives, the positive in column 0.

    query (N, D), key (N, D), queue (K, D), nonsem (N, M, D) or None: unit rows; the queue may be a
    transposed view. Returns (N, 1 + K + M) = [q.k, q.queue, alpha * q.t_1 .. alpha * q.t_M] /
    temperature, float32 also under autocast; cross-entropy with label 0 gives the loss in nats.
    alpha is inside the exponent: it is an inverse temperature of these negatives, not a weight of
    their terms. The rows nonsem[i] are negatives of query i alone. None, or M = 0, gives MoCo,
    Eq. (1) of He et al., arXiv:1911.05722. Raises ValueError where a shape or number does not fit.

    >>> normalize = torch.nn.functional.normalize
    >>> query, key, queue = (normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 100))
    >>> nonsem = normalize(torch.randn(4, 2, 8), dim=2)
    >>> contrast_logits(query, key, queue, nonsem, temperature=0.2, alpha=2.0).shape
    torch.Size([4, 103])
    """
    _check(query, key, queue, nonsem, temperature)
    with torch.autocast(query.device.type, enabled=False):
        query = query.float()
        columns = [(query * key.float()).sum(dim=1, keepdim=True), query @ queue.float().T]
        if nonsem is not None:
            columns.append(alpha * torch.einsum("nd,nmd->nm", query, nonsem.float()))
        return torch.cat(columns, dim=1).div_(temperature)


def _check(
    query: Tensor, key: Tensor, queue: Tensor, nonsem: Tensor | None, temperature: float
) -> None:
    """Raise ValueError where the arguments of `contrast_logits` do not fit each other.

    In debug, which is without python -O, features on a CPU must also have unit rows, or zeros: what
    F.normalize returns. Any other device would have to be waited for.
    """
    if queue.dim() != 2 or not len(queue):
        raise ValueError(f"queue is {tuple(queue.shape)}: expected (K, D) with at least one row")
    expected = (len(query), queue.shape[1])
    features = {"query": query, "key": key}
    if nonsem is not None:
        features["nonsem"] = nonsem
    for name, rows in features.items():
        axes = 3 if name == "nonsem" else 2
        if rows.dim() != axes or (len(rows), rows.shape[-1]) != expected:
            raise ValueError(
                f"{name} is {tuple(rows.shape)}: expected {len(query)} times rows of length "
                f"{expected[1]}, since the queue is {tuple(queue.shape)}"
            )
        if __debug__ and rows.device.type == "cpu" and not torch.compiler.is_compiling():
            length = rows.detach().float().norm(dim=-1)
            wrong = ((length - 1).abs() > UNIT) & (length > 0)
            if wrong.any():
                raise ValueError(
                    f"{name} has a row of length {length[wrong][0]:.4g}, expected unit rows: apply "
                    f"torch.nn.functional.normalize({name}, dim=-1)"
                )
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")


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
        """Return the grids on `device`. A copy to a GPU from pinned memory does not wait for it."""
        is_pinned = device.type != "cpu" and self.side.device.type == "cpu"
        fields = [f.pin_memory() if is_pinned and f is not None else f for f in self]
        return PatchGrid(*(f if f is None else f.to(device, non_blocking=True) for f in fields))


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
    top, left = (drawn * span).long()
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
    options: passed on to `sample_patches`. Raises ValueError where a shape or number does not fit.

    >>> images, generator = torch.randn(4, 3, 32, 32), torch.Generator().manual_seed(0)
    >>> patch_negatives(images, 2, (8, 16), generator).shape
    torch.Size([4, 2, 3, 32, 32])
    """
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images are {tuple(images.shape)}: expected squares (N, C, S, S)")
    if count < 1:
        raise ValueError(f"count {count} must be at least 1")
    n = images.shape[0]
    size = images.shape[-1]
    own = slice(rank * n, (rank + 1) * n)
    negatives = []
    for _ in range(count):
        grid = sample_patches(n * world_size, size, patch_range, generator, **options)
        negatives.append(tile_patches(images, grid.rows(own)))
    return torch.stack(negatives, dim=1)


def pair_names(
    textures: Sequence[str], originals: Sequence[str]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Pair texture pictures with the photographs that they were made from, by their names.

    Both are paths below their trees, such as CLASS/NAME.png, each stem once. A pair has the same
    folder and stem; extensions may differ. Returns the places (texture, original) of the pairs, and
    those of textures without an original.

    >>> pair_names(["dog/2.png", "dog/3.png"], ["cat/1.jpg", "dog/2.jpg"])
    ([(0, 1)], [1])
    """
    places = {stem_of(path): place for place, path in enumerate(originals)}
    found = [places.get(stem_of(path)) for path in textures]
    pairs = [(texture, place) for texture, place in enumerate(found) if place is not None]
    return pairs, [texture for texture, place in enumerate(found) if place is None]


def stem_of(path: str) -> str:
    """Return a path without its extension."""
    return os.path.splitext(path)[0]
