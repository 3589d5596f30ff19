"""The views of Feature Transformation, which are PyContrast's.

They are the augmentations A to E, RandAugment, and the patches of a jigsaw. Operations and their
order are those of dataset/util.py of DTennant/CL-Visualizing-Feature-Transformation at c53d1be.
With --modal CMC the last operations convert RGB to Y, Db, Dr; the encoders split these channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from cmc import colour
from common import UserError, augment, cli, footing, inputs, sets
from feature_transform import jigsaw
from preprocess.imagenet_splits import CLASS_LIST

AUGMENTATIONS = ("A", "B", "C", "D", "E")
IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
# The published mean and deviation of Y, Db, Dr.
COLOURS = augment.Normalize((0.457, -0.082, -0.052), (0.500, 1.331, 1.333))
SMALLEST_CROP = {"bank": 0.08, "moco": 0.2}  # {--mem: least share of the picture}

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
ENHANCE = {  # {operation: the picture at the factor 0}; the factor 1 is the picture itself
    "Color": lambda x: tv.adjust_saturation(x, 0.0),
    "Contrast": lambda x: tv.adjust_contrast(x, 0.0),
    "Brightness": torch.zeros_like,
    "Sharpness": lambda x: tv.adjust_sharpness(x, 0.0),
}
TABLES = ("AutoContrast", "Equalize", "Invert", "PosterizeTpu", "Solarize", "SolarizeAdd")
OPERATIONS = {  # RandAugment's, by --modal; those of CMC leave the colours alone
    "RGB": (*TABLES, *ENHANCE, *MOVES),
    "CMC": ("AutoContrast", "Identity", "Sharpness", *MOVES),
}
FILL = (124 / 255, 116 / 255, 104 / 255)  # ImageNet's mean, outside of a moved picture


def choose_classes(args):
    """Return the flags, with the list of ImageNet-100's classes where a tree has more than these.

    That is so for --dataset imagenet100 (the default). A tree without all of these classes is used
    as it is, unless the flag was typed and the tree has some of them and more than 100 in all: then
    opening it names the missing ones. A tree with as many classes as --n_class is used as it is
    where --dataset was not typed, which is how a published command means all of ImageNet. Raises
    UsageError where there is no such folder.
    """
    if args.dataset != "imagenet100" or args.class_list:
        return args
    listed = set(sets.read_class_list(CLASS_LIST))
    folders = set(sets.folders_in(sets.split_folder(args.data, "train", bare=True)))
    is_typed = "dataset" in args.typed
    all_are_meant = not is_typed and getattr(args, "n_class", None) == len(folders)
    has_them = listed & folders if is_typed else listed <= folders
    if has_them and len(folders) > len(listed) and not all_are_meant:
        return cli.replace(args, class_list=str(CLASS_LIST))
    return args


def last(flags: dict) -> tuple:
    """Return the operations that take RGB to the normalised channels of the networks."""
    if flags.get("modal") == "CMC":
        return colour.ToColour("YDbDr"), COLOURS
    return (footing.normalize(flags, IMAGENET),)


def of_checkpoint(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`."""
    if not towers:
        return last(saved.get("opt") or {}), {"": 3}
    if towers == ["encoder1", "encoder2"]:
        return last({"modal": "CMC"}), {"encoder1": 1, "encoder2": 2}
    names = " and ".join(towers)
    raise UserError(f"{saved.path} does not say which channels its towers {names} look at")


def recipe(args) -> augment.Compose:
    """Return the operations of one view: the augmentation --aug at --input-res.

    A is that of InsDis, MoCo and PIRL, B of MoCo-v2, C of CMC, D of InfoMin, E of CMC-v2. Blurs
    have taps up to a tenth of the side (published: B by PIL, D and E with 23 taps at 224). With the
    common footing, views of colours are only cropped and flipped.
    """
    if args.footing == "common":
        return footing.recipe(args, last(vars(args)) if args.modal == "CMC" else ())
    crop = augment.RandomResizedCrop(args.input_res, scale=(SMALLEST_CROP[args.mem], 1.0))
    flip = augment.RandomHorizontalFlip()
    grey = augment.RandomGrayscale(0.2)
    blur = augment.GaussianBlur((0.1, 2.0), p=0.5)
    sometimes = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    if args.aug == "A":
        operations = (augment.ColorJitter(0.4, 0.4, 0.4, 0.4), grey)
    elif args.aug == "B":
        operations = (sometimes, grey, blur)
    elif args.aug == "C":
        operations = (augment.ColorJitter(0.4, 0.4, 0.4, 0.1),)
    elif args.aug == "D":
        strong = augment.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)
        operations = (strong, blur, RandAugment(args.modal), grey)
    else:
        operations = (sometimes, blur, RandAugment(args.modal))
    return augment.Compose(crop, flip, *operations, *last(vars(args)))


