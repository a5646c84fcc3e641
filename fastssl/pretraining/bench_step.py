"""Where a training step's time goes: `fastssl bench step` runs a recipe's own loop and reads a watch on its parts."""

from __future__ import annotations

import itertools
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastssl import __version__
from fastssl.batch import Batch
from fastssl.config import Checked, Config, ConfigError, NonNegativeInt, PositiveInt, check
from fastssl.kernels._path import MODES, forced
from fastssl.kernels._rate import matrix_rate
from fastssl.pretraining.trainer import Trainer
from fastssl.training import distributed
from fastssl.training.launches import count_step
from fastssl.training.timing import Stopwatch

OTHER = "other"  # what no part covers: Python between the parts, the log's ring


@dataclass
class StepBenchOptions(Checked):
    """How the step is measured."""

    section: ClassVar[str] = "bench"

    steps: PositiveInt = 10
    """Optimizer steps per round."""
    warmup: NonNegativeInt = 3
    """Steps before the first round of each contender, not counted."""
    rounds: PositiveInt = 3
    """Rounds per contender, taken in turns; the median counts."""
    kernels: str = "auto,reference"
    """Contenders, separated by commas: auto (kernels where they run), reference (plain PyTorch), triton."""
    repeat_batch: bool = False
    """Load one batch and train on it again and again: the step without the loader."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.modes:
            check(mode in MODES, "bench.kernels", mode, f"of {', '.join(MODES)}")

    @property
    def modes(self) -> list[str]:
        """The contenders."""
        return [mode.strip() for mode in self.kernels.split(",")]


@dataclass
class StepTime:
    """One contender.

    Attributes:
        kernels: "auto", "reference" or "triton".
        images_per_s: of all processes together.
        milliseconds: of one optimizer step.
        parts: milliseconds of the step by part, in the order in which they come; they add up to the step.
        mfu: floating-point operations done, as a share of what this device's matrix products reach.
        memory: peak bytes: of the device on a GPU, of the process (so far) on a CPU.
        launches: operations and kernels that one step queues (`fastssl.training.launches`).
        host: milliseconds that the host takes to queue a step, the device idle at its start; on a CPU the step itself.
        operations: the most frequent of the launches, by name.
    """

    kernels: str
    images_per_s: float
    milliseconds: float
    parts: dict[str, float]
    mfu: float
    memory: int
    launches: int
    host: float
    operations: dict[str, int]


@dataclass
class StepBench:
    """The result: what was run on what, and one row per contender."""

    run: dict[str, Any]
    rows: list[StepTime]

    def as_dict(self) -> dict[str, Any]:
        return {"run": self.run, "rows": [asdict(row) for row in self.rows]}

    def table(self) -> str:
        run = self.run
        lines = [
            f"{run['method']} with {run['model']}, {run['images_per_step']} images per step on {run['device']}, "
            f"{run['dtype']}; {run['gflop_per_image']:.1f} GFLOP per image; torch {run['torch']}",
            "",
            f"{'ms per step':<16}" + "".join(f"{row.kernels:>20}" for row in self.rows),
        ]
        for name in dict.fromkeys(itertools.chain.from_iterable(row.parts for row in self.rows)):
            cells = [(row.parts.get(name, 0.0), row.milliseconds) for row in self.rows]
            lines.append(f"{name:<16}" + "".join(f"{ms:>12.1f} {ms / step:>6.0%} " for ms, step in cells))
        lines.append(f"{'step':<16}" + "".join(f"{row.milliseconds:>12.1f}        " for row in self.rows))
        for name, text in (
            ("images/s", lambda row: f"{row.images_per_s:.1f}"),
            ("MFU", lambda row: f"{row.mfu:.1%}"),
            ("peak memory", lambda row: f"{row.memory / 1e9:.2f} GB"),
            ("launches", lambda row: f"{row.launches}"),
            ("host ms", lambda row: f"{row.host:.1f}"),
        ):
            lines.append(f"{name:<16}" + "".join(f"{text(row):>12}        " for row in self.rows))
        return "\n".join(line.rstrip() for line in lines)


def bench(config: Config, options: StepBenchOptions) -> StepBench:
    """Measure a recipe's training step: images/s, milliseconds by part, MFU, memory, with kernels and without.

    The run's folder is not touched: nothing is resumed, saved or drawn.

    Raises:
        ConfigError: data.path is empty, or as `Trainer`.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty; name the images to measure with: --data.path train.beton")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            run=replace(config.run, dir=folder, steps=0),
            monitor=replace(config.monitor, every=0, pictures=0),
        )
        try:
            trainer = Trainer(config)
            try:
                return _bench(trainer, options)
            finally:
                trainer.loader.close()
        finally:
            distributed.stop()


