"""What changes from step to step (learning rate, a teacher's momentum, a temperature) lies on the device.

The host works the numbers out, one copy per step takes them all there, and ops, optimizer and methods read them where
they lie. So nothing that is launched depends on a number of the host, and a CUDA graph can repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Numbers(Mapping[str, Tensor]):
    """A step's numbers by name, each a float64 scalar (or row) on the device: views of one buffer, which stay valid.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sizes: dict[str, int] = {}
        self._buffer = torch.empty(0, dtype=torch.float64, device=device)
        self._views: dict[str, Tensor] = {}

    def write(self, values: Mapping[str, float | Sequence[float]]) -> None:
        """Sets all numbers, in one copy that nothing waits for; the same names and lengths at every step."""
        rows = {name: value if isinstance(value, Sequence) else [value] for name, value in values.items()}
        sizes = {name: -len(row) if isinstance(values[name], Sequence) else 1 for name, row in rows.items()}
        flat = [number for row in rows.values() for number in row]
        host = torch.tensor(flat, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        if sizes != self._sizes:
            self._sizes, self._buffer = sizes, torch.empty_like(host, device=self.device)
            views = self._buffer.split([abs(size) for size in sizes.values()])
            self._views = {name: view if sizes[name] < 0 else view[0] for name, view in zip(sizes, views, strict=True)}
        self._buffer.copy_(host, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self):
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)
