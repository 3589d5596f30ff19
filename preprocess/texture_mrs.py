"""Multiresolution stochastic texture synthesis, for many pictures at once: no files, only tensors.

    schedule = Schedule(Options(), size=224, patch=96)           # positions and neighbours, once per process
    textures = synthesise(patches, seeds, schedule)              # uint8 (B, M, 3, 96, 96) -> uint8 (B, 3, 224, 224)

The algorithm is that of Embark's texture-synthesis 0.8 with its defaults, which made ImageNet-Texture (Ge et al.,
arXiv:2110.14189). Every output pixel is a copy of an example pixel. Pixels are resolved in random order; the pixel at p
looks at its k nearest resolved neighbours n and compares candidate example places c by

    cost(c) = sum_n w_n sum_rgb ln(1 + ((colour of n) - (example at c + n - p))^2 / (255 cauchy)^2)
    w_n = exp(-|n - p|^2 / mean |n - p|^2),  outside the example: black

Candidates: the place that continues each neighbour's own source, and m_rand random ones. It is done in stages s = S ... 0
which end with pct^s of all pixels resolved. Each first resolves again what was resolved before it, then goes on; the first
stage compares heavily blurred examples, the last two the sharp ones.

What makes it fast, and where that differs from the original:

- Order of visits, neighbours and weights belong to the schedule and are shared by all pictures; candidates are not.
- Visits go in chunks of at most 2 % of a stage (an eighth of what is resolved, at the start); pixels of one chunk do not
  see each other.
- Shortlist: all candidates are compared on the nearest `glance` neighbours, only the best `shortlist` of them on all k.
  The original stops summing early instead. `shortlist=0` compares everything in full.
- The original mirrors the offsets n - p when it judges random candidates. Here they have the right sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 0.02  # of a stage's visits, at most
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}  # (candidate, neighbour) pairs compared in one go: stays in a core's cache


@dataclass(frozen=True)
class Options:
    """Names and defaults of the original. shortlist, glance: see above (0: compare every candidate in full)."""

    k_neighs: int = 50
    m_rand: int = 50
    cauchy: float = 1.0
    backtrack_pct: float = 0.5
    backtrack_stages: int = 5
    shortlist: int = 10
    glance: int = 12


@dataclass
class Chunk:
    """V visits that do not see each other. neighbours and offsets are int32 (V, k), nearest first."""

    target: Tensor  # int64 (V,): pixels to resolve, row-major
    neighbours: Tensor  # pixels resolved before
    offsets: Tensor  # neighbour minus target, in steps through `Canvas`
    weights: Tensor  # float32 (V, k)
    first: int  # number of visits before this chunk

    def to(self, device: torch.device | str) -> Chunk:
        moved = (x.to(device) for x in (self.target, self.neighbours, self.offsets, self.weights))
        return Chunk(*moved, self.first)


class Canvas:
    """Flat layout of M examples with so much black around them that example place + offset is one addition.

    Rows are 2 * patch long, the black half standing for both sides; above, between and below lie `patch` black rows.
    """

    def __init__(self, patch: int, examples: int):
        self.patch, self.stride = patch, 2 * patch
        self.rows = 1 + patch + examples * 2 * patch
        self.length = self.rows * self.stride
        down = torch.arange(examples)[:, None] * (2 * patch) + torch.arange(patch) + 1 + patch
        self.places = (down[:, :, None] * self.stride + torch.arange(patch)).flatten().int()  # of the example pixels

    def paint(self, examples: Tensor) -> Tensor:
        """uint8 (B, M, 3, P, P) -> int32 (B, length): red, green, blue and a zero byte in one number."""
        batch = examples.shape[0]
        canvas = torch.zeros(batch, self.length, 4, dtype=torch.uint8, device=examples.device)
        pixels = examples.permute(0, 1, 3, 4, 2).reshape(batch, -1, 3)
        canvas[:, self.places.to(examples.device).long(), :3] = pixels
        return canvas.view(torch.int32)[..., 0]

    def steps(self, down: Tensor, right: Tensor) -> Tensor:
        """Offsets in pixels as steps; those beyond `patch` lead outside from everywhere and are cut to it."""
        down, right = (o.clamp(-self.patch, self.patch) for o in (down, right))
        return (down * self.stride + right.clamp(max=self.patch - 1)).int()


class Schedule:
    """Which pixel is resolved when, from which neighbours: the same for every picture of a run.

    size, patch: sides of the textures and of the examples in pixels; examples: how many per picture.
    seed: another one gives another order. Holds 60 MB with the defaults and takes a second or two to build.
    stages: list of (blur level, chunks).
    """

    def __init__(self, options: Options, size: int = 224, patch: int = 96, examples: int = 2, seed: int = 0):
        self.options, self.size, self.canvas = options, size, Canvas(patch, examples)
        pixels = size * size
        self.order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))
        self._finder = _Neighbours(self.order, size)
        last, self.levels = options.backtrack_stages, max(1, options.backtrack_stages)
        self.stages, resolved, visits = [], 1, 0  # the very first pixel is copied from anywhere
        for stage in range(last, -1, -1):
            end = max(1, int(options.backtrack_pct**stage * pixels))
            chunks = []
            start = 0 if stage < last else 1
            while start < end:
                known = max(start, resolved)
                most = max(1, min(int(CHUNK * end), known // 8))
                stop = min(start + most, resolved if start < resolved else end, end)
                chunks.append(self._chunk(start, stop, known, visits))
                visits += stop - start
                start = stop
            resolved = max(resolved, end)
            self.stages.append((min(last - stage, self.levels - 1), chunks))
        self.visits = visits
        del self._finder

    def _chunk(self, start: int, stop: int, known: int, visits: int) -> Chunk:
        target = self.order[start:stop]
        neighbours = self._finder.nearest(target, known, self.options.k_neighs)
        size = self.size
        down = neighbours // size - (target // size)[:, None]
        right = neighbours % size - (target % size)[:, None]
        squared = (down * down + right * right).float()
        weights = torch.exp(-squared / squared.mean(1, keepdim=True).clamp(min=1e-9))
        return Chunk(target, neighbours.int(), self.canvas.steps(down, right), weights, visits)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tensors on `device`."""
        moved = object.__new__(Schedule)
        moved.__dict__.update(self.__dict__)
        moved.order = self.order.to(device)
        moved.stages = [(level, [chunk.to(device) for chunk in chunks]) for level, chunks in self.stages]
        return moved


