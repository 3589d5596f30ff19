"""Flags that several scripts share, the checks between them, and what the data flags open."""

from __future__ import annotations

import os

from common import UsageError, augment, cli, data, launch, sets

TREES = ("folder", "imagenet", "imagenet100")
SMALL_STEM = "3x3 first convolution, no max-pool: for small pictures"
NO_DATA = "no data: give --data_folder, a tree with train/CLASS/*, or --demo for built-in pictures"


def add_data_arguments(
    group, trees: tuple[str, ...] = TREES, default: str = "folder", workers: int = 32
) -> None:
    """Add which pictures there are and how they are read.

    trees: the values of --dataset that mean class folders; published flags name ImageNet apart from
    ImageNet-100. workers: the published default.
    """
    add = group.add_argument
    add(
        "--dataset",
        choices=[*trees, "packed", *sets.TORCHVISION_SETS],
        default=default,
        help=f"{', '.join(trees)}: class folders; packed: by preprocess/pack.py; "
        "else a torchvision set below DATA, downloaded if missing",
    )
    add("--class-list", metavar="FILE", help="use these class folders only, one name a line")
    add(
        "--input-res",
        type=cli.positive_int,
        default=224,
        help="side of the network's input, pixels",
    )
    add("--skip-bad-images", action="store_true", help="replace unreadable pictures and count them")
    group.set_defaults(workers=workers)


