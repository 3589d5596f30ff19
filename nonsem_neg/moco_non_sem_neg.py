#!/usr/bin/env python
"""MoCo with non-semantic negatives: pre-training.

Robust Contrastive Learning Using Negative Samples with Diminished Semantics
Songwei Ge, Shlok Mishra, Chun-Liang Li, Haohan Wang, David Jacobs. NeurIPS 2021, arXiv:2110.14189.

A minute on a laptop, and the paper's run (one process per GPU; omit the last line for a single one):

    python nonsem_neg/moco_non_sem_neg.py --demo --epochs 1
    python nonsem_neg/moco_non_sem_neg.py --preset table1 --ckpt_path ckpts/patch IMAGENET100 \\
        --multiprocessing-distributed --world-size 1 --rank 0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch import nn

from common import UsageError, UserError, backbones, batchnorm, cli, data, files, launch, metrics, options, schedule, sets
from runner import checkpoint, knn, layouts, loop
from common.precision import Precision
from nonsem_neg import textures
from nonsem_neg.moco import MoCo
from nonsem_neg.negatives import check_patch_range, patch_negatives
from nonsem_neg.views import normalize, plain_view, recipe
from preprocess import demo

PAPER = dict(
    arch="resnet50", epochs=200, mlp=True, moco_t=0.2, aug_plus=True, cos=True, num_nonsem=1, alpha=2.0,
    patch_ratio=[16, 72],
)  # fmt: skip

PRESETS = {
    # README table of October 2021, first six rows
    "table1": dict(PAPER, lr=0.03, batch_size=128, moco_m=0.999, moco_k=16384),
    # the commands since December 2021: the recipe of Robinson et al. (IFM); last three rows
    "ifm": dict(PAPER, lr=0.8, batch_size=512, moco_m=0.99, moco_k=65536),
    # the CIFAR-10 notebook of MoCo's authors: facebookresearch/moco, branch colab-notebook at f736491
    "moco-cifar": dict(
        dataset="cifar10", input_res=32, aug="cifar", arch="resnet18", small_stem=True, robust="none", moco_k=4096,
        moco_m=0.99, moco_t=0.1, bn_splits=8, bn_running="mean", epochs=200, batch_size=512, lr=0.06, weight_decay=5e-4,
        cos=True, cos_from=1, knn_every=1, knn_on="output", knn_t=0.1, save_freq=50, ckpt_path="ckpts/moco-cifar",
    ),
    "demo": dict(
        PAPER, data="data/demo", arch="resnet18", input_res=32, epochs=3, batch_size=64, lr=0.03, moco_k=1024,
        moco_m=0.99, bn_splits=2, patch_ratio=None, workers=2, save_freq=100, ckpt_path="runs/try", seed=0,
    ),
}  # fmt: skip


def robust_name(kind: str) -> str:
    """--robust as the README of October 2021 spelled it."""
    return {"nonsem": "patch", "texture_syn": "texture"}.get(kind, kind)


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    about = "data set root with train/CLASS/*, or pictures alone; the texture tree for --robust texture"
    g.add_argument("data", nargs="?", help=about)
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    g.add_argument("-a", "--arch", default="resnet50", help="torchvision ResNet")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--moco-dim", type=cli.positive_int, default=128, help="feature dimension")
    g.add_argument("--moco-k", type=cli.positive_int, default=65536, help="queue length: number of negative keys")
    g.add_argument("--moco-m", type=cli.fraction, default=0.999, help="momentum of the key encoder")
    g.add_argument("--moco-t", type=cli.positive, default=0.07, help="softmax temperature")
    g.add_argument("--mlp", action=cli.OnOff, default=False, help="two-layer projection head (MoCo-v2)")
    about = "batch-norm groups over all processes, as on that many GPUs; keys are shuffled over them"
    g.add_argument("--bn-splits", type=cli.positive_int, default=8, help=about)
    about = "running statistics of batch-norm: of the first group, as rank 0 keeps them, or the mean over the groups"
    g.add_argument("--bn-running", choices=["first", "mean"], default="first", help=about)
    about = "add the loss with query and key exchanged; the keys of both views enter the queue"
    g.add_argument("--symmetric", action="store_true", help=about)

    g = parser.add_argument_group("method: non-semantic negatives")
    about = "kind of non-semantic negative; none: plain MoCo"
    g.add_argument("--robust", choices=["patch", "texture", "none"], default="patch", type=robust_name, help=about)
    g.add_argument("--num-nonsem", type=cli.count, default=1, help="non-semantic negatives per image (0: plain MoCo)")
    g.add_argument("--alpha", type=float, default=1.0, help="factor of their similarity, inside the exponent")
    about = "patch side in pixels, both ends drawn; default 16 56 of 224, else in proportion"
    sides = dict(type=int, nargs=2, metavar=("MIN", "MAX"), help=about)
    g.add_argument("--patch-ratio", "--patch-range", **sides)
    about = "also draw the last offset, which the paper's code never does"
    g.add_argument("--patch-inclusive", action="store_true", help=about)
    g.add_argument("--patch-turn", action="store_true", help="mirror and rotate every patch by chance")
    about = "key batch-norm of non-semantic images: batch statistics, as published, or running ones"
    g.add_argument("--nonsem-bn", choices=["train", "eval"], default="train", help=about)
    about = "tree of textures, paired by path; default: DATA, its originals at DATA without -texture"
    g.add_argument("--texture-root", help=about)

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=200, help="epochs to run in all")
    g.add_argument("--start-epoch", type=cli.count, default=0, help="first epoch, counted from 0 (a resume sets it)")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--lr", "--learning-rate", type=cli.positive, default=0.03, help="not scaled with the batch")
    g.add_argument("--schedule", type=int, nargs="*", default=[120, 160], help="epochs of a 10x drop (without --cos)")
    g.add_argument("--cos", action=cli.OnOff, default=False, help="cosine schedule, per epoch, without warm-up")
    g.add_argument("--cos-from", type=cli.count, default=0, help="the cosine's number of the first epoch: 0, or 1")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    decay = dict(type=cli.not_negative, default=1e-4, dest="weight_decay", help="weight decay")
    g.add_argument("--wd", "--weight-decay", **decay)
    g.add_argument("--aug-plus", action=cli.OnOff, default=False, help="MoCo-v2 augmentation (with blur) instead of v1")
    about = "v1, v2 (as --aug-plus), or that of the authors' CIFAR-10 notebook, with CIFAR-10's normalisation"
    g.add_argument("--aug", choices=["v1", "v2", "cifar"], help=about)

    g = parser.add_argument_group("run")
    g.add_argument("--ckpt_path", default="./ckpts/moco", help="run folder: checkpoints, logs, TensorBoard events")
    options.add_name_argument(g, default="that folder itself")
    options.add_run_arguments(g)
    options.add_monitor_arguments(g, "of the queue's keys alone, not the non-semantic ones")
    g.add_argument("--knn-t", type=cli.positive, default=0.07, help="temperature of its votes")
    about = "what it compares: the pooled feature, or the output of the head"
    g.add_argument("--knn-on", choices=["feature", "output"], default="feature", help=about)
    options.add_hardware_arguments(parser, compile=True)
    parser.ignore("the side comes from --patch-ratio", "patch-size")
    args = parser.parse_args(argv)

    options.check(args)
    if args.name:
        args.ckpt_path = os.path.join(args.ckpt_path, args.name)
    if args.data is None:
        raise UsageError(
            "no data: give the root of an ImageFolder tree (train/CLASS/*), or --demo for built-in pictures"
        )
    if args.patch_ratio is None:
        args.patch_ratio = [max(1, round(side * args.input_res / 224)) for side in (16, 72 if args.demo else 56)]
    if args.demo and args.robust == "texture" and not args.texture_root and "-texture" not in args.data:
        args.texture_root = args.data + "-texture"
    args.aug = args.aug or ("v2" if args.aug_plus else "v1")
    if args.robust == "none":
        args.num_nonsem = 0
    if args.robust == "texture" and args.num_nonsem > 1:
        raise UsageError(f"--num-nonsem {args.num_nonsem}: there is one texture per picture, at most 1")
    if args.robust == "texture" and not args.texture_root:  # DATA is the texture tree, as published
        args.texture_root, args.data = args.data, str(textures.original_root_of(args.data))
    if args.robust == "texture":
        textures.check_roots(args.data, args.texture_root, args.dataset)
    if args.robust == "patch" and args.num_nonsem:
        try:
            check_patch_range(*args.patch_ratio, args.input_res, args.patch_inclusive)
        except ValueError as error:
            raise UsageError(f"--patch-ratio with --input-res {args.input_res}: {error}") from None
    keys, why = args.batch_size << args.symmetric, "twice " * args.symmetric + "the global batch"
    if args.moco_k % keys:
        raise UsageError(f"--moco-k {args.moco_k} must be a multiple of {why} {args.batch_size}")
    return args


def build_loader(args, process: launch.Process) -> data.Loader:
    view, twins = recipe(args), None
    if args.robust == "texture" and args.num_nonsem:
        train_set, twins = open_texture_pairs(args)
    else:
        train_set = options.open_pretraining(args)
    return options.make_loader(args, process, train_set, (view, view), partner=twins)


def open_texture_pairs(args):
    """(originals, textures), row by row the same picture; what has no partner is listed in the run folder."""
    texture_set = sets.open_set(args.texture_root, "train", class_list=args.class_list)
    listing = None
    if launch.rank() == 0 and not args.show_views:
        listing = os.path.join(files.make_folder(args.ckpt_path), "unmatched.txt")
    return textures.pair_by_path(texture_set, os.path.join(args.data, "train"), unmatched_listing=listing)


def build_network(args, process: launch.Process) -> MoCo:
    def encoder(dim: int) -> nn.Module:
        network = backbones.build(args.arch, dim, small_stem=args.small_stem)
        if not isinstance(getattr(network, "fc", None), nn.Linear):
            raise UsageError(f"--arch {args.arch}: needs a network whose last layer is `fc`, such as a ResNet")
        return network

    settings = (args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp, args.alpha)
    groups = dict(bn_splits=batchnorm.splits_here(args, process), bn_running=args.bn_running)
    model = MoCo(encoder, *settings, nonsem_bn=args.nonsem_bn, symmetric=args.symmetric, **groups)
    return model.to(process.device, memory_format=torch.channels_last)


class NonSemantic:
    """MoCo whose queries have negatives of their own besides the queue: textures without the object."""

    def __init__(self, args, process: launch.Process):
        self.args, self.process, self.precision = args, process, Precision(args.amp, process.device)
        self.model = build_network(args, process).train()
        self.model.autocast = self.precision.autocast
        if args.compile:
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()
        self.wrapped = launch.parallel(self.model, process)
        sgd = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **sgd)
        self.generators = {"generator": torch.Generator().manual_seed(args.seed)}  # patches and batch shuffles

    def step(self, views, index):
        im_q, im_k, *texture = (v.contiguous(memory_format=torch.channels_last) for v in views)
        im_t = texture[0].unsqueeze(1) if texture else self.patches(im_q)
        if self.args.symmetric:
            im_t = im_t, im_t if texture else self.patches(im_k)
        logits, keys = self.wrapped(im_q, im_k, im_t, self.generators["generator"])  # N x (1 + K + M), (N * world) x D
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits, labels) * (len(logits) // len(im_q))  # symmetric: the sum of both, as published
        self.precision.step(loss, self.optimizer)
        self.model.enqueue(keys)
        if self.args.save_score:
            queue = logits[:, 1 : 1 + self.args.moco_k]
            self.scores = metrics.score_statistics(logits[:, 0], queue, self.args.moco_t)
        top1, top5 = metrics.accuracy(logits.detach(), labels, (1, 5))
        return {"loss": loss, "contrast_acc1": top1, "contrast_acc5": top5}

    def patches(self, im_q):
        """Negatives (N, M, 3, S, S) from the query view itself, so with its crop, colours, blur and flip; None for M = 0."""
        if not self.args.num_nonsem:
            return None
        ranks = dict(rank=self.process.rank, world_size=self.process.world_size)
        how = dict(inclusive=self.args.patch_inclusive, turn=self.args.patch_turn, **ranks)
        return patch_negatives(im_q, self.args.num_nonsem, self.args.patch_ratio, self.generators["generator"], **how)

    def embed(self, images):
        """What k-NN compares, of the query encoder: (N, D)."""
        with self.precision.autocast():
            encoder, layer = self.model.encoder_q, 6 if self.args.knn_on == "feature" else 7
            return backbones.feature(encoder, images, layer)

    def pictures(self, views) -> dict:
        im_q, im_k, *texture = views
        negatives = [texture[0].unsqueeze(1)] if texture else [self.patches(im_q)] * bool(self.args.num_nonsem)
        columns = [im_q, im_k, *(m for n in negatives for m in n.unbind(1))]
        names = ["query", "key", *(f"negative {i + 1}" for i in range(len(columns) - 2))]
        return dict(zip(names, map(normalize(vars(self.args)).inverse, columns)))

    def state_dict(self) -> dict:
        return {"arch": self.args.arch, "state_dict": layouts.add_prefix(self.model.state_dict(), "module.")}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if saved.get("arch", self.args.arch) != self.args.arch:
            raise UserError(
                f"{saved.path} is of --arch {saved['arch']}, this run of {self.args.arch}: add -a {saved['arch']}"
            )
        checkpoint.load_into(self.model, layouts.strip_prefix(saved["state_dict"]), saved.path, flag="-a")


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 0."""
    if args.cos:
        return schedule.cosine(args.lr, epoch + args.cos_from, args.epochs)
    return schedule.step(args.lr, epoch, args.schedule)


