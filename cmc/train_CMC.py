#!/usr/bin/env python
"""Contrastive Multiview Coding: pre-training.

Yonglong Tian, Dilip Krishnan, Phillip Isola. ECCV 2020, arXiv:1906.05849. Lightness is contrasted with colour (--view), or
any number of views with each other (--views). A minute on a laptop, and a run like those published:

    python cmc/train_CMC.py --demo --epochs 1
    python cmc/train_CMC.py --data_folder IMAGENET100 --dataset imagenet100 --model resnet50v1 \\
        --view YCbCr --softmax --nce_k 4096
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn

from cmc import colour
from cmc.contrast import LONG_AGO, MemoryBanks
from cmc.networks import MODELS, build_network, view_keys
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
from preprocess import demo

PRESETS = {
    # 50,000 small pictures (CIFAR): the published settings compare with a third of the data set at every step
    "small": dict(
        model="resnet18v1", dataset="folder", input_res=32, small_stem=True, softmax=True, nce_k=4096, nce_t=0.1,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18v1", input_res=32, epochs=12, batch_size=64,
        learning_rate=0.03, lr_decay_epochs="8,10", nce_k=512, nce_t=0.1, workers=2,
        save_freq=100, model_path="runs/try-cmc", seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", default=None, help="data set root with train/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet", "imagenet100", "folder"), default="imagenet", workers=18)
    g.add_argument("--crop_low", type=cli.share, default=None, help="least share of the picture that a crop covers; "
                   "default .2, with --dataset imagenet and a ResNet .08")  # fmt: skip

    g = parser.add_argument_group("model")
    g.add_argument("--model", choices=list(MODELS), default="alexnet",
                   help="network of each view; v1, v2, v3: stages of half, once, twice the width")  # fmt: skip
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, default="Lab",
                   help="colour space; its lightness is one view, the other two channels the other")  # fmt: skip
    g.add_argument("--views", default=None, metavar="VIEW,VIEW,...", help="views made of other channels, or more than two: "
                   "every pair is contrasted; such as L,a,b or L,ab,YCbCr:CbCr")  # fmt: skip
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    g.add_argument("--nce_k", type=cli.positive_int, default=16384, help="negatives per anchor")
    g.add_argument("--nce_t", type=cli.positive, default=None, help="temperature; default .07, with --dataset stl10 .1")
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help="momentum of a memory row")
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help="NCE: the normaliser Z follows a moving "
                   "average (its decay rises to .99), or stays that of the first batch, as first published")  # fmt: skip
    g.add_argument("--exclude-self", action="store_true", help="never draw a picture as its own negative")
    g.add_argument("--bn-splits", type=cli.positive_int, default=1,
                   help="batch-norm groups over all processes, as on that many GPUs")  # fmt: skip

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=240, help="epochs to run in all, counted from 1")
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=128, help="global batch over all processes")
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=0.03, help="not scaled with the batch")
    g.add_argument("--lr_decay_epochs", default="120,160,200", help="complete epochs after which the rate drops")
    g.add_argument("--lr_decay_rate", type=cli.positive, default=0.1, help="factor of each drop")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-4, help="weight decay")

    g = parser.add_argument_group("run")
    g.add_argument("--model_path", default="./runs/cmc", help="the run gets a folder of its own in here")
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
    g.add_argument("--compile", action="store_true", help="torch.compile the encoder")
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
    args._views = colour.default_views(args.view)
    if args.views is not None:
        typed = colour.parse_views(args.views, args.view)
        args.views = None if typed == args._views else ",".join(view.name for view in typed)
        args._views = typed
    if args.crop_low is None:  # published: .08 for a ResNet on ImageNet whatever was typed
        args.crop_low = 0.08 if args.dataset == "imagenet" and args.model != "alexnet" else 0.2
    if args.nce_t is None:
        args.nce_t = 0.1 if args.dataset == "stl10" else 0.07
    if args.model == "alexnet":
        if args.bn_splits > 1:
            raise UsageError(f"--bn-splits {args.bn_splits}: AlexNet's fully connected layers cannot be split")
        with torch.device("meta"):  # no numbers, only shapes: says if the pictures are too small
            network = build_network(args.model, args._views, args.feat_dim, args.small_stem)
        backbones.feature_shape(network, (sum(network.channels), args.input_res, args.input_res), layer=1)
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
    loss = "softmax" if args.softmax else "nce" if args.nce_z == "ema" else "nce_oneshot"
    views = f"_views_{'-'.join(view_keys(args._views))}" if args.views else ""
    return (f"memory_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}_decay_{args.weight_decay}"
            f"_bsz_{args.batch_size}{f'_amp_{args.opt_level}' * args.amp}_view_{args.view}{views}")  # fmt: skip


def bank_names(views: list[colour.View]) -> list[str]:
    """What the views are called in `memory_VIEW`, `VIEW_loss`: of two views l and ab, as published for all spaces."""
    return ["l", "ab"] if len(views) == 2 else view_keys(views)


def recipe(args) -> augment.Compose:
    """The augmentation: crop and flip; then the channels of all views. There is no jitter, greyscale or blur."""
    return augment.Compose(augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0)),
                           augment.RandomHorizontalFlip(), colour.Views(args._views))  # fmt: skip


def build_loader(args, process: processes.Process, per_process: int) -> data.Loader:
    return options.make_loader(args, process, options.open_pretraining(args), (recipe(args),), per_process, args.seed)


class CMC:
    """A network and a memory bank for every view. A step compares each view's feature with bank rows of the other views of
    this picture and of drawn ones, then writes it to its own bank."""

    def __init__(self, args, n: int, process: processes.Process):
        self.encoder, self.optimizer, self.precision = build_encoder(args, process)
        self.wrapped = parallel(self.encoder, process)
        self.memory = MemoryBanks(n, args.feat_dim, bank_names(args._views), args.nce_k, args.nce_t, args.nce_m,
                                  args.softmax, args.nce_z).to(process.device)  # fmt: skip
        self.exclude_self = args.exclude_self
        self.draws = torch.Generator(process.device).manual_seed(args.seed)  # negatives; the same on every rank

    def step(self, views, index):
        (images,) = (v.contiguous(memory_format=torch.channels_last) for v in views)
        with self.precision.autocast():
            feats = self.wrapped(images)
        feats = [F.normalize(feat.float(), dim=1) for feat in feats]  # V times N x D
        rows = memory.draw_rows(index, self.memory.n, self.memory.k, self.draws, self.exclude_self)  # N x (1 + K)
        losses, out = self.memory(feats, rows)  # of every view; of every pair, N x (1 + K)
        self.precision.step(losses.sum(), self.optimizer)
        everyone = processes.all_gather(torch.cat(feats, 1)).chunk(len(feats), 1)
        self.memory.update(everyone, processes.all_gather(index))
        return losses.detach(), [o.detach() for o in out]


PREFIX = "encoder.module."  # of the networks' parameter names in the published files


def build_encoder(args, process: processes.Process):
    """(network, optimizer, precision); with apex they are its own."""
    network = build_network(args.model, args._views, args.feat_dim, args.small_stem)
    splits = max(1, args.bn_splits // process.world_size)
    batchnorm.split_batchnorm(network, splits)
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
    lr = learning_rate(args, epoch)
    schedule.set_lr(method.optimizer, lr)
    step = first_step
    for views, _, index in loader:
        losses, out = method.step(views, index)
        step += 1
        values = dict(Loss=losses.sum(), **by_view(losses, out, args), **softmax_probability(out, args))
        shown = progress.update(len(index), **values)
        if shown:
            z = {} if args.softmax else {"z_over_n": method.memory.normaliser.mean() / method.memory.n}
            log.log(done_before + step, epoch=epoch, **curves(shown),
                    **({"positive_prob": shown["Softmax"]} if args.softmax else z),
                    learning_rate=lr, seconds_per_step=shown["seconds"],
                    view_share=loader.view_seconds / max(progress.elapsed, 1e-9),
                    wait_share=loader.wait_seconds / max(progress.elapsed, 1e-9))  # fmt: skip
        if stop.asked():
            break
    means = progress.close()
    if step == len(loader):
        log.log(done_before + step, epoch=epoch, **{f"epoch_{k}": v for k, v in curves(means).items()})
    log.say(f"Epoch {epoch}: loss {means.get('Loss', float('nan')):.4f}, "
            + "".join(f"{k} {v:.4g}, " for k, v in curves(means).items()) +
            f"lr {lr:.2g}, {means['images_per_second']:.0f} images/s, {run.clock(means['elapsed'])}")  # fmt: skip
    return step


def by_view(losses, out, args) -> dict:
    """The published curves of each view: its loss, and "prob", the mean of column 0 (with InfoNCE that is a logit)."""
    names, others = bank_names(args._views), len(losses) - 1
    probs = torch.stack([o[:, 0].mean() for o in out]).view(-1, others).mean(1)
    return {f"{name}_{what}": v for name, *pair in zip(names, losses, probs) for what, v in zip(("loss", "prob"), pair)}


def curves(values: dict) -> dict:
    """What of the means over some steps is drawn for every view."""
    return {k: v for k, v in values.items() if k.endswith(("_loss", "_prob"))}


def softmax_probability(out, args) -> dict:
    """With InfoNCE the probability of the positive itself, over all pairs of views."""
    if not args.softmax:
        return {}
    return {"Softmax": torch.stack([(o[:, 0] - o.logsumexp(1)).exp().mean() for o in out]).mean()}


def learning_rate(args, epoch: int) -> float:
    """Epochs count from 1; the first one after 120 complete ones is the first to drop."""
    return schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)


def knn_loaders(args, process: processes.Process, train_set):
    """Of the k-NN evaluation: pictures as they are, without random augmentation."""
    geometry = augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res)
    view = augment.Compose(geometry, colour.Views(args._views))
    return probe.knn_loaders(args, process, train_set, view)


def evaluate_knn(method, loaders, args, log, epoch, step):
    """Weighted k-NN on what enters the heads, of all views side by side."""
    layer = 7 if args.model == "alexnet" else 6

    def feature(images):
        with method.precision.autocast():
            views = backbones.feature(method.encoder, images.contiguous(memory_format=torch.channels_last), layer)
        return torch.cat(views, 1)

    probe.evaluate_knn(method.encoder, feature, loaders, args.knn_k, log, epoch, step)


def save(path, epoch, step, method, args, process):
    """The authors' keys (opt, model, contrast, optimizer, epoch), and what an exact resume needs besides."""
    states = processes.gather_objects(dict(draws=method.draws.get_state(), torch=torch.get_rng_state()))
    if process.is_main:
        checkpoint.save(path, {
            "opt": cli.flags(args), "epoch": epoch, "optimizer": method.optimizer.state_dict(),
            "model": checkpoint.add_prefix(method.encoder.state_dict(), PREFIX), "contrast": method.memory.state_dict(),
            "step": step, "scaler": method.precision.scaler.state_dict(), "generators": states,
            "z_updates": method.memory.updates,
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
    if not any(key.startswith("memory_") for key in saved["contrast"]):
        raise UserError(f"{path} is of another method (its memory holds {', '.join(saved['contrast'])})")
    then = saved.get("opt", {})
    for key in ("model", "view", "views"):
        if then.get(key, getattr(args, key)) != getattr(args, key):
            was, now = (value or "the default" for value in (then[key], getattr(args, key)))
            raise UserError(f"{path} is of --{key} {was}, this run of {now}")
    if "memory_" + bank_names(args._views)[0] not in saved["contrast"]:
        raise UserError(f"{path} is of other views (its memory holds {', '.join(saved['contrast'])})")
    if args.seed is None:
        args.seed = then.get("seed")
    return saved


def restore(saved, method, args, process) -> tuple[int, int, list[str]]:
    """Put back what `save` wrote, or a published checkpoint has: (complete epochs, steps done of the next, remarks)."""
    path = saved["path"]
    checkpoint.load_into(method.encoder, checkpoint.strip_prefix(saved["model"], PREFIX), path)
    rows, k = len(saved["contrast"]["memory_" + method.memory.views[0]]), int(saved["contrast"]["params"][0])
    if (k, rows) != (args.nce_k, method.memory.n):
        was, now = (f"--nce_k {k} and {rows} training pictures", f"{args.nce_k} and {method.memory.n}")
        raise UserError(f"{path} was made with {was}, this run has {now}")
    settings = method.memory.params.clone()
    checkpoint.load_into(method.memory, saved["contrast"], path)
    settings[2:-1] = method.memory.normaliser  # Z goes on; K, T and the momentum are what was typed now
    method.memory.params.copy_(settings)
    method.memory.updates = saved.get("z_updates", LONG_AGO)
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
             "weight_decay", "softmax", "nce_t", "nce_m", "nce_z", "exclude_self", "crop_low", "input_res", "amp",
             "bn_splits")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of the {process.world_size} processes")
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
    method = CMC(args, n, process)

    epoch, step, remarks = restore(saved, method, args, process) if saved else (0, 0, [])

    events = os.path.join(args.tb_path, run_name(args)) if args.tb_path else True
    log = run.Run(args.folder, args, process, tensorboard=events)
    log.say("view     " + repr(loader.views[0]).replace("\n", "\n         "))
    for note in loader.dataset.notes:
        log.say(f"note: {note}")
    log.derived(views=", ".join(view.name for view in args._views), loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}",
                images=n, classes=len(loader.dataset.classes), steps_per_epoch=len(loader), crop_low=args.crop_low,
                nce_t=args.nce_t, batch_per_process=per_process, bn_groups=splits * process.world_size,
                precision=str(method.precision), data_device=loader.mode)  # fmt: skip
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
    if args.nce_k >= n:
        log.say(f"warning: --nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn again and "
                "again, the picture itself too (--exclude-self); use fewer (--preset small)")  # fmt: skip


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
