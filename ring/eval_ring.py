#!/usr/bin/env python
"""Evaluation of a network of train_ring.py: a linear classifier, nearest neighbours, transfer to other data sets.

All on the frozen pooled feature (of CMC on those of both towers). After `train_ring.py --demo`; the published settings; and a
table over several data sets, in the place of the paper's Meta-Dataset:

    python ring/eval_ring.py --demo
    python ring/eval_ring.py --root data --protocol released --model_path runs/ring/pretrain_ir_ring_cifar10
    python ring/eval_ring.py --model_path runs/ring/pretrain_ir_ring_cifar10 --transfer DTD SVHN Omniglot
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
from torch import nn

from common import UsageError, UserError, augment, backbones, cli, files, launch, options, schedule, sets
from runner import checkpoint, linear, loop
from runner.folder import Run, refuse_to_overwrite
from common.precision import Precision
from preprocess import demo
from ring import nearest, networks, released, train_ring, transfer
from ring.method import last_operation, plain_view
from ring.nearest import POOLED

PROTOCOLS = {  # standard: ours; released: TransferSystem of mhw32/contrastive-ring-public (fb3e1c2), config/transfer.json
    "standard": dict(learning_rate=0.5, weight_decay=0.0, drops=(0.6, 0.8)),
    "released": dict(learning_rate=0.01, weight_decay=1e-5, drops=()),
}
SETTINGS = (  # of the pre-training, which two seeds of one experiment have in common
    "k", "t", "m", "thres_outer", "thres_inner", "anneal", "ball_bank_size", "neighbor_views", "conv3x3", "augmentation",
    "view", "batch_size", "learning_rate", "input_res",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-ring", save_path="runs/try-ring-linear", workers=2, epochs=40,
        batch_size=128, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    about = "the data set of the pre-training: where torchvision keeps it, or a tree with train/ and val/"
    g.add_argument("--root", "--data", dest="data", help=about)
    options.add_data_arguments(g, default=None, workers=8)
    about = f"data sets to transfer to: class folders (PATH, NAME=PATH), or of torchvision {', '.join(transfer.SETS)}"
    g.add_argument("--transfer", nargs="+", metavar="NAME[=PATH]", default=[], help=about)
    g.add_argument("--transfer-root", default="data", help="where torchvision keeps those that are given without PATH")

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint, ours or a published .ckpt, or a run folder, or a folder of one: the newest"
    g.add_argument("--model_path", metavar="PATH", help=about)
    about = "augmentation of the pre-training; default: what the checkpoint or the config.json beside it says, or v1"
    g.add_argument("--augmentation", choices=list(train_ring.SIDES), help=about)

    g = parser.add_argument_group("evaluation")
    about = (
        "standard: network in evaluation mode, crop and flip; released: in training mode (its batch-norm statistics move), "
        "augmented as in the pre-training, a constant learning rate"
    )
    g.add_argument("--protocol", choices=list(PROTOCOLS), default="standard", help=about)
    g.add_argument("--nn-only", action="store_true", help="nearest neighbours only: no classifier is trained")
    g.add_argument("--knn-k", type=cli.positive_int, default=200, help="neighbours that vote, weighted")
    about = "not scaled with the batch; default .5, released .01"
    options.add_sgd_arguments(g, about, epochs=100, batch_size=256, learning_rate=None, weight_decay=None)
    g.set_defaults(lr_decay_epochs=None)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/ring_linear", help="every data set gets a folder of its own in here")
    options.add_name_argument(g, "made of its settings, and the seed where one is typed")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)

    options.check(args)
    args.transfer = transfer.parse(args.transfer, args.transfer_root)
    if args.data is None and not args.transfer:
        raise UsageError("no data: give --root (that of the pre-training), --transfer, or --demo")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT, written by train_ring.py")
    if args.transfer and args.resume not in ("", "auto"):
        raise UsageError(f"--resume {args.resume}: with --transfer only auto, which continues every data set")
    own = PROTOCOLS[args.protocol]
    if args.protocol == "released":
        if "cache_views" in args.typed:
            raise UsageError(
                "--cache-views: with --protocol released a feature depends on its batch; omit one of the two"
            )
        args.cache_views = 0
    args.learning_rate = args.learning_rate or own["learning_rate"]
    args.weight_decay = own["weight_decay"] if args.weight_decay is None else args.weight_decay
    drops = [max(1, round(share * args.epochs)) for share in own["drops"]]
    args.milestones = drops if args.lr_decay_epochs is None else schedule.parse_milestones(args.lr_decay_epochs)
    return args


# ---------------------------------------------------------------------------------------------------------- the network


def read_network(args) -> checkpoint.Saved:
    """The pre-training checkpoint, and what it says about its views; typed flags win."""
    saved = linear.pretrained(args.model_path, "--model_path", f"ring/train_ring.py{' --demo' * args.demo}")
    if "classifier" in saved:
        raise UserError(f"{saved.path} is a classifier of this script: give the network to --model_path")
    opt = saved.get("opt") or {}
    if "method" not in opt:
        opt = saved["opt"] = released.settings(saved, train_ring.SIDES)
    args.method, args.view = opt["method"], opt.get("view", "Lab")
    args.augmentation = args.augmentation or opt.get("augmentation", "v1")
    args.dataset = args.dataset or opt.get("dataset", "folder")
    if "input_res" not in args.typed:
        told = "augmentation" not in args.typed and opt.get("input_res")
        args.input_res = told or train_ring.SIDES[args.augmentation]
    return saved


def embed(network: nn.Module, images, precision: Precision, layer: int = POOLED):
    """(N, D) float32; of CMC's towers side by side."""
    with precision.autocast():
        feat = backbones.feature(network, images, layer)
    return torch.cat([f.float() for f in feat], 1) if isinstance(feat, tuple) else feat.float()


