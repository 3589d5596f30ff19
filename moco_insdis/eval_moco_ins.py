#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by MoCo or InsDis: a classifier on one frozen layer.

The protocol published next to Contrastive Multiview Coding; after `train_moco_ins.py --demo --moco`, and the published one:

    python moco_insdis/eval_moco_ins.py --demo
    python moco_insdis/eval_moco_ins.py --data_folder IMAGENET100 --model resnet50 --learning_rate 10 \\
        --model_path runs/moco_insdis/MoCo0.999_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2_aug_CJ
"""

import os
import sys
from collections import OrderedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch import nn

from common import UsageError, UserError, augment, backbones, cli, launch, options, schedule
from runner import checkpoint, layouts, linear, loop
from common.precision import Precision
from moco_insdis.networks import MODELS
from moco_insdis.train_moco_ins import NORMALIZE, WARM_EPOCHS, WARM_FROM
from preprocess import demo

POOLED = {1: 8, 2: 6, 3: 4, 4: 3}  # side of the average-pooled map; layer 5 enters as it is, layer 6 is a vector
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-moco-insdis", save_path="runs/try-moco-insdis-linear",
        workers=2, epochs=40, lr_decay_epochs="24,32", lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4,
        aug="NULL", print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100")
    about = "least share of the picture that a crop covers; default .2, with --dataset imagenet .08"
    g.add_argument("--crop", type=cli.share, help=about)
    about = "CJ: greyscale and colour jitter here too, as published; NULL: crop and flip"
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ", help=about)

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint (.pth), or a run folder, or a folder of one: the newest"
    g.add_argument("--model_path", metavar="PATH", help=about)
    g.add_argument("--model", choices=list(MODELS), help="default: what the checkpoint says, or resnet50")
    g.add_argument("--layer", type=int, default=6, help="1 after the stem, 2 to 5 the stages, 6 the pooled vector")
    g.add_argument("--bn", action="store_true", help="batch-norm without parameters before the classifier")
    g.add_argument("--syncBN", action="store_true", help="with --bn: its statistics over all processes")

    g = parser.add_argument_group("optimisation")
    about = "not scaled with the batch; published results: 10 on ImageNet-100, 30 on ImageNet"
    published = dict(epochs=60, batch_size=256, learning_rate=0.1, lr_decay_epochs="30,40,50", lr_decay_rate=0.2)
    options.add_sgd_arguments(g, about, **published, weight_decay=0.0)
    g.add_argument("--cosine", action="store_true", help="cosine schedule down to rate^3 / 10 of the learning rate")
    g.add_argument("--warm", action="store_true", help=f"warm up from {WARM_FROM} in {WARM_EPOCHS} epochs")
    g.add_argument("--adam", action="store_true", help="Adam instead of SGD")
    g.add_argument("--beta1", type=cli.fraction, default=0.5, help="of Adam")
    g.add_argument("--beta2", type=cli.fraction, default=0.999, help="of Adam")
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/moco_insdis_linear", help="the run gets a folder of its own in here")
    options.add_name_argument(g)
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g, save_freq=5)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")

    options.add_hardware_arguments(parser, apex=True)
    parser.ignore("TensorBoard gets a point every epoch", "tb_freq")
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/ and val/, or --demo for built-in pictures")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT.pth, written by train_moco_ins.py")
    if not 1 <= args.layer <= 6:
        raise UsageError(f"--layer {args.layer}: a ResNet has the layers 1 (stem) to 6 (pooled vector)")
    if args.syncBN and not args.bn:
        raise UsageError(
            "--syncBN: the frozen network uses stored statistics and the classifier has no batch-norm; add --bn"
        )
    for flag in ("beta1", "beta2"):
        if flag in args.typed and not args.adam:
            raise UsageError(f"--{flag} belongs to --adam")
    if args.adam and "momentum" in args.typed:
        raise UsageError("--momentum belongs to SGD; Adam has --beta1 and --beta2")
    if args.cosine and "lr_decay_epochs" in args.typed:
        raise UsageError("--cosine has no --lr_decay_epochs; omit one of the two")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.crop is None:  # published: .08 for ImageNet whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" else 0.2
    return args


def run_name(args, parent: str) -> str:
    """The published name of the run folder, and the layer (published: layers wrote over each other)."""
    return (
        f"{parent}_bsz_{args.batch_size}_lr_{args.learning_rate}_decay_{args.weight_decay}_crop_{args.crop}"
        f"{f'_amp_{args.opt_level}' * args.amp}_aug_{args.aug}{'_useBN' * args.bn}{'_useAdam' * args.adam}"
        f"{'_cosine' * args.cosine}{'_warm' * args.warm}_layer{args.layer}"
    )


def read_backbone(args) -> checkpoint.Saved:
    """The pre-training checkpoint, and what it says about its network. Flags that were typed must agree with it."""
    saved = linear.pretrained(args.model_path, "--model_path", f"moco_insdis/train_moco_ins.py{' --demo' * args.demo}")
    path, opt = saved.path, saved.setdefault("opt", {})
    model = opt.get("model", args.model or "resnet50")
    if args.model and args.model != model:
        raise UserError(f"{path} is of --model {model}, not {args.model}: give --model {model}, or omit it")
    if model not in MODELS:
        raise UserError(f"{path} is of --model {model}: known here are {', '.join(MODELS)}")
    args.model = model
    if "input_res" not in args.typed:
        args.input_res = opt.get("input_res", args.input_res)
    return saved


def build_network(saved, args, process: launch.Process) -> nn.Module:
    """The (query) network of the checkpoint, frozen and in eval mode; the key network of MoCo is not used."""
    state = layouts.backbone(saved)
    stem, head = (state.get(name, torch.empty(0)) for name in ("conv1.weight", "fc.weight"))
    if stem.dim() != 4 or head.dim() != 2 or len(head) > 2**16:
        raise UserError(f"{saved.path} holds no network of this family (it has {', '.join(list(state)[:3])})")
    depth, width = MODELS[args.model]
    network = backbones.WidthResNet(depth, 3, width, dim=len(head), small_stem=stem.shape[-1] == 3)
    checkpoint.load_into(network, state, saved.path, flag="--model")
    return network.requires_grad_(False).eval().to(process.device, memory_format=torch.channels_last)


class LinearClassifier(nn.Module):
    """Flatten, and one linear layer: weights N(0, 0.01), bias 0. Its name in the published files is spelled as here."""

    def __init__(self, features: int, classes: int, bn: bool):
        super().__init__()
        norm = [("BatchNorm", nn.BatchNorm1d(features, affine=False))] if bn else []
        self.classifier = nn.Sequential(OrderedDict([*norm, ("LiniearClassifier", nn.Linear(features, classes))]))
        nn.init.normal_(self.classifier.LiniearClassifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.LiniearClassifier.bias)

    def forward(self, feat):
        return self.classifier(feat)


def build_classifier(network, args, classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The classifier, and the shape of the feature at its layer before pooling."""
    shape = backbones.feature_shape(network, (3, args.input_res, args.input_res), args.layer)
    return LinearClassifier(pool(torch.zeros(1, *shape), args.layer).shape[1], classes, args.bn), shape


