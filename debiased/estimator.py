#!/usr/bin/env python
"""How well the negative term of the loss is estimated: the paper's argument as a figure, on labelled pictures.

For an anchor the truth is the mean of e^{s} over the pictures of other classes, which labels tell. A batch estimates it by the
mean over all pictures (biased), or by the debiased estimator for a tau_plus. After `main.py --demo`, and on other pictures:

    python debiased/estimator.py --demo --out estimator.png
    python debiased/estimator.py --data_folder data --dataset cifar10 --model_path results/model_400.pth --out estimator.png

The figure has, over tau_plus and for several batch sizes: the bias and the standard deviation over batches, both relative to
the truth and averaged over anchors, and how often the estimate is at its lower bound. tau_plus 0 is the biased estimator.
Positives are views of the anchor's picture, as in training, or pictures of its class, as the theory has them.
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch

from common import UsageError, UserError, cli, files, launch, options
from runner import checkpoint, layouts, linear
from runner.progress import Progress
from runner.folder import environment
from debiased import main as pretraining
from debiased.loss import clamp_threshold, log_debiased
from debiased.networks import Network, described
from preprocess import demo

KINDS = {"view": "positives: views of the picture", "class": "positives: pictures of the class"}
PRESETS = {"demo": dict(data="data/demo", dataset="folder", model_path="runs/try-debiased", workers=2)}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="class folders with train/CLASS/*, or where a torchvision set is")
    options.add_data_arguments(g, trees=("folder",), workers=4)
    g.set_defaults(input_res=None)
    g = parser.add_argument_group("estimates")
    g.add_argument("--model_path", default="results", metavar="PATH", help="checkpoint of main.py, or its run folder")
    about = "default: that of the pre-training, or 0.5"
    g.add_argument("--temperature", type=cli.positive, help=about)
    shares = [0, 0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2]
    about = "values on the x-axis; 0 is the biased estimator"
    g.add_argument("--tau_plus", type=cli.fraction, nargs="+", default=shares, help=about)
    g.add_argument(
        "--batches", type=cli.number(int, least=2), nargs="+", default=[32, 128, 512], help="pictures of a batch"
    )
    g.add_argument("--M", type=cli.positive_int, default=1, help="positives of an estimate")
    g.add_argument("--views", type=cli.number(int, least=2), default=4, help="augmented views of every picture")
    g.add_argument("--anchors", type=cli.positive_int, default=500, help="pictures whose negative term is estimated")
    g.add_argument("--draws", type=cli.number(int, least=2), default=200, help="batches that are drawn for each")
    g.add_argument("--out", default="estimator.png", metavar="FILE.png", help="the figure; its numbers go to FILE.json")
    g.add_argument("--seed", type=cli.seed, default=0, help="seed of views and draws")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None:
        raise UsageError("no data: give --data_folder, or --demo for built-in pictures")
    if 1 in args.tau_plus:
        raise UsageError("--tau_plus 1.0: must be below 1")
    if args.M > args.views - 1:
        raise UsageError(f"--M {args.M}: needs --views {args.M + 1} or more")
    return args


@torch.no_grad()
def embed(args, saved: checkpoint.Saved, pictures, process: launch.Process) -> torch.Tensor:
    """Unit projections (n, views, D) of augmented views of all pictures, by the network in evaluation mode."""
    state = saved.get("state_dict", saved)
    state = layouts.strip_prefix({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    model, small_stem = described(state, saved.path)
    if "g.3.weight" not in state:
        raise UserError(f"{saved.path} has no projection head g: give a pre-training checkpoint")
    network = Network(model, len(state["g.3.weight"]), small_stem)
    checkpoint.load_into(network, state, saved.path)
    network.eval().to(process.device, memory_format=torch.channels_last)
    how = dict(batch_size=256, shuffle=False, drop_last=False)
    loader = options.make_loader(args, process, pictures, (pretraining.recipe(args),) * args.views, **how)
    progress = Progress("Embedding: ", len(loader), 10, enabled=process.is_main)
    rows = []
    for views, _, index in loader:
        rows.append(torch.stack([network(v.contiguous(memory_format=torch.channels_last))[1].cpu() for v in views], 1))
        progress.update(len(index))
    progress.close()
    return torch.cat(rows)


def draw(size, n: int, others: torch.Tensor, generator) -> torch.Tensor:
    """Numbers below n, uniform, (len(others), size), without that of `others` in each row."""
    drawn = torch.randint(n - 1, (len(others), size), generator=generator)
    return drawn + (drawn >= others[:, None])


def same_class(targets, anchors, m: int, generator) -> torch.Tensor:
    """Pictures of the class of every anchor, other than itself: (len(anchors), m)."""
    order = targets.argsort(stable=True)
    counts, place = targets.bincount(), order.argsort()
    first = counts.cumsum(0) - counts
    label = targets[anchors]
    drawn = (torch.rand(len(anchors), m, generator=generator) * (counts[label] - 1)[:, None]).long()
    own = (place[anchors] - first[label])[:, None]
    return order[first[label][:, None] + drawn + (drawn >= own)]


def estimates(z: torch.Tensor, targets: torch.Tensor, args, temperature: float) -> list[dict]:
    """Relative bias and standard deviation and the share at the bound, for each kind of positive, batch size and tau_plus.

    z (n, V, D): unit projections of V views of n pictures; targets (n,). View 0 of a picture is the anchor.
    """
    n, v, _ = z.shape
    generator = torch.Generator().manual_seed(args.seed)
    anchors = torch.randperm(n, generator=generator)[: args.anchors]
    scores = torch.einsum("ad,nvd->anv", z[anchors, 0], z) / temperature
    foreign = (targets[anchors][:, None] != targets)[..., None].expand_as(scores)
    truth = scores.masked_fill(~foreign, -math.inf).flatten(1).logsumexp(1) - foreign.flatten(1).sum(1).log()
    scores, found = scores.flatten(1), []
    for batch in args.batches:
        ratios = {(kind, tau): [] for kind in KINDS for tau in args.tau_plus}
        bound = dict.fromkeys(ratios, 0.0)
        for _ in range(args.draws):
            of_batch = draw(batch - 1, n, anchors, generator) * v
            one = torch.randint(v, of_batch.shape, generator=generator)  # two views each, as in a batch
            other = (one + torch.randint(1, v, of_batch.shape, generator=generator)) % v
            negatives = torch.cat((of_batch + one, of_batch + other), 1)
            log_mean = scores.gather(1, negatives).logsumexp(1) - math.log(2 * batch - 2)
            views = torch.rand(len(anchors), v - 1, generator=generator).argsort(1)[:, : args.M] + 1
            of_class = same_class(targets, anchors, args.M, generator) * v
            of_class = of_class + torch.randint(v, of_class.shape, generator=generator)
            for kind, columns in (("view", anchors[:, None] * v + views), ("class", of_class)):
                log_same = scores.gather(1, columns).logsumexp(1) - math.log(args.M)
                for tau in args.tau_plus:
                    log_g, clamped = log_debiased(log_mean, log_same, temperature, tau)
                    ratios[kind, tau].append((log_g - truth).exp())
                    bound[kind, tau] += clamped.float().mean().item() / args.draws
        for (kind, tau), values in ratios.items():
            ratio = torch.stack(values)  # draws x anchors
            numbers = dict(bias=ratio.mean().item() - 1, sd=ratio.std(0).mean().item(), bound=bound[kind, tau])
            found.append(dict(positives=kind, batch=batch, tau_plus=tau) | {k: round(x, 5) for k, x in numbers.items()})
    return found


def figure(found: list[dict], share: float, temperature: float, path: str) -> None:
    from matplotlib.figure import Figure  # half a second to import: not at start

    panels = {
        "bias": "bias: mean of estimate / truth - 1",
        "sd": "standard deviation over batches / truth",
        "bound": "share of estimates at the lower bound",
    }
    fig = Figure(figsize=(12, 3.8), layout="constrained")
    batches = sorted({f["batch"] for f in found})
    for axis, (key, title) in zip(fig.subplots(1, len(panels)), panels.items()):
        for kind, style in zip(KINDS, ("-", "--")):
            for i, batch in enumerate(batches):
                line = sorted((f["tau_plus"], f[key]) for f in found if (f["positives"], f["batch"]) == (kind, batch))
                label = f"batch {batch}" if style == "-" else KINDS["class"] if batch == batches[-1] else None
                axis.plot(*zip(*line), style, marker=".", color=f"C{i}", label=label)
        axis.axvline(share, color="grey", linewidth=0.8)
        axis.axvline(clamp_threshold(temperature), color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="tau_plus")
        axis.title.set_fontsize(10)
        if key == "bias":
            axis.axhline(0, color="black", linewidth=0.8)
            axis.legend(fontsize=8, title=KINDS["view"], title_fontsize=8)
    with files.replacing(path) as file:
        fig.savefig(file, format="png", dpi=110)


def worker(args, process: launch.Process) -> None:
    if process.world_size > 1:
        raise UsageError("the estimates are made by one process: omit --nproc")
    demo.ensure_for(args, process)
    saved = linear.pretrained(args.model_path, "--model_path", f"debiased/main.py{' --demo' * args.demo}")
    opt = saved.get("opt") or {}
    args.input_res = args.input_res or opt.get("input_res", 32)
    temperature = args.temperature or opt.get("temperature", 0.5)
    pictures = options.open_split(args, "train")
    counts = pictures.targets.bincount(minlength=2)
    if (pictures.targets < 0).any() or counts.count_nonzero() < 2 or counts[counts > 0].min() < 2:
        raise UserError(f"{pictures.name}: needs two labelled pictures or more of each of two classes")
    found = estimates(embed(args, saved, pictures, process), pictures.targets, args, temperature)
    share = (counts / counts.sum()).square().sum().item()  # chance that two pictures are of one class
    try:
        figure(found, share, temperature, args.out)
        about = environment() | dict(
            options=cli.flags(args), network=saved.path, pretrained_epochs=saved.get("epoch")
        )
        about |= dict(pictures=len(pictures), share=round(share, 5), temperature=temperature)
        files.write_json(run.Path(args.out).with_suffix(".json"), about | {"estimates": found})
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror or error}") from None
    print(f"{'positives':10}{'batch':>6}{'tau_plus':>9}{'bias':>9}{'sd':>8}{'bound':>8}")
    for f in found:
        print(f"{f['positives']:10}{f['batch']:6}{f['tau_plus']:9}{f['bias']:+9.3f}{f['sd']:8.3f}{f['bound']:8.3f}")
    print(f"temperature {temperature}, chance of the same class {share:.3f}; {args.out}")


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
