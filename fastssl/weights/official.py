"""Authors' checkpoints become ours: read without executing anything, renamed by the method's `official`, checked key by
key against the model that the configuration describes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.config import Config
from fastssl.methods import METHODS
from fastssl.methods.method import Method
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.weights.backbone import check_finite

LISTED = 8  # keys named in an error message
SEVERAL = 8  # tensors that a backbone has at least
WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # what PyTorch wraps names with


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        method, model: of the configuration.
        tensors: how many tensors were taken over.
        whole: the whole method (student, heads and all); False for its backbone alone.
        path: the checkpoint written.
        where: where in the file the tensors stand, in words; empty where the authors have them.
    """

    method: str
    model: str
    tensors: int
    whole: bool
    path: str
    where: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        what = f"{'the whole method' if self.whole else 'the backbone'} of {self.method} with {self.model}"
        where = f" (of the file's part{self.where})" if self.where else ""
        return f"{self.path}: {what}, {self.tensors} tensors{where}; no key missing or left over"


def unwrapped(content: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The state dicts that a file may mean, each with words for where it stands: the file itself (""), dictionaries
    inside it, keys less the names that wrappers put in (`module.`), and what stands below a beginning of keys."""
    if not isinstance(content, dict):
        return
    yield where, content
    for key, value in content.items():
        if isinstance(value, dict) and where.count("[") < 3:
            yield from unwrapped(value, f"{where}['{key}']")
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    bare = {".".join(piece for piece in key.split(".") if piece not in WRAPPERS): value for key, value in state.items()}
    if bare.keys() != state.keys():
        gone = {f"{piece}." for key in state for piece in key.split(".") if piece in WRAPPERS}
        where += f" without {' '.join(sorted(gone))}"
        yield where, bare
    beginnings = {key[: dot.end()] for key in bare for dot in itertools.islice(re.finditer(r"\.", key), 3)}
    for beginning in sorted(beginnings, key=lambda b: (b.count("."), b)):
        below = {key[len(beginning) :]: value for key, value in bare.items() if key.startswith(beginning)}
        if len(below) >= SEVERAL:
            yield f"{where} below '{beginning}'", below


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
    content = checkpoint.load(source)
    with torch.device("meta"):
        method = kind(config)
    found = _find(content, kind, method, str(source))
    state = {key: found.ours[key].to(value.dtype).contiguous() for key, value in found.expected.items()}
    check_finite(str(source), state)
    prefix = method.backbone_prefix if found.whole else kind.backbone_prefix
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    saved = Checkpoint("import", config.as_dict(), state, prefix, extra={"file": Path(source).name})
    checkpoint.write(target, saved)
    return Imported(config.method, config.model.name, len(state), found.whole, str(target), found.where)


@dataclass(frozen=True)
class _Found:
    """What a state dict in a file is to a method: its tensors by our names, those that the method has, and where."""

    where: str
    ours: dict[str, Tensor]
    expected: dict[str, Tensor]
    whole: bool

    @property
    def matches(self) -> int:
        return len(self.ours.keys() & self.expected.keys())

    @property
    def fits(self) -> bool:
        return not _faults(self.expected, self.ours)


def _find(content: Any, kind: type[Method], method: Method, source: str) -> _Found:
    """The state dict in a file that fits a method, or its backbone alone.

    Raises:
        CheckpointError: none does, or several.
    """
    tried = []
    for where, state in unwrapped(content):
        try:
            ours = {key: value for key, value in kind.official(state).items() if isinstance(value, Tensor)}
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            continue
        expected = method.state_dict()
        ours = {key: value for key, value in ours.items() if key in expected or not key.startswith(kind.spare)}
        whole = any(not key.startswith(kind.backbone_prefix) for key in ours)
        if not whole:
            expected = {key: value for key, value in expected.items() if key.startswith(kind.backbone_prefix)}
        tried.append(_Found(where, ours, expected, whole))
        if not where and tried[-1].matches > len(expected) // 2:  # the authors' layout: right or wrong, this is meant
            break
    fitting = [found for found in tried if found.fits]
    fitting = [found for found in fitting if found.whole] or fitting
    fitting = [found for found in fitting if "teacher" in found.where] or fitting  # what is evaluated, of the two
    fitting = list({tuple(map(id, found.ours.values())): found for found in reversed(fitting)}.values())
    if len(fitting) > 1:
        places = ", ".join(found.where.strip() for found in reversed(fitting))
        raise CheckpointError(f"{source} holds several state dicts that fit: {places}; keep one of them in the file")
    if fitting:
        return fitting[0]
    best = max(tried, key=lambda found: found.matches, default=None)
    if best is None or not best.matches:
        held = ", ".join(map(str, list(content)[:LISTED])) if isinstance(content, dict) else type(content).__name__
        name = next(name for name in METHODS if METHODS[name] is kind)
        raise CheckpointError(f"{source} is not a checkpoint of {name} as its authors write it; it holds: {held}")
    raise CheckpointError(
        f"{source}{best.where} does not fit the configured model; {'; '.join(_faults(best.expected, best.ours))}; "
        "give the model's and the method's numbers as they were when the file was made"
    )


def _faults(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What keeps tensors from being those of a model, in words; nothing where they are."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    both = [(key, found[key], value) for key, value in expected.items() if key in found]
    shapes = [f"{key} is {list(a.shape)}, the model's {list(b.shape)}" for key, a, b in both if a.shape != b.shape]
    types = [f"{key} is {a.dtype}" for key, a, b in both if a.is_floating_point() != b.is_floating_point()]
    troubles = []
    for keys, word in (
        *((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"), (types, "of another type")),
    ):
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            troubles.append(f"{len(keys)} {word}: {', '.join(keys[:LISTED])}{more}")
    return troubles
