#!/usr/bin/env python
"""Judge a backbone: k-NN, tuned linear evaluation, few labels, geometry, scores.

Takes any backbone (a pre-training of any paper here or of another program, such as solo-learn,
MoCo v3, DINO, VISSL or lightly, or the state dict of a torchvision or timm ResNet) and any data set
with labels. Writes one table, result.json and a picture of the scores into the run folder:

    python tools/evaluate.py runs/try DATA
    python tools/evaluate.py resnet50.pth IMAGENET100 --input-res 224 --views 1 --out runs/resnet
    python tools/evaluate.py --demo runs/try

--untrained judges random weights in the same network: what is known before any training.

Every training picture is embedded as it is and in --views crops. Linear classifiers of all learning
rates are then trained together on these features, less their mean, with all, 10 % and 1 % of the
labels. The rate is chosen on a tenth of the training pictures that is kept back, never on val. The
input is as large as in the pre-training, unless --input-res says otherwise.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from common import (
    UsageError,
    UserError,
    augment,
    cli,
    files,
    inputs,
    launch,
    options,
    printable,
    sets,
)
from common.precision import Precision
from preprocess import demo
from runner import checkpoint, features, knn, layouts, pretrained
from runner.folder import RunFolder
from runner.trunks import Trunk
from tools import export, probes, robustness_sets
from tools.report import layout

PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", input_res=32, workers=2, views=2, epochs=30,
        out="runs/try-evaluation",
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    about = "checkpoint or run folder of a pre-training, or a state dict of a ResNet"
    parser.add_argument("checkpoint", metavar="CKPT", help=about)
    g = parser.add_argument_group("data")
    about = "data set root with train/CLASS/* and val/CLASS/*"
    g.add_argument("data", nargs="?", help=about)
    options.add_data_arguments(g, workers=8)
    text = "shifted sets of the same classes, which the tuned linear classifier and k-NN judge too"
    robustness_sets.add_set_arguments(parser.add_argument_group("data: " + text))
    parser.set_defaults(cue_conflict=None, extra_corruptions=False)
    g = parser.add_argument_group("evaluation")
    about = "augmented views (crop, flip) of a training picture"
    g.add_argument("--views", type=cli.positive_int, default=2, help=about)
    about = "epochs of the linear classifiers, at most 10000"
    g.add_argument("--epochs", type=cli.number(int, 1, 10_000), default=60, help=about)
    about = "pictures at once"
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help=about)
    options.add_knn_arguments(g)
    about = "judge random weights in this network, the floor of its numbers"
    g.add_argument("--untrained", action="store_true", help=about)
    about = "seed of views, batches, what is kept back, and untrained weights"
    g.add_argument("--seed", type=cli.seed, default=0, help=about)
    g = parser.add_argument_group("run")
    about = "folder of result.json and scores.png; default: runs/evaluation/ and the label"
    g.add_argument("--out", help=about)
    about = "replace another network's evaluation in that folder"
    g.add_argument("--overwrite", action="store_true", help=about)
    about = "name of this network in the table; default: its run folder, or its file"
    g.add_argument("--label", help=about)
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None:
        raise UsageError(
            "no data: give DATA, a tree with train/CLASS/* and val/CLASS/*, or --demo for "
            "built-in pictures"
        )
    return cli.freeze(args)


# ----------------------------------------------------------------------------------------- network


class Backbone(nn.Module):
    """The ResNets of a checkpoint, each on its channels: images (N, C, S, S) -> features (N, D).

    A picture's feature is that of all of them side by side, each pooled over the last stage.
    """

    def __init__(self, trunks: list[Trunk]):
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.channels = [trunk.in_channels for trunk in trunks]

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.trunks, x.split(self.channels, 1))
        return torch.cat([trunk(part)[-1].mean((2, 3)) for trunk, part in parts], 1)


def open_backbone(path: str, device: torch.device) -> tuple[Backbone, tuple, dict, dict]:
    """Open the network of a checkpoint.

    Returns (network, operations of common.augment that take images in [0, 1] to its input, what
    result.json says of it, flags of its pre-training). Raises UserError where there is no ResNet.
    """
    file = export.find(Path(path))
    saved = checkpoint.Saved(file)
    if "classifier" in saved:
        raise UserError(f"{file} is a classifier without its network; give the network")
    with saved.within():
        return _opened(saved, str(file), device)


def _opened(
    saved: checkpoint.Saved, file: str, device: torch.device
) -> tuple[Backbone, tuple, dict, dict]:
    """Return what `open_backbone` does, of a checkpoint that has been read."""
    state = layouts.backbone(saved)
    towers = [f"{name}." for name in layouts.towers(state)]
    if not any(f"{tower}conv1.weight" in state for tower in ("", *towers)):
        names = printable(", ".join(list(state)[:3]))
        way_out = "this evaluates ResNets"
        if saved.paper:
            way_out = f"evaluate it with {saved.paper.evaluation}"
        raise UserError(f"{file} holds no ResNet (it has {names}): {way_out}")
    operations, by_tower = layouts.open_trunks(saved, state, file)
    trunks = list(by_tower.values())
    network = Backbone(trunks).requires_grad_(False).eval()
    origin = {
        "arch": trunks[0].arch,
        "towers": len(trunks),
        "pretrained": file,
        "colours": repr(operations),
        **saved.how_far(),
    }
    flags = saved.get("opt") or saved.get("args") or {}
    return network.to(device, memory_format=torch.channels_last), operations, origin, flags


# ---------------------------------------------------------------------------------------- features


def embed_split(
    args, process, pictures, view, embed, views: int, title: str
) -> tuple[Tensor, Tensor]:
    """Return features (views, n, D) and targets (n,) of all pictures, in order."""
    print(f"{title}:", flush=True)
    loader = inputs.evaluation_loader(
        args, process, pictures, view, args.batch_size, seed=args.seed
    )
    remedy = "use fewer pictures, or --views 1"
    cached = features.CachedViews(
        embed, loader, views, args.seed, 10, show=True, flag="--views", remedy=remedy
    )
    return cached.features, cached.targets


def view_of(name: str, pictures: sets.PictureSet, plain: augment.Compose) -> augment.Compose:
    """Return the view of a test set, which leaves out a crop that its pictures already have."""
    is_cropped = name in ("corruption", "stylized")
    crop = robustness_sets.geometry("auto", plain.geometry, pictures, is_cropped)
    return augment.Compose(crop, *plain.ops)


def evaluate(
    args, process, network, operations, train_set, val_sets: dict[str, sets.PictureSet]
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """Return what result.json says of the features, and the two sets of cosines.

    val_sets: val, named "clean", and the shifted sets.
    """
    precision = Precision(args.amp, process.device)

    def embed(images: Tensor) -> Tensor:
        with precision.autocast():
            return network(images)

    plain = inputs.plain_view(args, *operations)
    crop = augment.RandomResizedCrop(args.input_res)
    augmented = augment.Compose(crop, augment.RandomHorizontalFlip(), *operations)
    began = time.perf_counter()
    seen, targets = embed_split(args, process, train_set, augmented, embed, args.views, "train")
    (bank,), _ = embed_split(args, process, train_set, plain, embed, 1, "train as it is")
    judged = {}
    for name, pictures in val_sets.items():
        view = view_of(name, pictures, plain)
        title = "val" if name == "clean" else name
        (embedded,), labels = embed_split(args, process, pictures, view, embed, 1, title)
        judged[name] = (embedded, labels)
    embedding_seconds = time.perf_counter() - began
    classes = len(train_set.classes)
    numbers, cosines = probes.judge(args, seen, targets, bank, judged, classes)
    result = {
        "protocol": probes.PROTOCOL,
        "data": args.data,
        "pictures": len(train_set),
        "classes": classes,
        "views": args.views,
        "seed": args.seed,
        **numbers,
        "embedding_seconds": embedding_seconds,
        "other_seconds": sum(numbers["seconds"].values()),
    }
    return result, cosines


# ------------------------------------------------------------------------------------------ report


def table(result: dict) -> str:
    """Return the numbers with what they mean, as aligned text."""
    rows = [["k-NN", f"{result['knn_acc1']:.2f}", f"top-1, {result['knn_k']} neighbours"]]
    for share, linear in result["linear"].items():
        accuracy = result[f"linear_{share.rstrip('%')}"]
        name = f"linear, {share} of the labels"
        rows.append([name, f"{accuracy:.2f}", f"top-1, rate {linear['rate']:.3g}"])
    for name in robustness_sets.SETS:
        if name in result:
            about = (
                f"top-1 of the linear classifier on all labels; k-NN {result[f'{name}_knn']:.2f}"
            )
            rows.append([name, f"{result[name]:.2f}", about])
    about = "mean squared distance of two views, 0 to 4; less is closer"
    rows.append(["alignment", f"{result['alignment']:.3f}", about])
    about = "0: all features are the same; -4: spread evenly"
    rows.append(["uniformity", f"{result['uniformity']:.3f}", about])
    about = f"effective dimensions of {result['dimensions']}"
    rows.append(["RankMe", f"{result['rankme']:.1f}", about])
    return layout(["", "value", ""], rows, markdown=False)


def warn(log: RunFolder, result: dict) -> None:
    """Say where the linear evaluation looks badly tuned."""
    remedy = "try more --epochs or --views"
    if warning := knn.warning(result["acc1"], result["knn_acc1"], remedy):
        log.say(f"warning: {warning}")
    ends = (probes.RATES[0], probes.RATES[-1])
    shares = [share for share, linear in result["linear"].items() if linear["rate"] in ends]
    if shares:
        log.say(
            f"note: with {', '.join(shares)} of the labels the best rate is an end of those tried: "
            "a better may lie beyond"
        )


def untrained(network: Backbone, seed: int) -> Backbone:
    """Return the same network with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    trunks = [Trunk(trunk.state_dict(), "") for trunk in network.trunks]
    return Backbone(trunks).requires_grad_(False).eval().to(next(network.parameters()).device)


