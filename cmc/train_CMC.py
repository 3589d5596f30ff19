#!/usr/bin/env python
"""Contrastive Multiview Coding: pre-training.

Yonglong Tian, Dilip Krishnan, Phillip Isola. ECCV 2020, arXiv:1906.05849. Lightness is contrasted with colour (--view), or
any number of views with each other (--views). A minute on a laptop, and a run like those published:

    python cmc/train_CMC.py --demo --epochs 1
    python cmc/train_CMC.py --data_folder IMAGENET100 --dataset imagenet100 --model resnet50v1 \\
        --view YCbCr --softmax --nce_k 4096
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F

from cmc import colour
from cmc.contrast import LONG_AGO, MemoryBanks
from cmc.networks import MODELS, build_network
from common import UsageError, augment, backbones, batchnorm, cli, launch, memory, options, schedule
from runner import checkpoint, knn, layouts, loop
from common.precision import Precision
from preprocess import demo

PRESETS = {
    # 50,000 small pictures (CIFAR): the published settings compare with a third of the data set at every step
    "small": dict(
        model="resnet18v1", dataset="folder", input_res=32, small_stem=True, softmax=True, nce_k=4096, nce_t=0.1
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18v1", input_res=32, epochs=12, batch_size=64, learning_rate=0.03,
        lr_decay_epochs="8,10", nce_k=512, nce_t=0.1, workers=2, save_freq=100, model_path="runs/try-cmc", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/*, or pictures alone")
    options.add_data_arguments(g, trees=("imagenet", "imagenet100", "folder"), default="imagenet", workers=18)
    about = "least share of the picture that a crop covers; default .2, with --dataset imagenet and a ResNet .08"
    g.add_argument("--crop_low", type=cli.share, help=about)

    g = parser.add_argument_group("model")
    about = "network of each view; v1, v2, v3: stages of half, once, twice the width"
    g.add_argument("--model", choices=list(MODELS), default="alexnet", help=about)
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    about = "colour space; its lightness is one view, the other two channels the other"
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, default="Lab", help=about)
    about = "views made of other channels, or more than two: every pair is contrasted; such as L,a,b or L,ab,YCbCr:CbCr"
    g.add_argument("--views", metavar="VIEW,VIEW,...", help=about)
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    g.add_argument("--nce_k", type=cli.positive_int, default=16384, help="negatives per anchor")
    g.add_argument("--nce_t", type=cli.positive, help="temperature; default .07, with --dataset stl10 .1")
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help="momentum of a memory row")
    about = (
        "NCE: Z follows a moving average (its decay rises to .99), or stays that of the first batch, as first published"
    )
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help=about)
    g.add_argument("--exclude-self", action="store_true", help="never draw a picture as its own negative")
    about = "batch-norm groups over all processes, as on that many GPUs"
    g.add_argument("--bn-splits", type=cli.positive_int, default=1, help=about)

    options.add_sgd_arguments(parser.add_argument_group("optimisation"))
    g = parser.add_argument_group("run")
    g.add_argument("--model_path", default="./runs/cmc", help="the run gets a folder of its own in here")
    options.add_name_argument(g)
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g)
    options.add_monitor_arguments(g, "mean over the pairs of views")
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("TensorBoard gets a point every --print_freq steps", "tb_freq")
    parser.ignore("pre-training uses SGD", "beta1", "beta2")
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/CLASS/*, or --demo for built-in pictures")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.views is not None:  # in one spelling; None where they are the default ones
        views = colour.parse_views(args.views, args.view)
        args.views = None if views == colour.default_views(args.view) else ",".join(view.name for view in views)
    if args.crop_low is None:  # published: .08 for a ResNet on ImageNet whatever was typed
        args.crop_low = 0.08 if args.dataset == "imagenet" and args.model != "alexnet" else 0.2
    if args.nce_t is None:
        args.nce_t = 0.1 if args.dataset == "stl10" else 0.07
    if args.model == "alexnet":
        if args.bn_splits > 1:
            raise UsageError(f"--bn-splits {args.bn_splits}: AlexNet's fully connected layers cannot be split")
        with torch.device("meta"):  # no numbers, only shapes: says if the pictures are too small
            network = build_network(args.model, colour.chosen_views(args), args.feat_dim, args.small_stem)
        backbones.feature_shape(network, (sum(network.channels), args.input_res, args.input_res), layer=1)
    if "nce_z" in args.typed and "softmax" not in args.typed:
        args.softmax = False  # whatever the preset says
    if args.softmax and "nce_z" in args.typed:
        raise UsageError(f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; omit one of the two")
    args.folder = options.run_folder(args, args.model_path, run_name(args))
    return args


def run_name(args) -> str:
    """The published name of the run folder. What it leaves out (temperature, data set, ...) is in config.json."""
    loss = "softmax" if args.softmax else "nce" if args.nce_z == "ema" else "nce_oneshot"
    views = f"_views_{'-'.join(colour.view_keys(colour.chosen_views(args)))}" if args.views else ""
    return (
        f"memory_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}_decay_{args.weight_decay}_bsz_{args.batch_size}"
        f"{f'_amp_{args.opt_level}' * args.amp}_view_{args.view}{views}"
    )


def recipe(args) -> augment.Compose:
    """The augmentation: crop and flip; then the channels of all views. There is no jitter, greyscale or blur."""
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), colour.Views(colour.chosen_views(args)))


def build_loader(args, process: launch.Process):
    return options.make_loader(args, process, options.open_pretraining(args), (recipe(args),))


class CMC:
    """A network and a memory bank for every view. A step compares each view's feature with bank rows of the other views of
    this picture and of drawn ones, then writes it to its own bank."""

    def __init__(self, args, n: int, process: launch.Process):
        self.views, self.alexnet = colour.chosen_views(args), args.model == "alexnet"
        self.names, self.softmax, self.exclude_self = colour.bank_names(self.views), args.softmax, args.exclude_self
        network = build_network(args.model, self.views, args.feat_dim, args.small_stem)
        batchnorm.split(network, batchnorm.splits_here(args, process))
        network = network.to(process.device, memory_format=torch.channels_last).train()
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
        self.precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
        self.encoder, self.optimizer = self.precision.prepare(network, torch.optim.SGD(network.parameters(), **sgd))
        if args.compile:
            self.encoder.compile()
        self.wrapped = launch.parallel(self.encoder, process)
        bank = (args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory = MemoryBanks(n, args.feat_dim, self.names, *bank).to(process.device)
        draws = torch.Generator(process.device).manual_seed(args.seed)  # negatives; the same on every rank
        self.generators, self.scores = {"draws": draws}, [] if args.save_score else None

    def step(self, views, index):
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            feats = self.wrapped(images)
        feats = [F.normalize(feat.float(), dim=1) for feat in feats]  # V times N x D
        rows = memory.draw_rows(index, self.memory.n, self.memory.k, self.generators["draws"], self.exclude_self)
        losses, out = self.memory(feats, rows, self.scores)  # of every view; of every pair, N x (1 + K)
        self.precision.step(losses.sum(), self.optimizer)
        everyone = launch.all_gather(torch.cat(feats, 1)).chunk(len(feats), 1)
        self.memory.update(everyone, launch.all_gather(index))
        return losses.detach(), [o.detach() for o in out]

    def curves(self, losses, out) -> dict:
        """The published curves of each view: its loss, and "prob", the mean of column 0, which with InfoNCE is a logit; then
        the probability of the positive itself (InfoNCE), or Z over the number of pictures (NCE), over all pairs of views."""
        probs = torch.stack([o[:, 0].mean() for o in out]).view(len(self.names), -1).mean(1)
        curves = {"loss": losses.sum()}
        for name, loss, prob in zip(self.names, losses, probs):
            curves |= {f"{name}_loss": loss, f"{name}_prob": prob}
        if not self.softmax:
            return curves | {"z_over_n": self.memory.normaliser.mean() / self.memory.n}
        return curves | {"positive_prob": torch.stack([(o[:, 0] - o.logsumexp(1)).exp().mean() for o in out]).mean()}

    def embed(self, images):
        """What enters the heads, of all views side by side: (N, D)."""
        with self.precision.autocast():
            return torch.cat(backbones.feature(self.encoder, images, 7 if self.alexnet else 6), 1)

    def pictures(self, views) -> dict:
        return colour.Views(self.views).pictures(views[0])

    def state_dict(self) -> dict:
        model = layouts.add_prefix(self.encoder.state_dict(), PREFIX)
        return {"model": model, "contrast": self.memory.state_dict(), "z_updates": self.memory.updates}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        self.memory.load(saved["contrast"], saved.get("z_updates", LONG_AGO), saved.path)
        checkpoint.load_into(self.encoder, layouts.strip_prefix(saved["model"], PREFIX), saved.path)


PREFIX = "encoder.module."  # of the networks' parameter names in the published files


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 1; the first one after 120 complete ones is the first to drop."""
    return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)


