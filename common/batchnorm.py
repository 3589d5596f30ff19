"""Batch-norm on one device as on several GPUs: keys shuffled over groups, and a batch normalised in groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import UsageError, UserError, launch


class BatchShuffle:
    """One random redistribution of the global batch over ranks and batch-norm groups, and the way back.

    The batch statistics of a group then come from other images than those that the loss compares ("shuffling BN",
    MoCo, He et al. 2020, section 3.3). `generator` is a CPU generator in the same state on every rank.
    """

    def __init__(self, rows: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        order = torch.randperm(rows * launch.world_size(), generator=generator)
        self.order, self.inverse = (x.to(device, non_blocking=True) for x in (order, order.argsort()))

    def spread(self, x: Tensor) -> Tensor:
        """(rows, ...) of this rank -> (rows, ...): this rank's slice of the permuted global batch."""
        return launch.all_gather(x)[self.own(self.order)]

    def collect(self, x: Tensor) -> Tensor:
        """What each rank made of its slice -> (rows * world_size, ...) in the original order, the same on all ranks."""
        return launch.all_gather(x)[self.inverse]

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of what `collect` returned."""
        return x.chunk(launch.world_size())[launch.rank()]


@torch.no_grad()
def encode_shuffled(
    encode: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Encode images (B, ...) of this rank with batch statistics taken over a shuffled batch.

    generator: as in `BatchShuffle`. Returns (features of this rank's images (B, D), those of all
    ranks (B * world_size, D)), both in the original order.
    """
    shuffle = BatchShuffle(len(images), generator, images.device)
    everyone = shuffle.collect(encode(shuffle.spread(images)))
    return shuffle.own(everyone), everyone


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch-norm that normalises `splits` contiguous parts of the batch apart, as that many GPUs would.

    Running statistics are those of the first part only: with one process per GPU it is rank 0 that writes the checkpoint; with
    running = "mean" they are the mean over the parts. In evaluation mode, and with one split, this is nn.BatchNorm2d.
    """

    splits, running = 1, "first"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        if x.shape[0] % self.splits:
            raise UserError(f"a batch of {x.shape[0]} cannot be split into {self.splits} equal batch-norm groups")
        if torch.compiler.is_compiling():
            return self._at_once(x)
        if self.running == "mean":
            return self._averaged(x.chunk(self.splits))
        first, *others = x.chunk(self.splits)
        how = (None, None, self.weight, self.bias, True, 0.0, self.eps)
        return torch.cat([super().forward(first), *(nn.functional.batch_norm(part, *how) for part in others)])

    def _at_once(self, x: Tensor) -> Tensor:
        """As `forward`, in operations that a compiler fuses: no loop over the parts, so a fifth of the launches."""
        parts = x.unflatten(0, (self.splits, -1)).float()  # S x n x C x H x W
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0, keepdim=True)
        with torch.no_grad():
            n = parts[0].numel() // parts.shape[2]
            seen = [mean.detach().flatten(1), var.detach().flatten(1) * (n / (n - 1))]  # S x C each
            for kept, new in zip((self.running_mean, self.running_var), seen):
                kept.lerp_(new.mean(0) if self.running == "mean" else new[0], self.momentum)
            self.num_batches_tracked.add_(1)
        scale = (var + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        return ((parts - mean) * scale + self.bias.view(-1, 1, 1)).to(x.dtype).flatten(0, 1)

    def _averaged(self, parts: tuple[Tensor, ...]) -> Tensor:
        """As `forward`. Every part starts from the statistics of before; kept is the mean of what they come to."""
        kept = torch.stack([self.running_mean, self.running_var]).repeat(self.splits, 1, 1)  # splits x 2 x C
        how = (self.weight, self.bias, True, self.momentum, self.eps)
        out = [nn.functional.batch_norm(x, mean, var, *how) for x, (mean, var) in zip(parts, kept)]
        mean, var = kept.mean(0)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)
        return torch.cat(out)


def split(module: nn.Module, splits: int, running: str = "first") -> nn.Module:
    """Turn every BatchNorm2d of `module` into a SplitBatchNorm2d, in place; parameters and their names stay."""
    for child in module.modules():
        if splits > 1 and type(child) is nn.BatchNorm2d:
            child.__class__, child.splits, child.running = SplitBatchNorm2d, splits, running
    return module


def splits_here(args, process: launch.Process) -> int:
    """Groups of this process, of --bn-splits over all. UsageError where the batch does not divide or is too small."""
    rows, splits = args.batch_size // process.world_size, max(1, args.bn_splits // process.world_size)
    if rows // splits < 2:
        wanted = f"two pictures or more in each of its {splits * process.world_size} groups (--bn-splits)"
        raise UsageError(f"--batch_size {args.batch_size}: batch-norm needs {wanted}")
    if rows % splits:
        raise UsageError(f"--bn-splits: {rows} images per process cannot be cut into {splits} equal groups")
    return splits
