"""What a run says: scalars wait on the device and are read together every few steps, then go to the progress bar,
TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.training import distributed
from fastssl.training.checkpoint import replace_file


class MetricRing:
    """Device scalars of the steps since the last drain. Adding one never waits for the device."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: list[dict[str, Tensor]] = []

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Keeps the scalars of one optimizer step; the same names every time."""
        self.steps.append(step)
        self.rows.append(scalars)

    def drain(self) -> tuple[list[int], list[dict[str, float]], list[dict[str, float]]]:
        """Reads everything kept, in one transfer, and empties the ring.

        Returns:
            steps, this process's scalars of each step, and their means over all processes.
        """
        if not self.rows:
            return [], [], []
        names = list(self.rows[0])
        own = torch.stack([torch.stack([row[name].detach().float() for name in names]) for row in self.rows])
        mean = distributed.all_reduce_mean(own.clone())
        steps = self.steps
        self.steps, self.rows = [], []

        def named(table: Tensor) -> list[dict[str, float]]:
            return [dict(zip(names, row, strict=True)) for row in table.tolist()]

        return steps, named(own), named(mean)


class Clock:
    """Wall time of the loop, split into waiting for data and the rest, since the last reading; in seconds."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is not training (a checkpoint, an evaluation): its time is left out."""
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """(elapsed seconds, share of them spent waiting for data); starts anew."""
        now = time.perf_counter()
        elapsed = max(now - self.begin, 1e-9)
        share = min(self.waited / elapsed, 1.0)
        self.begin, self.waited = now, 0.0
        return elapsed, share


class RunLog:
    """The main process's progress bar, TensorBoard file and metrics.jsonl; the other processes stay silent.

    Args:
        folder: the run folder; None: only the bar.
        step: the step at which this process starts; lines that an interrupted run wrote beyond it are dropped.
        total_steps: length of the progress bar.
    """

    def __init__(self, folder: Path | None, step: int, total_steps: int) -> None:
        self.main = distributed.is_main()
        self.bar: tqdm | None = None
        self.begin, self.total_steps = step, total_steps
        self.files = self.main and folder is not None
        self.said: set[str] = set()
        if folder is None or not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow import, and only one process writes

        self.path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        replace_file(self.path, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the run, closed by close()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def progress(self) -> None:
        """Moves the bar by one step."""
        if self.main and self.bar is None:
            self.bar = tqdm(
                total=self.total_steps, initial=self.begin, unit="step", dynamic_ncols=True, mininterval=1.0
            )
        if self.bar is not None:
            self.bar.update()

    def record(self, line: dict[str, float]) -> None:
        """Writes one line of numbers; `step` is one of them."""
        if self.files:
            try:
                self.file.write(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")
                for name, value in line.items():
                    if name not in ("step", "epoch"):
                        self.board.add_scalar(name, value, line["step"])
            except (OSError, ValueError) as error:  # a full disk, or a writer that has given up before
                self.warn(f"the log cannot be written ({error}); training goes on")
        if self.bar is None:
            return
        shown = {
            "loss": f"{line['loss']:.4f}" if "loss" in line else None,
            "img/s": f"{line['images_per_s']:.0f}" if "images_per_s" in line else None,
            "wait": f"{line['data_wait']:.0%}" if "data_wait" in line else None,
            "knn": f"{line['knn_top1']:.1f}" if "knn_top1" in line else None,
        }
        self.bar.set_postfix({key: value for key, value in shown.items() if value is not None}, refresh=False)

    def warn(self, text: str) -> None:
        """A line, once."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        """One line above the progress bar, by the main process; standard output is kept for the result."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.files:
            try:
                self.board.close()
                self.file.close()
            except OSError as error:
                self.warn(f"the log cannot be written ({error})")


def _lines(path: Path) -> list[dict]:
    """The whole lines of a metrics file; a last line cut by a killed process is dropped."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
