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

from debiased.loss import debiased_loss

T, TAU_PLUS = 0.5, 0.1


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
    """(seconds of one step, the loss, the gradients)."""
    if z[0].is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        value = loss(*z)
        gradients = torch.autograd.grad(value, z)
    if z[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps, value.detach(), gradients


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="steps of a repeat")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--at-least", type=float, default=3.0, help="aim: times faster than published"
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"D {args.dim}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    missed = 0
    for b in args.batches:
        generator = torch.Generator().manual_seed(0)
        z = [
            F.normalize(torch.randn(b, args.dim, generator=generator), dim=1).to(device)
            for _ in range(2)
        ]
        z = [x.requires_grad_() for x in z]
        seconds, answers = {ours: [], published: []}, {}
        for repeat in range(-1, args.repeats):
            for side, found in seconds.items():
                took, *answers[side] = timed(side, z, args.steps)
                found += [took] * (repeat >= 0)
        (a, a_grads), (p, p_grads) = answers[ours], answers[published]
        torch.testing.assert_close(a, p, rtol=1e-4, atol=0)
        for x, y in zip(a_grads, p_grads):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()
        ratios = [y / x for x, y in zip(seconds[ours], seconds[published])]
        ratio = statistics.median(ratios)
        mine, theirs = (1000 * statistics.median(found) for found in seconds.values())
        print(
            f"B {b:5}: ours {mine:7.2f} ms, published {theirs:7.2f} ms: {ratio:.2f} times faster "
            f"({min(ratios):.2f} to {max(ratios):.2f}), aim {args.at_least}",
            flush=True,
        )
        missed += ratio < args.at_least
    return missed


if __name__ == "__main__":
    sys.exit(main())
