#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by MoCo or InsDis: a classifier on one frozen layer.

This is the protocol published with Contrastive Multiview Coding. The first command follows
`train_moco_ins.py --demo --moco`, the second one is for ImageNet-100:

    python moco_insdis/eval_moco_ins.py --demo
    python moco_insdis/eval_moco_ins.py --data_folder IMAGENET100 --model resnet50 \\
        --learning_rate 10 --model_path runs/moco_insdis
"""

import os
import sys
from collections import OrderedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    UsageError,
    UserError,
    augment,
    backbones,
    cli,
    inputs,
    launch,
    options,
    schedule,
)
from moco_insdis import train_moco_ins
from moco_insdis.networks import MODELS, backbone, normalize, synchronised
from preprocess import demo
from runner import checkpoint, layouts, linear, loop, pretrained, training
from runner.trunks import name_of

# {layer: side to which its map is averaged}; other layers are classified as they are.
POOLED = {1: 8, 2: 6, 3: 4, 4: 3}
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-moco-insdis",
        save_path="runs/try-moco-insdis-linear", workers=2, epochs=40, lr_decay_epochs="24,32",
        lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4, aug="NULL",
        print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/* and val/CLASS/*"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    trees = ("imagenet100", "imagenet", "folder")
    options.add_data_arguments(g, trees, default="imagenet100")
    text = "least share of the picture that a crop covers; default .2, on imagenet .08"
    g.add_argument("--crop", type=cli.share, help=text)
    text = "CJ: greyscale and colour jitter here too, as published; NULL: crop and flip"
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ", help=text)

    g = parser.add_argument_group("model")
    text = "pre-training checkpoint, or a run folder, or a folder of those: the newest"
    g.add_argument("--model_path", metavar="PATH", help=text)
    text = "network; default: that of the checkpoint, or resnet50"
    g.add_argument("--model", "--arch", choices=list(MODELS), help=text)
    text = "1 stem, 2-5 stages, 6 pooled"
    g.add_argument("--layer", type=int, default=6, help=text)
    text = "batch-norm without parameters before the classifier"
    g.add_argument("--bn", action="store_true", help=text)
    text = "with --bn: batch-norm statistics over all processes"
    g.add_argument("--syncBN", action="store_true", help=text)

    g = parser.add_argument_group("optimisation")
    text = "not scaled with the batch; published results: 10 on ImageNet-100, 30 on ImageNet"
    options.add_linear_sgd_arguments(g, text)
    text = "cosine schedule down to rate^3 / 10 of the learning rate"
    g.add_argument("--cosine", action="store_true", help=text)
    g.add_argument("--warm", action="store_true", help=schedule.WARM)
    g.add_argument("--adam", action="store_true", help="Adam instead of SGD")
    g.add_argument("--beta1", type=cli.fraction, default=0.5, help="beta 1 of Adam")
    g.add_argument("--beta2", type=cli.fraction, default=0.999, help="beta 2 of Adam")
    linear.add_arguments(g)
    options.add_linear_run_arguments(parser, "./runs/moco_insdis_linear")
    options.add_hardware_arguments(parser, opt_level=True)
    parser.ignore("TensorBoard gets a point every epoch", "tb_freq")
    args = parser.parse_args(argv)
    options.check(args)
    settle(args)
    return cli.freeze(args)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(options.NO_DATA)
    if args.model_path is None:
        raise UsageError(
            "no network: give --model_path CHECKPOINT.pth, written by train_moco_ins.py"
        )
    if not 1 <= args.layer <= 6:
        raise UsageError(f"--layer {args.layer}: a ResNet has the layers 1 (stem) to 6 (pooled)")
    if args.syncBN and not args.bn:
        raise UsageError(
            "--syncBN has no batch-norm to synchronise: the frozen network uses stored statistics "
            "and the classifier has none; add --bn"
        )
    for flag in ("beta1", "beta2"):
        if flag in args.typed and not args.adam:
            raise UsageError(f"--{flag} belongs to --adam; add that, or omit it")
    if args.adam and "momentum" in args.typed:
        raise UsageError("--momentum belongs to SGD; Adam has --beta1 and --beta2")
    if args.cosine and "lr_decay_epochs" in args.typed:
        raise UsageError("--cosine has no --lr_decay_epochs; omit one of the two")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.crop is None:  # the published code takes .08 there, whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" else 0.2


def read(args):
    """Return the pre-training checkpoint, and the flags with the settings of its network."""
    first = "moco_insdis/train_moco_ins.py"
    if args.demo:
        first += " --demo"
    saved = pretrained.read(args.model_path, "--model_path", first)
    opt = saved.setdefault("opt", {})
    found = name_of(layouts.backbone(saved))  # of another program
    default = found if found in MODELS else "resnet50"
    model = pretrained.agreed(args, "model", opt.get("model"), saved.path, default)
    if model not in MODELS:
        names = ", ".join(MODELS)
        raise UserError(
            f"{saved.path} was trained with --model {model}, which is not one of {names}"
        )
    side = pretrained.input_res(args, opt)
    args = cli.replace(args, model=model, input_res=side, **pretrained.footing(opt))
    if args.footing == "common":
        for flag in ("crop", "aug"):
            if flag in args.typed:
                raise UserError(
                    f"{saved.path} was trained with --footing common, which has its own view: "
                    f"omit --{flag}"
                )
        args = cli.replace(args, crop=0.08, aug="footing")
    return saved, args


def files(args, saved):
    """Return the run folder (published name and layer), its files, and the best epoch's file."""
    name = (
        f"{pretrained.name_of(saved.path)}_bsz_{args.batch_size}_lr_{args.learning_rate}"
        f"_decay_{args.weight_decay}_crop_{args.crop}"
    )
    if args.amp:
        name += f"_amp_{args.opt_level}"
    name += f"_aug_{args.aug}"
    suffixes = {"bn": "_useBN", "adam": "_useAdam", "cosine": "_cosine", "warm": "_warm"}
    name += "".join(suffix for flag, suffix in suffixes.items() if getattr(args, flag))
    folder = options.run_folder(args, args.save_path, f"{name}_layer{args.layer}")
    return folder, linear.files(args, __file__, folder), f"{args.model}_layer{args.layer}.pth"


