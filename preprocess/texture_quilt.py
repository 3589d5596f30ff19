"""Image quilting (Efros & Freeman, SIGGRAPH 2001), for many pictures at once: no files, only tensors.

    textures = synthesise(patches, seeds, Options(), size=224)   # uint8 (B, M, 3, 96, 96) -> uint8 (B, 3, 224, 224)

Overlapping blocks are laid in raster order. Each is copied from a place in the examples where the overlap with what lies
there already differs little (sum of squares), one drawn at random from those within a tolerance of the best, and is joined
along the cheapest path through the overlap (minimum-error boundary cut, found by dynamic programming).

The sums of squares of a block against all places of all examples are one correlation by FFT. Blocks on one anti-diagonal
do not touch those laid after them, so they are laid together: 2 n - 1 rounds instead of n x n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from preprocess.texture_mrs import random_integers


@dataclass(frozen=True)
class Options:
    """block, overlap: pixels (the paper: overlap 1/6 of the block). tolerance: a place qualifies within (1 + tolerance) of
    the best. floor: grey levels (root mean square over the overlap) below which places count as equally good: without it
    the place that simply goes on is always best, with error 0, and whole objects would be copied."""

    block: int = 34
    overlap: int = 6
    tolerance: float = 0.1
    floor: float = 8.0


def synthesise(patches: Tensor, seeds: Tensor, options: Options, size: int = 224) -> Tensor:
    """patches uint8 (B, M, 3, P, P), P >= block; seeds int64 (B,) -> uint8 (B, 3, size, size), on the patches' device.

    On the CPU pictures are made one after another: floats are then summed in the same order whatever the batch, and a
    texture does not depend, to the bit, on the pictures made along with it.
    """
    if patches.shape[-1] < options.block or not 0 < 2 * options.overlap <= options.block:
        raise ValueError(f"blocks of {options.block} with overlap {options.overlap} from {tuple(patches.shape)}")
    if patches.device.type == "cpu" and len(patches) > 1:
        parts = zip(patches.split(1), seeds.split(1))
        return torch.cat([_Quilt(patch, seed, options, size).run() for patch, seed in parts])
    return _Quilt(patches, seeds, options, size).run()


class _Quilt:
    def __init__(self, patches: Tensor, seeds: Tensor, options: Options, size: int):
        self.patches, self.seeds, self.options, self.size = patches, seeds, options, size
        self.device, block, overlap = patches.device, options.block, options.overlap
        self.batch, self.examples, _, self.side, _ = patches.shape
        self.step = block - overlap
        self.blocks = 1 + max(0, -(-(size - block) // self.step))  # per side; the last ones reach over the edge
        self.places = self.side - block + 1  # per side of an example
        whole = block + (self.blocks - 1) * self.step
        self.out = torch.zeros(self.batch, 3, whole, whole, device=self.device)

        # Around the mean the sums of squares are smaller, and their difference more exact.
        self.pixels = patches.float()
        self.mean = self.pixels.mean((1, 3, 4)).round()
        self.pixels -= self.mean[:, None, :, None, None]
        self.spectrum = torch.fft.rfft2(self.pixels)  # circular: a block in place never reaches around
        squares = self.pixels.square().sum(2)
        top = self._sums(squares, overlap, block)
        left = self._sums(squares, block, overlap)
        corner = self._sums(squares, overlap, overlap)
        # Sum of squares of each place under the overlap; kinds: first row (left strip), first column (top strip), both.
        self.energy = torch.stack((left, top, left + top - corner), 1).flatten(2)  # (B, 3, M * places^2)
        masks = torch.zeros(3, block, block, device=self.device)
        masks[0, :, :overlap] = masks[1, :overlap] = 1
        masks[2] = torch.maximum(masks[0], masks[1])
        self.masks = masks

    def _sums(self, squares: Tensor, height: int, width: int) -> Tensor:
        """(B, M, P, P) -> sums over the height x width window whose top left corner is each place: (B, M, places, places)."""
        sums = avg_pool2d(squares.double(), (height, width), stride=1, divisor_override=1)
        return sums[:, :, : self.places, : self.places].float()

    def run(self) -> Tensor:
        for diagonal in range(2 * self.blocks - 1):
            first, last = max(0, diagonal - self.blocks + 1), min(diagonal, self.blocks - 1)
            rows = torch.arange(first, last + 1)
            self._lay(rows, diagonal - rows)
        pixels = self.out[:, :, : self.size, : self.size] + self.mean[:, :, None, None]
        return pixels.round().clamp(0, 255).byte()

    def _lay(self, rows: Tensor, columns: Tensor) -> None:
        """Lay the blocks at these D places of the grid, all on one anti-diagonal."""
        block, count = self.options.block, len(rows)
        tops, lefts = (rows * self.step).tolist(), (columns * self.step).tolist()
        kinds = (2 - (rows == 0).long() * 2 - (columns == 0).long()).tolist()  # both 2, first row 0, first column 1
        under = torch.stack([self.out[:, :, t : t + block, x : x + block] for t, x in zip(tops, lefts)], 1)
        if rows[-1] + columns[-1] == 0:  # the very first: anywhere
            allowed = torch.ones(self.batch, 1, self.energy.shape[2], dtype=torch.bool, device=self.device)
        else:
            allowed = self._good(under, kinds)
        lots = random_integers(self.seeds, (rows * self.blocks + columns).int().to(self.device), 1 << 30)  # (B, D)
        upto = allowed.cumsum(2, dtype=torch.int32)
        place = (upto <= (lots % upto[..., -1])[..., None]).sum(2)  # the lots-th of those allowed
        new = self._blocks(place)
        if rows[-1] + columns[-1] > 0:
            keep = self._cuts(new, under, kinds)
            new = torch.where(keep[:, :, None], under, new)
        for i in range(count):
            self.out[:, :, tops[i] : tops[i] + block, lefts[i] : lefts[i] + block] = new[:, i]

    def _good(self, under: Tensor, kinds: list[int]) -> Tensor:
        """under (B, D, 3, block, block) -> which places of the examples fit there: bool (B, D, M * places^2)."""
        side, places, masks = self.side, self.places, self.masks[kinds]
        template = under * masks[:, None]
        spectrum = torch.fft.rfft2(template, s=(side, side)).conj()  # (B, D, 3, side, side / 2 + 1)
        products = torch.einsum("bdcyx,bmcyx->bdmyx", spectrum, self.spectrum)
        matches = torch.fft.irfft2(products, s=(side, side))[..., :places, :places].flatten(2)
        there = template.square().sum((2, 3, 4))[:, :, None]
        errors = self.energy[:, kinds] - 2 * matches + there
        values = 3 * masks.sum((1, 2))[None, :, None]
        best = errors.amin(2, keepdim=True).clamp(min=0)
        return errors <= torch.maximum((1 + self.options.tolerance) * best, self.options.floor**2 * values)

    def _blocks(self, place: Tensor) -> Tensor:
        """place int64 (B, D), over examples and places -> their blocks (B, D, 3, block, block)."""
        places, side, block = self.places, self.side, self.options.block
        example, within = place // places**2, place % places**2
        start = example * (3 * side * side) + within // places * side + within % places
        inner = torch.arange(block, device=self.device)
        inner = inner[:, None] * side + inner
        inner = torch.arange(3, device=self.device)[:, None, None] * side * side + inner
        flat = self.pixels.reshape(self.batch, -1)
        index = start[:, :, None] + inner.flatten()
        return flat.gather(1, index.flatten(1)).view(*place.shape, 3, block, block)

    def _cuts(self, new: Tensor, under: Tensor, kinds: list[int]) -> Tensor:
        """(B, D, block, block) bool: where what lies there stays, left of the left cut or above the top cut."""
        overlap = self.options.overlap
        error = (new - under).square().sum(2)
        left, top = cheapest_path(torch.stack((error[..., :overlap], error[..., :overlap, :].transpose(2, 3))))
        across = torch.arange(self.options.block, device=self.device)
        has_left = torch.tensor([kind != 1 for kind in kinds], device=self.device)[:, None, None]
        has_top = torch.tensor([kind != 0 for kind in kinds], device=self.device)[:, None, None]
        return (across < left[..., :, None]) & has_left | (across[:, None] < top[..., None, :]) & has_top


def cheapest_path(error: Tensor) -> Tensor:
    """Column of the cheapest path from the first to the last row, moving at most one column a row: (..., H, W) -> (..., H).

    Fig. 3 and section 2.1 of the paper. Of equal paths one is taken, always the same.
    """
    height, width = error.shape[-2:]
    costs = error.movedim(-2, 0)
    total, moves = costs[0], []
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
