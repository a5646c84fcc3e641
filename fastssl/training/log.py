"""What a run says: scalars wait on the device and are read together every few steps, then go to the progress bar,
TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.config import printable, redacted
from fastssl.progress import duration, number, on_terminal, progress_bar
from fastssl.training import distributed
from fastssl.training.checkpoint import replace_file
from fastssl.training.loggers import Logger, open_loggers


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
    """The main process's progress, TensorBoard file and metrics.jsonl; the other processes stay silent.

    Progress is a bar on a terminal, and a line per log step in a file.

    Args:
        folder: the run folder; None: only the progress.
        step: the step at which this process starts; lines that an interrupted run wrote beyond it are dropped.
        total_steps: the step at which it ends.
        images_per_step: images of one optimizer step.
        loggers: names of further loggers, see `fastssl.training.loggers`.

    Attributes:
        told: whether the steps up to `step` have had their line.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        total_steps: int,
        images_per_step: int = 1,
        loggers: Sequence[str] = (),
    ) -> None:
        self.main = distributed.is_main()
        self.images_per_step, self.lines, self.seconds_per_step = images_per_step, 0, 0.0
        self.bar: tqdm | None = None
        self.begin, self.total_steps, self.told = step, total_steps, False
        self.files = self.main and folder is not None
        self.said: set[str] = set()
        self.loggers: list[Logger] = []
        if folder is None or not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow import, and only one process writes

        self.path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        replace_file(self.path, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self.told = any("loss" in line and line["step"] == step for line in kept)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the run, closed by close()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.loggers.extend(open_loggers(list(loggers), folder))

    def progress(self) -> None:
        """Moves the bar by one step."""
        if self.main and self.bar is None and on_terminal():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"  # tqdm's time left counts evaluation too
            self.bar = progress_bar(self.total_steps, "step", "steps", initial=self.begin, bar_format=form, leave=True)
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
        self._each(lambda logger: logger.record(line))
        given = {
            "loss": f"{line['loss']:.4f}" if "loss" in line else None,
            "images/s": number(line["images_per_s"]) if "images_per_s" in line else None,
            "data wait": f"{line['data_wait']:.0%}" if "data_wait" in line else None,
            "left": self._left(line) if line.get("images_per_s") else None,
            "k-NN": f"{line['knn_top1']:.1f}" if "knn_top1" in line else None,
        }
        shown = {key: value for key, value in given.items() if value is not None}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
        elif "loss" in shown:
            parts = [f"{key} {value}" for key, value in shown.items()]
            self.say("  ".join([f"step {line['step']:.0f}/{self.total_steps}", *parts]))

    def _left(self, line: dict[str, float]) -> str:
        """The time that the steps left will take, at the pace of late; what is not training has no part in it."""
        seconds = self.images_per_step / line["images_per_s"]
        self.lines += 1
        share = 1 if self.lines <= 2 else max(0.2, 1 / (self.lines - 1))  # the first steps warm up
        self.seconds_per_step += share * (seconds - self.seconds_per_step)
        return duration(self.seconds_per_step * (self.total_steps - line["step"]))

    def finding(self, step: int, text: str) -> None:
        """A line on the health of the run, kept with the numbers."""
        self.say(f"health: {text}")
        if self.files:
            try:
                self.file.write(json.dumps({"step": step, "health": text, "time": round(time.time(), 3)}) + "\n")
            except (OSError, ValueError) as error:
                self.warn(f"the log cannot be written ({error}); training goes on")

    def describe(self, text: str, numbers: dict[str, Any], metrics: Sequence[str]) -> None:
        """Shows the run's configuration in TensorBoard: `text` as it stands, and its flat form as hyper-parameters, to
        be compared between runs by the scalars `metrics`."""
        if self.files:
            from torch.utils.tensorboard.summary import hparams

            self.board.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), self.begin)
            plain = {
                key: value if isinstance(value, bool | int | float) else printable(str(value))  # as UTF-8
                for key, value in numbers.items()
            }
            for part in hparams(plain, dict.fromkeys(metrics, 0.0)):
                self.board._get_file_writer().add_summary(part)
        self._each(lambda logger: logger.describe(numbers))

    def picture(self, name: str, image: Any, step: int) -> None:
        """Shows a picture (PIL, RGB) in TensorBoard."""
        if self.files:
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")
        self._each(lambda logger: logger.picture(name, image, step))

    def _each(self, tell: Callable[[Logger], None]) -> None:
        """Tells the further loggers; one that fails is left out from there on."""
        for logger in list(self.loggers):
            try:
                tell(logger)
            except Exception as error:  # each library has its own types, and training goes on
                self.loggers.remove(logger)
                self.warn(f"{logger.name} failed ({' '.join(str(error).split())[:160]}); training goes on without it")

    def warn(self, text: str) -> None:
        """A line, once."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        """One line above the progress bar, by the main process; standard output is kept for the result."""
        if self.main:
            tqdm.write(redacted(text), file=sys.stderr)

    def close(self) -> None:
        self._each(lambda logger: logger.close())
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
