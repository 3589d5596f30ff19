"""Add the flags that scripts share, and check them against each other."""

from __future__ import annotations

import os
import shutil

import torch

from common import UsageError, cli, launch, sets

TREES = ("folder", "imagenet", "imagenet100")
COMPARE = {  # what --preset compare sets in every train script, besides its own spellings
    "footing": "common",
    "dataset": "folder",
    "input_res": 32,
    "batch_size": 256,
    "epochs": 60,
    "weight_decay": 5e-4,
    "bn_splits": 4,
    "knn_every": 5,
    "save_freq": 60,
}
PHOTOS = {  # the same for --preset photos, one's own 40 to a few thousand; queues hold one batch
    "footing": "common",
    "dataset": "folder",
    "input_res": 96,
    "batch_size": 32,
    "epochs": 200,
    "weight_decay": 1e-4,
    "bn_splits": 2,
    "knn_every": 0,  # it needs classes
    "save_freq": 50,
}
SMALL_STEM = (
    "use a 3x3 first convolution and no max-pooling, for small pictures; resnet18-small has its own"
)
WHOLE_UP_TO = 96  # pixels of an input; evaluations of larger ones cut the centre, as published
NO_DATA = "no data: give --data_folder, a tree with train/CLASS/*, or --demo for built-in pictures"


def add_data_arguments(
    group,
    trees: tuple[str, ...] = TREES,
    default: str = "folder",
    workers: int = 32,
    also: tuple[str, ...] = (),
) -> None:
    """Add the flags that name the data set and say how it is read.

    trees: values of --dataset that mean class folders; some published flags distinguish ImageNet
    from ImageNet-100. workers: the published default. also: further published names of
    torchvision's sets.
    """
    add = group.add_argument
    text = (
        f"{', '.join(trees)}: class folders; packed: by preprocess/pack.py; "
        "otherwise a torchvision set below DATA, downloaded if missing"
    )
    names = [*trees, "packed", *sets.TORCHVISION_SETS, *also]
    add("--dataset", choices=names, default=default, help=text)
    add("--class-list", metavar="FILE", help="use only the class folders in FILE, one per line")
    text = "side of the network's input, pixels; an evaluation defaults to the pre-training's"
    add("--input-res", type=cli.positive_int, default=224, help=text)
    text = (
        "shorter side to which an evaluation resizes a picture before it cuts the centre; "
        f"default: up to {WHOLE_UP_TO} pixels --input-res (the whole picture), above 256/224 of it"
    )
    add("--eval-resize", type=cli.positive_int, metavar="PIXELS", help=text)
    add("--skip-bad-images", action="store_true", help="replace unreadable pictures and count them")
    group.set_defaults(workers=workers)


