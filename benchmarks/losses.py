"""Every loss of the package `negatives`, forward and backward, beside what people use today.

    python benchmarks/losses.py                     # B 256, D 128, memories of 65,536 rows
    python benchmarks/losses.py --groups debiased   # one of them
    python benchmarks/losses.py --batch 16 --k 512 --dim 16 --steps 1 --repeats 1  # do all run?

ours       the file that the scripts call.
published  what the published code does, written anew: copies of the queue, a full sort, gathered
           bank rows, coefficients of NumPy, a mask built in Python.
lightly    NTXentLoss with its own memory bank, or without one.
metric     pytorch-metric-learning: NTXentLoss, in CrossBatchMemory where there is a memory, called
           as in its MoCo example. At B 256 and K 65,536 that would hold 256 x 256 x 65,535 numbers
           (17 GB) several times, so that it is compared at B 64 and K 4,096 (small queue).

A step begins at unit features that need a gradient, ends with it, and writes the memory. Sides
alternate; each repeat is a process of its own, so that its peak memory can be told: what a step
needs beyond the memory and what the process held before. Losses and gradients of ours and of
published must agree where no draw is different. Ends with 1 if ours is slower than any other side.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.side_by_side import Peak, in_a_process, ratios, resident
from common.memory import MemoryBank, Queue, draw_rows
from common.nce import NCE, info_nce
from debiased.loss import debiased_loss
from feature_transform.transform import Rule, negatives, pair
from nonsem_neg.negatives import contrast_logits
from ring.negatives import ring_loss

T = 0.2
OUTER = INNER = 0.1  # of the ring
DRAWS = 4096  # from the bank
TAU_PLUS = 0.1
SEED = 0


class Given:
    """Hold the inputs of a step: unit queries and keys (B, D), a memory (K, D), a generator."""

    def __init__(self, args):
        self.generator = torch.Generator().manual_seed(SEED)
        self.query = self.unit(args.batch, args.dim).requires_grad_()
        self.key = self.unit(args.batch, args.dim)
        self.nonsem = self.unit(args.batch, 1, args.dim)
        self.index = torch.arange(args.batch)
        self.queue = Queue(args.k, args.dim)
        self.queue.queue.copy_(self.unit(args.k, args.dim))
        self.columns = self.queue.queue.T.contiguous()  # as most published code has it
        self.bank = MemoryBank(args.k, args.dim)
        self.bank.memory = self.queue.queue
        self.write = lambda: None  # what is written to the memory after the backward pass

    def enqueue(self) -> None:
        self.queue.enqueue(self.key)

    def update(self) -> None:
        self.bank.update(self.query, self.index)

    def unit(self, *shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=self.generator), dim=-1)

    def published_logits(self, *more: torch.Tensor) -> torch.Tensor:
        """Return logits against a copy of the columns, after which the keys are written."""
        positive = torch.einsum("nc,nc->n", self.query, self.key)[:, None]
        negative = torch.einsum("nc,ck->nk", self.query, self.columns.clone())
        logits = torch.cat([positive, negative, *more], 1) / T
        self.columns[:, : len(self.key)] = self.key.T
        return logits


def queue(given: Given):
    given.write = given.enqueue
    return info_nce(given.queue.logits(given.query, given.key, T))


def nonsemantic(given: Given):
    given.write = given.enqueue
    memory = given.queue.queue
    return info_nce(contrast_logits(given.query, given.key, memory, given.nonsem, T, alpha=2.0))


def published_nonsemantic(given: Given):
    more = 2.0 * torch.einsum("nc,nmc->nm", given.query, given.nonsem)
    return info_nce(given.published_logits(more))


def ring(given: Given):
    memory = given.queue.queue
    return ring_loss(given.query, given.key, memory, outer=OUTER, inner=INNER, temperature=T)


def published_ring(given: Given):
    scores = given.query @ given.queue.queue.T / T
    outer = int(OUTER * scores.shape[1])
    kept = scores.sort(dim=1, descending=True).values[:, int(INNER * outer) : outer]
    positive = (given.query * given.key).sum(1, keepdim=True) / T
    return (torch.cat([positive, kept], 1).logsumexp(1) - positive[:, 0]).mean()


def transform(given: Given):
    rows = given.queue.queue
    rule = given.__dict__.setdefault("rule", Rule("element", "element"))
    draws = rule.draw(len(given.query), rows.shape[1], len(rows), given.generator)
    query, key = pair(given.query, given.key, draws.positive)
    mixed = negatives(rows, draws.negative, draws.order)
    return info_nce(torch.cat([(query * key).sum(1, keepdim=True), query @ mixed.T], 1) / T)


def published_transform(given: Given):
    rows = given.queue.queue.clone()
    shapes = (given.query.shape, rows.shape)
    m, n = (torch.from_numpy(np.random.beta(a, a, s)).float() for a, s in zip((2, 1.6), shapes))
    m = m + 1
    query = m * given.query + (1 - m) * given.key
    key = m * given.key + (1 - m) * given.query
    mixed = n * rows + (1 - n) * rows[torch.randperm(len(rows))]
    return info_nce(torch.cat([(query * key).sum(1, keepdim=True), query @ mixed.T], 1) / T)


def nce(given: Given):
    criterion = given.__dict__.setdefault("nce", NCE(len(given.bank.memory), "oneshot"))
    rows = draw_rows(given.index, len(given.bank.memory), DRAWS, given.generator)
    given.write = given.update
    return criterion(given.bank.logits(given.query, rows, T))[0]


def published_nce(given: Given):
    bank = given.bank.memory
    rows = draw_rows(given.index, len(bank), DRAWS, given.generator)
    fetched = bank.index_select(0, rows.view(-1)).view(*rows.shape, -1)
    out = torch.exp(torch.bmm(fetched, given.query.unsqueeze(2)) / T).squeeze(2)
    z = given.__dict__.setdefault("z", out.detach().mean() * len(bank))
    noise = DRAWS / len(bank)
    p = out / z
    own = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
    given.write = given.update
    return -(own.sum() + (noise / (p[:, 1:] + noise + 1e-7)).log().sum()) / len(rows)


def debiased(given: Given):
    return debiased_loss(given.query, given.key, 0.5, TAU_PLUS)[0]


def published_debiased(given: Given):
    b = len(given.query)
    keep = torch.ones(b, 2 * b, dtype=torch.bool)
    for i in range(b):
        keep[i, i] = False
        keep[i, i + b] = False
    z = torch.cat((given.query, given.key))
    negative = torch.exp(z @ z.T / 0.5).masked_select(torch.cat((keep, keep))).view(2 * b, -1)
    positive = torch.exp((given.query * given.key).sum(1) / 0.5).repeat(2)
    n = 2 * b - 2
    g = (negative.sum(1) - TAU_PLUS * n * positive) / (1 - TAU_PLUS)
    return -torch.log(positive / (positive + g.clamp(min=n * math.exp(-2)))).mean()


def lightly(given: Given, size: int | None = None):
    if "lightly" not in vars(given):
        make_lightly(given, len(given.queue.queue) if size is None else size)
    return given.lightly(given.query, given.key)


def make_lightly(given: Given, size: int) -> None:
    """Build lightly's loss, with a memory of its own where size is above 0."""
    from lightly.loss import NTXentLoss

    shape = (size, given.query.shape[1]) if size else 0
    given.lightly = NTXentLoss(T, memory_bank_size=shape)


