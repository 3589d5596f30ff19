#!/usr/bin/env python
"""Linear evaluation of a debiased pre-training: a classifier on its frozen encoder f.

The first command follows `main.py --demo`; the others are for STL-10, with the clean protocol and
with the published one, whose batch-norm goes on adapting:

    python debiased/linear.py --demo
    python debiased/linear.py --model_path results/model_400.pth
    python debiased/linear.py --model_path results/model_400.pth --protocol published
"""

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from common import UsageError, UserError, augment, cli, collectives, launch, options
from debiased import main as pretraining
from debiased.flags import add_adam_arguments, without_lone_equals
from debiased.networks import NORMALIZE, Encoder, LinearNet, described
from debiased.paper import PAPER
from preprocess import demo
from runner import checkpoint, folds, layouts, linear, loop, pretrained

PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-debiased",
        save_path="runs/try-debiased-linear", workers=2, epochs=40, batch_size=128,
        learning_rate=3e-3, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "tree with train/CLASS/* and val/CLASS/*, or where torchvision keeps its sets"
    g.add_argument("--data_folder", "--data", dest="data", default="data", help=text)
    options.add_data_arguments(g, trees=("folder",), default="stl10", workers=4)
    text = "side of the pictures of val/, pixels; default: 96 for STL-10, else --input-res"
    g.add_argument("--test-size", type=cli.positive_int, help=text)
    g.set_defaults(input_res=32)

    g = parser.add_argument_group("model")
    text = "pre-training checkpoint, or a run folder: its newest"
    g.add_argument("--model_path", default="results/model_400.pth", metavar="PATH", help=text)

    g = parser.add_argument_group("method")
    text = (
        "clean: f in evaluation mode, crop and flip; published: the batch-norm of f in training "
        "mode while the classifier is trained, and the views of pre-training"
    )
    g.add_argument("--protocol", choices=["clean", "published"], default="clean", help=text)

    g = parser.add_argument_group("optimisation")
    add_adam_arguments(g, epochs=100, batch_size=512)
    linear.add_arguments(g)
    folds.add_argument(g)
    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--save_path", "--out", default="./runs/debiased_linear", help=text)
    options.add_name_argument(g, "made of its settings, and the seed where one is typed")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(without_lone_equals(argv))
    options.check(args)
    if args.protocol == "published":
        if "cache_views" in args.typed and args.cache_views:
            raise UsageError(
                "--cache-views: with --protocol published a feature depends on its batch; "
                "omit one of the two"
            )
        args.cache_views = 0
    return cli.freeze(args)


def read(args):
    """Return the pre-training checkpoint, and the flags with the settings of its network."""
    first = "debiased/main.py --demo" if args.demo else "debiased/main.py"
    saved = pretrained.read(args.model_path, "--model_path", first)
    if "best_acc1" in saved:
        raise UserError(
            f"{saved.path} is a classifier of a linear evaluation: give a pre-training checkpoint "
            "to --model_path, and this one to --resume"
        )
    if saved.paper is None and args.protocol == "published":
        raise UserError(
            f"{saved.path} is of another program, and --protocol published is for networks of "
            "debiased/main.py: omit it"
        )
    number = re.search(r"model_(\d+)", os.path.basename(saved.path))
    if "epoch" not in saved and number:  # published files have it in their names alone
        saved["epoch"] = int(number[1])
    with saved.within():
        side = pretrained.input_res(args, saved.get("opt") or {})
        return saved, with_model(saved, cli.replace(args, input_res=side))


def with_model(saved, args):
    """Return the flags with the encoder's name, from a pre-training's or a classifier's file.

    Where --test-size is not typed it is filled in.
    """
    model, _ = described(encoder_state(saved), saved.path)
    test_size = args.test_size
    if test_size is None:
        test_size = 96 if args.dataset == "stl10" else args.input_res
    return cli.replace(args, model=model, test_size=test_size)


def encoder_state(saved) -> dict:
    """Return the parameters of f (`f.0.weight` and so on) in the authors' files, ours or others."""
    state = layouts.tensors(saved)
    if not any(name.startswith("f.") for name in state):  # a ResNet of another program
        state = layouts.numbered(layouts.backbone(saved), PAPER.layouts[0].children, "f.")
    return {name: value for name, value in state.items() if name.startswith("f.")}


def files(args, saved):
    """Return the run folder, its files, and the best epoch's file."""
    file = os.path.basename(saved.path).partition(".")[0]
    name = (
        f"{pretrained.name_of(saved.path)}_{file}_{args.protocol}"
        f"_bsz_{args.batch_size}_lr_{args.learning_rate}"
    )
    same = ("dataset", "protocol")
    there = loop.Files(__file__, last="current.pth", by_epoch=True, same=same)
    return options.run_folder(args, args.save_path, name), there, "model_best.pth"


