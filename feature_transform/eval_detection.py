#!/usr/bin/env python
"""Transfer to object detection: fine-tune Faster R-CNN on a pre-trained ResNet, on Pascal VOC.

This is the evaluation of Improving Contrastive Learning by Visualizing Feature Transformation (Zhu
et al., ICCV 2021) and of MoCo, with torchvision's detector (a ResNet and a feature pyramid). The
published AP is of R50-C4, a detector that torchvision does not have.

    python feature_transform/eval_detection.py --demo --pretrained none
    python feature_transform/eval_detection.py --data_folder VOC2007 VOC2012 \\
        --pretrained runs/feature_transform

It takes the network of any script of this project, the authors' files and torchvision's weights.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from common import (
    UsageError,
    UserError,
    cli,
    collectives,
    inputs,
    launch,
    options,
    schedule,
)
from common.precision import Precision
from feature_transform import checkpoints, detections, detector, voc, voc_batches
from preprocess import demo_voc
from runner import checkpoint, loop, pretrained
from runner.trunks import name_of

# The settings of pascal_voc_R_50_C4_24k.yaml of facebookresearch/moco.
PUBLISHED = {"batch": 16, "learning_rate": 0.02, "iterations": 24000}
SHORTER = list(range(480, 801, 32))
WARMUP_FROM = 1e-3  # share of the learning rate at the start, as in detectron2
SAME = (  # flags that a resumed run may not change
    "batch_size", "iterations", "checkpoint_every", "classes", "norm", "fpn_channels", "rois",
)  # fmt: skip
PRESETS = {
    "demo": dict(
        data=["data/demo-voc"], classes="data/demo-voc/classes.txt",
        pretrained="runs/try-feature-transform", arch="resnet18", save_path="runs/try-detection",
        batch_size=8, iterations=300, checkpoint_every=100, learning_rate=0.02, seed=0,
        fpn_channels=64, rois=64, min_size=[96, 112, 128], test_size=128, workers=2,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    add_data_arguments(parser.add_argument_group("data"))
    g = parser.add_argument_group("model")
    text = "checkpoint, or a run folder, or a folder of those: the newest; none: random weights"
    g.add_argument("--pretrained", default="", metavar="PATH|none", help=text)
    text = "take the key encoder of the checkpoint (model_ema)"
    g.add_argument("--use_ema", action="store_true", help=text)
    text = "network with random weights (--pretrained none); a checkpoint determines its own"
    g.add_argument("-a", "--arch", default="resnet50", help=text)
    text = "batch-norm: sync: trained over all processes; plain: over each; frozen: not trained"
    g.add_argument("--norm", choices=["sync", "plain", "frozen"], default="sync", help=text)
    text = "channels of the feature pyramid; the box head has four times as many"
    g.add_argument("--fpn-channels", type=cli.positive_int, default=256, help=text)
    text = "regions of each picture that train the box head"
    g.add_argument("--rois", type=cli.positive_int, default=512, help=text)

    g = parser.add_argument_group("optimisation")
    batch = PUBLISHED["batch"]
    text = "global, over all processes"
    g.add_argument("-b", "--batch_size", type=cli.positive_int, default=batch, help=text)
    text = "steps of SGD; default: 24000 for a batch of 16, else as many pictures in all"
    g.add_argument("--iterations", type=cli.positive_int, help=text)
    text = "learning rate; default: .02 for a batch of 16, else in proportion"
    g.add_argument("--learning_rate", "--lr", type=cli.positive, help=text)
    text = "iterations after which the rate is a tenth; default: 3/4 and 11/12 (18000,22000)"
    g.add_argument("--steps", help=text)
    text = "iterations in which the rate rises from a thousandth"
    g.add_argument("--warmup", type=cli.count, default=100, help=text)
    g.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    text = "weight decay of all parameters but batch-norm's"
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-4, help=text)

    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--save_path", "--out", default="./runs/detection", help=text)
    options.add_name_argument(g, "made of its settings")
    options.add_run_arguments(g, save_freq=None)
    text = "iterations between checkpoints, which the log counts as epochs"
    g.add_argument("--checkpoint_every", type=cli.positive_int, default=1000, help=text)
    text = "name of the run in a report; default: the folder of the network"
    g.add_argument("--label", help=text)
    text = "after the test, draw its first pictures with objects and detections"
    g.add_argument("--show", type=cli.figure_path, metavar="FILE.png", help=text)
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    options.check(args)
    settle(args)
    return cli.freeze(args)


def add_data_arguments(g) -> None:
    """Add the pictures to train and to test on, their classes and sizes."""
    text = "folders in VOC's layout to train on, such as VOC2007 VOC2012"
    g.add_argument("--data_folder", "--data", dest="data", nargs="+", metavar="ROOT", help=text)
    text = "split to train on, one of ImageSets/Main/*.txt"
    g.add_argument("--split", default="trainval", help=text)
    text = "folder to test on; default: the first of --data_folder"
    g.add_argument("--test-data", metavar="ROOT", help=text)
    g.add_argument("--test-split", default="test", help="split to test on")
    text = "names of the classes, or a file with one a line; default: VOC's 20"
    g.add_argument("--classes", default="", metavar="A,B|FILE", help=text)
    text = "leave out pictures that are broken, or whose annotation is, and count them"
    g.add_argument("--skip-bad-images", action="store_true", help=text)
    pixels = {"type": cli.positive_int, "metavar": "PIXELS"}
    text = "shorter side in training, one drawn for each picture; default 480 to 800 by 32"
    g.add_argument("--min-size", nargs="+", default=SHORTER, help=text, **pixels)
    g.add_argument("--test-size", default=800, help="shorter side in the test", **pixels)
    g.add_argument("--max-size", default=1333, help="greatest longer side", **pixels)
    g.set_defaults(workers=8)  # add_hardware_arguments takes this default


def settle(args) -> None:
    """Fill in the schedule, which follows the batch size, and check flags against each other."""
    if not args.data:
        raise UsageError(
            "no data: give --data_folder VOC2007 VOC2012, or --demo for built-in pictures"
        )
    if not args.pretrained:
        raise UsageError(
            "no network: give --pretrained CHECKPOINT, or --pretrained none for random weights"
        )
    if args.pretrained == "none" and (args.norm == "frozen" or args.use_ema):
        flag = "use_ema" if args.use_ema else "norm frozen"
        raise UsageError(f"--{flag} needs a network: give --pretrained CHECKPOINT")
    if args.pretrained != "none" and "arch" in args.typed:
        raise UsageError("--arch: the checkpoint determines the network; omit it")
    times = args.batch_size / PUBLISHED["batch"]
    if args.iterations is None:
        args.iterations = max(1, round(PUBLISHED["iterations"] / times))
    if args.learning_rate is None:
        args.learning_rate = PUBLISHED["learning_rate"] * times
    if args.steps is None:
        drops = sorted({max(1, args.iterations * part // 12) for part in (9, 11)})
        args.steps = ",".join(map(str, drops))
    args.milestones = schedule.parse_milestones(args.steps, "--steps")
    args.epochs = -(-args.iterations // args.checkpoint_every)  # which the job counts


def run_name(args) -> str:
    network = f"scratch_{args.arch}"
    if args.pretrained != "none":
        path = pretrained.file_at(args.pretrained, "--pretrained", "name the folder of a run")
        network = pretrained.name_of(path)
        network = f"{network}_ema" if args.use_ema else network
    return (
        f"{network}_norm_{args.norm}_bsz_{args.batch_size}_lr_{args.learning_rate:g}"
        f"_it_{args.iterations}"
    )


def recipe(args, train: bool) -> voc_batches.View:
    if train:
        return voc_batches.View(0.5, tuple(args.min_size), args.max_size)
    return voc_batches.View(0.0, (args.test_size,), args.max_size)


def build_network(
    args, classes: int, process: launch.Process
) -> tuple[FasterRCNN, checkpoint.Saved | None, dict]:
    """Return the detector, the checkpoint of its ResNet, and the records about that ResNet."""
    view = recipe(args, train=True)
    settings = {"norm": args.norm, "channels": args.fpn_channels, "rois": args.rois}
    with checkpoint.in_one_line(lambda: f"--pretrained {args.pretrained}"):
        saved, state = checkpoints.read_resnet(args)
        path = args.arch if saved is None else saved.path
        network = detector.build(saved, state, path, classes, view, **settings)
    if args.norm == "sync" and process.world_size > 1:
        if process.device.type != "cuda":
            raise UsageError(
                "--norm sync: PyTorch synchronises batch-norm between GPUs only; give --norm plain "
                "or frozen, or run one process"
            )
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    shortest = min(args.min_size)
    if args.norm != "frozen" and args.batch_size == process.world_size and shortest <= 32:
        raise UsageError(
            f"--min-size {shortest} leaves batch-norm one number of one picture; give more pixels"
        )
    recorded = {
        "arch": name_of(state) or "ResNet",
        "network": "none" if saved is None else path,
        "digest": checkpoint.fingerprint(state if saved else {}),
    }
    return network.to(process.device), saved, recorded


class Detector:
    """Faster R-CNN, its four losses and SGD. recorded: further entries of its checkpoints."""

    def __init__(self, args, network: FasterRCNN, process: launch.Process, recorded: dict):
        self.network = network
        self.recorded = recorded
        self.wrapped = launch.parallel(network, process)
        self.precision = Precision(args.amp, process.device)
        kind = nn.modules.batchnorm._BatchNorm
        layers = [module for module in network.modules() if isinstance(module, kind)]
        of_norms = {id(param) for layer in layers for param in layer.parameters()}
        groups = []
        # Batch-norm has no weight decay, as in detectron2.
        for is_norm, decay in ((False, args.weight_decay), (True, 0)):
            params = [p for p in network.parameters() if (id(p) in of_norms) == is_norm]
            if params:
                groups.append({"params": params, "weight_decay": decay})
        self.optimizer = torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
        self.generators = {}
        if process.device.type == "cuda":  # torchvision draws proposals from PyTorch's generator
            own = torch.cuda.default_generators[process.device.index or 0]
            self.generators = {"cuda": own}

    def step(self, batch: loop.Batch) -> dict:
        """Take one step on pictures (batch.views) and their objects, difficult ones too."""
        targets = [{"boxes": thing.boxes, "labels": thing.labels} for thing in batch.target]
        with self.precision.autocast():
            losses = self.wrapped(batch.views, targets)
        loss = sum(losses.values())
        self.precision.step(loss, self.optimizer)
        return {"loss": loss, **losses}

    def state_dict(self) -> dict:
        return {"model": self.network.state_dict(), **self.recorded}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        if saved["digest"] != self.recorded["digest"]:
            raise UserError(
                f"{saved.path} started from another network ({saved['network']}): "
                "give that to --pretrained"
            )
        checkpoint.load_into(self.network, saved["model"], saved.path)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate of an iteration: steps, after a linear warm-up."""
    rate = schedule.step(args.learning_rate, at.global_step, args.milestones)
    return schedule.warmup(rate, at.global_step, args.warmup, rate * WARMUP_FROM)


