"""The record that a checkpoint file holds, its one writer and its one reader.

Only tensors and plain values go in, so that `torch.load(path, weights_only=True)` opens it anywhere. A file is whole or
it is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import pathlib
import pickle
import platform
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fastssl import __version__
from fastssl.config import ConfigError
from fastssl.training import shard_files

FORMAT = "fastssl-2"
WHAT = {  # kind -> what a message calls such a file
    "pretrain": "a pretraining run",
    "import": "an import",
    "finetune": "a fine-tuning run",
    "segment": "a segmentation run",
    "detect": "a detection run",
    "probe": "attentive probes",
    "parts": "a part learner",
    "tokenizer": "a stand-in tokenizer",
}
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message names the file and what to do."""


@dataclass
class Checkpoint:
    """All that is needed to continue a run or to use what it trained.

    Attributes:
        kind: a key of `WHAT`.
        config: the configuration as plain values; `config["model"]` describes the backbone.
        network: state dict of everything that was trained (for a pretraining run: of the method, teacher included).
        backbone_prefix: where the backbone's keys begin in `network`; None where there is no backbone in it.
        step: optimizer steps done.
        optimizer, scaler: their state dicts; empty where nothing can be continued.
        fingerprint: what a continuation must have in common with the run, as plain values.
        extra: what only this kind of run keeps (history, class names, a moving average, ...).
        version: of the package that wrote it.
        path: the file that it was read from; not stored.
    """

    kind: str
    config: dict[str, Any]
    network: dict[str, Tensor]
    backbone_prefix: str | None
    step: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    path: str = ""

    def backbone(self) -> dict[str, Tensor]:
        """The backbone's own state dict.

        Raises:
            CheckpointError: there is none in it.
        """
        if self.backbone_prefix is None:
            raise CheckpointError(f"{self.path} is of {WHAT[self.kind]} and holds no backbone")
        start = len(self.backbone_prefix)
        return {key[start:]: value for key, value in self.network.items() if key.startswith(self.backbone_prefix)}

    def section(self, kind: type[T], *keys: str, **more: Any) -> T:
        """A section of the configuration as the dataclass that describes it.

        Args:
            kind: the dataclass.
            keys: the way to the section, e.g. "views", "global1".
            more: fields that the section does not name.

        Raises:
            CheckpointError: there is no such section, or it has a key that is unknown or unusable here.
        """
        values: Any = self.config
        for key in keys:
            values = values.get(key) if isinstance(values, dict) else None
        name = ".".join(keys)
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path} does not describe its {name} (no section '{name}' in its config)")
        known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
        unknown = sorted(values.keys() - known)
        if unknown:
            raise CheckpointError(
                f"{self.path} was written with '{name}.{unknown[0]}', which version {__version__} does not know"
            )
        try:
            return kind(**{**more, **values})
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"{self.path}: the section '{name}' of its config is unusable ({error})") from None

    def check(
        self, fingerprint: dict[str, Any], option: str, allowed: Collection[str] = (), change: str = ""
    ) -> list[str]:
        """Whether the run that wrote this may be continued as it is asked for now.

        Args:
            fingerprint: of the present run.
            option: the option that names the run's folder.
            allowed: keys that may differ.
            change: the option that names such keys; empty: there is none.

        Returns:
            What differs among the allowed keys, "KEY (was A, now B)".

        Raises:
            CheckpointError: it may not; the message lists every key that differs.
        """
        if "data" in fingerprint and "data" not in self.fingerprint:
            raise CheckpointError(
                f"{self.path} was written by an earlier version, which did not keep the run's settings; start in "
                f"another folder ({option})"
            )
        keys = dict.fromkeys([*self.fingerprint, *fingerprint])
        unknown = [key for key in allowed if key not in keys]
        if unknown:
            raise CheckpointError(f"'{unknown[0]}' is no setting that {self.path} was written with; nothing to change")
        differing = {
            key: f"{key} (was {self.fingerprint.get(key)!r}, now {fingerprint.get(key)!r})"
            for key in keys
            if self.fingerprint.get(key) != fingerprint.get(key)
        }
        refused = [key for key in differing if key not in allowed]
        if refused:
            let = f"let them differ ({change} {','.join([*allowed, *refused])}), " if change else ""
            raise CheckpointError(
                f"{self.path} was written with other settings: {', '.join(differing[key] for key in refused)}; "
                f"continue it with the same settings, {let}or name another folder with {option}"
            )
        return list(differing.values())


