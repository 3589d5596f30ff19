"""Flags that several scripts share, the checks between them, and what the data flags open."""

from __future__ import annotations

import os

from common import UsageError, cli, crops, data, processes, sets


def add_data_arguments(
    group, trees: tuple[str, ...] = ("folder", "imagenet", "imagenet100"), default: str = "folder", workers: int = 32
) -> None:
    """trees: the values of --dataset that all mean class folders; published flags name ImageNet apart from ImageNet-100.

    workers: the published default.
    """
    names = [*trees, "packed", *sets.TORCHVISION_SETS]
    about = f"{', '.join(trees)}: class folders; packed: by preprocess/pack.py; else a torchvision set below DATA"
    group.add_argument("--dataset", choices=names, default=default, help=f"{about}, downloaded if missing")
    group.add_argument("--class-list", metavar="FILE", help="use these class folders only, one name a line")
    group.add_argument("--input-res", type=cli.positive_int, default=224, help="side of the network's input, pixels")
    about = "device: all pictures in memory as uint8 (one size only); host: workers decode them; auto: device where they fit"
    group.add_argument("--data-device", choices=["auto", "host", "device"], default="auto", help=about)
    about = "cuda: JPEGs that workers would decode at every step are decoded on the GPU, by nvJPEG, and cut there"
    group.add_argument("--decode", choices=["cpu", "cuda"], default="cpu", help=about)
    group.add_argument("--skip-bad-images", action="store_true", help="replace unreadable pictures and count them")
    about = "processes per node that read pictures; at most one per core is started"
    group.add_argument("-j", "--workers", "--num-workers", type=cli.count, default=workers, help=about)


def add_sgd_arguments(group, about_lr: str = "not scaled with the batch", **defaults) -> None:
    """Batch, SGD and a schedule of steps, as the code published with CMC and its relatives spells them."""
    group.add_argument("--epochs", type=cli.positive_int, default=240, help="epochs to run in all, counted from 1")
    group.add_argument("-b", "--batch_size", type=cli.positive_int, default=128, help="global, over all processes")
    group.add_argument("--learning_rate", "--lr", type=cli.positive, default=0.03, help=about_lr)
    group.add_argument("--lr_decay_epochs", default="120,160,200", help="complete epochs after which the rate drops")
    group.add_argument("--lr_decay_rate", type=cli.positive, default=0.1, help="factor of each drop")
    group.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    group.add_argument("--weight_decay", type=cli.not_negative, default=1e-4, help="weight decay")
    group.set_defaults(**defaults)


def add_run_arguments(group, save_freq: int | None = 10) -> None:
    """Progress, checkpoints, resume and seed. save_freq: the published default; None: there are no numbered checkpoints."""
    group.add_argument("-p", "--print-freq", type=cli.positive_int, default=10, help="steps between progress lines")
    if save_freq:
        group.add_argument("--save-freq", type=cli.positive_int, default=save_freq, help="epochs per kept checkpoint")
    about = "epochs between saves of the newest state, for epochs of seconds; stopped runs save as ever"
    group.add_argument("--last-every", type=cli.positive_int, default=1, help=about)
    about = "end after so many epochs of the schedule; --resume auto goes on"
    group.add_argument("--stop-after", type=cli.positive_int, metavar="EPOCHS", help=about)
    group.add_argument("--resume", default="", metavar="PATH|auto", help="checkpoint to continue; auto: the newest")
    group.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds checkpoints")
    group.add_argument("--seed", type=cli.seed, help="seed of everything random; drawn and recorded if not given")


def add_name_argument(group, default: str = "as published, and the seed where one is typed") -> None:
    """--name: of the run's folder, below the folder that the published flag gives."""
    group.add_argument("--name", type=cli.folder_name, help=f"of the run's folder in there; default: {default}")


def run_folder(args, parent: str, published: str) -> str:
    """PARENT/NAME as --name says; else the published name, and the seed where one is typed: an array of jobs over seeds
    has a folder for each."""
    return os.path.join(parent, args.name or published + seed_suffix(args))


def seed_suffix(args) -> str:
    return f"_seed_{args.seed}" if "seed" in args.typed else ""


def add_monitor_arguments(group, negatives: str = "of all its negatives") -> None:
    """Looking at a pre-training: k-NN of its features, a sheet of its views, its scores. negatives: whose scores these are."""
    group.add_argument("--knn-every", type=cli.count, default=0, help="epochs between k-NN evaluations; 0: never")
    about = "root of a tree or pack for that evaluation, where DATA has no labels or is another set"
    group.add_argument("--knn-data", metavar="DATA", help=about)
    group.add_argument("--knn-k", type=cli.positive_int, default=200, help="neighbours in that evaluation")
    group.add_argument("--show-views", metavar="FILE.png", help="draw the first batch as networks see it, and end")
    about = f"write scores/score_EPOCH.npy: statistics of each query's positive and negative scores, {negatives}"
    drawn = "; feature_transform/plot_scores.py draws them"
    group.add_argument("--save_score", action="store_true", help=about + drawn)