def worker(args, process: launch.Process) -> None:
    if args.demo and "data" not in args.typed and process.is_main:
        demo_voc.ensure(args.data[0])
    collectives.barrier()
    folder = options.run_folder(args, args.save_path, run_name(args))
    files = loop.Files(__file__, last="current.pth", same=SAME)
    with loop.Job(args, process, folder, files) as job:
        args = job.args
        train_set, test_set = voc.open_sets(args, process.is_main)
        names = train_set.classes
        network, saved, recorded = build_network(args, len(names), process)
        method = Detector(args, network, process, {"classes": names, **recorded})
        loader = voc_batches.Loader(
            train_set,
            recipe(args, train=True),
            (args.iterations, args.checkpoint_every),
            args.batch_size // process.world_size,
            args.seed,
            process,
            inputs.reading_workers(args),
        )
        job.begin(
            loader,
            method,
            test_images=len(test_set),
            objects=sum(len(things.labels) for things in train_set.objects),
            arch=recorded["arch"],
            network=recorded["network"],
        )
        if shared := len({*train_set.paths} & {*test_set.paths}):
            job.warn(f"{shared} of the {len(test_set)} test pictures are trained on")
        for _ in job.epochs():
            method.network.train()
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
        if job.stopped:
            return
        found = detections.detect(job, test_set, recipe(args, train=False))
        if process.is_main:
            report(job, saved, detections.average_precision(test_set, found))
            if args.show:
                detections.draw(args.show, test_set, found)
                job.log.say(f"the first test pictures with detections are drawn in {args.show}")


def report(job: loop.Job, saved: checkpoint.Saved | None, values: dict) -> None:
    """Write result.json, beside which a report shows the published numbers of another detector."""
    args, recorded = job.args, job.method.recorded
    classes = values["classes"]
    width = max(map(len, classes))
    lines = [f"  {name:<{width}}  {ap:6.2f}" for name, ap in classes.items()]
    job.log.say("\n".join(["AP50 of each class", *lines]))
    origin = {"epochs": None, "seed": None, "pretrained": "none"}
    folder = "random weights"
    if saved is not None:
        origin = pretrained.origin(saved)
        folder = pretrained.name_of(saved.path)
    seed = origin["seed"]
    settings = {
        **origin,
        "seed": args.seed if seed is None else seed,
        "detection_seed": args.seed,
        "arch": f"{recorded['arch']}-FPN",
        "label": args.label or folder,
        "data": " + ".join(args.data),
        "split": args.test_split,
        "protocol": f"Faster R-CNN fine-tuned on VOC, batch-norm {args.norm}",
        "iterations": args.iterations,
        "norm": args.norm,
        "table": "feature_transform/published_detection.json",
    }
    job.log.result(**settings, **values)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
