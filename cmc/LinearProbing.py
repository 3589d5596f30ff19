#!/usr/bin/env python
"""Linear evaluation of the networks pre-trained by CMC: a classifier on one frozen layer of all views.

The protocol published with Contrastive Multiview Coding; after `train_CMC.py --demo`, and on ImageNet-100:

    python cmc/LinearProbing.py --demo
    python cmc/LinearProbing.py --data_folder IMAGENET100 --dataset imagenet100 --learning_rate 30 --layer 6 \\
        --model_path runs/cmc/memory_softmax_4096_resnet50v1_lr_0.03_decay_0.0001_bsz_128_view_YCbCr
"""

import os
import sys
from collections import OrderedDict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn

from cmc import colour
from cmc.networks import MODELS, build_network
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
    precision,
    probe,
    processes,
    run,
    schedule,
)
from common.precision import Precision
from preprocess import demo

# Sides of the pooled maps that are classified; the layers not named here enter as they are.
POOLED = {1: 8, 2: 6, 3: 4, 4: 3}  # ResNet: averages
POOLED_ALEXNET = {1: 10, 2: 6, 3: 5, 4: 5}  # AlexNet: maxima
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-cmc", save_path="runs/try-cmc-linear",
        workers=2, epochs=40, lr_decay_epochs="24,32", lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4,
        print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", default=None, help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet", "imagenet100", "folder"), default="imagenet")
    g.add_argument("--crop_low", type=cli.share, default=None, help="least share of the picture that a crop covers; "
                   "default .2, with --dataset imagenet and a ResNet .08")  # fmt: skip

    g = parser.add_argument_group("model")
    g.add_argument("--model_path", default=None, metavar="PATH",
                   help="pre-training checkpoint (.pth), or a run folder, or a folder of one: the newest")  # fmt: skip
    g.add_argument("--model", choices=list(MODELS), default=None, help="default: what the checkpoint says, or alexnet")
    g.add_argument("--view", type=colour.space_name, choices=colour.SPACES, default=None,
                   help="colour space; default: what the checkpoint says, or Lab")  # fmt: skip
    g.add_argument("--layer", type=int, default=None, help="ResNet: 1 after the stem, 2 to 5 the stages, 6 the pooled vector "
                   "(default); AlexNet: 1 to 5 the convolution blocks (default 5), 6 and 7 fully connected")  # fmt: skip

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=60, help="epochs to run in all, counted from 1")
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=0.1,
                   help="not scaled with the batch; published results: AlexNet .1, resnet50v1 and v2 30, v3 50")  # fmt: skip
    g.add_argument("--lr_decay_epochs", default="30,40,50", help="complete epochs after which the rate drops")
    g.add_argument("--lr_decay_rate", type=cli.positive, default=0.2, help="factor of each drop")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight_decay", type=cli.not_negative, default=0.0, help="weight decay")
    g.add_argument("--cache-views", type=cli.count, default=0, metavar="N",
                   help="embed N augmented views of every picture once and train on those in turn; 0: fresh views "
                   "at every epoch, as published")  # fmt: skip

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/cmc_linear", help="the run gets a folder of its own in here")
    g.add_argument("--tb_path", default=None, help="TensorBoard events go below here; default: into the run folder")
    g.add_argument("--print_freq", type=cli.positive_int, default=10, help="steps between progress lines")
    g.add_argument("--save_freq", type=cli.positive_int, default=5, help="epochs between numbered checkpoints")
    g.add_argument("--resume", default="", metavar="PATH|auto", help="continue from a checkpoint of this script")
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds checkpoints")
    g.add_argument("--label", default=None, help="name of the run in a report; default: made of its settings")
    g.add_argument(
        "--seed", type=cli.seed, default=None, help="seed of everything random; drawn and recorded if not given"
    )

    g = processes.add_arguments(parser)
    precision.add_arguments(g)
    parser.refuse("tb_freq", "never had an effect: TensorBoard gets a point every epoch")
    parser.refuse("log", "never had an effect")
    parser.refuse("beta1", "never had an effect: the classifier is trained by SGD")
    parser.refuse("beta2", "never had an effect: the classifier is trained by SGD")
    args = parser.parse_args(argv)

    precision.check_arguments(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/ and val/, or --demo for built-in pictures")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT.pth, written by train_CMC.py")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.demo and "save_path" not in args._typed and not args.resume:
        args.overwrite = True  # of its own folder only
    return args


def run_name(args, parent: str) -> str:
    """The published name of the run folder, and the layer (published: layers wrote over each other)."""
    return (f"calibrated_{parent}_bsz_{args.batch_size}_lr_{args.learning_rate}_decay_{args.weight_decay}_view_{args.view}"
            f"{f'_amp_{args.opt_level}' * args.amp}_layer{args.layer}")  # fmt: skip


