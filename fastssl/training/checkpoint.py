"""One file holds all that is needed to continue a run or to use its backbone; it is whole or it is not there.

Only tensors and plain values go in, so that `torch.load(path, weights_only=True)` opens it anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.config import Model
from fastssl.models import build_backbone

FORMAT = "fastssl-1"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message names the file and what to do."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path` in one piece: a killed process leaves the old file, never half a new one.

    Args:
        path: the file to (re)place.
        content: tensors, numbers, strings, None, and lists and dicts of them.

    Raises:
        CheckpointError: the disk refused (full, read-only); the previous file is untouched.
    """
    try:
        replace_file(Path(path), lambda part: torch.save({"format": FORMAT, **content}, part))
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({error}); free some space and resume"
        ) from None


def check_fit(path: Path, written: dict[str, Any], now: dict[str, Any], option: str) -> None:
    """Whether the run that wrote a checkpoint may be continued as it is asked for now.

    Args:
        path: the checkpoint.
        written, now: what must be equal; keys that `now` lacks may differ.
        option: the option that names the run's folder.

    Raises:
        CheckpointError: it may not; the message names the first key that differs.
    """
    for key, value in now.items():
        if written.get(key) != value:
            raise CheckpointError(
                f"{path} was written with {key} = {written.get(key)}, this run has {value}; "
                f"continue it with the same value, or name another folder with {option}"
            )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Makes or replaces a file in one piece: whatever goes wrong, the old file or none is there, and nothing else.

    Args:
        path: the file; its folder exists.
        write: writes the new content to the path that it is given; what it raises is passed on.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, not a checkpoint of this package, or damaged.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path} is a folder; name the checkpoint inside it, e.g. {Path(path) / 'last.pt'}"
        ) from None
    except Exception as error:  # torch.load raises many types on damaged or foreign files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason[:120]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a fastssl checkpoint (no format mark {FORMAT!r})")
    return content


@dataclass
class Backbone:
    """A pretrained backbone, ready to use.

    Attributes:
        module: in eval mode, on the asked device.
        image_size: side of the images it was made for, in pixels.
        config: the run's whole configuration as plain values.
        step: optimizer steps of the run.
    """

    module: nn.Module
    image_size: int
    config: dict[str, Any]
    step: int


def load_backbone(path: str | Path, device: torch.device | str = "cpu") -> Backbone:
    """Builds the backbone that a checkpoint describes and loads its weights; see `load` for the errors."""
    content = load(path, device)
    model = Model(**content["config"]["model"])
    module = build_backbone(model)
    prefix = content["backbone_prefix"]
    weights = {key[len(prefix) :]: value for key, value in content["method"].items() if key.startswith(prefix)}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"{path} does not hold a whole {model.name}: missing {missing}, unexpected {unexpected}")
    return Backbone(module.to(device).eval(), model.image_size, content["config"], content["step"])
