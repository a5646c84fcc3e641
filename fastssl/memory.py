"""Memory of batches, used again when nothing refers to it any more."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import Batch


class Memory:
    """Hands out tensors and takes their memory back by itself once the last tensor that uses it is gone.

    A batch may therefore be kept as long as one likes; a training loop, which drops each batch, runs in the memory of
    the few batches in work. Page-locked memory is kept and reused by PyTorch's own allocator, which also waits for
    copies to the device that are still under way.

    Args:
        pin: hand out page-locked memory.
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._leases: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        """An uninitialised tensor in host memory."""
        size = math.prod(shape) * dtype.itemsize
        if self._pin or not size:
            return torch.empty(shape, dtype=dtype, pin_memory=self._pin)
        free = self._free[size]
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        lease = block[:]  # the tensor's storage holds this view, so it lives as long as any tensor on it
        end = weakref.ref(lease, self._take_back)
        self._leases[id(end)] = end, block
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take_back(self, end: weakref.ref[np.ndarray]) -> None:
        _, block = self._leases.pop(id(end))
        self._free[block.nbytes].append(block)

    def pinned(self, batch: Batch) -> Batch:
        """The batch with its remaining tensors page-locked too, where that is wanted: all in one piece of memory, which
        `Batch.to` copies at once."""
        if not self._pin:
            return batch
        return together(batch, lambda size: self.take((size,)), lambda value: not value.is_pinned())


ALIGN = 16  # bytes at whose multiples tensors begin


def together(batch: Batch, make: Callable[[int], Tensor], chosen: Callable[[Tensor], bool]) -> Batch:
    """The batch with copies of the chosen tensors, one behind the other in the uint8 [size] that `make` gives."""
    some: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        if chosen(value):
            some.append(value)
        return value

    batch.map(note)
    sizes = [-(-value.nbytes // ALIGN) * ALIGN for value in some]
    parts = dict(zip(map(id, some), make(sum(sizes)).split(sizes), strict=True)) if some else {}

    def place(value: Tensor) -> Tensor:
        part = parts.get(id(value))
        return value if part is None else part[: value.nbytes].view(value.dtype).view(value.shape).copy_(value)

    return batch.map(place)
