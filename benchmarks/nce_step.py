"""One NCE step over two memory banks: the published way of taking scores, and cmc/contrast.py.

    python benchmarks/nce_step.py                  # n = 126,689 (ImageNet-100), B 128, K 16,384, D 128
    python benchmarks/nce_step.py --n 1281167 --sides ours

A step is: draw the negatives, both directions, NCE loss, backward to the features, update of both banks.
published     what the published code does, written anew: gathers B x (K+1) x D bank rows for each direction, one batched
              product, exp, Z, the loss term by term; banks updated before the backward pass.
ours          the losses and banks of cmc/contrast.py.

Sides alternate; each repeat is a process of its own, so that its peak memory can be told. "memory" is what a step needs
beyond the banks: peak of the process minus what it held before the first step. The first step of both sides has the same
banks, features and draws, and must agree: every number of the gradients to 1e-4 of the largest, losses to what float32
leaves of the published sum.
Ends with 1 if a ratio misses its aim.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

T, MOMENTUM = 0.07, 0.5
SIDES = ("ours", "published")


class Published:
    """Scores by gathering rows; `z` is fixed by the first batch."""

    def __init__(self, banks, n, k):
        self.banks, self.n, self.k, self.z = banks, n, k, [None, None]

    def step(self, feats, index, rows):
        outs = []
        for i, feat in enumerate(feats):
            other = self.banks[1 - i]
            fetched = other.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)
            outs.append(torch.exp(torch.bmm(fetched, feat.unsqueeze(2)) / T))
        losses = []
        for i, out in enumerate(outs):
            if self.z[i] is None:
                self.z[i] = out.detach().mean() * self.n
            out = (out / self.z[i]).squeeze(2)
            noise = self.k / self.n
            positive, negative = out[:, 0], out[:, 1:]
            data = torch.log(positive / (positive + noise + 1e-7))
            background = torch.log(torch.full_like(negative, noise) / (negative + noise + 1e-7))
            losses.append(-(data.sum() + background.sum()) / len(out))
        with torch.no_grad():
            for bank, feat in zip(self.banks, feats):
                bank.index_copy_(0, index, F.normalize(MOMENTUM * bank[index] + (1 - MOMENTUM) * feat, dim=1))
        sum(losses).backward()
        return torch.stack([loss.detach() for loss in losses])


class Ours:
    def __init__(self, banks, n, k):
        from cmc.contrast import MemoryBanks

        self.memory = MemoryBanks(1, banks[0].shape[1], ("l", "ab"), k, T, MOMENTUM, False, "oneshot")
        self.memory.n, self.memory.memory_l, self.memory.memory_ab = n, *banks

    def step(self, feats, index, rows):
        losses, _ = self.memory(feats, rows)
        losses.sum().backward()
        self.memory.update(feats, index)
        return losses.detach()


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """The largest `resident()` seen, looked at every two milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = resident(), False

    def run(self):
        while not self.over:
            self.most = max(self.most, resident())
            time.sleep(0.002)


def measure(side: str, args) -> dict:
    from common.memory import draw_rows

    generator = torch.Generator().manual_seed(0)
    banks = [F.normalize(torch.randn(args.n, args.dim, generator=generator), dim=1) for _ in range(2)]
    memory = (Published if side == "published" else Ours)(banks, args.n, args.k)
    feats = [F.normalize(torch.randn(args.batch, args.dim, generator=generator), dim=1) for _ in range(2)]
    before = resident()
    peak = Peak()
    peak.start()
    times = []
    for repeat in range(args.steps + 1):
        began = time.perf_counter()
        step_feats = [f.clone().requires_grad_() for f in feats]
        index = torch.arange(repeat * args.batch, (repeat + 1) * args.batch)
        losses = memory.step(step_feats, index, draw_rows(index, args.n, args.k, generator))
        times.append(time.perf_counter() - began)
        if repeat == 0:
            checked = {"losses": losses.tolist(), "gradients": [f.grad.flatten().tolist() for f in step_feats]}
    peak.over = True
    return {"seconds": min(times[1:]), "memory": peak.most - before, **checked}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=126_689, help="rows of a bank")
    parser.add_argument("--k", type=int, default=16_384, help="negatives")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a repeat; the fastest counts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--at-least", type=float, default=6.0, help="aim: times faster than published")
    parser.add_argument("--memory-at-most", type=float, default=0.1, help="aim: part of the published memory")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return 0
    print(
        f"n {args.n}, B {args.batch}, K {args.k}, D {args.dim}; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    found = {side: [] for side in args.sides}
    for repeat in range(args.repeats):
        for side in found:
            flags = [f"--{name}={getattr(args, name)}" for name in ("n", "k", "batch", "dim", "steps")]
            out = subprocess.run(
                [sys.executable, __file__, "--side", side, *flags], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            found[side].append(json.loads(out.strip().splitlines()[-1]))
            print(f"  repeat {repeat + 1} {side:9} {found[side][-1]['seconds']:.3f} s a step", flush=True)
    for side, runs in found.items():
        seconds = [r["seconds"] for r in runs]
        print(
            f"{side:9} {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}), "
            f"{max(r['memory'] for r in runs) / 2**20:.0f} MiB beyond the banks"
        )
    if len(found) == 1:
        return 0
    for key, rtol in (("losses", 5e-4), ("gradients", 1e-4)):  # the published sum of log(c / (P + c)) rounds in float32
        a, b = (torch.tensor(found[side][0][key]) for side in SIDES)
        assert (a - b).abs().max() <= rtol * b.abs().max(), (key, (a - b).abs().max(), b.abs().max())
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found["published"]))
    part = max(r["memory"] for r in found["ours"]) / max(r["memory"] for r in found["published"])
    print(
        f"equal losses and gradients; {ratio:.1f} times faster, aim {args.at_least}; {part:.3f} of the memory, "
        f"aim {args.memory_at_most}"
    )
    return int(ratio < args.at_least or part > args.memory_at_most)


if __name__ == "__main__":
    sys.exit(main())
