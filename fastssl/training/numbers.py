"""What changes from step to step (learning rate, a teacher's momentum, a temperature) lies on the device.

The host works the numbers out, one copy per step takes them all there, and ops, optimizer and methods read them where
they lie. So nothing that is launched depends on a number of the host, and a CUDA graph can repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Numbers(Mapping[str, Tensor]):
    """A step's numbers by name: float64 scalars or rows, int64 where an int was given, all views of one buffer.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layout: dict[str, tuple[type, int]] = {}
        self._buffer = torch.empty(0, dtype=torch.float64, device=device)
        self._views: dict[str, Tensor] = {}

    def write(self, values: Mapping[str, float | Sequence[float]]) -> None:
        """Sets all numbers, in one copy that nothing waits for. Views stay valid as long as names, types and lengths
        are the same."""
        rows = {name: value if isinstance(value, Sequence) else [value] for name, value in values.items()}
        layout = {name: (type(value), len(rows[name])) for name, value in values.items()}
        host = torch.tensor(
            [number for row in rows.values() for number in row],
            dtype=torch.float64,
            pin_memory=self.device.type == "cuda",
        )
        if layout != self._layout:
            self._layout, self._buffer = layout, torch.empty_like(host, device=self.device)
            self._views = dict(_views(self._buffer, layout))
        for name, view in _views(host, layout):
            if layout[name][0] is int:
                view.fill_(rows[name][0])
        self._buffer.copy_(host, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def _views(buffer: Tensor, layout: dict[str, tuple[type, int]]) -> Iterator[tuple[str, Tensor]]:
    """Each name's part of the buffer; an int's eight bytes are read as one."""
    begin = 0
    for name, (kind, length) in layout.items():
        part = buffer[begin : begin + length]
        begin += length
        if kind is int:
            part = part.view(torch.int64)
        yield name, part if issubclass(kind, Sequence) else part[0]
