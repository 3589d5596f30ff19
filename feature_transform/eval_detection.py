#!/usr/bin/env python
"""Transfer to object detection: Faster R-CNN on a pre-trained ResNet, fine-tuned on pictures in the layout of Pascal VOC.

The evaluation of Improving Contrastive Learning by Visualizing Feature Transformation (Zhu et al., ICCV 2021) and of MoCo, with
torchvision's detector: ResNet and feature pyramid; it has no R50-C4, which the published AP is of.

    python feature_transform/eval_detection.py --demo --pretrained none
    python feature_transform/eval_detection.py --data_folder VOC2007 VOC2012 --pretrained runs/feature_transform

Takes the network of any script of this project, the authors' files and torchvision's own weights.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from common import UsageError, UserError, backbones, cli, launch, options, schedule
from runner import checkpoint, linear, loop
from runner.progress import Progress
from common.precision import Precision
from feature_transform import detector, voc
from preprocess import demo_voc

PUBLISHED = dict(batch=16, learning_rate=0.02, iterations=24000)  # pascal_voc_R_50_C4_24k.yaml of facebookresearch/moco
SHORTER = list(range(480, 801, 32))
WARMUP_FROM = 1e-3  # of the learning rate; detectron2's
SAME = (
    "batch_size",
    "iterations",
    "checkpoint_every",
    "classes",
    "norm",
    "fpn_channels",
    "rois",
)  # else it is another run
PRESETS = {
    "demo": dict(
        data=["data/demo-voc"], classes="data/demo-voc/classes.txt", pretrained="runs/try-feature-transform", arch="resnet18",
        save_path="runs/try-detection", batch_size=8, iterations=300, checkpoint_every=100, learning_rate=0.02, seed=0,
        fpn_channels=64, rois=64, min_size=[96, 112, 128], test_size=128, workers=2,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    about = (
        "folders in the layout of VOC (Annotations, ImageSets/Main, JPEGImages) to train on, such as VOC2007 VOC2012"
    )
    g.add_argument("--data_folder", dest="data", nargs="+", metavar="ROOT", help=about)
    g.add_argument("--split", default="trainval", help="which of ImageSets/Main/*.txt is trained on")
    g.add_argument("--test-data", metavar="ROOT", help="folder to test on; default: the first of --data_folder")
    g.add_argument("--test-split", default="test", help="which of its splits")
    g.add_argument(
        "--classes", default="", metavar="A,B|FILE", help="names, or a file of one a line; default: VOC's 20"
    )
    about = (
        "shorter side in training, pixels, one of these is drawn for each picture; default 480 to 800 in steps of 32"
    )
    g.add_argument("--min-size", type=cli.positive_int, nargs="+", default=SHORTER, metavar="PIXELS", help=about)
    g.add_argument("--test-size", type=cli.positive_int, default=800, help="shorter side in the test, pixels")
    g.add_argument("--max-size", type=cli.positive_int, default=1333, help="the longer side is at most this, pixels")
    g.add_argument(
        "-j", "--workers", "--num-workers", type=cli.count, default=8, help="processes per node that read pictures"
    )

    g = parser.add_argument_group("model")
    about = "pre-training checkpoint, or a run folder, or a folder of one: the newest; none: from random weights"
    g.add_argument("--pretrained", default="", metavar="PATH|none", help=about)
    g.add_argument("--use_ema", action="store_true", help="of a checkpoint with model_ema, take that key encoder")
    g.add_argument("-a", "--arch", default="resnet50", help="of random weights; else the checkpoint tells")
    about = "batch-norm: trained, over all processes (sync); trained, each process its own (plain); as it is (frozen)"
    g.add_argument("--norm", choices=["sync", "plain", "frozen"], default="sync", help=about)
    about = "of the feature pyramid; the layers of the box head have four times as many"
    g.add_argument("--fpn-channels", type=cli.positive_int, default=256, help=about)
    g.add_argument("--rois", type=cli.positive_int, default=512, help="regions of each picture that train the box head")

    g = parser.add_argument_group("optimisation")
    g.add_argument(
        "-b", "--batch_size", type=cli.positive_int, default=PUBLISHED["batch"], help="global, over all processes"
    )
    about = "steps of SGD; default: 24000 for a batch of 16, else as many pictures in all"
    g.add_argument("--iterations", type=cli.positive_int, help=about)
    g.add_argument(
        "--learning_rate", "--lr", type=cli.positive, help="default: .02 for a batch of 16, else in proportion"
    )
    about = "iterations after which the rate drops to a tenth; default: 3/4 and 11/12 of all (18000,22000)"
    g.add_argument("--steps", help=about)
    g.add_argument("--warmup", type=cli.count, default=100, help="iterations in which the rate rises from a thousandth")
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-4, help="of all but batch-norm")

    g = parser.add_argument_group("run")
    g.add_argument("--save_path", default="./runs/detection", help="the run gets a folder of its own in here")
    options.add_name_argument(g, "made of its settings")
    options.add_run_arguments(g, save_freq=None)
    g.add_argument("--checkpoint_every", type=cli.positive_int, default=1000, help="iterations; an `epoch` of the log")
    g.add_argument("--label", help="name of the run in a report; default: the folder of the network")
    g.add_argument(
        "--show", metavar="FILE.png", help="after the test, draw its first pictures and what was found in them"
    )
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)

    options.check(args)
    if not args.data:
        raise UsageError("no data: give --data_folder VOC2007 VOC2012, or --demo for built-in pictures")
    if not args.pretrained:
        raise UsageError("no network: give --pretrained CHECKPOINT, or --pretrained none for random weights")
    if args.pretrained == "none" and (args.norm == "frozen" or args.use_ema):
        raise UsageError(
            f"--{'use_ema' if args.use_ema else 'norm frozen'} needs a network: give --pretrained CHECKPOINT"
        )
    times = args.batch_size / PUBLISHED["batch"]
    args.iterations = args.iterations or max(1, round(PUBLISHED["iterations"] / times))
    args.learning_rate = args.learning_rate or PUBLISHED["learning_rate"] * times
    drops = sorted({args.iterations * part // 12 for part in (9, 11)})
    args.steps = ",".join(map(str, drops)) if args.steps is None else args.steps
    args.milestones = schedule.parse_milestones(args.steps, "--steps")
    args.epochs = -(-args.iterations // args.checkpoint_every)  # what the run counts
    return args


def run_name(args) -> str:
    network = os.path.abspath(args.pretrained)
    network = os.path.basename(network if os.path.isdir(network) else os.path.dirname(network))
    network = "scratch" if args.pretrained == "none" else network + "_ema" * args.use_ema
    return f"{network}_norm_{args.norm}_bsz_{args.batch_size}_lr_{args.learning_rate:g}_it_{args.iterations}"


def recipe(args, train: bool) -> voc.View:
    return (
        voc.View(0.5, tuple(args.min_size), args.max_size) if train else voc.View(0.0, (args.test_size,), args.max_size)
    )


def build_network(args, classes: int, process: launch.Process) -> tuple[FasterRCNN, checkpoint.Saved | None, dict]:
    """The detector, the checkpoint that its ResNet is from, and what is to be said of that."""
    saved, state = detector.read_backbone(args)
    path = args.arch if saved is None else saved.path
    how = dict(norm=args.norm, channels=args.fpn_channels, rois=args.rois)
    network = detector.build(saved, state, path, classes, recipe(args, train=True), **how)
    if args.norm == "sync" and process.world_size > 1:
        if process.device.type != "cuda":
            raise UsageError("--norm sync: PyTorch has that on GPUs only; give --norm plain or frozen, or one process")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if args.norm != "frozen" and args.batch_size == process.world_size and min(args.min_size) <= 32:
        raise UsageError(
            f"--min-size {min(args.min_size)}: of one picture that leaves batch-norm one number; give more"
        )
    facts = dict(arch=backbones.name_of(state) or "ResNet", network="none" if saved is None else path)
    return network.to(process.device), saved, facts | dict(digest=checkpoint.fingerprint(state if saved else {}))


class Detector:
    """Faster R-CNN, its four losses and SGD. facts: what its checkpoints say besides."""

    def __init__(self, args, network: FasterRCNN, process: launch.Process, /, **facts):
        self.network, self.wrapped, self.facts = network, launch.parallel(network, process), facts
        self.precision = Precision(args.amp, process.device)
        layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = {id(p) for layer in layers for p in layer.parameters()}  # without weight decay, as in detectron2
        groups = [[p for p in network.parameters() if (id(p) in norms) == decayless] for decayless in (False, True)]
        groups = [{"params": ps, "weight_decay": args.weight_decay * (not i)} for i, ps in enumerate(groups) if ps]
        self.optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
        device = process.device  # proposals are drawn from PyTorch's own generator, on a GPU from that one's
        self.generators = {"cuda": torch.cuda.default_generators[device.index or 0]} if device.type == "cuda" else {}

    def step(self, images: list[Tensor], objects: list[voc.Objects]) -> dict[str, Tensor]:
        targets = [{"boxes": thing.boxes, "labels": thing.labels} for thing in objects]  # the difficult ones, too
        with self.precision.autocast():
            losses = self.wrapped(images, targets)
        loss = sum(losses.values())
        self.precision.step(loss, self.optimizer)
        return {"loss": loss, **losses}

    def state_dict(self) -> dict:
        return {"model": self.network.state_dict(), **self.facts}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if saved["digest"] != self.facts["digest"]:
            raise UserError(
                f"{saved.path} started from another network ({saved['network']}): give that with --pretrained"
            )
        checkpoint.load_into(self.network, saved["model"], saved.path)


def learning_rate(args, iteration: int) -> float:
    """iteration counts from 0."""
    rate = schedule.step(args.learning_rate, iteration, args.milestones)
    return schedule.warmup(rate, iteration, args.warmup, rate * WARMUP_FROM)


@torch.no_grad()
def detect(job, method: Detector, pictures: voc.Pictures, args, process: launch.Process) -> dict[int, dict]:
    """{row: boxes, labels and scores, on the CPU} of all `pictures`, on every rank."""
    network, rows = method.network.eval(), range(process.rank, len(pictures), process.world_size)
    launch.broadcast_buffers(network)
    network.transform.min_size = recipe(args, train=False).min_size
    size = max(1, args.batch_size // process.world_size)
    plans = [[(row, False) for row in rows[i : i + size]] for i in range(0, len(rows), size)]
    progress, found = Progress("Test: ", len(plans), args.print_freq, enabled=job.log.main), {}
    batches = voc.decoded(pictures, plans, options.reading(args), process.device)
    for images, _, places in job.until_stopped(batches, "the test, which is made again"):
        with method.precision.autocast():
            outputs = network(images)
        for row, out in zip(places.tolist(), outputs):
            found[row] = {k: v.cpu() if k == "labels" else v.float().cpu() for k, v in out.items()}
        progress.bar.update(1)
    progress.close()
    for part in launch.gather_objects(found):
        found |= part
    return found


def worker(args, process: launch.Process) -> None:
    if args.demo and "data" not in args.typed and process.is_main:
        demo_voc.ensure(args.data[0])
    launch.barrier()
    folder = options.run_folder(args, args.save_path, run_name(args))
    with loop.Job(args, process, folder, last="current.pth", same=SAME) as job:
        names = voc.class_names(args.classes)
        train_set = voc.Pictures([(root, args.split) for root in args.data], names)
        test_set = voc.Pictures([(args.test_data or args.data[0], args.test_split)], names)
        network, saved, facts = build_network(args, len(names), process)
        method = Detector(args, network, process, script="feature_transform/eval_detection.py", classes=names, **facts)
        share = args.batch_size // process.world_size
        how = (args.iterations, args.checkpoint_every, share, args.seed, process, options.reading(args))
        loader = voc.Loader(train_set, recipe(args, train=True), *how)
        objects = sum(len(o.labels) for o in train_set.objects)
        job.begin(
            loader, method, test_images=len(test_set), objects=objects, arch=facts["arch"], network=facts["network"]
        )
        for _ in job.epochs():
            method.network.train()
            for images, objects, _ in job.batches():
                lr = learning_rate(args, job.global_step)
                schedule.set_lr(method.optimizer, lr)
                job.track(**method.step(images, objects), learning_rate=lr)
        if job.stopped:
            return
        found = detect(job, method, test_set, args, process)
        if process.is_main:
            report(job, method, saved, voc.average_precision(test_set, found))
            if args.show:
                voc.draw(args.show, test_set, found)
                job.log.say(f"the first test pictures and what was found in them: {args.show}")


def report(job, method: Detector, saved, values: dict) -> None:
    """result.json; tools/report.py shows the published numbers, which are of another detector, beside it."""
    args, classes, network = job.args, values.pop("classes"), method.facts["network"]
    width = max(map(len, classes))
    job.log.say("AP50 of each class\n" + "\n".join(f"  {name:<{width}}  {ap:6.2f}" for name, ap in classes.items()))
    facts = linear.origin(saved) if saved else dict(epochs=None, seed=None, pretrained=network)
    where = os.path.basename(os.path.dirname(os.path.abspath(network))) if saved else "random weights"
    facts |= dict(seed=args.seed if facts["seed"] is None else facts["seed"], detection_seed=args.seed)
    facts |= dict(arch=f"{method.facts['arch']}-FPN", label=args.label or where, data=" + ".join(args.data))
    facts |= dict(split=args.test_split, iterations=args.iterations, norm=args.norm, classes=classes)
    job.log.result(table="feature_transform/published_detection.json", **facts, **values)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
