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

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import (
    UsageError,
    UserError,
    augment,
    backbones,
    batchnorm,
    checkpoint,
    cli,
    data,
    memory,
    options,
    precision,
    probe,
    processes,
    run,
    schedule,
)
from common.precision import Precision
from moco_insdis.contrast import LONG_AGO, KeyQueue, MemoryBank
from preprocess import demo

MODELS = {  # name: (depth, width)
    "resnet18": (18, 1), "resnet34": (34, 1), "resnet50": (50, 1), "resnet50x2": (50, 2), "resnet50x4": (50, 4),
    "resnet101": (101, 1),
}  # fmt: skip
WARM_FROM, WARM_EPOCHS = 0.01, 10  # of --warm, as the same author's later code (PyContrast) has them
PRESETS = {
    # 50,000 small pictures (CIFAR): the published settings compare with a third of the data set at every step
    "small": dict(
        model="resnet18", dataset="folder", input_res=32, small_stem=True, softmax=True, nce_k=4096, nce_t=0.1, alpha=0.99,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", input_res=32, epochs=12, batch_size=64,
        learning_rate=0.03, lr_decay_epochs="8,10", nce_k=512, nce_t=0.1, alpha=0.99, bn_splits=2, workers=2,
        save_freq=100, model_path="runs/try-moco-insdis", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", default=None, help="data set root with train/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100", workers=18)
    g.add_argument("--crop", type=cli.share, default=None, help="least share of the picture that a crop covers; "
                   "default .2, with --dataset imagenet .08")  # fmt: skip
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ",
                   help="CJ: greyscale and colour jitter; NULL: crop and flip only")  # fmt: skip

    g = parser.add_argument_group("model")
    g.add_argument("--model", choices=list(MODELS), default="resnet50", help="network; x2, x4: wider stages")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    g.add_argument("--moco", action="store_true", help="MoCo (two views, queue of keys); else InsDis (memory bank)")
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    g.add_argument(
        "--nce_k", type=cli.positive_int, default=16384, help="negatives per query; for MoCo the queue length"
    )
    g.add_argument("--nce_t", type=cli.positive, default=0.07, help="temperature")
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help="InsDis: momentum of a memory row")
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help="NCE: the normaliser Z follows a moving "
                   "average (its decay rises to .99), or stays that of the first batch, as first published")  # fmt: skip
    g.add_argument("--exclude-self", action="store_true", help="InsDis: never draw a picture as its own negative")
    g.add_argument("--alpha", type=cli.fraction, default=0.999, help="MoCo: momentum of the key encoder")
    g.add_argument("--bn-splits", type=cli.positive_int, default=None,
                   help="batch-norm groups over all processes, as on that many GPUs; MoCo shuffles keys over them; "
                   "default: MoCo 4 (the published runs' GPUs), InsDis 1")  # fmt: skip

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=240, help="epochs to run in all, counted from 1")
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=128, help="global batch over all processes")
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=0.03, help="not scaled with the batch")
    g.add_argument("--lr_decay_epochs", default="120,160,200", help="complete epochs after which the rate drops")
    g.add_argument("--lr_decay_rate", type=cli.positive, default=0.1, help="factor of each drop")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-4, help="weight decay")
    g.add_argument("--warm", action="store_true",
                   help=f"warm up from {WARM_FROM} in {WARM_EPOCHS} epochs (published: no effect)")  # fmt: skip

    g = parser.add_argument_group("run")
    g.add_argument("--model_path", default="./runs/moco_insdis", help="the run gets a folder of its own in here")
    g.add_argument("--tb_path", default=None, help="TensorBoard events go below here; default: into the run folder")
    g.add_argument("--print_freq", type=cli.positive_int, default=10, help="steps between progress lines")
    g.add_argument("--save_freq", type=cli.positive_int, default=10, help="epochs between numbered checkpoints")
    g.add_argument("--resume", default="", metavar="PATH|auto", help="continue from a checkpoint, or the run's newest")
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds checkpoints")
    g.add_argument(
        "--seed", type=cli.seed, default=None, help="seed of everything random; drawn and recorded if not given"
    )
    g.add_argument("--knn-every", type=cli.count, default=0, help="epochs between k-NN evaluations; 0: never")
    g.add_argument("--knn-k", type=cli.positive_int, default=200, help="neighbours in that evaluation")

    g = processes.add_arguments(parser)
    precision.add_arguments(g)
    g.add_argument("--syncBN", action="store_true", help="batch-norm statistics over all processes (InsDis)")
    g.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    parser.refuse(
        "tb_freq", "never had an effect: TensorBoard gets a point at every --print_freq steps and every epoch"
    )
    parser.refuse("beta1", "never had an effect in pre-training, which uses SGD")
    parser.refuse("beta2", "never had an effect in pre-training, which uses SGD")
    args = parser.parse_args(argv)

    precision.check_arguments(args)
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
        if flag in args._typed:
            wanted = "InsDis: leave --moco away" if args.moco else "MoCo: add --moco"
            raise UsageError(f"--{flag.replace('_', '-')} belongs to {wanted}, or leave it away")
    if args.syncBN and args.bn_splits > 1:
        raise UsageError("--syncBN joins what --bn-splits takes apart; leave one of the two away")
    if "nce_z" in args._typed and "softmax" not in args._typed:
        args.softmax = False  # whatever the preset says
    if args.softmax and "nce_z" in args._typed:
        raise UsageError(f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; leave one of the two away")
    args.folder = os.path.join(args.model_path, run_name(args))
    if args.demo and "model_path" not in args._typed and not args.resume:
        args.overwrite = True  # of its own folder only
    return args


def run_name(args) -> str:
    """The published name of the run folder. What it leaves out (temperature, data set, ...) is in config.json."""
    method = f"MoCo{args.alpha}" if args.moco else "InsDis"
    loss = "softmax" if args.softmax else "nce" if args.nce_z == "ema" else "nce_oneshot"
    return (f"{method}_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}_decay_{args.weight_decay}"
            f"_bsz_{args.batch_size}_crop_{args.crop}{'_warm' * args.warm}"
            f"{f'_amp_{args.opt_level}' * args.amp}_aug_{args.aug}")  # fmt: skip


def recipe(args) -> augment.Compose:
    """The augmentation of one view. Greyscale comes before the jitter, which is always applied; there is no blur."""
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0)), augment.RandomHorizontalFlip()
    normalize = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    if args.aug == "NULL":
        return augment.Compose(crop, flip, normalize)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, normalize)


