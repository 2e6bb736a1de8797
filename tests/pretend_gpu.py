"""A pretend GPU for a whole process: device "pretend", whose tensors hold CPU values and do not mix with the CPU's.

As on CUDA, a tensor of the CPU is taken beside one of the device only if it has no dimension or is an index; nothing of
the device is written to the CPU but by a copy, none becomes an array of NumPy, and random numbers want a generator of
the device's. `install` can't be undone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # it is experimental
MOVES, INDEXES = ("copy_", "_to_copy"), ("index", "index_put_", "index_put", "_index_put_impl_")


class OnDevice(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        self.inner = inner.detach()
        return self

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a tensor of {NAME} is no array of NumPy: use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            new = OnDevice(self.inner.clone(memory_format=torch.preserve_format))
            new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "inner"})
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnDevice, (self.inner.clone(),)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _ForFactories(TorchDispatchMode):
    """Also what has no tensor of the device among its arguments may make one, or move one to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = _is_ours(kwargs.get("device")) or any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        return _run(func, args, kwargs) if ours else func(*args, **kwargs)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.rpartition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    indexes = name in INDEXES and isinstance(args[0], OnDevice)
    if ours and name not in MOVES and not indexes:
        infos = [argument.alias_info for argument in func._schema.arguments]
        written = [a for a, info in zip(args, infos, strict=False) if info is not None and info.is_write]
        if any(tensor.dim() or any(tensor is a for a in written) for tensor in others):
            raise RuntimeError(f"expected all tensors to be on the same device, but found {NAME}:0 and cpu ({func})")
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"expected a {NAME!r} device type for generator but found 'cpu' ({func})")
    onto = _is_ours(kwargs["device"]) if kwargs.get("device") is not None else bool(ours)
    if name == "copy_" and not isinstance(args[0], OnDevice):
        onto = False
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    if _is_ours(kwargs.get("device")):
        inner_kwargs["device"] = "cpu"
    out = func(*inner_args, **inner_kwargs)
    known = {id(tensor.inner): tensor for tensor in ours}

    def moved(value: Any) -> Any:  # what was written to in place comes back as it is
        return known[id(value)] if id(value) in known else OnDevice(value) if isinstance(value, torch.Tensor) else value

    return tree_map(moved, out) if onto else out


def install() -> None:
    """Make the device known to PyTorch. Call it before anything of this repository is imported."""

    class Module(backend_registration._DummyBackendModule):
        def manual_seed_all(self, seed: int) -> None: ...

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.serialization.add_safe_globals([OnDevice])
    tensor, load = torch.tensor, torch.load

    def new_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = tensor(data, *args, **kwargs)  # C++ asks no mode
        return made if device is None else made.to(device)

    def loaded(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        found = load(file, map_location="cpu" if _is_ours(map_location) else map_location, **kwargs)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, found)

    to_double = nn.Module.double

    def double(module: nn.Module) -> nn.Module:  # its tensors can't change their type in place
        device = next(module.parameters()).device
        return to_double(module.cpu()).to(device)

    torch.tensor, torch.load, nn.Module.double = new_tensor, loaded, double
    # Its tensors count no writes, as inference mode wants of views.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()
    _ForFactories().__enter__()
