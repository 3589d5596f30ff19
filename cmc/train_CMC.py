#!/usr/bin/env python
"""Contrastive Multiview Coding: pre-training.

Yonglong Tian, Dilip Krishnan, Phillip Isola. ECCV 2020, arXiv:1906.05849. Any number of views can
be contrasted (--views). A minute on a laptop, and a published run:

    python cmc/train_CMC.py --demo --epochs 1
    python cmc/train_CMC.py --data_folder IMAGENET100 --dataset imagenet100 --model resnet50v1 \\
        --view YCbCr --softmax --nce_k 4096
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

from cmc import colour, flags
from cmc.contrast import MemoryBanks
from cmc.networks import MODELS, build_network
from common import (
    augment,
    backbones,
    batchnorm,
    cli,
    collectives,
    footing,
    inputs,
    launch,
    memory,
    metrics,
    nce,
    options,
    schedule,
)
from preprocess import demo
from runner import checkpoint, knn, layouts, loop, pretrained, training

PREFIX = "encoder.module."  # begins the networks' parameter names in the published files
PRESETS = {
    # for CIFAR's 50,000 pictures, of which the published K, 16384, is a third
    "small": dict(
        model="resnet18v1", dataset="folder", input_res=32, small_stem=True, softmax=True,
        nce_k=4096, nce_t=0.1,
    ),
    "compare": dict(
        options.COMPARE, model="resnet18-small", softmax=True, nce_k=4096, nce_t=0.1,
        learning_rate=0.06,
    ),
    "photos": dict(
        options.PHOTOS, model="resnet18v1", softmax=True, nce_k=32, nce_t=0.1, learning_rate=0.015,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18v1", input_res=32, epochs=12,
        batch_size=64, learning_rate=0.03, lr_decay_epochs="8,10", nce_k=512, nce_t=0.1, workers=2,
        save_freq=100, model_path="runs/try-cmc", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/*, or pictures alone"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    options.add_data_arguments(g, ("imagenet", "imagenet100", "folder"), "imagenet", workers=18)
    text = "least share of the picture that a crop covers; default .2, for a ResNet on imagenet .08"
    g.add_argument("--crop_low", type=cli.share, help=text)

    g = parser.add_argument_group("model")
    text = "network of each view; v1, v2, v3: stages of half, once, twice the width"
    g.add_argument("--model", "--arch", choices=list(MODELS), default="alexnet", help=text)
    g.add_argument("--small-stem", action="store_true", help=options.SMALL_STEM)
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")
    options.add_init_argument(g)

    g = parser.add_argument_group("method")
    text = "colour space: its lightness is one view, its other two channels are the second one"
    g.add_argument(
        "--view", type=colour.space_name, choices=colour.SPACES, default="Lab", help=text
    )
    text = "views in place of --view, such as L,a,b or L,ab,YCbCr:CbCr; every pair is contrasted"
    g.add_argument("--views", metavar="VIEW,VIEW,...", help=text)
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    text = "negatives per anchor"
    g.add_argument("--nce_k", "--negatives-k", type=cli.positive_int, default=16384, help=text)
    text = "temperature; default .07, on stl10 .1"
    g.add_argument("--nce_t", "--temperature", type=cli.positive, help=text)
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help="momentum of a memory row")
    text = "NCE: Z is a moving average over batches, or stays that of the first one, as published"
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help=text)
    text = "never draw a picture as its own negative"
    g.add_argument("--exclude-self", action="store_true", help=text)
    text = (
        "with --softmax: compare with the rows as they were when the epoch began, so that their "
        "age does not tell the positive from the negatives"
    )
    g.add_argument("--epoch-rows", action="store_true", help=text)
    text = "batch-norm groups over all processes, as on that many GPUs"
    g.add_argument("--bn-splits", type=cli.positive_int, default=1, help=text)

    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g)
    footing.add_argument(g)
    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--model_path", "--out", default="./runs/cmc", help=text)
    options.add_name_argument(g)
    options.add_run_arguments(g, tb_path=True)
    options.add_monitor_arguments(g, "mean over the pairs of views")
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("TensorBoard gets a point every --print_freq steps", "tb_freq")
    parser.ignore("pre-training uses SGD", "beta1", "beta2")
    args = parser.parse_args(argv)
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def recipe(args) -> augment.Compose:
    """Return the operations: crop, flip, conversion to all views; no jitter, grey or blur."""
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0))
    flip = augment.RandomHorizontalFlip()
    return augment.Compose(crop, flip, colour.Views(colour.chosen_views(args)))


def build_loader(args, process: launch.Process):
    return inputs.make_loader(args, process, inputs.open_pretraining(args), (recipe(args),))


class CMC:
    """A network and a memory bank for every view.

    A step compares each view's feature with the other views' banks (the row of the same picture is
    the positive, drawn rows are the negatives), and then writes it to its own view's bank.
    """

    def __init__(self, args, n: int, process: launch.Process):
        self.args = args
        self.views = colour.chosen_views(args)
        mlp = args.footing == "common"  # the head of that footing
        network = build_network(args.model, self.views, args.feat_dim, args.small_stem, mlp)
        pretrained.start_from(network, args.init, "encoder.")
        batchnorm.split(network, backbones.splits_here(args, process))
        parts = training.prepare(network, args, process, channels=sum(network.channels))
        self.network, self.wrapped, self.optimizer, self.precision = parts
        size = (n, args.feat_dim, colour.bank_names(self.views))
        settings = (args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory = MemoryBanks(*size, *settings, args.epoch_rows).to(process.device)
        if args.softmax:
            self.equal_loss = len(self.memory.pairs) * nce.equal_loss(args.nce_k)
        draws = torch.Generator(process.device).manual_seed(args.seed)  # the same on every rank
        self.generators = {"draws": draws}

    def step(self, batch: loop.Batch) -> dict:
        if batch.at.part == 0:
            self.memory.start_epoch()
        images = batch.views[0].contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            feats = self.wrapped(images)
        feats = [F.normalize(feat.float(), dim=1) for feat in feats]  # N x D for each view
        args, draws = self.args, self.generators["draws"]
        rows = memory.draw_rows(batch.index, self.memory.n, args.nce_k, draws, args.exclude_self)
        logits = self.memory.logits(feats, rows)  # N x (1 + K) for each pair of views
        losses, out = self.memory.losses(logits)  # losses: one for each view
        self.precision.step(losses.sum(), self.optimizer)
        everyone = collectives.all_gather(torch.cat(feats, 1)).chunk(len(feats), 1)
        self.memory.update(everyone, collectives.all_gather(batch.index))
        return self.values_to_log(losses.detach(), out, logits, feats)

    def values_to_log(self, losses, out, logits, feats) -> dict:
        """Return the values to log: loss and probability of the positive, also of each view.

        losses (V,), out: what the memory's `losses` returned. Probabilities, scores and, with NCE,
        Z over the number of pictures are means over the pairs of views.
        """
        n = None if self.args.softmax else self.memory.n
        probs = torch.stack([nce.positive_prob(pair, n) for pair in out])  # of each pair
        negatives = [pair.detach()[:, 1:].mean() for pair in logits]
        values = {
            "loss": losses.sum(),
            "positive_prob": probs.mean(),
            "feature_spread": torch.stack([metrics.spread(feat) for feat in feats]).mean(),
            "negative_similarity": torch.stack(negatives).mean() * self.memory.temperature,
        }
        of_views = probs.view(len(self.views), -1).mean(1)
        for name, loss, prob in zip(colour.view_keys(self.views), losses, of_views):
            values |= {f"{name}_loss": loss, f"{name}_prob": prob}
        if not self.args.softmax:
            values["z_over_n"] = self.memory.normaliser.mean() / self.memory.n
        if self.args.save_score:
            t = self.memory.temperature
            pairs = [metrics.score_statistics(pair[:, 0], pair[:, 1:], t) for pair in logits]
            values["scores"] = torch.stack(pairs).mean(0)
        return values

    def embed(self, images):
        """Return the features that enter the heads, of all views side by side: (N, D)."""
        layer = 7 if self.args.model == "alexnet" else 6
        with self.precision.autocast():
            return torch.cat(backbones.feature(self.network, images, layer), 1)

    def pictures(self, views) -> dict:
        return colour.Views(self.views).pictures(views[0])

    def state_dict(self) -> dict:
        state = {
            "model": layouts.add_prefix(self.network.state_dict(), PREFIX),
            "contrast": self.memory.state_dict(),
            "z_updates": self.memory.updates,
        }
        if self.args.epoch_rows:
            state["epoch_rows"] = self.memory.banks("epoch")
        return state

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        self.memory.load(saved["contrast"], saved.get("z_updates", nce.LONG_AGO), saved.path)
        if self.args.epoch_rows:
            rows = saved.get("epoch_rows", self.memory.banks())
            for copy, own in zip(self.memory.banks("epoch"), rows):
                copy.copy_(own)
        model = layouts.strip_prefix(saved["model"], PREFIX)
        checkpoint.load_into(self.network, model, saved.path)


def build_method(args, pictures, steps: int, process: launch.Process) -> CMC:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    return CMC(args, len(pictures), process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate: drops after --lr_decay_epochs, or the cosine of the footing."""
    if args.footing == "common":
        return footing.learning_rate(args.learning_rate, at, args.epochs)
    return schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)


def worker(args, process: launch.Process) -> None:
    files = loop.Files(
        __file__,
        last="current.pth",
        numbered="ckpt_epoch_{}.pth",
        same=("dataset", "model", "view", "views"),
        events=options.events(args, args.folder),
    )
    with loop.Job(args, process, args.folder, files) as job:
        args = job.args
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        pictures = loader.dataset
        plain = inputs.plain_view(args, colour.Views(colour.chosen_views(args)))
        neighbours = knn.loaders(args, process, pictures, plain)
        method = build_method(args, pictures, len(loader), process)
        job.begin(
            loader,
            method,
            views=", ".join(view.name for view in method.views),
            loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}",
            crop_low=args.crop_low,
            nce_t=args.nce_t,
            bn_groups=backbones.splits_here(args, process) * process.world_size,
        )
        if args.nce_k >= len(pictures):
            n = len(pictures)
            way_out = "" if args.exclude_self else ", and --exclude-self"
            job.warn(options.many_draws("--nce_k", args.nce_k, n, way_out))
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
