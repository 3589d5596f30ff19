#!/usr/bin/env python
"""Conditional Negative Sampling: pre-training.

Mike Wu, Milan Mosse, Chengxu Zhuang, Daniel Yamins, Noah Goodman. ICLR 2021, arXiv:2010.02037. A
ring selects the negatives of IR, CMC or MoCo. A minute on a laptop, and two full runs:

    python ring/train_ring.py --demo --epochs 1
    python ring/train_ring.py ring/configs/cifar10_ir_ring.json --root data --gpu-device 0
    python ring/train_ring.py --root data --dataset stl10 --method moco --negatives ring \\
        --augmentation mocov2_96x96
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cmc import colour
from common import (
    augment,
    backbones,
    batchnorm,
    cli,
    collectives,
    footing,
    inputs,
    launch,
    options,
    schedule,
    sets,
)
from preprocess import demo
from ring import config, flags, monitor, negatives, sheet
from ring.memories import KeyQueue, MemoryBank
from ring.method import Method
from ring.views import SIDES, last_operation
from runner import checkpoint, knn, loop

PRESETS = {
    "compare": dict(
        options.COMPARE, resnet_version="resnet18-small", method="moco", k=4096, t=0.1,
        ema=0.99, nn_every=0, learning_rate=0.06,
    ),
    "photos": dict(
        options.PHOTOS, resnet_version="resnet18", method="moco", k=32, t=0.1, ema=0.99,
        thres_outer=0.5, thres_inner=0.25, nn_every=0, learning_rate=0.015,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", conv3x3=False, augmentation="mocov2_32x32", epochs=12,
        batch_size=64, k=512, workers=2, save_freq=100, model_path="runs/try-ring", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    text = "settings in the published format (ring/configs); typed flags win over them"
    parser.add_argument("file", nargs="?", metavar="CONFIG.json", help=text)
    parser.add_argument("--config", metavar="FILE.json", help="CONFIG.json, as an option")
    g = parser.add_argument_group("data")
    text = "tree with train/CLASS/*, or where torchvision keeps its sets"
    g.add_argument("--root", "--data", dest="data", help=text)
    also = tuple(f"{name}_2views" for name in sets.TORCHVISION_SETS)
    options.add_data_arguments(g, ("folder",), default="cifar10", workers=8, also=also)
    text = "augmentation of IR and MoCo: MoCo-v1's, or MoCo-v2's at 224 or the named side"
    g.add_argument("--augmentation", choices=list(SIDES), default="v1", help=text)
    splits = ("train", "train+unlabeled")
    g.add_argument("--stl-split", choices=splits, default="train", help="pictures of STL-10")

    g = parser.add_argument_group("model")
    flags.add_model_arguments(g)
    options.add_init_argument(g)
    flags.add_method_arguments(parser.add_argument_group("method"))

    g = parser.add_argument_group("optimisation")
    flags.add_sgd_arguments(g)
    footing.add_argument(g)

    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--exp-base", "--out", dest="model_path", default="./runs/ring", help=text)
    text = (
        "name of that folder without the data set at its end; "
        "default: pretrain_METHOD_NEGATIVES[_ANNEAL][_seed_SEED]"
    )
    g.add_argument("--exp-name", help=text)
    options.add_name_argument(g, default="EXP_NAME_DATASET")
    options.add_run_arguments(g, seed=1337)
    text = "epochs between 1-NN evaluations by the bank; 0: never; default: 1, class folders 0"
    g.add_argument("--nn-every", type=cli.count, help=text)
    options.add_monitor_arguments(g, "of those in the loss; cmc: mean over both views")
    text = "draw eight training pictures with their rings, then exit; --resume names the run"
    g.add_argument("--show-ring", type=cli.figure_path, metavar="FILE.png", help=text)
    options.add_hardware_arguments(parser, compile=True)
    text = "the published spelling of --gpu N and --device cpu"
    parser.add_argument("--gpu-device", metavar="N|cpu", help=text)
    parser.set_defaults(input_res=None)
    sheet.take_flags_of_run(parser, argv)
    args = config.parse(parser, argv)
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def recipe(args) -> augment.Compose:
    """Return the operations of one view; CMC has Tian et al.'s, crop, flip and both views."""
    if args.footing == "common":
        return footing.recipe(args, [last_operation(args)] if args.method == "cmc" else ())
    crop = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0))
    grey = augment.RandomGrayscale(0.2)
    flip = augment.RandomHorizontalFlip()
    if args.method == "cmc":
        return augment.Compose(crop, flip, last_operation(args))
    if args.augmentation == "v1":
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return augment.Compose(crop, grey, jitter, flip, last_operation(args))
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    blur = augment.GaussianBlur((0.1, 2.0), p=0.5)
    return augment.Compose(crop, jitter, grey, blur, flip, last_operation(args))