def default_label(file: Path) -> str:
    """Return the name of the run folder in which a file lies, or if it is none the file's name."""
    is_run = (file.parent / "config.json").exists()
    return file.parent.name if is_run else file.stem


def open_folder(args, process: launch.Process, network: str) -> RunFolder:
    """Return the records of this evaluation, in a folder that holds none of another network.

    Raises UsageError where it does, unless --overwrite is given, or where it is a training's.
    """
    folder = Path(args.out)
    if any(folder.glob("*.pth*")):
        raise UsageError(f"--out {folder} is the folder of a training: give the evaluation its own")
    earlier = folder / "result.json"
    is_own = args.demo and "out" not in args.typed
    if earlier.exists() and not (args.overwrite or is_own):
        of = files.read_json(earlier).get("pretrained")
        if of != network:
            raise UsageError(
                f"{folder} holds the evaluation of {of}: choose another --out, or pass --overwrite"
            )
    earlier.unlink(missing_ok=True)
    return RunFolder(folder, args, process, tensorboard=False)


def worker(args, process: launch.Process) -> None:
    if process.world_size > 1:
        raise UsageError("this runs in one process: omit --multiprocessing-distributed and --nproc")
    demo.ensure_for(args, process)
    network, operations, origin, flags = open_backbone(args.checkpoint, process.device)
    with checkpoint.in_one_line(lambda: f"{origin['pretrained']}: its flags"):
        args = cli.replace(args, input_res=pretrained.input_res(args, flags))
    if args.untrained:
        network = untrained(network, args.seed)
        kept = {key: origin[key] for key in ("arch", "towers")}
        origin = kept | {"pretrained": "random weights"}
    train_set = inputs.open_split(args, "train")
    if len(train_set.classes) < 2 or (train_set.targets < 0).any():
        raise UsageError(f"{args.data}: needs the class of every picture, and two classes or more")
    if len(train_set) <= len(train_set.classes):
        raise UsageError(f"{args.data}: needs two training pictures or more of a class")
    opened = robustness_sets.open_sets(args, train_set.classes)
    val_sets = {name: pictures for name, (_, pictures, _) in opened.items()}
    label = args.label or default_label(Path(origin["pretrained"]).resolve())
    args = cli.replace(args, out=args.out or os.path.join("runs/evaluation", label))
    log = open_folder(args, process, origin["pretrained"])
    try:
        result, cosines = evaluate(args, process, network, operations, train_set, val_sets)
        title = f"{label}: {origin['arch']}, {origin['pretrained']}"
        print(f"\n{title}\n\n{table(result)}\n")
        warn(log, result)
        log.result(**origin, **result, label=label)
        probes.draw_scores(os.path.join(args.out, "scores.png"), *cosines, label)
    finally:
        log.close()


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
