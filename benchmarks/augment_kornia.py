"""Speed of common/augment.py beside kornia on one recipe, and where the two compute other things.

    python benchmarks/augment_kornia.py --size 32 --batch 256
    python benchmarks/augment_kornia.py --size 224 --batch 32

The recipe is MoCo v2's: random resized crop (area 0.2-1), jitter (0.4, 0.4, 0.4, 0.1, p 0.8), grey
0.2, blur 0.5, flip 0.5, normalise; from uint8 pictures to one float view, drawing the parameters
included. All sides run in turn in one process, warm-up excluded; a time is the best of --repeats,
as other load on the machine only ever adds to it. The second part compares each operation of kornia
with torchvision.transforms.functional, image by image, at the parameters kornia drew.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision.transforms.functional as TF

from benchmarks.side_by_side import synchronize
from common import augment


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=32, help="side of the view, pixels")
    parser.add_argument(
        "--source", type=int, default=None, help="side of the pictures (default --size; 256 at 224)"
    )
    parser.add_argument("--batch", type=int, default=256, help="images per call")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each side")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.source = args.source or (256 if args.size == 224 else args.size)
    return args


def our_view(size, source, batch):
    recipe = augment.Compose(
        augment.RandomResizedCrop(size, (0.2, 1.0)),
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augment.RandomGrayscale(0.2),
        augment.GaussianBlur((0.1, 2.0), p=0.5),
        augment.RandomHorizontalFlip(),
        augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
    )
    generator = torch.Generator().manual_seed(0)
    sides = torch.full((batch,), source)

    def view(pictures):
        boxes = recipe.geometry.sample(sides, sides, generator)
        return recipe.apply(recipe.geometry.apply(pictures, boxes), recipe.sample(batch, generator))

    return view


def kornia_view(size, cropping_mode):
    import kornia.augmentation as K

    kernel = max(3, size // 10 // 2 * 2 + 1)
    recipe = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0), cropping_mode=cropping_mode),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(torch.tensor(augment.IMAGENET_MEAN), torch.tensor(augment.IMAGENET_STD)),
    )
    return lambda pictures: recipe(pictures.float() / 255)


def time_side_by_side(sides, pictures, repeats):
    """Return the best seconds of each side; every round calls each side once."""
    best = dict.fromkeys(sides, float("inf"))
    for step in range(repeats + 2):
        for name, view in sides.items():
            start = time.perf_counter()
            view(pictures)
            synchronize(pictures.device)
            if step >= 2:  # the first two rounds are warm-up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


class Semantics:
    """Differences of kornia from torchvision at equal parameters, on pictures x in [0, 1].

    rows: (operation, largest difference).
    """

    def __init__(self):
        torch.manual_seed(0)
        self.x = torch.rand(8, 3, 48, 64)
        self.rows = []

    def add(self, name: str, op, reference) -> None:
        """Compare an operation with reference(parameters), which gives all pictures."""
        params = op.forward_parameters(self.x.shape)
        difference = (op(self.x, params=params) - reference(params)).abs().max().item()
        self.rows.append((name, difference))

    def one_by_one(self, function, *parameters) -> torch.Tensor:
        """Return function(picture, its parameters) of all pictures."""
        numbers = zip(*(values.tolist() for values in parameters))
        return torch.stack([function(image, *own) for image, own in zip(self.x, numbers)])

    def add_colours(self, K) -> None:
        strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        for kind in (K.ColorJitter, K.ColorJiggle):
            for name, strength in strengths.items():

                def reference(params, name=name):
                    adjust = getattr(TF, f"adjust_{name}")
                    return self.one_by_one(adjust, params[f"{name}_factor"])

                self.add(f"{kind.__name__} {name}", kind(**{name: strength}, p=1.0), reference)
        self.add("RandomGrayscale", K.RandomGrayscale(p=1.0), self.grey)

    def grey(self, params) -> torch.Tensor:
        return TF.rgb_to_grayscale(self.x, 3)

    def add_blur(self, K) -> None:
        def blur(image, sigma):
            return TF.gaussian_blur(image, [9, 9], [sigma, sigma])

        op = K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=1.0)
        self.add("RandomGaussianBlur", op, lambda params: self.one_by_one(blur, params["sigma"]))

    def add_crops(self, K) -> None:
        ways = itertools.product(((24, "shrinks"), (96, "enlarges")), (True, False), (True, False))
        for (side, effect), corners, antialias in ways:
            op = K.RandomResizedCrop((side, side), scale=(0.5, 1.0), align_corners=corners)

            def reference(params, side=side, antialias=antialias):
                size = [side, side]
                parts = zip(self.x, boxes(params))
                crops = [TF.resized_crop(x, *box, size, antialias=antialias) for x, box in parts]
                return torch.stack(crops)

            name = f"RandomResizedCrop {effect}, align_corners={corners}"
            self.add(f"{name} / torchvision antialias={antialias}", op, reference)


def boxes(params) -> list[list[int]]:
    """Return [top, left, height, width] of every crop that kornia drew."""
    left, top = params["src"][:, 0].unbind(1)
    right, bottom = params["src"][:, 2].unbind(1)
    return torch.stack((top, left, bottom - top + 1, right - left + 1), 1).int().tolist()


def print_semantics() -> None:
    """Print where kornia and torchvision differ, and what kornia draws."""
    import kornia.augmentation as K

    semantics = Semantics()
    semantics.add_colours(K)
    semantics.add_blur(K)
    semantics.add_crops(K)
    print("\nkornia against torchvision.transforms.functional at equal parameters, largest")
    print("difference in [0, 1]:")
    for name, difference in semantics.rows:
        print(f"  {difference:8.1e}  {name}")
    before = torch.random.get_rng_state()
    order = K.ColorJitter(0.4, 0.4, 0.4, 0.1).forward_parameters(semantics.x.shape)["order"]
    uses_global = not torch.equal(before, torch.random.get_rng_state())
    shape = tuple(order.shape)
    print(
        f"jitter order of 8 images: shape {shape}, drawn from the global generator: {uses_global}"
    )


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        import kornia
    except ImportError:
        reason = "this comparison needs kornia: pip install -r requirements-dev.txt"
        raise SystemExit(reason) from None
    versions = f"torch {torch.__version__}  kornia {kornia.__version__}"
    print(f"{versions}  {args.device}  {args.threads} threads")
    print(f"{args.batch} pictures {args.source}x{args.source} -> views {args.size}x{args.size}")
    shape = (args.batch, 3, args.source, args.source)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    sides = {"common/augment.py": our_view(args.size, args.source, args.batch)}
    for mode in ("slice", "resample"):
        sides[f"kornia, crop by {mode}"] = kornia_view(args.size, mode)
    best = time_side_by_side(sides, pictures.to(args.device), args.repeats)
    ours = best["common/augment.py"]
    for name, seconds in best.items():
        rate = f"{args.batch / seconds:8.0f} views/s"
        print(f"{name:24s} {seconds * 1e3:8.1f} ms  {rate}  {seconds / ours:5.2f} x the first")
    print_semantics()


if __name__ == "__main__":
    main()
