"""Finding the ring: sorting all scores, as published, and ring/negatives.py.

    python benchmarks/ring_selection.py               # a queue of 65,536, banks, a step of IR
    python benchmarks/ring_selection.py --parts step  # a whole step of IR, ResNet-18 at 32 pixels

queue   one loss over the ring of a queue, forward and backward to the queries. published: what the
        published code does, written anew: all scores, a full sort, ranks [inner, outer), logsumexp.
        ours: `conditional_loss`.
bank    one loss over 4,095 draws from the ring of a memory bank, ours alone, for growing banks.
step    IR with the ring at ResNet-18, 32 pixels (3x3 stem), and the same step with scores that cost
        nothing.

Sides alternate; each repeat is a process of its own, so that its peak memory can be told. "memory"
is what is needed beyond the bank or queue: peak of the process minus what it held before. Both
sides of `queue` must agree in losses and gradients. Ends with 1 if an aim is missed.
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
from common import launch, sets
from ring import negatives, train_ring
from runner.loop import At, Batch

T = 0.07
DIM = 128
OUTER = 0.1
INNER = 0.1
DRAWS = 4095
LENGTHS = (50_000, 126_689, 320_000, 640_000, 1_281_167)
PICTURES = 50_000  # of a step


def published(query, positive, bank):
    """Return the loss over the whole order of all scores, of which a tenth is kept."""
    scores = query @ bank.T / T
    outer = int(OUTER * len(bank))
    ring = scores.sort(dim=1, descending=True).values[:, int(INNER * outer) : outer]
    positive = positive / T
    return (torch.cat([positive[:, None], ring], 1).logsumexp(1) - positive).mean()


def ours(query, positive, bank, count: int = 0, generator=None):
    """Return the loss over the ring, or over `count` draws from it."""
    rule = negatives.Rule("ring", INNER)
    ranks = rule.ranks(OUTER, len(bank), len(query))
    draws = negatives.draw(len(query), count, ranks, generator) if count else None
    comparison = negatives.Comparison(rule, ranks, T, draws)
    return negatives.conditional_loss(query, positive, bank, comparison)


def loss_of(side: str, args) -> dict:
    """Return seconds and memory of a loss and its gradient, the loss and the gradient."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(args.n, DIM, generator=generator), dim=1)
    query = F.normalize(torch.randn(args.batch, DIM, generator=generator), dim=1)
    warm = query[:2].clone().requires_grad_()  # the library's own buffers and threads
    ours(warm, (warm * bank[:2]).sum(1), bank[:1000], 63, generator).backward()
    before = resident()
    times = []
    peak = Peak()
    peak.start()
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        leaf = query.clone().requires_grad_()
        positive = (leaf * bank[: args.batch]).sum(1)
        if side == "published":
            loss = published(leaf, positive, bank)
        else:
            loss = ours(leaf, positive, bank, DRAWS if side == "draws" else 0, generator)
        loss.backward()
        times.append(time.perf_counter() - began)
    peak.over = True
    return {
        "seconds": min(times[1:]),
        "memory": peak.most - before,
        "loss": [loss.item()],
        "gradient": leaf.grad.flatten().tolist(),
    }


def free_loss(query, positive, bank, comparison, observer):
    """Return a loss that looks at no bank, in place of `conditional_loss`."""
    scores = torch.zeros(1, 1)
    rows = torch.zeros(1, 1, dtype=torch.long)
    observer(negatives.Ring(scores, scores, rows, rows), positive.detach(), scores)
    return -positive.mean() / comparison.temperature


class FreeIR(train_ring.IR):
    """IR that draws no negatives."""

    def draws(self, ranks, rows):
        return None


