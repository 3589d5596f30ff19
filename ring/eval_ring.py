#!/usr/bin/env python
"""Evaluation of networks pre-trained by train_ring.py: linear, nearest neighbours, transfer.

All use the frozen pooled feature (of both towers of CMC). The first command follows
`train_ring.py --demo`; the second one has the published settings; the third one makes a table over
several data sets, in the place of the paper's Meta-Dataset:

    python ring/eval_ring.py --demo
    python ring/eval_ring.py --root data --protocol released \\
        --model_path runs/ring/pretrain_ir_ring_cifar10
    python ring/eval_ring.py --model_path runs/ring/pretrain_ir_ring_cifar10 \\
        --transfer DTD SVHN Omniglot
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from common import UsageError, augment, backbones, cli, files, inputs, launch, options, schedule
from common.precision import Precision
from preprocess import demo
from ring import nearest, networks, released, train_ring, transfer
from ring.views import SIDES, last_operation
from runner import checkpoint, folds, knn, linear, loop, pretrained, training
from runner.folder import RunFolder, refuse_to_overwrite

PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-ring", workers=2, epochs=40,
        save_path="runs/try-ring-linear", batch_size=128, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = (
        "data of the pre-training: tree with train/ and val/, or where torchvision keeps its sets"
    )
    g.add_argument("--root", "--data", dest="data", help=text)
    options.add_data_arguments(g, default=None, workers=8)
    names = ", ".join(transfer.SETS)
    text = f"data sets to transfer to: class folders (PATH, NAME=PATH), or torchvision's {names}"
    g.add_argument("--transfer", nargs="+", metavar="NAME[=PATH]", default=[], help=text)
    text = "where torchvision keeps the sets that are given without PATH"
    g.add_argument("--transfer-root", default="data", help=text)

    g = parser.add_argument_group("model")
    text = "pre-training checkpoint, or a run folder, or a folder of those: the newest"
    g.add_argument("--model_path", metavar="PATH", help=text)
    text = "augmentation of the pre-training; default: that of the checkpoint or its config.json"
    g.add_argument("--augmentation", choices=list(SIDES), help=text)

    g = parser.add_argument_group("evaluation")
    text = (
        "standard: network in evaluation mode, crop and flip; released: network in training mode "
        "(its batch-norm statistics move), views of the pre-training, constant learning rate"
    )
    g.add_argument("--protocol", choices=list(released.PROTOCOLS), default="standard", help=text)
    text = "evaluate nearest neighbours only, without training a classifier"
    g.add_argument("--nn-only", action="store_true", help=text)
    text = "not scaled with the batch; default .5, released .01"
    usual = {"epochs": 100, "learning_rate": None, "weight_decay": None, "lr_decay_epochs": None}
    options.add_sgd_arguments(g, text, batch_size=256, **usual)
    linear.add_arguments(g)
    folds.add_argument(g)

    g = parser.add_argument_group("run")
    text = "every data set gets a folder of its own in here"
    g.add_argument("--save_path", "--out", default="./runs/ring_linear", help=text)
    options.add_name_argument(g, "made of its settings, and the seed where one is typed")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    options.check(args)
    settle(args)
    return cli.freeze(args)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    args.transfer = transfer.parse(args.transfer, args.transfer_root)
    if args.data is None and not args.transfer:
        raise UsageError("no data: give --root (that of the pre-training), --transfer, or --demo")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT, written by train_ring.py")
    if args.transfer and args.resume not in ("", "auto"):
        raise UsageError(
            f"--resume {args.resume}: with --transfer only auto, which continues every data set"
        )
    released.settle(args)


def read(args):
    """Return the pre-training checkpoint, and the flags with the settings of its network."""
    first = "ring/train_ring.py --demo" if args.demo else "ring/train_ring.py"
    saved = pretrained.read(args.model_path, "--model_path", first)
    with saved.within():
        if saved.paper is None:
            networks.adopt(saved)
        opt = saved.get("opt") or {}
        if "method" not in opt:
            opt = saved["opt"] = released.settings(saved, SIDES)
        augmentation = args.augmentation or opt.get("augmentation", "v1")
        input_res = args.input_res
        if "input_res" not in args.typed:
            input_res = opt.get("input_res")
            if not input_res or "augmentation" in args.typed:
                input_res = SIDES[augmentation]
        return saved, cli.replace(
            args,
            method=opt["method"],
            view=opt.get("view", "Lab"),
            augmentation=augmentation,
            dataset=args.dataset or opt.get("dataset", "folder"),
            input_res=input_res,
            model=networks.arch(saved),
            **pretrained.footing(opt),
        )


def run_files(args, saved):
    """Return the folder of this data set, its files, and the best epoch's file."""
    own = loop.Files(__file__, last="current.pth", same=("protocol",), by_epoch=True)
    return args.folder, own, "best.pth"


def build_network(saved, args, classes: int, process: launch.Process):
    """Return the frozen network, and a fresh classifier on its pooled feature."""
    with torch.random.fork_rng(devices=[]):  # so that the classifier follows from the seed alone
        network = networks.of_checkpoint(saved)
    classifier = networks.linear(network, classes).to(process.device)
    return linear.freeze(network, process), classifier


def embed(network, images, args, layer: int = nearest.POOLED):
    """Return features (N, D) in float32; those of CMC's towers are side by side."""
    feat = backbones.feature(network, images, layer)
    if isinstance(feat, tuple):
        return torch.cat([part.float() for part in feat], 1)
    return feat.float()


