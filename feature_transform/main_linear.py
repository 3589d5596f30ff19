#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by main_contrast.py: a classifier on its encoder.

This is the protocol of PyContrast and its fork (arXiv:2108.02982). The first command follows
`main_contrast.py --demo`, the second one is published, for ImageNet-100:

    python feature_transform/main_linear.py --demo
    python feature_transform/main_linear.py --method MoCov2 --data_folder IMAGENET \\
        --dataset imagenet100 --n_class 100 --ckpt runs/feature_transform/RUN/current.pth \\
        --multiprocessing-distributed --world-size 1 --rank 0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from torch import nn

from common import UsageError, UserError, augment, cli, launch, options, schedule
from feature_transform import checkpoints, networks, views
from preprocess import demo
from runner import checkpoint, layouts, linear, loop, pretrained, training

OF_THE_CHECKPOINT = (
    "method", "mem", "jigsaw", "head", "feat_dim", "-d", "nce_k", "-k", "nce_m", "-m", "nce_t",
    "-t", "alpha",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", ckpt="runs/try-feature-transform",
        save_path="runs/try-feature-transform-linear", workers=2, epochs=40,
        lr_decay_epochs="24,32", learning_rate=5.0, batch_size=128, cache_views=4, print_freq=100,
        seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/* and val/CLASS/*"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    trees = ("imagenet100", "imagenet", "folder")
    options.add_data_arguments(g, trees, default="imagenet100", workers=8)
    text = "the published spelling of --class-list; default for imagenet100: its 100 classes"
    g.add_argument("--imagenet100path", dest="class_list", metavar="FILE", help=text)
    text = "number of classes, which is checked; default: not checked"
    g.add_argument("--n_class", type=cli.positive_int, help=text)
    text = "least share of the picture that a crop covers"
    g.add_argument("--crop", type=cli.share, default=0.2, help=text)
    text = "NULL: crop and flip; RA: RandAugment as well"
    g.add_argument("--aug_linear", choices=["NULL", "RA"], default="NULL", help=text)

    g = parser.add_argument_group("model")
    text = "pre-training checkpoint, or a run folder, or a folder of those: the newest"
    g.add_argument("--ckpt", metavar="PATH", help=text)
    text = "network of the checkpoint, which is checked; default: not checked"
    g.add_argument("--arch", type=networks.arch_name, help=text)
    text = "modality of the checkpoint, which is checked; default: not checked"
    g.add_argument("--modal", choices=list(networks.MODALS), help=text)
    text = "evaluate the key encoder, not the trained one (published: no effect)"
    g.add_argument("--use_ema", action="store_true", help=text)

    g = parser.add_argument_group("optimisation")
    text = "not scaled with the batch"
    options.add_sgd_arguments(g, text, epochs=60, learning_rate=30, weight_decay=0.0)
    text = "cosine schedule per epoch in place of steps, down to the rate after three drops"
    g.add_argument("--cosine", action=cli.OnOff, default=False, help=text)
    g.set_defaults(batch_size=256, lr_decay_epochs=None)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    spellings = ("--model_path", "--save_path", "--out")
    default = "./runs/feature_transform_linear"
    text = "the run gets a folder of its own in here"
    g.add_argument(*spellings, dest="save_path", default=default, help=text)
    options.add_name_argument(g)
    options.add_run_arguments(g, save_freq=20, tb_path=True)
    text = "name of the run in a report; default: made of its settings"
    g.add_argument("--label", help=text)
    options.add_hardware_arguments(parser)
    parser.ignore("the checkpoint determines the network", *OF_THE_CHECKPOINT)
    args = parser.parse_args(argv)
    options.check(args)
    settle(args)
    return cli.freeze(args)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other.

    Where --lr_decay_epochs is not typed it is 30,40,50, or for more than 60 epochs 60,80, the
    published values.
    """
    if args.data is None:
        raise UsageError(options.NO_DATA)
    if args.ckpt is None:
        raise UsageError("no network: give --ckpt CHECKPOINT.pth, written by main_contrast.py")
    if args.cosine and "lr_decay_epochs" in args.typed:
        raise UsageError("--cosine has no --lr_decay_epochs; omit one of the two")
    if args.lr_decay_epochs is None:
        args.lr_decay_epochs = "30,40,50" if args.epochs <= 60 else "60,80"
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)


def read(args):
    """Return the pre-training checkpoint, and the flags with the settings of its network.

    With --use_ema, the entry `model` of the returned checkpoint is its key encoder.
    """
    first = "feature_transform/main_contrast.py"
    saved = pretrained.read(args.ckpt, "--ckpt", f"{first} --demo" if args.demo else first)
    state = checkpoints.backbone_state(saved, args.use_ema)
    arch, modal, _ = checkpoints.described(state, saved.path)
    for flag, value in (("arch", arch), ("modal", modal)):
        typed = getattr(args, flag)
        if typed not in (None, value):
            raise UserError(f"{saved.path} was trained with --{flag} {value}, not {typed}: omit it")
    if args.use_ema:
        saved["model"] = layouts.add_prefix(saved["model_ema"], "module.")
    opt = saved.get("opt") or {}
    side, shared = pretrained.input_res(args, opt), pretrained.footing(opt)
    return saved, cli.replace(args, arch=arch, model=arch, modal=modal, input_res=side, **shared)


def run_name(args, parent: str) -> str:
    """Return the published name of the run folder, with "ema" for the key encoder."""
    parts = [f"{parent}_linear_{args.aug_linear}_{args.crop}_lr{args.learning_rate}"]
    if args.cosine:
        parts.append("cosine")
    parts.append(f"lrdecay{list(args.milestones)}")
    if args.use_ema:
        parts.append("ema")
    return "_".join(parts)


def files(args, saved):
    """Return the run folder, its files, and the best epoch's file."""
    name = run_name(args, pretrained.name_of(saved.path))
    folder = options.run_folder(args, args.save_path, name)
    if len(os.path.basename(folder)) > 240:  # the lock beside it has a longer name
        raise UsageError(
            f"{saved.path}: the name of the run's folder, which contains its own, has more than "
            "240 letters; give --name"
        )
    return folder, linear.files(args, __file__, folder), "best.pth"


def open_sets(args, saved):
    """Return train/ and val/. Raises UsageError unless they have --n_class classes."""
    train_set, val_set = linear.open_both(args, saved)
    count = len(train_set.classes)
    if args.n_class not in (None, count):
        listed = f" in {args.class_list}" if args.class_list else ""
        raise UsageError(
            f"--n_class {args.n_class}: {args.data} has {count} classes{listed}; omit it, or "
            "select the classes with --dataset and --class-list"
        )
    return train_set, val_set


def build_network(saved, args, classes: int, process: launch.Process):
    """Return the frozen encoder, or both towers, and a fresh classifier on the pooled feature."""
    network = checkpoints.encoders(layouts.backbone(saved), saved.path)
    network = linear.freeze(network, process)
    return network, nn.Linear(network.dim, classes).to(process.device)


def embed(network, images, args):
    return network.encode(images).float()


def recipe(args, saved, train: bool) -> augment.Compose:
    """Return crop and flip (RA: and RandAugment) for training, or the centre crop for val/."""
    if not train:
        return views.plain_view(args)
    operations = [augment.RandomHorizontalFlip()]
    if args.aug_linear == "RA":
        operations.append(views.RandAugment(args.modal))
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0))
    return augment.Compose(crop, *operations, *views.last(vars(args)))


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate; the published cosine is an epoch ahead and ends at its floor."""
    if args.cosine:
        floor = args.learning_rate * args.lr_decay_rate**3
        return schedule.cosine(args.learning_rate, at.epoch + 1, args.epochs, floor)
    return schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)


def warn(job, network, embed) -> dict:
    """Warn where the learning rate never drops; return {}, as it adds nothing to the result."""
    args = job.args
    never = args.milestones and min(args.milestones) >= args.epochs
    if never and not args.cosine:
        job.warn(
            f"no milestone of --lr_decay_epochs {args.lr_decay_epochs} lies inside the run of "
            f"{args.epochs} epochs, so the learning rate stays {args.learning_rate:g} to the end"
        )
    return {}


def label(args, saved) -> str | None:
    """Return "MoCov2 + FT posneg, m 0.99" where the checkpoint has the flags of its run."""
    opt = saved.get("opt") or {}
    if "method" not in opt:
        return None
    name = opt["method"]
    if opt.get("mixnorm"):
        name += f" + FT {opt.get('mixnorm_target')}"
    if opt.get("mem") == "moco":
        name += f", m {opt.get('alpha')}"
    return f"{name}, key encoder" if args.use_ema else name


def derived(args, saved, network, classifier) -> dict:
    """Return the values that are printed and recorded at the start."""
    values = {
        "model": args.model,
        "modal": args.modal,
        "features": network.dim,
        "classes": classifier.out_features,
    }
    return values | ({"class_list": args.class_list} if args.class_list else {})


def is_published(saved) -> bool:
    """Return whether a classifier's file looks like one of the published script."""
    names = {name.removeprefix("module.") for name in saved.get("classifier") or {}}
    opt = saved.get("opt")
    return names == {"weight", "bias"} and (opt is None or "aug_linear" in opt)


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="ckpt",
    read=read,
    files=files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=training.sgd,
    rate=learning_rate,
    label=label,
    weights=lambda network, classifier: {
        "classifier": layouts.add_prefix(classifier.state_dict(), "module.")
    },
    load=lambda network, classifier, saved: checkpoint.load_into(
        classifier, layouts.strip_prefix(saved["classifier"]), saved.path
    ),
    result=lambda args, saved: {
        "aug_linear": args.aug_linear,
        "modal": args.modal,
        "use_ema": args.use_ema,
    },
    derived=derived,
    published="feature_transform/published.json",
    reopened=("use_ema", "aug_linear"),
    is_published=is_published,
)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    saved, args = linear.read(SPEC, args)
    args = views.choose_classes(args)
    linear.fit(SPEC, args, process, saved, open_sets, look=warn)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
