"""Start one or several processes of a script, and let them talk to each other.

A script calls `launch(worker, args)` once; `worker(args, process)` then runs in every process. Without any flag that is
this very process on the best device. The other ways in:

    torchrun --nproc-per-node 8 script.py ...                         environment of torchrun; `srun torchrun` on Slurm
    script.py --multiprocessing-distributed --world-size 1 --rank 0   one process per GPU of this node, as published
    script.py --nproc 2 --device cpu                                  that many processes here (CPU: gloo)
    script.py --world-size 4 --rank 2 --dist-url tcp://host:port      this process is rank 2 of 4

With one process every collective below is the identity, so no script needs a second code path.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn

from common import UsageError, UserError, printable

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
REPEAT = 2.0  # seconds in which a second signal is the first one arriving again by another way
LOST = "another process of this job has ended (its own message says why); continue with --resume auto"
here = 1  # processes of this job on this node
_control = None  # a gloo group for host-side flags; the default group may be NCCL, which only moves device memory


@dataclass(frozen=True)
class Process:
    """One process of a job: global `rank` of `world_size`, `local_rank` on its node, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launch(worker, args) -> None:
    """Run `worker(args, process)` in every process that the flags or the environment ask for, and return when done.

    An error that the user can put right is printed once, as one line, and ends the job with its exit code.
    """
    env = os.environ
    if env.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        _join(worker, args, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "env://")
    elif args.multiprocessing_distributed or (args.nproc or 1) > 1:
        _spawn(worker, args)
    elif args.world_size > 1:
        if args.rank < 0 or not args.dist_url:
            raise UsageError(f"--world-size {args.world_size} needs --rank and --dist-url tcp://HOST:PORT as well")
        _join(worker, args, args.rank, args.world_size, args.rank % max(1, torch.cuda.device_count()), args.dist_url)
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UsageError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks that do not know each other: start one task per node "
            "with `srun torchrun ...` (README.md has the sbatch file)"
        )
    else:
        gpus = 0 if args.device == "cpu" or args.gpu is not None else torch.cuda.device_count()
        if gpus > 1:  # the published scripts that took one process put it on all of them
            everywhere = "--multiprocessing-distributed --world-size 1 --rank 0"
            print(f"note: one process uses one GPU, of the {gpus} that are visible; {everywhere} uses all", flush=True)
        _join(worker, args, 0, 1, args.gpu or 0, None)


def _spawn(worker, args) -> None:
    """One process per GPU of this node, or --nproc of them, under torch's own supervision."""
    nodes, node = max(args.world_size, 1), max(args.rank, 0)
    nproc = args.nproc or (0 if args.device == "cpu" else torch.cuda.device_count()) or 1
    if not node < nodes:
        raise UsageError(f"--rank {args.rank}: with --world-size {nodes} nodes it is 0 to {nodes - 1}")
    if nodes > 1 and args.rank < 0:
        raise UsageError(f"--world-size {nodes} nodes need --rank 0 to {nodes - 1}, a different one on each")
    if nodes > 1 and not args.dist_url:
        raise UsageError(f"--world-size {nodes} nodes need --dist-url tcp://HOST:PORT of node 0")
    if args.gpu is not None:  # as published: each process has a GPU of its own
        print(f"note: --gpu {args.gpu} is for a single process; ignored", flush=True)
        args.gpu = None
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # a free port
        url = args.dist_url if nodes > 1 else f"tcp://127.0.0.1:{s.getsockname()[1]}"
    passed_on = []

    def pass_on(signum, frame):  # the first asks for a checkpoint, a later one means: now
        passed_on.append(time.monotonic())
        for child in children.processes:
            if child.is_alive():
                child.kill() if passed_on[-1] - passed_on[0] > REPEAT else os.kill(child.pid, signum)

    children = torch.multiprocessing.spawn(_child, (worker, args, node * nproc, nodes * nproc, url), nproc, join=False)
    previous = {s: signal.signal(s, pass_on) for s in STOP_SIGNALS}
    try:
        while not children.join(grace_period=10):  # ends the others where one fails
            pass
    except torch.multiprocessing.ProcessExitedException as ended:
        if ended.signal_name is None:
            sys.exit(ended.exit_code)  # it has said why
        if passed_on:
            sys.exit(128 + getattr(signal, ended.signal_name))
        hint = " (by the system, when memory runs out)" if ended.signal_name == "SIGKILL" else ""
        raise UserError(f"a process of this job was ended by {ended.signal_name}{hint}") from None
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _child(i, worker, args, first_rank, world_size, url) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # torch sends it when the parent has died
    try:
        _join(worker, args, first_rank + i, world_size, i, url)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        told = in_one_line(error)
        if told is None:
            raise
        lost = told[0] == LOST
        if first_rank + i or lost:  # most mistakes are everybody's: rank 0 says it, and torch ends this one
            time.sleep(2)
        if not lost or here < world_size:  # a peer on this node has said why itself, or its parent does
            print(f"error: {told[0]}", file=sys.stderr, flush=True)
        os._exit(told[1])