def build_network(saved, args, classes: int, process: launch.Process):
    """Return f, frozen and in evaluation mode, and a fresh classifier as torch initialises it."""
    state = encoder_state(saved)
    model, small_stem = described(state, saved.path)
    network = LinearNet(Encoder(model, small_stem), classes)
    checkpoint.load_into(network, state, saved.path, ("fc.",))
    network = network.eval().to(process.device, memory_format=torch.channels_last)
    return network, network.fc


def embed(network: LinearNet, images, args):
    """Return features (N, D), not normalised.

    With --protocol published f is in training mode while the classifier is.
    """
    is_adapting = args.protocol == "published" and network.fc.training
    if network.f.training and not is_adapting:  # an evaluation begins with rank 0's statistics
        collectives.broadcast_buffers(network)
    network.f.train(is_adapting)
    return network.f(images)


def recipe(args, saved, train: bool) -> augment.Compose:
    if not train:
        return pretraining.plain_view(args, normalisation(saved))
    if args.protocol == "published":
        shared = pretrained.footing(pretraining_flags(saved))
        return pretraining.recipe(cli.replace(args, **shared))
    crop = augment.RandomResizedCrop(args.input_res)
    return augment.Compose(crop, augment.RandomHorizontalFlip(), normalisation(saved))


def pretraining_flags(saved) -> dict:
    """Return the flags of the pre-training, from its file or a classifier's; {} if it has none."""
    return saved.get("pretrained_args", None) or saved.get("opt", None) or {}


def normalisation(saved) -> augment.Normalize:
    """Return the normalisation of the pre-training; of another program it is taken as ImageNet's.

    saved: the checkpoint of the network or of its classifier.
    """
    is_foreign = saved.get("of_another_program", saved.paper is None)
    return layouts.IMAGENET if is_foreign else NORMALIZE


def label(args, saved) -> str:
    """Return "debiased, tau_plus 0.1, t 0.5", from the flags of the pre-training."""
    opt = pretraining_flags(saved)
    name = os.path.basename(saved.get("network", saved.path))
    if opt.keys() >= {"loss", "tau_plus", "M", "temperature"}:
        name = opt["loss"]
        if opt["loss"] == "debiased":
            name += f", tau_plus {opt['tau_plus']}"
            if opt["M"] != 1:
                name += f", M {opt['M']}"
        name += f", t {opt['temperature']}"
    return f"{name}, published protocol" if args.protocol == "published" else name


def settings(args, saved) -> dict:
    return {"train_size": args.input_res, "test_size": args.test_size}


def protocol(args) -> str:
    """Return the evaluation protocol in words, for result.json."""
    if args.protocol == "published":
        return "linear Adam, as published: batch-norm moves, views of the pre-training"
    return "linear Adam"


class Classifier(linear.Classifier):
    """A classifier on f, whose parameters are frozen, and with the clean protocol its buffers."""

    def frozen(self):
        """Yield (name, tensor) of all parameters and buffers that must not change."""
        buffers = {name for name, _ in self.network.named_buffers()}
        for name, tensor in super().frozen():
            if self.args.protocol == "clean" or name not in buffers:
                yield name, tensor


def recorded(args, saved) -> dict:
    """Return the entries of a classifier's checkpoint that describe the pre-training."""
    values = {f"pretrained_{key}": saved[key] for key in ("epoch", "step") if key in saved}
    if saved.paper is None:
        values["of_another_program"] = True
    return {"pretrained_args": saved.get("opt"), **values}


SPEC = linear.Spec(
    script=__file__,
    parse_args=parse_args,
    flag="model_path",
    read=read,
    files=files,
    network=build_network,
    embed=embed,
    recipe=recipe,
    optimizer=pretraining.adam,
    rate=lambda args, at: args.learning_rate,
    label=label,
    weights=lambda network, classifier: {"state_dict": network.state_dict()},
    load=lambda network, classifier, saved: checkpoint.load_into(
        network, saved["state_dict"], saved.path
    ),
    digest=lambda saved, network: checkpoint.fingerprint(encoder_state(saved)),
    recorded=recorded,
    result=settings,
    derived=lambda args, saved, network, classifier: {
        **settings(args, saved),
        "protocol": args.protocol,
        "model": args.model,
    },
    published="debiased/published.json",
    protocol=protocol,
    method=Classifier,
    reopened=("protocol", "input_res"),
    side="test_size",
    whole=with_model,
)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    evaluation = folds if args.stl10_folds else linear
    evaluation.run(SPEC, args, process)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
