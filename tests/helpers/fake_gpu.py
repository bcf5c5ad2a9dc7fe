"""A device that is not the CPU, without hardware: values are on the CPU, devices are judged by FakeTensorMode.

Each operation runs twice: on the values, and on fake tensors of the device ``fakegpu:0``, where torch's own rules raise
if the devices do not fit. So the code under test runs to its end, takes the paths of a GPU, and its results can be
compared. What torch would do on CUDA is not tested: its kernels, its rounding, its streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
#: Operations that FakeTensorMode cannot judge, because their result depends on values, and why each is allowed. Each
#: reads one tensor, or several that must be on one device.
NEED_VALUES: dict[Any, str] = {
    aten._local_scalar_dense.default: "a number leaves the device: item(), bool(), int(), float()",
    aten.item.default: "the same, in inference mode",
    aten.is_nonzero.default: "the same of bool(), in inference mode",
    aten.equal.default: "a bool leaves the device: torch.equal()",
    aten.nonzero.default: "as many rows as there are values other than zero",
    aten.index.Tensor: "with a mask among the indices: as many rows as the mask chooses",
    aten.masked_select.default: "the same",
    aten._unique2.default: "as many values as there are different ones",
}
#: Indexing, with a list of indices as its second argument.
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
DEVICE = "fakegpu:0"


#: Older versions of torch lack what registers the device; where CUDA is, the tests run on that.
EXISTS = hasattr(backend_registration, "_setup_privateuseone_for_python_backend") and not torch.cuda.is_available()


@cache
def _register() -> FakeTensorMode:
    module = backend_registration._DummyBackendModule()
    # Other tests of this process must not find an accelerator.
    module.is_available = module.device_count = lambda: 0  # type: ignore[method-assign]
    backend_registration._setup_privateuseone_for_python_backend("fakegpu", backend_module=module)
    return FakeTensorMode(allow_non_fake_inputs=True)


class OnGpu(Tensor):
    """A tensor of the fake device, whose numbers are in ``value``."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnGpu:
        strides = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=DEVICE, **strides)
        self.value = value
        return self

    def __repr__(self) -> str:
        """As a tensor's; the inherited one would call operations."""
        return f"OnGpu({self.value})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Lists as indices are made tensors in C++, on the device, past all modes.
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _as_index(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _as_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_index, index))
    # Of an empty list, torch alone would make numbers that are no indices.
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, (list, range)) else index


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    plain_args, plain_kwargs = tree_map_only(OnGpu, values, (args, kwargs))
    plain_args, plain_kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (plain_args, plain_kwargs))
    devices = _judge(func, args, kwargs)
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and isinstance(result, Tensor):
        return kwargs.get("out", args[0])
    if devices is None:  # It depends on values: the device is that of the first tensor.
        return tree_map_only(Tensor, OnGpu, result) if isinstance(args[0], OnGpu) else result
    if isinstance(result, (list, tuple)):
        return type(result)(map(_at, result, devices))
    return _at(result, devices)


def _at(value: Any, fake: Any) -> Any:
    return OnGpu(value) if isinstance(fake, Tensor) and fake.device.type == "fakegpu" else value


def _judge(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation returns on fake tensors, None if that depends on values; raises where it mixes devices."""
    if func in _INDEXED:  # FakeTensorMode is more lenient here than torch.
        on = {i.device for i in args[1] if i is not None}
        if not on <= {args[0].device, torch.device("cpu")}:
            raise RuntimeError(f"{func}: indices of another device than the tensor's")
    masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if func is aten.index.Tensor else []
    if masks or (func in NEED_VALUES and func is not aten.index.Tensor):
        devices = {t.device for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: tensors on several devices")
        return None
    with _register():
        args, kwargs = tree_map_only(Tensor, _fake, (args, kwargs))
        return func(*args, **kwargs)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        ours = device is not None and torch.device(device).type == "fakegpu"
        if ours or OnGpu in types or any(issubclass(t, OnGpu) for t in types):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """``torch.tensor(numbers, device=...)`` fills its result in C++, past all modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "fakegpu":
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[str]:
    """Context in which the device of the returned name exists."""
    _register()
    with _Lists(), _Factories():
        yield DEVICE


def moved(model: nn.Module, device: str) -> Any:
    """The model with its parameters and buffers on the device, tied ones still tied."""
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                at = nn.Parameter(parameter.detach().to(device), requires_grad=False)
                module._parameters[name] = memo.setdefault(id(parameter), at)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def values(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, wherever it is."""
    return tensor.value if isinstance(tensor, OnGpu) else tensor.detach()