def read_backbone(args) -> dict:
    """The pre-training checkpoint, and what it says about its network. Flags that were typed must agree with it."""
    path = args.model_path
    if os.path.isdir(path):
        path = checkpoint.newest_below(args.model_path)
        if path is None:
            raise UsageError(f"--model_path {args.model_path}: no checkpoint in this folder; run train_CMC.py"
                             f"{' --demo' * args.demo} first")  # fmt: skip
    elif args.demo and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run cmc/train_CMC.py --demo first")
    saved = checkpoint.load(path) | {"path": str(path)}
    if "classifier" in saved:
        raise UserError(
            f"{path} is a classifier of a linear evaluation: give the network to --model_path, this to --resume"
        )
    opt = saved.setdefault("opt", {})
    if not any(".l_to_ab." in k or k.startswith("l_to_ab.") for k in saved.get("model", {})) and "view" not in opt:
        raise UserError(f"{path} is not of CMC: evaluate MoCo and InsDis with moco_insdis/eval_moco_ins.py")
    for key, default in (("model", "alexnet"), ("view", "Lab")):
        then = opt.get(key, getattr(args, key) or default)
        if getattr(args, key) and getattr(args, key) != then:
            raise UserError(f"{path} is of --{key} {then}, not {getattr(args, key)}")
        setattr(args, key, then)
    if args.model not in MODELS:
        raise UserError(f"{path} is of --model {args.model}: known here are {', '.join(MODELS)}")
    args.view = colour.space_name(args.view)
    args._views = colour.parse_views(opt["views"], args.view) if opt.get("views") else colour.default_views(args.view)
    if "input_res" not in args._typed:
        args.input_res = opt.get("input_res", args.input_res)
    alexnet = MODELS[args.model] is None
    if args.layer is None:  # published: 6, which AlexNet's classifier did not have
        args.layer = 5 if alexnet else 6
    last = 7 if alexnet else 6
    if not 1 <= args.layer <= last:
        raise UsageError(f"--layer {args.layer}: --model {args.model} has the layers 1 to {last}")
    if args.crop_low is None:  # published: .08 for a ResNet on ImageNet whatever was typed
        args.crop_low = 0.08 if args.dataset == "imagenet" and not alexnet else 0.2
    return saved


def frozen_network(saved, args, process: processes.Process) -> nn.Module:
    """The networks of all views, frozen and in eval mode."""
    state = checkpoint.backbone(saved)
    heads = [v for k, v in state.items() if k.endswith((".fc.weight", ".fc8.0.weight"))]
    stems = [
        v for k, v in state.items() if k.endswith((".conv1.weight", ".conv_block_1.0.weight")) and ".layer" not in k
    ]
    if not heads or not stems:
        raise UserError(f"{saved['path']} holds no networks of this family (it has {', '.join(list(state)[:3])})")
    network = build_network(args.model, args._views, len(heads[0]), small_stem=stems[0].shape[-1] == 3)
    checkpoint.load_into(network, state, saved["path"])
    return network.requires_grad_(False).eval().to(process.device, memory_format=torch.channels_last)


class LinearClassifier(nn.Module):
    """One linear layer: weights N(0, 0.01), bias 0. `name` of the layer in the published files differs by network."""

    def __init__(self, features: int, classes: int, model: str):
        super().__init__()
        name = "LinearClassifier" if MODELS[model] is None else "LiniearClassifier"
        linear = nn.Linear(features, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(OrderedDict([(name, linear)]))

    def forward(self, feat):
        return self.classifier(feat)


def pool(feats, layer: int, model: str):
    """Features of every view at a layer -> (N, D): side by side, pooled to the published size, flattened."""
    feat = torch.cat(tuple(feats), 1)
    side = (POOLED_ALEXNET if MODELS[model] is None else POOLED).get(layer)
    if side and feat.dim() == 4 and feat.shape[-1] > side:  # small pictures give maps that are small enough as they are
        feat = (F.adaptive_max_pool2d if MODELS[model] is None else F.adaptive_avg_pool2d)(feat, side)
    return feat.flatten(1)


@torch.no_grad()
def embed(network, images, args, precision):
    with precision.autocast():
        feats = backbones.feature(network, images.contiguous(memory_format=torch.channels_last), args.layer)
    return pool([feat.float() for feat in feats], args.layer, args.model)


def recipe(args, train: bool) -> augment.Compose:
    colours = colour.Views(args._views)
    if not train:
        return augment.Compose(augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res), colours)
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop_low, 1.0)), augment.RandomHorizontalFlip()
    return augment.Compose(crop, flip, colours)


