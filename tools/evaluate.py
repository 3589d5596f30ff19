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

from common import early

early.answer(__name__)  # a mistyped flag, --help and Ctrl-C, before torch is imported

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import (
    UsageError,
    UserError,
    augment,
    backbones,
    checkpoint,
    cli,
    metrics,
    options,
    printable,
    processes,
    run,
)
from common.precision import Precision
from common.probe import embed_images
from preprocess import demo
from tools import export
from tools.report import layout

RATES = tuple(10 ** (-2 + i / 3) for i in range(12))  # .01 to 46, for features of mean square length 1
SHARES = (1.0, 0.1, 0.01)  # of the labels
CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # what debiased/main.py normalises with
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


class Towers(nn.Module):
    """The backbones of a checkpoint; a picture's feature is that of all of them side by side: (N, D)."""

    def __init__(self, nets: list[nn.Module], channels: list[int]):
        super().__init__()
        self.nets, self.channels = nn.ModuleList(nets), channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(part) for net, part in zip(self.nets, x.split(self.channels, 1))], 1)


def resnet(state: dict, saved: dict, path: str) -> tuple[str, nn.Module]:
    """(name, network) for the parameters of one tower, of whatever width and first convolution."""
    first = state.get("conv1.weight")
    if first is None or first.dim() != 4:
        own = getattr(saved, "family", None)
        way_out = f"evaluate it with {own[1]}" if own else "this evaluates ResNets"
        raise UserError(f"{path} holds no ResNet (it has {printable(', '.join(list(state)[:3]))}): {way_out}")
    said, known = saved.get("arch"), backbones.name_of(state)
    if isinstance(said, str) and first.shape[1] == 3 and not said.endswith(("x2", "x4")) and said != known:
        model = backbones.build(said, 0, small_stem=first.shape[-1] == 3)
        name = said
    else:
        blocks = {key.split(".")[1] for key in state if key.startswith("layer3.")}
        third = "layer1.0.conv3.weight" in state
        kinds = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101, (True, 36): 152}
        if (third, len(blocks)) not in kinds:
            raise UserError(f"{path} holds a ResNet of unknown depth ({len(blocks)} blocks in its third stage)")
        width = state["layer1.0.conv1.weight"].shape[0] / 64
        depth = kinds[third, len(blocks)]
        model = backbones.WidthResNet(depth, first.shape[1], width, 0, small_stem=first.shape[-1] == 3)
        name = f"resnet{depth}" + (f"x{width:g}" if width != 1 else "")
    checkpoint.load_into(model, state, path)
    return name, model


def open_backbone(path: str, device: torch.device):
    """(network, colour operations, facts) of a checkpoint: images (N, 3, S, S) in [0, 1], through those, to features (N, D)."""
    file = export.find(export.Path(path))
    saved = checkpoint.Saved(file)
    if "classifier" in saved:
        raise UserError(f"{file} is a classifier without its network; give the network")
    state, flags = checkpoint.backbone(saved), saved.get("opt") or saved.get("args") or {}
    names = export.towers(state)
    if names:
        made = [resnet(export.one_tower(state, name), saved, str(file)) for name in names]
        space = flags.get("view") or ("YDbDr" if any(n.startswith("encoder") for n in names) else "Lab")
        views = colour.parse_views(flags["views"], space) if flags.get("views") else colour.default_views(space)
        order = [key for key in colour.tower_names(views) if key in names]
        made = [made[names.index(key)] for key in order] if len(order) == len(names) else made
        colours = colour.Views(views)
        channels = [len(view.channels) for view in views]
    else:
        made, channels = [resnet(checkpoint.without_head(state), saved, str(file))], [3]
        debiased = saved.family is not None and saved.family[0].startswith("debiased")
        colours = augment.Normalize(*(CIFAR if debiased else (augment.IMAGENET_MEAN, augment.IMAGENET_STD)))
    if [net.conv1.in_channels for _, net in made] != channels:
        raise UserError(f"{file}: its towers take other channels than the colour space {flags.get('view')} has")
    network = Towers([net for _, net in made], channels).requires_grad_(False).eval()
    facts = {
        "arch": made[0][0],
        "towers": len(made),
        "pretrained": str(file),
        "colours": repr(colours),
        **saved.how_far(),
    }
    return network.to(device, memory_format=torch.channels_last), colours, facts


# ------------------------------------------------------------------------------------------------------------ features


