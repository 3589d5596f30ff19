#!/usr/bin/env python
"""MoCo with non-semantic negatives: pre-training.

Robust Contrastive Learning Using Negative Samples with Diminished Semantics
Songwei Ge, Shlok Mishra, Chun-Liang Li, Haohan Wang, David Jacobs. NeurIPS 2021, arXiv:2110.14189.

A minute on a laptop, and the paper's run (one process per GPU; leave the last line away for a single one):

    python nonsem_neg/moco_non_sem_neg.py --demo --epochs 1
    python nonsem_neg/moco_non_sem_neg.py --preset table1 --ckpt_path ckpts/patch IMAGENET100 \\
        --multiprocessing-distributed --world-size 1 --rank 0
"""

import argparse
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
from nonsem_neg.moco import MoCo
from nonsem_neg.negatives import check_patch_range, patch_negatives

PAPER = dict(
    arch="resnet50", epochs=200, mlp=True, moco_t=0.2, aug_plus=True, cos=True, num_nonsem=1, alpha=2.0,
    patch_ratio=[16, 72],
)  # fmt: skip
from preprocess import demo

PRESETS = {
    # README table of October 2021, first six rows
    "table1": dict(PAPER, lr=0.03, batch_size=128, moco_m=0.999, moco_k=16384),
    # the commands since December 2021: the recipe of Robinson et al. (IFM); last three rows
    "ifm": dict(PAPER, lr=0.8, batch_size=512, moco_m=0.99, moco_k=65536),
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
    g.add_argument("data", nargs="?", help="data set root with train/CLASS/*; the texture tree for --robust texture")
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    g.add_argument("-a", "--arch", default="resnet50", help="torchvision ResNet")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, no max-pool: for small pictures")
    g.add_argument("--moco-dim", type=cli.positive_int, default=128, help="feature dimension")
    g.add_argument("--moco-k", type=cli.positive_int, default=65536, help="queue length: number of negative keys")
    g.add_argument("--moco-m", type=cli.fraction, default=0.999, help="momentum of the key encoder")
    g.add_argument("--moco-t", type=cli.positive, default=0.07, help="softmax temperature")
    g.add_argument("--mlp", action=cli.OnOff, default=False, help="two-layer projection head (MoCo-v2)")
    g.add_argument("--bn-splits", type=cli.positive_int, default=8,
                   help="batch-norm groups over all processes, as on that many GPUs; keys are shuffled over them")  # fmt: skip

    g = parser.add_argument_group("method: non-semantic negatives")
    g.add_argument("--robust", choices=["patch", "texture", "none"], default="patch", type=robust_name,
                   help="kind of non-semantic negative; none: plain MoCo")  # fmt: skip
    g.add_argument("--num-nonsem", type=cli.count, default=1, help="non-semantic negatives per image (0: plain MoCo)")
    g.add_argument("--alpha", type=float, default=1.0, help="factor of their similarity, inside the exponent")
    g.add_argument("--patch-ratio", "--patch-range", type=int, nargs=2, metavar=("MIN", "MAX"), default=None,
                   help="patch side in pixels, both ends drawn; default 16 56 of 224, else in proportion")  # fmt: skip
    g.add_argument(
        "--patch-inclusive", action="store_true", help="also draw the last offset, which the paper's code never does"
    )
    g.add_argument("--patch-size", type=int, default=None, help=argparse.SUPPRESS)  # published, and dead there too
    g.add_argument("--patch-turn", action="store_true", help="mirror and rotate every patch by chance")
    g.add_argument("--nonsem-bn", choices=["train", "eval"], default="train",
                   help="key batch-norm of non-semantic images: batch statistics, as published, or running ones")  # fmt: skip
    g.add_argument("--texture-root", default=None,
                   help="tree of textures, paired by path; default: DATA, its originals at DATA without -texture")  # fmt: skip

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=200, help="epochs to run in all")
    g.add_argument("--start-epoch", type=cli.count, default=0, help="first epoch, counted from 0 (a resume sets it)")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument(
        "--lr", "--learning-rate", type=cli.positive, default=0.03, help="learning rate; not scaled with the batch"
    )
    g.add_argument("--schedule", type=int, nargs="*", default=[120, 160], help="epochs of a 10x drop (without --cos)")
    g.add_argument("--cos", action=cli.OnOff, default=False, help="cosine schedule, per epoch, without warm-up")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument(
        "--wd", "--weight-decay", type=cli.not_negative, default=1e-4, dest="weight_decay", help="weight decay"
    )
    g.add_argument("--aug-plus", action=cli.OnOff, default=False, help="MoCo-v2 augmentation (with blur) instead of v1")

    g = parser.add_argument_group("run")
    g.add_argument("--ckpt_path", default="./ckpts/moco", help="run folder: checkpoints, logs, TensorBoard events")
    g.add_argument("--save-freq", type=cli.positive_int, default=10, help="epochs between numbered checkpoints")
    g.add_argument(
        "--resume", default="", metavar="PATH|auto", help="continue from a checkpoint, or the newest in --ckpt_path"
    )
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds checkpoints")
    g.add_argument("-p", "--print-freq", type=cli.positive_int, default=10, help="steps between progress lines")
    g.add_argument(
        "--seed", type=cli.seed, default=None, help="seed of everything random; drawn and recorded if not given"
    )
    g.add_argument(
        "--knn-every", type=cli.count, default=0, help="epochs between k-NN evaluations of the backbone; 0: never"
    )
    g.add_argument("--knn-k", type=cli.positive_int, default=200, help="neighbours in that evaluation")

    g = processes.add_arguments(parser)
    g.add_argument("--amp", action="store_true", help="autocast of the encoder: bfloat16, or float16 on old GPUs")
    g.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    args = parser.parse_args(argv)

    if args.patch_size is not None and "patch_size" in args._typed:
        print("note: --patch-size never had an effect, the side comes from --patch-ratio", file=sys.stderr)
    if args.demo and "ckpt_path" not in args._typed and not args.resume:
        args.overwrite = True  # of its own folder only
    if args.data is None:
        raise UsageError(
            "no data: give the root of an ImageFolder tree (train/CLASS/*), or --demo for built-in pictures"
        )
    if args.patch_ratio is None:
        args.patch_ratio = [max(1, round(side * args.input_res / 224)) for side in (16, 72 if args.demo else 56)]
    if args.demo and args.robust == "texture" and not args.texture_root and "-texture" not in args.data:
        args.texture_root = args.data + "-texture"
    if args.robust == "none":
        args.num_nonsem = 0
    if args.robust == "texture" and args.num_nonsem > 1:
        raise UsageError(f"--num-nonsem {args.num_nonsem}: there is one texture per picture, at most 1")
    if args.robust == "texture" and not args.texture_root:  # DATA is the texture tree, as published
        args.texture_root, args.data = args.data, str(data.original_root_of(args.data))
    if args.robust == "patch" and args.num_nonsem:
        try:
            check_patch_range(*args.patch_ratio, args.input_res, args.patch_inclusive)
        except ValueError as error:
            raise UsageError(f"--patch-ratio with --input-res {args.input_res}: {error}") from None
    if args.moco_k % args.batch_size:
        raise UsageError(f"--moco-k {args.moco_k} must be a multiple of the global batch {args.batch_size}")
    return args


