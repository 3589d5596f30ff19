#!/usr/bin/env python
"""Feature transformation for contrastive learning: pre-training.

Improving Contrastive Learning by Visualizing Feature Transformation. Rui Zhu, Bingchen Zhao, Jingen
Liu, Zhenglong Sun, Chang Wen Chen. ICCV 2021, arXiv:2108.02982. A minute on a laptop, and the
published run on ImageNet-100:

    python feature_transform/main_contrast.py --demo --epochs 1
    python feature_transform/main_contrast.py --method MoCov2 --data_folder IMAGENET \\
        --dataset imagenet100 --imagenet100path preprocess/imagenet100.txt --epochs 200 \\
        --input_res 224 --cosine --batch_size 256 --learning_rate 0.03 --mixnorm \\
        --mixnorm_target posneg --sep_alpha --pos_alpha 2.0 --neg_alpha 1.6 \\
        --mask_distribution beta --expolation_mask --alpha 0.99 --save_score
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import (
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
from feature_transform import checkpoints, flags, jigsaw, networks, recipes, transform, views
from feature_transform.memory import KeyQueue, MemoryBank, hits, info_nce
from preprocess import demo
from runner import checkpoint, knn, layouts, loop, pretrained, training

PRESETS = {
    "ft": recipes.PUBLISHED,  # the published transformation, with whatever --method
    "compare": dict(
        options.COMPARE, **recipes.PUBLISHED, arch="resnet18-small", head="mlp",
        nce_k=4096, nce_t=0.1, alpha=0.99, learning_rate=0.06,
    ),
    "photos": dict(
        options.PHOTOS, **recipes.PUBLISHED, arch="resnet18", head="mlp", nce_k=32, nce_t=0.1,
        alpha=0.99, learning_rate=0.015, mix_start_epoch=66,  # earlier, features collapse
    ),
    "demo": dict(
        recipes.PUBLISHED, data="data/demo", dataset="folder", method="MoCov2", arch="resnet18",
        input_res=32, epochs=12, batch_size=64, learning_rate=0.03, cosine=True, nce_k=512,
        alpha=0.99, bn_splits=2, workers=2, save_freq=100, save_score=True,
        model_path="runs/try-feature-transform", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/*, or pictures alone"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    trees = ("imagenet100", "imagenet", "folder")
    options.add_data_arguments(g, trees, default="imagenet100", workers=8)
    text = "the published spelling of --class-list"
    g.add_argument("--imagenet100path", dest="class_list", metavar="FILE", help=text)

    g = parser.add_argument_group("model")
    flags.add_model_arguments(g)
    options.add_init_argument(g)
    flags.add_method_arguments(parser.add_argument_group("method"))
    flags.add_transformation_arguments(parser.add_argument_group("feature transformation"))
    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g, epochs=200, batch_size=256, lr_decay_epochs="120,160")
    footing.add_argument(g)
    text = "cosine schedule per epoch in place of steps, down to the rate after three drops"
    g.add_argument("--cosine", action=cli.OnOff, default=False, help=text)
    text = f"{schedule.WARM}; on for batches above 256"
    g.add_argument("--warm", action=cli.OnOff, default=False, help=text)

    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--model_path", "--out", default="./runs/feature_transform", help=text)
    options.add_name_argument(g)
    text = "number at the end of the folder's name; -1: none"
    g.add_argument("--exp_iter", type=int, default=-1, help=text)
    options.add_run_arguments(g, save_freq=20, tb_path=True)
    options.add_monitor_arguments(g)
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("--aug and --mem set the least crop", "crop")
    parser.ignore("it belongs to main_linear.py", "aug_linear")
    dead = ("feature_mix", "mix_ratio", "mix_alpha", "time_mix", "only_mix")
    parser.ignore("the published code never implemented it", *dead)
    args = parser.parse_args(argv)
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def build_loader(args, process: launch.Process):
    """Return the loader of one view (bank) or two (moco), and with --jigsaw of one more."""
    seen = [views.recipe(args)]
    if args.mem == "moco":
        seen = 2 * seen
    if args.jigsaw:
        seen.append(views.jigsaw_recipe(args))
    return inputs.make_loader(args, process, inputs.open_pretraining(args), tuple(seen))


class Method:
    """The part that methods with a bank and with a queue share: network, optimizer and loss."""

    def __init__(self, args, process: launch.Process):
        self.args = args
        self.process = process
        network = networks.build_network(args)
        pretrained.start_from(network, args.init)
        batchnorm.split(network, backbones.splits_here(args, process))
        parts = training.prepare(network, args, process)
        self.network, self.wrapped, self.optimizer, self.precision = parts
        self.rule = recipes.rule(args)
        self.modalities = len(networks.MODALS[args.modal])
        moved = self.rule is not None and self.rule.positives  # their loss may well lie above
        if not moved and args.head != "linear_wo_norm":
            self.equal_loss = self.modalities * nce.equal_loss(args.nce_k)
        if moved:
            self.remedies = "to begin later (--mix_start_epoch) or from a trained network (--init)"
        # Generators are in the same state on every rank. `mixing` draws coefficients and
        # permutations, `draws` bank rows or shuffles of keys, `patches` the jigsaws.
        mixing = torch.Generator(process.device).manual_seed(args.seed)
        draws = torch.Generator(process.device if args.mem == "bank" else "cpu")
        patches = torch.Generator().manual_seed(args.seed)
        draws.manual_seed(args.seed)
        self.generators = {"mixing": mixing, "draws": draws, "patches": patches}

    def encode(self, images, squares) -> list:
        """Return features (B, V D) of V modalities, of the pictures and then of their jigsaws."""
        with self.precision.autocast():
            if not squares:
                return [self.wrapped(images)]
            patches, order = jigsaw.draw(squares[0], self.generators["patches"])
            return list(self.wrapped(images, patches, order))

    def draw(self, batch: loop.Batch) -> tuple:
        """Return the rule of this step (None before --mix_start_epoch) and this rank's draws."""
        rule = self.rule if batch.at.epoch + 1 > self.args.mix_start_epoch else None
        pairs = len(batch.index) * self.process.world_size
        drawn = self.memory.draw(rule, pairs, self.generators["mixing"])
        return rule, [one.part(self.process.rank, self.process.world_size) for one in drawn]

    def loss(self, logits) -> tuple:
        """Return the loss of logits (B, 1 + K) of every query and modality, and the values to log.

        The loss is InfoNCE in nats, summed over modalities; a jigsaw's loss has the weight --beta.
        """
        losses = [info_nce(of_query) for of_query in logits]
        loss, values = losses[0], {}
        if len(losses) == 2:
            loss = (1 - self.args.beta) * losses[0] + self.args.beta * losses[1]
            values = {"picture_loss": losses[0].detach(), "jigsaw_loss": losses[1].detach()}
        pictures = [out.detach() for out in logits[0]]
        negatives = [out[:, 1:].mean() * self.args.nce_t for out in pictures]
        values["negative_similarity"] = sum(negatives) / len(negatives)
        if self.args.save_score:
            values["scores"] = self.statistics(pictures)
        return loss, {"loss": loss.detach(), "contrast_acc1": hits(pictures), **values}

    def statistics(self, logits):
        """Return statistics (B, 5) of the pictures' scores in the loss, means over modalities."""
        t = self.args.nce_t
        scores = [metrics.score_statistics(out[:, 0], out[:, 1:], t) for out in logits]
        return sum(scores) / len(scores)

    def embed(self, images):
        """Return the pooled features (N, F); those of two towers are side by side."""
        with self.precision.autocast():
            return self.network.encode(images)

    def pictures(self, seen) -> dict:
        return views.pictures(self.args, seen, self.generators["patches"])

    def state_dict(self) -> dict:
        model = layouts.add_prefix(self.network.state_dict(), "module.")
        return {"model": model, "contrast": self.memory.state_dict()}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        checkpoints.load_memory(self.memory, saved)
        model = layouts.strip_prefix(saved["model"])
        checkpoint.load_into(self.network, model, saved.path, flag="--arch")


