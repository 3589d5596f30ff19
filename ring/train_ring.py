#!/usr/bin/env python
"""Conditional Negative Sampling: pre-training.

Mike Wu, Milan Mosse, Chengxu Zhuang, Daniel Yamins, Noah Goodman. Conditional Negative Sampling for Contrastive Learning of
Visual Representations. ICLR 2021, arXiv:2010.02037. A minute on a laptop, and runs like those published:

    python ring/train_ring.py --demo --epochs 1
    python ring/train_ring.py ring/configs/cifar10_ir_ring.json --root data --gpu-device 0
    python ring/train_ring.py --root data --dataset stl10 --method moco --negatives ring --augmentation mocov2_96x96
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cmc import colour
from common import UsageError, augment, backbones, batchnorm, cli, launch, options, schedule, sets
from runner import checkpoint, knn, loop
from preprocess import demo
from ring import config, monitor, negatives, thresholds
from ring.memories import KeyQueue, MemoryBank
from ring.method import MOMENTA, SIDES, Method, last_operation, plain_view
from ring.networks import RESNETS

PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", conv3x3=False, augmentation="mocov2_32x32", epochs=12, batch_size=64, k=512,
        workers=2, save_freq=100, model_path="runs/try-ring", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    about = "settings in the published format (ring/configs); what is typed beats them"
    parser.add_argument("file", nargs="?", metavar="CONFIG.json", help=about)
    parser.add_argument("--config", metavar="FILE.json", help="the same as a flag")
    g = parser.add_argument_group("data")
    about = "where torchvision keeps a data set, or a tree with train/CLASS/*"
    g.add_argument("--root", "--data", dest="data", help=about)
    trees = ("folder", *(f"{name}_2views" for name in sets.TORCHVISION_SETS))
    options.add_data_arguments(g, trees, default="cifar10", workers=8)
    about = "mocov2: with blur, at 224 or the side named; v1: as the published settings have it"
    g.add_argument("--augmentation", choices=list(SIDES), default="v1", help=f"of IR and MoCo; {about}")
    g.add_argument("--stl-split", choices=["train", "train+unlabeled"], default="train", help="pictures of STL-10")

    g = parser.add_argument_group("model")
    g.add_argument("--resnet-version", choices=RESNETS, default="resnet18", help="trunk; a two-layer head follows")
    about = "3x3 first convolution, no max-pool: for small pictures"
    g.add_argument("--conv3x3", "--small-stem", action=cli.OnOff, default=False, help=about)
    g.add_argument("--out-dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    about = "ir: memory bank, one view; moco: queue, two views; cmc: lightness against colour, two banks"
    g.add_argument("--method", choices=list(MOMENTA), default="ir", help=about)
    about = "all candidates, the ball of the nearest, or the ring: the ball without the very nearest"
    g.add_argument("--negatives", choices=["all", "ball", "ring"], default="ring", help=about)
    about = "ir, cmc: positive and negatives drawn per anchor; moco: queue length"
    g.add_argument("--k", type=cli.positive_int, default=4096, help=about)
    g.add_argument("--t", type=cli.positive, default=0.07, help="temperature")
    about = "momentum: ir, cmc: of a memory row (default 0, .5); moco: of the key network (default .999)"
    g.add_argument("--m", type=cli.fraction, help=about)
    g.add_argument("--thres-outer", type=cli.share, default=0.1, help="ball: share of the candidates")
    g.add_argument("--thres-inner", type=cli.fraction, default=0.1, help="share of the ball that is cut out of it")
    about = "off: --thres-inner is a share of all candidates"
    g.add_argument("--dynamic-inner", action=cli.OnOff, default=True, help=about)
    g.add_argument("--neighbor-views", action=cli.OnOff, default=False, help="what is cut out counts as positive")
    about = "off: their mean score in the numerator, not their logsumexp"
    g.add_argument("--logsumexp-inner", action=cli.OnOff, default=True, help=about)
    about = "off: the positive is not in the denominator"
    g.add_argument("--self-negative", action=cli.OnOff, default=True, help=about)
    g.add_argument("--all-ring", action="store_true", help="ir, cmc: compare with the whole ring, without drawing")
    about = "ir: batch: the published slip, a ball of a share of the batch"
    g.add_argument("--ball-bank-size", choices=["bank", "batch"], default="bank", help=about)
    about = "outer threshold from 1 to .1: by formula, or by how the loss or the 1-NN accuracy moves"
    g.add_argument("--anneal", choices=thresholds.POLICIES, default="constant", help=about)
    g.add_argument("--max-anneal-epoch", type=cli.positive_int, default=100, help="epochs that it takes")
    about = "exponential: decay over all of them; default: .1 per step, as published, which is over in an epoch"
    g.add_argument("--anneal-rate", type=cli.positive, help=about)
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, default="Lab", help="cmc: colour space")
    g.add_argument("--shuffle-bn", action=cli.OnOff, default=True, help="moco: keys shuffled over batch-norm groups")
    about = "batch-norm groups over all processes; default: moco with shuffled keys 8, else 1"
    g.add_argument("--bn-splits", type=cli.positive_int, help=about)

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", "--num-epochs", type=cli.positive_int, default=200, help="epochs to run in all")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global, over all processes")
    g.add_argument("--learning-rate", "--lr", type=cli.positive, default=0.03, help="not scaled with the batch")
    about = "MoCoLRScheduler: a tenth after 68 and 83 percent of the epochs"
    g.add_argument("--scheduler", choices=["MoCoLRScheduler", "none"], default="MoCoLRScheduler", help=about)
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight-decay", type=cli.not_negative, default=1e-4, help="weight decay")

    g = parser.add_argument_group("run")
    g.add_argument(
        "--exp-base", dest="model_path", default="./runs/ring", help="the run gets a folder of its own in here"
    )
    about = "of that folder, the data set is added; default: pretrain_METHOD_NEGATIVES, and the seed where one is typed"
    g.add_argument("--exp-name", help=about)
    options.add_run_arguments(g)
    about = "epochs between 1-NN evaluations through the bank; default: 1, with class folders and packs 0 (never)"
    g.add_argument("--nn-every", type=cli.count, help=about)
    options.add_monitor_arguments(g, "of those compared with; cmc: mean over both views")
    about = "draw what is inside, in and beyond the ring of eight pictures, from a checkpoint (--resume), and end"
    g.add_argument("--show-ring", metavar="FILE.png", help=about)
    options.add_hardware_arguments(parser, compile=True)
    parser.add_argument("--gpu-device", metavar="N|cpu", help="as published: --gpu N, or --device cpu")
    parser.set_defaults(input_res=None, seed=1337)
    args = config.parse(parser, argv)

    options.check(args)
    if args.data is None:
        raise UsageError(
            "no data: give --root (and --dataset), a CONFIG.json that says it, or --demo for built-in pictures"
        )
    args.dataset = args.dataset.removesuffix("_2views")  # the method knows how many
    args.input_res = args.input_res or SIDES[args.augmentation]
    args.m = MOMENTA[args.method] if args.m is None else args.m
    if args.bn_splits is None:
        args.bn_splits = 8 if args.method == "moco" and args.shuffle_bn else 1
    if args.nn_every is None:
        args.nn_every = int(args.dataset in sets.TORCHVISION_SETS or args.anneal == "accuracy")
    config.check(args)
    annealed = f"_{args.anneal}" if args.anneal != "constant" else ""
    args.exp_name = args.exp_name or f"pretrain_{args.method}_{args.negatives}{annealed}{options.seed_suffix(args)}"
    args.folder = os.path.join(args.model_path, f"{args.exp_name}_{args.dataset}")
    if args.show_ring:
        args.resume, args.overwrite = args.resume or "auto", True  # nothing is written but the picture
    return args


def recipe(args) -> augment.Compose:
    """The augmentation of one view. That of CMC is Tian et al.'s: crop, flip and the channels of both views."""
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0)), augment.RandomHorizontalFlip()
    if args.method == "cmc":
        return augment.Compose(crop, flip, last_operation(args))
    if args.augmentation == "v1":
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, last_operation(args))
    jitter, blur = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augment.GaussianBlur((0.1, 2.0), p=0.5)
    return augment.Compose(crop, jitter, augment.RandomGrayscale(0.2), blur, flip, last_operation(args))


