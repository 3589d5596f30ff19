"""Mixed precision of the encoders: torch.autocast, or NVIDIA apex where it is installed."""

from __future__ import annotations

import contextlib
import platform

import torch
from torch import Tensor

from common import UserError


def has_amx() -> bool | None:
    """Whether this CPU has Intel's matrix unit for bfloat16; None where that says nothing (other architectures; bfloat16 in
    AVX-512 alone, which nobody measured) or PyTorch cannot tell."""
    with contextlib.suppress(Exception):  # private, or of newer versions
        if platform.machine().lower() in ("x86_64", "amd64"):
            if torch.cpu._is_amx_tile_supported():
                return True
            return None if torch.cpu._is_avx512_bf16_supported() else False
    return None


class Precision:
    """Mixed precision by torch.autocast: bfloat16 where the hardware has it, else (on CUDA) float16 with a scaler.

    Only encoders belong inside `autocast()`; logits, losses and memories are float32. `scaler` does nothing unless float16.
    Off by default, as published. What it costs or gains on a CPU hangs on AMX, its matrix unit for bfloat16: `note` says so.

    backend "apex": NVIDIA apex does it at `opt_level`; UserError where no apex is installed that still has `amp`.
    """

    def __init__(self, amp: bool, device: torch.device, backend: str = "torch", opt_level: str = "O2"):
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.device_type, self.enabled = device.type, amp and backend == "torch"
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and half)
        self.apex, self.opt_level = None, opt_level
        if amp and backend == "apex":
            try:
                from apex import amp as apex
            except ImportError:
                raise UserError(
                    "--amp-backend apex: no NVIDIA apex with `amp` is installed (upstream removed amp in 2025, and the "
                    "apex of the package index is another project); omit the flag to use torch's own autocast"
                ) from None
            if not hasattr(apex, "scale_loss"):
                raise UserError("--amp-backend apex: the installed `apex` is not NVIDIA's; omit the flag")
            self.apex = apex

    @classmethod
    def of(cls, args, device: torch.device) -> Precision:
        """Return what the flags of common.options say."""
        backend = getattr(args, "amp_backend", "torch")
        return cls(args.amp, device, backend, getattr(args, "opt_level", "O2"))

    @property
    def note(self) -> str:
        """What to say at the start of a run on a CPU where the other choice of --amp is the faster one, or nothing."""
        amx = has_amx() if self.device_type == "cpu" else None
        if self.enabled and amx is False:
            return (
                "--amp gains nothing on this CPU (no AMX) and may cost: 419 for 468 images/s seen, ResNet-18 at 32 px"
            )
        if not self.enabled and amx and self.apex is None:
            return "--amp can be faster on this CPU (AMX): ResNet-18 at 32 pixels 2.7 times with the 3x3 stem, as fast without"
        return ""

    def prepare(self, model, optimizer):
        """(model, optimizer) as the backend wants them: unchanged, or wrapped by apex. Before any parallel wrapper."""
        if self.apex is None:
            return model, optimizer
        return self.apex.initialize(model, optimizer, opt_level=self.opt_level)

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)

    def step(self, loss: Tensor, optimizer) -> None:
        """Fresh gradients of `loss`, and one step of the optimizer."""
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
        return str(self.dtype).removeprefix("torch.") + " autocast" if self.enabled else "float32"