def build_loader(args, process: launch.Process):
    split = args.stl_split if args.dataset == "stl10" else "train"
    pictures = inputs.open_split(args, split, unlabelled=True)
    views = (recipe(args),) * (2 if args.method == "moco" else 1)
    return inputs.make_loader(args, process, pictures, views)


class IR(Method):
    """One view and a memory bank; the positive is the picture's own row, of an earlier crop."""

    def step(self, batch: loop.Batch) -> dict:
        images = batch.views[0].contiguous(memory_format=torch.channels_last)
        query = self.encode(self.wrapped, images)  # N x D
        bank = self.banks[0]._bank  # n x D
        positive = (query * bank[batch.index]).sum(1)
        threshold, ranks = self.ring(batch.at)
        draws = self.draws(ranks, len(query))  # N x (k - 1)
        comparison = negatives.Comparison(self.rule, ranks, self.args.t, draws)
        observer = self.observer(batch.index, self.labels)
        loss = negatives.conditional_loss(query, positive, bank, comparison, observer)
        self.precision.step(loss, self.optimizer)
        self.adapt(loss)
        self.banks[0].update(collectives.all_gather(query), collectives.all_gather(batch.index))
        return self.values_to_log(loss, threshold, ranks, [observer], query)


class CMC(Method):
    """Two views of colour, each with a network and a bank, compared with the other view's bank."""

    bank_names = ("memory_bank_l", "memory_bank_ab")

    def encode(self, network, images):
        with self.precision.autocast():
            return torch.cat([F.normalize(z.float(), dim=1) for z in network(images)], 1)  # N x 2 D

    def step(self, batch: loop.Batch) -> dict:
        images = batch.views[0].contiguous(memory_format=torch.channels_last)
        feats = self.encode(self.wrapped, images)  # N x 2 D
        threshold, ranks = self.ring(batch.at)
        draws = self.draws(ranks, len(feats))  # N x (k - 1)
        comparison = negatives.Comparison(self.rule, ranks, self.args.t, draws)
        losses, observers = [], []
        for query, memory in zip(feats.chunk(2, 1), reversed(self.banks)):
            bank = memory._bank  # n x D, of the other view
            positive = (query * bank[batch.index]).sum(1)
            seen = self.observer(batch.index, self.labels)
            losses.append(negatives.conditional_loss(query, positive, bank, comparison, seen))
            observers.append(seen)
        loss = sum(losses)
        self.precision.step(loss, self.optimizer)
        self.adapt(loss)
        everyone = collectives.all_gather(batch.index)
        for memory, feat in zip(self.banks, collectives.all_gather(feats).chunk(2, 1)):
            memory.update(feat, everyone)
        names = colour.view_keys(self.views)
        of_views = {f"{name}_loss": own.detach() for name, own in zip(names, losses)}
        return self.values_to_log(loss, threshold, ranks, observers, feats) | of_views

    def embed(self, images):
        with self.precision.autocast():
            return torch.cat(backbones.feature(self.network, images, 6), 1)

    def pictures(self, views) -> dict:
        return colour.Views(self.views).pictures(views[0])


