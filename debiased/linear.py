#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by debiased contrastive learning: a classifier on its frozen encoder f.

After `main.py --demo`; the clean protocol on STL-10; and the published one, whose batch-norm goes on adapting:

    python debiased/linear.py --demo
    python debiased/linear.py --model_path results/model_400.pth
    python debiased/linear.py --model_path results/model_400.pth --protocol published
"""

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch

from common import UsageError, UserError, augment, cli, launch, options
from runner import checkpoint, layouts, linear, loop
from common.precision import Precision
from debiased import main as pretraining
from debiased.main import NORMALIZE
from debiased.networks import Encoder, LinearNet, described
from preprocess import demo

SETTINGS = (  # of the pre-training, which two seeds of one experiment have in common
    "batch_size", "learning_rate", "cosine", "bn_splits", "input_res", "small_stem", "feature_dim",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-debiased", save_path="runs/try-debiased-linear", workers=2,
        epochs=40, batch_size=128, learning_rate=3e-3, cache_views=4, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    about = "class folders with train/CLASS/* and val/CLASS/*, or where the files of a torchvision set are or shall be"
    g.add_argument("--data_folder", dest="data", default="data", help=about)
    options.add_data_arguments(g, trees=("folder",), default="stl10", workers=4)
    about = "side of the whole pictures it is tested on; default: 96 for STL-10, as published, else --input-res"
    g.add_argument("--test-size", type=cli.positive_int, help=about)
    g.set_defaults(input_res=None)

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint, the authors' or ours, or a run folder: its newest"
    g.add_argument("--model_path", default="results/model_400.pth", metavar="PATH", help=about)

    g = parser.add_argument_group("method")
    about = (
        "clean: f in eval mode, crop and flip; published: f's batch-norm in train mode while the classifier is trained, its "
        "statistics overwritten, and the augmentation of pre-training"
    )
    g.add_argument("--protocol", choices=["clean", "published"], default="clean", help=about)

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=100, help="epochs to run in all, counted from 1")
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=512, help="global, over all processes")
    about = "of Adam; constant, not scaled with the batch"
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=1e-3, help=about)
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-6, help="weight decay")
    linear.add_arguments(g)

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/debiased_linear", help="the run gets a folder of its own in here")
    options.add_name_argument(g, "made of its settings, and the seed where one is typed")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("--label", help="name of the run in a report; default: made of its settings")
    options.add_hardware_arguments(parser)
    pretraining.refuse_spaced_equals(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)

    options.check(args)
    if args.protocol == "published" and "cache_views" in args.typed and args.cache_views:
        raise UsageError("--cache-views: with --protocol published features depend on the batch; omit one of the two")
    if args.protocol == "published":
        args.cache_views = 0
    return args


def read_backbone(args) -> checkpoint.Saved:
    """The pre-training checkpoint, the authors' bare state dict or ours, and what it says about its network."""
    saved = linear.pretrained(args.model_path, "--model_path", f"debiased/main.py{' --demo' * args.demo}")
    if "best_acc1" in saved:
        raise UserError(
            f"{saved.path} is a classifier of a linear evaluation: give the network to --model_path, this to --resume"
        )
    number = re.search(r"model_(\d+)", os.path.basename(saved.path))
    if "epoch" not in saved and number:  # the published files carry it in their name alone
        saved["epoch"] = int(number[1])
    opt = saved.get("opt") or {}
    args.input_res = args.input_res or opt.get("input_res", 32)
    if args.test_size is None:
        args.test_size = 96 if args.dataset == "stl10" else args.input_res
    return saved


