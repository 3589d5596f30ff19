"""The data flags that every script has, and what they open."""

from __future__ import annotations

from common import cli, data, processes, sets
from common.sets import TORCHVISION_SETS


def add_data_arguments(group, trees: tuple[str, ...] = ("folder",), default: str = "folder", workers: int = 32) -> None:
    """trees: the values of --dataset that all mean class folders; published flags name ImageNet apart from ImageNet-100.

    workers: the published default.
    """
    group.add_argument("--dataset", choices=[*trees, "packed", *TORCHVISION_SETS], default=default,
                       help=f"{', '.join(trees)}: class folders; packed: written by preprocess/pack.py; "
                       "else a torchvision set below DATA, downloaded if missing")  # fmt: skip
    group.add_argument("--class-list", default=None, metavar="FILE", help="use these class folders only, one name a line "
                       "(ImageNet with the ImageNet-100 list)")  # fmt: skip
    group.add_argument("--input-res", type=cli.positive_int, default=224, help="side of the network's input, pixels")
    group.add_argument("--data-device", choices=["auto", "host", "device"], default="auto",
                       help="device: all pictures in memory as uint8 (one size only); host: workers decode them; "
                       "auto: device where they fit")  # fmt: skip
    group.add_argument("--skip-bad-images", action="store_true", help="replace unreadable pictures and count them")
    group.add_argument("-j", "--workers", "--num-workers", type=int, default=workers,
                       help="processes per node that read pictures; at most one per core is started")  # fmt: skip


def open_split(args, split: str, classes: list[str] | None = None) -> sets.PictureSet:
    """The split ("train", "val") of the data set that the flags name. classes: class order that it must have."""
    dataset = args.dataset if args.dataset in ("packed", *TORCHVISION_SETS) else "folder"
    if dataset in TORCHVISION_SETS:  # one process fetches, the others find it there
        if processes.rank() == 0:
            sets.open_set(args.data, split, dataset=dataset)
        processes.barrier()
    return sets.open_set(args.data, split, dataset=dataset, class_list=args.class_list, classes=classes)


def make_loader(args, process: processes.Process, dataset, views, batch: int, seed: int, **how) -> data.Loader:
    """A loader of `batch` pictures per process that reads as the flags say; `how`: what else data.Loader takes."""
    return data.Loader(
        dataset, views, batch, device=process.device, seed=seed, rank=process.rank,
        world_size=process.world_size, workers=workers_per_process(args), data_device=args.data_device,
        skip_bad=args.skip_bad_images, **how,
    )  # fmt: skip


def open_pretraining(args) -> sets.PictureSet:
    """What is pre-trained on: train/, and for STL-10 its 100,000 unlabelled pictures as well."""
    return open_split(args, "train+unlabeled" if args.dataset == "stl10" else "train")


def workers_per_process(args) -> int:
    """--workers of this node, divided over its processes, at most one per core."""
    here = processes.processes_here()
    return -(-min(args.workers, processes.cores()) // here)


def eval_resize(input_res: int) -> int:
    """Shorter side before the centre crop: 256 for 224, in proportion elsewhere."""
    return round(input_res * 256 / 224)