def recipe(args, train: bool) -> augment.Compose:
    """Of the training pictures crop and flip (released: all of the pre-training), of the others the whole or the centre."""
    if train and args.protocol == "released":
        return train_ring.recipe(args)
    if not train:
        return plain_view(args)
    crop = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), last_operation(args))


# ------------------------------------------------------------------------------------------------------------- measures


def evaluate(args, process, saved, network, name: str, both, own: bool) -> dict:
    """One data set, in a folder of its own: its row of the table. own: it is the one of the pre-training."""
    folder, precision = os.path.join(args.folder, name), Precision(args.amp, process.device)
    row = dict(data=name, classes=len(both[0].classes), train=len(both[0]), val=len(both[1]))
    facts = dict(network=saved.path, pretrained_epochs=saved.get("epoch"), method=args.method, precision=str(precision))
    banks, labels, note = nearest.banks(saved, both[0], args.dataset == "stl10") if own else ([], None, "")
    moves, digest = args.protocol == "released", checkpoint.fingerprint(network.state_dict())
    network = copy.deepcopy(network) if moves else network

    def neighbours() -> dict:
        def by_layer(images, layer):
            return embed(network, images, precision, layer)

        return nearest.neighbours(args, process, by_layer, recipe(args, False), both, banks, labels)

    if args.nn_only:
        log = Run(folder, args, process, suffix="-nn", tensorboard=False)
        if note:
            log.say(note)
        row |= neighbours()
        log.result(**row, **facts, split="val")
        log.close()
        return row
    with loop.Job(args, process, folder, last="current.pth", same=("protocol",), by_epoch=True) as job:
        classifier, args.model = networks.linear(network, row["classes"])
        classifier.to(process.device)
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(classifier.parameters(), **sgd)

        def embedder(images):
            if network.training != (train := moves and classifier.training):
                network.train(train)
            return embed(network, images, precision)

        kind, made = released.Released if moves else linear.Classifier, dict(classes=both[0].classes, digest=digest)
        made |= dict(script="ring/eval_ring.py", network=saved.path)
        method = kind(network, embedder, classifier, optimizer, process, **made)
        how = dict(shuffle=not args.cache_views, drop_last=moves)
        train_loader = options.make_loader(args, process, both[0], (recipe(args, True),), **how)
        val_loader = options.make_loader(args, process, both[1], (recipe(args, False),), shuffle=False, drop_last=False)
        job.begin(train_loader, method, val_images=len(both[1]), protocol=args.protocol, **facts)
        if note:
            job.log.say(note)
        found = {k: float(v) for k, v in (job.saved or {}).get("neighbours", {}).items()} or neighbours()
        method.facts["neighbours"] = found
        job.log.say(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))

        def rate(epoch: int, part: float) -> float:
            return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)

        if linear.train(job, method, val_loader, rate, "best.pth"):
            linear.report(job, saved, row_label(saved["opt"]), **found, method=args.method, protocol=args.protocol)
        return row | found | {"acc1": method.scores["acc1"], "acc1_best": method.scores["best_acc1"]}