class LinearClassifier(nn.Module):
    """One linear layer under its published name; weights start as N(0, 0.01), the bias at 0."""

    def __init__(self, features: int, classes: int, bn: bool):
        super().__init__()
        layers = OrderedDict()
        if bn:
            layers["BatchNorm"] = nn.BatchNorm1d(features, affine=False)
        layers["LiniearClassifier"] = layer = nn.Linear(features, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        self.classifier = nn.Sequential(layers)

    def forward(self, feat):
        return self.classifier(feat)


def build_network(saved, args, classes: int, process: launch.Process):
    """Return the frozen (query) network, and a fresh classifier on its layer."""
    state = layouts.backbone(saved)
    stem, head = state.get("conv1.weight"), state.get("fc.weight", ())
    if stem is None:
        names = ", ".join(list(state)[:3])
        raise UserError(
            f"{saved.path} holds no network of this family (it has {names}): "
            "tools/evaluate.py judges the networks of all scripts"
        )
    network = backbone(args.model, dim=len(head), small_stem=stem.shape[-1] == 3)
    if not len(head):  # another program's network has no head, or another one
        state = layouts.without_head(state)
    checkpoint.load_into(network, state, saved.path, flag="--model")
    network = linear.freeze(network, process)
    image = torch.zeros(1, 3, args.input_res, args.input_res, device=process.device)
    features = embed(network, image, args).shape[1]
    classifier = LinearClassifier(features, classes, args.bn)
    if args.syncBN:
        classifier = synchronised(classifier, process)
    return network, classifier.to(process.device)


def pool(feat, layer: int):
    """Return the feature, averaged to the published size: (N, D)."""
    side = POOLED.get(layer)
    if side and feat.shape[-1] > side:  # small pictures give small maps
        feat = F.adaptive_avg_pool2d(feat, side)
    return feat.flatten(1)


def embed(network, images, args):
    return pool(backbones.feature(network, images, args.layer).float(), args.layer)


def recipe(args, saved, train: bool) -> augment.Compose:
    """Return the pre-training's view with this run's --aug, or the centre crop for val/."""
    return train_moco_ins.recipe(args) if train else inputs.plain_view(args, normalize(vars(args)))


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate; the published cosine is an epoch ahead and ends at its floor."""
    lr = schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)
    if args.cosine:
        floor = args.learning_rate * args.lr_decay_rate**3 * 0.1
        lr = schedule.cosine(args.learning_rate, at.epoch + 1, args.epochs, floor)
    return train_moco_ins.warmed(args, lr, at)


def build_optimizer(parameters, args) -> torch.optim.Optimizer:
    if not args.adam:
        return training.sgd(parameters, args)
    return torch.optim.Adam(
        parameters,
        lr=args.learning_rate,
        betas=(args.beta1, args.beta2),
        weight_decay=args.weight_decay,
    )


def label(args, saved) -> str | None:
    """Return "MoCo, softmax, K 16384" where the checkpoint has the flags of its run."""
    opt = saved["opt"]
    if "softmax" not in opt:
        return None
    method = "MoCo" if opt.get("moco") else "InsDis"
    loss = "softmax" if opt["softmax"] else f"NCE (Z {opt.get('nce_z', 'oneshot')})"
    return f"{method}, {loss}, K {opt.get('nce_k')}"


def is_published(saved) -> bool:
    """Return whether a classifier's file looks like one of the published script."""
    opt = saved.get("opt") or {}
    return "crop" in opt and "view" not in opt


def flags_of(saved) -> dict:
    """Return the flags of a classifier; a published file may have --bn, which did nothing there."""
    opt = saved.get("opt") or {}
    return {**opt, "bn": any(".BatchNorm." in name for name in saved["classifier"])}


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="model_path",
    read=read,
    files=files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=build_optimizer,
    rate=learning_rate,
    label=label,
    result=lambda args, saved: {"layer": args.layer},
    derived=lambda args, saved, network, classifier: {
        "model": args.model,
        "layer": args.layer,
        "crop": args.crop,
    },
    published="moco_insdis/published.json",
    protocol=lambda args: "linear Adam" if args.adam else "linear SGD",
    reopened=("model", "layer", "input_res", "bn"),
    is_published=is_published,
    flags_of=flags_of,
)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    linear.run(SPEC, args, process)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
