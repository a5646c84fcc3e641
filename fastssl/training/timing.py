"""Where a training step's time goes: methods name their parts, `fastssl bench step` listens.

    with part("teacher"):
        ...

Outside a `Stopwatch` a part costs one look at a variable. Parts also show by name in a torch profiler's trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_active: Stopwatch | None = None
_SILENT = nullcontext()


def part(name: str) -> AbstractContextManager[None]:
    """A named part of the step, to be entered around it. Parts may nest; an inner one's time is not the outer one's."""
    return _SILENT if _active is None else _active.part(name)


class Stopwatch:
    """Adds up the time of each part while it is active; on a GPU by events, without waiting in between.

    Args:
        device: where the parts compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []  # (part that begins here, moment)
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See the function of this name."""
        self._open.append(name)
        self._mark(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, `fastssl.training.timing.part` reports to this watch."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before

    def read(self) -> dict[str, float]:
        """Seconds per part since the last reading, in order of appearance; starts anew."""
        if self.cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                seconds = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
                total[name] = total.get(name, 0.0) + seconds
        self._marks.clear()
        return total

    def _mark(self, name: str) -> None:
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((name, moment))
