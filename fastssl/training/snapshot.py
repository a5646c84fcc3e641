"""Checkpoints that do not stop training: a copy of the state in host memory is written by a thread.

The copy costs as much host memory as the checkpoint has bytes, on the main process; the memory is used again each time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastssl.training.checkpoint import Checkpoint

PIECE = 64 << 20  # bytes of host memory that are taken at a time; larger tensors have a piece of their own
ALIGNED = 64


class HostMemory:
    """Memory for one copy of a state; the next copy overwrites it.

    Args:
        pinned: page-locked, so that a GPU copies into it while the host goes on.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.pieces: list[Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        """All of it is free again."""
        self.piece = self.used = 0

    def copy(self, value: Tensor) -> Tensor:
        """A contiguous copy in it, with a storage of its own; from a GPU it is there when the GPU comes to it."""
        if value.numel() == 0:
            return torch.empty_like(value, device="cpu")
        while self.piece < len(self.pieces) and self.used + value.nbytes > len(self.pieces[self.piece]):
            self.piece, self.used = self.piece + 1, 0
        if self.piece == len(self.pieces):
            self.pieces.append(torch.empty(max(PIECE, value.nbytes), dtype=torch.uint8, pin_memory=self.pinned))
        place = self.pieces[self.piece].numpy()
        taken = torch.frombuffer(place, dtype=value.dtype, count=value.numel(), offset=self.used)
        taken = taken.view(value.shape)
        if value.device.type == "cpu":  # PyTorch would wait for a team of threads at every tensor
            place[self.used : self.used + value.nbytes] = value.reshape(-1).view(torch.uint8).numpy()
        else:
            taken.copy_(value, non_blocking=True)
        self.used += -(-value.nbytes // ALIGNED) * ALIGNED
        return taken


class Saver:
    """Writes records while training goes on, one at a time.

    As a context it waits at its end for what is being written; not after a second Ctrl-C.

    Args:
        write: writes a record of tensors in host memory to a path, in a thread; what it raises ends the run.
        device: where the tensors come from.
    """

    def __init__(self, write: Callable[[Path, Checkpoint], None], device: torch.device) -> None:
        self.write, self.cuda = write, device.type == "cuda"
        self.memory = HostMemory(self.cuda)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, path: Path, saved: Checkpoint) -> None:
        """Copies the record as it is now, and begins to write the copy; waits for the one before.

        On a GPU the copies stand in the order of its work, before the next step: the host does not wait for them.

        Raises:
            Exception: what writing the one before raised.
        """
        self.wait()
        self.memory.rewind()
        known: dict[tuple, Tensor] = {}  # tensors that are in it twice stay one
        values = {one.name: self._copy(getattr(saved, one.name), known) for one in fields(saved)}
        copied = torch.cuda.Event() if self.cuda else None
        if copied is not None:
            copied.record()
        self._thread = threading.Thread(
            target=self._run, args=(path, replace(saved, **values), copied), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _copy(self, value: Any, known: dict[tuple, Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            if key not in known:
                known[key] = self.memory.copy(value.detach())
            return known[key]
        if isinstance(value, dict):
            whole = copy.copy(value)
            whole.update((name, self._copy(one, known)) for name, one in value.items())
            return whole
        if isinstance(value, list | tuple):
            return type(value)(self._copy(one, known) for one in value)
        return value

    def _run(self, path: Path, saved: Checkpoint, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self.write(path, saved)
        except Exception as error:
            self._error = error

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def settle(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
            Exception: what writing raised.
        """
        self.settle()
        self.check()

    def check(self) -> None:
        """Raises what writing has raised by now."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is not KeyboardInterrupt:
            self.settle()
        if kind is None:
            self.check()
