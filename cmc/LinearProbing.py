#!/usr/bin/env python
"""Linear evaluation of the networks pre-trained by CMC: a classifier on one frozen layer of all views.

The protocol published with Contrastive Multiview Coding; after `train_CMC.py --demo`, and on ImageNet-100:

    python cmc/LinearProbing.py --demo
    python cmc/LinearProbing.py --data_folder IMAGENET100 --dataset imagenet100 --learning_rate 30 --layer 6 \\
        --model_path runs/cmc/memory_softmax_4096_resnet50v1_lr_0.03_decay_0.0001_bsz_128_view_YCbCr
"""

import os
import sys
from collections import OrderedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch import nn

from cmc import colour, networks
from cmc.networks import MODELS
from common import UsageError, UserError, augment, backbones, cli, launch, options, schedule
from runner import checkpoint, layouts, linear, loop
from common.precision import Precision
from preprocess import demo

# Sides of the pooled maps that are classified; the layers not named here enter as they are.
POOLED = {1: 8, 2: 6, 3: 4, 4: 3}  # ResNet: averages
POOLED_ALEXNET = {1: 10, 2: 6, 3: 5, 4: 5}  # AlexNet: maxima
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-cmc", save_path="runs/try-cmc-linear", workers=2, epochs=40,
        lr_decay_epochs="24,32", lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet", "imagenet100", "folder"), default="imagenet")
    about = "least share of the picture that a crop covers; default .2, with --dataset imagenet and a ResNet .08"
    g.add_argument("--crop_low", type=cli.share, help=about)

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint (.pth), or a run folder, or a folder of one: the newest"
    g.add_argument("--model_path", metavar="PATH", help=about)
    g.add_argument("--model", choices=list(MODELS), help="default: what the checkpoint says, or alexnet")
    about = "colour space; default: what the checkpoint says, or Lab"
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, help=about)
    about = (
        "ResNet: 1 after the stem, 2 to 5 the stages, 6 the pooled vector (default); AlexNet: 1 to 5 the convolution "
        "blocks (default 5), 6 and 7 fully connected"
    )
    g.add_argument("--layer", type=int, help=about)

    g = parser.add_argument_group("optimisation")
    about = "not scaled with the batch; published results: AlexNet .1, resnet50v1 and v2 30, v3 50"
    published = dict(epochs=60, batch_size=256, learning_rate=0.1, lr_decay_epochs="30,40,50", lr_decay_rate=0.2)
    options.add_sgd_arguments(g, about, **published, weight_decay=0.0)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/cmc_linear", help="the run gets a folder of its own in here")
    options.add_name_argument(g)
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g, save_freq=5)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")

    options.add_hardware_arguments(parser, apex=True)
    parser.ignore("TensorBoard gets a point every epoch", "tb_freq")
    parser.ignore("nothing reads it", "log")
    parser.ignore("the classifier is trained by SGD", "beta1", "beta2")
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/ and val/, or --demo for built-in pictures")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT.pth, written by train_CMC.py")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    return args


def run_name(args, parent: str) -> str:
    """The published name of the run folder, and the layer (published: layers wrote over each other)."""
    return (
        f"calibrated_{parent}_bsz_{args.batch_size}_lr_{args.learning_rate}_decay_{args.weight_decay}_view_{args.view}"
        f"{f'_amp_{args.opt_level}' * args.amp}_layer{args.layer}"
    )


def read_backbone(args) -> checkpoint.Saved:
    """The pre-training checkpoint, and what it says about its network. Flags that were typed must agree with it."""
    saved = linear.pretrained(args.model_path, "--model_path", f"cmc/train_CMC.py{' --demo' * args.demo}")
    path, opt = saved.path, saved.setdefault("opt", {})
    for key, default in (("model", "alexnet"), ("view", "Lab")):
        then = opt.get(key, getattr(args, key) or default)
        if getattr(args, key) and getattr(args, key) != then:
            raise UserError(f"{path} is of --{key} {then}, not {getattr(args, key)}: give --{key} {then}, or omit it")
        setattr(args, key, then)
    if args.model not in MODELS:
        raise UserError(f"{path} is of --model {args.model}: known here are {', '.join(MODELS)}")
    args.view, args.views = colour.space_name(args.view), opt.get("views")
    if "input_res" not in args.typed:
        args.input_res = opt.get("input_res", args.input_res)
    alexnet = MODELS[args.model] is None
    if args.layer is None:  # published: 6, which AlexNet's classifier did not have
        args.layer = 5 if alexnet else 6
    last = 7 if alexnet else 6
    if not 1 <= args.layer <= last:
        raise UsageError(f"--layer {args.layer}: --model {args.model} has the layers 1 to {last}")
    if args.crop_low is None:  # published: .08 for a ResNet on ImageNet whatever was typed
        args.crop_low = 0.08 if args.dataset == "imagenet" and not alexnet else 0.2
    return saved


def build_network(saved, args, process: launch.Process) -> nn.Module:
    """The networks of all views, frozen and in eval mode."""
    state = layouts.backbone(saved)
    heads = [v for k, v in state.items() if k.endswith((".fc.weight", ".fc8.0.weight"))]
    first = (".conv1.weight", ".conv_block_1.0.weight")
    stems = [v for k, v in state.items() if k.endswith(first) and ".layer" not in k]
    if not heads or not stems or heads[0].dim() != 2 or stems[0].dim() != 4 or len(heads[0]) > 2**16:
        raise UserError(f"{saved.path} holds no networks of this family (it has {', '.join(list(state)[:3])})")
    small_stem = stems[0].shape[-1] == 3
    network = networks.build_network(args.model, colour.chosen_views(args), len(heads[0]), small_stem)
    checkpoint.load_into(network, state, saved.path)
    return network.requires_grad_(False).eval().to(process.device, memory_format=torch.channels_last)


