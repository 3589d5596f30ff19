"""The debiased loss, forward and backward: the published form, and debiased/loss.py.

    python benchmarks/debiased_loss.py              # B 256 and 1024, D 128, t .5, tau_plus .1

published     what the published code does at every step, written anew: a mask built picture by
              picture in Python, the negatives picked out of e^s by it, sums, the bound, the
              logarithm of the quotient.
ours          debiased_loss: one product, one exponential in place, the gradient in one more
              product.

Both begin at unit projections that need a gradient and end with it. Sides alternate in one process,
warm before the clock runs; the ratio is that of neighbours, its median must reach --at-least.
Losses and gradients must agree to 1e-4. Ends with 1 if a ratio misses its aim.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.side_by_side import synchronize
from debiased.loss import debiased_loss

T = 0.5
TAU_PLUS = 0.1


def published(z1, z2):
    b = len(z1)
    keep = torch.ones(b, 2 * b, dtype=torch.bool)
    for i in range(b):
        keep[i, i] = False
        keep[i, i + b] = False
    keep = torch.cat((keep, keep)).to(z1.device)
    z = torch.cat((z1, z2))
    negative = torch.exp(z @ z.T / T).masked_select(keep).view(2 * b, -1)
    positive = torch.exp((z1 * z2).sum(1) / T).repeat(2)
    n = 2 * b - 2
    g = ((negative.sum(1) - TAU_PLUS * n * positive) / (1 - TAU_PLUS)).clamp(
        min=n * math.exp(-1 / T)
    )
    return -torch.log(positive / (positive + g)).mean()


def ours(z1, z2):
    return debiased_loss(z1, z2, T, TAU_PLUS)[0]


def timed(loss, z, steps: int) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
    """Return the seconds of one step, the loss, and the gradients."""
    synchronize(z[0].device)
    began = time.perf_counter()
    for _ in range(steps):
        value = loss(*z)
        gradients = torch.autograd.grad(value, z)
    synchronize(z[0].device)
    return (time.perf_counter() - began) / steps, value.detach(), gradients


def compare(b: int, args, device: str) -> bool:
    """Measure both sides at batch b, print them, and return whether the aim is met."""
    generator = torch.Generator().manual_seed(0)
    z = []
    for _ in range(2):
        rows = F.normalize(torch.randn(b, args.dim, generator=generator), dim=1)
        z.append(rows.to(device).requires_grad_())
    seconds = {ours: [], published: []}
    answers = {}
    for repeat in range(-1, args.repeats):
        for side, own in seconds.items():
            took, *answers[side] = timed(side, z, args.steps)
            if repeat >= 0:  # the first is the warm-up
                own.append(took)
    value, gradients = answers[ours]
    their_value, their_gradients = answers[published]
    torch.testing.assert_close(value, their_value, rtol=1e-4, atol=0)
    for own, theirs in zip(gradients, their_gradients):
        assert (own - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    ratios = [theirs / own for own, theirs in zip(seconds[ours], seconds[published])]
    ratio = statistics.median(ratios)
    mine, theirs = (1000 * statistics.median(own) for own in seconds.values())
    print(
        f"B {b:5}: ours {mine:7.2f} ms, published {theirs:7.2f} ms: {ratio:.2f} times faster "
        f"({min(ratios):.2f} to {max(ratios):.2f}), aim {args.at_least}",
        flush=True,
    )
    return ratio >= args.at_least


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "pictures of a step"
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024], help=about)
    parser.add_argument("--dim", type=int, default=128, help="size of a projection")
    parser.add_argument("--steps", type=int, default=5, help="steps of a repeat")
    parser.add_argument("--repeats", type=int, default=15, help="of each side")
    about = "aim: times faster than published"
    parser.add_argument("--at-least", type=float, default=3.0, help=about)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = f"{torch.get_num_threads()} threads"
    print(f"D {args.dim}, {device}, {threads}, torch {torch.__version__}")
    return sum(not compare(b, args, device) for b in args.batches)


if __name__ == "__main__":
    sys.exit(main())
