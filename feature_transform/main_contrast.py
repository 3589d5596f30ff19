#!/usr/bin/env python
"""Feature transformation for contrastive learning: pre-training.

Improving Contrastive Learning by Visualizing Feature Transformation. Rui Zhu, Bingchen Zhao, Jingen Liu, Zhenglong Sun, Chang
Wen Chen. ICCV 2021, arXiv:2108.02982. A minute on a laptop, and the published run on ImageNet-100:

    python feature_transform/main_contrast.py --demo --epochs 1
    python feature_transform/main_contrast.py --method MoCov2 --data_folder IMAGENET --dataset imagenet100 \\
        --imagenet100path preprocess/imagenet100.txt --epochs 200 --input_res 224 --cosine --batch_size 256 \\
        --learning_rate 0.03 --mixnorm --mixnorm_target posneg --sep_alpha --pos_alpha 2.0 --neg_alpha 1.6 \\
        --mask_distribution beta --expolation_mask --alpha 0.99 --save_score
"""

import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import UsageError, UserError, batchnorm, cli, launch, memory, metrics, options, schedule
from runner import checkpoint, knn, layouts, loop
from common.precision import Precision
from feature_transform import networks, recipes, views
from feature_transform.memory import KeyQueue, MemoryBank
from feature_transform.transform import Rule
from preprocess import demo

