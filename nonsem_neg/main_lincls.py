#!/usr/bin/env python
"""Linear evaluation of a pre-trained backbone: only the last layer is trained, on frozen features.

This is the protocol of MoCo (He et al., CVPR 2020) with the settings of Ge et al. (NeurIPS 2021,
arXiv:2110.14189). The first command follows `moco_non_sem_neg.py --demo`, the second one is the
published one:

    python nonsem_neg/main_lincls.py --demo
    python nonsem_neg/main_lincls.py IMAGENET100 --pretrained ckpts/patch/checkpoint_0199.pth.tar \\
        --ckpt_path ckpts/patch-lin --lr 10 --batch-size 128 --epochs 60 --schedule 30 40 50
"""

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import nn

from common import (
    UsageError,
    UserError,
    augment,
    backbones,
    cli,
    inputs,
    launch,
    metrics,
    options,
    schedule,
)
from common.precision import Precision
from nonsem_neg import flags
from nonsem_neg.views import adopt, normalisation, pretraining_flags
from preprocess import demo
from runner import checkpoint, layouts, linear, loop, pretrained, resume
from runner.features import FreshViews, validate
from runner.folder import RunFolder
from runner.trunks import name_of

POOLED = 6  # the layer of `backbones.feature` that enters the classifier
CLASSIFIERS = "checkpoint_robust_*.pth.tar"  # the files that this script writes
FIND = loop.Files(__file__, patterns=(CLASSIFIERS,), flags="args", first=0)
PRESETS = {
    "demo": dict(
        data="data/demo", pretrained="runs/try", ckpt_path="runs/try-lincls", workers=2, epochs=20,
        schedule=[12, 16], batch_size=128, lr=5.0, cache_views=1, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    flags.add_data_argument(g, "data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    text = "torchvision network; default: that of the checkpoint, or resnet50"
    g.add_argument("-a", "--arch", help=text)
    text = "pre-training checkpoint, or a run folder: its newest"
    g.add_argument("--pretrained", default="", metavar="PATH", help=text)

    g = parser.add_argument_group("optimisation")
    flags.add_sgd_arguments(g, epochs=100, lr=30.0, schedule=[30, 40, 50], weight_decay=0.0)
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    text = "run folder: checkpoints, logs, result.json"
    g.add_argument("--ckpt_path", "--out", default="./ckpts/lincls", help=text)
    options.add_name_argument(g, default="none, and the files go into that folder itself")
    options.add_run_arguments(g, save_freq=None)
    text = "only evaluate the classifier that --resume names"
    g.add_argument("-e", "--evaluate", action="store_true", help=text)
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    options.check(args)
    flags.settle_paths(args)
    if not args.pretrained and not args.resume:
        raise UsageError(
            "no backbone: give --pretrained CHECKPOINT (or --resume, to continue a linear "
            "evaluation)"
        )
    if args.evaluate and not args.resume:
        raise UsageError("--evaluate needs --resume CHECKPOINT, the trained classifier")
    return cli.freeze(args)


def read(args):
    """Return the checkpoint with the network, and the flags with its network and picture size.

    A resumed run reads its own checkpoint, which holds the network as well; a new one reads that
    of the pre-training.
    """
    saved, _ = resume.find(args, args.ckpt_path, FIND)
    if saved is None:
        if args.evaluate or not args.pretrained:
            raise UsageError(
                f"--resume auto: no {CLASSIFIERS} in {args.ckpt_path} yet; start with --pretrained"
            )
        is_demo = args.demo and "pretrained" not in args.typed
        first = (
            "nonsem_neg/moco_non_sem_neg.py --demo" if is_demo else "nonsem_neg/moco_non_sem_neg.py"
        )
        saved = pretrained.read(args.pretrained, "--pretrained", first, any_resnet=True)
        adopt(saved)
    elif "best_acc1" not in saved:
        raise UserError(
            f"{saved.path} is not a checkpoint of this script; give a pre-trained one to "
            "--pretrained"
        )
    elif "pretrained" in args.typed:
        check_backbone(saved, args.pretrained)
    with saved.within():
        default = name_of(layouts.backbone(saved)) or "resnet50"
        arch = pretrained.agreed(args, "arch", saved.get("arch"), saved.path, default)
        if re.search(r"x[\d.]+$", arch):
            own = saved.paper.evaluation if saved.paper else "tools/evaluate.py"
            raise UserError(
                f"{saved.path} is a {arch}, which torchvision lacks: evaluate it with {own}"
            )
        input_res = pretrained.input_res(args, saved.get("args") or saved.get("opt") or {})
    return saved, cli.replace(args, arch=arch, input_res=input_res)


def check_backbone(resumed: checkpoint.Saved, path: str) -> None:
    """Raise UserError where the resumed classifier has another backbone than --pretrained."""
    path = pretrained.file_at(path, "--pretrained", "name that of the pre-training")
    if not os.path.isfile(path):  # it may have been removed since
        return
    named = checkpoint.load(path)
    both = [layouts.without_head(layouts.backbone(saved)) for saved in (resumed, named)]
    if checkpoint.fingerprint(both[0]) != checkpoint.fingerprint(both[1]):
        raise UserError(
            f"{resumed.path} is a classifier on another backbone ({resumed.get('pretrained')} at "
            f"that time), not on {path}: start over with --overwrite, or choose another "
            "--ckpt_path"
        )


def epochs_before(saved) -> int:
    """Return the epochs of the pre-training, from its file or a classifier's."""
    return saved.get("pretrained_epoch", saved.get("epoch", 0))


def files(args, saved):
    """Return the run folder, its files, and the best epoch's file.

    Files carry the number of the pre-trained one: checkpoint_0199 gives checkpoint_robust_0199, as
    published. In a folder that holds a pre-training, as in the published commands, the records get
    a suffix, so that those of the pre-training stay.
    """
    with saved.within():
        number = f"{max(0, epochs_before(saved) - 1):04d}.pth.tar"
    is_shared = layouts.newest(args.ckpt_path) is not None
    names = loop.Files(
        __file__,
        last=f"checkpoint_robust_{number}",
        patterns=(CLASSIFIERS,),
        flags="args",
        first=0,
        start=args.start_epoch,
        by_epoch=True,
        suffix="-lincls" if is_shared else "",
    )
    return args.ckpt_path, names, f"model_best_{number}"


def build_network(saved, args, classes: int, process: launch.Process):
    """Return the network, frozen except for its last layer, and that layer, which is fresh.

    A published classifier has 1000 outputs whatever the number of classes.
    """
    state = layouts.backbone(saved)
    is_classifier = "best_acc1" in saved
    small_stem = "conv1.weight" in state and state["conv1.weight"].shape[-1:] == (3,)
    outputs = len(state["fc.weight"]) if is_classifier and "fc.weight" in state else 0
    if classes < outputs < 2**16:
        classes = outputs
    network = backbones.build(args.arch, classes, small_stem=small_stem)
    if not isinstance(getattr(network, "fc", None), nn.Linear):
        raise UsageError(
            f"{saved.path} is a {args.arch}, which has no last layer `fc` to train: give a ResNet "
            "or another network with `fc`"
        )
    checkpoint.load_into(network, layouts.without_head(state), saved.path, ("fc.",), flag="-a")
    nn.init.normal_(network.fc.weight, std=0.01)
    nn.init.zeros_(network.fc.bias)
    network = linear.freeze(network, process)
    network.fc.requires_grad_(True)
    return network, network.fc


def load(network, classifier, saved) -> None:
    """Load the last layer of a classifier."""
    state = layouts.backbone(saved)
    layer = {name: value for name, value in state.items() if name.startswith("fc.")}
    checkpoint.load_into(classifier, layouts.strip_prefix(layer, "fc."), saved.path)


def embed(network, images, args):
    return backbones.feature(network, images, POOLED)


def recipe(args, saved, train: bool) -> augment.Compose:
    """Return crop and flip for training, or the centre crop for val/."""
    if not train:
        return inputs.plain_view(args, normalisation(saved))
    crop = augment.RandomResizedCrop(args.input_res)
    return augment.Compose(crop, augment.RandomHorizontalFlip(), normalisation(saved))


def sgd(parameters, args) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


def learning_rate(args, at: loop.At) -> float:
    return schedule.step(args.lr, at.epoch, args.schedule)


def label(args, saved) -> str | None:
    """Return "MoCo + patch (K 16384, alpha 2)" where the checkpoint has the flags of its run."""
    before = pretraining_flags(saved)
    if "moco_k" not in before:  # another paper's
        return None
    if not before.get("num_nonsem"):
        return f"MoCo (K {before['moco_k']})"
    details = f"K {before['moco_k']}, alpha {before['alpha']:g}"
    if before["num_nonsem"] > 1:
        details += f", M {before['num_nonsem']}"
    return f"MoCo + {before['robust']} ({details})"


def recorded(args, saved) -> dict:
    """Return the entries of a classifier's checkpoint that describe the pre-training."""
    path = saved.get("pretrained", saved.path)
    return {
        "arch": args.arch,
        "network": path,
        "pretrained": path,
        "pretrained_args": pretraining_flags(saved) or None,
        "pretrained_epoch": epochs_before(saved),
        "pretrained_step": saved.how_far()["backbone_step"],
        "normalisation": saved.get("normalisation"),
    }


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="pretrained",
    read=read,
    files=files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=sgd,
    rate=learning_rate,
    label=label,
    weights=lambda network, classifier: {
        "state_dict": layouts.add_prefix(network.state_dict(), "module.")
    },
    load=load,
    digest=lambda saved, network: checkpoint.fingerprint(
        layouts.without_head(network.state_dict())
    ),
    recorded=recorded,
    argv=("-", "--pretrained=-"),
    is_published=lambda saved: "best_acc1" in saved and "state_dict" in saved,
    whole=lambda saved, args: cli.replace(args, arch=saved.get("arch") or args.arch or "resnet50"),
)


def evaluate(args, process: launch.Process) -> None:
    """Write the accuracy on val/ of the trained classifier that --resume names."""
    saved, args = read(args)
    # A published file does not name its classes.
    classes = saved.get("classes") or inputs.open_split(args, "train").classes
    val_set = inputs.open_split(args, "val", classes=classes)
    network, classifier = build_network(saved, args, len(val_set.classes), process)
    load(network, classifier, saved)
    precision = Precision.of(args, process.device)

    def embed_precisely(images):
        with precision.autocast():
            return embed(network, images, args)

    log = RunFolder(args.ckpt_path, args, process, suffix="-evaluate")
    loader = inputs.evaluation_loader(args, process, val_set, recipe(args, saved, train=False))
    top1, top5, _ = validate(classifier, FreshViews(embed_precisely, loader))
    log.say_replaced(loader)
    found = metrics.named(top1, top5, len(val_set.classes))
    protocol = "a trained linear classifier"
    log.result(evaluated=saved.path, data=args.data, split="val", protocol=protocol, **found)
    log.close()


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    if args.evaluate:
        evaluate(args, process)
    else:
        linear.run(SPEC, args, process)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
