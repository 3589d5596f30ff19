#!/usr/bin/env python
"""What a backbone is worth: k-NN, tuned linear evaluation, few labels, alignment and uniformity, RankMe, scores.

Any backbone: a pre-training of any paper here, the authors' files, or the state dict of a torchvision (or timm) ResNet, on any
data set with labels. One table, result.json and a picture in the run folder:

    python tools/evaluate.py runs/try DATA
    python tools/evaluate.py resnet50.pth IMAGENET100 --input-res 224 --views 1 --out runs/evaluation
    python tools/evaluate.py --demo runs/try

Every picture is embedded once per view; all learning rates and shares of the labels are then trained together, on the features.
The rate is chosen on a tenth of the training pictures that are kept back, never on val.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UsageError, UserError, augment, backbones, cli, files, launch, metrics, options, printable, schedule
from runner import checkpoint, layouts, linear
from runner.folder import Run
from common.precision import Precision
from feature_transform import detector
from preprocess import demo
from tools import export
from tools.report import layout

RATES = tuple(10 ** (-2 + i / 3) for i in range(12))  # .01 to 46, for features of mean square length 1
SHARES = (1.0, 0.1, 0.01)  # of the labels
KNN_ELEMENTS = 2**25  # similarities at once: 128 MiB
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", input_res=32, workers=2, views=2, epochs=30, out="runs/try-evaluation"
    )
}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    about = "checkpoint or run folder of a pre-training, or a state dict of a ResNet"
    parser.add_argument("checkpoint", metavar="CKPT", help=about)
    g = parser.add_argument_group("data")
    g.add_argument("data", nargs="?", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, workers=8)
    g = parser.add_argument_group("evaluation")
    g.add_argument(
        "--views", type=cli.positive_int, default=2, help="augmented views (crop, flip) of a training picture"
    )
    g.add_argument("--epochs", type=cli.positive_int, default=60, help="epochs of the linear classifiers")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="pictures at once")
    g.add_argument("--knn-k", type=cli.positive_int, default=200, help="neighbours")
    g.add_argument("--seed", type=cli.seed, default=0, help="of views, batches and what is kept back")
    g = parser.add_argument_group("run")
    g.add_argument("--out", default="runs/evaluation", help="folder of result.json and scores.png")
    g.add_argument("--label", help="name of this network in the table; default: its file")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None:
        raise UsageError(
            "no data: give DATA, a tree with train/CLASS/* and val/CLASS/*, or --demo for built-in pictures"
        )
    if args.epochs > 10_000:
        raise UsageError(f"--epochs {args.epochs}: at most 10000")
    return args


# ------------------------------------------------------------------------------------------------------------- network


class Backbone(nn.Module):
    """The ResNets of a checkpoint, each on its channels; a picture's feature is that of all of them side by side: (N, D)."""

    def __init__(self, trunks: list[detector.Trunk]):
        super().__init__()
        self.trunks, self.channels = nn.ModuleList(trunks), [trunk.in_channels for trunk in trunks]

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.trunks, x.split(self.channels, 1))
        return torch.cat([trunk(part)[-1].mean((2, 3)) for trunk, part in parts], 1)


def name_of(trunk: detector.Trunk) -> str:
    """resnet50, and how many times as wide as that its stages are where they are not."""
    stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    kind = type(trunk.layer1[0]), list(map(len, stages))
    depth = next((depth for depth, known in backbones.BLOCKS.items() if known == kind), "")
    return f"resnet{depth}" + (f"x{trunk.planes / 64:g}" if trunk.planes != 64 else "")


def open_backbone(path: str, device: torch.device):
    """(network, operations, facts) of a checkpoint: images (N, 3, S, S) in [0, 1], through those, to features (N, D)."""
    file = export.find(Path(path))
    saved = checkpoint.Saved(file)
    if "classifier" in saved:
        raise UserError(f"{file} is a classifier without its network; give the network")
    state = layouts.backbone(saved)
    if not any(f"{tower}conv1.weight" in state for tower in ("", *(f"{t}." for t in layouts.towers(state)))):
        way_out = f"evaluate it with {saved.family[1]}" if saved.family else "this evaluates ResNets"
        raise UserError(f"{file} holds no ResNet (it has {printable(', '.join(list(state)[:3]))}): {way_out}")
    operations, trunks = detector.open_trunks(saved, state, str(file))
    trunks = list(trunks.values())
    network = Backbone(trunks).requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    facts = dict(arch=saved.get("arch") or name_of(trunks[0]), towers=len(trunks), pretrained=str(file))
    return network, operations, facts | dict(colours=repr(operations)) | saved.how_far()