def _bench(trainer: Trainer, options: StepBenchOptions) -> StepBench:
    device, cuda = trainer.device, trainer.device.type == "cuda"
    stream = trainer.micro_batches()
    batches: Iterator[Batch] = stream
    if options.repeat_batch:
        copied = next(stream).map(torch.clone)
        batches = itertools.repeat(copied.map(Tensor.pin_memory) if cuda else copied)
        stream.close()
    watch = Stopwatch(device)
    rounds: dict[str, list[dict[str, float]]] = {mode: [] for mode in options.modes}
    memory = dict.fromkeys(options.modes, 0)
    queued = {}
    for turn in range(options.rounds):
        for mode in options.modes:
            if distributed.is_main():
                print(f"round {turn + 1} of {options.rounds}: {options.steps} steps, kernels {mode}", file=sys.stderr)
            with forced(mode):
                if turn == 0:
                    _steps(trainer, batches, options.warmup)
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                begin = time.perf_counter()
                with watch.listening():
                    _steps(trainer, batches, options.steps)
                parts = watch.read()  # waits for the device
                seconds = time.perf_counter() - begin
            parts[OTHER] = max(seconds - sum(parts.values()), 0.0)
            rounds[mode].append({"step": seconds, **parts})
            memory[mode] = max(memory[mode], torch.cuda.max_memory_allocated() if cuda else _resident())
    for mode in options.modes:
        with forced(mode):
            queued[mode] = _queue(trainer, batches)
    rate = matrix_rate(device, trainer.dtype)
    rows = [_row(trainer, mode, rounds[mode], options.steps, rate, memory[mode], *queued[mode]) for mode in rounds]
    return StepBench(_facts(trainer), rows)


def _resident() -> int:
    """The most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _steps(trainer: Trainer, batches: Iterator[Batch], count: int, drain: bool = True) -> None:
    for _ in range(count):
        trainer.train_step(batches)
    if drain:
        trainer.ring.drain()
    trainer.recent_ids.clear()


def _queue(trainer: Trainer, batches: Iterator[Batch]) -> tuple[Counter[str], float]:
    """What one step queues, and the seconds that the host takes for it: the middle of five."""
    times = []
    for _ in range(5):
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        _steps(trainer, batches, 1, drain=False)
        times.append(time.perf_counter() - begin)
    counted = count_step(lambda: _steps(trainer, batches, 1, drain=False))
    trainer.ring.drain()
    return counted, sorted(times)[2]


def _row(
    trainer: Trainer, mode: str, rounds: list[dict[str, float]], steps: int, rate: float, memory: int,
    counted: Counter[str], host: float,
) -> StepTime:  # fmt: skip
    middle = sorted(rounds, key=lambda parts: parts["step"])[(len(rounds) - 1) // 2]
    seconds = middle["step"] / steps
    images_per_s = trainer.pace.images_per_step / seconds
    assert trainer.estimate is not None  # a run that begins has one
    return StepTime(
        mode,
        images_per_s,
        seconds * 1000,
        {name: value / steps * 1000 for name, value in middle.items() if name != "step"},
        trainer.estimate.flops * images_per_s / distributed.world() / rate,
        memory,
        counted.total(),
        host * 1000,
        dict(counted.most_common(12)),
    )


def _facts(trainer: Trainer) -> dict[str, Any]:
    config, device = trainer.config, trainer.device
    assert trainer.estimate is not None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "method": config.method,
        "model": config.model.name,
        "device": f"{distributed.world()} x {name}",
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "images_per_step": trainer.pace.images_per_step,
        "gflop_per_image": trainer.estimate.flops / 1e9,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastssl": __version__,
    }
