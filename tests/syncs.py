"""Counts what would make the host wait for a GPU, on a CPU where nothing waits."""

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select"}
SIZES = {"nonzero", "masked_select", "_unique2"}  # operators whose result has a shape that the host must know


class Syncs:
    """`found`: (what, "file:function" that asked for it) of all that happens inside, DeepSpeed's own left out.

    Reads of values (`item`, `tolist`, `bool(...)`, ...), copies between devices that do not say non_blocking, and
    operators whose output has a shape that depends on values.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def __enter__(self) -> list[tuple[str, str]]:
        self.stack = ExitStack()
        self.stack.enter_context(_Functions(self))
        self.stack.enter_context(_Operators(self))
        return self.found

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def note(self, what: str) -> None:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        if "/deepspeed/" not in frame.f_code.co_filename:
            self.found.append((what, f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"))


def to_a_device(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    return "device" in keywords or any(isinstance(given, torch.device | str | torch.Tensor) for given in arguments)


class _Functions(TorchFunctionMode):
    """What Python calls; on CPU tensors much of it ends before any operator."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS:
            self.syncs.note(name)
        elif name == "to" and to_a_device(args[1:], kwargs) and not kwargs.get("non_blocking"):
            if "/torch/" not in sys._getframe(1).f_code.co_filename:  # torch moves norms to where they are
                self.syncs.note("to")
        elif name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self.syncs.note(name)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """What the C++ code calls by itself: an index by a boolean mask looks for its non-zero elements."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in SIZES:
            self.syncs.note(func.overloadpacket.__name__)
        elif func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.syncs.note("index by a mask")
        return func(*args, **(kwargs or {}))