class _Neighbours:
    """The k nearest of the first `known` pixels of an order, by walking outwards over the grid."""

    def __init__(self, order: Tensor, size: int):
        self.order, self.size = order, size
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        self.rank = torch.full((3 * size, 3 * size), len(order), dtype=torch.int32)  # beyond the border: never resolved
        self.rank[size : 2 * size, size : 2 * size] = rank.view(size, size).int()
        axis = torch.arange(-size + 1, size)
        down, right = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
        outwards = torch.argsort(down * down + right * right, stable=True)
        self.down, self.right = down[outwards], right[outwards]

    def nearest(self, target: Tensor, known: int, k: int) -> Tensor:
        """target (V,) -> (V, min(k, known)) int64, nearest first."""
        k = min(k, known)
        found = torch.empty(len(target), k, dtype=torch.int64)
        todo, window = torch.arange(len(target)), int(1.3 * k * self.size**2 / known) + 16
        while len(todo):
            window = min(window, len(self.down))
            for rows in todo.split(max(1, (1 << 20) // window)):
                found[rows] = self._within(target[rows], known, k, window)
            todo, window = todo[found[todo, -1] < 0], 2 * window
        return found

    def _within(self, target: Tensor, known: int, k: int, window: int) -> Tensor:
        """As nearest, looking at the `window` closest places only; rows of -1 where these hold fewer than k."""
        wide, down, right = 3 * self.size, self.down[:window], self.right[:window]
        centre = (target // self.size + self.size) * wide + target % self.size + self.size
        here = self.rank.view(-1)[centre[:, None] + (down * wide + right)] < known
        enough = here.sum(1) >= k
        here &= here.cumsum(1, dtype=torch.int32) <= k
        place = here[enough].nonzero()[:, 1].view(-1, k)
        found = torch.full((len(target), k), -1)
        found[enough] = target[enough, None] + down[place] * self.size + right[place]
        return found


# -------------------------------------------------------------------------------------------------------------- drawing


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers without visible pattern (Wellons, hash-prospector: lowbias32)."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)


def random_integers(seeds: Tensor, counters: Tensor, below: int) -> Tensor:
    """int32 (B, ...) in [0, below): entry i of picture b is a function of seeds[b] and counters[i] alone.

    seeds int64 (B,), counters int32 (...). Counting instead of drawing in turn makes a picture independent of the batch
    it is in and of the device, without a generator per picture.
    """
    shape = (-1, *[1] * counters.dim())
    low, high = (seeds & 0x7FFFFFFF).int().view(shape), (seeds >> 31 & 0x7FFFFFFF).int().view(shape)
    return (_mix(_mix(counters ^ low) + high) & 0x7FFFFFFF) % below


# ------------------------------------------------------------------------------------------------------------ synthesis


def _resample(old: int, new: int) -> Tensor:
    """(new, old) weights of a resize with a Gaussian of half an output pixel (of half an input pixel, enlarging)."""
    scale = max(1.0, old / new)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centres[:, None]) / scale
    weights = torch.exp(-2 * distance**2) * (distance.abs() <= 3)
    return weights / weights.sum(1, keepdim=True)


def blur_levels(examples: Tensor, levels: int) -> Tensor:
    """uint8 (B, M, 3, P, P) -> (levels, B, M, 3, P, P): resized down by 2^(levels - 1) ... 2, 1 and back."""
    side = examples.shape[-1]
    blurred = []
    for level in range(levels - 1, 0, -1):
        small = max(1, side >> level)
        there_and_back = (_resample(small, side) @ _resample(side, small)).float().to(examples.device)
        blurred.append((there_and_back @ examples.float() @ there_and_back.T).round().clamp(0, 255).byte())
    return torch.stack([*blurred, examples])


def synthesise(patches: Tensor, seeds: Tensor, schedule: Schedule) -> Tensor:
    """patches uint8 (B, M, 3, P, P), seeds int64 (B,) -> textures uint8 (B, 3, S, S), on the patches' device.

    On the CPU pictures are made one after another: floats are then summed in the same order whatever the batch, and a
    texture does not depend, to the bit, on the pictures made along with it.
    """
    canvas = schedule.canvas
    if patches.shape[-1] != canvas.patch or canvas.places.numel() != patches.shape[1] * canvas.patch**2:
        raise ValueError(f"the schedule is for patches of another number or size than {tuple(patches.shape)}")
    if patches.device.type == "cpu" and len(patches) > 1:
        parts = zip(patches.split(1), seeds.split(1))
        return torch.cat([synthesise(patch, seed, schedule) for patch, seed in parts])
    return _Synthesis(patches, seeds, schedule).run()


class _Synthesis:
    """State of a batch: `source` (B, S * S) int32, where in the B canvases each output pixel was copied from."""

    def __init__(self, patches: Tensor, seeds: Tensor, schedule: Schedule):
        self.seeds, self.schedule, self.options = seeds, schedule, schedule.options
        batch, canvas, device = len(patches), schedule.canvas, patches.device
        self.tables = [canvas.paint(level).flatten() for level in blur_levels(patches, schedule.levels)]
        self.places = canvas.places.to(device)
        inside = torch.zeros(canvas.length, dtype=torch.bool, device=device)
        inside[self.places.long()] = True
        self.inside = inside.repeat(batch)
        self.base = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * canvas.length
        self.source = torch.zeros(batch, schedule.size**2, dtype=torch.int32, device=device)
        self.one = torch.ones((), device=device)

    def run(self) -> Tensor:
        size = self.schedule.size
        anywhere = torch.full((1,), -1, dtype=torch.int32, device=self.source.device)
        self.source[:, self.schedule.order[:1]] = self.random_places(anywhere)
        for level, chunks in self.schedule.stages:
            for chunk in chunks:
                self.visit(chunk, self.tables[level])
        pixels = self.tables[-1].index_select(0, self.source.flatten()).view(torch.uint8)
        return pixels.view(-1, size, size, 4)[..., :3].permute(0, 3, 1, 2).contiguous()

    def random_places(self, counters: Tensor) -> Tensor:
        """int32 (n,) -> (B, n): example pixels of each picture."""
        drawn = random_integers(self.seeds, counters, len(self.places))
        return self.places.index_select(0, drawn.flatten()).view(drawn.shape) + self.base

    def visit(self, chunk: Chunk, table: Tensor) -> None:
        batch, options = len(self.source), self.options
        visits, k = chunk.neighbours.shape
        rows = batch * visits
        from_ = self.source.index_select(1, chunk.neighbours.flatten()).view(batch, visits, k)  # of the neighbours
        continued = (from_ - chunk.offsets).view(rows, k)
        outside = ~self.inside.index_select(0, continued.flatten()).view(rows, k)
        candidates = torch.where(outside, from_.view(rows, k), continued)  # a place to look at; it cannot win
        if options.m_rand:
            count = visits * options.m_rand
            first = chunk.first * options.m_rand
            counters = torch.arange(first, first + count, dtype=torch.int32, device=table.device)
            candidates = torch.cat((candidates, self.random_places(counters).view(rows, options.m_rand)), 1)

        colours = table.index_select(0, from_.flatten()).view(torch.uint8).view(rows, k, 4).float()
        offsets = chunk.offsets.repeat(batch, 1)
        weights = chunk.weights.repeat(batch, 1)[:, :, None].expand(-1, -1, 4).contiguous()
        near = options.glance if options.shortlist and options.glance < k else k
        costs = self.costs(table, candidates, offsets[:, :near], colours[:, :near], weights[:, :near])
        costs[:, :k].masked_fill_(outside, math.inf)
        if near < k:
            costs, best = costs.topk(min(options.shortlist, costs.shape[1]), largest=False)
            candidates = candidates.gather(1, best)
            costs += self.costs(table, candidates, offsets[:, near:], colours[:, near:], weights[:, near:])
        winner = candidates.gather(1, costs.argmin(1, keepdim=True))
        self.source[:, chunk.target] = winner.view(batch, visits)

    def costs(self, table: Tensor, candidates: Tensor, offsets: Tensor, colours: Tensor, weights: Tensor) -> Tensor:
        """candidates (R, C), offsets (R, k), colours and weights (R, k, 4) -> cost (R, C)."""
        rows, count = candidates.shape
        k = offsets.shape[1]
        colours, weights = colours.reshape(rows, 1, 4 * k), weights.reshape(rows, 4 * k, 1)
        costs = torch.empty(rows, count, device=table.device)
        step = max(1, BLOCK.get(table.device.type, BLOCK["cuda"]) // (count * k))
        scale = (255 * self.options.cauchy) ** -2
        for start in range(0, rows, step):
            block = slice(start, start + step)
            where = candidates[block, :, None] + offsets[block, None, :]
            terms = table.index_select(0, where.view(-1)).view(torch.uint8).view(-1, count, 4 * k).float()
            terms -= colours[block]
            torch.addcmul(self.one, terms, terms, value=scale, out=terms).log_()
            costs[block] = torch.bmm(terms, weights[block])[..., 0]
        return costs
