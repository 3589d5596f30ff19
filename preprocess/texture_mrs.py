"""Synthesise textures of many pictures by multiresolution stochastic synthesis, on tensors only.

    schedule = Schedule(Options(), size=224, patch=96)    # positions and neighbours, once
    textures = synthesise(patches, seeds, schedule)       # uint8 (B, M, 3, 96, 96), int64 (B,)
                                                          # -> uint8 (B, 3, 224, 224)

The algorithm is that of Embark's texture-synthesis 0.8 with its defaults, which made
ImageNet-Texture (Ge et al., arXiv:2110.14189). Every output pixel is a copy of an example pixel.
Pixels are resolved in random order; the pixel at p looks at its k nearest resolved neighbours n and
compares candidate example places c by

    cost(c) = sum_n w_n sum_rgb ln(1 + ((colour of n) - (example at c + n - p))^2 / (255 cauchy)^2)
    w_n = exp(-|n - p|^2 / mean |n - p|^2),  outside the example: black

Candidates are the places that continue the source of each neighbour, and m_rand random ones. Work
proceeds in stages s = S ... 0, which end with pct^s of all pixels resolved. Each stage first
resolves the earlier pixels again, then new ones; the first stage compares heavily blurred examples,
the last two the sharp ones.

It is fast for these reasons, and differs from the original in them:

- Order of visits, neighbours and weights belong to the schedule and are shared by all pictures;
  candidates are not.
- Visits go in chunks of at most 2 % of a stage (an eighth of what is resolved, at the start);
  pixels of one chunk are resolved independently.
- Shortlist: all candidates are compared on the nearest `glance` neighbours, only the best
  `shortlist` of them on all k. The original instead stops summing early. `shortlist=0` compares
  all candidates in full.
- The original mirrors the offsets n - p when it judges random candidates. Here they have the right
  sign.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from preprocess.texture_schedule import Chunk, Options, Schedule

# (candidate, neighbour) pairs compared at once; on the CPU they fit in a core's cache
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit integers one to one (Wellons, hash-prospector: lowbias32)."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)


def random_integers(seeds: Tensor, counters: Tensor, below: int) -> Tensor:
    """Return int32 (B, ...) in [0, below); entry i of picture b depends on seeds[b], counters[i].

    seeds int64 (B,), counters int32 (...). With counters instead of a generator, a picture
    depends neither on its batch nor on the device.
    """
    shape = (-1, *[1] * counters.dim())
    low = (seeds & 0x7FFFFFFF).int().view(shape)
    high = (seeds >> 31 & 0x7FFFFFFF).int().view(shape)
    return (_mix(_mix(counters ^ low) + high) & 0x7FFFFFFF) % below


def _resample(old: int, new: int) -> Tensor:
    """Return the (new, old) weights of a resize with a Gaussian filter.

    Its deviation is half an output pixel, or half an input pixel when enlarging.
    """
    scale = max(1.0, old / new)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centres[:, None]) / scale
    weights = torch.exp(-2 * distance**2) * (distance.abs() <= 3)
    return weights / weights.sum(1, keepdim=True)


def blur_levels(examples: Tensor, levels: int) -> Tensor:
    """Blur examples uint8 (B, M, 3, P, P): reduce by 2^(levels - 1) ... 2, 1 and enlarge again.

    Returns uint8 (levels, B, M, 3, P, P).
    """
    side = examples.shape[-1]
    blurred = []
    for level in range(levels - 1, 0, -1):
        small = max(1, side >> level)
        weights = (_resample(small, side) @ _resample(side, small)).float().to(examples.device)
        blurred.append((weights @ examples.float() @ weights.T).round().clamp(0, 255).byte())
    return torch.stack([*blurred, examples])


def synthesise(patches: Tensor, seeds: Tensor, schedule: Schedule) -> Tensor:
    """Make textures uint8 (B, 3, S, S) of patches uint8 (B, M, 3, P, P), on their device.

    seeds: int64 (B,). On the CPU pictures are made one after another, so that floats are summed in
    the same order for every batch and a texture is bit-exact whatever else is in its batch. Raises
    ValueError if the schedule is for other patches.
    """
    canvas = schedule.canvas
    places = patches.shape[1] * canvas.patch**2
    if patches.shape[-1] != canvas.patch or canvas.places.numel() != places:
        raise ValueError(
            f"the schedule is for patches of another number or size than {tuple(patches.shape)}"
        )
    if patches.device.type == "cpu" and len(patches) > 1:
        parts = zip(patches.split(1), seeds.split(1))
        return torch.cat([synthesise(patch, seed, schedule) for patch, seed in parts])
    return _Synthesis(patches, seeds, schedule).run()


class _Synthesis:
    """The state of a batch.

    source (B, S * S) int32: the place in the B canvases that each output pixel was copied from.
    """

    def __init__(self, patches: Tensor, seeds: Tensor, schedule: Schedule):
        self.seeds = seeds
        self.schedule = schedule
        self.options: Options = schedule.options
        batch = len(patches)
        canvas = schedule.canvas
        device = patches.device
        levels = blur_levels(patches, schedule.levels)
        self.tables = [canvas.paint(level).flatten() for level in levels]
        self.places = canvas.places.to(device)
        inside = torch.zeros(canvas.length, dtype=torch.bool, device=device)
        inside[self.places.long()] = True
        self.inside = inside.repeat(batch)
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        self.base = rows[:, None] * canvas.length
        self.source = torch.zeros(batch, schedule.size**2, dtype=torch.int32, device=device)
        self.one = torch.ones((), device=device)

    def run(self) -> Tensor:
        """Resolve all pixels and return the textures uint8 (B, 3, S, S)."""
        size = self.schedule.size
        anywhere = torch.full((1,), -1, dtype=torch.int32, device=self.source.device)
        self.source[:, self.schedule.order[:1]] = self.random_places(anywhere)
        for level, chunks in self.schedule.stages:
            for chunk in chunks:
                self.visit(chunk, self.tables[level])
        pixels = self.tables[-1].index_select(0, self.source.flatten()).view(torch.uint8)
        return pixels.view(-1, size, size, 4)[..., :3].permute(0, 3, 1, 2).contiguous()

    def random_places(self, counters: Tensor) -> Tensor:
        """Draw example pixels of each picture: counters int32 (n,) -> places (B, n)."""
        drawn = random_integers(self.seeds, counters, len(self.places))
        return self.places.index_select(0, drawn.flatten()).view(drawn.shape) + self.base

    def visit(self, chunk: Chunk, table: Tensor) -> None:
        """Resolve the pixels of a chunk. table: the canvases at the blur level of its stage."""
        options = self.options
        batch = len(self.source)
        visits, k = chunk.neighbours.shape
        rows = batch * visits
        sources = self.source.index_select(1, chunk.neighbours.flatten())  # of the neighbours
        sources = sources.view(batch, visits, k)
        continued = (sources - chunk.offsets).view(rows, k)
        outside = ~self.inside.index_select(0, continued.flatten()).view(rows, k)
        # beyond the source, its own place is compared, which cannot win
        candidates = torch.where(outside, sources.view(rows, k), continued)
        if options.m_rand:
            candidates = torch.cat((candidates, self._random_candidates(chunk, rows)), 1)

        colours = table.index_select(0, sources.flatten()).view(torch.uint8)
        colours = colours.view(rows, k, 4).float()
        offsets = chunk.offsets.repeat(batch, 1)
        weights = chunk.weights.repeat(batch, 1)[:, :, None].expand(-1, -1, 4).contiguous()
        near = options.glance if options.shortlist and options.glance < k else k
        compared = (offsets[:, :near], colours[:, :near], weights[:, :near])
        costs = self.costs(table, candidates, *compared)
        costs[:, :k].masked_fill_(outside, math.inf)
        if near < k:
            most = min(options.shortlist, costs.shape[1])
            costs, best = costs.topk(most, largest=False)
            candidates = candidates.gather(1, best)
            compared = (offsets[:, near:], colours[:, near:], weights[:, near:])
            costs += self.costs(table, candidates, *compared)
        winner = candidates.gather(1, costs.argmin(1, keepdim=True))
        self.source[:, chunk.target] = winner.view(batch, visits)

    def _random_candidates(self, chunk: Chunk, rows: int) -> Tensor:
        """Draw the random candidates of a chunk's visits: (rows, m_rand)."""
        m_rand = self.options.m_rand
        first = chunk.first * m_rand
        last = first + len(chunk.neighbours) * m_rand
        counters = torch.arange(first, last, dtype=torch.int32, device=self.source.device)
        return self.random_places(counters).view(rows, m_rand)

    def costs(
        self, table: Tensor, candidates: Tensor, offsets: Tensor, colours: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the costs (R, C) of candidates (R, C).

        offsets (R, k), colours and weights (R, k, 4): values of the neighbours.
        """
        rows, count = candidates.shape
        k = offsets.shape[1]
        colours = colours.reshape(rows, 1, 4 * k)
        weights = weights.reshape(rows, 4 * k, 1)
        costs = torch.empty(rows, count, device=table.device)
        step = max(1, BLOCK.get(table.device.type, BLOCK["cuda"]) // (count * k))
        scale = (255 * self.options.cauchy) ** -2
        for start in range(0, rows, step):
            block = slice(start, start + step)
            places = candidates[block, :, None] + offsets[block, None, :]
            terms = table.index_select(0, places.view(-1)).view(torch.uint8)
            terms = terms.view(-1, count, 4 * k).float()
            terms -= colours[block]
            torch.addcmul(self.one, terms, terms, value=scale, out=terms).log_()
            costs[block] = torch.bmm(terms, weights[block])[..., 0]
        return costs