STORED = {one.name for one in fields(Checkpoint)} - {"path"}


PIECE = 16 << 20  # bytes written at a time
SYNCED = 256 << 20  # bytes that may wait in the host's memory for the disk


class _Part(io.FileIO):
    """A file that is written in pieces; before each, and before each wait for the disk, it calls a function."""

    def __init__(self, path: Path, progress: Callable[[], object]) -> None:
        super().__init__(path, "wb")
        self.progress, self.waiting = progress, 0

    def write(self, data: Any) -> int:
        """The beginning of it: a buffer above comes again with the rest."""
        self.progress()
        if self.waiting >= SYNCED:
            os.fsync(self.fileno())
            self.waiting = 0
            self.progress()
        count = super().write(memoryview(data)[:PIECE])
        self.waiting += count
        return count


def write(
    path: str | Path,
    saved: Checkpoint,
    shards: Mapping[str, Any] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Writes a record to `path` in one piece: a killed process leaves the old file, never half a new one.

    Args:
        shards: where its tensors without data lie (`shard_files`). Those of checkpoints that are no longer there go.
        progress: called at every piece that the disk takes; a RuntimeError of it ends the writing.

    Raises:
        CheckpointError: the disk refused (full, read-only), or `progress`; the previous file is untouched.
    """
    content = {"format": FORMAT, **{name: getattr(saved, name) for name in STORED}}
    content |= {"shards": dict(shards)} if shards else {}

    def put(part: Path) -> None:
        with io.BufferedWriter(_Part(part, progress)) as file:
            torch.save(content, file)

    try:
        replace_file(Path(path), put)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({error}); free some space and resume"
        ) from None
    shard_files.tidy(Path(path).parent, Path(path).name)


def read(path: str | Path, *kinds: str, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint; nothing in the file is executed.

    Args:
        path: the file.
        kinds: the kinds that will do; none: any.
        device: where its tensors go.

    Raises:
        CheckpointError: no such file, not a checkpoint of this package, damaged, or of another kind.
    """
    return record(path, load(path, device), *kinds)


def read_hollow(path: str | Path, *kinds: str, device: torch.device | str = "cpu") -> tuple[Checkpoint, dict[str, Any]]:
    """As `read`, but tensors of a sharded checkpoint have no data yet; and where it lies (empty: nothing is missing).
    On the device `meta` no tensor has data, and reading takes a moment."""
    content = _load(path, device)
    shards = content.pop("shards", {}) if isinstance(content, dict) else {}
    return record(path, content, *kinds), shards


PLAIN: list[Any] = [  # what authors' training files hold beside tensors: their arguments, paths and NumPy scalars
    argparse.Namespace,
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
    ),  # NumPy 1 and 2
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
]


def load(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """What a PyTorch or safetensors file holds, of tensors and plain values; nothing in it is executed. A sharded
    checkpoint is put together.

    Raises:
        CheckpointError: no such file, damaged, or something else; the message says what.
    """
    try:
        try:
            return shard_files.whole(_load(path, device), Path(path), device)
        except shard_files.ShardError:  # a run that saves may have replaced both between the readings
            return shard_files.whole(_load(path, device), Path(path), device)
    except shard_files.ShardError as error:
        raise CheckpointError(f"{path} {error}") from None


def _load(path: str | Path, device: torch.device | str) -> Any:
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
            return safetensors.torch.load_file(path, device=str(device))
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            warnings.simplefilter("ignore")  # of other pickles' versions
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path} is a folder; name the checkpoint inside it, e.g. {Path(path) / 'last.pt'}"
        ) from None
    except PermissionError:
        raise CheckpointError(f"{path} may not be read (no permission)") from None
    except Exception as error:  # torch.load raises many types on damaged or foreign files
        raise CheckpointError(f"{path} {_fault(head, error)}") from None


