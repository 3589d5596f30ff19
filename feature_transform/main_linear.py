#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by main_contrast.py: a linear classifier on its frozen encoder.

The protocol of PyContrast and its fork (2108.02982); after `main_contrast.py --demo`; and the published one on ImageNet-100:

    python feature_transform/main_linear.py --demo
    python feature_transform/main_linear.py --method MoCov2 --data_folder IMAGENET --dataset imagenet100 --n_class 100 \\
        --ckpt runs/feature_transform/RUN/current.pth --multiprocessing-distributed --world-size 1 --rank 0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
from torch import nn

from common import UsageError, UserError, augment, cli, launch, options, schedule
from runner import checkpoint, layouts, linear, loop
from common.precision import Precision
from feature_transform import networks, views
from preprocess import demo

WHAT_IT_IS = ("method", "mem", "jigsaw", "head", "feat_dim", "nce_k", "nce_m", "nce_t", "alpha")
SETTINGS = (  # of the pre-training, which two seeds of one experiment have in common
    "method", "mem", "aug", "head", "nce_t", "nce_k", "alpha", "mixnorm", "mixnorm_target", "mask_distribution", "dim_mask",
    "sep_alpha", "pos_alpha", "neg_alpha", "beta_alpha", "expolation_mask", "postmix_norm", "norm_target", "mix_start_epoch",
    "learning_rate", "batch_size", "cosine", "input_res", "small_stem",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", ckpt="runs/try-feature-transform", save_path="runs/try-feature-transform-linear",
        workers=2, epochs=40, lr_decay_epochs="24,32", learning_rate=5.0, batch_size=128, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100", workers=8)
    about = "as --class-list; default, with --dataset imagenet100 on a tree of ImageNet: preprocess/imagenet100.txt"
    g.add_argument("--imagenet100path", dest="class_list", metavar="FILE", help=about)
    g.add_argument("--n_class", type=cli.positive_int, help="classes there must be; default: as many as there are")
    g.add_argument("--crop", type=cli.share, default=0.2, help="least share of the picture that a crop covers")
    about = "NULL: crop and flip; RA: RandAugment as well"
    g.add_argument("--aug_linear", choices=["NULL", "RA"], default="NULL", help=about)

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint, the authors' or ours, or a run folder, or a folder of one: the newest"
    g.add_argument("--ckpt", metavar="PATH", help=about)
    g.add_argument("--arch", type=networks.arch_name, help="what the checkpoint must be of; default: what it is of")
    g.add_argument("--modal", choices=list(networks.MODALS), help="the same; CMC: two towers, side by side")
    about = "the key encoder, which follows the trained one (published: without effect)"
    g.add_argument("--use_ema", action="store_true", help=about)

    g = parser.add_argument_group("optimisation")
    about = (
        "not scaled with the batch. --lr_decay_epochs is 30,40,50 if not given, of more than 60 epochs 60,80 as published; "
        "default: 30"
    )
    options.add_sgd_arguments(g, about, epochs=60, learning_rate=30, batch_size=256, weight_decay=0.0)
    g.add_argument("--cosine", action=cli.OnOff, default=False, help="cosine down to rate^3 of the learning rate")
    g.set_defaults(lr_decay_epochs=None)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    about = "the run gets a folder of its own in here"
    g.add_argument(
        "--model_path", "--save_path", dest="save_path", default="./runs/feature_transform_linear", help=about
    )
    options.add_name_argument(g)
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g, save_freq=20)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")
    options.add_hardware_arguments(parser)
    parser.ignore("the checkpoint says what its network is", *WHAT_IT_IS)
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/ and val/, or --demo for built-in pictures")
    if args.ckpt is None:
        raise UsageError("no network: give --ckpt CHECKPOINT.pth, written by main_contrast.py")
    if args.cosine and "lr_decay_epochs" in args.typed:
        raise UsageError("--cosine has no --lr_decay_epochs; omit one of the two")
    if args.lr_decay_epochs is None:
        args.lr_decay_epochs = "30,40,50" if args.epochs <= 60 else "60,80"
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    return args


def run_name(args, parent: str) -> str:
    """The published name of the run folder, and whether it is of the key encoder."""
    return (
        f"{parent}_linear_{args.aug_linear}_{args.crop}_lr{args.learning_rate}{'_cosine' * args.cosine}"
        f"_lrdecay{list(args.milestones)}{'_ema' * args.use_ema}"
    )


def read_backbone(args) -> tuple[checkpoint.Saved, dict]:
    """The pre-training checkpoint, and the parameters of the encoder in it. Flags that were typed must agree with it."""
    saved = linear.pretrained(args.ckpt, "--ckpt", f"feature_transform/main_contrast.py{' --demo' * args.demo}")
    state, opt = networks.backbone_state(saved, args.use_ema), saved.get("opt") or {}
    found = networks.described(state, saved.path)
    for flag, value in zip(("arch", "modal"), found):
        if getattr(args, flag) not in (None, value):
            raise UserError(f"{saved.path} is of --{flag} {value}, not {getattr(args, flag)}: omit it")
    args.model = args.arch = found[0]
    args.modal = found[1]
    if "input_res" not in args.typed:
        args.input_res = opt.get("input_res", args.input_res)
    return saved, state


def build_network(state: dict, path: str, process: launch.Process) -> nn.Module:
    """The encoder of the checkpoint, or both towers, frozen and in eval mode."""
    network = networks.encoders(state, path)
    return network.requires_grad_(False).eval().to(process.device, memory_format=torch.channels_last)


