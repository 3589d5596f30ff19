"""Choose the order in which synthesis resolves pixels, and the neighbours that it compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 0.02  # largest share of a stage's visits


@dataclass(frozen=True)
class Options:
    """Options with the names and defaults of the original program, and two new ones.

    shortlist: number of candidates compared on all neighbours; 0: every candidate. glance: number
    of nearest neighbours that choose the shortlist.
    """

    k_neighs: int = 50
    m_rand: int = 50
    cauchy: float = 1.0
    backtrack_pct: float = 0.5
    backtrack_stages: int = 5
    shortlist: int = 10
    glance: int = 12


@dataclass
class Chunk:
    """V independent visits; neighbours and offsets int32 (V, k), nearest first."""

    target: Tensor  # int64 (V,): pixels to resolve, row-major
    neighbours: Tensor  # pixels resolved before
    offsets: Tensor  # neighbour minus target, in steps through `Canvas`
    weights: Tensor  # float32 (V, k)
    first: int  # number of visits before this chunk

    def to(self, device: torch.device | str) -> Chunk:
        """Return the chunk with its tensors on `device`."""
        tensors = (self.target, self.neighbours, self.offsets, self.weights)
        return Chunk(*(tensor.to(device) for tensor in tensors), self.first)


class Canvas:
    """A flat layout of M examples with black margins, in which place + offset is one addition.

    Rows are 2 * patch long, and their black half serves as the margin on both sides; `patch` black
    rows lie above, between and below the examples.
    """

    def __init__(self, patch: int, examples: int):
        self.patch = patch
        self.stride = 2 * patch
        self.rows = 1 + patch + examples * 2 * patch
        self.length = self.rows * self.stride
        first_rows = torch.arange(examples)[:, None] * (2 * patch)
        down = first_rows + torch.arange(patch) + 1 + patch
        # places of the example pixels
        self.places = (down[:, :, None] * self.stride + torch.arange(patch)).flatten().int()

    def paint(self, examples: Tensor) -> Tensor:
        """Lay out examples uint8 (B, M, 3, P, P) -> int32 (B, length).

        A number holds red, green, blue and a zero byte.
        """
        batch = examples.shape[0]
        canvas = torch.zeros(batch, self.length, 4, dtype=torch.uint8, device=examples.device)
        pixels = examples.permute(0, 1, 3, 4, 2).reshape(batch, -1, 3)
        canvas[:, self.places.to(examples.device).long(), :3] = pixels
        return canvas.view(torch.int32)[..., 0]

    def steps(self, down: Tensor, right: Tensor) -> Tensor:
        """Convert offsets in pixels to steps through the layout.

        Offsets beyond `patch` always lead outside and are clamped to it.
        """
        down = down.clamp(-self.patch, self.patch)
        right = right.clamp(-self.patch, self.patch)
        return (down * self.stride + right).int()


class Schedule:
    """The order of the pixels and their neighbours, the same for every picture of a run.

    size, patch: sides of the textures and of the examples in pixels. examples: number per picture.
    seed: decides the order. stages: list of (blur level, chunks). With the defaults it takes a
    second or two to build and holds 60 MB.
    """

    def __init__(
        self,
        options: Options,
        size: int = 224,
        patch: int = 96,
        examples: int = 2,
        seed: int = 0,
    ):
        self.options = options
        self.size = size
        self.canvas = Canvas(patch, examples)
        pixels = size * size
        self.order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))
        self._finder = _Neighbours(self.order, size)
        last = options.backtrack_stages
        self.levels = max(1, last)
        self.stages: list[tuple[int, list[Chunk]]] = []
        self.visits = 0
        resolved = 1  # the first pixel is copied from a random place
        for stage in range(last, -1, -1):
            end = max(1, int(options.backtrack_pct**stage * pixels))
            start = 0 if stage < last else 1
            chunks = self._chunks(start, end, resolved)
            resolved = max(resolved, end)
            self.stages.append((min(last - stage, self.levels - 1), chunks))
        del self._finder

    def _chunks(self, start: int, end: int, resolved: int) -> list[Chunk]:
        """Return the visits of a stage: pixels `start` to `end` of the order."""
        chunks = []
        while start < end:
            visible = max(start, resolved)
            most = max(1, min(int(CHUNK * end), visible // 8))
            stop = min(start + most, resolved if start < resolved else end, end)
            chunks.append(self._chunk(start, stop, visible))
            self.visits += stop - start
            start = stop
        return chunks

    def _chunk(self, start: int, stop: int, visible: int) -> Chunk:
        target = self.order[start:stop]
        neighbours = self._finder.nearest(target, visible, self.options.k_neighs)
        size = self.size
        down = neighbours // size - (target // size)[:, None]
        right = neighbours % size - (target % size)[:, None]
        squared = (down * down + right * right).float()
        weights = torch.exp(-squared / squared.mean(1, keepdim=True).clamp(min=1e-9))
        offsets = self.canvas.steps(down, right)
        return Chunk(target, neighbours.int(), offsets, weights, self.visits)

    def to(self, device: torch.device | str) -> Schedule:
        """Return the same schedule with its tensors on `device`."""
        moved = object.__new__(Schedule)
        moved.__dict__.update(self.__dict__)
        moved.order = self.order.to(device)
        moved.stages = [
            (level, [chunk.to(device) for chunk in chunks]) for level, chunks in self.stages
        ]
        return moved


class _Neighbours:
    """Find the nearest pixels among the first ones of an order, by walking outwards."""

    def __init__(self, order: Tensor, size: int):
        self.order = order
        self.size = size
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        # pixels beyond the border rank as never resolved
        self.rank = torch.full((3 * size, 3 * size), len(order), dtype=torch.int32)
        self.rank[size : 2 * size, size : 2 * size] = rank.view(size, size).int()
        axis = torch.arange(-size + 1, size)
        down, right = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
        outwards = torch.argsort(down * down + right * right, stable=True)
        self.down = down[outwards]
        self.right = right[outwards]

    def nearest(self, target: Tensor, visible: int, k: int) -> Tensor:
        """Return the min(k, visible) pixels nearest to each target (V,): int64, nearest first.

        visible: number of pixels at the start of the order that count.
        """
        k = min(k, visible)
        neighbours = torch.empty(len(target), k, dtype=torch.int64)
        todo = torch.arange(len(target))
        window = int(1.3 * k * self.size**2 / visible) + 16
        while len(todo):
            window = min(window, len(self.down))
            for rows in todo.split(max(1, (1 << 20) // window)):
                neighbours[rows] = self._within(target[rows], visible, k, window)
            todo = todo[neighbours[todo, -1] < 0]
            window *= 2
        return neighbours

    def _within(self, target: Tensor, visible: int, k: int, window: int) -> Tensor:
        """Do as `nearest` among the `window` closest places; -1 marks missing neighbours."""
        wide = 3 * self.size
        down = self.down[:window]
        right = self.right[:window]
        centre = (target // self.size + self.size) * wide + target % self.size + self.size
        is_near = self.rank.view(-1)[centre[:, None] + (down * wide + right)] < visible
        is_enough = is_near.sum(1) >= k
        is_near &= is_near.cumsum(1, dtype=torch.int32) <= k
        place = is_near[is_enough].nonzero()[:, 1].view(-1, k)
        neighbours = torch.full((len(target), k), -1)
        neighbours[is_enough] = target[is_enough, None] + down[place] * self.size + right[place]
        return neighbours
