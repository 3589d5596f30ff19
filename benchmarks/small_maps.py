"""Convolutions that leave few positions: nn.Conv2d, and common/convolution.py.

    python benchmarks/small_maps.py              # float32 and bfloat16, one thread
    python benchmarks/small_maps.py --batch 64

layers    convolutions of residual networks at 32 or 64 pixels that leave up to four positions:
          forward and backward, milliseconds.
networks  a forward and backward pass of ResNet-18, resnet18-small and ResNet-50 at 32 pixels with
          and without products, pictures a second.

The sides alternate in one process; a time is the fastest of --repeats, by the processor's clock.
Both sides of a layer must agree in outputs and gradients. Ends with 1 if a layer or a network is
slower as products.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from common import backbones, convolution

LAYERS = (  # channels, outputs, kernel, stride, positions along a side of the input
    (128, 256, 3, 2, 4),
    (256, 256, 3, 1, 2),
    (256, 512, 3, 2, 2),
    (512, 512, 3, 1, 2),
    (512, 512, 3, 1, 1),
    (512, 2048, 1, 1, 1),
)
NETWORKS = ("resnet18", backbones.SMALL, "resnet50")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the largest value


def plain_twin(network: nn.Module) -> nn.Module:
    """Return a copy of a network with nn.Conv2d throughout."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if type(module) is convolution.Conv2d:
            module.__class__ = nn.Conv2d
    return twin


def one_pass(network: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the output and the gradients of the parameters of one pass forward and backward."""
    network.zero_grad(set_to_none=True)
    x.grad = None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = network(x)
    out.backward(torch.ones_like(out))
    gradients = [parameter.grad for parameter in network.parameters()]
    return [out.detach(), *gradients, *([] if x.grad is None else [x.grad])]


def seconds(sides: dict[str, nn.Module], x, dtype, repeats: int) -> dict[str, float]:
    """Return the fastest pass of each side, after one to warm up."""
    times = {name: [] for name in sides}
    for _ in range(1 + repeats):
        for name, network in sides.items():
            began = time.process_time()
            one_pass(network, x, dtype)
            times[name].append(time.process_time() - began)
    return {name: min(own[1:]) for name, own in times.items()}


def is_equal(sides: dict[str, nn.Module], x, kind: str) -> bool:
    """Return whether both sides have the same output and gradients up to rounding."""
    ours, theirs = (one_pass(network, x, DTYPES[kind]) for network in sides.values())
    return all(
        (a.float() - b.float()).abs().max() <= TOLERANCE[kind] * b.float().abs().max()
        for a, b in zip(ours, theirs)
    )


def measure_layers(args, kind: str) -> bool:
    """Print a line for each layer; return whether all are faster as products."""
    is_met = True
    for channels, outputs, kernel, stride, side in LAYERS:
        layer = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
        layer = layer.to(memory_format=torch.channels_last)
        sides = {"product": convolution.use_products(copy.deepcopy(layer)), "conv": layer}
        x = torch.randn(args.batch, channels, side, side).to(DTYPES[kind])
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        if not is_equal(sides, x, kind):
            raise SystemExit(f"{layer} of {side}x{side} differs as a product in {kind}")
        times = seconds(sides, x, DTYPES[kind], args.repeats)
        ratio = times["conv"] / times["product"]
        is_met = is_met and ratio >= 1
        print(
            f"  {channels:4} to {outputs:4}, {kernel}x{kernel}, stride {stride}, of {side}x{side}: "
            f"nn.Conv2d {1e3 * times['conv']:6.2f} ms, product {1e3 * times['product']:6.2f} ms, "
            f"{ratio:.1f} times as fast",
            flush=True,
        )
    return is_met


def measure_networks(args, kind: str) -> bool:
    """Print a line for each network; return whether all are faster with products."""
    is_met = True
    for name in NETWORKS:
        torch.manual_seed(0)
        network = backbones.build(name, 128).to(memory_format=torch.channels_last)
        sides = {"product": network, "conv": plain_twin(network)}
        x = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        times = seconds(sides, x, DTYPES[kind], args.repeats)
        ratio = times["conv"] / times["product"]
        is_met = is_met and ratio >= 1
        print(
            f"  {name:14} nn.Conv2d {args.batch / times['conv']:6.0f} pictures/s, products "
            f"{args.batch / times['product']:6.0f}, {ratio:.2f} times as fast",
            flush=True,
        )
    return is_met


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="pictures")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    about = "passes of each side; the fastest counts"
    parser.add_argument("--repeats", type=int, default=5, help=about)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"batch {args.batch}, {args.threads} threads, torch {torch.__version__}", flush=True)
    is_met = True
    for kind in args.dtypes:
        print(f"{kind}, forward and backward", flush=True)
        is_met = all([is_met, measure_layers(args, kind), measure_networks(args, kind)])
    return int(not is_met)


if __name__ == "__main__":
    sys.exit(main())
