"""Make batch-norm on one device behave as on several GPUs: shuffle keys, normalise in groups.

Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm


def _all_gather(x: Tensor) -> Tensor:
    """Return the rows of every rank, in rank order and without gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x)
    return torch.cat(out)


@torch.no_grad()
def encode_shuffled(
    encode: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Encode images (B, ...) of this rank with batch statistics taken over a shuffled batch.

    The global batch is redistributed at random over ranks and groups, so that the statistics come
    from other images than the loss compares ("shuffling BN", MoCo, He et al., arXiv:1911.05722,
    section 3.3), and the features are brought back into the original order.
    generator: a CPU generator in the same state on every rank. Returns (features of this rank's
    images (B, D), those of all ranks (B * world_size, D)), without gradient.
    """
    is_alone = not dist.is_initialized()
    rank, world = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    order = torch.randperm(len(images) * world, generator=generator)
    own = order.chunk(world)[rank].to(images.device, non_blocking=True)
    places = order.argsort().to(images.device, non_blocking=True)
    features = _all_gather(encode(_all_gather(images)[own]))[places]
    return features.chunk(world)[rank], features


def is_wide(x: Tensor) -> bool:
    """Return whether networks normalise all parts of a batch in one call, which saves launches.

    On a CPU a call for each part is up to twice as fast, since it copies less.
    """
    return x.is_cuda and not torch.compiler.is_compiling()


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch-norm that normalises `splits` contiguous parts of a batch separately, as GPUs do.

    Running statistics are those of the first part, as rank 0 of that many GPUs writes them to its
    checkpoint; with running = "mean" they are the mean over the parts. In evaluation mode, and with
    one split, this is nn.BatchNorm2d. Raises ValueError if the parts would not be equal.
    """

    splits = 1
    running = "first"
    wide = None  # weight, bias, mean and variance (C * splits,) while a network runs, see _widen
    filled = False  # whether `wide` has the statistics of a batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} cannot be split into {self.splits} equal batch-norm groups"
            )
        if torch.compiler.is_compiling():
            return self._at_once(x)
        if self.wide is not None:
            return self._as_channels(x)
        return self._in_turn(x.chunk(self.splits))

    def _at_once(self, x: Tensor) -> Tensor:
        """Compute `forward` with operations over all parts at once, which a compiler can fuse.

        Without a loop over the parts it needs a fifth of the kernel launches.
        """
        parts = x.unflatten(0, (self.splits, -1)).float()  # S x n x C x H x W
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0, keepdim=True)
        with torch.no_grad():
            n = parts[0].numel() // parts.shape[2]
            self._update(self.running_mean, mean.flatten(1))
            self._update(self.running_var, var.flatten(1) * (n / (n - 1)))
            self.num_batches_tracked.add_(1)
        scale = (var + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        return ((parts - mean) * scale + self.bias.view(-1, 1, 1)).to(x.dtype).flatten(0, 1)

    def _update(self, average: Tensor, batch: Tensor) -> None:
        """Move a running average (C,) towards the statistics of the batch (S, C)."""
        average.lerp_(batch.mean(0) if self.running == "mean" else batch[0], self.momentum)

    def _in_turn(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Normalise part after part, each from the running statistics before this batch."""
        before = torch.stack([self.running_mean, self.running_var])
        after = before.repeat(self.splits, 1, 1)  # S x 2 x C
        out = []
        for part, (mean, var) in zip(parts, after):
            settings = (self.weight, self.bias, True, self.momentum, self.eps)
            out.append(batch_norm(part, mean, var, *settings))
        mean, var = after.mean(0) if self.running == "mean" else after[0]
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.add_(1)
        return torch.cat(out)

    def _as_channels(self, x: Tensor) -> Tensor:
        """Normalise (S * n, C, H, W) as (n, C * S, H, W); leaves the batch statistics in `wide`.

        Where a network runs a layer twice, as on pictures and on patches, the second call is usual.
        """
        if self.filled:
            _move([self])
            return self(x)
        self.filled = True
        weight, bias, mean, var = self.wide
        parts = x.permute(0, 2, 3, 1).unflatten(0, (self.splits, -1))  # S x n x H x W x C
        wide = parts.permute(1, 2, 3, 4, 0).flatten(3).permute(0, 3, 1, 2)
        wide = batch_norm(wide, mean, var, weight, bias, True, 1.0, self.eps)
        parts = wide.permute(0, 2, 3, 1).unflatten(3, (-1, self.splits))  # n x H x W x C x S
        parts = parts.permute(4, 3, 0, 1, 2).clone(memory_format=torch.channels_last_3d)
        # No view: what changes it in place, as a ReLU does, would cost more in the backward pass.
        return torch.ops.aten._unsafe_view(parts.transpose(1, 2), x.shape)


def _widen(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """Prepare all norms of `module` for `_as_channels`, together; a forward pre-hook."""
    if not (module.training and is_wide(inputs[0])):
        return
    norms = [child for child in module.modules() if isinstance(child, SplitBatchNorm2d)]
    if not norms:
        return
    splits = norms[0].splits
    parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    sizes = [splits * len(parameter) for parameter in parameters]
    settings = torch.cat(parameters).repeat_interleave(splits)
    statistics = torch.zeros_like(settings, requires_grad=False).split(sizes)
    settings = settings.split(sizes)
    columns = (settings[::2], settings[1::2], statistics[::2], statistics[1::2])
    for norm, *wide in zip(norms, *columns):
        norm.wide = wide
        norm.filled = False


def _move_averages(module: nn.Module, inputs: tuple[Tensor], _) -> None:
    """Move the running statistics of all norms that `_widen` prepared; a forward hook."""
    if not (module.training and is_wide(inputs[0])):
        return
    norms = [child for child in module.modules() if getattr(child, "wide", None) is not None]
    if filled := [norm for norm in norms if norm.filled]:
        _move(filled)
    for norm in norms:
        norm.wide = None


@torch.no_grad()
def _move(norms: list[SplitBatchNorm2d]) -> None:
    """Move the running statistics of norms towards those that a batch has left in `wide`."""
    parts = torch.cat([x for norm in norms for x in norm.wide[2:]]).view(-1, norms[0].splits)
    batch = parts.mean(1) if norms[0].running == "mean" else parts[:, 0].contiguous()
    averages = [average for norm in norms for average in (norm.running_mean, norm.running_var)]
    batch = batch.split([len(average) for average in averages])
    torch._foreach_lerp_(averages, batch, norms[0].momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    for norm in norms:
        norm.wide = None
        norm.filled = False


def split(module: nn.Module, splits: int, running: str = "first") -> nn.Module:
    """Turn every BatchNorm2d of `module` into a SplitBatchNorm2d, in place, and return `module`.

    Parameters and their names do not change. With one split this does nothing. running: "first" or
    "mean", see `SplitBatchNorm2d`. Raises ValueError for another one, or for less than one split.

    >>> network = split(nn.Sequential(nn.BatchNorm2d(3)), splits=2)
    >>> network(torch.randn(8, 3, 2, 2)).unflatten(0, (2, 4)).mean((1, 3, 4)).abs().max() < 1e-5
    tensor(True)
    """
    if splits < 1 or running not in ("first", "mean"):
        raise ValueError(f"splits {splits} must be at least 1, running {running!r} first or mean")
    if splits == 1:
        return module
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SplitBatchNorm2d
            child.splits = splits
            child.running = running
    module.register_forward_pre_hook(_widen)
    module.register_forward_hook(_move_averages)
    return module
