"""References keep their precision: matrix products under autocast would be taken in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def exact(reference: Callable[P, T]) -> Callable[P, T]:
    """The function outside autocast, on the device type of its first tensor, as its kernel computes too."""

    @functools.wraps(reference)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if not torch.amp.is_autocast_available(tensor.device.type):  # "meta", for sizes alone
            return reference(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return reference(*args, **kwargs)

    return computed
