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
from fastssl.training.timing import place

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
        """A copy in it, with a storage of its own; dense, in the same order of memory.

        From a GPU it is there when the GPU comes to it.
        """
        if value.numel() == 0:
            return torch.empty_like(value, device="cpu")
        while self.piece < len(self.pieces) and self.used + value.nbytes > len(self.pieces[self.piece]):
            self.piece, self.used = self.piece + 1, 0
        if self.piece == len(self.pieces):
            self.pieces.append(torch.empty(max(PIECE, value.nbytes), dtype=torch.uint8, pin_memory=self.pinned))
        if value.stride() != torch.empty_like(value, device="meta").stride():  # with gaps or overlaps
            value = value.contiguous()
        flat, bytes_ = value.as_strided((value.numel(),), (1,)), self.pieces[self.piece].numpy()
        taken = torch.frombuffer(bytes_, dtype=value.dtype, count=value.numel(), offset=self.used)
        if value.device.type == "cpu":  # PyTorch would wait for a team of threads at every tensor
            bytes_[self.used : self.used + value.nbytes] = flat.view(torch.uint8).numpy()
        else:
            taken.copy_(flat, non_blocking=True)
        self.used += -(-value.nbytes // ALIGNED) * ALIGNED
        return taken.as_strided(value.shape, value.stride())


class Saver:
    """Writes records while training goes on, one at a time.

    As a context it waits at its end for what is being written; a second Ctrl-C gives that up.

    Args:
        write: writes a record of tensors in host memory to a path, in a thread; calls `progress` as it goes; what it
            raises ends the run.
        device: where the tensors come from.
    """

    def __init__(self, write: Callable[[Path, Checkpoint], None], device: torch.device) -> None:
        self.write, self.cuda = write, device.type == "cuda"
        self.memory = HostMemory(self.cuda)
        self._thread: threading.Thread | None = None
        self._written = threading.Event()  # a join that Ctrl-C has interrupted takes a thread for ended (Python 3.11)
        self._written.set()
        self._error: Exception | None = None
        self._given_up = False

    def save(self, path: Path, saved: Checkpoint, *also: Path) -> None:
        """Copies the record as it is now, and begins to write the copy to the paths; waits for the one before.

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
            target=self._run, args=((path, *also), replace(saved, **values), copied), name="checkpoint", daemon=True
        )
        self._written.clear()
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

    def _run(self, paths: tuple[Path, ...], saved: Checkpoint, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            for path in paths:
                self.write(path, saved)
        except Exception as error:
            self._error = error
        finally:
            self._written.set()

    def progress(self) -> None:
        """To be called in writing: that the disk takes it, tells the watch that the run lives.

        Raises:
            RuntimeError: the writing is given up.
        """
        place.written += 1
        if self._given_up:
            raise RuntimeError("given up")

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._written.is_set()

    def settle(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not threading.current_thread():
            self._written.wait()

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
        self._given_up = kind is KeyboardInterrupt
        self.settle()  # a thread that was left behind would write on into a folder that is free for the next run
        if kind is None:
            self.check()
