"""The views of CMC (Tian, Krishnan & Isola, arXiv:1906.05849): channels of a colour space.

CMC contrasts channels of one picture, such as L with ab, or Y with CbCr. The spaces, their channels
and their units are in cmc/spaces.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmc.spaces import CHANNELS, MEAN, RANGES, STD, from_rgb
from common import UsageError, UserError
from common.augment import Params

__all__ = [
    "CHANNELS", "MEAN", "RANGES", "SPACES", "SPLITS", "STD", "ToColour", "View", "Views",
    "bank_names", "chosen_views", "default_views", "from_rgb", "of_checkpoint", "parse_views",
    "space_name", "tower_names", "view_keys",
]  # fmt: skip

SPLITS = {
    "Lab": "L,ab",
    "YCbCr": "Y,CbCr",
    "HSV": "V,HS",
    "HED": "H,ED",
    "LUV": "L,uv",
    "YUV": "Y,UV",
    "XYZ": "Y,XZ",
    "YDbDr": "Y,DbDr",
    "YPbPr": "Y,PbPr",
    "YIQ": "Y,IQ",
    "RGBCIE": "G,RB",
}
SPACES = tuple(SPLITS)  # the choices of --view; the first two are the published ones
ALIASES = {"CIERGB": "RGBCIE"}


class View(NamedTuple):
    """Channels of one colour space.

    name: the spelling in --views, "ab", or "YCbCr:CbCr" where --view is another space.
    """

    name: str
    space: str
    channels: tuple[int, ...]


def space_name(text: str) -> str:
    """Return the colour space that `text` means, in any case: "lab" is Lab, "CIERGB" is RGBCIE.

    Other text is returned as it is.
    """
    names = {name.lower(): name for name in CHANNELS}
    names |= {alias.lower(): name for alias, name in ALIASES.items()}
    return names.get(text.lower(), text)


def parse_views(text: str, space: str, flag: str = "--views") -> list[View]:
    """Return the views that `--views TEXT` asks for beside `--view SPACE`, such as "L,a,b".

    A view is one or more channels of `space`, their names joined, or SPACE:CHANNELS, as in
    "L,ab,YCbCr:CbCr". Upper and lower case are the same, and channels are put in the order of their
    space. Views may share channels, but no two may have the same ones.
    Raises UsageError, naming `flag`, the text and the possible values.
    """
    start = f"{flag} {text}"
    views: list[View] = []
    for item in text.split(","):
        view = parse_view(item.strip(), space, start)
        if any(view[1:] == other[1:] for other in views):
            raise UsageError(f"{start}: the view {view.name} comes twice; list each view once")
        views.append(view)
    if len(views) < 2:
        example = SPLITS.get(space, "R,GB")
        raise UsageError(
            f"{start}: one view has nothing to be contrasted with; give two or more, "
            f"as in {example}"
        )
    return views


def parse_view(item: str, space: str, start: str) -> View:
    """Return the view that one item of --views means. start: how a UsageError's message begins."""
    prefix, colon, letters = item.rpartition(":")
    own = space_name(prefix.strip()) if colon else space
    if own not in CHANNELS:
        spaces = ", ".join(CHANNELS)
        raise UsageError(f"{start}: {prefix!r} is no colour space; take one of {spaces}")
    names = CHANNELS[own]
    lower = [name.lower() for name in names]
    pattern = "|".join(sorted(lower, key=len, reverse=True))
    letters = letters.strip().lower()
    if not re.fullmatch(f"(?:{pattern})+", letters):
        example = "Lab:ab" if own == "YCbCr" else "YCbCr:CbCr"
        others = ", ".join(name for name in CHANNELS if name != own)
        raise UsageError(
            f"{start}: {item!r} is not made of channels of {own}, which are {', '.join(names)}; "
            f"join some of them, as in {SPLITS.get(own, 'R,GB')}, or write SPACE:CHANNELS, as in "
            f"{example}, for one of {others}"
        )
    listed = re.findall(pattern, letters)
    channels = tuple(sorted({lower.index(name) for name in listed}))
    if len(channels) < len(listed):
        raise UsageError(
            f"{start}: {item!r} has a channel twice; name each of {', '.join(names)} at most once"
        )
    name = "".join(names[channel] for channel in channels)
    return View(name if own == space else f"{own}:{name}", own, channels)


