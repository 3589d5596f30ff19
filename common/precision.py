"""Run encoders in mixed precision, by torch.autocast or NVIDIA apex."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import UserError, collectives

PICTURES = 16  # in a timed batch, but at least two in each batch-norm group
REPEATS = 2  # timed passes each way, after a warm-up pass; the fastest counts


class Precision:
    """Mixed precision by torch.autocast: bfloat16, or float16 with a scaler on GPUs without it.

    Only encoders belong inside `autocast()`; logits, losses and memories are float32. `scaler` does
    nothing unless float16.

    amp: False, True or "auto", which is True except on a CPU, where it is False until `choose`
    decides. backend: "torch", or "apex" for NVIDIA apex at `opt_level`; raises UserError if apex is
    not installed. remark: one line for the log about the choice of `choose`, or "".
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
        """Return the precision that the flags of common.options ask for."""
        backend = getattr(args, "amp_backend", "torch")
        return cls(args.amp, device, backend, getattr(args, "opt_level", "O2"))

    def choose(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Decide `--amp auto` on a CPU: time the network both ways and take the faster.

        The passes run forward and backward on random images of image_shape (C, H, W). With `embed`,
        which calls a frozen network, they run forward only. Call this before the network is
        compiled or wrapped for several processes. Parameters, gradients, buffers and torch's
        generator do not change, and all ranks take the choice of rank 0. Does nothing unless
        `--amp auto` is undecided.
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
                seconds[enabled].append(self._seconds(network, images, embed))
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers):
                buffer.copy_(value)
        plain, mixed = collectives.agree([min(seconds[enabled][1:]) for enabled in (False, True)])
        self.enabled = mixed < plain
        self.is_open = False
        self.remark = (
            f"--amp auto: {self}, since {rows} pictures take {mixed:.3f} s in bfloat16 and "
            f"{plain:.3f} s in float32"
        )

    def _seconds(self, network: nn.Module, images: Tensor, embed: Callable | None) -> float:
        """Time one pass in seconds. Gradients are computed but not kept."""
        start = time.perf_counter()
        with torch.set_grad_enabled(embed is None), self.autocast():
            out = (embed or network)(images)
        if embed is None:
            parts = [out] if isinstance(out, Tensor) else out
            loss = sum(part.float().square().mean() for part in parts)
            torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        return time.perf_counter() - start

    def prepare(self, model, optimizer):
        """Return (model, optimizer), wrapped by apex if it is used. Call before launch.parallel."""
        if self.apex is None:
            return model, optimizer
        return self.apex.initialize(model, optimizer, opt_level=self.opt_level)

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)

    def step(self, loss: Tensor, optimizer) -> None:
        """Compute the gradients of `loss` and take one optimizer step."""
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
        if self.enabled:
            return f"{self.dtype} autocast".removeprefix("torch.")
        has_tf32 = self.device_type == "cuda" and torch.backends.cudnn.allow_tf32
        return "float32, TF32 in convolutions" if has_tf32 else "float32"


def _import_apex():
    """Return NVIDIA's apex.amp. Raises UserError if no apex that has it is installed."""
    try:
        from apex import amp
    except ImportError:
        raise UserError(
            "--amp-backend apex: no NVIDIA apex with `amp` is installed (NVIDIA removed amp in "
            "2025, and the apex on PyPI is another project): omit the flag to use torch's autocast"
        ) from None
    if not hasattr(amp, "scale_loss"):
        raise UserError("--amp-backend apex: the installed `apex` is not NVIDIA's; omit the flag")
    return amp