WARM_FROM = 0.01  # learning rate at the first step of a warm-up
PAPER = dict(
    mixnorm=True, mixnorm_target="posneg", expolation_mask=True, sep_alpha=True, mask_distribution="beta", dim_mask="none",
)  # fmt: skip
PRESETS = {
    "ft": PAPER,  # the transformation of the published commands, with whatever --method
    "demo": dict(
        PAPER, data="data/demo", dataset="folder", method="MoCov2", arch="resnet18", input_res=32, epochs=12, batch_size=64,
        learning_rate=0.03, cosine=True, nce_k=512, alpha=0.99, bn_splits=2, workers=2, save_freq=100, save_score=True,
        model_path="runs/try-feature-transform", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", help="data set root with train/CLASS/*, or pictures alone")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100", workers=8)
    g.add_argument("--imagenet100path", dest="class_list", metavar="FILE", help="as --class-list; one class a line")

    g = parser.add_argument_group("model")
    g.add_argument("--arch", type=networks.arch_name, default="resnet50", help="encoder; x2, x4: wider stages")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("-d", "--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    about = "sets the six flags below, of which those that are typed win; Customize sets none"
    g.add_argument("--method", choices=list(recipes.METHODS), default="Customize", help=about)
    g.add_argument("--modal", choices=list(networks.MODALS), default="RGB", help="CMC: lightness against colour")
    g.add_argument("--jigsaw", action=cli.OnOff, default=False, help="a second query from nine patches (PIRL)")
    about = "bank: a row for each picture, one view; moco: queue of keys, two views"
    g.add_argument("--mem", choices=["bank", "moco"], default="moco", help=about)
    about = "augmentation: MoCo's (A), MoCo-v2's (B), CMC's (C), InfoMin's (D), CMC-v2's (E)"
    g.add_argument("--aug", choices=views.AUGMENTATIONS, default="A", help=about)
    g.add_argument("--head", "--custom_head", choices=networks.HEADS, default="linear", help="projection head")
    g.add_argument("-t", "--nce_t", type=cli.positive, default=0.07, help="temperature")
    about = "negatives per query; for moco the queue length"
    g.add_argument("-k", "--nce_k", type=cli.positive_int, default=65536, help=about)
    g.add_argument("-m", "--nce_m", type=cli.fraction, default=0.5, help="bank: momentum of a row")
    g.add_argument("--alpha", "--moco-m", type=cli.fraction, default=0.999, help="moco: momentum of the key encoder")
    g.add_argument("--beta", type=cli.fraction, default=0.5, help="jigsaw: share of its loss")
    about = "batch-norm groups over all processes; moco shuffles keys over them; default: moco 8, bank 1"
    g.add_argument("--bn-splits", type=cli.positive_int, help=about)

    g = parser.add_argument_group("feature transformation")
    g.add_argument("--mixnorm", action=cli.OnOff, default=False, help="transform features before they are compared")
    about = "which of them: positives, negatives, both"
    g.add_argument("--mixnorm_target", choices=["pos", "neg", "posneg"], default="neg", help=about)
    about = "positives: coefficients from 1 to 2, which move a pair apart; else from 0 to 1"
    g.add_argument("--expolation_mask", "--extrapolation_mask", action=cli.OnOff, default=False, help=about)
    g.add_argument("--mask_distribution", choices=["uniform", "beta"], default="beta", help="of the coefficients")
    about = "for which a coefficient is drawn for each number; none: one a step; sample: one for each row; default, as "
    about += "published: none for posneg with --sep_alpha and beta, else both"
    g.add_argument("--dim_mask", choices=["none", "pos", "neg", "both", "sample"], help=about)
    g.add_argument("--beta_alpha", type=cli.positive, default=2.0, help="a of Beta(a, a)")
    g.add_argument("--sep_alpha", action=cli.OnOff, default=False, help="one for positives, one for negatives:")
    g.add_argument("--pos_alpha", type=cli.positive, default=2.0, help="a of the positives")
    g.add_argument("--neg_alpha", type=cli.positive, default=1.6, help="a of the negatives")
    g.add_argument("--postmix_norm", action=cli.OnOff, default=False, help="back to unit length afterwards")
    about = "what --postmix_norm brings there; pos: query and key (published, whatever was typed)"
    g.add_argument("--norm_target", choices=["pos", "neg", "both"], default="pos", help=about)
    about = "transformed from the next epoch on; epochs count from 1"
    g.add_argument("--mix_start_epoch", type=cli.count, default=0, help=about)
    about = "the query that negatives are compared with"
    g.add_argument("--neg_query", choices=["transformed", "original"], default="transformed", help=about)

    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g, epochs=200, batch_size=256, lr_decay_epochs="120,160")
    about = "half a cosine down to the rate after three drops, in place of steps"
    g.add_argument("--cosine", action=cli.OnOff, default=False, help=about)
    about = f"warm up from {WARM_FROM} in 5 epochs (10 of more than 500); on for batches above 256"
    g.add_argument("--warm", action=cli.OnOff, default=False, help=about)

    g = parser.add_argument_group("run")
    about = "the run gets a folder of its own in here"
    g.add_argument("--model_path", default="./runs/feature_transform", help=about)
    options.add_name_argument(g)
    g.add_argument("--exp_iter", type=int, default=-1, help="number at the end of that name; -1: none")
    g.add_argument("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    options.add_run_arguments(g, save_freq=20)
    options.add_monitor_arguments(g)
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("the augmentation has its own least crop", "crop")
    parser.ignore("of the linear evaluation", "aug_linear")
    parser.ignore("never written", "feature_mix", "mix_ratio", "mix_alpha", "time_mix", "only_mix")
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/CLASS/*, or --demo for built-in pictures")
    recipes.fill(args)
    recipes.check(args)
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    args.warm = args.warm or args.batch_size > 256 and "warm" not in args.typed
    if args.bn_splits is None:
        args.bn_splits = 8 if args.mem == "moco" else 1
    args.folder = options.run_folder(args, args.model_path, recipes.run_name(args))
    return args


def build_loader(args, process: launch.Process):
    """The augmentations are written out in views.py."""
    view, jigsaw = views.recipe(args), [views.jigsaw_recipe(args)] if args.jigsaw else []
    seen = (*(view,) * (2 if args.mem == "moco" else 1), *jigsaw)
    return options.make_loader(args, process, options.open_pretraining(args), seen)


class Method:
    """What bank and queue have in common: a network, its optimizer, the rule of the transformation, the loss."""

    def __init__(self, args, n: int, process: launch.Process):
        self.args, self.process = args, process
        network = batchnorm.split(networks.build_network(args), batchnorm.splits_here(args, process))
        network = network.to(process.device, memory_format=torch.channels_last).train()
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
        self.precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
        self.encoder, self.optimizer = self.precision.prepare(network, torch.optim.SGD(network.parameters(), **sgd))
        if args.compile:
            self.encoder.compile()
        self.wrapped = launch.parallel(self.encoder, process)
        self.rule, self.modalities = Rule.of(args), len(networks.MODALS[args.modal])
        self.memory = self.build_memory(n).to(process.device)
        mixing = torch.Generator(process.device).manual_seed(args.seed)  # coefficients and permutations
        drawing = torch.Generator(process.device if args.mem == "bank" else "cpu").manual_seed(args.seed)
        patches = torch.Generator().manual_seed(args.seed)  # cuts and orders of jigsaws
        self.generators = {"mixing": mixing, "draws": drawing, "patches": patches}  # in the same state on every rank

    def queries(self, images, squares):
        """Of the pictures, and of their jigsaws where there are any: N x V D each, for V modalities side by side."""
        with self.precision.autocast():
            if not squares:
                return [self.wrapped(images)]
            patches = views.cut_patches(squares[0], self.generators["patches"])
            order = torch.rand(len(images) * self.process.world_size, 9, generator=self.generators["patches"])
            order = order.argsort(1).chunk(self.process.world_size)[self.process.rank]
            return list(self.wrapped(images, patches, order.to(images.device)))

    def transformation(self, epoch: int, b: int):
        """The rule and the draws of a step of this epoch; None and nothing before it begins."""
        rule = self.rule if epoch > self.args.mix_start_epoch else None
        return rule, self.memory.draw(rule, b, self.generators["mixing"])

    def finish(self, logits) -> dict:
        """InfoNCE of logits N x (1 + K), of every query and modality; take the step; what there is to say about it."""
        labels = torch.zeros(len(logits[0][0]), dtype=torch.long, device=logits[0][0].device)
        losses = [sum(F.cross_entropy(out, labels) for out in of_query) for of_query in logits]
        loss, *jigsaw = losses
        if jigsaw:
            loss = (1 - self.args.beta) * losses[0] + self.args.beta * losses[1]
        self.precision.step(loss, self.optimizer)
        out = [out.detach() for out in logits[0]]
        self.scores = self.statistics(out) if self.args.save_score else None
        hits = [(one[:, 0] > one[:, 1:].amax(1)).float().mean() * 100 for one in out]
        values = {"loss": loss.detach(), "contrast_acc1": sum(hits) / len(hits)}
        return values | ({"picture_loss": losses[0].detach(), "jigsaw_loss": losses[1].detach()} if jigsaw else {})

    def statistics(self, logits):
        """Of the pictures' own scores, as they enter the loss: N x 5. Of two modalities the mean of both."""
        found = [metrics.score_statistics(out[:, 0], out[:, 1:], self.args.nce_t) for out in logits]
        return sum(found) / len(found)

    def embed(self, images):
        """The pooled feature, of both towers side by side: (N, D)."""
        with self.precision.autocast():
            return self.encoder.encode(images)

    def pictures(self, seen) -> dict:
        names = ("picture",) if self.args.mem == "bank" else ("query", "key")
        columns = {}
        for name, images in zip((*names, "jigsaw"), seen):
            columns |= views.pictures(self.args, name, images)
        return columns

    def state_dict(self) -> dict:
        model = layouts.add_prefix(self.encoder.state_dict(), "module.")
        return {"model": model, "contrast": self.memory.state_dict()}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if ("model_ema" in saved) != (self.args.mem == "moco"):
            other = "bank" if self.args.mem == "moco" else "moco"
            raise UserError(f"{saved.path} is of --mem {other}, this run of {self.args.mem}: add --mem {other}")
        self.memory.load(saved["contrast"], saved.path, self.length)
        checkpoint.load_into(self.encoder, layouts.strip_prefix(saved["model"]), saved.path, flag="--arch")


class Bank(Method):
    """One view and a memory bank (InsDis, CMC, PIRL). The positive is the picture's own row, the average of earlier crops."""

    length = "{} training pictures"

    def build_memory(self, n: int):
        args = self.args
        return MemoryBank(self.modalities, n, args.feat_dim, args.nce_t, args.nce_k, args.nce_m)

    def step(self, seen, index, epoch: int) -> dict:
        images, *squares = (v.contiguous(memory_format=torch.channels_last) for v in seen)
        queries = self.queries(images, squares)
        rows = memory.draw_rows(index, self.memory.n, self.memory.k, self.generators["draws"])  # N x (1 + K)
        values = self.finish(self.memory(queries, rows, *self.transformation(epoch, len(index))))
        self.memory.update(launch.all_gather(queries[0]), launch.all_gather(index))
        return values


class MoCo(Method):
    """Two views, a key encoder and a queue. The key encoder follows the query encoder after every step."""

    length = "--nce_k {}"

    def __init__(self, args, n: int, process: launch.Process):
        super().__init__(args, n, process)
        self.encoder_ema = copy.deepcopy(self.encoder).requires_grad_(False)
        if args.compile:
            self.encoder_ema.compile()
        self.average = get_ema_multi_avg_fn(args.alpha)

    def build_memory(self, n: int):
        return KeyQueue(self.modalities, self.args.nce_k, self.args.feat_dim, self.args.nce_t)

    def step(self, seen, index, epoch: int) -> dict:
        im_q, im_k, *squares = (v.contiguous(memory_format=torch.channels_last) for v in seen)
        key, keys = self.encode_keys(im_k)  # N x V D, (N * world) x V D
        queries = self.queries(im_q, squares)
        values = self.finish(self.memory(queries, key, *self.transformation(epoch, len(index))))
        self.memory.enqueue(keys)
        self.average(list(self.encoder_ema.parameters()), [p.detach() for p in self.encoder.parameters()], None)
        return values

    @torch.no_grad()
    def encode_keys(self, images):
        """Keys, their batch statistics taken over a shuffled batch: (own rows, all rows)."""
        shuffle = batchnorm.BatchShuffle(len(images), self.generators["draws"], images.device)
        with self.precision.autocast():
            everyone = shuffle.collect(self.encoder_ema(shuffle.spread(images)))
        return shuffle.own(everyone), everyone

    def state_dict(self) -> dict:
        queue = {"pointer": self.memory.pointer.clone()}
        return super().state_dict() | {"model_ema": self.encoder_ema.state_dict(), "queue": queue}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        super().load_state_dict(saved)
        self.memory.place(saved.get("queue"), saved.path)
        checkpoint.load_into(self.encoder_ema, layouts.strip_prefix(saved["model_ema"]), saved.path, flag="--arch")


def learning_rate(args, epoch: int, part: float) -> float:
    """At `part` of epoch `epoch`, which counts from 1: a cosine over epochs, or the first epoch after 120 complete ones is the
    first to drop; before that a straight line to where the cosine is when the warm-up ends."""

    def cosine(epoch: int) -> float:
        return schedule.cosine(args.learning_rate, epoch, args.epochs, args.learning_rate * args.lr_decay_rate**3)

    warm_epochs = 10 if args.epochs > 500 else 5
    if args.warm and epoch <= warm_epochs:
        to = cosine(warm_epochs) if args.cosine else args.learning_rate
        return schedule.warmup(to, epoch - 1 + part, warm_epochs, start=min(WARM_FROM, to))
    if args.cosine:
        return cosine(epoch)
    return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    views.choose_classes(args)
    files = dict(last="current.pth", numbered="ckpt_epoch_{}.pth", same=("arch", "modal", "mem", "head"))
    events = os.path.join(args.tb_path, os.path.basename(args.folder)) if args.tb_path else True
    with loop.Job(args, process, args.folder, **files, tensorboard=events) as job:
        groups = batchnorm.splits_here(args, process) * process.world_size
        loader = build_loader(args, process)
        n = len(loader.dataset)
        knn = knn.loaders(args, process, loader.dataset, views.plain_view(args))
        method = (MoCo if args.mem == "moco" else Bank)(args, n, process)
        job.begin(loader, method, contrast_ways=1 + args.nce_k, bn_groups=groups, transformation=str(method.rule))
        if args.nce_k >= n:
            job.warn(
                f"the queue (--nce_k {args.nce_k}) is {args.nce_k / n:.1f} times as long as the data set ({n} images): a "
                "picture's own earlier keys are among its negatives; use fewer"
                if args.mem == "moco"
                else f"--nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn again and again, "
                "the picture itself too; use fewer"
            )
        for epoch in job.epochs():
            for seen, _, index in job.batches():
                lr = learning_rate(args, epoch, job.step / len(loader))
                schedule.set_lr(method.optimizer, lr)
                job.track(**method.step(seen, index, epoch), learning_rate=lr)
                if args.save_score:
                    job.keep_scores(method.scores)
            if job.due(args.knn_every):
                knn.evaluate(job, method.encoder, method.embed, knn)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
