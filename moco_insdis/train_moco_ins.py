#!/usr/bin/env python
"""MoCo and Instance Discrimination: pre-training.

Momentum Contrast for Unsupervised Visual Representation Learning. Kaiming He et al. CVPR 2020, arXiv:1911.05722.
Unsupervised Feature Learning via Non-Parametric Instance Discrimination. Zhirong Wu et al. CVPR 2018, arXiv:1805.01978.
Both in the form that was published next to Contrastive Multiview Coding. A minute on a laptop, and the published runs:

    python moco_insdis/train_moco_ins.py --demo --moco --epochs 1
    python moco_insdis/train_moco_ins.py --data_folder IMAGENET100 --batch_size 128 --num_workers 24 --nce_k 16384 --softmax
    python moco_insdis/train_moco_ins.py --data_folder IMAGENET100 --batch_size 128 --num_workers 24 --nce_k 16384 --softmax \\
        --moco
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import UsageError, UserError, augment, backbones, batchnorm, cli, launch, memory, options, schedule
from runner import checkpoint, knn, layouts, loop
from common.precision import Precision
from moco_insdis.contrast import LONG_AGO, KeyQueue, MemoryBank, warn
from moco_insdis.networks import MODELS, build_network
from preprocess import demo

WARM_FROM, WARM_EPOCHS = 0.01, 10  # of --warm, as the same author's later code (PyContrast) has them
PRESETS = {
    # 50,000 small pictures (CIFAR): the published settings compare with a third of the data set at every step
    "small": dict(
        model="resnet18", dataset="folder", input_res=32, small_stem=True, softmax=True, nce_k=4096, nce_t=0.1, alpha=0.99
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", input_res=32, epochs=12, batch_size=64, learning_rate=0.03,
        lr_decay_epochs="8,10", nce_k=512, nce_t=0.1, alpha=0.99, bn_splits=2, workers=2, save_freq=100,
        model_path="runs/try-moco-insdis", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/*, or pictures alone")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100", workers=18)
    about = "least share of the picture that a crop covers; default .2, with --dataset imagenet .08"
    g.add_argument("--crop", type=cli.share, help=about)
    about = "CJ: greyscale and colour jitter; NULL: crop and flip only"
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ", help=about)

    g = parser.add_argument_group("model")
    g.add_argument("--model", choices=list(MODELS), default="resnet50", help="network; x2, x4: wider stages")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    g.add_argument("--moco", action="store_true", help="MoCo (two views, queue of keys); else InsDis (memory bank)")
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    about = "negatives per query; for MoCo the queue length"
    g.add_argument("--nce_k", type=cli.positive_int, default=16384, help=about)
    g.add_argument("--nce_t", type=cli.positive, default=0.07, help="temperature")
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help="InsDis: momentum of a memory row")
    about = (
        "NCE: Z follows a moving average (its decay rises to .99), or stays that of the first batch, as first published"
    )
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help=about)
    g.add_argument("--exclude-self", action="store_true", help="InsDis: never draw a picture as its own negative")
    g.add_argument("--alpha", type=cli.fraction, default=0.999, help="MoCo: momentum of the key encoder")
    about = (
        "batch-norm groups over all processes; MoCo shuffles keys over them; default: MoCo 4 (as published), InsDis 1"
    )
    g.add_argument("--bn-splits", type=cli.positive_int, help=about)
    g.add_argument("--syncBN", action="store_true", help="InsDis: batch-norm statistics over all processes")

    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g)
    about = f"warm up from {WARM_FROM} in {WARM_EPOCHS} epochs (published: no effect)"
    g.add_argument("--warm", action="store_true", help=about)

    g = parser.add_argument_group("run")
    g.add_argument("--model_path", default="./runs/moco_insdis", help="the run gets a folder of its own in here")
    options.add_name_argument(g)
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g)
    options.add_monitor_arguments(g)
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("TensorBoard gets a point every --print_freq steps", "tb_freq")
    parser.ignore("pre-training uses SGD", "beta1", "beta2")
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/CLASS/*, or --demo for built-in pictures")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.crop is None:  # published: .08 for ImageNet whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" else 0.2
    if args.bn_splits is None:
        args.bn_splits = 4 if args.moco else 1
    if args.moco and args.nce_k < args.batch_size:
        raise UsageError(f"--nce_k {args.nce_k}: a queue must hold at least a global batch of keys ({args.batch_size})")
    for flag in ("exclude_self", "syncBN", "nce_m") if args.moco else ("alpha",):
        if flag in args.typed:
            other = "InsDis: omit --moco" if args.moco else "MoCo: add --moco"
            raise UsageError(f"--{flag.replace('_', '-')} belongs to {other}, or omit it")
    if args.syncBN and args.bn_splits > 1:
        raise UsageError("--syncBN joins what --bn-splits takes apart; omit one of the two")
    if "nce_z" in args.typed and "softmax" not in args.typed:
        args.softmax = False  # whatever the preset says
    if args.softmax and "nce_z" in args.typed:
        raise UsageError(f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; omit one of the two")
    args.folder = options.run_folder(args, args.model_path, run_name(args))
    return args


def run_name(args) -> str:
    """The published name of the run folder. What it leaves out (temperature, data set, ...) is in config.json."""
    method = f"MoCo{args.alpha}" if args.moco else "InsDis"
    loss = "softmax" if args.softmax else "nce" if args.nce_z == "ema" else "nce_oneshot"
    return (
        f"{method}_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}_decay_{args.weight_decay}"
        f"_bsz_{args.batch_size}_crop_{args.crop}{'_warm' * args.warm}{f'_amp_{args.opt_level}' * args.amp}_aug_{args.aug}"
    )


NORMALIZE = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def recipe(args) -> augment.Compose:
    """The augmentation of one view. Greyscale comes before the jitter, which is always applied; there is no blur."""
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0)), augment.RandomHorizontalFlip()
    if args.aug == "NULL":
        return augment.Compose(crop, flip, NORMALIZE)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, NORMALIZE)


def build_loader(args, process: launch.Process):
    views = (recipe(args),) * (2 if args.moco else 1)
    return options.make_loader(args, process, options.open_pretraining(args), views)


class Method:
    """What both methods have: a network, its optimizer, the curves they draw."""

    def __init__(self, args, process: launch.Process):
        network = build_network(args, process)
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
        self.precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
        self.encoder, self.optimizer = self.precision.prepare(network, torch.optim.SGD(network.parameters(), **sgd))
        if args.compile:
            self.encoder.compile()
        self.wrapped, self.scores = launch.parallel(self.encoder, process), [] if args.save_score else None

    def curves(self, loss, out) -> dict:
        """The published curves: the loss, and "prob", the mean of column 0, which with InfoNCE is a logit; then the
        probability of the positive itself (InfoNCE), or Z over the number of pictures (NCE)."""
        curves, out = {"ins_loss": loss, "ins_prob": out[:, 0].detach().mean()}, out.detach()
        if self.memory.softmax:
            return curves | {"positive_prob": (out[:, 0] - out.logsumexp(1)).exp().mean()}
        return curves | {"z_over_n": self.memory.normaliser / self.memory.n}

    def embed(self, images):
        """The pooled feature: (N, D)."""
        with self.precision.autocast():
            return backbones.feature(self.encoder, images, 6)

    def pictures(self, views) -> dict:
        names = ("picture",) if len(views) == 1 else ("query", "key")
        return dict(zip(names, map(NORMALIZE.inverse, views)))


class InsDis(Method):
    """One network and a memory bank. A step compares each picture's feature with bank rows, then writes it to its own."""

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        bank = (args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory, self.exclude_self = MemoryBank(n, args.feat_dim, *bank).to(process.device), args.exclude_self
        draws = torch.Generator(process.device).manual_seed(args.seed)  # negatives; the same on every rank
        self.generators = {"draws": draws}

    def step(self, views, index):
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            feat = self.wrapped(images)
        feat = F.normalize(feat.float(), dim=1)  # N x D
        rows = memory.draw_rows(index, self.memory.n, self.memory.k, self.generators["draws"], self.exclude_self)
        loss, out = self.memory(feat, rows, self.scores)  # out: N x (1 + K)
        self.precision.step(loss, self.optimizer)
        self.memory.update(launch.all_gather(feat), launch.all_gather(index))
        return loss, out

    def state_dict(self) -> dict:
        model = layouts.add_prefix(self.encoder.state_dict(), PREFIX)
        return {"model": model, "contrast": self.memory.state_dict(), "z_updates": self.memory.updates}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        contrast = saved["contrast"]
        if "model_ema" in saved:
            raise UserError(f"{saved.path} is of MoCo: add --moco")
        self.memory.load(contrast, saved.get("z_updates", LONG_AGO), saved.path)
        checkpoint.load_into(self.encoder, layouts.strip_prefix(saved["model"], PREFIX), saved.path, flag="--model")


class MoCo(Method):
    """Query network, key network and a queue. The key network follows the query network after every step."""

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        self.encoder_ema = copy.deepcopy(self.encoder).requires_grad_(False)
        if args.compile:
            self.encoder_ema.compile()
        self.memory = KeyQueue(n, args.feat_dim, args.nce_k, args.nce_t, args.softmax, args.nce_z).to(process.device)
        self.average = get_ema_multi_avg_fn(args.alpha)
        self.generators = {"draws": torch.Generator().manual_seed(args.seed)}  # batch shuffles; the same on every rank

    def step(self, views, index):
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            query = self.wrapped(im_q)
        query = F.normalize(query.float(), dim=1)  # N x D
        key, keys = self.encode_keys(im_k)  # N x D, (N * world) x D
        loss, out = self.memory(query, key, self.scores)  # out: N x (1 + K)
        self.precision.step(loss, self.optimizer)
        self.memory.enqueue(keys)
        self.average(list(self.encoder_ema.parameters()), [p.detach() for p in self.encoder.parameters()], None)
        return loss, out

    @torch.no_grad()
    def encode_keys(self, images):
        """Unit keys, their batch statistics taken over a shuffled batch: (own rows, all rows)."""
        shuffle = batchnorm.BatchShuffle(len(images), self.generators["draws"], images.device)
        with self.precision.autocast():
            feat = self.encoder_ema(shuffle.spread(images))
        everyone = shuffle.collect(F.normalize(feat.float(), dim=1))
        return shuffle.own(everyone), everyone

    def state_dict(self) -> dict:
        model = layouts.add_prefix(self.encoder.state_dict(), PREFIX)
        ema = layouts.add_prefix(self.encoder_ema.state_dict(), PREFIX)
        memory = {"contrast": self.memory.state_dict(), "queue": self.memory.extra_state()}
        return {"model": model, "model_ema": ema, **memory}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if "model_ema" not in saved and "memory" in saved["contrast"]:
            raise UserError(f"{saved.path} is of InsDis: omit --moco")
        for network, key in ((self.encoder, "model"), (self.encoder_ema, "model_ema")):
            checkpoint.load_into(network, layouts.strip_prefix(saved[key], PREFIX), saved.path, flag="--model")
        self.memory.load(saved["contrast"], saved.get("queue"), saved.path)


PREFIX = "encoder.module."  # of the networks' parameter names in the published files


def learning_rate(args, epoch: int, part: float) -> float:
    """At `part` of epoch `epoch`. Epochs count from 1; the first one after 120 complete ones is the first to drop."""
    lr = schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)
    if args.warm and epoch <= WARM_EPOCHS:
        return schedule.warmup(lr, epoch - 1 + part, WARM_EPOCHS, start=min(WARM_FROM, lr))
    return lr


