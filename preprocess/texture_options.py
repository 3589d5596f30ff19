"""The flags of texture synthesis, and the settings that they give."""

from __future__ import annotations

from common import UsageError, cli
from preprocess import texture_mrs, texture_quilt, workers
from preprocess.texture_engines import BLOCK, ENGINES, OVERLAP, PATCH, SIDE, Settings


def add_data_arguments(group) -> None:
    """Add the two trees, and which pictures are taken."""
    group.add_argument(
        "--imagenet_path", metavar="A", help="tree of pictures: train/CLASS/*, val/CLASS/*"
    )
    group.add_argument(
        "--imagenet_t_path", metavar="B", help="tree to make, or one that an earlier run began"
    )
    group.add_argument(
        "--splits", nargs="+", choices=("train", "val"), help="(default: those that A has)"
    )
    group.add_argument(
        "--class-list", metavar="FILE", help="these class folders only, one name a line"
    )
    group.add_argument(
        "--limit", type=cli.positive_int, metavar="N", help="only the first N pictures, for a look"
    )
    group.add_argument(
        "--sheet",
        metavar="PNG",
        help="make no tree, but a contact sheet of up to 20 pictures, evenly taken, "
        "each beside its textures (mrs, quilt, and embark where it is installed)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="make textures that are there again"
    )


def add_texture_arguments(parser) -> None:
    """Add the engine and its options."""
    group = parser.add_argument_group("texture")
    group.add_argument("--engine", choices=ENGINES, default="mrs")
    group.add_argument(
        "--size", type=cli.positive_int, default=SIDE, help="side of the textures, pixels"
    )
    group.add_argument(
        "--patch",
        type=cli.positive_int,
        metavar="P",
        help="side of the two patches, pixels of the picture as it is "
        f"(default {PATCH} of {SIDE}, in proportion)",
    )
    group.add_argument("--seed", type=cli.count, default=0)
    group = parser.add_argument_group("texture, engines mrs and embark")
    _add_mrs_arguments(group, parser.add_argument_group("texture, engine mrs"))
    group = parser.add_argument_group("texture, engine quilt")
    group.add_argument(
        "--block",
        type=cli.positive_int,
        metavar="P",
        help=f"side of a block, pixels (default {BLOCK} for patches of {PATCH}, in proportion)",
    )
    group.add_argument(
        "--overlap",
        type=cli.positive_int,
        metavar="P",
        help=f"overlap of blocks, pixels (default {OVERLAP} for blocks of {BLOCK}, in proportion)",
    )


def _add_mrs_arguments(shared, own) -> None:
    """Add the flags that embark has, too, to the group `shared`, and the others to `own`."""
    default = texture_mrs.Options()
    shared.add_argument(
        "--k-neighs",
        type=cli.positive_int,
        default=default.k_neighs,
        help="neighbours of a pixel compared",
    )
    shared.add_argument(
        "--m-rand", type=cli.count, default=default.m_rand, help="random candidates of a pixel"
    )
    shared.add_argument(
        "--cauchy", type=cli.positive, default=default.cauchy, help="dispersion of the cost"
    )
    shared.add_argument(
        "--backtrack-pct",
        type=_open_fraction,
        default=default.backtrack_pct,
        help="growth of the stages",
    )
    shared.add_argument(
        "--backtrack-stages",
        type=cli.count,
        default=default.backtrack_stages,
        help="stages before the last",
    )
    own.add_argument(
        "--shortlist",
        type=cli.count,
        default=default.shortlist,
        metavar="N",
        help="candidates compared on all neighbours; 0: all of them, as the original, slower",
    )
    own.add_argument(
        "--glance",
        type=cli.positive_int,
        default=default.glance,
        metavar="N",
        help="nearest neighbours on which that shortlist is chosen",
    )


def add_run_arguments(group) -> None:
    """Add the device, and how the work is divided."""
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU where there is one",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=cli.positive_int,
        metavar="N",
        help="processes of one thread each (one per core); on a GPU: reading and writing threads",
    )
    group.add_argument(
        "--batch",
        type=cli.positive_int,
        metavar="N",
        help="pictures at a time (GPU 64; mrs 1, quilt 8)",
    )
    group.add_argument(
        "--shard",
        type=workers.shard,
        default=(1, 1),
        metavar="I/N",
        help="do part I of N, 1/N to N/N: one per machine (default 1/1)",
    )


def _open_fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


_open_fraction.__name__ = "number between 0 and 1"


def with_sizes(args) -> cli.Flags:
    """Return the flags with the sizes that were not typed, in proportion to those that were.

    Raises UsageError where the sizes do not go together.
    """
    patch = args.patch
    if patch is None:
        patch = max(2, round(PATCH * min(args.size, SIDE) / SIDE))
    block = args.block
    if block is None:
        block = max(min(2, patch), round(BLOCK * patch / PATCH))
    overlap = args.overlap
    if overlap is None:
        overlap = max(1, round(OVERLAP * block / BLOCK))
    if patch < block and (args.engine == "quilt" or args.sheet):
        raise UsageError(f"--patch {patch} is smaller than a block: --block is {block}")
    if 2 * overlap > block:
        raise UsageError(f"--overlap {overlap} is more than half of --block {block}")
    in_proportion = args.patch is None
    return cli.replace(args, patch=patch, block=block, overlap=overlap, in_proportion=in_proportion)


def settings_of(args, engine: str | None = None) -> Settings:
    """Return the settings that the flags give. engine: instead of the one of --engine."""
    mrs = {name: getattr(args, name) for name in texture_mrs.Options.__dataclass_fields__}
    return Settings(
        engine or args.engine,
        args.size,
        args.patch,
        args.seed,
        texture_mrs.Options(**mrs),
        texture_quilt.Options(block=args.block, overlap=args.overlap),
        args.in_proportion,
    )
