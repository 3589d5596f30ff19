"""Add the flags of texture synthesis, and turn them into settings."""

from __future__ import annotations

from common import UsageError, cli
from preprocess import texture_mrs, texture_quilt, workers
from preprocess.texture_engines import BLOCK, ENGINES, OVERLAP, PATCH, SIDE, Settings


def add_data_arguments(group) -> None:
    """Add the flags of the two trees and of the choice of pictures."""
    group.add_argument(
        "--imagenet_path", metavar="A", help="tree of pictures: train/CLASS/*, val/CLASS/*"
    )
    group.add_argument(
        "--imagenet_t_path", metavar="B", help="output tree, new or from an earlier run"
    )
    group.add_argument(
        "--splits", nargs="+", choices=("train", "val"), help="(default: those that A has)"
    )
    group.add_argument(
        "--class-list", metavar="FILE", help="use only the class folders in FILE, one per line"
    )
    group.add_argument(
        "--limit",
        type=cli.positive_int,
        metavar="N",
        help="use only the first N pictures, for a preview",
    )
    group.add_argument(
        "--sheet",
        metavar="PNG",
        help="instead of a tree, make a contact sheet of up to 20 evenly spaced pictures, each "
        "beside its textures (mrs, quilt, and embark if installed)",
    )
    group.add_argument("--overwrite", action="store_true", help="make existing textures again")


def add_texture_arguments(parser) -> None:
    """Add the flags of the engine and its options."""
    group = parser.add_argument_group("texture")
    group.add_argument("--engine", choices=ENGINES, default="mrs")
    group.add_argument(
        "--size", type=cli.positive_int, default=SIDE, help="side of the textures in pixels"
    )
    group.add_argument(
        "--patch",
        type=cli.positive_int,
        metavar="P",
        help="side of the two patches in pixels of the original picture "
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
    """Add the flags that embark also has to the group `shared`, and the others to `own`."""
    default = texture_mrs.Options()
    shared.add_argument(
        "--k-neighs",
        type=cli.positive_int,
        default=default.k_neighs,
        help="number of neighbours of a pixel to compare",
    )
    shared.add_argument(
        "--m-rand",
        type=cli.count,
        default=default.m_rand,
        help="number of random candidates per pixel",
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
        help="number of candidates compared on all neighbours; 0: all, as in the original (slower)",
    )
    own.add_argument(
        "--glance",
        type=cli.positive_int,
        default=default.glance,
        metavar="N",
        help="number of nearest neighbours that choose the shortlist",
    )


def add_run_arguments(group) -> None:
    """Add the flags of the device and of the division of work."""
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: use a GPU if there is one",
    )
    text = "number of processes (default: one per core), or of reading threads on a GPU"
    workers.add_workers_argument(group, text)
    group.add_argument(
        "--batch",
        type=cli.positive_int,
        metavar="N",
        help="pictures per batch (default: 64 on a GPU; mrs 1, quilt 8)",
    )
    workers.add_shard_argument(group)


def _open_fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


_open_fraction.__name__ = "number between 0 and 1"


def with_sizes(args) -> cli.Flags:
    """Return the flags with missing sizes filled in, in proportion to the typed ones.

    Raises UsageError if the sizes do not fit together.
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
    is_quilted = args.engine == "quilt" or args.sheet
    if is_quilted and patch < block:
        raise UsageError(f"--patch {patch} is smaller than a block: --block is {block}")
    if (is_quilted or args.overlap) and 2 * overlap > block:
        raise UsageError(f"--overlap {overlap} is more than half of --block {block}")
    in_proportion = args.patch is None
    return cli.replace(args, patch=patch, block=block, overlap=overlap, in_proportion=in_proportion)


def settings_of(args, engine: str | None = None) -> Settings:
    """Return the settings that the flags give. engine: replaces --engine."""
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
