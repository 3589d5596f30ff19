"""Open the data that the flags name, as loaders of views; the views of evaluations."""

from __future__ import annotations

from common import augment, collectives, data, launch, sets
from common.options import WHOLE_UP_TO


def open_split(args, split: str, classes: list[str] | None = None, **options) -> sets.PictureSet:
    """Open the split ("train", "val") of the data set that the flags name.

    classes: class names in label order, which the split must have. options: passed to
    sets.open_set.
    """
    dataset = args.dataset
    if dataset not in ("packed", *sets.TORCHVISION_SETS):
        dataset = "folder"
    if dataset in sets.TORCHVISION_SETS:  # rank 0 downloads the set, the others wait
        if collectives.rank() == 0:
            sets.open_set(args.data, split, dataset=dataset)
        collectives.barrier()
    return sets.open_set(
        args.data,
        split,
        dataset=dataset,
        class_list=args.class_list,
        classes=classes,
        **options,
    )


def open_pretraining(args) -> sets.PictureSet:
    """Open the training pictures, labelled or not; for STL-10 with its 100,000 unlabelled ones."""
    split = "train+unlabeled" if args.dataset == "stl10" else "train"
    return open_split(args, split, unlabelled=True)


def reading_workers(args) -> int:
    """Return the workers per process; --workers counts those of a node, at most one per core."""
    return -(-min(args.workers, launch.cores()) // launch.here)


def make_loader(
    args,
    process: launch.Process,
    pictures: sets.PictureSet,
    views: tuple[augment.Compose, ...],
    batch_size: int | None = None,
    **options,
) -> data.Loader:
    """Return a loader with the settings of the flags.

    batch_size: pictures per process; default: the share of --batch-size. options: arguments of
    data.Loader, which replace those of the flags.
    """
    settings = {
        "device": process.device,
        "seed": getattr(args, "seed", 0),
        "rank": process.rank,
        "world_size": process.world_size,
        "workers": reading_workers(args),
        "data_device": args.data_device,
        "skip_bad": args.skip_bad_images,
        # On a CPU it costs more to change all pictures than to choose some.
        "compile": getattr(args, "compile", False) and process.device.type == "cuda",
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
    """Return a loader that yields every picture once, in order. batch_size: per process."""
    fixed = {"seed": 0, "shuffle": False, "drop_last": False, "compile": False}
    return make_loader(args, process, pictures, (view,), batch_size, **fixed | options)


def eval_resize(input_res: int) -> int:
    """Return the shorter side of a picture before an evaluation cuts its centre.

    It is 256 for 224, in proportion for other sides, and `input_res` itself up to WHOLE_UP_TO.
    """
    return input_res if input_res <= WHOLE_UP_TO else round(input_res * 256 / 224)


def plain_view(args, *operations, side: int | None = None) -> augment.Compose:
    """Return the view of every evaluation: resize, cut the centre, then `operations`.

    side: side of the input in pixels; default: --input-res.
    """
    side = side or args.input_res
    geometry = augment.ResizeCenterCrop(args.eval_resize or eval_resize(side), side)
    return augment.Compose(geometry, *operations)
