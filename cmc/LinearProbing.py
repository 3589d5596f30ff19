#!/usr/bin/env python
"""Linear evaluation of networks pre-trained by CMC: a classifier on one frozen layer of all views.

This is the protocol published with Contrastive Multiview Coding. The first command follows
`train_CMC.py --demo`, the second one is for ImageNet-100:

    python cmc/LinearProbing.py --demo
    python cmc/LinearProbing.py --data_folder IMAGENET100 --dataset imagenet100 \\
        --learning_rate 30 --layer 6 --model_path runs/cmc
"""

import os
import sys
from collections import OrderedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn

from cmc import colour, flags, networks
from cmc.networks import MODELS
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
from preprocess import demo
from runner import checkpoint, layouts, linear, loop, pretrained, training

# {layer: side to which its map is pooled}; other layers are classified as they are.
POOLED = {1: 8, 2: 6, 3: 4, 4: 3}  # of a ResNet, by averages
POOLED_ALEXNET = {1: 10, 2: 6, 3: 5, 4: 5}  # of AlexNet, by maxima
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-cmc",
        save_path="runs/try-cmc-linear", workers=2, epochs=40, lr_decay_epochs="24,32",
        lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/* and val/CLASS/*"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    options.add_data_arguments(g, ("imagenet", "imagenet100", "folder"), default="imagenet")
    text = "least share of the picture that a crop covers; default .2, for a ResNet on imagenet .08"
    g.add_argument("--crop_low", type=cli.share, help=text)

    g = parser.add_argument_group("model")
    text = "pre-training checkpoint, or a run folder, or a folder of those: the newest"
    g.add_argument("--model_path", metavar="PATH", help=text)
    text = "network; default: that of the checkpoint, or alexnet"
    g.add_argument("--model", "--arch", choices=list(MODELS), help=text)
    text = "colour space; default: that of the checkpoint, or Lab"
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, help=text)
    text = "ResNet: 1 stem, 2-5 stages, 6 pooled (default); AlexNet: 1-5 blocks (default 5), 6, 7"
    g.add_argument("--layer", type=int, help=text)

    g = parser.add_argument_group("optimisation")
    text = "not scaled with the batch; published results: AlexNet .1, resnet50v1 and v2 30, v3 50"
    options.add_linear_sgd_arguments(g, text)
    linear.add_arguments(g)
    options.add_linear_run_arguments(parser, "./runs/cmc_linear")
    options.add_hardware_arguments(parser, opt_level=True)
    parser.ignore("TensorBoard gets a point every epoch", "tb_freq")
    parser.ignore("no code reads it", "log")
    parser.ignore("the classifier is trained by SGD", "beta1", "beta2")
    args = parser.parse_args(argv)
    options.check(args)
    if args.data is None:
        raise UsageError(options.NO_DATA)
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT.pth, written by train_CMC.py")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    return cli.freeze(args)


def read(args):
    """Return the pre-training checkpoint, and the flags with the settings of its network."""
    first = "cmc/train_CMC.py --demo" if args.demo else "cmc/train_CMC.py"
    saved = pretrained.read(args.model_path, "--model_path", first)
    opt = saved.setdefault("opt", {})
    model = pretrained.agreed(args, "model", opt.get("model"), saved.path, "alexnet")
    view = pretrained.agreed(args, "view", opt.get("view"), saved.path, "Lab")
    if model not in MODELS:
        names = ", ".join(MODELS)
        raise UserError(
            f"{saved.path} was trained with --model {model}, which is not one of {names}"
        )
    is_alexnet = MODELS[model] is None
    last = 7 if is_alexnet else 6
    layer = args.layer
    if layer is None:  # the published default is 6, which its own AlexNet refuses
        layer = 5 if is_alexnet else 6
    if not 1 <= layer <= last:
        raise UsageError(f"--layer {layer}: --model {model} has the layers 1 to {last}")
    crop_low = args.crop_low
    if crop_low is None:
        crop_low = flags.crop_low(args.dataset, model, opt.get("footing"))
    return saved, cli.replace(
        args,
        model=model,
        view=colour.space_name(view),
        views=opt.get("views"),
        layer=layer,
        crop_low=crop_low,
        input_res=pretrained.input_res(args, opt),
    )


def files(args, saved):
    """Return the run folder (published name and layer), its files, and the best epoch's file."""
    name = (
        f"calibrated_{pretrained.name_of(saved.path)}_bsz_{args.batch_size}_lr_{args.learning_rate}"
        f"_decay_{args.weight_decay}_view_{args.view}"
    )
    if args.amp:
        name += f"_amp_{args.opt_level}"
    name += f"_layer{args.layer}"
    folder = options.run_folder(args, args.save_path, name)
    return folder, linear.files(args, __file__, folder), f"{args.model}_layer{args.layer}.pth"


class LinearClassifier(nn.Module):
    """One linear layer under its published name; weights start as N(0, 0.01), the bias at 0."""

    def __init__(self, features: int, classes: int, model: str):
        super().__init__()
        name = "LinearClassifier" if MODELS[model] is None else "LiniearClassifier"
        layer = nn.Linear(features, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        self.classifier = nn.Sequential(OrderedDict([(name, layer)]))

    def forward(self, feat):
        return self.classifier(feat)


def build_network(saved, args, classes: int, process: launch.Process):
    """Return the frozen networks of all views, and a fresh classifier on their layer."""
    state = layouts.backbone(saved)
    ends = (".fc.weight", ".fc.2.weight", ".fc8.0.weight")  # of a head's last layer
    heads = [v for k, v in state.items() if k.endswith(ends)]
    stems = [v for k, v in state.items() if k.endswith((".conv1.weight", ".conv_block_1.0.weight"))]
    if not heads or not stems:
        names = ", ".join(list(state)[:3])
        raise UserError(
            f"{saved.path} holds no towers of cmc/train_CMC.py (it has {names}): "
            "evaluate a network on RGB with tools/evaluate.py"
        )
    views = colour.chosen_views(args)
    small_stem = stems[0].shape[-1] == 3
    mlp = any(key.endswith(".fc.2.weight") for key in state)
    network = networks.build_network(args.model, views, len(heads[0]), small_stem, mlp)
    checkpoint.load_into(network, state, saved.path)
    network = linear.freeze(network, process)
    image = torch.zeros(1, *backbones.input_shape(network, args.input_res))
    features = embed(network, image.to(process.device), args).shape[1]
    return network, LinearClassifier(features, classes, args.model).to(process.device)


def pool(feats, args):
    """Return the features of all views side by side, pooled to the published size: (N, D)."""
    feat = torch.cat([feat.float() for feat in feats], 1)
    is_alexnet = MODELS[args.model] is None
    sides = POOLED_ALEXNET if is_alexnet else POOLED
    pooling = F.adaptive_max_pool2d if is_alexnet else F.adaptive_avg_pool2d
    side = sides.get(args.layer)
    if side and feat.dim() == 4 and feat.shape[-1] > side:  # small pictures give small maps
        feat = pooling(feat, side)
    return feat.flatten(1)


def embed(network, images, args):
    return pool(backbones.feature(network, images, args.layer), args)


def recipe(args, saved, train: bool) -> augment.Compose:
    """Return crop and flip for training, or the centre crop for val/, and the channels of views."""
    views = colour.Views(colour.chosen_views(args))
    if not train:
        return inputs.plain_view(args, views)
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), views)


def learning_rate(args, at: loop.At) -> float:
    return schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)


def label(args, saved) -> str | None:
    """Return "CMC YCbCr, softmax, K 4096" where the checkpoint has the flags of its run."""
    opt = saved["opt"]
    if "softmax" not in opt:
        return None
    loss = "softmax" if opt["softmax"] else f"NCE (Z {opt.get('nce_z', 'oneshot')})"
    return f"CMC {opt.get('views') or args.view}, {loss}, K {opt.get('nce_k')}"


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="model_path",
    read=read,
    files=files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=training.sgd,
    rate=learning_rate,
    label=label,
    result=lambda args, saved: {"layer": args.layer},
    derived=lambda args, saved, network, classifier: {
        "model": args.model,
        "view": args.view,
        "layer": args.layer,
        "crop_low": args.crop_low,
    },
    published="cmc/published.json",
    reopened=("model", "view", "layer", "input_res"),
    is_published=lambda saved: "view" in (saved.get("opt") or {}),
)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    linear.run(SPEC, args, process)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