def worker(args, process: launch.Process) -> None:
    files = dict(last="checkpoint_last.pth.tar", numbered="checkpoint_{:04d}.pth.tar", key="args", first=0)
    with loop.Job(args, process, args.ckpt_path, **files, same=("arch",)) as job:
        groups = batchnorm.splits_here(args, process) * process.world_size
        demo.ensure_for(args, process, texture=args.robust == "texture")
        loader = build_loader(args, process)
        knn = knn.loaders(args, process, loader.dataset, plain_view(args, vars(args)))
        method = NonSemantic(args, process)
        sides = {"patch_side": args.patch_ratio} if args.robust == "patch" else {}
        job.begin(loader, method, contrast_ways=1 + args.moco_k + args.num_nonsem, bn_groups=groups, **sides)
        if args.moco_k >= len(loader.dataset):
            n = len(loader.dataset)
            job.warn(
                f"the queue (--moco-k {args.moco_k}) is {args.moco_k / n:.1f} times as long as the data set ({n} images): a "
                "picture's own earlier keys are among its negatives"
            )
        for epoch in job.epochs():
            lr = learning_rate(args, epoch)
            schedule.set_lr(method.optimizer, lr)
            for views, _, index in job.batches():
                job.track(**method.step(views, index), lr=lr)
                if args.save_score:
                    job.keep_scores(method.scores)
            if job.due(args.knn_every):
                knn.evaluate(job, method.model, method.embed, knn, args.knn_t)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
