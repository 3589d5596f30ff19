#!/usr/bin/env python
"""MoCo with non-semantic negatives: pre-training.

Robust Contrastive Learning Using Negative Samples with Diminished Semantics. Songwei Ge, Shlok
Mishra, Chun-Liang Li, Haohan Wang, David Jacobs. NeurIPS 2021, arXiv:2110.14189. A minute on a
laptop, and the published run (one process per GPU; omit the last line for a single one):

    python nonsem_neg/moco_non_sem_neg.py --demo --epochs 1
    python nonsem_neg/moco_non_sem_neg.py --preset table1 --ckpt_path ckpts/patch IMAGENET100 \\
        --multiprocessing-distributed --world-size 1 --rank 0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn

from common import (
    UsageError,
    UserError,
    augment,
    backbones,
    batchnorm,
    cli,
    footing,
    inputs,
    launch,
    metrics,
    nce,
    options,
    schedule,
)
from common.precision import Precision
from nonsem_neg import flags, textures
from nonsem_neg.moco import MoCo
from nonsem_neg.negatives import patch_negatives
from nonsem_neg.views import normalize
from preprocess import demo
from runner import checkpoint, knn, layouts, loop, pretrained

PAPER = dict(
    arch="resnet50", epochs=200, mlp=True, moco_t=0.2, aug_plus=True, cos=True, num_nonsem=1,
    alpha=2.0, patch_ratio=[16, 72],
)  # fmt: skip
PRESETS = {
    # for the first six rows of the published table (README of October 2021)
    "table1": dict(PAPER, lr=0.03, batch_size=128, moco_m=0.999, moco_k=16384),
    # for its last three rows: the commands since December 2021, recipe of Robinson et al. (IFM)
    "ifm": dict(PAPER, lr=0.8, batch_size=512, moco_m=0.99, moco_k=65536),
    # for the notebook of MoCo's authors: facebookresearch/moco, branch colab-notebook at f736491
    "moco-cifar": dict(
        dataset="cifar10", input_res=32, aug="cifar", arch="resnet18", small_stem=True,
        robust="none", moco_k=4096, moco_m=0.99, moco_t=0.1, bn_splits=8, bn_running="mean",
        epochs=200, batch_size=512, lr=0.06, weight_decay=5e-4, cos=True, cos_from=1, knn_every=1,
        knn_on="output", knn_t=0.1, save_freq=50, ckpt_path="ckpts/moco-cifar",
    ),
    "compare": dict(
        options.COMPARE, arch="resnet18-small", mlp=True, moco_k=4096, moco_m=0.99,
        moco_t=0.1, num_nonsem=1, alpha=2.0, lr=0.06,
    ),
    "photos": dict(
        options.PHOTOS, arch="resnet18", mlp=True, moco_k=32, moco_m=0.99, moco_t=0.1,
        num_nonsem=1, alpha=1.0, lr=0.015,  # with alpha 2, patches outweigh so few keys
    ),
    "demo": dict(
        PAPER, data="data/demo", arch="resnet18", input_res=32, epochs=3, batch_size=64, lr=0.03,
        moco_k=1024, moco_m=0.99, bn_splits=2, patch_ratio=None, workers=2, save_freq=100,
        ckpt_path="runs/try", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/*, or pictures alone; --robust texture: its textures"
    flags.add_data_argument(g, text)
    options.add_data_arguments(g)
    flags.add_augmentation_arguments(g)

    g = parser.add_argument_group("model")
    flags.add_model_arguments(g)
    options.add_init_argument(g)
    flags.add_negatives_arguments(parser.add_argument_group("method: non-semantic negatives"))

    g = parser.add_argument_group("optimisation")
    flags.add_sgd_arguments(g, epochs=200, lr=0.03, schedule=[120, 160], weight_decay=1e-4)
    footing.add_argument(g)
    text = "cosine schedule instead of --schedule, per epoch, without warm-up"
    g.add_argument("--cos", action=cli.OnOff, default=False, help=text)
    text = "added to the epoch in --cos: 0, or 1 as in MoCo's CIFAR notebook"
    g.add_argument("--cos-from", type=cli.count, default=0, help=text)

    g = parser.add_argument_group("run")
    text = "run folder: checkpoints, logs, TensorBoard events"
    g.add_argument("--ckpt_path", "--out", default="./ckpts/moco", help=text)
    options.add_name_argument(g, default="none, and the files go into that folder itself")
    options.add_run_arguments(g)
    options.add_monitor_arguments(g, "of the queue's keys alone, not the non-semantic ones")
    text = "compare pictures in k-NN by the backbone's pooled features, or by the head's outputs"
    g.add_argument("--knn-on", choices=["feature", "output"], default="feature", help=text)
    options.add_hardware_arguments(parser, compile=True)
    parser.ignore("--patch-ratio sets the side of patches", "patch-size")
    args = parser.parse_args(argv)
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def recipe(args) -> augment.Compose:
    """Return the operations of one view; patch negatives are cut from their result."""
    if args.footing == "common":
        return footing.recipe(args)
    flip = augment.RandomHorizontalFlip()
    grey = augment.RandomGrayscale(0.2)
    normal = normalize(vars(args))
    if args.aug == "cifar":
        crop = augment.RandomResizedCrop(args.input_res)  # torchvision's scale, .08 to 1
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
        return augment.Compose(crop, flip, jitter, grey, normal)
    crop = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0))
    if args.aug == "v1":
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return augment.Compose(crop, grey, jitter, flip, normal)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    blur = augment.GaussianBlur((0.1, 2.0), p=0.5)
    return augment.Compose(crop, jitter, grey, blur, flip, normal)


def build_loader(args, process: launch.Process):
    if args.robust == "texture" and args.num_nonsem:
        pictures, partner = textures.open_pairs(args)
    else:
        pictures, partner = inputs.open_pretraining(args), None
    view = recipe(args)
    return inputs.make_loader(args, process, pictures, (view, view), partner=partner)


def build_network(args, process: launch.Process) -> MoCo:
    splits = backbones.splits_here(args, process)

    def encoder(dim: int) -> nn.Module:
        network = backbones.build(args.arch, dim, small_stem=args.small_stem)
        if not isinstance(getattr(network, "fc", None), nn.Linear):
            raise UsageError(f"--arch {args.arch}: the last layer must be `fc`, as of a ResNet")
        pretrained.start_from(network, args.init)
        return batchnorm.split(network, splits, args.bn_running)

    queue = (args.moco_dim, args.moco_k, args.moco_m, args.moco_t)
    network = MoCo(encoder, *queue, args.mlp, args.alpha, args.symmetric)
    network.nonsem_bn = args.nonsem_bn
    return network.to(process.device, memory_format=torch.channels_last)


class NonSemantic:
    """MoCo whose queries have, besides the queue, negatives of their own: textures without shape.

    A step compares a query with its key (the positive), and with the queue and these (negatives).
    """

    def __init__(self, args, process: launch.Process):
        self.args = args
        self.process = process
        self.precision = Precision.of(args, process.device)
        self.network = build_network(args, process).train()
        shape = (3, args.input_res, args.input_res)
        self.precision.choose(self.network.encoder_q, shape)
        self.network.autocast = self.precision.autocast
        if args.compile:
            self.network.encoder_q.compile()
            self.network.encoder_k.compile()
        self.wrapped = launch.parallel(self.network, process)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            fused=True,
        )
        directions = 2 if args.symmetric else 1  # whose losses are added
        self.equal_loss = directions * nce.equal_loss(args.moco_k + args.num_nonsem)
        if args.num_nonsem:
            self.remedies = "a lower --alpha or a higher --moco-t"
        # It draws patches and shuffles keys, and is in the same state on every rank.
        self.generators = {"generator": torch.Generator().manual_seed(args.seed)}

    def step(self, batch: loop.Batch) -> dict:
        views = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
        im_q, im_k, *texture = views  # N x 3 x S x S
        im_t = self.negatives(im_q, texture)  # N x M x 3 x S x S
        if self.args.symmetric:
            im_t = im_t, self.negatives(im_k, texture)
        # N x (1 + K + M), and keys of all ranks x D; twice as many rows where symmetric
        logits, keys = self.wrapped(im_q, im_k, im_t, self.generators["generator"])
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits, labels)
        if self.args.symmetric:
            loss = 2 * loss  # the sum of both directions, as published
        self.precision.step(loss, self.optimizer)
        self.network.enqueue(keys)
        top1, top5 = metrics.accuracy(logits.detach(), labels, (1, 5))
        queue, nonsem = logits.detach()[:, 1:].tensor_split([self.args.moco_k], 1)
        values = {
            "loss": loss,
            "contrast_acc1": top1,
            "contrast_acc5": top5,
            "feature_spread": metrics.spread(keys),
            "negative_similarity": queue.mean() * self.args.moco_t,
        }
        if nonsem.numel() and self.args.alpha:
            values["nonsem_similarity"] = nonsem.mean() * self.args.moco_t / self.args.alpha
            # of the softmax over all negatives
            values["nonsem_share"] = (nonsem.logsumexp(1) - queue.logsumexp(1)).sigmoid().mean()
        if self.args.save_score:
            t = self.args.moco_t
            values["scores"] = metrics.score_statistics(logits[:, 0], queue, t)
        return values

    def negatives(self, view, texture):
        """Return the non-semantic negatives of a view, (N, M, 3, S, S); None where M = 0.

        texture: a list with the textures of the batch, or an empty one for patches of the view.
        """
        args = self.args
        if texture:
            return texture[0].unsqueeze(1)
        if not args.num_nonsem:
            return None
        return patch_negatives(
            view,
            args.num_nonsem,
            args.patch_ratio,
            self.generators["generator"],
            inclusive=args.patch_inclusive,
            turn=args.patch_turn,
            rank=self.process.rank,
            world_size=self.process.world_size,
        )

    def embed(self, images):
        """Return the query encoder's features that the k-NN compares: (N, D)."""
        layer = 6 if self.args.knn_on == "feature" else 7
        with self.precision.autocast():
            return backbones.feature(self.network.encoder_q, images, layer)

    def pictures(self, views) -> dict:
        im_q, im_k, *texture = views
        columns = {"query": im_q, "key": im_k}
        im_t = self.negatives(im_q, texture)
        if im_t is not None:
            columns |= {f"negative {i + 1}": t for i, t in enumerate(im_t.unbind(1))}
        inverse = normalize(vars(self.args)).inverse
        return {name: inverse(images) for name, images in columns.items()}

    def state_dict(self) -> dict:
        state = layouts.add_prefix(self.network.state_dict(), "module.")
        return {"arch": self.args.arch, "state_dict": state}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        state = layouts.strip_prefix(saved["state_dict"], "module.")
        other_head = "encoder_q.fc.weight" if self.args.mlp else "encoder_q.fc.2.weight"
        if other_head in state:
            count, flag = ("one layer", "--no-mlp") if self.args.mlp else ("two layers", "--mlp")
            raise UserError(f"{saved.path} was trained with a head of {count}: add {flag}")
        checkpoint.load_into(self.network, state, saved.path, flag="-a")


