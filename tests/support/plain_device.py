"""What Apple's GPU refuses, refused here: float64, unsigned types, pinned memory, and copies that do not wait.

The device `meta` is the stub of a device: nothing is computed on it, and everything that would be is seen.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = (torch.float64, torch.uint16, torch.uint32, torch.uint64)


class RefusedError(AssertionError):
    """Something that Apple's GPU cannot do."""


class RefusingDevice(TorchDispatchMode):
    """Raise for every operation with a tensor on `meta` of a type that the device lacks, or that needs pinning."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, found)):
            if isinstance(value, Tensor) and value.device.type == "meta" and value.dtype in REFUSED:
                raise RefusedError(f"{func} with {value.dtype}")
        if (kwargs or {}).get("pin_memory") or (kwargs or {}).get("non_blocking"):
            raise RefusedError(f"{func} with {kwargs}")
        return found


class RefusingZeros(RefusingDevice):
    """The same, and a copy from the device to the CPU gives zeros, so that what follows the device can run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and target == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)


class RefusingCalls(TorchFunctionMode):
    """Raise for every call of torch in this thread that gives such a type, pins memory, or copies without waiting."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "pin_memory" or name == "record_stream" or (kwargs or {}).get("pin_memory"):
            raise RefusedError(name)
        if (kwargs or {}).get("non_blocking"):
            raise RefusedError(f"{name} that does not wait")
        found = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) and value.dtype in REFUSED for value in tree_leaves(found)):
            raise RefusedError(f"{name} gives a type that the device lacks")
        return found
