"""Measure the time that transformed features and saved scores add to a step of MoCo.

    python benchmarks/feature_transform.py     # ResNet-18 at 32 pixels, batch 256, K 16,384

plain         MoCo-v2 without a transformation: the other sides are compared with it.
scalar        positives extrapolated and negatives interpolated, one coefficient each.
element       the same with a coefficient for each of K x 128 and of B x 128 numbers.
scores        plain, and the five statistics of the scores (--save_score).
published     element, but as the published code has it, written anew: both Beta draws are made by
              NumPy and moved to the device, as often as there (each twice, of which the first is
              thrown away), and the five statistics of the scores are copied to the host one by one
              at every step.

One process has a network for each side and takes steps in turn, on the same fixed views: no views
are made, so that a step is short and a share of it large. The cost of a side is the median over
steps of its time beyond the plain step just before it, as a share of the median plain step. Ends
with what the memories hold at --memory-k. The exit code is 1 if an aim is missed.
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

from benchmarks.side_by_side import WARM, peak, synchronize
from common import launch
from feature_transform import main_contrast
from feature_transform.memory import KeyQueue
from feature_transform.transform import Draws, Rule
from runner.loop import At, Batch

SIDES = {
    "plain": "",
    "scalar": "--preset ft",
    "element": "--preset ft --dim_mask both",
    "scores": "--save_score",
    "published": "--preset ft --dim_mask both --save_score",
}


class PublishedRule(Rule):
    """Draw coefficients by NumPy, twice as often as they are used."""

    def draw(self, pairs: int, dim: int, candidates: int, generator: torch.Generator) -> Draws:
        def mask(rows: int, alpha: float) -> torch.Tensor:
            beta = np.random.beta(alpha, alpha, (rows, dim))
            return torch.from_numpy(beta).float().to(generator.device)

        for _ in range(2):
            positive = mask(pairs, self.pos_alpha) + 1
            negative = mask(candidates, self.neg_alpha)
        order = torch.randperm(candidates, device=generator.device)
        return Draws(positive, negative, order)


def published_statistics(logits, temperature: float) -> torch.Tensor:
    """Return five columns of statistics, on the host, to which each is copied alone."""
    positive = logits[0][:, 0]
    negative = logits[0][:, 1:]
    scores = negative * temperature
    columns = (
        scores.mean(1),
        scores.var(1),
        positive * temperature,
        negative.exp().mean(1),
        positive.exp(),
    )
    return torch.from_numpy(np.stack([column.cpu().numpy() for column in columns], 1))


def make(side: str, args, process: launch.Process):
    """Return the method of one side."""
    flags = (
        "--data_folder none --method MoCov2 --arch resnet18 --input_res 32 --seed 0 "
        f"-b {args.batch} -k {args.k} --bn-splits {args.bn_splits} {SIDES[side]}"
    )
    parsed = main_contrast.parse_args(flags.split())
    torch.manual_seed(0)
    method = main_contrast.MoCo(parsed, args.k, process)
    if side == "published":
        method.rule = PublishedRule(**vars(method.rule))
        method.statistics = lambda logits: published_statistics(logits, parsed.nce_t)
    return method


def timed(method, batch: Batch, clock) -> float:
    """Return the seconds of a step."""
    began = clock()
    method.step(batch)
    synchronize(batch.index.device)
    return clock() - began


def print_memory(k: int, dim: int = 128) -> None:
    """Print what the memory and the draws of a step hold."""
    query, key = (F.normalize(torch.randn(2, dim), dim=1) for _ in range(2))
    for shape in ("scalar", "element"):
        queue = KeyQueue(1, k, dim, 0.2)
        rule = Rule(shape, shape)
        draws = queue.draw(rule, 2, torch.Generator())
        queue([query], key, rule, draws)
        tensors = {
            "queue": queue.memory,
            "transformed queue": queue.scratch[0],
            "its coefficients": draws[0].negative,
            "permutation": draws[0].order,
        }
        sizes = [
            f"{name} {tensor.numel() * tensor.element_size() / 2**20:.1f} MiB"
            for name, tensor in tensors.items()
        ]
        print(f"memory at K {k}, {shape}: {', '.join(sizes)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step")
    parser.add_argument("--k", type=int, default=16_384, help="keys in the queue")
    about = "batch-norm groups; 1 is the shortest step"
    parser.add_argument("--bn-splits", type=int, default=1, help=about)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side")
    about = "processor: time of all threads, for a machine that others use"
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help=about)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory-k", type=int, default=65_536, help="K of the sizes at the end")
    about = "aim: share of a plain step, scalar and element"
    parser.add_argument("--ft-at-most", type=float, default=0.1, help=about)
    about = "aim: share of a plain step"
    parser.add_argument("--scores-at-most", type=float, default=0.02, help=about)
    return parser.parse_args(argv)


def measure(args, device: torch.device) -> tuple[list[float], dict[str, list[float]]]:
    """Return the seconds of plain steps, and of every other side those beyond the plain step."""
    process = launch.Process(device=device)
    methods = {side: make(side, args, process) for side in dict.fromkeys(["plain", *args.sides])}
    generator = torch.Generator().manual_seed(0)
    views = list(torch.randn(2, args.batch, 3, 32, 32, generator=generator).to(device))
    index = torch.arange(args.batch, device=device)
    batch = Batch(views, index, index, At(0, 0.0, 0))
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    plain = []
    beyond = {side: [] for side in methods if side != "plain"}
    for step in range(WARM + args.steps):
        for side, seconds in beyond.items():
            base = timed(methods["plain"], batch, clock)
            more = timed(methods[side], batch, clock) - base
            if step >= WARM:
                plain.append(base)
                seconds.append(more)
    return plain, beyond


def main(argv=None) -> int:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch "
        f"{args.batch}, K {args.k}, {args.steps} steps of each side, {args.clock} clock",
        flush=True,
    )
    plain, beyond = measure(args, device)
    whole = statistics.median(plain)
    low, high = 1000 * min(plain), 1000 * max(plain)
    print(f"plain     {1000 * whole:8.1f} ms a step ({low:.1f} to {high:.1f})")
    aims = {
        "scalar": args.ft_at_most,
        "element": args.ft_at_most,
        "scores": args.scores_at_most,
    }
    missed = False
    for side, seconds in beyond.items():
        middle = statistics.median(seconds)
        quarters = [middle] * 3
        if len(seconds) > 1:
            quarters = statistics.quantiles(seconds, n=4)
        cost, low, high = (x / whole for x in (middle, quarters[0], quarters[2]))
        aim = f", aim under {aims[side]:.0%}" if side in aims else ""
        print(
            f"{side:9} {1000 * middle:+8.1f} ms: {cost:+.1%} of a step "
            f"(middle half {low:+.1%} to {high:+.1%}){aim}"
        )
        missed = missed or (side in aims and cost > aims[side])
    print_memory(args.memory_k)
    print(f"peak memory of this process {peak():.0f} MiB")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