def build_method(args, pictures, steps: int, process: launch.Process) -> NonSemantic:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    return NonSemantic(args, process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate: steps, or the published cosine per epoch, without a warm-up."""
    if args.footing == "common":
        return footing.learning_rate(args.lr, at, args.epochs)
    if args.cos:
        return schedule.cosine(args.lr, at.epoch + args.cos_from, args.epochs)
    return schedule.step(args.lr, at.epoch, args.schedule)


def worker(args, process: launch.Process) -> None:
    files = loop.Files(
        __file__,
        last="checkpoint_last.pth.tar",
        numbered="checkpoint_{:04d}.pth.tar",
        flags="args",
        first=0,
        start=args.start_epoch,
        same=("dataset", "arch"),
    )
    with loop.Job(args, process, args.ckpt_path, files) as job:
        args = job.args
        demo.ensure_for(args, process, texture=args.robust == "texture")
        loader = build_loader(args, process)
        pictures = loader.dataset
        plain = inputs.plain_view(args, normalize(vars(args)))
        neighbours = knn.loaders(args, process, pictures, plain)
        method = build_method(args, pictures, len(loader), process)
        has_patches = args.robust == "patch" and args.num_nonsem
        sides = {"patch_side": args.patch_ratio} if has_patches else {}
        job.begin(
            loader,
            method,
            contrast_ways=1 + args.moco_k + args.num_nonsem,
            bn_groups=backbones.splits_here(args, process) * process.world_size,
            **sides,
        )
        if args.moco_k >= len(pictures):
            job.warn(options.long_queue("--moco-k", args.moco_k, len(pictures)))
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
