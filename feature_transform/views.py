"""The views of Feature Transformation, which are PyContrast's: augmentations A to E, RandAugment, the pieces of a jigsaw.

dataset/util.py of DTennant/CL-Visualizing-Feature-Transformation at c53d1be, whose order of operations is kept. With the
colours of CMC the last operations make Y, Db, Dr of RGB, for which the encoders split the channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from cmc import colour
from common import augment, launch, options, sets
from preprocess.imagenet100_subset import CLASS_LIST

AUGMENTATIONS = ("A", "B", "C", "D", "E")
NORMALIZE = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
COLOURS = augment.Normalize((0.457, -0.082, -0.052), (0.500, 1.331, 1.333))  # of Y, Db, Dr, as published
SMALLEST_CROP = {"bank": 0.08, "moco": 0.2}  # share of the picture
GRID = 3  # a jigsaw has 3 x 3 cells

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
ENHANCE = {  # what a factor of 0 gives; the operation is the line from there through the picture
    "Color": lambda x: tv.adjust_saturation(x, 0.0), "Contrast": lambda x: tv.adjust_contrast(x, 0.0),
    "Brightness": torch.zeros_like, "Sharpness": lambda x: tv.adjust_sharpness(x, 0.0),
}  # fmt: skip
OPERATIONS = {  # of RandAugment; for CMC those that leave the colours alone
    "RGB": ("AutoContrast", "Equalize", "Invert", "PosterizeTpu", "Solarize", "SolarizeAdd", *ENHANCE, *MOVES),
    "CMC": ("AutoContrast", "Identity", "Sharpness", *MOVES),
}
FILL = (124 / 255, 116 / 255, 104 / 255)  # where a moved picture leaves nothing: ImageNet's mean


def choose_classes(args) -> None:
    """--dataset imagenet100 (the default) on a tree of more than those: args.class_list becomes the project's list of them.

    A tree without all of them is taken as it is. A published command names ImageNet by the number of its classes alone:
    --n_class beside a --dataset that was not typed. UsageError where there is no such folder.
    """
    if args.dataset != "imagenet100" or args.class_list:
        return
    listed = set(sets.read_class_list(CLASS_LIST))
    found = sets.folders_in(sets.split_folder(args.data, "train", bare=True))
    meant = "dataset" not in args.typed and getattr(args, "n_class", None) == len(found)
    if listed < set(found) and not meant:
        args.class_list = str(CLASS_LIST)


def last_operations(args) -> tuple:
    """Of every view: to the network's channels, normalised."""
    return (NORMALIZE,) if args.modal == "RGB" else (colour.ToColour("YDbDr"), COLOURS)


def recipe(args) -> augment.Compose:
    """The augmentation of one view: args.aug, at args.input_res, for args.mem and args.modal."""
    crop = augment.RandomResizedCrop(args.input_res, scale=(SMALLEST_CROP[args.mem], 1.0))
    flip, grey = augment.RandomHorizontalFlip(), augment.RandomGrayscale(0.2)
    blur, last = augment.GaussianBlur((0.1, 2.0), p=0.5), last_operations(args)
    if args.aug == "A":  # InsDis, MoCo, PIRL
        return augment.Compose(crop, flip, augment.ColorJitter(0.4, 0.4, 0.4, 0.4), grey, *last)
    if args.aug == "B":  # MoCo-v2. Published: PIL's blur; the one here has no taps beyond 11 pixels of 224
        return augment.Compose(crop, flip, augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), grey, blur, *last)
    if args.aug == "C":  # CMC
        return augment.Compose(crop, flip, augment.ColorJitter(0.4, 0.4, 0.4, 0.1), *last)
    if args.aug == "D":  # InfoMin. The published blur has 23 taps at 224
        jitter = augment.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)
        return augment.Compose(crop, flip, jitter, blur, RandAugment(args.modal), grey, *last)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)  # E, CMC-v2
    return augment.Compose(crop, flip, jitter, blur, RandAugment(args.modal), *last)