def build_loader(args, process: launch.Process):
    split = args.stl_split if args.dataset == "stl10" else "train"
    views = (recipe(args),) * (2 if args.method == "moco" else 1)
    return options.make_loader(args, process, options.open_split(args, split, unlabelled=True), views)


class IR(Method):
    """One view and a memory bank. The positive is the picture's own row, which its last crop has written."""

    def step(self, views, index, step: int) -> dict:
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        query, bank = self.encode(self.wrapped, images), self.bank()._bank  # N x D, n x D
        positive, (ranks, draws) = (query * bank[index]).sum(1), self.start(step, len(index))
        how = (self.args.t, self.rule, ranks, draws, self.describe(index, self.labels), self.scores)
        values = self.finish(negatives.conditional_loss(query, positive, bank, *how))
        self.bank().update(launch.all_gather(query), launch.all_gather(index))
        return values


class CMC(Method):
    """Two views of colour, a network and a bank for each. A view's feature is compared with the rows of the other view."""

    banks = ("memory_bank_l", "memory_bank_ab")

    def encode(self, network, images):
        with self.precision.autocast():
            return torch.cat([F.normalize(z.float(), dim=1) for z in network(images)], 1)  # N x 2 D

    def step(self, views, index, step: int) -> dict:
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        feats, (ranks, draws) = self.encode(self.wrapped, images), self.start(step, len(index))
        how, loss = (self.args.t, self.rule, ranks, draws, self.describe(index, self.labels), self.scores), 0
        for query, bank in zip(feats.chunk(2, 1), (self.bank(1)._bank, self.bank(0)._bank)):
            positive = (query * bank[index]).sum(1)
            loss = loss + negatives.conditional_loss(query, positive, bank, *how)
        values, index = self.finish(loss), launch.all_gather(index)
        for number, feat in enumerate(launch.all_gather(feats).chunk(2, 1)):
            self.bank(number).update(feat, index)
        return values

    def embed(self, images):
        with self.precision.autocast():
            return torch.cat(backbones.feature(self.encoder, images, 6), 1)

    def pictures(self, views) -> dict:
        return colour.Views(self.views).pictures(views[0])


