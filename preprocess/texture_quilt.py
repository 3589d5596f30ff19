"""Quilt textures of many pictures (Efros & Freeman, SIGGRAPH 2001), on tensors only.

    textures = synthesise(patches, seeds, Options(), size=224)
    # uint8 (B, M, 3, 96, 96), int64 (B,) -> uint8 (B, 3, 224, 224)

Overlapping blocks are placed in raster order. Each is copied from a place in the examples that
differs little from the existing pixels in the overlap (sum of squares), drawn at random from those
within a tolerance of the best. It is joined along the cheapest path through the overlap
(minimum-error boundary cut, found by dynamic programming).

The sums of squares of a block against all places of all examples are one correlation by FFT. Blocks
on one anti-diagonal do not depend on each other, so they are placed together: 2 n - 1 rounds
instead of n x n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from preprocess.texture_mrs import random_integers

# kinds of blocks by their overlap
LEFT = 0  # first row: a strip on the left
TOP = 1  # first column: a strip at the top
BOTH = 2


@dataclass(frozen=True)
class Options:
    """Sizes of the blocks, and criteria for good places.

    block, overlap: pixels (the paper: overlap 1/6 of the block). tolerance: a place is good within
    (1 + tolerance) of the best. floor: root mean square over the overlap, in grey levels, below
    which places are equally good. Without it, the place that continues the last block would always
    win with error 0, and whole objects would be copied.
    """

    block: int = 34
    overlap: int = 6
    tolerance: float = 0.1
    floor: float = 8.0


def synthesise(patches: Tensor, seeds: Tensor, options: Options, size: int = 224) -> Tensor:
    """Make textures uint8 (B, 3, size, size) of patches uint8 (B, M, 3, P, P), on their device.

    seeds: int64 (B,). On the CPU pictures are made one after another, so that floats are summed in
    the same order for every batch and a texture is bit-exact whatever else is in its batch. Raises
    ValueError if P < block or the overlap is over half of the block.
    """
    if patches.shape[-1] < options.block or not 0 < 2 * options.overlap <= options.block:
        raise ValueError(
            f"cannot quilt blocks of {options.block} with overlap {options.overlap} from patches "
            f"{tuple(patches.shape)}"
        )
    if patches.device.type == "cpu" and len(patches) > 1:
        parts = zip(patches.split(1), seeds.split(1))
        return torch.cat([_Quilt(patch, seed, options, size).run() for patch, seed in parts])
    return _Quilt(patches, seeds, options, size).run()


class _Quilt:
    """The state of a batch of textures."""

    def __init__(self, patches: Tensor, seeds: Tensor, options: Options, size: int):
        self.patches = patches
        self.seeds = seeds
        self.options = options
        self.size = size
        self.device = patches.device
        block = options.block
        self.batch, self.examples, _, self.side, _ = patches.shape
        self.step = block - options.overlap
        # blocks per side; the last ones extend beyond the edge
        self.blocks = 1 + max(0, -(-(size - block) // self.step))
        self.places = self.side - block + 1  # per side of an example
        whole = block + (self.blocks - 1) * self.step
        self.out = torch.zeros(self.batch, 3, whole, whole, device=self.device)

        # Around the mean, sums of squares are smaller and their differences more exact.
        self.pixels = patches.float()
        self.mean = self.pixels.mean((1, 3, 4)).round()
        self.pixels -= self.mean[:, None, :, None, None]
        self.spectrum = torch.fft.rfft2(self.pixels)  # circular: no block in place reaches around
        self.energy = self._energy()
        self.masks = self._masks()

    def _energy(self) -> Tensor:
        """Sum the squares of each place under each kind of overlap: (B, 3, M * places^2)."""
        block = self.options.block
        overlap = self.options.overlap
        squares = self.pixels.square().sum(2)
        top = self._sums(squares, overlap, block)
        left = self._sums(squares, block, overlap)
        corner = self._sums(squares, overlap, overlap)
        return torch.stack((left, top, left + top - corner), 1).flatten(2)

    def _sums(self, squares: Tensor, height: int, width: int) -> Tensor:
        """Sum (B, M, P, P) over the window whose top left corner is each place.

        Returns (B, M, places, places).
        """
        sums = avg_pool2d(squares.double(), (height, width), stride=1, divisor_override=1)
        return sums[:, :, : self.places, : self.places].float()

    def _masks(self) -> Tensor:
        """Return the overlap of each kind of block: (3, block, block), 0 or 1."""
        block = self.options.block
        masks = torch.zeros(3, block, block, device=self.device)
        masks[LEFT, :, : self.options.overlap] = 1
        masks[TOP, : self.options.overlap] = 1
        masks[BOTH] = torch.maximum(masks[LEFT], masks[TOP])
        return masks

    def run(self) -> Tensor:
        """Place all blocks and return the textures uint8 (B, 3, size, size)."""
        for diagonal in range(2 * self.blocks - 1):
            first = max(0, diagonal - self.blocks + 1)
            last = min(diagonal, self.blocks - 1)
            rows = torch.arange(first, last + 1)
            self._lay(rows, diagonal - rows)
        pixels = self.out[:, :, : self.size, : self.size] + self.mean[:, :, None, None]
        return pixels.round().clamp(0, 255).byte()

    def _lay(self, rows: Tensor, columns: Tensor) -> None:
        """Place the blocks at D positions of the grid, all on one anti-diagonal."""
        block = self.options.block
        tops = (rows * self.step).tolist()
        lefts = (columns * self.step).tolist()
        kinds = torch.full_like(rows, BOTH)
        kinds[columns == 0] = TOP
        kinds[rows == 0] = LEFT
        kinds = kinds.tolist()
        is_first = bool(rows[-1] + columns[-1] == 0)
        windows = [
            self.out[:, :, top : top + block, left : left + block] for top, left in zip(tops, lefts)
        ]
        under = torch.stack(windows, 1)
        if is_first:  # anywhere
            shape = (self.batch, 1, self.energy.shape[2])
            allowed = torch.ones(shape, dtype=torch.bool, device=self.device)
        else:
            allowed = self._good(under, kinds)
        counters = (rows * self.blocks + columns).int().to(self.device)
        lots = random_integers(self.seeds, counters, 1 << 30)  # (B, D)
        upto = allowed.cumsum(2, dtype=torch.int32)
        # the lots-th of the allowed places
        place = (upto <= (lots % upto[..., -1])[..., None]).sum(2)
        new = self._blocks(place)
        if not is_first:
            keep = self._cuts(new, under, kinds)
            new = torch.where(keep[:, :, None], under, new)
        for i, (top, left) in enumerate(zip(tops, lefts)):
            self.out[:, :, top : top + block, left : left + block] = new[:, i]

    def _good(self, under: Tensor, kinds: list[int]) -> Tensor:
        """Return which places of the examples fit: bool (B, D, M * places^2).

        under (B, D, 3, block, block): the existing pixels.
        """
        side = self.side
        places = self.places
        masks = self.masks[kinds]
        template = under * masks[:, None]
        spectrum = torch.fft.rfft2(template, s=(side, side)).conj()  # (B, D, 3, side, side / 2 + 1)
        products = torch.einsum("bdcyx,bmcyx->bdmyx", spectrum, self.spectrum)
        matches = torch.fft.irfft2(products, s=(side, side))[..., :places, :places].flatten(2)
        there = template.square().sum((2, 3, 4))[:, :, None]
        errors = self.energy[:, kinds] - 2 * matches + there
        values = 3 * masks.sum((1, 2))[None, :, None]
        best = errors.amin(2, keepdim=True).clamp(min=0)
        limit = torch.maximum((1 + self.options.tolerance) * best, self.options.floor**2 * values)
        return errors <= limit

    def _blocks(self, place: Tensor) -> Tensor:
        """Return the blocks (B, D, 3, block, block) at `place` int64 (B, D), over all examples."""
        places = self.places
        side = self.side
        block = self.options.block
        example = place // places**2
        within = place % places**2
        start = example * (3 * side * side) + within // places * side + within % places
        inner = torch.arange(block, device=self.device)
        inner = inner[:, None] * side + inner
        inner = torch.arange(3, device=self.device)[:, None, None] * side * side + inner
        flat = self.pixels.reshape(self.batch, -1)
        index = start[:, :, None] + inner.flatten()
        return flat.gather(1, index.flatten(1)).view(*place.shape, 3, block, block)

    def _cuts(self, new: Tensor, under: Tensor, kinds: list[int]) -> Tensor:
        """Return where existing pixels are kept: bool (B, D, block, block).

        They are kept left of the left cut and above the top cut.
        """
        overlap = self.options.overlap
        error = (new - under).square().sum(2)
        strips = (error[..., :overlap], error[..., :overlap, :].transpose(2, 3))
        left, top = cheapest_path(torch.stack(strips))
        across = torch.arange(self.options.block, device=self.device)
        has_left = torch.tensor([kind != TOP for kind in kinds], device=self.device)
        has_top = torch.tensor([kind != LEFT for kind in kinds], device=self.device)
        is_left = (across < left[..., :, None]) & has_left[:, None, None]
        is_above = (across[:, None] < top[..., None, :]) & has_top[:, None, None]
        return is_left | is_above


def cheapest_path(error: Tensor) -> Tensor:
    """Find the columns of the cheapest path from first to last row: (..., H, W) -> (..., H).

    It moves at most one column per row (Fig. 3 and section 2.1 of the paper). Ties are broken in a
    fixed way.
    """
    height = error.shape[-2]
    costs = error.movedim(-2, 0)
    total = costs[0]
    moves = []
    edge = torch.full_like(total[..., :1], torch.inf)
    for row in range(1, height):
        padded = torch.cat((edge, total, edge), -1)
        cheapest, move = padded.unfold(-1, 3, 1).min(-1)
        moves.append(move)
        total = cheapest + costs[row]
    column = total.argmin(-1, keepdim=True)
    path = [column]
    for move in reversed(moves):
        column = column + move.gather(-1, column) - 1
        path.append(column)
    return torch.cat(path[::-1], -1)