def encoder_state(saved: checkpoint.Saved) -> dict:
    """The parameters of f, as `f.0.weight` and so on; the head g is not used."""
    state = saved.get("state_dict", saved)
    state = layouts.strip_prefix({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    return {k: v for k, v in state.items() if k.startswith("f.")}


def build_network(saved: checkpoint.Saved, args, classes: int, process: launch.Process) -> LinearNet:
    """f from the checkpoint, frozen, in eval mode; a fresh classifier with torch's own initialisation."""
    state = encoder_state(saved)
    args.model, small_stem = described(state, saved.path)
    network = LinearNet(Encoder(args.model, small_stem), classes)
    checkpoint.load_into(network, state, saved.path, ("fc.",))
    return network.eval().to(process.device, memory_format=torch.channels_last)


def recipe(args, train: bool) -> augment.Compose:
    if not train:
        return pretraining.whole_view(args)
    if args.protocol == "published":
        return pretraining.recipe(args)
    return augment.Compose(augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip(), NORMALIZE)


class Classifier(linear.Classifier):
    """The published layout, f and fc in one state dict. With the published protocol only f's parameters are frozen."""

    def __init__(self, adapts: bool, network: LinearNet, /, *rest, **facts):
        self.adapts = adapts
        super().__init__(network, *rest, **facts)

    def _frozen(self):
        kept = dict(self.network.named_parameters()) if self.adapts else self.network.state_dict()
        return ((name, tensor) for name, tensor in super()._frozen() if name in kept)

    def weights(self) -> dict:
        return {"state_dict": self.network.state_dict()}

    def load_weights(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_into(self.network, saved["state_dict"], saved.path)


def embed(network: LinearNet, images, precision: Precision, adapts: bool):
    """Features that are not normalised. adapts: f is in train mode exactly while the classifier is."""
    adapting = adapts and network.fc.training
    if network.f.training and not adapting:  # the first pictures of an evaluation: with the statistics of rank 0
        launch.broadcast_buffers(network)
    network.f.train(adapting)
    with precision.autocast():
        return network.f(images)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    saved = read_backbone(args)
    folder, file = os.path.split(os.path.abspath(saved.path))
    name = f"{os.path.basename(folder)}_{file.partition('.')[0]}_{args.protocol}"
    name += f"_bsz_{args.batch_size}_lr_{args.learning_rate}"
    same = ("protocol",)
    folder = options.run_folder(args, args.save_path, name)
    with loop.Job(args, process, folder, last="current.pth", same=same, by_epoch=True) as job:
        train_set = options.open_split(args, "train")
        val_set = options.open_split(args, "val", classes=train_set.classes)
        network = build_network(saved, args, len(train_set.classes), process)
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay)
        optimizer = torch.optim.Adam(network.fc.parameters(), **adam)
        precision, adapts = Precision(args.amp, process.device), args.protocol == "published"

        def embedder(images):
            return embed(network, images, precision, adapts)

        facts = dict(script="debiased/linear.py", classes=train_set.classes, network=saved.path)
        facts |= dict(digest=checkpoint.fingerprint(encoder_state(saved)), pretrained_args=saved.get("opt"))
        facts |= {f"pretrained_{key}": saved[key] for key in ("epoch", "step") if key in saved}
        method = Classifier(adapts, network, embedder, network.fc, optimizer, process, **facts)
        views = recipe(args, train=True), recipe(args, train=False)
        train_loader, val_loader = linear.loaders(args, process, train_set, val_set, *views)
        facts = dict(protocol=args.protocol, train_size=args.input_res, test_size=args.test_size)
        known = dict(
            val_images=len(val_set), model=args.model, network=saved.path, pretrained_epochs=saved.get("epoch")
        )
        job.begin(train_loader, method, **facts, **known, precision=str(precision))
        whole = linear.train(job, method, val_loader, lambda epoch, part: args.learning_rate, "model_best.pth")
        if whole:
            made = row_label(saved.get("opt"), saved.path, args.protocol)
            linear.report(job, saved, made, table="debiased/published.json", **facts)


def row_label(opt: dict | None, path: str, protocol: str) -> str:
    """Of the run in a report: how it was pre-trained, and the protocol of this evaluation where it is the published one."""
    made, opt = os.path.basename(path), opt or {}
    if opt.keys() >= {"loss", "tau_plus", "M", "temperature"}:
        what = (
            f", tau_plus {opt['tau_plus']}" + f", M {opt['M']}" * (opt["M"] != 1) if opt["loss"] == "debiased" else ""
        )
        made = f"{opt['loss']}{what}, t {opt['temperature']}"
    return made + ", published protocol" * (protocol == "published")


def reopen(saved, network, input_res: int | None, process: launch.Process, precision):
    """A classifier of this script, as tools/robustness.py looks at it (what is returned is said there).

    The file holds the whole network, with the statistics that it was tested with, whatever the protocol.
    """
    opt, state = saved.get("opt") or {}, saved.get("state_dict") or {}
    if not {"fc.weight", "f.0.weight"} <= state.keys() or "protocol" not in opt:
        return None
    args, flags = parse_args([f"--test-size={input_res or opt['test_size']}"]), saved.get("pretrained_args") or {}
    arch, small_stem = described(state, saved.path)
    model = LinearNet(Encoder(arch, small_stem), len(state["fc.weight"]))
    checkpoint.load_into(model, state, saved.path)
    model = model.eval().to(process.device, memory_format=torch.channels_last)
    facts = dict(arch=arch, outputs=model.fc.out_features, input_res=args.test_size, resize=args.test_size)
    facts |= dict(label=row_label(flags, saved["network"], opt["protocol"]), protocol=opt["protocol"])
    facts |= dict(epochs=saved.get("pretrained_epoch"), seed=flags.get("seed"), pretrained=saved["network"])
    facts |= saved.how_far() if "pretrained_epoch" in saved else {}
    facts |= dict(settings={name: flags[name] for name in SETTINGS if name in flags} | {"protocol": opt["protocol"]})
    view = pretraining.whole_view(args)
    return lambda images: model.fc(embed(model, images, precision, False).float()), view.ops, facts


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
