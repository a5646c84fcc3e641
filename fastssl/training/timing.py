"""Where a training step's time goes: methods name their sections, `fastssl bench step` listens.

    with section("teacher"):
        ...

Outside a `Stopwatch` a section costs one look at a variable and two writes. Sections also show by name in a torch
profiler's trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_active: Stopwatch | None = None
_SILENT = nullcontext()


class Place:
    """Where the main thread is, for the watch of `fastssl.training.heartbeat`: the last section, how many so far, and
    pieces of checkpoints written beside it."""

    name = "start"
    entered = 0
    written = 0


place = Place()


def section(name: str) -> AbstractContextManager[None]:
    """A named section of the step, to be entered around it; an inner one's time is not counted in the outer one."""
    place.name = name
    place.entered += 1
    return _SILENT if _active is None else _active.section(name)


class Stopwatch:
    """Adds up the time of each section while it is active; on a GPU by events, without waiting in between.

    Args:
        device: where the sections compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # (section that begins here, moment: an event, or seconds)
        self._open: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
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
        """While it lasts, `fastssl.training.timing.section` reports to this watch."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before

    def read(self) -> dict[str, float]:
        """Seconds per section since the last reading, in order of appearance; starts anew."""
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
        if self.cuda and torch.cuda.is_current_stream_capturing():
            return  # an event of a graph has no time; the graph's replays are a section of their own
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))