def pool(feat, layer: int):
    """(N, C, H, W) of layers 1 to 5 or (N, C) of layer 6 -> (N, D): averaged to the published size, flattened."""
    side = POOLED.get(layer)
    if side and feat.shape[-1] > side:  # small pictures give maps that are small enough as they are
        feat = F.adaptive_avg_pool2d(feat, side)
    return feat.flatten(1)


def embed(network, images, layer, precision):
    with precision.autocast():
        feat = backbones.feature(network, images, layer)
    return pool(feat.float(), layer)


def recipe(args, train: bool) -> augment.Compose:
    if not train:
        return options.plain_view(args, NORMALIZE)
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0)), augment.RandomHorizontalFlip()
    if args.aug == "NULL":
        return augment.Compose(crop, flip, NORMALIZE)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, NORMALIZE)


def learning_rate(args, epoch: int, part: float) -> float:
    """At `part` of epoch `epoch`, counted from 1. The published cosine is one epoch ahead: the last runs at its floor."""
    if args.cosine:
        lr = schedule.cosine(args.learning_rate, epoch, args.epochs, args.learning_rate * args.lr_decay_rate**3 * 0.1)
    else:
        lr = schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)
    if args.warm and epoch <= WARM_EPOCHS:
        return schedule.warmup(lr, epoch - 1 + part, WARM_EPOCHS, start=min(WARM_FROM, lr))
    return lr


