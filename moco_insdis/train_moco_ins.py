#!/usr/bin/env python
"""MoCo and Instance Discrimination: pre-training.

Momentum Contrast: Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick. CVPR 2020,
arXiv:1911.05722. Instance Discrimination (InsDis): Zhirong Wu, Yuanjun Xiong, Stella Yu, Dahua Lin.
CVPR 2018, arXiv:1805.01978. Both follow the code published with Contrastive Multiview Coding.
A minute on a laptop, and a published run (without --moco it is InsDis):

    python moco_insdis/train_moco_ins.py --demo --moco --epochs 1
    python moco_insdis/train_moco_ins.py --data_folder IMAGENET100 --batch_size 128 \\
        --num_workers 24 --nce_k 16384 --softmax --moco
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import (
    UserError,
    augment,
    backbones,
    batchnorm,
    cli,
    collectives,
    footing,
    inputs,
    launch,
    memory,
    nce,
    options,
    schedule,
)
from moco_insdis import flags
from moco_insdis.contrast import KeyQueue, MemoryBank
from moco_insdis.method import PREFIX, InstanceMethod, load_network
from moco_insdis.networks import IMAGENET, normalize
from preprocess import demo
from runner import checkpoint, knn, layouts, loop

PRESETS = {
    # for CIFAR's 50,000 pictures, of which the published K, 16384, is a third
    "small": dict(
        model="resnet18", dataset="folder", input_res=32, small_stem=True, softmax=True,
        nce_k=4096, nce_t=0.1, alpha=0.99,
    ),
    "compare": dict(
        options.COMPARE, model="resnet18-small", moco=True, softmax=True, nce_k=4096,
        nce_t=0.1, alpha=0.99, learning_rate=0.06,
    ),
    "photos": dict(
        options.PHOTOS, model="resnet18", softmax=True, nce_k=32, nce_t=0.1, alpha=0.99,
        learning_rate=0.015,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", input_res=32, epochs=12,
        batch_size=64, learning_rate=0.03, lr_decay_epochs="8,10", nce_k=512, nce_t=0.1,
        alpha=0.99, bn_splits=2, workers=2, save_freq=100, model_path="runs/try-moco-insdis",
        seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/*, or pictures alone"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    trees = ("imagenet100", "imagenet", "folder")
    options.add_data_arguments(g, trees, default="imagenet100", workers=18)
    text = "least share of the picture that a crop covers; default .2, on imagenet .08"
    g.add_argument("--crop", type=cli.share, help=text)
    text = "CJ: greyscale and colour jitter; NULL: crop and flip only"
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ", help=text)

    g = parser.add_argument_group("model")
    flags.add_model_arguments(g)
    options.add_init_argument(g)
    flags.add_method_arguments(parser.add_argument_group("method"))
    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g)
    footing.add_argument(g)
    g.add_argument("--warm", action="store_true", help=f"{schedule.WARM} (published: no effect)")
    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--model_path", "--out", default="./runs/moco_insdis", help=text)
    options.add_name_argument(g)
    options.add_run_arguments(g, tb_path=True)
    options.add_monitor_arguments(g)
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("TensorBoard gets a point every --print_freq steps", "tb_freq")
    parser.ignore("pre-training uses SGD", "beta1", "beta2")
    args = parser.parse_args(argv)
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def recipe(args) -> augment.Compose:
    """Return the operations of one view: greyscale for one in five, then jitter for all."""
    if args.footing == "common":
        return footing.recipe(args)
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0))
    flip = augment.RandomHorizontalFlip()
    if args.aug == "NULL":
        return augment.Compose(crop, flip, IMAGENET)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, IMAGENET)


def build_loader(args, process: launch.Process):
    views = (recipe(args), recipe(args)) if args.moco else (recipe(args),)
    return inputs.make_loader(args, process, inputs.open_pretraining(args), views)


class InsDis(InstanceMethod):
    """A network and a memory bank.

    A step compares each picture's feature with the bank (the picture's own row is the positive,
    drawn rows are the negatives), and then writes it to that row.
    """

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        settings = (args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory = MemoryBank(n, args.feat_dim, *settings).to(process.device)
        draws = torch.Generator(process.device).manual_seed(args.seed)  # the same on every rank
        self.generators = {"draws": draws}

    def step(self, batch: loop.Batch) -> dict:
        images = batch.views[0].contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            feat = self.wrapped(images)
        feat = F.normalize(feat.float(), dim=1)  # N x D
        args, draws = self.args, self.generators["draws"]
        rows = memory.draw_rows(batch.index, self.memory.n, args.nce_k, draws, args.exclude_self)
        logits = self.memory.logits(feat, rows)  # N x (1 + K)
        loss, out = self.memory.loss(logits)
        self.precision.step(loss, self.optimizer)
        self.memory.update(collectives.all_gather(feat), collectives.all_gather(batch.index))
        return self.values_to_log(loss, out, logits, feat)

    def state_dict(self) -> dict:
        return {
            "model": layouts.add_prefix(self.network.state_dict(), PREFIX),
            "contrast": self.memory.state_dict(),
            "z_updates": self.memory.updates,
        }

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        contrast = saved["contrast"]
        if "model_ema" in saved:
            raise UserError(f"{saved.path} is a checkpoint of MoCo: add --moco")
        self.memory.load(contrast, saved.get("z_updates", nce.LONG_AGO), saved.path)
        load_network(self.network, saved, "model")


class MoCo(InstanceMethod):
    """A query network, a key network that follows it, and a queue of keys.

    A step compares each query with the key of the same picture (the positive) and with the queue
    (the negatives), writes the keys to the queue, and moves the key network.
    """

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        self.key_network = copy.deepcopy(self.network).requires_grad_(False)
        if args.compile:
            self.key_network.compile()
        settings = (args.nce_k, args.nce_t, args.softmax, args.nce_z)
        self.memory = KeyQueue(n, args.feat_dim, *settings).to(process.device)
        self.average = get_ema_multi_avg_fn(args.alpha)
        draws = torch.Generator().manual_seed(args.seed)  # shuffles keys, the same on every rank
        self.generators = {"draws": draws}

    def step(self, batch: loop.Batch) -> dict:
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in batch.views)
        with self.precision.autocast():
            query = self.wrapped(im_q)
        query = F.normalize(query.float(), dim=1)  # N x D
        # key: N x D, keys: those of all ranks
        key, keys = batchnorm.encode_shuffled(self.encode_key, im_k, self.generators["draws"])
        logits = self.memory.logits(query, key)  # N x (1 + K)
        loss, out = self.memory.loss(logits)
        self.precision.step(loss, self.optimizer)
        self.memory.enqueue(keys)
        queries = [param.detach() for param in self.network.parameters()]
        self.average(list(self.key_network.parameters()), queries, None)
        return self.values_to_log(loss, out, logits, query)

    def encode_key(self, images):
        with self.precision.autocast():
            feat = self.key_network(images)
        return F.normalize(feat.float(), dim=1)

    def state_dict(self) -> dict:
        return {
            "model": layouts.add_prefix(self.network.state_dict(), PREFIX),
            "model_ema": layouts.add_prefix(self.key_network.state_dict(), PREFIX),
            "contrast": self.memory.state_dict(),
            "queue": self.memory.extra_state(),
        }

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if "model_ema" not in saved and "memory" in saved["contrast"]:
            raise UserError(f"{saved.path} is a checkpoint of InsDis: omit --moco")
        load_network(self.network, saved, "model")
        load_network(self.key_network, saved, "model_ema")
        self.memory.load(saved["contrast"], saved.get("queue"), saved.path)


def build_method(args, pictures, steps: int, process: launch.Process) -> InsDis | MoCo:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    kind = MoCo if args.moco else InsDis
    return kind(args, len(pictures), process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate: drops after --lr_decay_epochs, or the cosine of the footing."""
    if args.footing == "common":
        return footing.learning_rate(args.learning_rate, at, args.epochs)
    lr = schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)
    return warmed(args, lr, at)


def warmed(args, lr: float, at: loop.At) -> float:
    """Return `lr`, or with --warm in the first epochs the rate of a linear warm-up to it."""
    if not args.warm:
        return lr
    length = schedule.warm_epochs(args.epochs)
    return schedule.warmup(lr, at.epoch + at.part, length, start=min(schedule.WARM_FROM, lr))


def worker(args, process: launch.Process) -> None:
    files = loop.Files(
        __file__,
        last="current.pth",
        numbered="ckpt_epoch_{}.pth",
        same=("dataset", "model"),
        events=options.events(args, args.folder),
    )
    with loop.Job(args, process, args.folder, files) as job:
        args = job.args
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        pictures = loader.dataset
        plain = inputs.plain_view(args, normalize(vars(args)))
        neighbours = knn.loaders(args, process, pictures, plain)
        method = build_method(args, pictures, len(loader), process)
        splits = backbones.splits_here(args, process)
        job.begin(
            loader,
            method,
            method=type(method).__name__,
            loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}",
            crop=args.crop,
            bn_groups=1 if args.syncBN else splits * process.world_size,
        )
        flags.warn(args, len(pictures), job)
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
