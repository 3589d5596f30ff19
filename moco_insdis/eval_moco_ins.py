#!/usr/bin/env python
"""Linear evaluation of a network pre-trained by MoCo or InsDis: a classifier on one frozen layer.

The protocol published next to Contrastive Multiview Coding; after `train_moco_ins.py --demo --moco`, and the published one:

    python moco_insdis/eval_moco_ins.py --demo
    python moco_insdis/eval_moco_ins.py --data_folder IMAGENET100 --model resnet50 --learning_rate 10 \\
        --model_path runs/moco_insdis/MoCo0.999_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2_aug_CJ
"""

import os
import sys
from collections import OrderedDict

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
    precision,
    probe,
    processes,
    run,
    schedule,
)
from common.precision import Precision
from moco_insdis.train_moco_ins import MODELS, WARM_EPOCHS, WARM_FROM
from preprocess import demo

POOLED = {1: 8, 2: 6, 3: 4, 4: 3}  # side of the average-pooled map; layer 5 enters as it is, layer 6 is a vector
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model_path="runs/try-moco-insdis", save_path="runs/try-moco-insdis-linear",
        workers=2, epochs=40, lr_decay_epochs="24,32", lr_decay_rate=0.1, learning_rate=5.0, batch_size=128, cache_views=4,
        aug="NULL", print_freq=100, seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--data_folder", dest="data", default=None, help="data set root with train/CLASS/* and val/CLASS/*")
    options.add_data_arguments(g, trees=("imagenet100", "imagenet", "folder"), default="imagenet100")
    g.add_argument("--crop", type=cli.share, default=None, help="least share of the picture that a crop covers; "
                   "default .2, with --dataset imagenet .08")  # fmt: skip
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ",
                   help="CJ: greyscale and colour jitter here too, as published; NULL: crop and flip")  # fmt: skip

    g = parser.add_argument_group("model")
    g.add_argument("--model_path", default=None, metavar="PATH",
                   help="pre-training checkpoint (.pth), or a run folder, or a folder of one: the newest")  # fmt: skip
    g.add_argument("--model", choices=list(MODELS), default=None, help="default: what the checkpoint says, or resnet50")
    g.add_argument("--layer", type=int, default=6, help="1 after the stem, 2 to 5 the stages, 6 the pooled vector")
    g.add_argument("--bn", action="store_true", help="batch-norm without parameters before the classifier")
    g.add_argument("--syncBN", action="store_true", help="with --bn: its statistics over all processes")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=60, help="epochs to run in all, counted from 1")
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=0.1,
                   help="not scaled with the batch; published results: 10 on ImageNet-100, 30 on ImageNet")  # fmt: skip
    g.add_argument("--lr_decay_epochs", default="30,40,50", help="complete epochs after which the rate drops")
    g.add_argument("--lr_decay_rate", type=cli.positive, default=0.2, help="factor of each drop")
    g.add_argument("--cosine", action="store_true", help="cosine schedule down to rate^3 / 10 of the learning rate")
    g.add_argument("--warm", action="store_true", help=f"warm up from {WARM_FROM} in {WARM_EPOCHS} epochs")
    g.add_argument("--adam", action="store_true", help="Adam instead of SGD")
    g.add_argument("--beta1", type=cli.fraction, default=0.5, help="of Adam")
    g.add_argument("--beta2", type=cli.fraction, default=0.999, help="of Adam")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight_decay", type=cli.not_negative, default=0.0, help="weight decay")
    g.add_argument("--cache-views", type=cli.count, default=0, metavar="N",
                   help="embed N augmented views of every picture once and train on those in turn; 0: fresh views "
                   "at every epoch, as published")  # fmt: skip

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/moco_insdis_linear", help="the run gets a folder of its own in here")
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
    args = parser.parse_args(argv)

    precision.check_arguments(args)
    if args.data is None:
        raise UsageError("no data: give --data_folder, a tree with train/ and val/, or --demo for built-in pictures")
    if args.model_path is None:
        raise UsageError("no network: give --model_path CHECKPOINT.pth, written by train_moco_ins.py")
    if not 1 <= args.layer <= 6:
        raise UsageError(f"--layer {args.layer}: a ResNet has the layers 1 (stem) to 6 (pooled vector)")
    if args.syncBN and not args.bn:
        raise UsageError(
            "--syncBN: the frozen network uses stored statistics and the classifier has no batch-norm; add --bn"
        )
    for flag in ("beta1", "beta2"):
        if flag in args._typed and not args.adam:
            raise UsageError(f"--{flag} belongs to --adam")
    if args.adam and "momentum" in args._typed:
        raise UsageError("--momentum belongs to SGD; Adam has --beta1 and --beta2")
    if args.cosine and "lr_decay_epochs" in args._typed:
        raise UsageError("--cosine has no --lr_decay_epochs; leave one of the two away")
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.crop is None:  # published: .08 for ImageNet whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" else 0.2
    if args.demo and "save_path" not in args._typed and not args.resume:
        args.overwrite = True  # of its own folder only
    return args


def run_name(args, parent: str) -> str:
    """The published name of the run folder, and the layer (published: layers wrote over each other)."""
    return (f"{parent}_bsz_{args.batch_size}_lr_{args.learning_rate}_decay_{args.weight_decay}_crop_{args.crop}"
            f"{f'_amp_{args.opt_level}' * args.amp}_aug_{args.aug}{'_useBN' * args.bn}{'_useAdam' * args.adam}"
            f"{'_cosine' * args.cosine}{'_warm' * args.warm}_layer{args.layer}")  # fmt: skip


def read_backbone(args) -> dict:
    """The pre-training checkpoint, and what it says about its network. Flags that were typed must agree with it."""
    path = args.model_path
    if os.path.isdir(path):
        path = checkpoint.newest_below(args.model_path)
        if path is None:
            raise UsageError(f"--model_path {args.model_path}: no checkpoint in this folder; run train_moco_ins.py"
                             f"{' --demo' * args.demo} first")  # fmt: skip
    elif args.demo and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run moco_insdis/train_moco_ins.py --demo first")
    saved = checkpoint.load(path) | {"path": str(path)}
    if "classifier" in saved:
        raise UserError(
            f"{path} is a classifier of a linear evaluation: give the network to --model_path, this to --resume"
        )
    opt = saved.setdefault("opt", {})
    if "view" in opt or any(".l_to_ab." in k for k in saved.get("model", {})):
        raise UserError(f"{path} is of CMC (two networks on a colour space): evaluate it with cmc/LinearProbing.py")
    model = opt.get("model", args.model or "resnet50")
    if args.model and args.model != model:
        raise UserError(f"{path} is of --model {model}, not {args.model}")
    if model not in MODELS:
        raise UserError(f"{path} is of --model {model}: known here are {', '.join(MODELS)}")
    args.model = model
    if "input_res" not in args._typed:
        args.input_res = opt.get("input_res", args.input_res)
    return saved


def build_network(saved, args, process: processes.Process) -> nn.Module:
    """The (query) network of the checkpoint, frozen and in eval mode; the key network of MoCo is not used."""
    state = checkpoint.backbone(saved)
    if "conv1.weight" not in state or "fc.weight" not in state:
        raise UserError(f"{saved['path']} holds no network of this family (it has {', '.join(list(state)[:3])})")
    depth, width = MODELS[args.model]
    small_stem = state["conv1.weight"].shape[-1] == 3
    network = backbones.WidthResNet(depth, 3, width, dim=len(state["fc.weight"]), small_stem=small_stem)
    checkpoint.load_into(network, state, saved["path"])
    return network.requires_grad_(False).eval().to(process.device, memory_format=torch.channels_last)


class LinearClassifier(nn.Module):
    """Flatten, and one linear layer: weights N(0, 0.01), bias 0. Its name in the published files is spelled as here."""

    def __init__(self, features: int, classes: int, bn: bool):
        super().__init__()
        norm = [("BatchNorm", nn.BatchNorm1d(features, affine=False))] if bn else []
        self.classifier = nn.Sequential(OrderedDict([*norm, ("LiniearClassifier", nn.Linear(features, classes))]))
        nn.init.normal_(self.classifier.LiniearClassifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.LiniearClassifier.bias)

    def forward(self, feat):
        return self.classifier(feat)


def pool(feat, layer: int):
    """(N, C, H, W) of layers 1 to 5 or (N, C) of layer 6 -> (N, D): averaged to the published size, flattened."""
    side = POOLED.get(layer)
    if side and feat.shape[-1] > side:  # small pictures give maps that are small enough as they are
        feat = F.adaptive_avg_pool2d(feat, side)
    return feat.flatten(1)


@torch.no_grad()
def embed(network, images, layer, precision):
    with precision.autocast():
        feat = backbones.feature(network, images.contiguous(memory_format=torch.channels_last), layer)
    return pool(feat.float(), layer)


def recipe(args, train: bool) -> augment.Compose:
    normalize = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    if not train:
        return augment.Compose(augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res), normalize)
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0)), augment.RandomHorizontalFlip()
    if args.aug == "NULL":
        return augment.Compose(crop, flip, normalize)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, normalize)


def make_loader(args, process, dataset, train: bool) -> data.Loader:
    """Validation, and pictures to be cached: the whole set in order. Training: shuffled, the last short batch kept."""
    batch, shuffle = args.batch_size // process.world_size, train and not args.cache_views
    return options.make_loader(args, process, dataset, (recipe(args, train),), batch, args.seed, shuffle=shuffle,
                               drop_last=False)  # fmt: skip


def learning_rate(args, epoch: int, part: float) -> float:
    """At `part` of epoch `epoch`, counted from 1. The published cosine is one epoch ahead: the last runs at its floor."""
    if args.cosine:
        lr = schedule.cosine(args.learning_rate, epoch, args.epochs, args.learning_rate * args.lr_decay_rate**3 * 0.1)
    else:
        lr = schedule.step(args.learning_rate, epoch, args.milestones, args.lr_decay_rate, inclusive=False)
    if args.warm and epoch <= WARM_EPOCHS:
        return schedule.warmup(lr, epoch - 1 + part, WARM_EPOCHS, start=min(WARM_FROM, lr))
    return lr


def hyperparameters(args) -> dict:
    """Of the optimizer, besides the learning rate."""
    if args.adam:
        return dict(betas=(args.beta1, args.beta2), weight_decay=args.weight_decay)
    return dict(momentum=args.momentum, weight_decay=args.weight_decay)


def train_one_epoch(classifier, batches, first_step, steps, optimizer, epoch, stop, log, args):
    """(means, number of steps done): all of them, or fewer where a signal asked to stop. Epochs count from 1."""
    progress = run.Progress(f"Epoch: [{epoch}]", steps, args.print_freq, first_step, log.main and not args.cache_views)
    step = first_step
    for feats, target in batches:
        schedule.set_lr(optimizer, learning_rate(args, epoch, step / steps))
        step += 1
        if args.bn and processes.any_rank(len(target) == 1):  # a single row has no statistics, and all ranks must agree
            continue
        logits = classifier(feats)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
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
        group.update(hyperparameters(args))
    for remark in run.unlike(args, resumed.get("opt", {}), CONTINUES):
        log.say(remark)
    epoch, step, best = resumed["epoch"], resumed.get("step", 0), float(resumed.get("best_acc1", -1))
    log.say(f"resumed {path}: epoch {epoch}, step {step}, best Acc@1 {best:.2f}")
    nan = float("nan")
    return epoch, step, best, resumed.get("best_epoch", 0), resumed.get("acc1", nan), resumed.get("acc5", nan)


# flags that must stay the same for a resumed run to be the run that was interrupted
CONTINUES = ("seed", "data", "dataset", "class_list", "input_res", "batch_size", "learning_rate", "lr_decay_epochs",
             "lr_decay_rate", "momentum", "weight_decay", "cache_views", "amp", "crop", "aug", "bn", "syncBN", "cosine", "warm",
             "adam", "beta1", "beta2")  # fmt: skip


def worker(args, process: processes.Process) -> None:
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of the {process.world_size} processes")
    if args.syncBN and process.world_size > 1 and process.device.type == "cpu":
        raise UsageError("--syncBN: PyTorch synchronises batch-norm between GPUs only; leave it away on CPUs")
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
    network = build_network(saved, args, process)
    precision = Precision(args.amp, process.device, args.amp_backend, args.opt_level)
    shape = backbones.feature_shape(network, (3, args.input_res, args.input_res), args.layer)
    classifier = LinearClassifier(pool(torch.zeros(1, *shape), args.layer).shape[1], len(classes), args.bn)
    if args.syncBN and process.world_size > 1:
        classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)
    classifier = classifier.to(process.device)
    wrapped = nn.parallel.DistributedDataParallel(classifier) if process.world_size > 1 else classifier
    make = torch.optim.Adam if args.adam else torch.optim.SGD
    optimizer = make(classifier.parameters(), args.learning_rate, **hyperparameters(args))

    log = run.Run(folder, args, process, tensorboard=os.path.join(args.tb_path, name) if args.tb_path else True)
    train_loader, val_loader = make_loader(args, process, train_set, True), make_loader(args, process, val_set, False)
    log.say("view     " + repr(train_loader.views[0]).replace("\n", "\n         "))
    log.derived(train_images=len(train_set), val_images=len(val_set), classes=len(classes), model=args.model,
                layer=f"{args.layer} {tuple(shape)}", network=saved["path"], pretrained_epochs=saved.get("epoch"),
                crop=args.crop, precision=str(precision), data_device=train_loader.mode)  # fmt: skip
    epoch, step, best, best_epoch, top1, top5 = 0, 0, -1.0, 0, float("nan"), float("nan")
    if resumed:
        epoch, step, best, best_epoch, top1, top5 = restore(resumed, classifier, optimizer, classes, args, log)
    log.rewind(epoch if resumed else -1)

    def embedder(images):
        return embed(network, images, args.layer, precision)

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
            means, step = train_one_epoch(wrapped.train(), batches, step, steps, optimizer, epoch + 1, stop, log, args)
            if step < steps:
                save("current.pth")
                log.say(f"stopped by a signal in epoch {epoch + 1} at step {step}; continue with --resume auto")
                log.close()
                return
            epoch, step = epoch + 1, 0
            processes.broadcast_buffers(classifier)
            top1, top5, loss = probe.validate(classifier.eval(), val_cache or probe.embedded(embedder, val_loader))
            if epoch == first + 1:
                check_frozen(network, saved)
            is_best = top1 > best
            if is_best:
                best, best_epoch = top1, epoch
            log.say(f" * epoch {epoch}: Acc@1 {top1:.3f} Acc@5 {top5:.3f} (best {best:.3f} at {best_epoch})")
            log.log(epoch, epoch=epoch, train_acc=means.get("Acc@1"), train_acc5=means.get("Acc@5"),
                    train_loss=means.get("Loss"), test_acc=top1, test_acc5=top5, test_loss=loss,
                    learning_rate=learning_rate(args, epoch, 0))  # fmt: skip
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
        method = "MoCo" if opt.get("moco") else "InsDis"
        z = "" if opt["softmax"] else f" (Z {opt.get('nce_z', 'oneshot')})"
        label = f"{method}, {'softmax' if opt['softmax'] else 'NCE'}{z}, K {opt.get('nce_k')}"
    else:
        label = os.path.basename(os.path.dirname(os.path.abspath(saved["path"])))
    log.result(table="moco_insdis/published.json", label=args.label or label, arch=args.model, epochs=saved.get("epoch"),
               data=args.data, split="val", layer=args.layer, linear_epochs=epoch, acc1=top1, acc5=top5, acc1_best=best,
               best_epoch=best_epoch, pretrained=saved["path"], seed=args.seed)  # fmt: skip


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