def build_loader(args, process: processes.Process, per_process: int) -> data.Loader:
    views = (recipe(args),) * (2 if args.moco else 1)
    return options.make_loader(args, process, options.open_pretraining(args), views, per_process, args.seed)


class InsDis:
    """One network and a memory bank. A step compares each picture's feature with bank rows, then writes it to its own."""

    def __init__(self, args, n: int, process: processes.Process):
        self.encoder, self.optimizer, self.precision = build_encoder(args, process)
        self.wrapped = parallel(self.encoder, process)
        self.memory = MemoryBank(n, args.feat_dim, args.nce_k, args.nce_t, args.nce_m, args.softmax, args.nce_z)
        self.memory.to(process.device)
        self.exclude_self = args.exclude_self
        self.draws = torch.Generator(process.device).manual_seed(args.seed)  # negatives; the same on every rank

    def step(self, views, index):
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            feat = self.wrapped(images)
        feat = F.normalize(feat.float(), dim=1)  # N x D
        rows = memory.draw_rows(index, self.memory.n, self.memory.k, self.draws, self.exclude_self)  # N x (1 + K)
        loss, out = self.memory(feat, rows)
        self.precision.step(loss, self.optimizer)
        self.memory.update(processes.all_gather(feat), processes.all_gather(index))
        return loss, out

    def state(self) -> dict:
        return {"z_updates": self.memory.updates}

    def load_state(self, saved: dict, path: str) -> None:
        self.memory.updates = saved.get("z_updates", LONG_AGO)
        memory = self.memory  # Z goes on, the rest is this run's
        memory.params.copy_(torch.tensor([memory.k, memory.temperature, float(memory.normaliser), memory.momentum]))