class MoCo(Method):
    """Two views, a key network and a queue. The bank holds the queries and serves the 1-NN evaluation alone."""

    def build_system(self) -> nn.Module:
        system = KeyQueue(self.args.k, self.args.out_dim)
        system.model, system.memory_bank = self.encoder, MemoryBank(self.n, self.args.out_dim, 0)
        system.model_k = copy.deepcopy(self.encoder).requires_grad_(False)
        if self.args.compile:
            system.model_k.compile()
        return system

    def step(self, views, index, step: int) -> dict:
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in views)
        query, (ranks, _) = self.encode(self.wrapped, im_q), self.start(step, 0)  # N x D
        key, keys = self.encode_keys(im_k)  # N x D, (N * world) x D
        labels = None if self.labels is None else self.system.labels(self.labels)
        how = (self.args.t, self.rule, ranks, None, self.describe(index, labels), self.scores)
        values = self.finish(negatives.conditional_loss(query, (query * key).sum(1), self.system.queue, *how))
        index = launch.all_gather(index)
        self.system.enqueue(keys, index)
        self.bank().update(launch.all_gather(query), index)
        return values

    @torch.no_grad()
    def encode_keys(self, images):
        """Follow the query network, then unit keys, batch statistics taken over a shuffled batch: (own rows, all rows)."""
        follow = get_ema_multi_avg_fn(self.args.m)  # parameters only, and only here: an evaluation moves nothing
        follow(list(self.system.model_k.parameters()), [p.detach() for p in self.encoder.parameters()], None)
        if not self.args.shuffle_bn:
            key = self.encode(self.system.model_k, images)
            return key, launch.all_gather(key)
        shuffle = batchnorm.BatchShuffle(len(images), self.generators["draws"], images.device)
        everyone = shuffle.collect(self.encode(self.system.model_k, shuffle.spread(images)))
        return shuffle.own(everyone), everyone

    def state_dict(self) -> dict:
        return super().state_dict() | {"queue_pictures": self.system.pictures}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        super().load_state_dict(saved)
        found, own = saved.get("queue_pictures", torch.tensor(-1)), self.system.pictures
        fits = torch.is_tensor(found) and found.shape in ((), own.shape) and not found.is_floating_point()
        if not fits or not ((found >= -1) & (found < self.n)).all():
            saved.refuse("queue_pictures", found, f"a picture's number for each of {len(own)} keys")
        own.copy_(found)


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 0."""
    drops = [max(1, int(share * args.epochs)) for share in (0.68, 0.83)]
    return schedule.step(args.learning_rate, epoch, drops if args.scheduler == "MoCoLRScheduler" else [])


def worker(args, process: launch.Process) -> None:
    files = dict(last="last.ckpt", numbered="epoch={}.ckpt", first=0)
    with loop.Job(args, process, args.folder, **files, same=("method", "resnet_version", "view")) as job:
        groups = batchnorm.splits_here(args, process) * process.world_size
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        knn = knn.loaders(args, process, loader.dataset, plain_view(args))
        nearest = monitor.val_loader(args, process, loader.dataset, plain_view(args))
        method = {"ir": IR, "cmc": CMC, "moco": MoCo}[args.method](args, loader.dataset, len(loader), process)
        monitor.adopt_published(job.saved)
        if args.show_ring:
            return monitor.show_ring(job, method, loader.dataset)
        ranks = method.rule.narrowest(method.policy.least, method.candidates, args.batch_size)
        job.begin(
            loader,
            method,
            candidates=method.candidates,
            narrowest_ring="ranks {} to {}".format(*ranks),
            bn_groups=groups,
        )
        monitor.warn(job, method, ranks)
        for epoch in job.epochs():
            lr = learning_rate(args, epoch)
            schedule.set_lr(method.optimizer, lr)
            for views, _, index in job.batches():
                job.track(**method.step(views, index, job.global_step), learning_rate=lr)
                if args.save_score:
                    job.keep_scores(torch.stack(method.scores).mean(0))
            if job.due(args.nn_every):
                monitor.evaluate_nearest(job, method, nearest)
            if job.due(args.knn_every):
                knn.evaluate(job, method.encoder, method.embed, knn)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