class LinearClassifier(nn.Module):
    """One linear layer: weights N(0, 0.01), bias 0. `name` of the layer in the published files differs by network."""

    def __init__(self, features: int, classes: int, model: str):
        super().__init__()
        name = "LinearClassifier" if MODELS[model] is None else "LiniearClassifier"
        linear = nn.Linear(features, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(OrderedDict([(name, linear)]))

    def forward(self, feat):
        return self.classifier(feat)


def build_classifier(network, args, classes: int, process: launch.Process) -> nn.Module:
    shapes = backbones.feature_shape(network, (sum(network.channels), args.input_res, args.input_res), args.layer)
    features = pool([torch.zeros(1, *shape) for shape in shapes], args.layer, args.model).shape[1]
    return LinearClassifier(features, classes, args.model).to(process.device)


def pool(feats, layer: int, model: str):
    """Features of every view at a layer -> (N, D): side by side, pooled to the published size, flattened."""
    feat = torch.cat(tuple(feats), 1)
    side = (POOLED_ALEXNET if MODELS[model] is None else POOLED).get(layer)
    if side and feat.dim() == 4 and feat.shape[-1] > side:  # small pictures give maps that are small enough as they are
        feat = (F.adaptive_max_pool2d if MODELS[model] is None else F.adaptive_avg_pool2d)(feat, side)
    return feat.flatten(1)


def embed(network, images, args, precision):
    with precision.autocast():
        feats = backbones.feature(network, images, args.layer)
    return pool([feat.float() for feat in feats], args.layer, args.model)


def recipe(args, train: bool) -> augment.Compose:
    """Of the training pictures crop and flip, of those of val/ the centre; then the channels of all views."""
    if not train:
        return options.plain_view(args, colour.Views(colour.chosen_views(args)))
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), colour.Views(colour.chosen_views(args)))


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 1; the first one after 30 complete ones is the first to drop."""
    return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    saved = read_backbone(args)
    name = run_name(args, os.path.basename(os.path.dirname(os.path.abspath(saved.path))))
    folder = options.run_folder(args, args.save_path, name)
    events = os.path.join(args.tb_path, os.path.basename(folder)) if args.tb_path else True
    files = dict(last="current.pth", numbered="ckpt_epoch_{}.pth", tensorboard=events, by_epoch=True)
    with loop.Job(args, process, folder, **files) as job:
        train_set = options.open_split(args, "train")
        val_set = options.open_split(args, "val", classes=train_set.classes)
        network = build_network(saved, args, process)
        classifier = build_classifier(network, args, len(train_set.classes), process)
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(classifier.parameters(), **sgd)
        facts = dict(script="cmc/LinearProbing.py", classes=train_set.classes, network=saved.path)
        facts |= dict(digest=checkpoint.fingerprint(layouts.backbone(saved)))
        precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)

        def embedder(images):
            return embed(network, images, args, precision)

        method = linear.Classifier(network, embedder, classifier, optimizer, process, **facts)
        views = recipe(args, train=True), recipe(args, train=False)
        train_loader, val_loader = linear.loaders(args, process, train_set, val_set, *views)
        facts = dict(val_images=len(val_set), model=args.model, view=args.view, layer=args.layer)
        facts |= dict(features=classifier.classifier[-1].in_features, network=saved.path, crop_low=args.crop_low)
        facts |= dict(pretrained_epochs=saved.get("epoch"))
        job.begin(train_loader, method, **facts, precision=str(precision))
        best = f"{args.model}_layer{args.layer}.pth"
        whole = linear.train(job, method, val_loader, lambda epoch, part: learning_rate(args, epoch), best)
        if whole:
            linear.report(job, saved, row_label(saved["opt"], args), table="cmc/published.json", layer=args.layer)


def row_label(opt: dict, args) -> str | None:
    """ "CMC YCbCr, softmax, K 4096" from the flags of the pre-training run, where its checkpoint has them."""
    if "softmax" not in opt:
        return None
    loss = "softmax" if opt["softmax"] else f"NCE (Z {opt.get('nce_z', 'oneshot')})"
    return f"CMC {opt.get('views') or args.view}, {loss}, K {opt.get('nce_k')}"


def reopen(saved, network: str, input_res: int | None, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there)."""
    opt = saved.get("opt") or {}
    if "classifier" not in saved or "view" not in opt:
        return None
    flags = {name: opt.get(name) for name in ("model", "view", "layer", "input_res")} | {"model_path": network}
    flags |= {"input_res": input_res} if input_res else {}
    args = parse_args(["--data_folder=-", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
    before = read_backbone(args)
    model, weights = build_network(before, args, process), saved["classifier"]
    outputs = [len(v) for k, v in weights.items() if k.endswith(".weight")][0]
    classifier = build_classifier(model, args, outputs, process).eval()
    checkpoint.load_into(classifier, weights, saved.path)
    then, names = (
        before["opt"],
        ("learning_rate", "batch_size", "nce_t", "nce_m", "crop_low", "input_res", "small_stem"),
    )
    facts = dict(
        arch=args.model, outputs=outputs, input_res=args.input_res, label=row_label(then, args), layer=args.layer
    )
    facts |= dict(settings={name: then[name] for name in names if name in then} | {"layer": args.layer})
    facts |= linear.origin(before) | dict(digest=checkpoint.fingerprint(layouts.backbone(before)))
    colours = (colour.Views(colour.chosen_views(args)),)
    return lambda images: classifier(embed(model, images, args, precision)), colours, facts


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