class MoCo:
    """Query network, key network and a queue. The key network follows the query network after every step."""

    def __init__(self, args, n: int, process: processes.Process):
        self.encoder, self.optimizer, self.precision = build_encoder(args, process)
        self.encoder_ema = copy.deepcopy(self.encoder).requires_grad_(False)
        if args.compile:
            self.encoder_ema.compile()
        self.wrapped = parallel(self.encoder, process)
        self.memory = KeyQueue(n, args.feat_dim, args.nce_k, args.nce_t, args.softmax, args.nce_z).to(process.device)
        self.average = get_ema_multi_avg_fn(args.alpha)
        self.draws = torch.Generator().manual_seed(args.seed)  # batch shuffles; the same on every rank

    def step(self, views, index):
        im_q, im_k = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            query = self.wrapped(im_q)
        query = F.normalize(query.float(), dim=1)  # N x D
        key, keys = self.encode_keys(im_k)  # N x D, (N * world) x D
        loss, out = self.memory(query, key)
        self.precision.step(loss, self.optimizer)
        self.memory.enqueue(keys)
        self.average(list(self.encoder_ema.parameters()), [p.detach() for p in self.encoder.parameters()], None)
        return loss, out

    @torch.no_grad()
    def encode_keys(self, images):
        """Unit keys, their batch statistics taken over a shuffled batch: (own rows, all rows)."""
        shuffle = batchnorm.BatchShuffle(len(images), self.draws, images.device)
        with self.precision.autocast():
            feat = self.encoder_ema(shuffle.spread(images))
        everyone = shuffle.collect(F.normalize(feat.float(), dim=1))
        return shuffle.own(everyone), everyone

    def state(self) -> dict:
        return {"model_ema": checkpoint.add_prefix(self.encoder_ema.state_dict(), PREFIX),
                "queue": self.memory.extra_state()}  # fmt: skip

    def load_state(self, saved: dict, path: str) -> None:
        checkpoint.load_into(self.encoder_ema, checkpoint.strip_prefix(saved["model_ema"], PREFIX), path)
        self.memory.load_extra_state(saved.get("queue"))


PREFIX = "encoder.module."  # of the networks' parameter names in the published files


def build_encoder(args, process: processes.Process):
    """(network, optimizer, precision); with apex they are its own."""
    depth, width = MODELS[args.model]
    network = backbones.WidthResNet(depth, 3, width, args.feat_dim, small_stem=args.small_stem)
    splits = max(1, args.bn_splits // process.world_size)
    batchnorm.split_batchnorm(network, splits)
    if args.syncBN and process.world_size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(process.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), args.learning_rate, momentum=args.momentum,
                                weight_decay=args.weight_decay, fused=True)  # fmt: skip
    precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
    network, optimizer = precision.prepare(network, optimizer)
    if args.compile:
        network.compile()
    return network, optimizer, precision


def parallel(network: nn.Module, process: processes.Process) -> nn.Module:
    if process.world_size == 1:
        return network
    devices = [process.device] if process.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


def train_one_epoch(method, loader, epoch, first_step, stop, log, args):
    """Returns the number of steps done: all of them, or fewer where a signal asked to stop. Epochs count from 1."""
    done_before = (epoch - 1) * len(loader)
    progress = run.Progress(f"Epoch: [{epoch}]", len(loader), args.print_freq, first_step, log.main)
    loader.set_epoch(epoch, first_step)
    loader.view_seconds = loader.wait_seconds = 0.0
    step = first_step
    for views, _, index in loader:
        lr = learning_rate(args, epoch, step / len(loader))
        schedule.set_lr(method.optimizer, lr)
        loss, out = method.step(views, index)
        step += 1
        out = out.detach()
        shown = progress.update(len(out), Loss=loss, Prob=out[:, 0].mean(), **softmax_probability(out, args))
        if shown:
            z = {} if args.softmax else {"z_over_n": method.memory.normaliser / method.memory.n}
            log.log(done_before + step, epoch=epoch, ins_loss=shown["Loss"], ins_prob=shown["Prob"],
                    **({"positive_prob": shown["Softmax"]} if args.softmax else z),
                    learning_rate=lr, seconds_per_step=shown["seconds"],
                    view_share=loader.view_seconds / max(progress.elapsed, 1e-9),
                    wait_share=loader.wait_seconds / max(progress.elapsed, 1e-9))  # fmt: skip
        if stop.asked():
            break
    means = progress.close()
    if step == len(loader):
        log.log(done_before + step, epoch=epoch, epoch_ins_loss=means["Loss"], epoch_ins_prob=means["Prob"])
    log.say(f"Epoch {epoch}: loss {means.get('Loss', float('nan')):.4f}, prob {means.get('Prob', float('nan')):.4g}, "
            f"lr {lr:.2g}, {means['images_per_second']:.0f} images/s, {run.clock(means['elapsed'])}")  # fmt: skip
    return step


def softmax_probability(out, args) -> dict:
    """The published "prob" is the mean of column 0, which with InfoNCE is a logit; this is the probability itself."""
    return {"Softmax": (out[:, 0] - out.logsumexp(1)).exp().mean()} if args.softmax else {}