def make_loader(args, process, dataset, train: bool) -> data.Loader:
    """Validation, and pictures to be cached: the whole set in order. Training: shuffled, the last short batch kept."""
    batch, shuffle = args.batch_size // process.world_size, train and not args.cache_views
    return options.make_loader(args, process, dataset, (recipe(args, train),), batch, args.seed, shuffle=shuffle,
                               drop_last=False)  # fmt: skip


def train_one_epoch(classifier, batches, first_step, steps, optimizer, epoch, stop, log, args):
    """(means, number of steps done): all of them, or fewer where a signal asked to stop. Epochs count from 1."""
    progress = run.Progress(f"Epoch: [{epoch}]", steps, args.print_freq, first_step, log.main and not args.cache_views)
    step = first_step
    for feats, target in batches:
        logits = classifier(feats)
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


def check_frozen(network, saved) -> None:
    """Compare the network with the checkpoint: nothing may have moved, batch-norm statistics included."""
    before = checkpoint.backbone(saved)
    for name, now in network.state_dict().items():
        if not torch.equal(now.cpu(), before[name]):
            raise UserError(f"{name} changed during linear evaluation: the network was not frozen; the result is void")


def open_resume(args, folder: str, digest: str) -> dict | None:
    """Read the checkpoint that --resume names (None: start from scratch) and take over its seed. digest: of the network."""
    path = checkpoint.newest(folder, ("current.pth", "ckpt_epoch_*.pth")) if args.resume == "auto" else args.resume
    if not path:
        return None
    resumed = checkpoint.load(path) | {"path": str(path)}
    for key in ("classifier", "optimizer", "epoch"):
        if key not in resumed:
            raise UserError(f"{path} has no {key}: not a checkpoint of this script; a network goes to --model_path")
    if resumed.get("digest", digest) != digest:
        raise UserError(f"{path} is a classifier on another network ({resumed.get('network')} as it was then): "
                        "start over with --overwrite, or choose another --save_path")  # fmt: skip
    if args.seed is None:
        args.seed = resumed.get("opt", {}).get("seed")
    return resumed


def restore(resumed, classifier, optimizer, classes, args, log) -> tuple:
    """Put back what the last run saved: (complete epochs, steps of the next that are done, best Acc@1, its epoch, last
    top-1, last top-5)."""
    path = resumed["path"]
    if resumed.get("classes", classes) != classes:
        raise UserError(
            f"{path} was trained on other classes ({len(resumed['classes'])}; here there are {len(classes)})"
        )
    checkpoint.load_into(classifier, resumed["classifier"], path)
    optimizer.load_state_dict(resumed["optimizer"])
    for group in optimizer.param_groups:  # what was typed now counts, not what was typed then
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    for remark in run.unlike(args, resumed.get("opt", {}), CONTINUES):
        log.say(remark)
    epoch, step, best = resumed["epoch"], resumed.get("step", 0), float(resumed.get("best_acc1", -1))
    log.say(f"resumed {path}: epoch {epoch}, step {step}, best Acc@1 {best:.2f}")
    nan = float("nan")
    return epoch, step, best, resumed.get("best_epoch", 0), resumed.get("acc1", nan), resumed.get("acc5", nan)