def build_optimizer(args, classifier: nn.Module) -> torch.optim.Optimizer:
    settings = dict(lr=args.learning_rate, weight_decay=args.weight_decay)
    if args.adam:
        return torch.optim.Adam(classifier.parameters(), betas=(args.beta1, args.beta2), **settings)
    return torch.optim.SGD(classifier.parameters(), momentum=args.momentum, **settings)


def worker(args, process: launch.Process) -> None:
    if args.syncBN and process.world_size > 1 and process.device.type == "cpu":
        raise UsageError("--syncBN: PyTorch synchronises batch-norm between GPUs only; omit it on CPUs")
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
        classifier, shape = build_classifier(network, args, len(train_set.classes))
        if args.syncBN and process.world_size > 1:
            classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)
        classifier = classifier.to(process.device)
        facts = dict(script="moco_insdis/eval_moco_ins.py", classes=train_set.classes, network=saved.path)
        facts |= dict(digest=checkpoint.fingerprint(layouts.backbone(saved)))
        precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)

        def embedder(images):
            return embed(network, images, args.layer, precision)

        method = linear.Classifier(network, embedder, classifier, build_optimizer(args, classifier), process, **facts)
        views = recipe(args, train=True), recipe(args, train=False)
        train_loader, val_loader = linear.loaders(args, process, train_set, val_set, *views)
        facts = dict(val_images=len(val_set), model=args.model, layer=f"{args.layer} {tuple(shape)}", crop=args.crop)
        facts |= dict(network=saved.path, pretrained_epochs=saved.get("epoch"), precision=str(precision))
        job.begin(train_loader, method, **facts)
        best = f"{args.model}_layer{args.layer}.pth"
        whole = linear.train(job, method, val_loader, lambda epoch, part: learning_rate(args, epoch, part), best)
        if whole:
            linear.report(job, saved, row_label(saved["opt"]), table="moco_insdis/published.json", layer=args.layer)


def row_label(opt: dict) -> str | None:
    """ "MoCo, softmax, K 16384" from the flags of the pre-training run, where its checkpoint has them."""
    if "softmax" not in opt:
        return None
    loss = "softmax" if opt["softmax"] else f"NCE (Z {opt.get('nce_z', 'oneshot')})"
    return f"{'MoCo' if opt.get('moco') else 'InsDis'}, {loss}, K {opt.get('nce_k')}"


def reopen(saved, network: str, input_res: int | None, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there)."""
    opt = saved.get("opt") or {}
    if "classifier" not in saved or "view" in opt or "crop" not in opt:
        return None
    flags = {name: opt.get(name) for name in ("model", "layer", "input_res")} | {"model_path": network}
    flags |= {"input_res": input_res} if input_res else {}
    args = parse_args(["--data_folder=-", *(f"--{name}={value}" for name, value in flags.items() if value is not None)])
    before, weights = read_backbone(args), saved["classifier"]
    args.bn = any(".BatchNorm." in key for key in weights)  # a published file may say so of a classifier without it
    outputs = [len(v) for k, v in weights.items() if k.endswith(".weight")][0]
    model = build_network(before, args, process)
    classifier = build_classifier(model, args, outputs)[0].to(process.device).eval()
    checkpoint.load_into(classifier, weights, saved.path)
    then, names = before["opt"], "learning_rate batch_size nce_t nce_m alpha crop aug input_res small_stem".split()
    facts = dict(arch=args.model, outputs=outputs, input_res=args.input_res, label=row_label(then), layer=args.layer)
    facts |= dict(settings={name: then[name] for name in names if name in then} | {"layer": args.layer})
    facts |= linear.origin(before) | dict(digest=checkpoint.fingerprint(layouts.backbone(before)))
    return lambda images: classifier(embed(model, images, args.layer, precision)), (NORMALIZE,), facts


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