def add_sgd_arguments(group, lr_help: str = "not scaled with the batch", **defaults) -> None:
    """Add the flags of batch size, SGD and a step schedule, as most published scripts spell them.

    lr_help: the help text of the learning rate.
    """
    add = group.add_argument
    add("--epochs", type=cli.positive_int, default=240, help="total number of epochs")
    add("-b", "--batch_size", type=cli.positive_int, default=128, help="global, over all processes")
    add("--learning_rate", "--lr", type=cli.positive, default=0.03, help=lr_help)
    text = "numbers of complete epochs after which the rate drops"
    add("--lr_decay_epochs", default="120,160,200", help=text)
    add("--lr_decay_rate", type=cli.positive, default=0.1, help="factor of each drop")
    add("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=cli.not_negative, default=1e-4, help="weight decay")
    group.set_defaults(**defaults)


def add_run_arguments(
    group, save_freq: int | None = 10, tb_path: bool = False, seed: int | None = None
) -> None:
    """Add the flags of progress, checkpoints, resume and seed.

    save_freq: the published default; None means no numbered checkpoints. tb_path: whether to add
    --tb_path, as some published scripts have it. seed: the published default.
    """
    add = group.add_argument
    if tb_path:
        add("--tb_path", help="folder for TensorBoard events; default: the run folder")
    text = "steps between progress lines"
    add("-p", "--print-freq", type=cli.positive_int, default=10, help=text)
    if save_freq:
        text = "epochs between the checkpoints that are kept"
        add("--save-freq", type=cli.positive_int, default=save_freq, help=text)
    text = (
        "epochs from one saving for --resume to the next; more than 1 saves time where an epoch "
        "takes seconds (a run that is stopped by a signal is always saved)"
    )
    add("--last-every", type=cli.positive_int, default=1, help=text)
    text = "stop after EPOCHS epochs in all; --resume auto continues"
    add("--stop-after", type=cli.positive_int, metavar="EPOCHS", help=text)
    text = "checkpoint to continue from; auto: the newest in the run folder"
    add("--resume", default="", metavar="PATH|auto", help=text)
    text = "start over in a folder that already holds checkpoints"
    add("--overwrite", action="store_true", help=text)
    text = "random seed; default: drawn and recorded" if seed is None else "random seed"
    add("--seed", type=cli.seed, default=seed, help=text)


def add_init_argument(group) -> None:
    """Add --init."""
    text = (
        "start from the backbone of a pre-training of any of the papers: a checkpoint, a run "
        "folder or a name in results/weights; the head, the memory and the schedule are fresh"
    )
    group.add_argument("--init", metavar="PATH", default="", help=text)


def add_linear_sgd_arguments(group, lr_help: str, **defaults) -> None:
    """Add the flags of `add_sgd_arguments` with the usual defaults of a linear evaluation."""
    usual = {
        "epochs": 60,
        "batch_size": 256,
        "learning_rate": 0.1,
        "lr_decay_epochs": "30,40,50",
        "lr_decay_rate": 0.2,
        "weight_decay": 0.0,
    }
    add_sgd_arguments(group, lr_help, **usual | defaults)


def add_linear_run_arguments(parser, save_path: str, save_freq: int | None = 5) -> None:
    """Add --save_path with this default, and the run flags of a linear evaluation."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--save_path", "--out", default=save_path, help="parent of the run folder")
    add_name_argument(group)
    add_run_arguments(group, save_freq, tb_path=True)
    add("--label", help="name of the run in a report; default: derived from its settings")


def add_name_argument(
    group, default: str = "as published, and the seed where one is typed"
) -> None:
    """Add --name, the name of the run folder below the folder that the published flag gives."""
    add = group.add_argument
    text = f"name of the run folder; default: {default}"
    add("--name", type=cli.folder_name, help=text)


def add_knn_arguments(group, optional: bool = False) -> None:
    """Add --knn-k and --knn-t. optional: whether 0 neighbours mean no k-NN."""
    add = group.add_argument
    text = "number of neighbours for k-NN" + ("; 0: no k-NN" if optional else "")
    add("--knn-k", type=cli.count if optional else cli.positive_int, default=200, help=text)
    text = "temperature of k-NN's votes: a lower one counts the nearest neighbours for more"
    add("--knn-t", type=cli.positive, default=0.07, help=text)


def add_monitor_arguments(group, negatives: str = "of all its negatives") -> None:
    """Add the flags that monitor pre-training: k-NN, a sheet of views, scores.

    negatives: says in the help which negatives of a query the scores describe.
    """
    add = group.add_argument
    add("--knn-every", type=cli.count, default=0, help="epochs between k-NN evaluations; 0: never")
    text = (
        "root of a labelled tree or pack for k-NN, if DATA has no labels or another set is wanted"
    )
    add("--knn-data", metavar="DATA", help=text)
    add_knn_arguments(group)
    text = "draw the first batch as the networks see it, then exit; FILE: .png, .pdf or .svg"
    add("--show-views", type=cli.figure_path, metavar="FILE", help=text)
    text = (
        "write scores/score_EPOCH.npy: statistics of each query's positive and negative "
        f"scores, {negatives}"
    )
    add("--save_score", action="store_true", help=text)


def add_hardware_arguments(
    parser, opt_level: bool = False, apex: bool = False, compile: bool = False
) -> None:
    """Add the flags of processes, devices, data reading and precision, spelled as published.

    opt_level: whether to add --opt-level. apex: whether to add --amp-backend, for a training.
    compile: whether to add --compile.
    """
    group = parser.add_argument_group("hardware")
    add = group.add_argument
    text = "start one process per GPU (or --nproc processes)"
    add("--multiprocessing-distributed", action="store_true", help=text)
    text = "number of nodes (computers) with --multiprocessing-distributed, otherwise of processes"
    add("--world-size", type=int, default=-1, help=text)
    text = (
        "which of the nodes (computers) this is, counted from 0, with "
        "--multiprocessing-distributed; otherwise which of the processes; on one node: omit it"
    )
    add("--rank", type=int, default=-1, help=text)
    text = "address where processes meet, such as tcp://10.0.0.1:10001; not needed on one node"
    add("--dist-url", help=text)
    text = "default: nccl on GPUs, gloo without; with gloo, processes may share a GPU"
    add("--dist-backend", choices=["nccl", "gloo"], help=text)
    text = "number of processes on this node; default: one per GPU, or one"
    add("--nproc", type=cli.positive_int, help=text)
    add("--gpu", type=int, help="use only the GPU with this number")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device to compute on")
    text = (
        "device: keep all pictures (of one size) in device memory as uint8; host: workers "
        "decode them; auto: device if they fit"
    )
    add("--data-device", choices=["auto", "host", "device"], default="auto", help=text)
    text = "worker processes per node that read pictures, at most one per core"
    add(
        "-j",
        "--workers",
        "--num-workers",
        type=cli.count,
        default=parser.get_default("workers") or 32,
        help=text,
    )
    _add_precision_arguments(add, opt_level or apex, apex)
    if compile:
        add(
            "--compile",
            action="store_true",
            help="torch.compile the encoders, and on a GPU the views",
        )


def _add_precision_arguments(add, opt_level: bool, apex: bool) -> None:
    """Add --amp, and the flags of NVIDIA apex that are asked for."""
    text = (
        "autocast of the encoder: bfloat16, or float16 on old GPUs; --amp alone means on; "
        "auto: on, except that on a CPU a training times both ways first, and an evaluation "
        "without one computes in float32"
    )
    add(
        "--amp",
        type=cli.switch,
        nargs="?",
        const="on",
        default=False,
        metavar="on|off|auto",
        help=text,
    )
    if opt_level:
        text = "level of apex; with torch's own --amp, both mean autocast with float32 weights"
        add("--opt-level", choices=["O1", "O2"], default="O2", help=text)
    if apex:
        text = "implementation of --amp"
        add("--amp-backend", choices=["torch", "apex"], default="torch", help=text)


def check(args) -> None:
    """Check the shared flags against each other, after parsing.

    With --demo, a run in the default folder may be overwritten. Raises UsageError.
    """
    _recognise(args)
    # A lone --opt-level is ignored, as in the published code.
    if "amp_backend" in args.typed and not args.amp:
        raise UsageError(
            f"--amp-backend {args.amp_backend} needs --amp: add --amp, or omit the flag"
        )
    if getattr(args, "amp_backend", "torch") == "apex" and args.opt_level != "O1":
        raise UsageError(
            f"--amp-backend apex needs --opt-level O1: with {args.opt_level}, apex replaces the "
            "network's forward, and a key network, its copy, would compute with the query's weights"
        )
    if "knn_data" in args.typed and not args.knn_every:
        raise UsageError(f"--knn-data {args.knn_data} needs --knn-every: add it, or omit the flag")
    if getattr(args, "compile", False):
        _check_compiler(args)
    names = ("save_path", "ckpt_path", "model_path")
    own_folder = next(name for name in names if name in vars(args))
    if args.demo and not args.typed & {own_folder, "name"} and not args.resume:
        args.overwrite = True


def _recognise(args) -> None:
    """Read DATA as a tree or as a pack where it is one, though --dataset is a set to download.

    The published default of some scripts is such a set. A typed --dataset stays.
    """
    name = (getattr(args, "dataset", None) or "").removesuffix("_2views")
    if args.data is None or "dataset" in args.typed or name not in sets.TORCHVISION_SETS:
        return
    kind = sets.kind_of(args.data, name)
    if kind:
        args.dataset = kind


def _check_compiler(args) -> None:
    """Raise UsageError where torch.compile would lack its compiler: of C++, or of C for a GPU."""
    language, variable, usual = "C++", "CXX", "g++"
    if args.device != "cpu" and torch.cuda.is_available():
        language, variable, usual = "C", "CC", "gcc"
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        raise UsageError(
            f"--compile needs a {language} compiler, and there is no {compiler} here: install one, "
            f"name another in the environment variable {variable}, or omit the flag"
        )


def check_batch(args, process: launch.Process) -> None:
    """Raise UsageError unless the batch divides evenly among the processes."""
    if args.batch_size % process.world_size:
        raise UsageError(
            f"--batch_size {args.batch_size} must be a multiple of the number of processes, "
            f"{process.world_size}"
        )


def long_queue(flag: str, length: int, n: int) -> str:
    """Return a warning for a queue of at least n keys. flag: sets its length. n: of pictures."""
    return (
        f"the queue ({flag} {length}) is {length / n:.1f} times as long as the data set ({n} "
        "images): a picture's own earlier keys are among its negatives; use fewer"
    )


def many_draws(flag: str, count: int, n: int, way_out: str = "") -> str:
    """Return a warning for at least n draws per anchor from a bank of n pictures.

    way_out: what else keeps a picture from being drawn as its own negative.
    """
    return (
        f"{flag} {count} draws at least as many negatives as there are images ({n}): each is "
        f"drawn repeatedly; use fewer{way_out}"
    )


def run_folder(args, parent: str, published: str) -> str:
    """Return PARENT/NAME from --name, or the published name with the seed if one was typed.

    Jobs that differ only in the seed then have a folder each.
    """
    return os.path.join(parent, args.name or published + seed_suffix(args))


def seed_suffix(args) -> str:
    """Return the suffix that a typed seed adds to the name of a run folder."""
    return f"_seed_{args.seed}" if "seed" in args.typed else ""


def events(args, folder: str) -> bool | str:
    """Return the folder of TensorBoard events below --tb_path, or True for the run folder."""
    if not args.tb_path:
        return True
    return os.path.join(args.tb_path, os.path.basename(folder))