def recipe(args, saved, train: bool) -> augment.Compose:
    """Return crop and flip (released: the pre-training's view), or the plain view for val/."""
    if not train:
        return inputs.plain_view(args, last_operation(args))
    if args.protocol == "released":
        return train_ring.recipe(args)
    crop = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), last_operation(args))


def learning_rate(args, at: loop.At) -> float:
    return schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)


def load(network, classifier, saved) -> None:
    """Load a trained classifier, and the batch-norm statistics that its protocol has moved."""
    checkpoint.load_into(classifier, saved["classifier"], saved.path)
    if (saved.get("opt") or {}).get("protocol") == "released":
        released.restore(network, saved)


def label(args, saved) -> str | None:
    """Return "IR ring" where the checkpoint has the flags of its run."""
    opt = saved["opt"]
    names = {"ir": "IR", "cmc": "CMC", "moco": "MoCo"}
    return f"{names[opt['method']]} {opt['negatives']}" if "negatives" in opt else None


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="model_path",
    read=read,
    files=run_files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=training.sgd,
    rate=learning_rate,
    label=label,
    load=load,
    # The digest is of the pre-trained network, before its statistics have moved.
    digest=lambda saved, network: checkpoint.fingerprint(networks.parameters(saved)),
    result=lambda args, saved: {"method": args.method},
    derived=lambda args, *_: {"method": args.method, "protocol": args.protocol},
    protocol=released.protocol,
    argv=("--root=-",),
    reopened=("augmentation", "protocol", "input_res"),
)
RELEASED = dataclasses.replace(SPEC, method=released.Released, drop_last=True)


# ------------------------------------------------------------------------- several data sets


def neighbours(args, process, saved, network, pictures, voters) -> tuple[dict, str]:
    """Return the accuracies of nearest neighbours, and a note to print.

    pictures: the training set and the set that is classified. voters: the pictures that vote, a
    fold of the training set or all of it. The memory bank is used for the pre-training's own data
    set alone.
    """
    precision = Precision.of(args, process.device)

    def by_layer(images, layer):
        with precision.autocast():
            return embed(network, images, args, layer)

    view = inputs.plain_view(args, last_operation(args))
    banks, labels, note = [], None, ""
    with saved.within():
        if not args.is_transfer:
            banks, labels, note = nearest.banks(saved, pictures[0], args.dataset)
        both = voters, pictures[1]
        return nearest.neighbours(args, process, by_layer, view, both, banks, labels), note


def evaluate(args, process, saved, pictures) -> dict:
    """Train and evaluate a classifier on one data set; return its accuracies."""

    def look(job, network, embed) -> dict:
        values = knn.kept(job)
        if not values:
            voters = job.source.dataset
            values, note = neighbours(args, process, saved, network, pictures, voters)
            if note:
                job.log.say(note)
        knn.keep(job, job.method, values)
        words = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
        job.log.say(f"{os.path.basename(args.folder)}: {words}")
        return values

    spec = RELEASED if args.protocol == "released" else SPEC
    if args.stl10_folds and args.dataset == "stl10":
        return folds.fit(spec, args, process, saved, pictures, look)
    method = linear.fit(spec, args, process, saved, lambda *_: pictures, look)
    scores = {"acc1": method.scores["acc1"], "acc1_best": method.scores["best_acc1"]}
    return method.recorded["neighbours"] | scores


def evaluate_neighbours(args, process, saved, pictures, row: dict) -> dict:
    """Write result-nn.json of one data set (--nn-only); return its accuracies."""
    log = RunFolder(args.folder, args, process, suffix="-nn", tensorboard=False)
    network, _ = build_network(saved, args, 1, process)
    values, note = neighbours(args, process, saved, network, pictures, pictures[0])
    if note:
        log.say(note)
    log.result(
        **row,
        **values,
        protocol="nearest neighbours alone",
        network=saved.path,
        pretrained_epochs=saved.get("epoch"),
        method=args.method,
        precision=str(Precision.of(args, process.device)),
        split="val",
    )
    log.close()
    return values


def worker(args, process: launch.Process) -> None:
    if args.protocol == "released" and process.world_size > 1:
        raise UsageError(
            "--protocol released takes batch-norm statistics of the whole batch: run one process"
        )
    demo.ensure_for(args, process)
    saved, args = read(args)
    experiment = os.path.basename(released.experiment(saved.path))
    folder = options.run_folder(args, args.save_path, f"{experiment}_{args.protocol}")
    runs = transfer.data_sets(cli.replace(args, folder=folder))
    written = "result-nn.json" if args.nn_only else "current.pth"
    for own in runs.values():
        refuse_to_overwrite(own.folder, written, args.resume, args.overwrite)
    if process.is_main:
        files.sweep(folder)
    if args.stl10_folds:
        folds.check(args.dataset)
    opened = {
        name: transfer.open_pictures(own) for name, own in runs.items()
    }  # before anything is computed
    rows = []
    for name, own in runs.items():
        train_set, val_set = pictures = opened[name]
        classes = len(train_set.classes)
        row = {"data": name, "classes": classes, "train": len(train_set), "val": len(val_set)}
        if args.nn_only:
            row |= evaluate_neighbours(own, process, saved, pictures, row)
        else:
            row |= evaluate(own, process, saved, pictures)
        rows.append(row)
        if process.is_main:
            table = "table-nn.json" if args.nn_only else "table.json"
            files.write_json(Path(folder) / table, {"rows": rows})
    if process.is_main:
        print(transfer.table(rows))


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