def metric(given: Given):
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss

    k, dim = given.queue.queue.shape
    if "metric" not in vars(given):
        given.metric = CrossBatchMemory(NTXentLoss(T), dim, memory_size=k)
        given.metric.add_to_memory(given.queue.queue, torch.arange(k), k)
        given.labels = torch.arange(len(given.query)) + k
    given.labels = given.labels + len(given.query)  # new ones in each step, as for MoCo
    z = torch.cat((given.query, given.key))
    labels = given.labels.repeat(2)
    is_key = torch.arange(len(z)) >= len(given.query)
    return given.metric(z, labels, enqueue_mask=is_key)


def metric_alone(given: Given):
    from pytorch_metric_learning.losses import NTXentLoss

    z = torch.cat((given.query, given.key))
    return NTXentLoss(0.5)(z, torch.arange(len(given.query)).repeat(2))


GROUPS = {
    "queue": {
        "ours": queue,
        "published": lambda given: info_nce(given.published_logits()),
        "lightly": lightly,
    },
    "small queue": {"ours": queue, "metric": metric},
    "nonsemantic": {"ours": nonsemantic, "published": published_nonsemantic},
    "ring": {"ours": ring, "published": published_ring},
    "transform": {"ours": transform, "published": published_transform},
    "nce": {"ours": nce, "published": published_nce},
    "debiased": {
        "ours": debiased,
        "published": published_debiased,
        "lightly": lambda given: lightly(given, 0),
        "metric": metric_alone,
    },
}
DRAWN = ("transform", "small queue")  # sides draw in different ways, or negatives are others
SMALL = [
    "--batch=64",
    "--k=4096",
]  # CrossBatchMemory holds positive times negative pairs, all at once