def worker(args, process: launch.Process) -> None:
    files = dict(last="current.pth", numbered="ckpt_epoch_{}.pth", same=("model", "view", "views"))
    events = os.path.join(args.tb_path, os.path.basename(args.folder)) if args.tb_path else True
    with loop.Job(args, process, args.folder, **files, tensorboard=events) as job:
        groups = batchnorm.splits_here(args, process) * process.world_size
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        n, views = len(loader.dataset), colour.chosen_views(args)
        knn = knn.loaders(args, process, loader.dataset, options.plain_view(args, colour.Views(views)))
        method = CMC(args, n, process)
        names = ", ".join(view.name for view in views)
        loss = "InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}"
        job.begin(loader, method, views=names, loss=loss, crop_low=args.crop_low, nce_t=args.nce_t, bn_groups=groups)
        if args.nce_k >= n:
            job.warn(
                f"--nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn again and again, the "
                "picture itself too (--exclude-self); use fewer (--preset small)"
            )
        for epoch in job.epochs():
            lr = learning_rate(args, epoch)
            schedule.set_lr(method.optimizer, lr)
            for views, _, index in job.batches():
                losses, out = method.step(views, index)
                job.track(**method.curves(losses, out), learning_rate=lr)
                if args.save_score:
                    job.keep_scores(method.scores.pop())
            if job.due(args.knn_every):
                knn.evaluate(job, method.encoder, method.embed, knn)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