# flags that must stay the same for a resumed run to be the run that was interrupted
CONTINUES = ("seed", "data", "dataset", "class_list", "input_res", "batch_size", "learning_rate", "lr_decay_epochs",
             "lr_decay_rate", "momentum", "weight_decay", "cache_views", "amp", "crop_low")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of the {process.world_size} processes")
    demo.ensure_for(args, process)
    saved = read_backbone(args)
    name = run_name(args, os.path.basename(os.path.dirname(os.path.abspath(saved["path"]))))
    folder = os.path.join(args.save_path, name)
    run.refuse_to_overwrite(folder, "*.pth", args.resume, args.overwrite)
    digest = checkpoint.fingerprint(checkpoint.backbone(saved))
    resumed = open_resume(args, folder, digest)
    args.seed = run.settle_seed(args.seed)
    run.seed_all(args.seed)

    train_set = options.open_split(args, "train")
    classes = train_set.classes
    val_set = options.open_split(args, "val", classes=classes)
    network = frozen_network(saved, args, process)
    precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
    shapes = backbones.feature_shape(network, (sum(network.channels), args.input_res, args.input_res), args.layer)
    features = pool([torch.zeros(1, *shape) for shape in shapes], args.layer, args.model).shape[1]
    classifier = LinearClassifier(features, len(classes), args.model).to(process.device)
    wrapped = nn.parallel.DistributedDataParallel(classifier) if process.world_size > 1 else classifier
    optimizer = torch.optim.SGD(classifier.parameters(), args.learning_rate, momentum=args.momentum,
                                weight_decay=args.weight_decay)  # fmt: skip

    log = run.Run(folder, args, process, tensorboard=os.path.join(args.tb_path, name) if args.tb_path else True)
    train_loader, val_loader = make_loader(args, process, train_set, True), make_loader(args, process, val_set, False)
    log.say("view     " + repr(train_loader.views[0]).replace("\n", "\n         "))
    log.derived(train_images=len(train_set), val_images=len(val_set), classes=len(classes), model=args.model,
                view=args.view,
                layer=args.layer, features=features, network=saved["path"], pretrained_epochs=saved.get("epoch"),
                crop_low=args.crop_low, precision=str(precision), data_device=train_loader.mode)  # fmt: skip
    epoch, step, best, best_epoch, top1, top5 = 0, 0, -1.0, 0, float("nan"), float("nan")
    if resumed:
        epoch, step, best, best_epoch, top1, top5 = restore(resumed, classifier, optimizer, classes, args, log)
    log.rewind(epoch if resumed else -1)

    def embedder(images):
        return embed(network, images, args, precision)

    def save(*names):
        state = {
            "opt": cli.flags(args), "epoch": epoch, "classifier": classifier.state_dict(), "best_acc1": best,
            "optimizer": optimizer.state_dict(), "best_epoch": best_epoch, "acc1": top1, "acc5": top5,
            "classes": classes, "network": saved["path"], "digest": digest, "step": step,
        }  # fmt: skip
        for name in names if process.is_main else ():
            checkpoint.save(os.path.join(folder, name), state)

    per_process = args.batch_size // process.world_size
    cache = val_cache = None
    if args.cache_views and epoch < args.epochs:
        val_cache = list(probe.embedded(embedder, val_loader))
        cache = probe.ViewCache(embedder, train_loader, args.cache_views, args.print_freq, log.main)
    first = epoch
    with run.StopSignal() as stop:
        while epoch < args.epochs:
            if cache:
                batches, steps, step = cache.batches(epoch + 1, per_process, args.seed), cache.steps(per_process), 0
            else:
                train_loader.set_epoch(epoch + 1, step)
                batches, steps = probe.embedded(embedder, train_loader), len(train_loader)
            lr = schedule.step(args.learning_rate, epoch + 1, args.milestones, args.lr_decay_rate, inclusive=False)
            schedule.set_lr(optimizer, lr)
            means, step = train_one_epoch(wrapped, batches, step, steps, optimizer, epoch + 1, stop, log, args)
            if step < steps:
                save("current.pth")
                log.say(f"stopped by a signal in epoch {epoch + 1} at step {step}; continue with --resume auto")
                log.close()
                return
            epoch, step = epoch + 1, 0
            top1, top5, loss = probe.validate(classifier, val_cache or probe.embedded(embedder, val_loader))
            if epoch == first + 1:
                check_frozen(network, saved)
            is_best = top1 > best
            if is_best:
                best, best_epoch = top1, epoch
            log.say(f" * epoch {epoch}: Acc@1 {top1:.3f} Acc@5 {top5:.3f} (best {best:.3f} at {best_epoch})")
            log.log(epoch, epoch=epoch, train_acc=means.get("Acc@1"), train_acc5=means.get("Acc@5"),
                    train_loss=means.get("Loss"), test_acc=top1, test_acc5=top5, test_loss=loss,
                    learning_rate=lr)  # fmt: skip
            save("current.pth", *[f"{args.model}_layer{args.layer}.pth"] * is_best,
                 *[f"ckpt_epoch_{epoch}.pth"] * (epoch % args.save_freq == 0))  # fmt: skip
            if stop.asked() and epoch < args.epochs:
                log.say(f"stopped by a signal after epoch {epoch}; continue with --resume auto")
                log.close()
                return
    if first == epoch:
        log.say(f"nothing to train: {resumed['path']} has {epoch} epochs already")
    log.say_replaced(train_loader)
    log.say_replaced(val_loader)
    report(log, saved, args, epoch, top1, top5, best, best_epoch)
    log.close()


def report(log, saved, args, epoch, top1, top5, best, best_epoch) -> None:
    """result.json: last and best epoch. Best is chosen on the validation set, as published; quote the last."""
    opt = saved["opt"]
    if "softmax" in opt:
        z = "" if opt["softmax"] else f" (Z {opt.get('nce_z', 'oneshot')})"
        view = opt.get("views") or args.view
        label = f"CMC {view}, {'softmax' if opt['softmax'] else 'NCE'}{z}, K {opt.get('nce_k')}"
    else:
        label = os.path.basename(os.path.dirname(os.path.abspath(saved["path"])))
    log.result(table="cmc/published.json", label=args.label or label, arch=args.model, epochs=saved.get("epoch"),
               data=args.data, split="val", layer=args.layer, linear_epochs=epoch, acc1=top1, acc5=top5, acc1_best=best,
               best_epoch=best_epoch, pretrained=saved["path"], seed=args.seed)  # fmt: skip


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