class Bank(Method):
    """One view and a memory bank (InsDis, CMC, PIRL); the positive is the picture's own row."""

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        settings = (args.nce_t, args.nce_k, args.nce_m)
        self.memory = MemoryBank(self.modalities, n, args.feat_dim, *settings).to(process.device)

    def step(self, batch: loop.Batch) -> dict:
        seen = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
        images, *squares = seen
        queries = self.encode(images, squares)
        draws = self.generators["draws"]
        rows = memory.draw_rows(batch.index, self.memory.n, self.memory.k, draws)  # B x (1 + K)
        logits = self.memory(queries, rows, *self.draw(batch))
        loss, values = self.loss(logits)
        values["feature_spread"] = metrics.spread(queries[0])
        self.precision.step(loss, self.optimizer)
        self.memory.update(collectives.all_gather(queries[0]), collectives.all_gather(batch.index))
        return values


class MoCo(Method):
    """Two views, a key encoder that follows the trained one after a step, and a queue of keys."""

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, process)
        queue = KeyQueue(self.modalities, args.nce_k, args.feat_dim, args.nce_t)
        self.memory = queue.to(process.device)
        self.network_ema = copy.deepcopy(self.network).requires_grad_(False)
        if args.compile:
            self.network_ema.compile()
        self.average = get_ema_multi_avg_fn(args.alpha)

    def step(self, batch: loop.Batch) -> dict:
        seen = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
        im_q, im_k, *squares = seen
        draws = self.generators["draws"]
        # key: N x D, keys: those of all ranks
        key, keys = batchnorm.encode_shuffled(self.encode_keys, im_k, draws)
        queries = self.encode(im_q, squares)
        logits = self.memory(queries, key, *self.draw(batch))
        loss, values = self.loss(logits)
        values["feature_spread"] = metrics.spread(queries[0])
        values["view_correlation"] = transform.view_correlation(queries[0], key)
        self.precision.step(loss, self.optimizer)
        self.memory.enqueue(keys)
        trained = [param.detach() for param in self.network.parameters()]
        self.average(list(self.network_ema.parameters()), trained, None)
        return values

    def encode_keys(self, images):
        with self.precision.autocast():
            return self.network_ema(images)

    def state_dict(self) -> dict:
        queue = {"pointer": self.memory.pointer.clone()}
        model_ema = self.network_ema.state_dict()
        return super().state_dict() | {"model_ema": model_ema, "queue": queue}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        super().load_state_dict(saved)
        checkpoints.load_pointer(self.memory, saved)
        model_ema = layouts.strip_prefix(saved["model_ema"])
        checkpoint.load_into(self.network_ema, model_ema, saved.path, flag="--arch")


