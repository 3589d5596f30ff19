#!/usr/bin/env python
"""Measure how well a batch estimates the negative term of the loss, and draw it as a figure.

For an anchor the true term is the mean of e^s over the pictures of other classes, which the labels
tell. A batch estimates it by the mean over all pictures (biased), or by the debiased estimator with
some tau_plus. The first command follows `main.py --demo`, the second one is for other pictures:

    python debiased/estimator.py --demo --out estimator.png
    python debiased/estimator.py --data_folder data --dataset cifar10 \\
        --model_path results/model_400.pth --out estimator.png

The figure shows, over tau_plus and for several batch sizes, the bias and the standard deviation
over batches, both relative to the truth and averaged over anchors, and how often the estimate is at
its lower bound. tau_plus 0 is the biased estimator. Positives are views of the anchor's picture, as
in training, or other pictures of its class, as in the theory.
"""

import math
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from common import UsageError, UserError, cli, files, footing, inputs, launch, options
from debiased import main as pretraining
from debiased.loss import clamp_threshold, log_debiased
from debiased.networks import Network, described
from preprocess import demo
from runner import checkpoint, layouts, pretrained
from runner.folder import environment
from runner.progress import Progress

KINDS = {  # {kind of positives: what the legend says of them}
    "view": "solid lines: positives are views of the picture",
    "class": "dashed lines: positives are pictures of its class",
}
PANELS = {
    "bias": "bias: mean of estimate / truth - 1",
    "sd": "standard deviation over batches / truth",
    "bound": "share of estimates at the lower bound",
}
BATCH = 256  # pictures that are embedded at once
PRESETS = {
    "demo": dict(data="data/demo", dataset="folder", model_path="runs/try-debiased", workers=2),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    two_or_more = cli.number(int, least=2)
    g = parser.add_argument_group("data")
    text = "tree with train/CLASS/*, or where torchvision keeps its sets"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    options.add_data_arguments(g, trees=("folder",), workers=4)
    g.set_defaults(input_res=32)

    g = parser.add_argument_group("estimates")
    text = "checkpoint of main.py, or its run folder"
    g.add_argument("--model_path", default="results", metavar="PATH", help=text)
    text = "temperature; default: that of the pre-training, or 0.5"
    g.add_argument("--temperature", type=cli.positive, help=text)
    shares = [0, 0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2]
    text = "values on the x-axis; 0 is the biased estimator"
    g.add_argument("--tau_plus", type=cli.fraction, nargs="+", default=shares, help=text)
    text = "batch sizes, in pictures"
    g.add_argument("--batches", type=two_or_more, nargs="+", default=[32, 128, 512], help=text)
    g.add_argument("--M", type=cli.positive_int, default=1, help="positives of an estimate")
    text = "augmented views of every picture"
    g.add_argument("--views", type=two_or_more, default=4, help=text)
    text = "pictures whose negative term is estimated"
    g.add_argument("--anchors", type=cli.positive_int, default=500, help=text)
    text = "batches that are drawn for each anchor"
    g.add_argument("--draws", type=two_or_more, default=200, help=text)
    text = "the figure, .png, .pdf or .svg; its numbers go beside it, as .json"
    g.add_argument(
        "--out", type=cli.figure_path, default="estimator.png", metavar="FILE", help=text
    )
    g.add_argument("--seed", type=cli.seed, default=0, help="seed of views and draws")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None:
        raise UsageError(options.NO_DATA)
    if max(args.tau_plus) == 1:
        raise UsageError("--tau_plus 1.0: must be below 1")
    if args.M > args.views - 1:
        raise UsageError(f"--M {args.M}: needs --views {args.M + 1} or more")
    return cli.freeze(args)


@torch.no_grad()
def embed(args, saved: checkpoint.Saved, pictures, process: launch.Process) -> torch.Tensor:
    """Return unit projections (n, views, D) of augmented views by the pre-trained network."""
    state = layouts.tensors(saved)
    model, small_stem = described(state, saved.path)
    is_common = pretrained.footing(saved.get("opt") or {})["footing"] == "common"
    last = "g.2.weight" if is_common else "g.3.weight"
    if last not in state:
        raise UserError(f"{saved.path} has no projection head g: give a pre-training checkpoint")
    network = Network(model, len(state[last]), small_stem)
    if is_common:
        network.g = footing.head(network.f.dim, len(state[last]))
    checkpoint.load_into(network, state, saved.path)
    network.eval().to(process.device, memory_format=torch.channels_last)
    views = (pretraining.recipe(args),) * args.views
    loader = inputs.make_loader(
        args, process, pictures, views, BATCH, shuffle=False, drop_last=False
    )
    progress = Progress("Embedding: ", len(loader), 10, enabled=process.is_main)
    rows = []
    for batch, _, index in loader:
        batch = [view.contiguous(memory_format=torch.channels_last) for view in batch]
        rows.append(torch.stack([network(view)[1].cpu() for view in batch], 1))
        progress.update(len(index))
    progress.close()
    return torch.cat(rows)


def draw(size: int, n: int, others: torch.Tensor, generator) -> torch.Tensor:
    """Draw uniform numbers (len(others), size) below n, in row i without the number others[i]."""
    drawn = torch.randint(n - 1, (len(others), size), generator=generator)
    return drawn + (drawn >= others[:, None])


def same_class(targets, anchors, m: int, generator) -> torch.Tensor:
    """Draw m pictures of the class of every anchor, but never itself: (len(anchors), m)."""
    order = targets.argsort(stable=True)
    place = order.argsort()
    counts = targets.bincount()
    first = counts.cumsum(0) - counts
    label = targets[anchors]
    drawn = (torch.rand(len(anchors), m, generator=generator) * (counts[label] - 1)[:, None]).long()
    own = (place[anchors] - first[label])[:, None]
    return order[first[label][:, None] + drawn + (drawn >= own)]


class Scores:
    """Scores of anchors with all views of all pictures, and batches that are drawn from them.

    z (n, V, D): unit projections of V views of n pictures. targets (n,): their classes. View 0 of a
    picture is the anchor. Draws follow from args.seed.
    """

    def __init__(self, z: torch.Tensor, targets: torch.Tensor, args, temperature: float):
        self.n, self.v, _ = z.shape
        self.targets = targets
        self.m = args.M
        self.generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(self.n, generator=self.generator)
        self.anchors = order[: args.anchors]
        scores = torch.einsum("ad,nvd->anv", z[self.anchors, 0], z) / temperature
        foreign = (targets[self.anchors][:, None] != targets)[..., None].expand_as(scores)
        log_sum = scores.masked_fill(~foreign, -math.inf).flatten(1).logsumexp(1)
        self.log_truth = log_sum - foreign.flatten(1).sum(1).log()
        self.scores = scores.flatten(1)

    def log_mean_of_batch(self, batch: int) -> torch.Tensor:
        """Draw a batch for every anchor; return the log of the mean of e^s over its negatives."""
        pictures = draw(batch - 1, self.n, self.anchors, self.generator) * self.v
        one = torch.randint(self.v, pictures.shape, generator=self.generator)
        step = torch.randint(1, self.v, pictures.shape, generator=self.generator)
        other = (one + step) % self.v  # two different views of each picture, as in training
        negatives = torch.cat((pictures + one, pictures + other), 1)
        return self.scores.gather(1, negatives).logsumexp(1) - math.log(2 * batch - 2)

    def log_mean_of_positives(self) -> dict[str, torch.Tensor]:
        """Draw M positives of each kind; return the log of the mean of e^s over them."""
        order = torch.rand(len(self.anchors), self.v - 1, generator=self.generator).argsort(1)
        own_views = self.anchors[:, None] * self.v + order[:, : self.m] + 1
        of_class = same_class(self.targets, self.anchors, self.m, self.generator) * self.v
        of_class = of_class + torch.randint(self.v, of_class.shape, generator=self.generator)
        columns = {"view": own_views, "class": of_class}
        return {
            kind: self.scores.gather(1, places).logsumexp(1) - math.log(self.m)
            for kind, places in columns.items()
        }


def estimates(z: torch.Tensor, targets: torch.Tensor, args, temperature: float) -> list[dict]:
    """Return the bias, the standard deviation, and the share at the bound, of estimates of g.

    There is one row for each kind of positive, batch size and tau_plus. z, targets: as in `Scores`.
    """
    scores = Scores(z, targets, args, temperature)
    rows = []
    for batch in args.batches:
        ratios = {(kind, tau): [] for kind in KINDS for tau in args.tau_plus}
        bound = dict.fromkeys(ratios, 0.0)
        for _ in range(args.draws):
            log_mean = scores.log_mean_of_batch(batch)
            log_same = scores.log_mean_of_positives()
            for kind, tau in ratios:
                log_g, clamped = log_debiased(log_mean, log_same[kind], temperature, tau)
                ratios[kind, tau].append((log_g - scores.log_truth).exp())
                bound[kind, tau] += clamped.float().mean().item() / args.draws
        for (kind, tau), values in ratios.items():
            ratio = torch.stack(values)  # draws x anchors
            numbers = {
                "bias": ratio.mean().item() - 1,
                "sd": ratio.std(0).mean().item(),
                "bound": bound[kind, tau],
            }
            rounded = {name: round(number, 5) for name, number in numbers.items()}
            rows.append({"positives": kind, "batch": batch, "tau_plus": tau, **rounded})
    return rows


def figure(rows: list[dict], share: float, temperature: float, path: str) -> None:
    """Draw the rows of `estimates` and write them to `path`. share: the true tau_plus."""
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    drawing = Figure(figsize=(12, 4.3), layout="constrained")
    for axis, panel in zip(drawing.subplots(1, len(PANELS)), PANELS):
        draw_lines(axis, panel, rows)
        label = "the true tau_plus: chance of the same class"
        axis.axvline(share, color="grey", linewidth=0.8, label=label)
        label = "lower bound for aligned positives and orthogonal negatives"
        threshold = clamp_threshold(temperature)
        axis.axvline(threshold, color="grey", linewidth=0.8, linestyle=":", label=label)
        axis.set(title=PANELS[panel], xlabel="tau_plus")
        axis.title.set_fontsize(10)
        if panel == "bias":
            axis.axhline(0, color="black", linewidth=0.8)
    lines, labels = axis.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 5, "frameon": False}
    drawing.legend(lines, labels, title="; ".join(KINDS.values()), fontsize=8, **place)
    files.write_figure(drawing, path)