def add_sgd_arguments(group, lr_help: str = "not scaled with the batch", **defaults) -> None:
    """Add batch, SGD and a schedule of steps, spelled as most published scripts do.

    lr_help: what --help says of the learning rate.
    """
    add = group.add_argument
    add("--epochs", type=cli.positive_int, default=240, help="epochs to run in all, counted from 1")
    add("-b", "--batch_size", type=cli.positive_int, default=128, help="global, over all processes")
    add("--learning_rate", "--lr", type=cli.positive, default=0.03, help=lr_help)
    add(
        "--lr_decay_epochs",
        default="120,160,200",
        help="complete epochs after which the rate drops",
    )
    add("--lr_decay_rate", type=cli.positive, default=0.1, help="factor of each drop")
    add("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    add("--weight_decay", type=cli.not_negative, default=1e-4, help="weight decay")
    group.set_defaults(**defaults)


def add_run_arguments(group, save_freq: int | None = 10, tb_path: bool = False) -> None:
    """Add progress, checkpoints, resume and seed.

    save_freq: the published default; None: there are no numbered checkpoints. tb_path: whether
    events may go to another folder, as some published scripts have it.
    """
    add = group.add_argument
    if tb_path:
        add("--tb_path", help="TensorBoard events go below here; default: into the run folder")
    add(
        "-p", "--print-freq", type=cli.positive_int, default=10, help="steps between progress lines"
    )
    if save_freq:
        add(
            "--save-freq",
            type=cli.positive_int,
            default=save_freq,
            help="epochs per kept checkpoint",
        )
    add(
        "--last-every",
        type=cli.positive_int,
        default=1,
        help="epochs between saves of the newest state, for epochs of seconds; "
        "a stopped run is always saved",
    )
    add(
        "--stop-after",
        type=cli.positive_int,
        metavar="EPOCHS",
        help="end after so many epochs of the schedule; --resume auto continues",
    )
    add(
        "--resume",
        default="",
        metavar="PATH|auto",
        help="checkpoint to continue; auto: the newest in the run folder",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start over in a folder that already holds checkpoints",
    )
    add("--seed", type=cli.seed, help="seed of everything random; drawn and recorded if not given")


def add_linear_sgd_arguments(group, lr_help: str, **defaults) -> None:
    """Add batch, SGD and a schedule of steps with the usual values of a linear evaluation."""
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
    """Add the folder of a linear evaluation, progress, resume and seed. save_path: the default."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--save_path", "--out", default=save_path, help="the run gets a folder of its own in here")
    add_name_argument(group)
    add_run_arguments(group, save_freq, tb_path=True)
    add("--label", help="name of the run in a report; default: made of its settings")


def add_name_argument(
    group, default: str = "as published, and the seed where one is typed"
) -> None:
    """Add --name, of the run's folder below the folder that the published flag gives."""
    add = group.add_argument
    add(
        "--name",
        type=cli.folder_name,
        help=f"name of the run's folder in there; default: {default}",
    )


def add_monitor_arguments(group, negatives: str = "of all its negatives") -> None:
    """Add ways to look at a pre-training: k-NN, a sheet of its views, its scores.

    negatives: which of a query's negatives the scores are of.
    """
    add = group.add_argument
    add("--knn-every", type=cli.count, default=0, help="epochs between k-NN evaluations; 0: never")
    add(
        "--knn-data",
        metavar="DATA",
        help="root of a tree or pack for that evaluation, where DATA has no labels or is "
        "another set",
    )
    add("--knn-k", type=cli.positive_int, default=200, help="neighbours in that evaluation")
    add(
        "--show-views",
        metavar="FILE.png",
        help="draw the first batch as the networks see it, and end",
    )
    add(
        "--save_score",
        action="store_true",
        help="write scores/score_EPOCH.npy: statistics of each query's positive and negative "
        f"scores, {negatives}",
    )


def add_hardware_arguments(parser, apex: bool = False, compile: bool = False) -> None:
    """Add processes, devices, reading and precision, as in the published launch code.

    apex: with the flags of NVIDIA apex. compile: with --compile.
    """
    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add(
        "--multiprocessing-distributed",
        action="store_true",
        help="one process per GPU (or --nproc)",
    )
    add("--world-size", type=int, default=-1, help="nodes (with the flag above), else processes")
    add(
        "--rank",
        type=int,
        default=-1,
        help="number of this node (with the flag above), else of this process",
    )
    add("--dist-url", help="where processes meet, e.g. tcp://10.0.0.1:10001; one node needs none")
    add("--dist-backend", choices=["nccl", "gloo"], help="default: nccl on GPUs, gloo without")
    add("--nproc", type=cli.positive_int, help="processes here; default: one per GPU, or one")
    add("--gpu", type=int, help="use this GPU only")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add(
        "--data-device",
        choices=["auto", "host", "device"],
        default="auto",
        help="device: all pictures in memory as uint8 (one size only); host: workers decode them; "
        "auto: device where they fit",
    )
    add(
        "-j",
        "--workers",
        "--num-workers",
        type=cli.count,
        default=parser.get_default("workers") or 32,
        help="processes per node that read pictures; at most one per core is started",
    )
    add(
        "--amp",
        type=cli.switch,
        nargs="?",
        const="on",
        default=False,
        metavar="on|off|auto",
        help="autocast of the encoder: bfloat16, or float16 on old GPUs; alone it means on; "
        "auto: on but on a CPU, where both ways are timed at the start",
    )
    if apex:
        add(
            "--opt-level",
            choices=["O1", "O2"],
            default="O2",
            help="apex's level; with torch's own --amp both mean autocast with float32 weights",
        )
        add("--amp-backend", choices=["torch", "apex"], default="torch", help="who does --amp")
    if compile:
        add("--compile", action="store_true", help="torch.compile the encoders")


def check(args) -> None:
    """Check the flags above against each other, after parsing.

    With --demo, its own folder may be written over. Raises UsageError.
    """
    # A lone --opt-level is passed over, as published.
    if "amp_backend" in args.typed and not args.amp:
        raise UsageError(f"--amp-backend {args.amp_backend} belongs to --amp; add that, or omit it")
    if "knn_data" in args.typed and not args.knn_every:
        raise UsageError(f"--knn-data {args.knn_data} belongs to --knn-every; add that, or omit it")
    names = ("save_path", "ckpt_path", "model_path")
    own_folder = next(name for name in names if name in vars(args))
    if args.demo and not args.typed & {own_folder, "name"} and not args.resume:
        args.overwrite = True


def check_batch(args, process: launch.Process) -> None:
    """Raise UsageError unless every process gets an equal share of the batch."""
    if args.batch_size % process.world_size:
        raise UsageError(
            f"--batch_size {args.batch_size} must be a multiple of the "
            f"{process.world_size} processes"
        )


def run_folder(args, parent: str, published: str) -> str:
    """Return PARENT/NAME as --name says, else the published name with the seed where one is typed.

    So an array of jobs over seeds has a folder for each.
    """
    return os.path.join(parent, args.name or published + seed_suffix(args))


def seed_suffix(args) -> str:
    """Return what the seed adds to the name of a run's folder."""
    return f"_seed_{args.seed}" if "seed" in args.typed else ""


def events(args, folder: str) -> bool | str:
    """Return where TensorBoard events go: below --tb_path, or into the run folder (True)."""
    if not args.tb_path:
        return True
    return os.path.join(args.tb_path, os.path.basename(folder))


# --------------------------------------------------------------------- what the data flags open


def open_split(args, split: str, classes: list[str] | None = None, **options) -> sets.PictureSet:
    """Open the split ("train", "val") of the data set that the flags name.

    classes: the order of classes that it must have. options: passed on to sets.open_set.
    """
    dataset = args.dataset
    if dataset not in ("packed", *sets.TORCHVISION_SETS):
        dataset = "folder"
    if dataset in sets.TORCHVISION_SETS:  # one process fetches it, the others find it there
        if launch.rank() == 0:
            sets.open_set(args.data, split, dataset=dataset)
        launch.barrier()
    return sets.open_set(
        args.data,
        split,
        dataset=dataset,
        class_list=args.class_list,
        classes=classes,
        **options,
    )


def open_pretraining(args) -> sets.PictureSet:
    """Open the training pictures, labelled or not; of STL-10 also its 100,000 unlabelled ones."""
    split = "train+unlabeled" if args.dataset == "stl10" else "train"
    return open_split(args, split, unlabelled=True)


def reading_workers(args) -> int:
    """Return the workers of one process; --workers are of the node, at most one a core."""
    return -(-min(args.workers, launch.cores()) // launch.here)


def make_loader(
    args,
    process: launch.Process,
    pictures: sets.PictureSet,
    views: tuple[augment.Compose, ...],
    batch_size: int | None = None,
    **options,
) -> data.Loader:
    """Return a loader that reads as the flags say.

    batch_size: pictures per process; default: the share of --batch-size. options: further ones of
    data.Loader, or others than those of the flags.
    """
    settings = {
        "device": process.device,
        "seed": getattr(args, "seed", 0),
        "rank": process.rank,
        "world_size": process.world_size,
        "workers": reading_workers(args),
        "data_device": args.data_device,
        "skip_bad": args.skip_bad_images,
    }
    batch_size = batch_size or args.batch_size // process.world_size
    return data.Loader(pictures, views, batch_size, **settings | options)


def evaluation_loader(
    args,
    process: launch.Process,
    pictures: sets.PictureSet,
    view: augment.Compose,
    batch_size: int | None = None,
    **options,
) -> data.Loader:
    """Return a loader of every picture once, in order, under one view. batch_size: per process."""
    fixed = {"seed": 0, "shuffle": False, "drop_last": False}
    return make_loader(args, process, pictures, (view,), batch_size, **fixed | options)


def eval_resize(input_res: int) -> int:
    """Return the shorter side before the centre crop: 256 for 224, in proportion elsewhere."""
    return round(input_res * 256 / 224)


def plain_view(args, *colours) -> augment.Compose:
    """Return the view of an evaluation: shorter side resized, centre crop, then `colours`."""
    geometry = augment.ResizeCenterCrop(eval_resize(args.input_res), args.input_res)
    return augment.Compose(geometry, *colours)
