"""The folder beside a sharded checkpoint that holds its large tensors: a safetensors file of every process, written and
read by PyTorch's distributed checkpoint, so any number of processes can read what any other number wrote.

Which folder, and how many bytes each of its files has, stands in the checkpoint itself. So a checkpoint and its folder
are of one moment, and a file that is cut or missing is noticed before anything is read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import sys
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MARK = ".shards-"  # between the checkpoint's name and the rest of the folder's


class ShardError(ValueError):
    """A folder cannot be written or read; the message goes on after the checkpoint's name."""


def new_folder(path: Path, step: int) -> str:
    """Name of a folder that is not there yet, for the checkpoint `path` of this step."""
    names = (f"{path.name}{MARK}{step:07d}{'' if i == 1 else f'-{i}'}" for i in range(1, 1_000_000))
    return next(name for name in names if not path.with_name(name).exists())


def save(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Writes DTensors, every process its part; to be called by all.

    Returns:
        What the checkpoint has to say of the folder: its name and the bytes of its files.

    Raises:
        ShardError: some process could not write; what there was of the folder is removed.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_distributed

    class Writer(HuggingFaceStorageWriter):
        """Every process says what it has written: on a network disk no other one need see its files yet."""

        def write_data(self, *plan: Any) -> Any:
            def sizes(done: Any) -> list[tuple[str, int]]:
                names = {one.storage_data.relative_path for one in done.value()}
                return [(name, (folder / name).stat().st_size) for name in names]

            return super().write_data(*plan).then(sizes)

        def finish(self, metadata: Any, results: Any) -> None:
            metadata.storage_data = dict(pair for pairs in results for pair in pairs)

    try:
        saved = save_distributed(dict(tensors), storage_writer=Writer(str(folder), save_distributed=True))
        return {"folder": folder.name, "files": saved.storage_data}
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (Exception, CheckpointException)):
            why = _cause(error)
            raise ShardError(f"the checkpoint could not be written ({why}); free some space and resume") from None
        raise


def fill(tensors: Mapping[str, Tensor], path: Path, shards: Mapping[str, Any], *, together: bool) -> None:
    """Reads tensors by name, in place; DTensors get their part alone.

    Args:
        tensors: with the sizes and types that they were written with.
        path: the checkpoint.
        shards: what `save` returned.
        together: all processes of the run call this. Else this one reads by itself.

    Raises:
        ShardError: a file is missing, cut or damaged, or holds other tensors.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    try:
        folder, files = path.with_name(Path(shards["folder"]).name), dict(shards["files"])
    except (KeyError, TypeError, ValueError):
        raise ShardError("does not say where its tensors are; it is damaged") from None
    if not folder.is_dir():
        raise ShardError(f"has its tensors in {folder.name} beside it, and that folder is not there; copy both")
    found = {file.name: file.stat().st_size for file in folder.iterdir()}
    for name, size in files.items():
        if found.get(name) != size:
            here = "is missing" if name not in found else f"has {found[name]} bytes, not {size}"
            raise ShardError(f"is not whole: {folder / name} {here}; use an earlier checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads by itself is meant
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)
    except (Exception, CheckpointException) as error:
        raise ShardError(f"cannot be read from {folder} ({_cause(error)}); use an earlier checkpoint") from None


def _cause(error: BaseException) -> str:
    """The first error of any process (`CheckpointException` has all), on one line."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(first).split())[:160] or type(first).__name__


def whole(content: Any, path: Path, device: torch.device | str) -> Any:
    """What a sharded checkpoint holds, with all its tensors; any other content as it is.

    Raises:
        ShardError: see `fill`.
    """
    if not isinstance(content, dict) or "shards" not in content:
        return content
    empty: dict[str, Tensor] = {}
    made = {**content, **{key: _emptied(key, content.get(key), empty) for key in ("network", "optimizer")}}
    fill(empty, path, made.pop("shards"), together=False)
    return _moved(made, device)


def _emptied(key: str, value: Any, empty: dict[str, Tensor]) -> Any:
    """The value with room on the CPU for every tensor that has no data; `empty` gets it, by name."""
    if isinstance(value, dict):
        return {name: _emptied(f"{key}/{name}", item, empty) for name, item in value.items()}
    if isinstance(value, Tensor) and value.is_meta:
        empty[key] = torch.empty(value.shape, dtype=value.dtype)
        return empty[key]
    return value


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def tidy(parent: Path, name: str = "*") -> None:
    """Removes the folders that no file beside them names: of earlier checkpoints, and what killed runs left. A
    checkpoint that was copied or renamed, to whatever name, keeps its folder.

    Args:
        name: of the checkpoint that they were written for; all by default.
    """
    folders = {folder.name for folder in parent.glob(f"{name}{MARK}*")}
    try:
        kept = {need for file in parent.iterdir() if folders and file.is_file() for need in _needs(file, folders)}
    except OSError as error:  # nobody knows what the file names
        print(f"{parent}: folders of earlier checkpoints stay for now ({error})", file=sys.stderr)
        return
    for folder in folders - kept:
        shutil.rmtree(parent / folder, ignore_errors=True)


def _needs(path: Path, folders: Collection[str]) -> set[str]:
    """The folders that a file needs: the one that a checkpoint names. A file that is none, or not whole (damaged, or
    being copied), may need those of its own name and those that stand in it."""
    needed = {name for name in folders if name.startswith(f"{path.name}{MARK}")}
    with contextlib.suppress(PermissionError), path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of foreign archives
                    content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
                return {content["shards"]["folder"]} if isinstance(content, dict) and "shards" in content else set()
            except OSError:
                raise
            except Exception:  # torch.load raises many types on damaged or foreign files
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    needed |= {name for name in folders if text.find(os.fsencode(name)) >= 0}
    if needed:
        print(f"{path} cannot be read; what it may need stays: {', '.join(sorted(needed))}", file=sys.stderr)
    return needed