def plain_view(args) -> augment.Compose:
    """Pictures as they are, for k-NN and evaluation."""
    return options.plain_view(args, *last_operations(args))


def pictures(args, name: str, images: Tensor) -> dict[str, Tensor]:
    """Views in [0, 1] for people to look at, by name: the colours, or for CMC the channels in grey."""
    if args.modal == "RGB":
        return {name: NORMALIZE.inverse(images)}
    return {f"{name}: {c}": (x + 1) / 2 for c, x in zip(colour.CHANNELS["YDbDr"], images.split(1, 1))}


@dataclass(frozen=True)
class RandAugment:
    """Two operations for each picture, each applied with probability .5, at a level of about 10 (arXiv:1909.13719).

    `rand-n2-m10-mstd0.5` of the published code (datasets/RandAugment.py of HobbitLong/PyContrast at d72bb9a, of the timm
    family): operations drawn with replacement from OPERATIONS, a level from N(10, .5) cut to [0, 10], signs and bilinear or
    bicubic interpolation by chance. params, one column for each of the two: op (-1: not applied), level, sign, bicubic.

    torchvision's RandAugment has other operations and one draw a batch; its functions are used where they take a batch.
    Differences to Pillow's pictures of whole grey levels: at most 2 levels, of bicubic moves some 16 beside sharp edges
    (torch's cubic has a = -.75, Pillow's -1). Pictures are (N, 3, S, S) in [0, 1], square.
    """

    modal: str = "RGB"
    layers: int = 2
    level: float = 10.0
    std: float = 0.5
    p: float = 0.5

    def sample(self, n: int, generator: torch.Generator | None = None) -> augment.Params:
        size, how = (n, self.layers), dict(generator=generator)
        op = torch.randint(len(OPERATIONS[self.modal]), size, **how)
        op[torch.rand(size, **how) >= self.p] = -1
        level = torch.randn(size, **how).mul(self.std).add(self.level).clamp(0, 10)
        sign, bicubic = torch.rand(size, **how) < 0.5, torch.rand(size, **how) < 0.5
        return {"op": op, "level": level, "sign": 1.0 - 2 * sign, "bicubic": bicubic}

    def apply(self, images: Tensor, params: augment.Params) -> Tensor:
        for column in range(params["op"].shape[1]):
            images = self.apply_one(images, *(params[key][:, column] for key in ("op", "level", "sign", "bicubic")))
        return images

    def apply_one(self, images: Tensor, op: Tensor, level: Tensor, sign: Tensor, bicubic: Tensor) -> Tensor:
        """One operation for each picture: those that drew the same are changed together."""
        names, groups = OPERATIONS[self.modal], []
        for number, name in enumerate(names):
            if name not in (*MOVES, "Identity"):
                groups.append((name, op == number))
        theta, moved = move_matrices([names[i] if i >= 0 else "" for i in op.tolist()], level * sign)
        groups += [("bicubic", moved & bicubic), ("bilinear", moved & ~bicubic)]
        out = images
        for name, drawn in groups:
            if not drawn.any():
                continue
            rows, own = (
                drawn.nonzero().flatten(),
                [t[drawn].to(images.device, non_blocking=True) for t in (level, theta)],
            )
            rows = rows.to(images.device, non_blocking=True)
            out = images.clone() if out is images else out
            out.index_copy_(0, rows, change(name, images.index_select(0, rows), *own))
        return out