def worker(args, process: launch.Process) -> None:
    if args.protocol == "released" and process.world_size > 1:
        raise UsageError("--protocol released: batch-norm statistics are those of the whole batch: one process")
    demo.ensure_for(args, process)
    saved = read_network(args)
    parent = f"{os.path.basename(released.experiment(saved.path))}_{args.protocol}"
    args.folder = options.run_folder(args, args.save_path, parent)
    network = networks.frozen(saved, process.device)
    places = {} if args.data is None else {args.dataset if args.dataset in sets.TORCHVISION_SETS else "own": args.data}
    if twice := places.keys() & args.transfer.keys():
        raise UsageError(f"--transfer {min(twice)}: is the name of the data set of the pre-training; use NAME=PATH")
    places |= args.transfer
    for name in places:
        written = "result-nn.json" if args.nn_only else "current.pth"
        refuse_to_overwrite(os.path.join(args.folder, name), written, args.resume, args.overwrite)
    opened = {}
    for name, path in places.items():  # all of them before anything is computed
        if name in args.transfer:
            opened[name] = transfer.open_both(name, path)
        else:
            train = options.open_split(args, "train")
            opened[name] = train, options.open_split(args, "val", classes=train.classes)
    rows = []
    for name, both in opened.items():
        mine = copy.copy(args)  # every run has its own seed, and says its own data
        mine.data, mine.dataset = places[name], name if name in args.transfer else args.dataset
        del mine.transfer  # of this run no setting: a resume may ask for other data sets
        rows.append(evaluate(mine, process, saved, network, name, both, name not in args.transfer))
        if process.is_main:
            files.write_json(run.Path(args.folder) / f"table{'-nn' * args.nn_only}.json", {"rows": rows})
    if process.is_main:
        print(transfer.table(rows))


def row_label(opt: dict) -> str | None:
    return f"{opt['method'].upper()} {opt['negatives']}" if "negatives" in opt else None


def reopen(saved, network: str, input_res: int | None, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there)."""
    opt = saved.get("opt") or {}
    if "classifier" not in saved or "protocol" not in opt:
        return None
    flags = dict(model_path=network, augmentation=opt.get("augmentation"), input_res=input_res or opt.get("input_res"))
    args = parse_args(["--root=-", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
    before, weights = read_network(args), saved["classifier"]
    model, then = networks.frozen(before, process.device), before["opt"]
    classifier, arch = networks.linear(model, len(weights["weight"]))
    checkpoint.load_into(classifier.to(process.device), weights, saved.path)
    facts = dict(arch=arch, outputs=classifier.out_features, input_res=args.input_res, label=row_label(then))
    facts |= linear.origin(before) | dict(digest=checkpoint.fingerprint(model.state_dict()), protocol=opt["protocol"])
    facts |= dict(settings={name: then[name] for name in SETTINGS if name in then} | {"protocol": opt["protocol"]})
    if opt["protocol"] == "released":  # on a network whose statistics have moved since
        released.restore(model, saved)
    view = plain_view(args)
    facts["resize"] = view.geometry.resize
    return lambda images: classifier(embed(model, images, precision)), view.ops, facts


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
