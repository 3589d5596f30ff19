"""Start the processes of a script, and let them communicate.

A script calls `start(worker, args)` once; `worker(args, process)` then runs in every process.
Without any flag this is the current process on the best device. Other ways to start:

    torchrun --nproc-per-node 8 script.py ...      torchrun's environment; `srun torchrun` on Slurm
    script.py --multiprocessing-distributed --world-size 1 --rank 0   one process a GPU of this node
    script.py --nproc 2 --device cpu               that many processes here (CPU: gloo)
    script.py --world-size 4 --rank 2 --dist-url tcp://host:port       this process is rank 2 of 4

What the processes say to each other is in common.collectives.
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
from torch import nn

from common import UsageError, UserError, collectives, printable

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
REPEAT = 2.0  # within so many seconds a second signal counts as a copy of the first
LOST = (
    "another process of this job has ended (its own message says why); continue with --resume auto"
)
here = 1  # number of processes of this job on this node


@dataclass(frozen=True)
class Process:
    """One process of a job: `rank` of `world_size`, `local_rank` on its node, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(worker, args) -> None:
    """Run `worker(args, process)` in every process that the flags or the environment ask for.

    Returns when all have finished. An error that the user can correct is printed once, as one line,
    and ends the job with its exit code.
    """
    env = os.environ
    if env.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        local_rank = int(env.get("LOCAL_RANK", 0))
        process = (int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, "env://")
        _join(worker, args, *process, gpu=args.gpu)
    elif args.multiprocessing_distributed or (args.nproc or 1) > 1:
        _spawn(worker, args)
    elif args.world_size > 1:
        if args.rank < 0 or not args.dist_url:
            raise UsageError(
                f"--world-size {args.world_size} also needs --rank and --dist-url tcp://HOST:PORT"
            )
        local_rank = args.rank % max(1, torch.cuda.device_count())
        process = (args.rank, args.world_size, local_rank, args.dist_url)
        _join(worker, args, *process, gpu=args.gpu)
    elif args.world_size == 0:
        raise UsageError("--world-size 0: a job has at least 1 process; omit the flag for one")
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UsageError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks that do not know each other: start "
            "one task per node with `srun torchrun ...` (docs/hardware.md has the sbatch file)"
        )
    else:
        _note_idle_gpus(args)
        _join(worker, args, 0, 1, args.gpu or 0, None, gpu=args.gpu)


def _note_idle_gpus(args) -> None:
    """Print how to use all GPUs, since some published scripts use them all in one process."""
    if args.device == "cpu" or args.gpu is not None:
        return
    gpus = torch.cuda.device_count()
    if gpus > 1:
        print(
            f"note: this process uses one of {gpus} visible GPUs; "
            "--multiprocessing-distributed --world-size 1 --rank 0 uses all of them",
            flush=True,
        )


