#!/usr/bin/env python
"""Linear evaluation of a pre-trained backbone: only the last layer is trained, on frozen features.

The protocol of MoCo (He et al., CVPR 2020) with the settings of Ge et al. (NeurIPS 2021, arXiv:2110.14189); the paper's
command, and the same on the built-in data after `moco_non_sem_neg.py --demo`:

    python nonsem_neg/main_lincls.py IMAGENET100 --pretrained ckpts/patch/checkpoint_0199.pth.tar --ckpt_path ckpts/patch-lin \\
        --lr 10 --batch-size 128 --epochs 60 --schedule 30 40 50
    python nonsem_neg/main_lincls.py --demo
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
from torch import nn

from common import UsageError, UserError, augment, backbones, cli, launch, options, schedule
from runner import checkpoint, layouts, linear, loop
from runner.folder import Run
from common.precision import Precision
from nonsem_neg.views import normalize, plain_view
from preprocess import demo

FILES = "checkpoint_robust_*.pth.tar"  # of this script
POOLED = 6  # the layer of `backbones.feature` that enters the classifier
PRESETS = {
    "demo": dict(
        data="data/demo", pretrained="runs/try", ckpt_path="runs/try-lincls", workers=2, epochs=20, schedule=[12, 16],
        batch_size=128, lr=5.0, cache_views=1, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("data", nargs="?", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    g.add_argument("-a", "--arch", help="torchvision network; default: what the checkpoint says, or resnet50")
    about = "pre-training checkpoint, or a run folder: its newest"
    g.add_argument("--pretrained", default="", metavar="PATH", help=about)

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=100, help="epochs to run in all")
    g.add_argument("--start-epoch", type=cli.count, default=0, help="first epoch, counted from 0 (a resume sets it)")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--lr", "--learning-rate", type=cli.positive, default=30.0, help="not scaled with the batch")
    g.add_argument("--schedule", type=int, nargs="*", default=[30, 40, 50], help="epochs of a 10x drop")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    decay = dict(type=cli.not_negative, default=0.0, dest="weight_decay", help="weight decay")
    g.add_argument("--wd", "--weight-decay", **decay)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    g.add_argument("--ckpt_path", default="./ckpts/lincls", help="run folder: checkpoints, logs, result.json")
    options.add_name_argument(g, default="that folder itself")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("-e", "--evaluate", action="store_true", help="only evaluate the classifier that --resume names")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)

    options.check(args)
    if args.name:
        args.ckpt_path = os.path.join(args.ckpt_path, args.name)
    if args.data is None:
        raise UsageError(
            "no data: give the root of an ImageFolder tree (train/ and val/), or --demo for built-in pictures"
        )
    if not args.pretrained and not args.resume:
        raise UsageError("no backbone: give --pretrained CHECKPOINT (or --resume, to continue a linear evaluation)")
    if args.evaluate and not args.resume:
        raise UsageError("--evaluate needs --resume CHECKPOINT, the trained classifier")
    return args


def read_backbone(args, resumed: checkpoint.Saved | None) -> checkpoint.Saved:
    """What the network comes from: the classifier that goes on (it holds the backbone as well), or the pre-training
    checkpoint. Flags that were typed must agree with what it says."""
    if resumed is not None and "best_acc1" not in resumed:
        raise UserError(f"{resumed.path} is not a checkpoint of this script; pre-trained ones go to --pretrained")
    if resumed is None and (args.evaluate or not args.pretrained):
        raise UsageError(f"--resume auto: no checkpoint_robust_* in {args.ckpt_path} yet; start with --pretrained")
    if resumed is not None and "pretrained" in args.typed:
        check_backbone(resumed, args.pretrained)
    first = f"nonsem_neg/moco_non_sem_neg.py{' --demo' * (args.demo and 'pretrained' not in args.typed)}"
    saved = resumed or linear.pretrained(args.pretrained, "--pretrained", first, any_resnet=True)
    arch = saved.get("arch", args.arch or "resnet50")
    if args.arch and args.arch != arch:
        raise UserError(f"{saved.path} is of --arch {arch}, not {args.arch}: give -a {arch}, or omit it")
    args.arch = arch
    if "input_res" not in args.typed:
        args.input_res = (saved.get("args") or {}).get("input_res", args.input_res)
    return saved


def check_backbone(resumed: checkpoint.Saved, path: str) -> None:
    """UserError where a classifier is to be continued on another backbone than the one that --pretrained names."""
    path = layouts.newest(path) or path if os.path.isdir(path) else path
    if not os.path.isfile(path) or "best_acc1" in (named := checkpoint.load(path)):
        return
    own, other = (layouts.without_head(layouts.backbone(saved)) for saved in (resumed, named))
    if checkpoint.fingerprint(own) != checkpoint.fingerprint(other):
        raise UserError(
            f"{resumed.path} is a classifier on another backbone ({resumed.get('pretrained')} as it was then), not on {path}: "
            "start over with --overwrite, or choose another --ckpt_path"
        )


def build_network(saved, arch: str, num_classes: int, process: launch.Process) -> nn.Module:
    """The backbone with a fresh (or, of a classifier that goes on, its own) linear layer; all else frozen, in eval mode."""
    state, resumed = layouts.backbone(saved), "best_acc1" in saved
    small_stem = "conv1.weight" in state and state["conv1.weight"].shape[-1:] == (3,)
    if resumed:  # published heads have 1000 outputs whatever the number of classes
        outputs = (*state.get("fc.weight", torch.empty(0)).shape, 0)[0]
        num_classes = outputs if num_classes < outputs < 2**16 else num_classes
    model = backbones.build(arch, num_classes, small_stem=small_stem)
    if resumed:
        checkpoint.load_into(model, state, saved.path, flag="-a")
    else:
        checkpoint.load_into(model, layouts.without_head(state), saved.path, ("fc.",), flag="-a")
        nn.init.normal_(model.fc.weight, std=0.01)
        nn.init.zeros_(model.fc.bias)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["fc.weight", "fc.bias"], trained
    return model.eval().to(process.device, memory_format=torch.channels_last)


def pretraining(saved: checkpoint.Saved) -> dict:
    """The flags of the pre-training, from its own checkpoint or from that of a classifier on it; {} where none are kept."""
    return saved.get("pretrained_args" if "best_acc1" in saved else "args") or {}


def recipe(args, saved: checkpoint.Saved, train: bool) -> augment.Compose:
    """Of the training pictures random crop and flip, nothing else; of those of val/ the centre."""
    flags = pretraining(saved)
    if not train:
        return plain_view(args, flags)
    return augment.Compose(augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip(), normalize(flags))


def embed(model, images, precision):
    with precision.autocast():
        return backbones.feature(model, images, POOLED)


class Head(linear.Classifier):
    """The last layer of a whole network, which is what the published files keep."""

    def weights(self) -> dict:
        return {"state_dict": layouts.add_prefix(self.network.state_dict(), "module.")}

    def load_weights(self, saved: checkpoint.Saved) -> None:
        """Nothing: the network was built from `saved`."""


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    if args.evaluate:
        return evaluate(args, process)
    shared = layouts.newest(args.ckpt_path) is not None  # as published, with a pre-training, whose records stay
    files = dict(names=(FILES,), key="args", first=0, suffix="-lincls" * shared, by_epoch=True)
    with loop.Job(args, process, args.ckpt_path, **files) as job:
        saved = read_backbone(args, job.saved)
        classes = saved.get("classes") if job.saved else None  # a classifier knows its own; DATA must have the same
        precision = Precision(args.amp, process.device)
        train_set = options.open_split(args, "train", classes=classes)
        val_set = options.open_split(args, "val", classes=train_set.classes)
        network = build_network(saved, args.arch, len(train_set.classes), process)
        sgd = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(network.fc.parameters(), **sgd)
        epochs = saved.get("pretrained_epoch", saved.get("epoch", 0))
        facts = dict(
            script="nonsem_neg/main_lincls.py", arch=args.arch, classes=train_set.classes, pretrained_epoch=epochs
        )
        facts |= dict(pretrained=saved.get("pretrained", saved.path), pretrained_args=pretraining(saved) or None)
        facts["pretrained_step"] = saved.how_far()["backbone_step"]

        def embedder(images):
            return embed(network, images, precision)

        method = Head(network, embedder, network.fc, optimizer, process, **facts)
        views = recipe(args, saved, train=True), recipe(args, saved, train=False)
        train_loader, val_loader = linear.loaders(args, process, train_set, val_set, *views)
        # the published file names carry the number of the pre-training checkpoint: checkpoint_0199 -> checkpoint_robust_0199
        number = f"{max(0, epochs - 1):04d}.pth.tar"
        job.last, best = f"checkpoint_robust_{number}", f"model_best_{number}"
        known = dict(backbone=saved.path, pretrained_epochs=epochs, precision=str(precision))
        job.begin(train_loader, method, val_images=len(val_set), lr=args.lr, **known)
        whole = linear.train(job, method, val_loader, lambda e, part: schedule.step(args.lr, e, args.schedule), best)
        if whole:
            found = method.scores
            at_best = dict(acc1_best=found["best_acc1"], best_epoch=found["best_epoch"] - 1)
            known = dict(pretrained=facts["pretrained"], data=args.data, split="val", epochs=job.done)
            known |= dict(acc1=found["acc1"], acc5=found["acc5"], **at_best, precision=str(precision))
            then = (facts["pretrained_args"] or {}).get("seed")  # of the run: that of its pre-training
            known |= dict(seed=args.seed if then is None else then, linear_seed=args.seed)
            job.log.result(**known, **saved.how_far())


def evaluate(args, process: launch.Process) -> None:
    """-e: the accuracy of a trained classifier on val/."""
    path = layouts.newest(args.ckpt_path, (FILES,)) if args.resume == "auto" else args.resume
    saved = read_backbone(args, checkpoint.Saved(path) if path else None)
    precision = Precision(args.amp, process.device)
    classes = (
        saved.get("classes") or options.open_split(args, "train").classes
    )  # a published file does not name its own
    val_set = options.open_split(args, "val", classes=classes)
    network = build_network(saved, args.arch, len(val_set.classes), process)
    log = Run(args.ckpt_path, args, process, suffix="-evaluate")
    how = dict(seed=0, shuffle=False, drop_last=False)
    loader = options.make_loader(args, process, val_set, (recipe(args, saved, train=False),), **how)
    batches = linear.FreshViews(lambda images: embed(network, images, precision), loader)
    top1, top5, _ = linear.validate(network.fc, batches)
    log.say_replaced(loader)
    log.result(evaluated=saved.path, data=args.data, split="val", acc1=top1, acc5=top5)
    log.close()


def reopen(saved, network, input_res, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there)."""
    if "best_acc1" not in saved or not isinstance(saved.get("state_dict"), dict):
        return None
    weight = layouts.backbone(saved).get("fc.weight")
    if weight is None or weight.ndim != 2:
        return None
    arch, own, flags = saved.get("arch", "resnet50"), saved.get("args") or {}, pretraining(saved)
    model = build_network(saved, arch, len(weight), process)
    names = ("lr", "batch_size", "moco_m", "moco_t", "input_res", "mlp", "aug_plus", "cos", "patch_ratio", "small_stem")
    facts = dict(arch=arch, outputs=len(weight), input_res=input_res or own.get("input_res", 224))
    facts |= dict(label=row_label(saved, flags), seed=flags.get("seed"), pretrained=saved.get("pretrained"))
    facts |= dict(epochs=saved.get("pretrained_epoch"), settings={name: flags[name] for name in names if name in flags})
    facts |= saved.how_far()
    return lambda images: model.fc(embed(model, images, precision).float()), (normalize(flags),), facts


def row_label(saved, flags: dict) -> str:
    """ "MoCo + patch (K 16384, alpha 2)" from the flags of the pre-training run, where the checkpoint has them."""
    if not flags:
        return os.path.basename(os.path.dirname(os.path.abspath(saved.path)))
    kind = flags.get("robust") if flags.get("num_nonsem") else "none"
    details = [f"K {flags['moco_k']}"]
    if kind != "none":
        details += [f"alpha {flags['alpha']:g}"] + ([f"M {flags['num_nonsem']}"] if flags["num_nonsem"] > 1 else [])
    return f"MoCo{'' if kind == 'none' else ' + ' + kind} ({', '.join(details)})"


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