def default_views(space: str) -> list[View]:
    """Return the two views of a space: as published for Lab and YCbCr, else this project's."""
    return parse_views(SPLITS[space], space)


def chosen_views(args) -> list[View]:
    """Return the views that --view and --views ask for."""
    return parse_views(args.views, args.view) if args.views else default_views(args.view)


def view_keys(views: Sequence[View]) -> list[str]:
    """Return the names of the views in files and records: those of --views, with _ for a colon."""
    return [view.name.replace(":", "_") for view in views]


def bank_names(views: Sequence[View]) -> list[str]:
    """Return the names of the views' banks in checkpoints; those of two are as published."""
    return ["l", "ab"] if len(views) == 2 else view_keys(views)


def tower_names(views: Sequence[View]) -> list[str]:
    """Return the names of the views' networks in checkpoints; those of two are as published."""
    return ["l_to_ab", "ab_to_l"] if len(views) == 2 else view_keys(views)


# --------------------------------------------------------------------------- operations of a recipe


@dataclass(frozen=True)
class ToColour:
    """Convert RGB (N, 3, H, W) to the three channels of `space`, in its units or normalised."""

    space: str
    normalised: bool = False

    def __post_init__(self):
        if self.space not in CHANNELS:
            spaces = ", ".join(CHANNELS)
            raise ValueError(f"{self.space!r} is no colour space; take one of {spaces}")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        return from_rgb(images, self.space, normalised=self.normalised)


@dataclass(frozen=True)
class Views:
    """Convert RGB to all channels of all views, normalised, one view after the other.

    It is the last operation of a recipe: (N, 3, H, W) in [0, 1] -> (N, C, H, W), where C is the
    number of channels of all views; `split` takes them apart again. A space that several views need
    is converted once.
    """

    views: tuple[View, ...]

    def __post_init__(self):
        object.__setattr__(self, "views", tuple(self.views))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        needed: dict[str, list[int]] = {}
        for view in self.views:
            listed = needed.setdefault(view.space, [])
            listed += [c for c in view.channels if c not in listed]
        converted = {
            space: from_rgb(images, space, channels=tuple(channels), normalised=True)
            for space, channels in needed.items()
        }
        if len(converted) == 1 and sum(self.widths) == len(listed):
            return converted[view.space]
        parts = []
        for view in self.views:
            columns = [needed[view.space].index(channel) for channel in view.channels]
            parts.append(converted[view.space][:, columns])
        return torch.cat(parts, dim=1)

    def split(self, images: Tensor) -> tuple[Tensor, ...]:
        """Split what `apply` returned into one tensor (N, c, H, W) per view, without a copy."""
        return images.split(self.widths, dim=1)

    @property
    def widths(self) -> list[int]:
        """The number of channels of each view, which are the inputs of its encoder."""
        return [len(view.channels) for view in self.views]

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return every channel of what `apply` returned as grey pictures (N, 1, H, W).

        They are in [0, 1]: -1 becomes black, 1 white.
        """
        names = [
            f"{view.name}: {CHANNELS[view.space][channel]}"
            for view in self.views
            for channel in view.channels
        ]
        return {name: (grey + 1) / 2 for name, grey in zip(names, images.split(1, dim=1))}


def of_checkpoint(saved, towers: Sequence[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to a checkpoint's input, and the channels of each tower.

    See `runner.layouts.colours`.
    """
    flags = saved.get("opt") or {}
    space = space_name(str(flags.get("view") or "Lab"))
    if space in CHANNELS:
        views = parse_views(str(flags.get("views") or SPLITS[space]), space)
        names = tower_names(views)
        if sorted(names) == list(towers):
            widths = {name: len(view.channels) for name, view in zip(names, views)}
            return (Views(tuple(views)),), widths
    names = " and ".join(towers)
    raise UserError(f"{saved.path} does not say which channels its towers {names} look at")