def step_of(side: str, args) -> dict:
    """Return the seconds of a step of IR: with the ring, or with a loss that looks at no bank."""
    flags = "--root x --dataset folder --augmentation mocov2_32x32 --conv3x3 --seed 0 --device cpu"
    parsed = train_ring.parse_args([*flags.split(), "-b", str(args.batch)])
    images = torch.zeros(PICTURES, 3, 32, 32, dtype=torch.uint8)
    targets = [i % 10 for i in range(PICTURES)]
    pictures = sets.ArraySet(images, targets, list("abcdefghij"))
    torch.manual_seed(0)
    kind = train_ring.IR
    if side == "fixed":
        kind = FreeIR
        negatives.conditional_loss = free_loss
    method = kind(parsed, pictures, PICTURES // args.batch, launch.Process())
    views = [torch.randn(args.batch, 3, 32, 32)]
    index = torch.arange(args.batch)
    times = []
    for step in range(args.steps + 1):
        batch = Batch(views, index, index, At(0, 0.0, step))
        began = time.perf_counter()
        method.step(batch)
        times.append(time.perf_counter() - began)
    return {"seconds": min(times[1:]), "memory": 0}


def alone(part: str, side: str, args, n: int) -> dict:
    """Return the result of one repeat in a process of its own."""
    flags = [f"--n={n}", f"--batch={args.batch}", f"--steps={args.steps}"]
    return in_a_process(__file__, *flags, "--part", part, "--side", side)


def compare(part: str, sides: tuple[str, str], args, n: int) -> dict[str, list[dict]]:
    """Return the repeats of both sides, taken in turn."""
    results = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side in sides:
            results[side].append(alone(part, side, args, n))
    for side, own in results.items():
        seconds = [result["seconds"] for result in own]
        memory = max(result["memory"] for result in own) / 2**20
        print(
            f"  {side:9} {statistics.median(seconds):.3f} s ({min(seconds):.3f} to "
            f"{max(seconds):.3f}), {memory:.0f} MiB",
            flush=True,
        )
    return results


def measure_queue(args) -> bool:
    """Compare both sides of `queue`; return whether the aims are met."""
    print(f"queue of {args.n}, forward and backward")
    results = compare("queue", ("ours", "published"), args, args.n)
    for key in ("loss", "gradient"):
        a, b = (torch.tensor(own[0][key]) for own in results.values())
        difference = (a - b).abs().max()
        assert difference <= 5e-4 * b.abs().max(), (key, difference, b.abs().max())
    ratio = statistics.median(ratios(results, "published", "ours", "seconds"))
    memory = max(result["memory"] for result in results["ours"]) / 2**20
    aims = f"aims {args.at_least} and at most {args.memory_at_most}"
    print(f"  equal losses and gradients; {ratio:.1f} times faster, {memory:.0f} MiB; {aims}")
    return ratio >= args.at_least and memory <= args.memory_at_most


def measure_banks(args) -> bool:
    """Measure banks of all lengths; return whether the aim is met."""
    print(f"bank, {DRAWS:,} draws from the ring, forward and backward")
    is_met = True
    for n in args.lengths:
        result = alone("bank", "draws", args, n)
        memory = result["memory"] / 2**20
        size = n * DIM * 4 / 2**20
        text = f"{result['seconds']:.3f} s  {memory:.0f} MiB beside the bank of {size:.0f}"
        print(f"  n {n:9,}  {text}", flush=True)
        is_met = is_met and memory <= args.memory_at_most
    return is_met


def measure_step(args) -> bool:
    """Compare both sides of `step`; return whether the aim is met."""
    print(f"a step of IR with the ring, n {PICTURES:,}, ResNet-18 at 32 pixels")
    results = compare("step", ("ring", "fixed"), args, args.n)
    ratio = statistics.median(ratios(results, "fixed", "ring", "seconds"))
    print(f"  {ratio:.3f} of the speed with fixed scores, aim {args.step_at_least}")
    return ratio >= args.step_at_least


PARTS = {"queue": measure_queue, "bank": measure_banks, "step": measure_step}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--n", type=int, default=65_536, help="length of the queue")
    about = "lengths of the bank"
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help=about)
    parser.add_argument("--batch", type=int, default=256, help="anchors")
    about = "timed steps of a repeat; the fastest counts"
    parser.add_argument("--steps", type=int, default=3, help=about)
    parser.add_argument("--repeats", type=int, default=3, help="of each side")
    about = "aim of queue: times faster than a full sort"
    parser.add_argument("--at-least", type=float, default=3.0, help=about)
    about = "aim: MiB beside the bank or queue"
    parser.add_argument("--memory-at-most", type=float, default=64, help=about)
    about = "aim of step: of the speed with fixed scores"
    parser.add_argument("--step-at-least", type=float, default=0.9, help=about)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.side:
        measure = step_of if args.part == "step" else loss_of
        print(json.dumps(measure(args.side, args)))
        return 0
    print(
        f"B {args.batch}, D {DIM}, outer {OUTER}, inner {INNER}; {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )
    missed = [part for part in PARTS if part in args.parts and not PARTS[part](args)]
    print(f"missed: {', '.join(missed)}" if missed else "all aims met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
