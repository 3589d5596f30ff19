#!/usr/bin/env python
"""Linear evaluation of a pre-trained backbone: only the last layer is trained, on frozen features.

The protocol of MoCo (He et al., CVPR 2020) with the settings of Ge et al. (NeurIPS 2021, arXiv:2110.14189); the paper's
command, and the same on the built-in data after `moco_non_sem_neg.py --demo`:

    python nonsem_neg/main_lincls.py IMAGENET100 --pretrained ckpts/patch/checkpoint_0199.pth.tar --ckpt_path ckpts/patch-lin \\
        --lr 10 --batch-size 128 --epochs 60 --schedule 30 40 50
    python nonsem_neg/main_lincls.py --demo
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
    checkpoint,
    cli,
    data,
    metrics,
    options,
    probe,
    processes,
    run,
    schedule,
)
from common.precision import Precision
from preprocess import demo

POOLED = 6  # the layer of `backbones.feature` that enters the classifier
PRESETS = {
    "demo": dict(
        data="data/demo", pretrained="runs/try", ckpt_path="runs/try-lincls", workers=2, epochs=20,
        schedule=[12, 16], batch_size=128, lr=5.0, cache_views=1, print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("data", nargs="?", help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    g.add_argument(
        "-a", "--arch", default=None, help="torchvision network; default: what the checkpoint says, or resnet50"
    )
    g.add_argument(
        "--pretrained", default="", metavar="PATH", help="pre-training checkpoint, or a run folder: its newest"
    )

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=100, help="epochs to run in all")
    g.add_argument("--start-epoch", type=cli.count, default=0, help="first epoch, counted from 0 (a resume sets it)")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument(
        "--lr", "--learning-rate", type=cli.positive, default=30.0, help="learning rate; not scaled with the batch"
    )
    g.add_argument("--schedule", type=int, nargs="*", default=[30, 40, 50], help="epochs of a 10x drop")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument(
        "--wd", "--weight-decay", type=cli.not_negative, default=0.0, dest="weight_decay", help="weight decay"
    )
    g.add_argument("--cache-views", type=cli.count, default=0, metavar="N",
                   help="embed N augmented views of every picture once and train on those in turn; 0: fresh views "
                   "at every epoch, as published")  # fmt: skip

    g = parser.add_argument_group("run")
    g.add_argument("--ckpt_path", default="./ckpts/lincls", help="run folder: checkpoints, logs, result.json")
    g.add_argument("--resume", default="", metavar="PATH|auto", help="continue from a checkpoint of this script")
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds checkpoints")
    g.add_argument("-e", "--evaluate", action="store_true", help="only evaluate the classifier that --resume names")
    g.add_argument("-p", "--print-freq", type=cli.positive_int, default=10, help="steps between progress lines")
    g.add_argument(
        "--seed", type=cli.seed, default=None, help="seed of everything random; drawn and recorded if not given"
    )

    g = processes.add_arguments(parser)
    g.add_argument("--amp", action="store_true", help="autocast of the encoder: bfloat16, or float16 on old GPUs")
    args = parser.parse_args(argv)
    if args.demo and "ckpt_path" not in args._typed and not args.resume:
        args.overwrite = True  # of its own folder only
    if args.data is None:
        raise UsageError(
            "no data: give the root of an ImageFolder tree (train/ and val/), or --demo for built-in pictures"
        )
    if not args.pretrained and not args.resume:
        raise UsageError("no backbone: give --pretrained CHECKPOINT (or --resume, to continue a linear evaluation)")
    if args.evaluate and not args.resume:
        raise UsageError("--evaluate needs --resume CHECKPOINT, the trained classifier")
    return args


def read_backbone(args):
    """The checkpoint to evaluate, and what it says about its network. Flags that were typed must agree with it."""
    path = args.resume or args.pretrained
    if args.resume == "auto":
        path = checkpoint.newest(args.ckpt_path, ("checkpoint_robust_*.pth.tar",)) or args.pretrained
        if not path:
            raise UsageError(f"--resume auto: no checkpoint_robust_* in {args.ckpt_path} yet; start with --pretrained")
    if args.demo and not {"pretrained", "resume"} & set(args._typed) and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run nonsem_neg/moco_non_sem_neg.py --demo first")
    if os.path.isdir(path):
        found = checkpoint.newest(path)
        if found is None:
            raise UsageError(f"--pretrained {path}: no checkpoint in this folder; pre-train first"
                             + (" (moco_non_sem_neg.py --demo)" if args.demo else ""))  # fmt: skip
        path = found
    saved = checkpoint.load(path) | {"path": str(path)}
    arch = saved.get("arch", args.arch or "resnet50")
    if args.arch and args.arch != arch:
        raise UserError(f"{path} is of --arch {arch}, not {args.arch}")
    args.arch = arch
    if "input_res" not in args._typed:
        args.input_res = saved.get("args", {}).get("input_res", args.input_res)
    return saved


def build_model(saved, arch: str, num_classes: int, process: processes.Process, resumed: bool) -> nn.Module:
    """The backbone with a fresh (or, resumed, the saved) linear layer; everything else frozen, in eval mode."""
    state = checkpoint.backbone(saved)
    state = state if resumed else checkpoint.without_head(state)
    small_stem = "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3
    if resumed:  # published heads have 1000 outputs whatever the number of classes
        num_classes = max(num_classes, len(state["fc.weight"]))
    model = backbones.build(arch, num_classes, small_stem=small_stem)
    checkpoint.load_into(model, state, saved["path"], () if resumed else ("fc.",))
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    if not resumed:
        nn.init.normal_(model.fc.weight, std=0.01)
        nn.init.zeros_(model.fc.bias)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["fc.weight", "fc.bias"], trained
    return model.eval().to(process.device, memory_format=torch.channels_last)


def check_frozen(model, saved) -> None:
    """Compare every tensor but the classifier with the checkpoint: nothing may have moved, batch-norm included."""
    own = model.state_dict()
    for name, before in checkpoint.without_head(checkpoint.backbone(saved)).items():
        if not torch.equal(own[name].cpu(), before):
            raise UserError(f"{name} changed during linear evaluation: the backbone was not frozen; the result is void")


def make_loader(args, process, dataset, train: bool, cached: bool = False) -> data.Loader:
    """Training: random crop and flip, nothing else. Validation: the whole set once, shorter side resized, centre crop."""
    if train:
        geometry = [augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip()]
    else:
        geometry = [augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res)]
    view = augment.Compose(*geometry, augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    batch, shuffle = args.batch_size // process.world_size, train and not cached
    return options.make_loader(args, process, dataset, (view,), batch, args.seed, shuffle=shuffle, drop_last=False)


@torch.no_grad()
def embed(model, images, precision):
    with precision.autocast():
        return backbones.feature(model, images.contiguous(memory_format=torch.channels_last), POOLED).float()


def train_one_epoch(fc, batches, first_step, steps, optimizer, epoch, stop, log, args):
    """(means, number of steps done): all of them, or fewer where a signal asked to stop."""
    progress = run.Progress(f"Epoch: [{epoch}]", steps, args.print_freq, first_step, log.main and not args.cache_views,
                            extra=f"lr {optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
    step = first_step
    for feats, target in batches:
        logits = fc(feats)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        top1, top5 = metrics.accuracy(logits.detach(), target, (1, 5))
        progress.update(len(target), **{"Loss": loss, "Acc@1": top1, "Acc@5": top5})
        if not args.cache_views and stop.asked():  # an epoch of cached features takes a moment
            break
    return progress.close(), step


def check_backbone(saved, args) -> None:
    """UserError where a classifier is to be continued on another backbone than the one that --pretrained names."""
    path = args.pretrained
    if os.path.isdir(path):
        path = checkpoint.newest(path) or path
    if not os.path.isfile(path) or "best_acc1" in (named := checkpoint.load(path)):
        return
    own = checkpoint.without_head(checkpoint.backbone(saved))
    if checkpoint.fingerprint(own) != checkpoint.fingerprint(checkpoint.without_head(checkpoint.backbone(named))):
        raise UserError(f"{saved['path']} is a classifier on another backbone ({saved.get('pretrained')} as it was then), not "
                        f"on {path}: start over with --overwrite, or choose another --ckpt_path")  # fmt: skip


# flags that must stay the same for a resumed run to be the run that was interrupted
CONTINUES = ("seed", "data", "dataset", "class_list", "input_res", "batch_size", "lr", "schedule", "momentum", "weight_decay",
             "cache_views", "amp")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch-size {args.batch_size} must be a multiple of the {process.world_size} processes")
    run.refuse_to_overwrite(args.ckpt_path, "checkpoint_robust_*.pth.tar", args.resume, args.overwrite)
    demo.ensure_for(args, process)
    saved = read_backbone(args)
    resumed = bool(args.resume) and "best_acc1" in saved
    if args.resume and not resumed and (args.resume != "auto" or args.evaluate):
        raise UserError(f"{saved['path']} is not a checkpoint of this script; pre-trained ones go to --pretrained")
    if resumed and "pretrained" in args._typed:
        check_backbone(saved, args)
    args.seed = run.settle_seed(
        saved["args"]["seed"] if resumed and args.seed is None and "args" in saved else args.seed
    )
    run.seed_all(args.seed)

    classes = saved.get("classes") if resumed else None  # a classifier knows its own; DATA must have the same
    if not args.evaluate or classes is None:
        train_set = options.open_split(args, "train", classes=classes)
        classes = train_set.classes
    val_set = options.open_split(args, "val", classes=classes)
    model = build_model(saved, args.arch, len(classes), process, resumed)
    precision = Precision(args.amp, process.device)
    shared = checkpoint.newest(args.ckpt_path) is not None  # as published, with a pre-training, whose records stay
    suffix = "-evaluate" if args.evaluate else "-lincls" if shared else ""
    log = run.Run(args.ckpt_path, args, process, suffix=suffix)
    val_loader = make_loader(args, process, val_set, train=False)

    def embedder(images):
        return embed(model, images, precision)

    if args.evaluate:
        top1, top5, _ = probe.validate(model.fc, probe.embedded(embedder, val_loader))
        log.say_replaced(val_loader)
        log.result(evaluated=saved["path"], data=args.data, split="val", acc1=top1, acc5=top5)
        return
    train_loader = make_loader(args, process, train_set, train=True, cached=args.cache_views > 0)
    pretrained_epoch = saved.get("pretrained_epoch", saved.get("epoch", 0)) if resumed else saved.get("epoch", 0)
    log.derived(train_images=len(train_set), val_images=len(val_set), classes=len(classes), lr=args.lr,
                backbone=saved["path"], pretrained_epochs=pretrained_epoch, precision=str(precision),
                data_device=train_loader.mode)  # fmt: skip

    fc = model.fc
    if process.world_size > 1:
        fc = nn.parallel.DistributedDataParallel(fc)
    optimizer = torch.optim.SGD(model.fc.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    epoch, step, best, best_epoch, top1, top5 = args.start_epoch, 0, -1.0, 0, float("nan"), float("nan")
    if resumed:
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:  # what was typed now counts, not what was typed then
            group.update(momentum=args.momentum, weight_decay=args.weight_decay)
        for remark in run.unlike(args, saved.get("args", {}), CONTINUES):
            log.say(remark)
        epoch, step = saved["epoch"], saved.get("step", 0)
        best, best_epoch = float(saved["best_acc1"]), saved.get("best_epoch", 0)
        top1, top5 = float(saved.get("acc1", "nan")), float(saved.get("acc5", "nan"))
        log.say(f"resumed {saved['path']}: epoch {epoch}, step {step}, best Acc@1 {best:.2f}")
        log.rewind(epoch)
    else:
        log.rewind(-1)
    cache, val_cache = None, None
    if args.cache_views:
        val_cache = list(probe.embedded(embedder, val_loader))  # no random augmentation: embedded once for all epochs
        cache = probe.ViewCache(embedder, train_loader, args.cache_views, args.print_freq, log.main)

    # the published file names carry the number of the pre-training checkpoint: checkpoint_0199 -> checkpoint_robust_0199
    number = f"{max(0, pretrained_epoch - 1):04d}"

    def save(*names):
        state = {
            "epoch": epoch, "arch": args.arch, "optimizer": optimizer.state_dict(), "best_acc1": best,
            "state_dict": checkpoint.add_prefix(model.state_dict(), "module."), "step": step,
            "best_epoch": best_epoch, "acc1": top1, "acc5": top5, "classes": classes,
            "pretrained_epoch": pretrained_epoch, "pretrained": saved.get("pretrained", saved["path"]),
            "pretrained_args": saved.get("pretrained_args", saved.get("args")) if resumed else saved.get("args"),
            "args": cli.flags(args),
        }  # fmt: skip
        for name in names if process.is_main else ():
            checkpoint.save(os.path.join(args.ckpt_path, f"{name}_{number}.pth.tar"), state)

    per_process = args.batch_size // process.world_size
    first = epoch
    with run.StopSignal() as stop:
        while epoch < args.epochs:
            schedule.set_lr(optimizer, schedule.step(args.lr, epoch, args.schedule))
            if cache:
                batches, steps, step = cache.batches(epoch, per_process, args.seed), cache.steps(per_process), 0
            else:
                train_loader.set_epoch(epoch, step)
                batches, steps = probe.embedded(embedder, train_loader), len(train_loader)
            means, step = train_one_epoch(fc, batches, step, steps, optimizer, epoch, stop, log, args)
            if step < steps:
                save("checkpoint_robust")
                log.say_replaced(train_loader)
                log.say(f"stopped by a signal in epoch {epoch} at step {step}; continue with --resume auto")
                log.close()
                return
            top1, top5, _ = probe.validate(model.fc, val_cache or probe.embedded(embedder, val_loader))
            if epoch == first:
                check_frozen(model, saved)
            epoch, step = epoch + 1, 0
            is_best = top1 > best
            if is_best:
                best, best_epoch = top1, epoch
            log.say(
                f" * epoch {epoch - 1}: val Acc@1 {top1:.3f} Acc@5 {top5:.3f} (best {best:.3f} at {best_epoch - 1})"
            )
            log.log(epoch, epoch=epoch - 1, loss=means.get("Loss"), train_acc1=means.get("Acc@1"), val_acc1=top1,
                    val_acc5=top5)  # fmt: skip
            save("checkpoint_robust", *["model_best"] * is_best)
            if stop.asked() and epoch < args.epochs:
                log.say_replaced(train_loader)
                log.say(f"stopped by a signal after epoch {epoch - 1}; continue with --resume auto")
                log.close()
                return
    log.say_replaced(train_loader)
    log.say_replaced(val_loader)
    if first == epoch:
        log.say(f"nothing to train: {saved['path']} has {epoch} epochs already")
    log.result(pretrained=saved.get("pretrained", saved["path"]), data=args.data, split="val", epochs=epoch, acc1=top1,
               acc5=top5, acc1_best=best, best_epoch=best_epoch - 1, precision=str(precision), seed=args.seed)  # fmt: skip
    log.close()


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
