"""Let the processes of a job communicate: gather rows, sum, agree, wait for each other.

With one process there is nothing to exchange, so no script needs a second code path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_host = None  # a gloo group for flags and objects on the host: NCCL only moves device memory


def open_host_group() -> None:
    """Open the group that `vote`, `gather_objects` and `barrier` use, after the process group."""
    global _host
    _host = dist.new_group(backend="gloo")


def leave() -> None:
    """Close all groups of this process."""
    global _host
    dist.destroy_process_group()
    _host = None


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def own_rows(x: Tensor) -> Tensor:
    """Return this rank's rows of the global batch: (n * world_size, ...) -> (n, ...)."""
    return x.chunk(world_size())[rank()]


def all_gather(x: Tensor) -> Tensor:
    """Gather the rows of every rank, in rank order: (n, ...) -> (n * world_size, ...).

    n must be the same on every rank, and no gradient flows.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(out, x)
    return torch.cat(out)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather rows as `all_gather` does, with gradients summed over all ranks.

    DistributedDataParallel averages over ranks afterwards, so a loss that every rank computes as a
    mean over the gathered rows has exactly the gradient of the one-process loss.
    """
    if world_size() == 1:
        return x
    return _Gathered.apply(x)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        return own_rows(summed(grad))


def gather_ragged(x: Tensor) -> Tensor:
    """Gather rows as `all_gather` does, from ranks with different numbers of rows."""
    if world_size() == 1:
        return x.detach()
    rows = all_gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
    padded = x.detach().new_zeros((max(rows), *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    parts = all_gather(padded).split(max(rows))
    return torch.cat([part[:n] for part, n in zip(parts, rows)])


def summed(x: Tensor) -> Tensor:
    """Return the elementwise sum over ranks, on every rank; `x` does not change."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def averaged(x: Tensor) -> Tensor:
    """Return the elementwise mean over ranks."""
    return summed(x) / world_size()


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0 to every rank, before an evaluation that all ranks share."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def vote(flag: bool) -> Callable[[], bool]:
    """Start to ask all ranks whether `flag` is True on any of them.

    Returns a function that waits for the answer and returns it. Neither waits for a GPU.
    """
    if world_size() == 1:
        return lambda: flag
    highest = torch.tensor([int(flag)])
    exchange = dist.all_reduce(highest, dist.ReduceOp.MAX, _host, async_op=True)

    def answer() -> bool:
        exchange.wait()
        return bool(highest)

    return answer


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is True on any rank, without waiting for a GPU."""
    return vote(flag)()


def agree(value):
    """Return rank 0's value (any picklable object) on every rank."""
    return gather_objects(value)[0]


def gather_objects(value) -> list:
    """Return the values (any picklable objects) of all ranks, in rank order, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_host)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(group=_host)