def embed(network, images, precision: Precision):
    with precision.autocast():
        return network.encode(images).float()


def recipe(args, train: bool) -> augment.Compose:
    if not train:
        return views.plain_view(args)
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0)), augment.RandomHorizontalFlip()
    more = (views.RandAugment(args.modal),) if args.aug_linear == "RA" else ()
    return augment.Compose(crop, flip, *more, *views.last_operations(args))


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 1. The published cosine is one epoch ahead: the last runs at its floor."""
    if args.cosine:
        return schedule.cosine(args.learning_rate, epoch, args.epochs, args.learning_rate * args.lr_decay_rate**3)
    return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)


class Classifier(linear.Classifier):
    """The published names: those of one linear layer behind data parallelism."""

    def weights(self) -> dict:
        return {"classifier": layouts.add_prefix(self.classifier.state_dict(), "module.")}

    def load_weights(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_into(self.classifier, layouts.strip_prefix(saved["classifier"]), saved.path)


def warn(args, job) -> None:
    inside = [m for m in args.milestones if m < args.epochs]
    if args.milestones and not inside and not args.cosine:
        job.warn(
            f"no milestone of --lr_decay_epochs {args.lr_decay_epochs} lies inside the run of {args.epochs} epochs: the "
            f"learning rate stays {args.learning_rate:g} to the end"
        )


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    saved, state = read_backbone(args)
    views.choose_classes(args)
    name = run_name(args, os.path.basename(os.path.dirname(os.path.abspath(saved.path))))
    folder = options.run_folder(args, args.save_path, name)
    if len(os.path.basename(folder)) > 240:  # the lock and the events beside it have a little more
        raise UsageError(
            f"{saved.path}: with its name the run's folder has one of more than 240 letters: give it a --name"
        )
    events = os.path.join(args.tb_path, os.path.basename(folder)) if args.tb_path else True
    files = dict(last="current.pth", numbered="ckpt_epoch_{}.pth", tensorboard=events, by_epoch=True)
    with loop.Job(args, process, folder, **files) as job:
        train_set = options.open_split(args, "train")
        count = len(train_set.classes)
        if args.n_class not in (None, count):
            listed = f" in {args.class_list}" if args.class_list else ""
            way_out = "omit it, or say with --dataset and --class-list which classes are meant"
            raise UsageError(f"--n_class {args.n_class}: {args.data} has {count} classes{listed}; {way_out}")
        val_set = options.open_split(args, "val", classes=train_set.classes)
        network = build_network(state, saved.path, process)
        classifier = nn.Linear(network.dim, count).to(process.device)
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(classifier.parameters(), **sgd)
        precision = Precision(args.amp, process.device)

        def embedder(images):
            return embed(network, images, precision)

        facts = dict(script="feature_transform/main_linear.py", classes=train_set.classes, network=saved.path)
        facts |= dict(digest=checkpoint.fingerprint(state))
        method = Classifier(network, embedder, classifier, optimizer, process, **facts)
        both = recipe(args, train=True), recipe(args, train=False)
        train_loader, val_loader = linear.loaders(args, process, train_set, val_set, *both)
        facts = dict(val_images=len(val_set), model=args.model, modal=args.modal, features=network.dim, classes=count)
        facts |= dict(network=saved.path, pretrained_epochs=saved.get("epoch"), precision=str(precision))
        job.begin(train_loader, method, **facts, **{"class_list": args.class_list} if args.class_list else {})
        warn(args, job)
        whole = linear.train(job, method, val_loader, lambda epoch, part: learning_rate(args, epoch), "best.pth")
        if whole:
            facts = dict(aug_linear=args.aug_linear, modal=args.modal)
            linear.report(
                job, saved, row_label(saved.get("opt"), args), table="feature_transform/published.json", **facts
            )


def row_label(opt: dict | None, args) -> str | None:
    """ "MoCov2 + FT posneg, m 0.99" from the flags of the pre-training run, where its checkpoint has them."""
    if not opt or "method" not in opt:
        return None
    made = opt["method"] + f" + FT {opt.get('mixnorm_target')}" * bool(opt.get("mixnorm"))
    made += f", m {opt.get('alpha')}" * (opt.get("mem") == "moco")
    return made + ", key encoder" * args.use_ema


def reopen(saved, network: str, input_res: int | None, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there)."""
    opt, weights = saved.get("opt"), layouts.strip_prefix(saved.get("classifier") or {})
    if (
        weights.keys() != {"weight", "bias"} or opt is not None and "aug_linear" not in opt
    ):  # published files have no flags
        return None
    flags = dict(ckpt=network, input_res=input_res or (opt or {}).get("input_res"))
    args = parse_args(["--data_folder=-", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
    args.use_ema = bool((opt or {}).get("use_ema"))
    before, state = read_backbone(args)
    model, then = build_network(state, before.path, process), before.get("opt") or {}
    classifier = nn.Linear(model.dim, len(weights["weight"])).to(process.device)
    checkpoint.load_into(classifier, weights, saved.path)
    facts = dict(
        arch=args.model, outputs=classifier.out_features, input_res=args.input_res, label=row_label(then, args)
    )
    facts |= linear.origin(before) | dict(digest=checkpoint.fingerprint(state))
    facts |= dict(settings={name: then[name] for name in SETTINGS if name in then} | {"use_ema": args.use_ema})
    return lambda images: classifier(embed(model, images, precision)), views.last_operations(args), facts


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