def worker(args, process: launch.Process) -> None:
    files = dict(last="current.pth", numbered="ckpt_epoch_{}.pth", same=("model",))
    events = os.path.join(args.tb_path, os.path.basename(args.folder)) if args.tb_path else True
    with loop.Job(args, process, args.folder, **files, tensorboard=events) as job:
        if args.syncBN and process.world_size > 1 and process.device.type == "cpu":
            raise UsageError("--syncBN: PyTorch synchronises batch-norm between GPUs only; omit it on CPUs")
        groups = batchnorm.splits_here(args, process) * process.world_size
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        n = len(loader.dataset)
        knn = knn.loaders(args, process, loader.dataset, options.plain_view(args, NORMALIZE))
        method = (MoCo if args.moco else InsDis)(args, n, process)
        facts = dict(method=type(method).__name__, loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}")
        job.begin(loader, method, **facts, crop=args.crop, bn_groups=groups)
        warn(args, n, job)
        for epoch in job.epochs():
            for views, _, index in job.batches():
                lr = learning_rate(args, epoch, job.step / len(loader))
                schedule.set_lr(method.optimizer, lr)
                loss, out = method.step(views, index)
                job.track(**method.curves(loss, out), learning_rate=lr)
                if args.save_score:
                    job.keep_scores(method.scores.pop())
            if job.due(args.knn_every):
                knn.evaluate(job, method.encoder, method.embed, knn)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
