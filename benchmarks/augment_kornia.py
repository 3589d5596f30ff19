"""Speed of common/augment.py beside kornia on one recipe, and where the two libraries compute
different things.

    python benchmarks/augment_kornia.py --size 32 --batch 256
    python benchmarks/augment_kornia.py --size 224 --batch 32

The recipe is MoCo v2's: random resized crop (area 0.2-1), jitter (0.4, 0.4, 0.4, 0.1, p 0.8), grey
0.2, blur 0.5, flip 0.5, normalise; from uint8 pictures to one float view, drawing the parameters
included. All sides run in turn in one process, warm-up excluded; a time is the best of --repeats,
as other load on the machine only ever adds to it. The second part compares each operation of kornia
with torchvision.transforms.functional, image by image, at the parameters kornia drew.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision.transforms.functional as TF

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
    """Best seconds of each side; every round calls each side once."""
    best = dict.fromkeys(sides, float("inf"))
    for step in range(repeats + 2):
        for name, view in sides.items():
            start = time.perf_counter()
            view(pictures)
            if pictures.is_cuda:
                torch.cuda.synchronize()
            if step >= 2:  # the first two rounds are warm-up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def compare_semantics():
    """What kornia computes and draws.

    Returns the largest differences from torchvision at equal parameters, for pictures in [0, 1], as
    (name, difference); the shape of the jitter order drawn for a batch; whether drawing it moved
    the global random state."""
    import kornia.augmentation as K

    torch.manual_seed(0)
    x = torch.rand(8, 3, 48, 64)
    rows = []

    def per_image(function, *parameters):
        return torch.stack(
            [function(image, *(float(p[i]) for p in parameters)) for i, image in enumerate(x)]
        )

    def row(name, op, reference):
        params = op.forward_parameters(x.shape)
        rows.append((name, (op(x, params=params) - reference(params)).abs().max().item()))

    for cls in (K.ColorJitter, K.ColorJiggle):
        for name, value in (
            ("brightness", 0.4),
            ("contrast", 0.4),
            ("saturation", 0.4),
            ("hue", 0.1),
        ):
            adjust = getattr(TF, f"adjust_{name}")
            row(
                f"{cls.__name__} {name}",
                cls(**{name: value}, p=1.0),
                lambda q, name=name, adjust=adjust: per_image(adjust, q[f"{name}_factor"]),
            )
    row(
        "RandomGaussianBlur",
        K.RandomGaussianBlur((9, 9), (0.1, 2.0), p=1.0),
        lambda q: per_image(lambda image, s: TF.gaussian_blur(image, [9, 9], [s, s]), q["sigma"]),
    )
    row("RandomGrayscale", K.RandomGrayscale(p=1.0), lambda q: TF.rgb_to_grayscale(x, 3))

    def boxes(params):
        left, top = params["src"][:, 0].unbind(1)
        right, bottom = params["src"][:, 2].unbind(1)
        return [
            [int(v) for v in box]
            for box in torch.stack((top, left, bottom - top + 1, right - left + 1), 1)
        ]

    for side, what in ((24, "shrinks"), (96, "enlarges")):
        for corners in (True, False):
            for antialias in (True, False):
                row(
                    f"RandomResizedCrop {what}, align_corners={corners} / torchvision antialias={antialias}",
                    K.RandomResizedCrop((side, side), scale=(0.5, 1.0), align_corners=corners),
                    lambda q, side=side, antialias=antialias: torch.stack(
                        [
                            TF.resized_crop(image, *box, [side, side], antialias=antialias)
                            for image, box in zip(x, boxes(q))
                        ]
                    ),
                )
    before = torch.random.get_rng_state()
    order = K.ColorJitter(0.4, 0.4, 0.4, 0.1).forward_parameters(x.shape)["order"]
    return rows, tuple(order.shape), not torch.equal(before, torch.random.get_rng_state())


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        import kornia
    except ImportError:
        raise SystemExit(
            "this comparison needs kornia: pip install -r requirements-dev.txt"
        ) from None
    print(
        f"torch {torch.__version__}  kornia {kornia.__version__}  {args.device}  {args.threads} threads"
    )
    print(f"{args.batch} pictures {args.source}x{args.source} -> views {args.size}x{args.size}")
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(
        0, 256, (args.batch, 3, args.source, args.source), dtype=torch.uint8, generator=generator
    )
    sides = {"common/augment.py": our_view(args.size, args.source, args.batch)}
    sides.update(
        {f"kornia, crop by {mode}": kornia_view(args.size, mode) for mode in ("slice", "resample")}
    )
    best = time_side_by_side(sides, pictures.to(args.device), args.repeats)
    ours = best["common/augment.py"]
    for name, seconds in best.items():
        rate = args.batch / seconds
        print(
            f"{name:24s} {seconds * 1e3:8.1f} ms  {rate:8.0f} views/s  {seconds / ours:5.2f} x the first"
        )

    rows, order_shape, uses_global = compare_semantics()
    print(
        "\nkornia against torchvision.transforms.functional at equal parameters, largest "
        "difference in [0, 1]:"
    )
    for name, difference in rows:
        print(f"  {difference:8.1e}  {name}")
    print(
        f"jitter order of 8 images: shape {order_shape}, drawn from the global generator: {uses_global}"
    )


if __name__ == "__main__":
    main()
