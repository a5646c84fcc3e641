"""Authors' checkpoints become ours: read without executing anything, renamed by the method's `official`, checked key by
key against the model that the configuration describes."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError

# What authors' training files hold beside tensors: their arguments, paths and NumPy scalars. All are plain data.
PLAIN: list[Any] = [
    argparse.Namespace,
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    np.float64(0).__reduce__()[0],  # the function that makes NumPy scalars; its module changed with NumPy 2
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
]
LISTED = 8  # keys named in an error message


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        method, model: of the configuration.
        tensors: how many tensors were taken over.
        whole: the whole method (student, heads and all); False for its backbone alone.
        path: the checkpoint written.
    """

    method: str
    model: str
    tensors: int
    whole: bool
    path: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        what = f"{'the whole method' if self.whole else 'the backbone'} of {self.method} with {self.model}"
        return f"{self.path}: {what}, {self.tensors} tensors; no key missing or left over"


def read_foreign(path: str | Path) -> Any:
    """What a PyTorch or safetensors file of somebody else holds, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, damaged, or it holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on damaged or foreign files
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise CheckpointError(
                f"{path} is refused: reading it would execute code of its own ({code[1]}); "
                "ask for a file that holds only tensors and plain values"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason[:160]})") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({str(error)[:160]})") from None


def import_weights(config: Config, source: str | Path, target: str | Path) -> Imported:
    """Authors' checkpoint -> a checkpoint of ours, which every command takes.

    Args:
        config: method and model that the file belongs to; its numbers must be those of the file.
        source: the authors' file: a training checkpoint or the bare backbone, .pth or .safetensors.
        target: the checkpoint to write.

    Raises:
        CheckpointError: the file is refused or does not fit: every missing, unexpected or misshapen key is counted and
            the first ones are named.
    """
    kind = METHODS[config.method]
    content = read_foreign(source)
    try:
        ours = kind.official(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source} is not a checkpoint of {config.method} as its authors write it ({type(error).__name__}: {error})"
        ) from None
    with torch.device("meta"):
        expected = kind(config).state_dict()
    whole = any(not key.startswith(kind.backbone_prefix) for key in ours)
    if not whole:
        expected = {key: value for key, value in expected.items() if key.startswith(kind.backbone_prefix)}
    _check_keys(str(source), expected, ours)
    state = {key: ours[key].to(value.dtype).contiguous() for key, value in expected.items()}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    saved = Checkpoint("import", config.as_dict(), state, kind.backbone_prefix, extra={"file": Path(source).name})
    checkpoint.write(target, saved)
    return Imported(config.method, config.model.name, len(state), whole, str(target))


def _check_keys(source: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {list(found[key].shape)}, the model's {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    troubles = []
    for keys, word in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")):
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            troubles.append(f"{len(keys)} {word}: {', '.join(keys[:LISTED])}{more}")
    if troubles:
        raise CheckpointError(
            f"{source} does not fit the configured model; {'; '.join(troubles)}; "
            "give the model's and the method's numbers as they were when the file was made"
        )