def build_method(args, pictures, steps: int, process: launch.Process) -> Method:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    kind = MoCo if args.mem == "moco" else Bank
    return kind(args, len(pictures), process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate: steps or a cosine per epoch, after an optional linear warm-up."""
    if args.footing == "common":
        return footing.learning_rate(args.learning_rate, at, args.epochs)
    floor = args.learning_rate * args.lr_decay_rate**3
    warm_epochs = schedule.warm_epochs(args.epochs)
    if args.warm and at.epoch < warm_epochs:
        to = args.learning_rate
        if args.cosine:
            to = schedule.cosine(args.learning_rate, warm_epochs, args.epochs, floor)
        start = min(schedule.WARM_FROM, to)
        return schedule.warmup(to, at.epoch + at.part, warm_epochs, start)
    if args.cosine:
        return schedule.cosine(args.learning_rate, at.epoch + 1, args.epochs, floor)
    return schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    args = views.choose_classes(args)
    files = loop.Files(
        __file__,
        last="current.pth",
        numbered="ckpt_epoch_{}.pth",
        same=("dataset", "arch", "modal", "mem", "head", "feat_dim"),
        events=options.events(args, args.folder),
    )
    with loop.Job(args, process, args.folder, files) as job:
        args = job.args
        loader = build_loader(args, process)
        n = len(loader.dataset)
        neighbours = knn.loaders(args, process, loader.dataset, views.plain_view(args))
        method = build_method(args, loader.dataset, len(loader), process)
        job.begin(
            loader,
            method,
            contrast_ways=1 + args.nce_k,
            bn_groups=backbones.splits_here(args, process) * process.world_size,
            transformation=str(method.rule),
        )
        if args.nce_k >= n:
            warning = options.long_queue if args.mem == "moco" else options.many_draws
            job.warn(warning("--nce_k", args.nce_k, n))
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
