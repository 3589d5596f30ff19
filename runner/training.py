"""Make a network ready for training: its device, precision, optimizer and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from common import launch
from common.precision import Precision


def sgd(parameters: Iterable[nn.Parameter], args) -> Optimizer:
    """Return SGD with the settings of common.options.add_sgd_arguments."""
    return torch.optim.SGD(
        parameters,
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )


def prepare(
    network: nn.Module,
    args,
    process: launch.Process,
    make_optimizer: Callable[[Iterable[nn.Parameter], object], Optimizer] = sgd,
    channels: int = 3,
) -> tuple[nn.Module, nn.Module, Optimizer, Precision]:
    """Return (network, the same wrapped for several processes, its optimizer, its precision).

    The network is on its device, in training mode, compiled if --compile is given, and of the
    precision that the flags ask for. A step calls the wrapped one; the other has the parameters
    and their names. channels: number of channels of an input picture, whose side is --input-res
    pixels.
    """
    network = network.to(process.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(network.parameters(), args)
    precision = Precision.of(args, process.device)
    precision.choose(network, (channels, args.input_res, args.input_res))
    network, optimizer = precision.prepare(network, optimizer)
    if args.compile:
        network.compile()
    return network, launch.parallel(network, process), optimizer, precision