def _spawn(worker, args) -> None:
    """Start one process per GPU of this node, or --nproc processes, with torch.multiprocessing."""
    nodes = max(args.world_size, 1)
    node = max(args.rank, 0)
    nproc = args.nproc
    if not nproc and args.device != "cpu":
        nproc = torch.cuda.device_count()
    nproc = nproc or 1
    if node >= nodes:
        raise UsageError(
            f"--rank {args.rank}: with --world-size {nodes} nodes it must be 0 to {nodes - 1}"
        )
    if nodes > 1 and args.rank < 0:
        raise UsageError(
            f"--world-size {nodes} nodes need --rank 0 to {nodes - 1}, a different one on each"
        )
    if nodes > 1 and not args.dist_url:
        raise UsageError(f"--world-size {nodes} nodes need --dist-url tcp://HOST:PORT of node 0")
    if args.gpu is not None:  # as published: each process has a GPU of its own
        print(
            f"note: --gpu {args.gpu} is ignored, since it applies to a single process", flush=True
        )
    url = args.dist_url if nodes > 1 else f"tcp://127.0.0.1:{_free_port()}"
    _supervise(nproc, (worker, args, node * nproc, nodes * nproc, url))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _supervise(nproc: int, arguments: tuple) -> None:
    """Run `_child(i, *arguments)` in nproc processes; forward signals, end all if one fails."""
    passed_on = []

    def pass_on(number, frame):
        # The first signal asks for a checkpoint, a later one ends the job at once.
        passed_on.append(time.monotonic())
        for child in children.processes:
            if not child.is_alive():
                continue
            if passed_on[-1] - passed_on[0] > REPEAT:
                child.kill()
            else:
                os.kill(child.pid, number)

    children = torch.multiprocessing.spawn(_child, arguments, nproc, join=False)
    heeded = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # as by nohup
    previous = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        while not children.join(grace_period=10):  # ends the others if one fails
            pass
    except torch.multiprocessing.ProcessExitedException as ended:
        if ended.signal_name is None:
            sys.exit(ended.exit_code)  # the process has printed its error
        if passed_on:
            sys.exit(128 + getattr(signal, ended.signal_name))
        hint = ""
        if ended.signal_name == "SIGKILL":
            hint = " (by the system, when memory runs out)"
        raise UserError(f"a process of this job was ended by {ended.signal_name}{hint}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _child(i: int, worker, args, first_rank: int, world_size: int, url: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for when the parent dies
    try:
        _join(worker, args, first_rank + i, world_size, i, url, gpu=None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        answer = in_one_line(error)
        if answer is None:
            raise
        message, code = answer
        is_lost = message == LOST
        if first_rank + i or is_lost:  # most errors are the same on all ranks: rank 0 reports first
            time.sleep(2)
        if not is_lost or here < world_size:  # a peer on this node has said why
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(code)


def in_one_line(error: Exception) -> tuple[str, int] | None:
    """Return (message, exit code) for an error that the user or the machine caused.

    Returns None for an error of the program, which deserves its traceback.
    """
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first.split('. ')[0]}: lower --batch-size, or use --amp", 1
    if isinstance(error, RuntimeError) and first.startswith("DataLoader worker"):
        cause = "the memory or /dev/shm may be too small: use fewer --workers (0 needs no /dev/shm)"
        return f"{first.partition('. ')[0]}; {cause}", 1
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and (error.filename or is_full):
        where = f"{printable(error.filename)}: " if error.filename else ""
        kept = "; files that were saved before are intact" if is_full else ""
        return f"{where}{error.strerror.lower()}{kept}", 1
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return LOST, 1  # errors of gloo and NCCL
    return None


def _join(
    worker, args, rank: int, world_size: int, local_rank: int, url: str | None, gpu: int | None
) -> None:
    """Run `worker` as this rank. url: address where the ranks meet; None for a single process."""
    device = _device(args.device, gpu, local_rank, args.dist_backend == "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if url is None:
        worker(args, Process(device=device))
        return
    _meet(args, device, rank, world_size, url)
    try:
        worker(args, Process(rank, world_size, local_rank, device))
    except SystemExit:  # all ranks have agreed to stop
        collectives.leave()
        raise
    collectives.leave()  # not after an error, since it could wait for ranks that never answer


def _meet(args, device: torch.device, rank: int, world_size: int, url: str) -> None:
    """Open the process group, and the gloo group for objects on the host."""
    global here
    backend = "gloo"
    if device.type != "cpu":
        backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu" and args.dist_backend == "nccl" and rank == 0:
        print("note: --dist-backend nccl needs GPUs; using gloo", flush=True)
    try:
        dist.init_process_group(backend, url, timedelta(minutes=30), world_size, rank)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"processes cannot meet at --dist-url {url}: {reason}") from None
    # torch 2.15 renames a flag of DistributedDataParallel that 2.6 only knows by its old name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    collectives.open_host_group()
    here = collectives.gather_objects(socket.gethostname()).count(socket.gethostname())
    if device.type == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, torch.get_num_threads() // here))


def _device(device: str, gpu: int | None, local_rank: int, shared: bool) -> torch.device:
    """Return the device of a process from --device, --gpu and its rank on the node.

    shared: whether several processes may have the same GPU.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        if gpu is not None:
            raise UsageError(
                f"GPU {gpu}: no CUDA device is usable here; omit its flag to run on the CPU"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: no CUDA device is usable here (torch.cuda.is_available() is False)"
        )
    count = torch.cuda.device_count()
    index = local_rank if gpu is None else gpu
    if shared and gpu is None:
        index = local_rank % count
    if gpu is not None and not 0 <= gpu < count:
        raise UsageError(f"--gpu {gpu}: this node's GPUs have the numbers 0 to {count - 1}")
    if not 0 <= index < count:
        raise UsageError(
            f"process {local_rank} has no GPU of its own, since this node has {count}: "
            "lower --nproc"
        )
    return torch.device("cuda", index)


def parallel(network: nn.Module, process: Process) -> nn.Module:
    """Wrap `network` so that gradients are averaged over all processes.

    Batch-norm statistics remain separate in each process.
    """
    if process.world_size == 1:
        return network
    devices = [process.device] if process.device.type == "cuda" else None
    wrapper = nn.parallel.DistributedDataParallel
    return wrapper(network, device_ids=devices, broadcast_buffers=False)


def cores() -> int:
    """Return the number of cores this process may use, as set by a scheduler or `taskset`."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