def measure(args) -> dict:
    """Return a side's seconds of a step, its bytes, and its first loss with part of a gradient."""
    loss = GROUPS[args.groups[0]][args.side]
    small = Given(argparse.Namespace(batch=2, k=1000, dim=args.dim))
    torch.autograd.grad(loss(small), small.query)  # the libraries' own buffers and imports
    given = Given(args)
    if (args.groups[0], args.side) == ("queue", "lightly"):
        make_lightly(given, args.k)  # its memory is no part of the step, as that of the others
    before = resident()
    peak = Peak()
    peak.start()
    clock = time.process_time if args.clock == "processor" else time.perf_counter
    times, first = [], None
    for _ in range(args.steps + 1):
        began = clock()
        value = loss(given)
        (gradient,) = torch.autograd.grad(value, given.query)
        given.write()
        times.append(clock() - began)
        first = first or [value.item(), *gradient.flatten()[:100].tolist()]
    peak.over = True
    return {"seconds": min(times[1:]), "memory": peak.most - before, "first": first}


def compare(group: str, args) -> bool:
    """Measure all sides of a group in turn, print them, and return whether ours is never slower."""
    results = {side: [] for side in GROUPS[group]}
    flags = [f"--batch={args.batch}", f"--k={args.k}", f"--dim={args.dim}", f"--steps={args.steps}"]
    flags.append(f"--clock={args.clock}")
    flags += SMALL if group == "small queue" else []
    for _ in range(args.repeats):
        for side, own in results.items():
            own.append(in_a_process(__file__, *flags, "--groups", group, "--side", side))
    if group not in DRAWN:
        ours, theirs = (torch.tensor(results[side][0]["first"]) for side in ("ours", "published"))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    is_fastest = True
    for side, own in results.items():
        seconds = [1000 * result["seconds"] for result in own]
        memory = statistics.median(result["memory"] for result in own) / 2**20
        ratio = statistics.median(ratios(results, side, "ours", "seconds"))
        is_fastest = is_fastest and ratio >= 1
        print(
            f"{group:11} {side:9} {statistics.median(seconds):8.1f} ms ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), {memory:5.0f} MiB, {ratio:.2f} times ours",
            flush=True,
        )
    return is_fastest


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--batch", type=int, default=256, help="pictures of a step")
    parser.add_argument("--k", type=int, default=65_536, help="rows of the memory")
    parser.add_argument("--dim", type=int, default=128, help="size of a feature")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the fastest counts")
    parser.add_argument("--repeats", type=int, default=5, help="of each side")
    about = "processor: time of all threads, for a machine that others use"
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help=about)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return 0
    print(
        f"B {args.batch}, K {args.k}, D {args.dim}; {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )
    missed = [group for group in args.groups if not compare(group, args)]
    print(f"ours is slower: {', '.join(missed)}" if missed else "ours is never slower")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
