"""How many operations a training step queues: on a GPU each costs the host some microseconds, whatever its size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels import _launch

FREE = {  # neither launches anything
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
    "lift_fresh", "promote_types", "set_", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip


class LaunchCount(TorchDispatchMode):
    """Counts what is queued while it is entered: PyTorch's operations, views left out, and this package's kernels.

    An operation that is several kernels on the device (batch norm, attention's backward pass) counts once, so that the
    count is the same on every device.

    Attributes:
        operations: how often each, by name; kernels begin with "kernel ".
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Operations and kernels together."""
        return self.operations.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        if not view and schema.name.split("::")[1] not in FREE:
            self.operations[schema.name] += 1
            self.note(schema.name, args, kwargs)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> LaunchCount:
        self._before = _launch.listen(self._launched)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _launch.listen(self._before)
        super().__exit__(*error)

    def _launched(self, launch: _launch.Launch) -> None:
        kernel, arguments, options = launch
        name = f"kernel {getattr(kernel, '__name__', kernel)}"
        self.operations[name] += 1
        self.note(name, arguments, options)

    def note(self, name: str, arguments: Any, options: Any) -> None:
        """Hears of every operation that is counted, with its arguments."""


def count_step(step: Any) -> Counter[str]:
    """The operations of one call of `step`, by name."""
    with torch.autograd.set_multithreading_enabled(False), LaunchCount() as count:  # the backward pass in this thread
        step()
    return count.operations
