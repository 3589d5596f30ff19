"""One NCE step over two memory banks: the published way of taking scores, and cmc/contrast.py.

    python benchmarks/nce_step.py          # n = 126,689 (ImageNet-100), B 128, K 16,384, D 128
    python benchmarks/nce_step.py --n 1281167 --sides ours

A step is: draw the negatives, both directions, NCE loss, backward to the features, update of both
banks.
published     what the published code does, written anew: gathers B x (K+1) x D bank rows for each
              direction, one batched product, exp, Z, the loss term by term; banks are updated
              before the backward pass.
ours          the losses and banks of cmc/contrast.py.

Sides alternate; each repeat is a process of its own, so that its peak memory can be told. "memory"
is what a step needs beyond the banks: peak of the process minus what it held before the first step.
The first step of both sides has the same banks, features and draws, and must agree: every number of
the gradients to 1e-4 of the largest, losses to what float32 leaves of the published sum.
Ends with 1 if a ratio misses its aim.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.side_by_side import Peak, in_a_process, ratios, resident
from cmc.contrast import MemoryBanks
from common.memory import draw_rows

T = 0.07
MOMENTUM = 0.5
SIDES = ("ours", "published")
FORWARDED = ("n", "k", "batch", "dim", "steps")  # flags of a repeat's process


class Published:
    """Scores by gathering rows; Z is fixed by the first batch."""

    def __init__(self, banks: list[torch.Tensor], n: int, k: int):
        self.banks = banks
        self.n = n
        self.k = k
        self.z = [None, None]

    def step(self, feats, index, rows) -> torch.Tensor:
        """Return the losses of both directions, having taken the step."""
        losses = []
        for i, feat in enumerate(feats):
            bank = self.banks[1 - i]
            fetched = bank.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)
            out = torch.exp(torch.bmm(fetched, feat.unsqueeze(2)) / T)
            if self.z[i] is None:
                self.z[i] = out.detach().mean() * self.n
            losses.append(self.loss((out / self.z[i]).squeeze(2)))
        with torch.no_grad():
            for bank, feat in zip(self.banks, feats):
                mixed = MOMENTUM * bank[index] + (1 - MOMENTUM) * feat
                bank.index_copy_(0, index, F.normalize(mixed, dim=1))
        sum(losses).backward()
        return torch.stack([loss.detach() for loss in losses])

    def loss(self, out: torch.Tensor) -> torch.Tensor:
        noise = self.k / self.n
        positive = out[:, 0]
        negative = out[:, 1:]
        data = torch.log(positive / (positive + noise + 1e-7))
        background = torch.log(torch.full_like(negative, noise) / (negative + noise + 1e-7))
        return -(data.sum() + background.sum()) / len(out)


class Ours:
    """The banks of cmc/contrast.py."""

    def __init__(self, banks: list[torch.Tensor], n: int, k: int):
        dim = banks[0].shape[1]
        self.memory = MemoryBanks(1, dim, ("l", "ab"), k, T, MOMENTUM, False, "oneshot")
        self.memory.n = n
        self.memory.memory_l, self.memory.memory_ab = banks

    def step(self, feats, index, rows) -> torch.Tensor:
        losses, _ = self.memory(feats, rows)
        losses.sum().backward()
        self.memory.update(feats, index)
        return losses.detach()


def unit_rows(count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def measure(side: str, args) -> dict:
    """Return seconds and memory of a step, and losses and gradients of the first one."""
    generator = torch.Generator().manual_seed(0)
    banks = [unit_rows(args.n, args.dim, generator) for _ in range(2)]
    memory = (Published if side == "published" else Ours)(banks, args.n, args.k)
    feats = [unit_rows(args.batch, args.dim, generator) for _ in range(2)]
    before = resident()
    peak = Peak()
    peak.start()
    times = []
    for repeat in range(args.steps + 1):
        began = time.perf_counter()
        leaves = [feat.clone().requires_grad_() for feat in feats]
        index = torch.arange(repeat * args.batch, (repeat + 1) * args.batch)
        losses = memory.step(leaves, index, draw_rows(index, args.n, args.k, generator))
        times.append(time.perf_counter() - began)
        if repeat == 0:
            gradients = [leaf.grad.flatten().tolist() for leaf in leaves]
            first = {"losses": losses.tolist(), "gradients": gradients}
    peak.over = True
    return {"seconds": min(times[1:]), "memory": peak.most - before, **first}


def check_equal(results: dict[str, list[dict]]) -> None:
    """Assert that the first steps agree; the published sum of logarithms rounds in float32."""
    for key, tolerance in (("losses", 5e-4), ("gradients", 1e-4)):
        a, b = (torch.tensor(results[side][0][key]) for side in SIDES)
        difference = (a - b).abs().max()
        assert difference <= tolerance * b.abs().max(), (key, difference, b.abs().max())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=126_689, help="rows of a bank")
    parser.add_argument("--k", type=int, default=16_384, help="negatives")
    parser.add_argument("--batch", type=int, default=128, help="anchors")
    parser.add_argument("--dim", type=int, default=128, help="size of a feature")
    about = "timed steps of a repeat; the fastest counts"
    parser.add_argument("--steps", type=int, default=3, help=about)
    parser.add_argument("--repeats", type=int, default=3, help="of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    about = "aim: times faster than published"
    parser.add_argument("--at-least", type=float, default=6.0, help=about)
    about = "aim: part of the published memory"
    parser.add_argument("--memory-at-most", type=float, default=0.1, help=about)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return 0
    print(
        f"n {args.n}, B {args.batch}, K {args.k}, D {args.dim}; {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    results = {side: [] for side in args.sides}
    flags = [f"--{name}={getattr(args, name)}" for name in FORWARDED]
    for repeat in range(args.repeats):
        for side, own in results.items():
            own.append(in_a_process(__file__, "--side", side, *flags))
            print(f"  repeat {repeat + 1} {side:9} {own[-1]['seconds']:.3f} s a step", flush=True)
    for side, own in results.items():
        seconds = [result["seconds"] for result in own]
        memory = max(result["memory"] for result in own) / 2**20
        print(
            f"{side:9} {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to "
            f"{max(seconds):.3f}), {memory:.0f} MiB beyond the banks"
        )
    if len(results) == 1:
        return 0
    check_equal(results)
    ratio = statistics.median(ratios(results, "published", "ours", "seconds"))
    ours, published = (max(result["memory"] for result in results[side]) for side in SIDES)
    part = ours / published
    print(
        f"equal losses and gradients; {ratio:.1f} times faster, aim {args.at_least}; {part:.3f} of "
        f"the memory, aim {args.memory_at_most}"
    )
    return int(ratio < args.at_least or part > args.memory_at_most)


if __name__ == "__main__":
    sys.exit(main())