def embed_split(args, process, pictures, view, embed, views: int, what: str) -> tuple[Tensor, Tensor]:
    """Features (views, n, D) and targets (n,) of all pictures, in order, with a progress line."""
    how = dict(seed=args.seed, shuffle=False, drop_last=False)
    loader, kept = options.make_loader(args, process, pictures, (view,), args.batch_size, **how), []
    for number in range(views):
        loader.set_epoch(number)
        progress = run.Progress(f"Embedding {what}, view {number + 1} of {views}: ", len(loader), 10)
        feats, targets = [], []
        for (images,), target, _ in loader:
            feats.append(embed_images(embed, images))
            targets.append(target)
            progress.update(len(target))
        progress.close()
        kept.append(torch.cat(feats))
    return torch.stack(kept), torch.cat(targets)


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
    rates = torch.tensor(RATES, device=features.device)[:, None, None]
    weight, bias = (torch.zeros(len(RATES), size, classes, device=features.device) for size in (dim, 1))
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    steps, done = epochs * -(-len(rows) // batch), 0
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for some in order.split(batch):
            x, y = features[epoch % views, some], targets[some]
            logits = (x @ weight.permute(1, 0, 2).reshape(dim, -1)).view(len(x), len(RATES), classes) + bias[:, 0]
            error = logits.softmax(2)
            error[torch.arange(len(x), device=y.device), :, y] -= 1
            error /= len(x)
            gradient = (x.T @ error.view(len(x), -1)).view(dim, len(RATES), classes).transpose(0, 1)
            lr = rates * (0.5 * (1 + torch.cos(torch.tensor(torch.pi * done / steps))))
            for value, momentum, grad in ((weight, speed[0], gradient), (bias, speed[1], error.sum(0)[:, None])):
                momentum.mul_(0.9).add_(grad)
                value.sub_(lr * momentum)
            done += 1
    return weight, bias


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
        total += (-2 * (2 - 2 * part @ z.T)).exp().double().sum()
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 3.2), layout="constrained")
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
    with checkpoint.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------- run


def evaluate(args, process) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Everything that result.json says, and the two sets of cosines."""
    network, colours, facts = open_backbone(args.checkpoint, process.device)
    precision = Precision(args.amp, process.device)
    train_set = options.open_split(args, "train")
    if len(train_set.classes) < 2 or (train_set.targets < 0).any():
        raise UsageError(f"{args.data}: needs the class of every picture, and two classes or more")
    val_set = options.open_split(args, "val", classes=train_set.classes)

    @torch.no_grad()
    def embed(images):
        with precision.autocast():
            return network(images)

    plain = augment.Compose(augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res), colours)
    crop, flip = augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip()
    began = time.perf_counter()
    seen, targets = embed_split(
        args, process, train_set, augment.Compose(crop, flip, colours), embed, args.views, "train"
    )
    (bank,), _ = embed_split(args, process, train_set, plain, embed, 1, "train as it is")
    (val,), val_targets = embed_split(args, process, val_set, plain, embed, 1, "val")
    embedded = time.perf_counter() - began

    began, classes, generator = time.perf_counter(), len(train_set.classes), torch.Generator().manual_seed(args.seed)
    result = dict(facts, data=args.data, pictures=len(train_set), classes=classes, views=args.views, seed=args.seed)
    found = metrics.knn(bank, targets, val, val_targets, classes, args.knn_k, chunk_elements=2**25)
    result |= dict(zip(("knn_acc1", "knn_acc5"), map(float, found)), knn_k=args.knn_k)
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
    result |= {"acc1": result["linear_100"], "linear": linear, "rates": list(RATES)}
    first, second = (seen[0], seen[1]) if args.views > 1 else (seen[0], bank_scaled)
    result |= {"alignment": alignment(first, second), "uniformity": uniformity(val), "rankme": rankme(bank)}
    result |= {"dimensions": bank.shape[1], "embedding_seconds": embedded, "other_seconds": time.perf_counter() - began}
    return result, scores(first, second, generator)


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


def worker(args, process: processes.Process) -> None:
    if process.world_size > 1:
        raise UsageError("this runs in one process: omit --multiprocessing-distributed and --nproc")
    demo.ensure_for(args, process)
    log = run.Run(args.out, args, process, tensorboard=False)
    try:
        result, (positive, negative) = evaluate(args, process)
        result["label"] = args.label or os.path.basename(os.path.dirname(result["pretrained"]))
        print(f"\n{result['label']}: {result['arch']}, {result['pretrained']}\n\n{table(result)}\n")
        if result["acc1"] < result["knn_acc1"] - 0.5:
            both = f"the linear evaluation ({result['acc1']:.2f}) lies below k-NN ({result['knn_acc1']:.2f})"
            log.say(f"warning: {both}: a probe that is not tuned; try more --epochs or --views")
        draw_scores(os.path.join(args.out, "scores.png"), positive, negative, result["label"])
        log.result(**result)
    finally:
        log.close()


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