def move_matrices(names: list[str], amount: Tensor) -> tuple[Tensor, Tensor]:
    """For affine_grid: where each pixel of the moved picture comes from, (N, 2, 3), and (N,) which pictures move at all.

    amount: level and sign, -10 to 10: 3 degrees each of rotation, 3 percent of shear, 4.5 percent of the side of translation.
    A shear leaves the upper left corner where it is, as Pillow's.
    """
    theta, moved = torch.eye(2, 3).repeat(len(names), 1, 1), torch.zeros(len(names), dtype=torch.bool)
    for i, (name, value) in enumerate(zip(names, amount.tolist())):
        if name not in MOVES:
            continue
        moved[i] = True
        if name == "Rotate":
            angle = torch.deg2rad(torch.tensor(-3.0 * value))
            theta[i, :, :2] = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos())).view(2, 2)
        elif name.startswith("Shear"):
            row = "XY".index(name[-1])
            theta[i, row, 1 - row] = theta[i, row, 2] = 0.03 * value
        else:
            theta[i, "XY".index(name[9]), 2] = 2 * 0.045 * value
    return theta, moved


def change(name: str, x: Tensor, level: Tensor, theta: Tensor) -> Tensor:
    """The operation `name` on all of x (N, 3, S, S), each picture at its own level (N,) or matrix (N, 2, 3)."""
    level = level.view(-1, 1, 1, 1)
    if name in ("bilinear", "bicubic"):
        return move(x, theta, name)
    if name in ENHANCE:
        return torch.lerp(ENHANCE[name](x), x, 0.18 * level + 0.1).clamp_(0, 1)
    if name == "AutoContrast":
        return tv.autocontrast(x)
    if name == "Invert":
        return 1 - x
    grey_levels = (x * 255).round()  # the others are tables of 8 bits
    if name == "Equalize":
        made = tv.equalize(grey_levels.to(torch.uint8)).float()
    elif name == "PosterizeTpu":
        step = 2 ** (8 - (0.4 * level).floor())
        made = (grey_levels / step).floor() * step
    elif name == "Solarize":
        made = torch.where(grey_levels < (25.6 * level).floor(), grey_levels, 255 - grey_levels)
    else:  # SolarizeAdd
        made = torch.where(grey_levels < 128, (grey_levels + (11 * level).floor()).clamp(max=255), grey_levels)
    return made / 255


def move(x: Tensor, theta: Tensor, mode: str) -> Tensor:
    """x seen through `theta` (see move_matrices); FILL where that looks beyond the picture."""
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    made = F.grid_sample(x, grid, mode, padding_mode="border", align_corners=False).clamp_(0, 1)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    fill = torch.tensor(FILL).to(x.device, non_blocking=True)
    return torch.where(inside, made, fill.view(3, 1, 1))


# ------------------------------------------------------------------------------------------------------------- jigsaw


def jigsaw_recipe(args) -> augment.Compose:
    """The view that `cut_patches` cuts: 255 pixels at an input of 224, in proportion elsewhere (36 at 32)."""
    side = GRID * max(2, round(85 * args.input_res / 224))
    crop = augment.RandomResizedCrop(side, scale=(0.6, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), *last_operations(args))


def cut_patches(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(N, 3, S, S) -> the nine patches of each, (N, 9, 3, s, s), at a random place in their cells of a 3 x 3 grid.

    generator: of the CPU, in the same state on every rank: the places are those of the global batch.
    Cells of 85 pixels give patches of 64, at offsets of 0 to 21; others in proportion (cells of 12 give 9). Any network takes
    them: its pooling is adaptive. Below 64 pixels patches are small for the strides of a ResNet: with --small-stem, a quarter
    of them, more is left of a patch than one place.
    """
    n, cell = len(images), images.shape[-1] // GRID
    size = max(1, round(cell * 64 / 85))
    everyone = torch.randint(cell - size + 1, (2, n * launch.world_size(), GRID, GRID), generator=generator)
    offset = everyone.chunk(launch.world_size(), 1)[launch.rank()]
    corner = offset + cell * torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"))[:, None]
    corner = corner.flatten(2).to(images.device, non_blocking=True)  # top and left, (2, N, 9)
    pixel = torch.arange(size, device=images.device)
    rows, columns = corner[0, :, :, None, None] + pixel[:, None], corner[1, :, :, None, None] + pixel
    which = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    return images[which, :, rows, columns].permute(0, 1, 4, 2, 3)