# ------------------------------------------------------------------------------------------------------------ features


def embed_split(args, process, pictures, view, embed, views: int, what: str) -> tuple[Tensor, Tensor]:
    """Features (views, n, D) and targets (n,) of all pictures, in order."""
    print(f"{what}:", flush=True)
    how = dict(seed=args.seed, shuffle=False, drop_last=False)
    loader = options.make_loader(args, process, pictures, (view,), args.batch_size, **how)
    kept = linear.CachedViews(embed, loader, views, args.seed, 10, show=True, flag="--views")
    return kept.features, kept.targets


def keep_back(targets: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (train, kept): of every class the share that is kept, at least one of two or more pictures."""
    train, kept = [], []
    for label in targets.unique():
        rows = (targets == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        kept.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train), torch.cat(kept)


def fewer_labels(rows: Tensor, targets: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Of every class that share of the rows, at least one."""
    found = []
    for label in targets[rows].unique():
        mine = rows[targets[rows] == label]
        found.append(mine[torch.randperm(len(mine), generator=generator)[: max(1, round(share * len(mine)))]])
    return torch.cat(found)


# -------------------------------------------------------------------------------------------------------------- linear


def train_linear(
    features: Tensor, targets: Tensor, rows: Tensor, classes: int, epochs: int, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Linear classifiers of all RATES at once: weights (R, D, C) and biases (R, C).

    features (V, n, D), targets (n,): of them `rows` are trained on, view after view. SGD with momentum .9, a cosine down to 0,
    no weight decay. All rates see the same batches, and one product of (B, D) with (D, R C) serves them all.
    """
    views, _, dim = features.shape
    columns = len(RATES) * classes  # rate after rate
    rates = features.new_tensor(RATES).repeat_interleave(classes)
    weight, bias, speed, bias_speed = (features.new_zeros(*size, columns) for size in ((dim,), (), (dim,), ()))
    one_hot = torch.eye(classes, dtype=features.dtype, device=features.device)
    steps, done = epochs * -(-len(rows) // batch), 0
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for some in order.split(batch):
            x, y = features[epoch % views].index_select(0, some), targets[some]
            error = torch.addmm(bias, x, weight).view(len(x), -1, classes)
            # A softmax: torch's takes five times as long for a few classes, and products with numbers below 1e-38 longer still.
            error.sub_(error.amax(2, keepdim=True)).clamp_(min=-60).exp_()
            error.div_(error.sum(2, keepdim=True)).sub_(one_hot[y][:, None])
            error = error.view(len(x), columns)
            lr = rates * schedule.cosine(1.0, done, steps)
            speed.addmm_(x.T, error, beta=0.9, alpha=1 / len(x))
            bias_speed.mul_(0.9).add_(error.sum(0), alpha=1 / len(x))
            weight.addcmul_(speed, lr, value=-1)
            bias.addcmul_(bias_speed, lr, value=-1)
            done += 1
    return weight.view(dim, -1, classes).transpose(0, 1), bias.view(-1, 1, classes)


def accuracies(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> list[float]:
    """Top-1 of each rate in percent, features (n, D)."""
    hits = torch.zeros(len(weight), device=features.device)
    for x, y in zip(features.split(4096), targets.split(4096)):
        logits = torch.einsum("nd,rdc->rnc", x, weight) + bias
        hits += (logits.argmax(2) == y).sum(1)
    return (hits * (100 / len(targets))).tolist()


# ------------------------------------------------------------------------------------------------- geometry of features


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the unit features of two views of a picture (Wang & Isola, arXiv:2005.10242, Sec. 4): 0 to 4."""
    return float((F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean())


def uniformity(features: Tensor, most: int = 8192, chunk: int = 1024) -> float:
    """log of the mean over pairs of e^{-2 |x - y|^2} of unit features (the same paper): 0 is collapse, -4 the least."""
    z = F.normalize(features[:most].float(), dim=1)
    total = z.new_zeros((), dtype=torch.float64)
    for part in z.split(chunk):
        total += (part @ z.T).sub_(1).mul_(4).exp_().sum(dtype=torch.float64)
    n = len(z)
    return float(((total - n) / (n * (n - 1))).log())  # without each with itself


def rankme(features: Tensor) -> float:
    """Effective rank: e^entropy of the singular values of features (n, D) (Garrido et al., arXiv:2210.02885, Eq. (1)-(2))."""
    values = torch.linalg.eigvalsh((features.T @ features).double()).clamp(min=0).sqrt()
    shares = values / values.sum() + 1e-7
    return float((-shares * shares.log()).sum().exp())


def scores(first: Tensor, second: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cosines of two views of the same picture, and of two pictures drawn at random: (n,) each."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    other = (torch.arange(len(first)) + torch.randint(1, len(first), (len(first),), generator=generator)) % len(first)
    return (first * second).sum(1), (first * second[other.to(second.device)]).sum(1)


def draw_scores(path: str, positive: Tensor, negative: Tensor, title: str) -> None:
    from matplotlib.figure import Figure  # half a second to import: not at start

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    bins = torch.linspace(float(min(positive.min(), negative.min())), 1, 61).tolist()
    for values, label, how in (
        (negative, "two pictures", dict(color="0.55", histtype="stepfilled", alpha=0.6)),
        (positive, "two views of a picture", dict(color="#0072b2", histtype="step", linewidth=1.8)),
    ):
        axes.hist(
            values.cpu().numpy(), bins=bins, density=True, label=f"{label}, mean {float(values.mean()):.2f}", **how
        )
    axes.set(xlabel="cosine of their features", ylabel="density", title=title)
    axes.legend(frameon=False)
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


# ----------------------------------------------------------------------------------------------------------------- run


def open_inputs(args, process) -> tuple:
    """What `evaluate` takes: the backbone, what was found of it, and both splits. Looked at before anything is written."""
    backbone = open_backbone(args.checkpoint, process.device)
    train_set = options.open_split(args, "train")
    if len(train_set.classes) < 2 or (train_set.targets < 0).any():
        raise UsageError(f"{args.data}: needs the class of every picture, and two classes or more")
    return *backbone, train_set, options.open_split(args, "val", classes=train_set.classes)


def evaluate(args, process, network, operations, facts, train_set, val_set) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Everything that result.json says, and the two sets of cosines."""
    precision = Precision(args.amp, process.device)

    def embed(images):
        with precision.autocast():
            return network(images)

    plain = options.plain_view(args, *operations)
    crop, flip = augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip()
    augmented, began = augment.Compose(crop, flip, *operations), time.perf_counter()
    seen, targets = embed_split(args, process, train_set, augmented, embed, args.views, "train")
    (bank,), _ = embed_split(args, process, train_set, plain, embed, 1, "train as it is")
    (val,), val_targets = embed_split(args, process, val_set, plain, embed, 1, "val")
    embedded = time.perf_counter() - began

    classes = len(train_set.classes)
    found, cosines = judge(args, seen, targets, bank, val, val_targets, classes)
    about = dict(data=args.data, pictures=len(train_set), classes=classes, views=args.views, seed=args.seed)
    times = dict(embedding_seconds=embedded, other_seconds=sum(found["seconds"].values()))
    return facts | about | found | times, cosines


def judge(args, seen, targets, bank, val, val_targets, classes: int) -> tuple[dict, tuple[Tensor, Tensor]]:
    """All numbers of features, and the two sets of cosines. `seconds` says what took how long.

    seen (V, n, D): augmented views of the training pictures, bank (n, D) the same as they are; val (m, D).
    """
    result, generator, clock = {}, torch.Generator().manual_seed(args.seed), Clock()
    found = metrics.knn(bank, targets, val, val_targets, classes, args.knn_k, chunk_elements=KNN_ELEMENTS)
    result |= dict(zip(("knn_acc1", "knn_acc5"), map(float, found)), knn_k=args.knn_k)
    clock("k-NN")
    scale = seen.square().sum(2).mean().rsqrt()  # so that a rate means the same for every network
    seen, val_scaled, bank_scaled = seen * scale, val * scale, bank * scale
    train_rows, kept = keep_back(targets.cpu(), 0.1, generator)
    linear = {}
    for share in SHARES:
        rows = fewer_labels(train_rows, targets.cpu(), share, generator).to(targets.device)
        epochs = min(round(args.epochs / share**0.5), 10 * args.epochs)  # few labels: shorter epochs, more of them
        weight, bias = train_linear(seen, targets, rows, classes, epochs, args.batch_size, generator)
        kept_acc = accuracies(bank_scaled[kept.to(bank.device)], targets[kept.to(bank.device)], weight, bias)
        val_acc = accuracies(val_scaled, val_targets, weight, bias)
        best = max(range(len(RATES)), key=kept_acc.__getitem__)
        linear[f"{share:.0%}"] = {
            "labels": len(rows), "epochs": epochs, "rate": RATES[best], "kept_back": kept_acc, "val": val_acc,
        }  # fmt: skip
        result[f"linear_{share:.0%}".replace("%", "")] = val_acc[best]
        clock(f"linear, {share:.0%}")
    result |= {"acc1": result["linear_100"], "linear": linear, "rates": list(RATES)}
    first, second = (seen[0], seen[1]) if args.views > 1 else (seen[0], bank_scaled)
    result |= {"alignment": alignment(first, second), "uniformity": uniformity(val), "rankme": rankme(bank)}
    cosines = scores(first, second, generator)
    clock("geometry")
    return result | {"dimensions": bank.shape[1], "seconds": clock.seconds}, cosines


class Clock:
    """Seconds since it was last looked at, by name."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what], self.last = now - self.last, now


def table(result: dict) -> str:
    rows = [
        ["k-NN", f"{result['knn_acc1']:.2f}", f"top-1, {result['knn_k']} neighbours"],
        *(
            [
                f"linear, {name} of the labels",
                f"{result['linear_' + name[:-1]]:.2f}",
                f"top-1, rate {found['rate']:.3g}",
            ]
            for name, found in result["linear"].items()
        ),
        ["alignment", f"{result['alignment']:.3f}", "mean squared distance of two views, 0 to 4; less is closer"],
        ["uniformity", f"{result['uniformity']:.3f}", "0: all features are the same; -4: spread evenly"],
        ["RankMe", f"{result['rankme']:.1f}", f"effective dimensions of {result['dimensions']}"],
    ]
    return layout(["", "value", ""], rows, markdown=False)


def worker(args, process: launch.Process) -> None:
    if process.world_size > 1:
        raise UsageError("this runs in one process: omit --multiprocessing-distributed and --nproc")
    demo.ensure_for(args, process)
    opened = open_inputs(args, process)
    log = Run(args.out, args, process, tensorboard=False)
    try:
        result, (positive, negative) = evaluate(args, process, *opened)
        result["label"] = args.label or os.path.basename(os.path.dirname(result["pretrained"]))
        print(f"\n{result['label']}: {result['arch']}, {result['pretrained']}\n\n{table(result)}\n")
        if result["acc1"] < result["knn_acc1"] - 0.5:
            both = f"the linear evaluation ({result['acc1']:.2f}) lies below k-NN ({result['knn_acc1']:.2f})"
            log.say(f"warning: {both}: a probe that is not tuned; try more --epochs or --views")
        ends = [name for name, found in result["linear"].items() if found["rate"] in (RATES[0], RATES[-1])]
        if ends:
            log.say(
                f"note: with {', '.join(ends)} of the labels the best rate is an end of those tried: a better may lie beyond"
            )
        draw_scores(os.path.join(args.out, "scores.png"), positive, negative, result["label"])
        log.result(**result)
    finally:
        log.close()


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
