"""The commands as functions, with the command line's names: fastssl.pretrain, evaluate, embed and load.

Options are given as in a recipe, a section at a time, or by their whole names:

    fastssl.pretrain(method="dino", data={"path": "images"}, optim={"lr": 1e-3}, run={"dir": "runs/mine"})
    fastssl.pretrain(config="imagenet/mae_vit_base", **{"data.path": "train.beton", "schedule.epochs": 100})

They are read and checked as on the command line, so a misspelt name or a value out of range is a ConfigError that names
it. Nothing here imports PyTorch before a function is called.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastssl.models import AnyBackbone

Name = str | os.PathLike[str]
Protocols = Literal["knn", "linear", "attentive", "finetune", "ssl", "segment", "detect"]


class Result(Protocol):
    """What a command gives: numbers as attributes, which its own class documents."""

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, as --json prints it."""

    def table(self) -> str:
        """What the command prints."""


def pretrain(
    config: Name | None = None, *, method: str | None = None, init: Name | None = None, **options: Any
) -> dict:
    """Pretrain a model, or continue the run in its folder; `fastssl pretrain`.

    Args:
        config: a recipe, by its name (`fastssl recipes`) or file.
        method: dino, mae, ..; from the recipe if that is given.
        init: weights that a new run starts from: a checkpoint, timm:NAME or a file.
        options: sections (data={"path": ..}) or whole names ({"data.path": ..}), as in
            `fastssl pretrain --method M --help`; they come before the recipe's.

    Returns:
        What summary.json holds: step, finished, checkpoint, loss and the like.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of its range.
        SourceError, CheckpointError, TrainingError: as the command says in one line.
    """
    from fastssl.parse import parse_pretrain

    given = {"config": config, "method": method, "init": init}
    values, _ = parse_pretrain(_arguments({key: value for key, value in given.items() if value is not None} | options))
    from fastssl.pretraining.trainer import pretrain as run

    return run(values)


def evaluate(protocol: Protocols, checkpoint: Name, data: Name, val: Name | None = None, **options: Any) -> Result:
    """Measure a checkpoint; `fastssl evaluate PROTOCOL`.

    Args:
        protocol: knn, linear, attentive, finetune, ssl, segment or detect.
        checkpoint: of a run or an import, or a library's model, timm:NAME or torchvision:NAME.
        data: training images: a .beton, a glob of shards, or a folder.
        val: validation images; ssl needs none.
        options: the protocol's, as in `fastssl evaluate PROTOCOL --help`.

    Returns:
        The protocol's own result, such as `fastssl.evaluation.frozen.knn.KNNEvaluation`.

    Raises:
        ConfigError, CheckpointError, SourceError, EvaluationError: as the command says in one line.
    """
    from fastssl.cli import EVALUATE, Command
    from fastssl.config import ConfigError

    command = EVALUATE.members.get(protocol)
    if not isinstance(command, Command):
        raise ConfigError(f"protocol is '{protocol}'; it must be one of {', '.join(EVALUATE.members)}")
    given = {"checkpoint": checkpoint, "data": data, **({} if val is None else {"val": val})}
    with _one_process():
        return command.run(f"fastssl evaluate {protocol}", _arguments(given | options))[0]


def embed(checkpoint: Name, data: Name, out: Name, **options: Any) -> Result:
    """Write the features of a data set to OUT.npy, names to OUT.csv, neighbours to OUT.png; `fastssl embed`.

    Args:
        checkpoint: as for `evaluate`.
        data: images.
        out: where to write, without an ending.
        options: as in `fastssl embed --help`.

    Returns:
        `fastssl.evaluation.frozen.embed.Embedded`: the files and the shape of the features.
    """
    from fastssl.cli import COMMANDS, Command

    command = COMMANDS["embed"]
    assert isinstance(command, Command)
    with _one_process():
        return command.run("fastssl embed", _arguments({"checkpoint": checkpoint, "data": data, "out": out} | options))[
            0
        ]


def load(checkpoint: Name, device: str = "cpu") -> AnyBackbone:
    """The backbone in a checkpoint, or a library's, as a torch.nn.Module in eval mode.

    Images are float [B, 3, H, W] with ImageNet's mean and deviation taken out (`fastssl.batch`):

        backbone = fastssl.load("runs/dino/last.pt")
        features = backbone(images)              # [B, D]: a ViT's class token, else the pooled feature
        tokens = backbone.tokens(images)         # a ViT's: [B, 1 + patches, D]

    Args:
        checkpoint: as for `evaluate`.
        device: cpu, cuda or cuda:N.

    Raises:
        CheckpointError: no such file or model, or it holds no backbone.
    """
    from fastssl.weights.backbone import open_backbone

    return open_backbone(os.fspath(checkpoint), device).module


@contextmanager
def _one_process() -> Iterator[None]:
    """Leaves the group of processes that a command may have joined."""
    try:
        yield
    finally:
        if "fastssl.training.distributed" in sys.modules:
            importlib.import_module("fastssl.training.distributed").stop()


def _arguments(options: dict[str, Any], prefix: str = "") -> list[str]:
    """Options as the command line has them: --data.path=images."""
    found = []
    for key, value in sorted(options.items(), key=lambda item: item[0] != "config"):  # others win over it
        if isinstance(value, dict):
            found += _arguments(value, f"{prefix}{key}.")
            continue
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)
        found.append(f"--{prefix}{key}={text}")
    return found