def in_one_line(error: Exception) -> tuple[str, int] | None:
    """(message, exit code) of an error that the user or the machine has caused; None where a traceback is wanted."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first.split('. ')[0]}: lower --batch-size, or use --amp", 1
    if isinstance(error, RuntimeError) and first.startswith("DataLoader worker"):  # ended by the system
        return f"{first} With little memory or /dev/shm, use fewer --workers", 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; a checkpoint that was written before is whole", 1
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{printable(error.filename)}: {error.strerror.lower()}", 1
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # in errors of gloo and NCCL
    return (LOST, 1) if isinstance(error, RuntimeError) and any(sign in str(error) for sign in gone) else None


def _join(worker, args, rank, world_size, local_rank, url) -> None:
    global _control, here
    device = _device(args, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if url is None:
        worker(args, Process(device=device))
        return
    backend = "gloo" if device.type == "cpu" else args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu" and args.dist_backend == "nccl" and rank == 0:
        print("note: --dist-backend nccl needs GPUs; using gloo", flush=True)
    try:
        dist.init_process_group(backend, url, timedelta(minutes=30), world_size, rank)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"processes cannot meet at --dist-url {url}: {str(error).splitlines()[0][:200]}") from None
    # torch 2.15 renames a flag of DistributedDataParallel that 2.6 only knows by its old name
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    _control = dist.new_group(backend="gloo")
    here = gather_objects(socket.gethostname()).count(socket.gethostname())
    if device.type == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    try:
        worker(args, Process(rank, world_size, local_rank, device))
    except SystemExit:  # all ranks have agreed to stop
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after an error: it could wait for ranks that never answer
    _control = None


def _device(args, local_rank: int) -> torch.device:
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        if args.gpu is not None:
            raise UsageError(f"--gpu {args.gpu}: no CUDA device is usable here; omit the flag to run on the CPU")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is usable here (torch.cuda.is_available() is False)")
    index = local_rank if args.gpu is None else args.gpu
    if not 0 <= index < torch.cuda.device_count():
        raise UsageError(f"process {local_rank} has no GPU of its own: {torch.cuda.device_count()} here; lower --nproc")
    return torch.device("cuda", index)


def parallel(network: nn.Module, process: Process) -> nn.Module:
    """`network`, its gradients averaged over all processes; batch-norm statistics stay each process's own."""
    if process.world_size == 1:
        return network
    devices = [process.device] if process.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def cores() -> int:
    """Processor cores that this process may use: a scheduler or `taskset` may have bound it to a part of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def all_gather(x: Tensor) -> Tensor:
    """Rows of every rank, in rank order: (n, ...) -> (n * world_size, ...). No gradient flows; n is equal everywhere."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(out, x)
    return torch.cat(out)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As `all_gather`, and differentiable: a rank's rows receive the sum of the gradients that all ranks send them.

    DistributedDataParallel averages over ranks afterwards, so a loss that is a mean over the gathered rows and is
    computed on every rank gives exactly the gradient of the one-process loss.
    """
    return x if world_size() == 1 else torch.cat(torch.distributed.nn.functional.all_gather(x))


def gather_ragged(x: Tensor) -> Tensor:
    """As `all_gather` for a different number of rows on each rank (evaluation shares)."""
    if world_size() == 1:
        return x.detach()
    rows = all_gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
    padded = x.detach().new_zeros((max(rows), *x.shape[1:]))
    padded[: x.shape[0]] = x.detach()
    return torch.cat([part[:n] for part, n in zip(all_gather(padded).split(max(rows)), rows)])


def sum_ranks(x: Tensor) -> Tensor:
    """Elementwise sum over ranks, the same on all of them; `x` itself is left as it was."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_ranks(x: Tensor) -> Tensor:
    """Elementwise mean over ranks."""
    return sum_ranks(x) / world_size()


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0 (batch-norm statistics, before an evaluation that all ranks share)."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is True on one of them. Travels between hosts only; never waits for a GPU."""
    if world_size() == 1:
        return flag
    vote = torch.tensor([int(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=_control)
    return bool(vote)


def agree(value):
    """The value that rank 0 passed in, on every rank (any picklable object)."""
    return gather_objects(value)[0]


def gather_objects(value) -> list:
    """`value` of every rank, in rank order, on every rank (any picklable object)."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_control)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_control)
