"""A pretend accelerator: its tensors compute on the CPU and refuse to meet host tensors.

    pretend_device.switch_on()         # for good: it replaces torch.Generator and torch.save
    x = torch.zeros(3, device="npu")
    x + torch.zeros(3)                 # RuntimeError: host and device tensors are mixed

What a GPU refuses is refused here without one: an operation of a device tensor with a host tensor
(other than a single number), a draw on the device from a generator of the host, a NumPy view of a
device tensor. An index is held to the same rule, though CUDA would copy a host index and wait for
it. Memory that was pinned is known as such (`is_pinned`). `torch.autocast` is accepted and changes
no type. A generator "on" the device is one of the CPU, so a run draws and computes what the CPU
does. torch.save writes the values behind.

Needs a PyTorch in which Python can register a device; see `missing`.
"""

from __future__ import annotations

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "npu"
MIXED = "host and device tensors are mixed"
COPIES = {"_to_copy", "copy_", "_copy_from"}  # operations that cross over
HostGenerator, host_save = torch.Generator, torch.save
# Kernels go with their library, and an address that tells a generator must not be used twice.
_kept: list = []
_generators: set[int] = set()  # of the device
_pinned: dict[int, torch.Tensor] = {}  # by the address of their storage


def missing() -> str | None:
    """Return what this PyTorch lacks for a device that Python registers, or None."""
    for name in ("_setup_privateuseone_for_python_backend", "_DummyBackendModule"):
        if not hasattr(backend_registration, name):
            return f"torch {torch.__version__} cannot register a device from Python (no {name})"
    return None


class DeviceTensor(torch.Tensor):
    """A tensor of the device; `host` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        result.host = host
        return result

    def __init__(self, host: torch.Tensor):
        pass

    def __repr__(self, **_):
        return f"{NAME}({self.host})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = [x for x in leaves if isinstance(x, DeviceTensor)]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
        here = [x for x in tensors if not isinstance(x, DeviceTensor)]
        if there and here and operation.overloadpacket.__name__ not in COPIES:
            raise RuntimeError(f"{operation}: {MIXED}")
        generators = [x for x in leaves if isinstance(x, HostGenerator)]
        if any(generator._cdata not in _generators for generator in generators):
            raise RuntimeError(f"{operation}: a generator of the host draws on the device")
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type != NAME
        if target is not None:
            kwargs = kwargs | {"device": target if to_host else torch.device("cpu")}
        result = operation(*tree_map(_host, args), **tree_map(_host, kwargs))
        return result if to_host else tree_map(lambda x: _on_device(x, there), result)


def _host(x):
    return x.host if isinstance(x, DeviceTensor) else x


def _on_device(x, operands: list[DeviceTensor]):
    """Return a result as the device's; of an operation in place it is the operand itself."""
    if not isinstance(x, torch.Tensor):
        return x
    return next((own for own in operands if own.host is x), DeviceTensor(x))


class Generator(HostGenerator):
    """A generator of the CPU that is marked as the device's, which has none of its own."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        if torch.device(device).type == NAME:
            _generators.add(generator._cdata)
            _kept.append(generator)
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self._cdata in _generators else torch.device("cpu")


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    memory_format = memory_format or torch.contiguous_format
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _host(target).copy_(_host(source))
    return target


def _pin(x: torch.Tensor) -> torch.Tensor:
    copy = x.clone()
    _pinned[copy.untyped_storage().data_ptr()] = copy
    return copy


def is_pinned(x: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() in _pinned


def _save(value, file, *rest, **options):
    host_save(tree_map(_host, value), file, *rest, **options)


def switch_on() -> torch.device:
    """Register the device in this process, for good, and return it."""
    # It reads annotations with torch.Generator, which is another class afterwards.
    import torch.distributed.tensor

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    kernels = library.Library("aten", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    kernels.impl("_local_scalar_dense", lambda x: _host(x).item(), "PrivateUse1")
    autocast = library.Library("_", "IMPL")
    autocast.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    _kept.extend([kernels, autocast])
    torch.Generator = Generator
    torch.save = _save
    torch.Tensor.pin_memory = _pin
    return torch.device(NAME, 0)