def plain_view(args) -> augment.Compose:
    """Return the view of k-NN and evaluation: the centre crop."""
    return inputs.plain_view(args, *last(vars(args)))


def pictures(
    args, seen: list[Tensor], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return {name: pictures in [0, 1]} of the views of a batch; those of CMC by channel.

    A jigsaw has two columns: its nine patches at their places, and in the order in which the head
    takes them. generator: that of `jigsaw.draw`.
    """
    names = ("query", "key") if args.mem == "moco" else ("picture",)
    views = dict(zip(names, seen))
    if args.jigsaw:
        patches, order = jigsaw.draw(seen[-1], generator)
        shuffled = [own[rows] for own, rows in zip(patches, order)]
        views |= {"patches": patches, "patches, shuffled": torch.stack(shuffled)}
    columns = {}
    for name, images in views.items():
        for channel, values in in_channels(args, images).items():
            columns[name + channel] = jigsaw.lay_out(values) if values.ndim == 5 else values
    return columns


def in_channels(args, images: Tensor) -> dict[str, Tensor]:
    """Return {"": RGB} or {": Y": lightness, ...} in [0, 1] of views (..., 3, S, S)."""
    if args.modal == "RGB":
        return {"": last(vars(args))[0].inverse(images)}
    channels = zip(colour.CHANNELS["YDbDr"], images.split(1, -3))
    return {f": {channel}": (values + 1) / 2 for channel, values in channels}


@dataclass(frozen=True)
class RandAugment:
    """Change each picture by two drawn operations, at a level of about 10 (arXiv:1909.13719).

    This is `rand-n2-m10-mstd0.5` of the published code (datasets/RandAugment.py of
    HobbitLong/PyContrast at d72bb9a, of the timm family). Operations are drawn with replacement
    from OPERATIONS and applied with probability .5 each, at a level from N(10, .5) cut to [0, 10];
    signs, and bilinear or bicubic interpolation, are drawn as well.
    params has one column for each operation: op (-1: not applied), level, sign, bicubic.

    torchvision's RandAugment has other operations and one draw for a batch; its functions are used
    where they take a batch. Pillow works on whole grey levels, from which the results differ by at
    most 2 levels, and in bicubic moves by some 16 beside sharp edges (torch's cubic has a = -.75,
    Pillow's -1). Pictures (N, 3, S, S) in [0, 1] are square.
    """

    modal: str = "RGB"
    layers: int = 2
    level: float = 10.0
    std: float = 0.5
    p: float = 0.5

    def sample(self, n: int, generator: torch.Generator | None = None) -> augment.Params:
        size = (n, self.layers)
        op = torch.randint(len(OPERATIONS[self.modal]), size, generator=generator)
        op[torch.rand(size, generator=generator) >= self.p] = -1
        level = torch.randn(size, generator=generator)
        level = level.mul(self.std).add(self.level).clamp(0, 10)
        sign = torch.rand(size, generator=generator) < 0.5
        bicubic = torch.rand(size, generator=generator) < 0.5
        return {"op": op, "level": level, "sign": 1.0 - 2 * sign, "bicubic": bicubic}

    def apply(self, images: Tensor, params: augment.Params) -> Tensor:
        for column in range(params["op"].shape[1]):
            op, level, sign, bicubic = (
                params[key][:, column] for key in ("op", "level", "sign", "bicubic")
            )
            images = self.apply_one(images, op, level * sign, level, bicubic)
        return images

    def apply_one(
        self, images: Tensor, op: Tensor, amount: Tensor, level: Tensor, bicubic: Tensor
    ) -> Tensor:
        """Apply one operation to each picture; those that drew the same are changed together.

        op, level, bicubic (N,): columns of `sample`. amount (N,): level and sign of a move.
        """
        names = OPERATIONS[self.modal]
        groups = [
            (name, op == number)
            for number, name in enumerate(names)
            if name not in (*MOVES, "Identity")
        ]
        theta, moved = move_matrices([names[i] if i >= 0 else "" for i in op.tolist()], amount)
        groups.append(("bicubic", moved & bicubic))
        groups.append(("bilinear", moved & ~bicubic))
        out = images
        for name, drawn in groups:
            if not drawn.any():
                continue
            rows = drawn.nonzero().flatten().to(images.device, non_blocking=True)
            own_level = level[drawn].to(images.device, non_blocking=True)
            own_theta = theta[drawn].to(images.device, non_blocking=True)
            if out is images:
                out = images.clone()
            changed = change(name, images.index_select(0, rows), own_level, own_theta)
            out.index_copy_(0, rows, changed)
        return out


def move_matrices(names: list[str], amount: Tensor) -> tuple[Tensor, Tensor]:
    """Return theta (N, 2, 3) for affine_grid, and the mask (N,) of the pictures that move.

    theta maps the pixels of the moved picture to their sources. amount: level with sign, -10 to 10;
    1 stands for 3 degrees of rotation, 3 percent of shear, or a translation by 4.5 percent of the
    side. A shear leaves the upper left corner where it is, as Pillow's does.
    """
    theta = torch.eye(2, 3).repeat(len(names), 1, 1)
    moved = torch.zeros(len(names), dtype=torch.bool)
    for i, (name, value) in enumerate(zip(names, amount.tolist())):
        if name not in MOVES:
            continue
        moved[i] = True
        if name == "Rotate":
            angle = torch.deg2rad(torch.tensor(-3.0 * value))
            rotation = (angle.cos(), angle.sin(), -angle.sin(), angle.cos())
            theta[i, :, :2] = torch.stack(rotation).view(2, 2)
        elif name.startswith("Shear"):
            row = "XY".index(name[-1])
            theta[i, row, 1 - row] = theta[i, row, 2] = 0.03 * value
        else:
            row = "XY".index(name.removeprefix("Translate")[0])
            theta[i, row, 2] = 2 * 0.045 * value
    return theta, moved


def change(name: str, x: Tensor, level: Tensor, theta: Tensor) -> Tensor:
    """Apply `name` to x (N, 3, S, S), each picture at its own level (N,) or matrix (N, 2, 3)."""
    level = level.view(-1, 1, 1, 1)
    if name in ("bilinear", "bicubic"):
        return move(x, theta, name)
    if name in ENHANCE:
        return torch.lerp(ENHANCE[name](x), x, 0.18 * level + 0.1).clamp_(0, 1)
    if name == "AutoContrast":
        return tv.autocontrast(x)
    if name == "Invert":
        return 1 - x
    grey_levels = (x * 255).round()  # the other operations are tables of 8 bits
    if name == "Equalize":
        out = tv.equalize(grey_levels.to(torch.uint8)).float()
    elif name == "PosterizeTpu":
        step = 2 ** (8 - (0.4 * level).floor())
        out = (grey_levels / step).floor() * step
    elif name == "Solarize":
        is_dark = grey_levels < (25.6 * level).floor()
        out = torch.where(is_dark, grey_levels, 255 - grey_levels)
    else:  # SolarizeAdd
        lighter = (grey_levels + (11 * level).floor()).clamp(max=255)
        out = torch.where(grey_levels < 128, lighter, grey_levels)
    return out / 255


def move(x: Tensor, theta: Tensor, mode: str) -> Tensor:
    """Return x moved by `theta` (see `move_matrices`), with FILL outside of the picture."""
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    out = F.grid_sample(x, grid, mode, padding_mode="border", align_corners=False).clamp_(0, 1)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    fill = torch.tensor(FILL).to(x.device, non_blocking=True)
    return torch.where(inside, out, fill.view(3, 1, 1))


# ------------------------------------------------------------------------------------------ jigsaw


def jigsaw_recipe(args) -> augment.Compose:
    """Return the view that `jigsaw.cut_patches` cuts: 255 pixels at an input of 224.

    Others are in proportion: at an input of 32 it has 36 pixels.
    """
    side = jigsaw.GRID * max(2, round(85 * args.input_res / 224))
    crop = augment.RandomResizedCrop(side, scale=(0.6, 1.0))
    return augment.Compose(crop, augment.RandomHorizontalFlip(), *last(vars(args)))