class MoCo(Method):
    """Two views, a key network and a queue; the bank holds queries and is used for 1-NN alone."""

    def build_system(self) -> nn.Module:
        system = KeyQueue(self.args.k, self.args.out_dim)
        system.model = self.network
        system.memory_bank = MemoryBank(self.n, self.args.out_dim, 0)
        system.model_k = copy.deepcopy(self.network).requires_grad_(False)
        if self.args.compile:
            system.model_k.compile()
        return system

    def step(self, batch: loop.Batch) -> dict:
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in batch.views)
        query = self.encode(self.wrapped, im_q)  # N x D
        self.update_key_network()
        key, keys = self.encode_keys(im_k)  # key: N x D, keys: those of all ranks
        queue = self.system.queue  # k x D
        positive = (query * key).sum(1)
        threshold, ranks = self.ring(batch.at)
        comparison = negatives.Comparison(self.rule, ranks, self.args.t)
        labels = None if self.labels is None else self.system.labels(self.labels)
        observer = self.observer(batch.index, labels)
        loss = negatives.conditional_loss(query, positive, queue, comparison, observer)
        self.precision.step(loss, self.optimizer)
        self.adapt(loss)
        everyone = collectives.all_gather(batch.index)
        self.system.enqueue(keys, everyone)
        self.banks[0].update(collectives.all_gather(query), everyone)
        return self.values_to_log(loss, threshold, ranks, [observer], query)

    @torch.no_grad()
    def update_key_network(self) -> None:
        """Move the key network towards the query network: parameters only, as published."""
        average = get_ema_multi_avg_fn(self.args.m)
        queries = [parameter.detach() for parameter in self.network.parameters()]
        average(list(self.system.model_k.parameters()), queries, None)

    @torch.no_grad()
    def encode_keys(self, images):
        """Return unit keys of this rank's images (N, D), and those of all ranks."""
        network = self.system.model_k
        if self.args.shuffle_bn:
            draws = self.generators["draws"]
            return batchnorm.encode_shuffled(lambda x: self.encode(network, x), images, draws)
        key = self.encode(network, images)
        return key, collectives.all_gather(key)

    def state_dict(self) -> dict:
        return super().state_dict() | {"queue_pictures": self.system.pictures}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        super().load_state_dict(saved)
        self.system.load_pictures(saved.get("queue_pictures", torch.tensor(-1)), self.n)


def build_method(args, pictures, steps: int, process: launch.Process) -> Method:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    kind = {"ir": IR, "cmc": CMC, "moco": MoCo}[args.method]
    return kind(args, pictures, steps, process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate, which drops after 68 and 83 percent of the epochs."""
    if args.footing == "common":
        return footing.learning_rate(args.learning_rate, at, args.epochs)
    if args.scheduler == "none":
        return args.learning_rate
    drops = [max(1, int(share * args.epochs)) for share in (0.68, 0.83)]
    return schedule.step(args.learning_rate, at.epoch, drops)


def worker(args, process: launch.Process) -> None:
    files = loop.Files(
        __file__,
        last="last.ckpt",
        numbered="epoch={}.ckpt",
        first=0,
        same=("dataset", "method", "resnet_version", "view"),
    )
    demo.ensure_for(args, process)
    if args.show_ring:
        sheet.show_ring(args, process, files, build_loader(args, process), build_method)
        return
    with loop.Job(args, process, args.folder, files) as job:
        args = job.args
        loader = build_loader(args, process)
        pictures = loader.dataset
        plain = inputs.plain_view(args, last_operation(args))
        neighbours = knn.loaders(args, process, pictures, plain)
        nearest = monitor.val_loader(args, process, pictures, plain)
        method = build_method(args, pictures, len(loader), process)
        monitor.adopt_published(job.saved)
        inner, outer = monitor.narrowest_ring(args, method)
        job.begin(
            loader,
            method,
            candidates=method.candidates,
            narrowest_ring=f"ranks {inner} to {outer}",
            bn_groups=backbones.splits_here(args, process) * process.world_size,
        )
        monitor.warn(job, method, (inner, outer))
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.nn_every):
                monitor.evaluate_nearest(job, method, nearest)
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