def learning_rate(args, epoch: int, part: float) -> float:
    """At `part` of epoch `epoch`. Epochs count from 1; the first one after 120 complete ones is the first to drop."""
    lr = schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)
    if args.warm and epoch <= WARM_EPOCHS:
        return schedule.warmup(lr, epoch - 1 + part, WARM_EPOCHS, start=min(WARM_FROM, lr))
    return lr


def knn_loaders(args, process: processes.Process, train_set):
    """Of the k-NN evaluation: pictures as they are, without random augmentation."""
    geometry = augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res)
    view = augment.Compose(geometry, augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    return probe.knn_loaders(args, process, train_set, view)


def evaluate_knn(method, loaders, args, log, epoch, step):
    """Weighted k-NN on the pooled feature."""

    def feature(images):
        with method.precision.autocast():
            return backbones.feature(method.encoder, images.contiguous(memory_format=torch.channels_last), 6)

    probe.evaluate_knn(method.encoder, feature, loaders, args.knn_k, log, epoch, step)


def save(path, epoch, step, method, args, process):
    """The authors' keys (opt, model, contrast, optimizer, epoch, model_ema), and what an exact resume needs besides."""
    states = processes.gather_objects(dict(draws=method.draws.get_state(), torch=torch.get_rng_state()))
    if process.is_main:
        checkpoint.save(path, {
            "opt": cli.flags(args), "epoch": epoch, "optimizer": method.optimizer.state_dict(),
            "model": checkpoint.add_prefix(method.encoder.state_dict(), PREFIX), "contrast": method.memory.state_dict(),
            "step": step, "scaler": method.precision.scaler.state_dict(), "generators": states, **method.state(),
        })  # fmt: skip
    processes.barrier()


def open_resume(args) -> dict | None:
    """Read the checkpoint that --resume names (None: start from scratch) and take over its seed."""
    path = checkpoint.newest(args.folder) if args.resume == "auto" else args.resume
    if not path:
        return None
    saved = checkpoint.load(path) | {"path": str(path)}
    for key in ("model", "contrast", "optimizer", "epoch"):
        if key not in saved:
            raise UserError(f"{path} has no {key}: not a pre-training checkpoint of this script")
    if "memory" not in saved["contrast"]:
        raise UserError(f"{path} is of another method (its memory holds {', '.join(saved['contrast'])})")
    if ("model_ema" in saved) != args.moco:
        raise UserError(f"{path} is of {'MoCo: add --moco' if 'model_ema' in saved else 'InsDis: leave --moco away'}")
    then = saved.get("opt", {})
    if then.get("model", args.model) != args.model:
        raise UserError(f"{path} is of --model {then['model']}, this run of {args.model}")
    if args.seed is None:
        args.seed = then.get("seed")
    return saved


def restore(saved, method, args, process) -> tuple[int, int, list[str]]:
    """Put back what `save` wrote, or a published checkpoint has: (complete epochs, steps done of the next, remarks)."""
    path = saved["path"]
    checkpoint.load_into(method.encoder, checkpoint.strip_prefix(saved["model"], PREFIX), path)
    rows = len(saved["contrast"]["memory"])
    k = rows if args.moco else int(saved["contrast"]["params"][0])
    if k != args.nce_k:
        raise UserError(f"{path} was made with --nce_k {k}, this run has {args.nce_k}")
    if not args.moco and rows != method.memory.n:
        raise UserError(f"{path} was made with {rows} training pictures, this run has {method.memory.n}")
    checkpoint.load_into(method.memory, saved["contrast"], path)
    method.load_state(saved, path)
    method.optimizer.load_state_dict(saved["optimizer"])
    for group in method.optimizer.param_groups:  # what was typed now counts, not what was typed then
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    remarks = run.unlike(args, saved.get("opt", {}), CONTINUES)
    if "generators" in saved:
        states = saved["generators"]
        mine = states[process.rank % len(states)]
        if len(states) != process.world_size:
            remarks.append(f"note: {process.world_size} processes go on where there were {len(states)}: other draws")
        if len(mine["draws"]) == len(method.draws.get_state()):
            method.draws.set_state(mine["draws"])
        else:
            remarks.append("note: this is another kind of device than the run began on: other draws")
        torch.set_rng_state(mine["torch"])
        method.precision.scaler.load_state_dict(saved["scaler"])
    remarks.append(f"resumed {path}: epoch {saved['epoch']}, step {saved.get('step', 0)}")
    return saved["epoch"], saved.get("step", 0), remarks


# flags that must stay the same for a resumed run to be the run that was interrupted
CONTINUES = ("seed", "data", "dataset", "batch_size", "epochs", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "momentum",
             "weight_decay", "warm", "softmax", "nce_t", "nce_m", "nce_z", "exclude_self", "alpha", "crop", "aug", "input_res",
             "amp", "bn_splits", "syncBN")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of the {process.world_size} processes")
    if args.syncBN and process.world_size > 1 and process.device.type == "cpu":
        raise UsageError("--syncBN: PyTorch synchronises batch-norm between GPUs only; leave it away on CPUs")
    per_process = args.batch_size // process.world_size
    splits = max(1, args.bn_splits // process.world_size)
    if per_process // splits < 2:
        raise UsageError(f"--batch_size {args.batch_size}: batch-norm needs two pictures or more in each of its "
                         f"{splits * process.world_size} groups")  # fmt: skip
    if per_process % splits:
        raise UsageError(f"--bn-splits: {per_process} images per process cannot be cut into {splits} equal groups")
    run.refuse_to_overwrite(args.folder, "*.pth", args.resume, args.overwrite)
    demo.ensure_for(args, process)
    saved = open_resume(args)
    args.seed = run.settle_seed(args.seed)
    run.seed_all(args.seed)  # the same on every rank: equal weights and memories; per-rank draws are the loader's
    loader = build_loader(args, process, per_process)
    n = len(loader.dataset)
    knn = knn_loaders(args, process, loader.dataset) if args.knn_every else None
    method = (MoCo if args.moco else InsDis)(args, n, process)

    epoch, step, remarks = restore(saved, method, args, process) if saved else (0, 0, [])

    events = os.path.join(args.tb_path, run_name(args)) if args.tb_path else True
    log = run.Run(args.folder, args, process, tensorboard=events)
    log.say("view     " + repr(loader.views[0]).replace("\n", "\n         "))
    for note in loader.dataset.notes:
        log.say(f"note: {note}")
    log.derived(method="MoCo" if args.moco else "InsDis", loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}", images=n,
                classes=len(loader.dataset.classes), steps_per_epoch=len(loader), crop=args.crop, batch_per_process=per_process,
                bn_groups=splits * process.world_size, precision=str(method.precision), data_device=loader.mode)  # fmt: skip
    warn(args, n, log)
    if saved:
        for remark in remarks:
            log.say(remark)
        log.rewind(epoch * len(loader) + step)
    else:
        log.rewind(-1)
        if args.resume:
            log.say(f"--resume auto: no checkpoint in {args.folder} yet, starting from scratch")

    current = os.path.join(args.folder, "current.pth")
    with run.StopSignal() as stop:
        while epoch < args.epochs:
            step = train_one_epoch(method, loader, epoch + 1, step, stop, log, args)
            if step < len(loader):
                save(current, epoch, step, method, args, process)
                log.say_replaced(loader)
                log.say(f"stopped by a signal in epoch {epoch + 1} at step {step}; continue with --resume auto")
                log.close()
                return
            epoch, step = epoch + 1, 0
            save(current, epoch, 0, method, args, process)
            if epoch % args.save_freq == 0 or epoch == args.epochs:
                save(os.path.join(args.folder, f"ckpt_epoch_{epoch}.pth"), epoch, 0, method, args, process)
            if args.knn_every and (epoch % args.knn_every == 0 or epoch == args.epochs):
                evaluate_knn(method, knn, args, log, epoch, epoch * len(loader))
            if stop.asked() and epoch < args.epochs:
                log.say_replaced(loader)
                log.say(f"stopped by a signal after epoch {epoch}; continue with --resume auto")
                log.close()
                return
    log.say_replaced(loader)
    log.say(f"done: {epoch} epochs; {checkpoint.newest(args.folder)}")
    log.close()


def warn(args, n: int, log) -> None:
    """What is allowed and known not to work."""
    if args.moco and args.nce_k >= n:
        log.say(f"warning: the queue (--nce_k {args.nce_k}) is as long as the data set ({n} images): a picture's own "
                "earlier keys are among its negatives; use fewer, --softmax, a higher --nce_t (--preset small)")  # fmt: skip
    elif not args.moco and args.nce_k >= n:
        log.say(f"warning: --nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn again and "
                "again, the picture itself too (--exclude-self); use fewer")  # fmt: skip
    if args.moco and not args.softmax and args.nce_z == "oneshot":
        log.say("warning: MoCo with NCE and the Z of the first batch does not learn (11.6 % published): a fresh network gives "
                "nearly the same feature to every picture, and Z stays at that; use --nce_z ema or --softmax")  # fmt: skip


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
