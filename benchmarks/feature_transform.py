"""What transformed features and saved scores add to a MoCo step: main_contrast.py, and the published way.

    python benchmarks/feature_transform.py             # ResNet-18 at 32 pixels, batch 256, K 16,384, on this CPU or GPU

plain         MoCo-v2 without a transformation: the other sides are compared with it.
scalar        positives extrapolated and negatives interpolated, one coefficient each (the published command).
element       the same with a coefficient for each of K x 128 and of B x 128 numbers.
scores        plain, and the five statistics of the scores (--save_score).
published     element, but as the published code has it, written anew: both Beta draws made by NumPy and moved to the device, as
              often as there (each twice, of which the first is thrown away), and the five statistics of the scores copied to
              the host one by one at every step.

One process has a network for each side and takes steps in turn, on the same fixed views: no views are made, so that a step is
short and a share of it large. The cost of a side is the median over steps of its time beyond the plain step just before it, as
a share of the median plain step. Ends with what the memories hold at --memory-k. Ends with 1 if an aim is missed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.side_by_side import WARM, peak
from common import launch
from feature_transform import main_contrast
from feature_transform.memory import KeyQueue
from feature_transform.transform import Draws, Rule

FT = "--preset ft"
SIDES = {
    "plain": "", "scalar": FT, "element": f"{FT} --dim_mask both", "scores": "--save_score",
    "published": f"{FT} --dim_mask both --save_score",
}  # fmt: skip


class PublishedRule(Rule):
    def draw(self, b, dim, candidates, generator) -> Draws:
        def mask(rows: int, alpha: float):
            return torch.from_numpy(np.random.beta(alpha, alpha, (rows, dim))).float().to(generator.device)

        for _ in range(2):
            positive, negative = mask(b, self.pos_alpha) + 1, mask(candidates, self.neg_alpha)
        return Draws(positive, negative, torch.randperm(candidates, device=generator.device))


def published_statistics(logits, temperature: float):
    """Five columns, one copy each, on the host."""
    positive, negative = logits[0][:, 0], logits[0][:, 1:]
    scores = negative * temperature
    columns = scores.mean(1), scores.var(1), positive * temperature, negative.exp().mean(1), positive.exp()
    return torch.from_numpy(np.stack([column.cpu().numpy() for column in columns], 1))


def make(side: str, args, process):
    flags = f"--data_folder none --method MoCov2 --arch resnet18 --input_res 32 -b {args.batch} -k {args.k} --seed 0"
    parsed = main_contrast.parse_args([*flags.split(), "--bn-splits", str(args.bn_splits), *SIDES[side].split()])
    torch.manual_seed(0)
    method = main_contrast.MoCo(parsed, args.k, process)
    if side == "published":
        method.rule = PublishedRule(**vars(method.rule))
        method.statistics = lambda logits: published_statistics(logits, parsed.nce_t)
    return method


def timed(method, views, index, clock) -> float:
    began = clock()
    method.step(views, index, 1)
    if index.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def memory_at(k: int, dim: int = 128) -> None:
    """What the memory and the draws of a step hold."""
    query, key = (F.normalize(torch.randn(2, dim), dim=1) for _ in range(2))
    for shape in ("scalar", "element"):
        queue, rule = KeyQueue(1, k, dim, 0.2), Rule(shape, shape)
        draws = queue.draw(rule, 2, torch.Generator())
        queue([query], key, rule, draws)
        sizes = {"queue": queue.memory, "transformed queue": queue.scratch[0]}
        sizes |= {"its coefficients": draws[0].negative, "permutation": draws[0].order}
        held = ", ".join(f"{name} {x.numel() * x.element_size() / 2**20:.1f} MiB" for name, x in sizes.items())
        print(f"memory at K {k}, {shape}: {held}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--k", type=int, default=16_384)
    parser.add_argument("--bn-splits", type=int, default=1, help="batch-norm groups; 1 is the shortest step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side")
    about = "processor: time of all threads, for a machine that others use"
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help=about)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory-k", type=int, default=65_536)
    parser.add_argument("--ft-at-most", type=float, default=0.1, help="aim: share of a plain step, scalar and element")
    parser.add_argument("--scores-at-most", type=float, default=0.02, help="aim: share of a plain step")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = launch.Process(device=device)
    methods = {side: make(side, args, process) for side in dict.fromkeys(["plain", *args.sides])}
    views = list(torch.randn(2, args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device))
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    index, others = torch.arange(args.batch, device=device), [side for side in methods if side != "plain"]
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {args.batch}, K {args.k}, "
        f"{args.steps} steps of each side, {args.clock} clock",
        flush=True,
    )
    plain, beyond = [], {side: [] for side in others}
    for step in range(WARM + args.steps):
        for side in others:
            base = timed(methods["plain"], views, index, clock)
            more = timed(methods[side], views, index, clock) - base
            if step >= WARM:
                plain.append(base)
                beyond[side].append(more)
    whole, missed = statistics.median(plain), 0
    print(f"plain     {whole * 1e3:8.1f} ms a step ({min(plain) * 1e3:.1f} to {max(plain) * 1e3:.1f})")
    aims = {"scalar": args.ft_at_most, "element": args.ft_at_most, "scores": args.scores_at_most}
    for side, found in beyond.items():
        quarters = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        cost, low, high = (x / whole for x in (statistics.median(found), quarters[0], quarters[2]))
        aim = f", aim under {aims[side]:.0%}" if side in aims else ""
        print(
            f"{side:9} {statistics.median(found) * 1e3:+8.1f} ms: {cost:+.1%} of a step "
            f"(middle half {low:+.1%} to {high:+.1%}){aim}"
        )
        missed |= side in aims and cost > aims[side]
    memory_at(args.memory_k)
    print(f"peak memory of this process {peak():.0f} MiB")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
