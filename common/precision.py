"""Mixed precision of the encoders: torch.autocast, or NVIDIA apex where it is installed."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from common import UserError, launch

PICTURES = 16  # in a batch that is timed, or two in each batch-norm group where that is more
REPEATS = 2  # timed passes each way, after one that is not timed; the fastest counts


class Precision:
    """Mixed precision by torch.autocast: bfloat16, or float16 with a scaler on GPUs without it.

    Only encoders belong inside `autocast()`; logits, losses and memories are float32. `scaler` does
    nothing unless float16.

    amp: False, as published; True; or "auto", which is True but on a CPU, where `choose` settles it
    and until then it is False. remark: one line about that choice for the log, "" without one.
    backend "apex": NVIDIA apex does it at `opt_level`. Raises UserError where it is not installed.
    """

    def __init__(self, amp: bool | str, device: torch.device, backend="torch", opt_level="O2"):
        self.apex = _import_apex() if amp and backend == "apex" else None
        self.opt_level = opt_level
        self.device_type = device.type
        self.is_open = amp == "auto" and device.type == "cpu" and self.apex is None
        self.enabled = bool(amp) and backend == "torch" and not self.is_open
        self.remark = ""
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and half)

    @classmethod
    def of(cls, args, device: torch.device) -> Precision:
        """Return what the flags of common.options say."""
        backend = getattr(args, "amp_backend", "torch")
        return cls(args.amp, device, backend, getattr(args, "opt_level", "O2"))

    def choose(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Settle `--amp auto` on a CPU: time the network both ways and take the faster.

        It is timed forward and backward, or forward only where no parameter wants a gradient, on
        random images of image_shape (C, H, W). Call this before the network is compiled or wrapped
        for several processes. Parameters, gradients, buffers and torch's generator stay as they
        are, and all ranks take the choice of rank 0. Does nothing where nothing is open.
        """
        if not self.is_open:
            return
        groups = max(getattr(module, "splits", 1) for module in network.modules())
        rows = groups * max(2, PICTURES // groups)
        buffers = [buffer.clone() for buffer in network.buffers()]
        seconds = {False: [], True: []}
        with torch.random.fork_rng(devices=[]):
            images = torch.rand(rows, *image_shape).to(memory_format=torch.channels_last)
            for enabled in (False, True) * (1 + REPEATS):
                self.enabled = enabled
                seconds[enabled].append(self._seconds(network, images))
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers):
                buffer.copy_(value)
        plain, mixed = launch.agree([min(seconds[enabled][1:]) for enabled in (False, True)])
        self.enabled = mixed < plain
        self.is_open = False
        self.remark = (
            f"--amp auto: {self}, since {rows} pictures take {mixed:.3f} s in bfloat16 and "
            f"{plain:.3f} s in float32"
        )

    def _seconds(self, network: nn.Module, images: Tensor) -> float:
        """Time one pass of the network. Gradients are computed, but not kept."""
        trained = [p for p in network.parameters() if p.requires_grad]
        start = time.perf_counter()
        with torch.set_grad_enabled(bool(trained)):
            with self.autocast():
                out = network(images)
            if trained:
                parts = [out] if isinstance(out, Tensor) else out
                loss = sum(part.float().square().mean() for part in parts)
                torch.autograd.grad(loss, trained, allow_unused=True)
        return time.perf_counter() - start

    def prepare(self, model, optimizer):
        """Return (model, optimizer), wrapped by apex where it is used, before launch.parallel."""
        if self.apex is None:
            return model, optimizer
        return self.apex.initialize(model, optimizer, opt_level=self.opt_level)

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)

    def step(self, loss: Tensor, optimizer) -> None:
        """Compute fresh gradients of `loss`, and take one step of the optimizer."""
        optimizer.zero_grad(set_to_none=True)
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def __str__(self):
        if self.apex is not None:
            return f"apex {self.opt_level}"
        return f"{self.dtype} autocast".removeprefix("torch.") if self.enabled else "float32"


def _import_apex():
    """Return NVIDIA's apex.amp. Raises UserError where no apex is installed that still has it."""
    try:
        from apex import amp
    except ImportError:
        raise UserError(
            "--amp-backend apex: no NVIDIA apex with `amp` is installed (upstream removed amp in "
            "2025, and the apex of the package index is another project); omit the flag to use "
            "torch's own autocast"
        ) from None
    if not hasattr(amp, "scale_loss"):
        raise UserError("--amp-backend apex: the installed `apex` is not NVIDIA's; omit the flag")
    return amp