def add_hardware_arguments(parser, apex: bool = False, compile: bool = False) -> None:
    """Processes, devices and precision, as in the published launch code. apex: with the flags of NVIDIA apex."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="one process per GPU (or --nproc)")
    group.add_argument("--world-size", type=int, default=-1, help="nodes (with the flag above), else processes")
    group.add_argument("--rank", type=int, default=-1, help="of this node (with the flag above), else process")
    group.add_argument("--dist-url", help="rendezvous, e.g. tcp://10.0.0.1:10001; one node needs none")
    group.add_argument("--dist-backend", choices=["nccl", "gloo"], help="default: nccl on GPUs, gloo without")
    group.add_argument("--nproc", type=cli.positive_int, help="processes here; default: one per GPU, or one")
    group.add_argument("--gpu", type=int, help="use this GPU only")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    group.add_argument("--amp", action="store_true", help="autocast of the encoder: bfloat16, or float16 on old GPUs")
    if apex:
        about = "apex's level; with torch's own --amp both mean autocast with float32 weights"
        group.add_argument("--opt-level", choices=["O1", "O2"], default="O2", help=about)
        group.add_argument("--amp-backend", choices=["torch", "apex"], default="torch", help="who does --amp")
    if compile:
        group.add_argument("--compile", action="store_true", help="torch.compile the encoders")


def check(args) -> None:
    """Checks between the flags above, after parsing. With --demo, its own folder may be written over."""
    if "amp_backend" in args.typed and not args.amp:  # a lone --opt-level is passed over, as published
        raise UsageError(f"--amp-backend {args.amp_backend} belongs to --amp; add that, or omit it")
    if "knn_data" in args.typed and not args.knn_every:
        raise UsageError(f"--knn-data {args.knn_data} belongs to --knn-every; add that, or omit it")
    own_folder = next(flag for flag in ("save_path", "ckpt_path", "model_path") if flag in vars(args))
    if args.demo and not args.typed & {own_folder, "name"} and not args.resume:
        args.overwrite = True


def check_batch(args, process: processes.Process) -> None:
    """UsageError unless every process gets an equal share of the batch."""
    if args.batch_size % process.world_size:
        raise UsageError(f"--batch_size {args.batch_size} must be a multiple of the {process.world_size} processes")


def open_split(args, split: str, classes: list[str] | None = None, **how) -> sets.PictureSet:
    """The split ("train", "val") of the data set that the flags name. classes: class order that it must have. `how`: what
    else sets.open_set takes."""
    dataset = args.dataset if args.dataset in ("packed", *sets.TORCHVISION_SETS) else "folder"
    if dataset in sets.TORCHVISION_SETS:  # one process fetches, the others find it there
        if processes.rank() == 0:
            sets.open_set(args.data, split, dataset=dataset)
        processes.barrier()
    return sets.open_set(args.data, split, dataset=dataset, class_list=args.class_list, classes=classes, **how)


def open_pretraining(args) -> sets.PictureSet:
    """What is pre-trained on: train/, with or without classes, and for STL-10 its 100,000 unlabelled pictures as well."""
    return open_split(args, "train+unlabeled" if args.dataset == "stl10" else "train", unlabelled=True)


def reading(args) -> int:
    """Workers of one process: --workers are of the node, at most one a core is started."""
    return -(-min(args.workers, processes.cores()) // processes.here)


def make_loader(args, process: processes.Process, pictures, views, batch_size: int | None = None, **how) -> data.Loader:
    """A loader that reads as the flags say; batch_size: pictures per process. `how`: what else data.Loader takes."""
    batch_size = batch_size or args.batch_size // process.world_size
    how = dict(seed=getattr(args, "seed", 0), rank=process.rank, world_size=process.world_size) | how
    decoder = crops.nvjpeg(process.device) if args.decode == "cuda" else None
    how |= dict(
        workers=reading(args),
        decoder=decoder,
        device=process.device,
        data_device=args.data_device,
        skip_bad=args.skip_bad_images,
    )
    return data.Loader(pictures, views, batch_size, **how)


def eval_resize(input_res: int) -> int:
    """Shorter side before the centre crop: 256 for 224, in proportion elsewhere."""
    return round(input_res * 256 / 224)