def recipe(args) -> augment.Compose:
    """The augmentation of one view. Negatives are made from it afterwards and so share all of it."""
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0)), augment.RandomHorizontalFlip()
    normalize = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    if args.aug_plus:  # MoCo-v2
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
        blur = augment.GaussianBlur((0.1, 2.0), p=0.5)
        return augment.Compose(crop, jitter, augment.RandomGrayscale(0.2), blur, flip, normalize)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, normalize)


def build_loader(args, process: processes.Process, per_process: int) -> data.Loader:
    view, texture_set = recipe(args), None
    if args.robust == "texture" and args.num_nonsem:
        train_set, texture_set = open_texture_pairs(args)
    else:
        train_set = options.open_pretraining(args)
    return options.make_loader(args, process, train_set, (view, view), per_process, args.seed, partner=texture_set)


def open_texture_pairs(args):
    """(originals, textures), row by row the same picture; what has no partner is listed in the run folder."""
    texture_set = data.open_set(args.texture_root, "train", class_list=args.class_list)
    listing = os.path.join(run.make_folder(args.ckpt_path), "unmatched.txt") if processes.rank() == 0 else None
    return data.pair_by_path(texture_set, os.path.join(args.data, "train"), unmatched_listing=listing)


def build_model(args, process: processes.Process) -> MoCo:
    def encoder(dim: int) -> nn.Module:
        network = backbones.build(args.arch, dim, small_stem=args.small_stem)
        if not isinstance(getattr(network, "fc", None), nn.Linear):
            raise UsageError(f"--arch {args.arch}: needs a network whose last layer is `fc`, such as a ResNet")
        return network

    model = MoCo(
        encoder, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp, args.alpha,
        bn_splits=max(1, args.bn_splits // process.world_size), nonsem_bn=args.nonsem_bn,
    )  # fmt: skip
    return model.to(process.device, memory_format=torch.channels_last)


def train_one_epoch(model, wrapped, loader, optimizer, precision, generator, epoch, first_step, stop, log, args):
    """Returns the number of steps done: all of them, or fewer where a signal asked to stop."""
    progress = run.Progress(f"Epoch: [{epoch}]", len(loader), args.print_freq, first_step, log.main,
                            extra=f"lr {optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
    loader.set_epoch(epoch, first_step)
    loader.view_seconds = loader.wait_seconds = 0.0
    step = first_step
    for views, _, _ in loader:
        im_q, im_k, *texture = (v.contiguous(memory_format=torch.channels_last) for v in views)
        im_t = None
        if texture:
            im_t = texture[0].unsqueeze(1)
        elif args.num_nonsem:  # from the query view itself, so with its crop, colours, blur and flip
            im_t = patch_negatives(
                im_q, args.num_nonsem, args.patch_ratio, generator, rank=processes.rank(), world_size=processes.world_size(),
                inclusive=args.patch_inclusive, turn=args.patch_turn)  # fmt: skip

        logits, keys = wrapped(im_q, im_k, im_t, generator)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = F.cross_entropy(logits, labels)

        precision.step(loss, optimizer)
        model.enqueue(keys)

        step += 1
        top1, top5 = metrics.accuracy(logits.detach(), labels, (1, 5))
        shown = progress.update(len(logits), **{"Loss": loss, "Acc@1": top1, "Acc@5": top5})
        if shown:
            log.log(epoch * len(loader) + step, epoch=epoch, loss=shown["Loss"], contrast_acc1=shown["Acc@1"],
                    contrast_acc5=shown["Acc@5"], lr=optimizer.param_groups[0]["lr"], seconds_per_step=shown["seconds"],
                    view_share=loader.view_seconds / max(progress.elapsed, 1e-9),
                    wait_share=loader.wait_seconds / max(progress.elapsed, 1e-9))  # fmt: skip
        if stop.asked():
            break
    means = progress.close()
    log.say(f"Epoch {epoch}: loss {means.get('Loss', float('nan')):.4f}, {1 + args.moco_k + args.num_nonsem}-way contrast "
            f"Acc@1 {means.get('Acc@1', float('nan')):.2f}, {means['images_per_second']:.0f} images/s, "
            f"{run.clock(means['elapsed'])}")  # fmt: skip
    return step


def knn_loaders(args, process: processes.Process, train_set):
    """Of the k-NN evaluation: pictures as they are, without random augmentation."""
    geometry = augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res)
    view = augment.Compose(geometry, augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    return probe.knn_loaders(args, process, train_set, view)


def evaluate_knn(model, loaders, args, log, epoch, step):
    """Weighted k-NN on the pooled backbone feature."""

    def feature(images):
        with model.autocast():
            return backbones.feature(model.encoder_q, images.contiguous(memory_format=torch.channels_last), 6)

    probe.evaluate_knn(model, feature, loaders, args.knn_k, log, epoch, step)


def save(path, epoch, step, model, optimizer, precision, generator, args, process):
    """The authors' keys (epoch, arch, state_dict, optimizer), and what an exact resume needs besides."""
    states = processes.gather_objects(dict(generator=generator.get_state(), torch=torch.get_rng_state()))
    if process.is_main:
        checkpoint.save(path, {
            "epoch": epoch, "arch": args.arch, "optimizer": optimizer.state_dict(),
            "state_dict": checkpoint.add_prefix(model.state_dict(), "module."),
            "step": step, "scaler": precision.scaler.state_dict(), "generators": states, "args": cli.flags(args),
        })  # fmt: skip
    processes.barrier()


def open_resume(args) -> dict | None:
    """Read the checkpoint that --resume names (None: start from scratch) and take over its seed."""
    path = args.resume
    if path == "auto":
        path = checkpoint.newest(args.ckpt_path)
    if not path:
        return None
    saved = checkpoint.load(path) | {"path": str(path)}
    if saved.get("arch", args.arch) != args.arch:
        raise UserError(f"{path} is of --arch {saved['arch']}, this run of {args.arch}")
    for key in ("state_dict", "optimizer", "epoch"):
        if key not in saved:
            raise UserError(f"{path} has no {key}: not a pre-training checkpoint of this script")
    if args.seed is None:
        args.seed = saved.get("args", {}).get("seed")
    return saved


def restore(saved, args, model, optimizer, precision, generator, process) -> tuple[int, int, list[str]]:
    """Put back what `save` wrote, or a published checkpoint has: (complete epochs, steps done of the next, remarks)."""
    checkpoint.load_into(model, checkpoint.strip_prefix(saved["state_dict"]), saved["path"])
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:  # what was typed now counts, not what was typed then
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    remarks = run.unlike(args, saved.get("args", {}), CONTINUES)
    if "generators" in saved:
        states = saved["generators"]
        if len(states) != process.world_size:
            remarks.append(f"note: {process.world_size} processes go on where there were {len(states)}: other draws")
        mine = states[process.rank % len(states)]
        generator.set_state(mine["generator"])
        torch.set_rng_state(mine["torch"])
        precision.scaler.load_state_dict(saved["scaler"])
    remarks.append(f"resumed {saved['path']}: epoch {saved['epoch']}, step {saved.get('step', 0)}")
    return saved["epoch"], saved.get("step", 0), remarks


# flags that must stay the same for a resumed run to be the run that was interrupted
CONTINUES = ("seed", "data", "dataset", "batch_size", "epochs", "lr", "schedule", "momentum", "weight_decay", "robust",
             "num_nonsem", "alpha", "patch_ratio", "patch_inclusive", "patch_turn", "nonsem_bn", "input_res", "amp",
             "bn_splits", "aug_plus", "cos", "mlp", "moco_m", "moco_t")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch-size {args.batch_size} must be a multiple of the {process.world_size} processes")
    per_process = args.batch_size // process.world_size
    splits = max(1, args.bn_splits // process.world_size)
    if per_process % splits:
        raise UsageError(f"--bn-splits: {per_process} images per process cannot be cut into {splits} equal groups")
    run.refuse_to_overwrite(args.ckpt_path, "checkpoint_*.pth.tar", args.resume, args.overwrite)
    demo.ensure_for(args, process, texture=args.robust == "texture")
    saved = open_resume(args)
    args.seed = run.settle_seed(args.seed)
    run.seed_all(args.seed)  # the same on every rank: equal weights; per-rank draws are the loader's
    generator = torch.Generator().manual_seed(args.seed)  # patches and batch shuffles
    loader = build_loader(args, process, per_process)

    knn = knn_loaders(args, process, loader.dataset) if args.knn_every else None
    model = build_model(args, process)
    precision = Precision(args.amp, process.device)
    model.autocast = precision.autocast
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    wrapped = model
    if process.world_size > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=[process.device] if process.device.type == "cuda" else None, broadcast_buffers=False)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
                                fused=True)  # fmt: skip

    epoch, step, remarks = args.start_epoch, 0, []
    if saved:
        epoch, step, remarks = restore(saved, args, model, optimizer, precision, generator, process)

    log = run.Run(args.ckpt_path, args, process)
    log.say("view     " + repr(loader.views[0]).replace("\n", "\n         "))
    for note in loader.dataset.notes:
        log.say(f"note: {note}")
    log.derived(images=len(loader.dataset), classes=len(loader.dataset.classes), steps_per_epoch=len(loader), lr=args.lr,
                batch_per_process=per_process, bn_groups=splits * process.world_size, precision=str(precision),
                data_device=loader.mode, **({"patch_side": args.patch_ratio} if args.robust == "patch" else {}))  # fmt: skip
    if args.moco_k >= len(loader.dataset):
        log.say(f"warning: the queue (--moco-k {args.moco_k}) is as long as the data set ({len(loader.dataset)} images): "
                "a picture's own earlier key is among its negatives")  # fmt: skip
    if saved:
        for remark in remarks:
            log.say(remark)
        log.rewind(epoch * len(loader) + step)
    else:
        log.rewind(-1)
        if args.resume:
            log.say(f"--resume auto: no checkpoint in {args.ckpt_path} yet, starting from scratch")

    last = os.path.join(args.ckpt_path, "checkpoint_last.pth.tar")
    state = model, optimizer, precision, generator, args, process
    with run.StopSignal() as stop:
        model.train()
        while epoch < args.epochs:
            lr = (schedule.cosine(args.lr, epoch, args.epochs) if args.cos
                  else schedule.step(args.lr, epoch, args.schedule))  # fmt: skip
            schedule.set_lr(optimizer, lr)
            step = train_one_epoch(
                model, wrapped, loader, optimizer, precision, generator, epoch, step, stop, log, args
            )
            if step < len(loader):
                save(last, epoch, step, *state)
                log.say_replaced(loader)
                log.say(f"stopped by a signal in epoch {epoch} at step {step}; continue with --resume auto")
                log.close()
                return
            epoch, step = epoch + 1, 0
            save(last, epoch, 0, *state)
            if epoch % args.save_freq == 0 or epoch == args.epochs:
                save(os.path.join(args.ckpt_path, f"checkpoint_{epoch - 1:04d}.pth.tar"), epoch, 0, *state)
            if args.knn_every and (epoch % args.knn_every == 0 or epoch == args.epochs):
                evaluate_knn(model, knn, args, log, epoch - 1, epoch * len(loader))
            if stop.asked() and epoch < args.epochs:
                log.say_replaced(loader)
                log.say(f"stopped by a signal after epoch {epoch - 1}; continue with --resume auto")
                log.close()
                return
    log.say_replaced(loader)
    log.say(f"done: {epoch} epochs; {checkpoint.newest(args.ckpt_path)}")
    log.close()


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