def draw_lines(axis, panel: str, rows: list[dict]) -> None:
    """Draw a line for each batch size, solid for views of the picture, dashed for its class."""
    batches = sorted({row["batch"] for row in rows})
    for kind, style in (("view", "-"), ("class", "--")):
        for number, batch in enumerate(batches):
            label = f"batch {batch}" if kind == "view" else None
            here = [row for row in rows if (row["positives"], row["batch"]) == (kind, batch)]
            line = sorted((row["tau_plus"], row[panel]) for row in here)
            axis.plot(*zip(*line), style, marker=".", color=f"C{number}", label=label)


def worker(args, process: launch.Process) -> None:
    if process.world_size > 1:
        raise UsageError("the estimates are computed by one process: omit --nproc")
    demo.ensure_for(args, process)
    first = "debiased/main.py --demo" if args.demo else "debiased/main.py"
    saved = pretrained.read(args.model_path, "--model_path", first)
    with saved.within():
        opt = saved.get("opt") or {}
        side, shared = pretrained.input_res(args, opt), pretrained.footing(opt)
        args = cli.replace(args, input_res=side, **shared)
        temperature = float(args.temperature or opt.get("temperature", 0.5))
    pictures = inputs.open_split(args, "train")
    counts = pictures.targets.bincount(minlength=2) if (pictures.targets >= 0).all() else None
    if counts is None or counts.count_nonzero() < 2 or counts[counts > 0].min() < 2:
        raise UserError(
            f"{pictures.name} must have two classes or more, each with two pictures or more"
        )
    with saved.within():
        z = embed(args, saved, pictures, process)
    rows = estimates(z, pictures.targets, args, temperature)
    # The chance that two pictures are of one class.
    share = (counts / counts.sum()).square().sum().item()
    content = {
        **environment(),
        "options": cli.flags(args),
        "network": saved.path,
        "pretrained_epochs": saved.get("epoch"),
        "pictures": len(pictures),
        "share": round(share, 5),
        "temperature": temperature,
        "estimates": rows,
    }
    try:
        files.write_json(Path(args.out).with_suffix(".json"), content)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror or error}") from None
    print(f"{'positives':10}{'batch':>6}{'tau_plus':>9}{'bias':>9}{'sd':>8}{'bound':>8}")
    for row in rows:
        place = f"{row['positives']:10}{row['batch']:6}{row['tau_plus']:9}"
        print(f"{place}{row['bias']:+9.3f}{row['sd']:8.3f}{row['bound']:8.3f}")
    figure(rows, share, temperature, args.out)
    print(f"temperature {temperature}, chance of the same class {share:.3f}; {args.out}")


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
