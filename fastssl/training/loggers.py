"""Weights & Biases and MLflow beside TensorBoard, each by its own library and its own environment variables.

A run folder is one run there too, however often it is continued: `loggers.json` in it keeps the names they gave it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fastssl.config import ConfigError
from fastssl.training.checkpoint import replace_file

PARAMETERS = 100  # that MLflow takes at once


class Logger(Protocol):
    """What takes a run's numbers and pictures."""

    name: str

    def describe(self, numbers: dict[str, Any]) -> None:
        """The configuration, flat."""

    def record(self, line: dict[str, float]) -> None:
        """One line of numbers; `step` is one of them."""

    def picture(self, name: str, image: Any, step: int) -> None:
        """A picture (PIL, RGB)."""

    def close(self) -> None:
        """The end of this process's part of the run."""


class Wandb:
    """Weights & Biases: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline and the rest are read by the library."""

    name = "wandb"

    def __init__(self, folder: Path, known: str) -> None:
        import wandb

        self.image = wandb.Image
        project = os.environ.get("WANDB_PROJECT", "fastssl")
        self.run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known or None, resume="allow")
        self.run.define_metric("*", step_metric="step")  # a continued run may take back some steps
        self.id = self.run.id

    def describe(self, numbers: dict[str, Any]) -> None:
        self.run.config.update(numbers, allow_val_change=True)

    def record(self, line: dict[str, float]) -> None:
        self.run.log(line)

    def picture(self, name: str, image: Any, step: int) -> None:
        self.run.log({f"pictures/{name}": self.image(image), "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the rest are read by the library."""

    name = "mlflow"

    def __init__(self, folder: Path, known: str) -> None:
        import mlflow

        self.mlflow, self.new = mlflow, not known
        self.id = mlflow.start_run(run_id=known or None, run_name=None if known else folder.name).info.run_id

    def describe(self, numbers: dict[str, Any]) -> None:
        if self.new:  # parameters stay as they were given first
            rest = iter(numbers.items())
            while some := dict(islice(rest, PARAMETERS)):
                self.mlflow.log_params(some)

    def record(self, line: dict[str, float]) -> None:
        self.mlflow.log_metrics({key: float(value) for key, value in line.items() if key != "step"}, int(line["step"]))

    def picture(self, name: str, image: Any, step: int) -> None:
        self.mlflow.log_image(image, f"pictures/{name}-{step:07d}.png")

    def close(self) -> None:
        self.mlflow.end_run()


KINDS: dict[str, type[Wandb] | type[MLflow]] = {"wandb": Wandb, "mlflow": MLflow}


def check_loggers(names: list[str]) -> list[str]:
    """The names, once it is sure that they are known and that their libraries are here.

    Raises:
        ConfigError: they are not.
    """
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"run.loggers names '{name}'; known: {', '.join(KINDS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.loggers names {name}, which is not installed: pip install 'fastssl-vision[{name}]'")
    return names


def open_loggers(names: list[str], folder: Path) -> Iterator[Logger]:
    """The loggers of a run folder, which go on with the runs that they have begun for it.

    Raises:
        ConfigError: one cannot start (no account, no server).
    """
    path = folder / "loggers.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        try:
            logger = KINDS[name](folder, known.get(name, ""))
        except Exception as error:  # each library has its own types
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise ConfigError(f"run.loggers: {name} cannot start ({reason}); mend that, or leave it out") from None
        known[name] = logger.id
        replace_file(path, lambda part: part.write_text(json.dumps(known) + "\n"))
        yield logger