def _fault(head: bytes, error: Exception) -> str:
    """What is wrong with a file that begins with `head` and could not be loaded, as the end of a sentence."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file that it stands for; fetch that with: git lfs pull"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<!--")):
        return "is an HTML page, not weights: the download got a web page (a login, an error) in place of the file"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    pickled = isinstance(error, pickle.UnpicklingError)
    if pickled and (code or head.startswith((b"PK", b"\x80"))):
        what = f"reading it would execute code of its own ({code[1]})" if code else "it may execute code of its own"
        return f"is refused: {what}; ask for a file that holds only tensors and plain values"
    if re.fullmatch(rb"[\x20-\x7e\s]*", head):
        return f"is a text, not weights; it begins with {' '.join(head[:60].decode().split())!r}"
    reason = "it is no PyTorch file, or damaged" if pickled else str(error).strip() or type(error).__name__
    return f"cannot be read as a checkpoint ({re.split(r'[.] |$', reason, maxsplit=1, flags=re.M)[0][:160]})"


def record(path: str | Path, content: Any, *kinds: str) -> Checkpoint:
    """The record in what a file held; see `read`."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a fastssl checkpoint (no format mark {FORMAT!r}); fastssl import takes authors' files"
        )
    stored = content.keys() - {"format"}
    if stored != STORED:
        odd = ", ".join(sorted(f"{key} is missing" for key in STORED - stored) + sorted(map(str, stored - STORED)))
        raise CheckpointError(f"{path} is not a whole checkpoint of this version ({odd[:120]})")
    saved = Checkpoint(**{key: value for key, value in content.items() if key != "format"}, path=str(path))
    wrong = [one.name for one in fields(Checkpoint) if not isinstance(getattr(saved, one.name), TYPES[one.name])]
    if wrong or saved.kind not in WHAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version ({(wrong or ['kind'])[0]} is unusable)")
    if kinds and saved.kind not in kinds:
        raise CheckpointError(f"{path} is of {WHAT[saved.kind]}, not of {' or '.join(WHAT[kind] for kind in kinds)}")
    return saved


TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "version", "path"), str),
    **dict.fromkeys(("config", "network", "optimizer", "scaler", "fingerprint", "extra"), dict),
    "backbone_prefix": (str, type(None)),
    "step": int,
}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Makes or replaces a file in one piece: whatever goes wrong, the old file or none is there, and nothing else.

    Args:
        path: the file; its folder exists.
        write: writes the new content to the path that it is given; what it raises is passed on.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # of this process alone
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def stamp(path: Path | None) -> tuple[int, ...]:
    """What tells a file from a later one of its name; () where there is none."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        found = None
    return () if found is None else (found.st_mtime_ns, found.st_ino, found.st_size)


class InUseError(ValueError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """While the block runs, this process alone writes into the folder. The lock ends with the process, however it ends.
    What killed processes left half-written is removed.

    Args:
        folder: it exists.
        option: the option that names it, for the message.

    Raises:
        InUseError: another process has it.
        CheckpointError: nothing can be written there.
    """
    try:
        file = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); choose another {option}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = (file.read() or b"").decode().strip() or "another process"
            raise InUseError(f"{folder} is in use by {holder}; wait for it, or choose another {option}") from None
        except OSError:  # a file system without locks
            pass
        else:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            except OSError as error:
                raise CheckpointError(
                    f"{folder} cannot be written ({error.strerror}); free some space, or choose another {option}"
                ) from None
            for part in folder.glob(".*.part"):
                if not _alive(part.name.split(".")[-2]):
                    part.unlink(missing_ok=True)
            shard_files.tidy(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # also of what forked processes have inherited


def _alive(number: str) -> bool:
    """Whether a process of this machine has the number."""
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
