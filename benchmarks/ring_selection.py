"""Finding the ring: sorting all scores, as published, and ring/negatives.py.

    python benchmarks/ring_selection.py               # MoCo: B 256, K 65,536; then IR with N from 50,000 to 1.28 million
    python benchmarks/ring_selection.py --parts step  # a whole step of IR with the ring, ResNet-18 at 32 pixels

queue   one loss over the ring of a queue, forward and backward to the queries. published: what the published code does,
        written anew: all scores, a full sort, ranks [inner, outer), logsumexp. ours: `conditional_loss`.
bank    one loss over 4,095 draws from the ring of a memory bank, ours alone, for banks of growing length.
step    IR with the ring at ResNet-18, 32 pixels (3x3 stem), and the same step with scores that cost nothing.

Sides alternate; each repeat is a process of its own, so that its peak memory can be told. "memory" is what is needed beyond
the bank or queue: peak of the process minus what it held before. Both sides of `queue` must agree in losses and gradients.
Ends with 1 if an aim is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from nce_step import Peak, resident

T, DIM, OUTER, INNER = 0.07, 128, 0.1, 0.1
LENGTHS = (50_000, 126_689, 320_000, 640_000, 1_281_167)


def published(query, positive, bank):
    """The whole order of all scores, of which a tenth is kept."""
    scores = query @ bank.T / T
    outer = int(OUTER * len(bank))
    ring = scores.sort(dim=1, descending=True).values[:, int(INNER * outer) : outer]
    positive = positive / T
    return (torch.cat([positive[:, None], ring], 1).logsumexp(1) - positive).mean()


def ours(query, positive, bank, k=None, generator=None):
    from ring import negatives

    rule = negatives.Rule("ring", INNER)
    ranks = rule.ranks(OUTER, len(bank), len(query))
    draws = negatives.draw(len(query), k - 1, ranks, generator) if k else None
    comparison = negatives.Comparison(rule, ranks, T, draws)
    return negatives.conditional_loss(query, positive, bank, comparison)


def loss_of(side: str, args) -> dict:
    """Seconds and memory of a loss and its gradient; the loss and some of the gradient, to be compared."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(args.n, DIM, generator=generator), dim=1)
    query = F.normalize(torch.randn(args.batch, DIM, generator=generator), dim=1)
    warm = query[:2].clone().requires_grad_()  # the library's own buffers and threads, on a small bank
    ours(warm, (warm * bank[:2]).sum(1), bank[:1000], 64, generator).backward()
    before, times = resident(), []
    peak = Peak()
    peak.start()
    for _ in range(args.steps + 1):
        began, leaf = time.perf_counter(), query.clone().requires_grad_()
        positive = (leaf * bank[: args.batch]).sum(1)
        if side == "published":
            loss = published(leaf, positive, bank)
        else:
            loss = ours(leaf, positive, bank, 4096 if side == "draws" else None, generator)
        loss.backward()
        times.append(time.perf_counter() - began)
    peak.over = True
    values = {"loss": [loss.item()], "gradient": leaf.grad.flatten().tolist()}
    return {"seconds": min(times[1:]), "memory": peak.most - before, **values}


def step_of(side: str, args) -> dict:
    """Seconds of a step of IR: with the ring, or with a loss that looks at no bank."""
    from common import launch, sets
    from ring import negatives, train_ring
    from runner import loop

    small = f"--root x --dataset folder --augmentation mocov2_32x32 --conv3x3 -b {args.batch} --seed 0 --device cpu"
    flags = train_ring.parse_args(small.split())
    pictures = sets.ArraySet(
        torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8), [i % 10 for i in range(50_000)], list("abcdefghij")
    )
    torch.manual_seed(0)
    method = train_ring.IR(flags, pictures, 195, launch.Process())
    if side == "fixed":

        def fixed(query, positive, bank, comparison, observer):
            score, row = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long)
            observer(negatives.Ring(score, score, row, row), positive, score)
            return -positive.mean() / comparison.temperature

        negatives.conditional_loss = fixed
        method.draws = lambda *_: None
    images, index = torch.randn(args.batch, 3, 32, 32), torch.arange(args.batch)
    times = []
    for step in range(args.steps + 1):
        began = time.perf_counter()
        batch = loop.Batch([images], index % 10, index, loop.At(0, 0.0, step))
        method.step(batch)
        times.append(time.perf_counter() - began)
    return {"seconds": min(times[1:]), "memory": 0}


def alone(part: str, side: str, args, n: int) -> dict:
    """One repeat in a process of its own."""
    flags = [f"--n={n}", f"--batch={args.batch}", f"--steps={args.steps}", "--part", part, "--side", side]
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(part: str, sides: tuple[str, str], args, n: int) -> dict:
    """Both sides in turn: {side: its repeats}."""
    found = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side in sides:
            found[side].append(alone(part, side, args, n))
    for side, runs in found.items():
        seconds = [r["seconds"] for r in runs]
        print(
            f"  {side:9} {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), "
            f"{max(r['memory'] for r in runs) / 2**20:.0f} MiB",
            flush=True,
        )
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["queue", "bank", "step"], default=["queue", "bank", "step"])
    parser.add_argument("--n", type=int, default=65_536, help="length of the queue")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="lengths of the bank")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a repeat; the fastest counts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-least", type=float, default=3.0, help="aim of queue: times faster than a full sort")
    parser.add_argument("--memory-at-most", type=float, default=64, help="aim: MiB beside the bank or queue")
    parser.add_argument("--step-at-least", type=float, default=0.9, help="aim of step: of the speed with fixed scores")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps((step_of if args.part == "step" else loss_of)(args.side, args)))
        return 0
    print(
        f"B {args.batch}, D {DIM}, outer {OUTER}, inner {INNER}; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    missed = []
    if "queue" in args.parts:
        print(f"queue of {args.n}, forward and backward")
        found = compare("queue", ("ours", "published"), args, args.n)
        for key in ("loss", "gradient"):
            a, b = (torch.tensor(found[side][0][key]) for side in ("ours", "published"))
            assert (a - b).abs().max() <= 5e-4 * b.abs().max(), (key, (a - b).abs().max(), b.abs().max())
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found["published"]))
        memory = max(r["memory"] for r in found["ours"]) / 2**20
        aims = f"aims {args.at_least} and at most {args.memory_at_most}"
        print(f"  equal losses and gradients; {ratio:.1f} times faster, {memory:.0f} MiB; {aims}")
        missed += ["queue"] * (ratio < args.at_least or memory > args.memory_at_most)
    if "bank" in args.parts:
        print("bank, 4,095 draws from the ring, forward and backward")
        for n in args.lengths:
            run = alone("bank", "draws", args, n)
            memory = run["memory"] / 2**20
            print(
                f"  n {n:9,}  {run['seconds']:.3f} s  {memory:.0f} MiB beside the bank of {n * DIM * 4 / 2**20:.0f}",
                flush=True,
            )
            missed += ["bank"] * (memory > args.memory_at_most)
    if "step" in args.parts:
        print("a step of IR with the ring, n 50,000, ResNet-18 at 32 pixels")
        found = compare("step", ("ring", "fixed"), args, args.n)
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found["ring"], found["fixed"]))
        print(f"  {ratio:.3f} of the speed with fixed scores, aim {args.step_at_least}")
        missed += ["step"] * (ratio < args.step_at_least)
    print("all aims met" if not missed else f"missed: {', '.join(sorted(set(missed)))}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
