"""Frozen features: images through a backbone, once, into one table in host memory.

Letters: n images, B images per forward pass, F numbers per feature, S side of the network's input in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import __version__
from fastssl.augment import augment
from fastssl.evaluation.data import EvaluationError, default_resize, device_of, frozen
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source
from fastssl.loaders.views import evaluation_batches
from fastssl.progress import progress_bar
from fastssl.training import distributed
from fastssl.training.checkpoint import replace_file
from fastssl.weights.backbone import digest


@dataclass(frozen=True)
class Features:
    """One feature per image, on the CPU.

    Attributes:
        values: float32 or float16 [n, F], finite (else EvaluationError).
        labels: int64 [n], class index; -1 where there is none.
        ids: int64 [n], position of each image in its data set.
        classes: class names in the order of the labels; empty where the data does not name them.
    """

    values: Tensor
    labels: Tensor
    ids: Tensor
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for begin in range(0, len(self), 65536):
            _check_finite(self.values[begin : begin + 65536], self.ids[begin : begin + 65536])

    def __len__(self) -> int:
        return len(self.values)


def _check_finite(values: Tensor, ids: Tensor) -> None:
    finite = torch.isfinite(values).all(dim=1)
    if not finite.all():
        image = int(ids[~finite][0])
        raise EvaluationError(f"the features of image {image} are not finite; the network's weights are broken")


def extract(
    backbone: nn.Module,
    source: Source,
    *,
    size: int,
    resize: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    blocks: int = 1,
    mean_patch: bool = False,
    ids: np.ndarray | None = None,
    progress: str = "",
    shared: bool = False,
    interpolation: str = "bicubic",
) -> Features:
    """Features of the images of `source`, in order; leaves no trace on the backbone or on the random generators.

    Args:
        backbone: has `represent(images, blocks, mean_patch) -> [B, F]`; the images go to the device that it is on.
        source: the images.
        size: side of the central crop that the network sees, in pixels.
        resize: side to which an image's shorter side is resized before, in pixels; 0: `default_resize(size)`.
        batch_size: images per forward pass.
        workers: decoding threads; 0: this machine's cores.
        dtype: of autocast; float32 switches autocast off. Below float32 the features are kept as float16.
        blocks: concatenate the class tokens of this many last blocks (ViT).
        mean_patch: append the last block's mean patch token (ViT).
        ids: int64 [n], positions of the images to take; None takes all.
        progress: label of the progress bar; empty shows none.
        shared: the processes of the run take each world-th image and exchange what they found; all return everything.
        interpolation: of the resize.

    Raises:
        EvaluationError: a feature is NaN or infinite.
    """
    if shared and distributed.world() > 1:
        return _extract_shared(
            backbone,
            source,
            np.arange(len(source)) if ids is None else ids,
            progress=progress if distributed.is_main() else "",
            **{"size": size, "resize": resize, "batch_size": batch_size, "workers": workers, "dtype": dtype},
            **{"blocks": blocks, "mean_patch": mean_patch, "interpolation": interpolation},
        )
    device = device_of(backbone)
    stored = torch.float32 if dtype == torch.float32 else torch.float16
    total = len(source) if ids is None else len(ids)
    batches = evaluation_batches(
        source,
        size=size,
        resize=resize or default_resize(size),
        batch_size=batch_size,
        workers=decoding_threads(workers, 1),
        ids=ids,
        interpolation=interpolation,
    )
    bar = progress_bar(total, progress)
    values, labels, seen = torch.empty(0, 0), [], []
    done = 0
    with frozen(backbone), _untouched_random(device), contextlib.closing(batches), bar:
        for batch in batches:
            images = augment(batch.to(device)).views["eval"][:, 0]  # [B, 3, S, S]
            rows = represent(backbone, images, dtype, blocks, mean_patch).to("cpu", stored)
            _check_finite(rows, batch.id)  # early: a table takes long to fill
            if done == 0:
                values = torch.empty(total, rows.shape[1], dtype=stored)
            values[done : done + len(rows)] = rows
            labels.append(batch.label)
            seen.append(batch.id)
            done += len(rows)
            bar.update(len(rows))
    return Features(values[:done], torch.cat(labels), torch.cat(seen), tuple(source.classes))


def _extract_shared(backbone: nn.Module, source: Source, ids: np.ndarray, **how) -> Features:
    """See `extract`: this process's part of the images, then the table of all."""
    rank, world = distributed.rank(), distributed.world()
    mine = extract(backbone, source, ids=ids[rank::world] if len(ids) >= world else ids, **how)
    if len(ids) < world:
        return mine
    device = device_of(backbone)
    values, labels, seen = (
        distributed.gather_rows(part, len(ids), device) for part in (mine.values, mine.labels, mine.ids)
    )
    return Features(values, labels, seen, mine.classes)


def extract_cached(backbone: nn.Module, source: Source, *, cache: Path | None, batch_size: int, **how) -> Features:
    """As `extract`, but a table that was made before, of the same weights, data and settings, is read from disk.

    The table is mapped into memory after its checksum was compared; one that is cut, damaged or of something else is
    computed again. Delete the folder to free the disk.

    Args:
        cache: folder of the tables; None: nothing is kept.
        how: the settings of `extract`, without ids.
    """
    if cache is None:
        return extract(backbone, source, batch_size=batch_size, **how)
    names = ("size", "resize", "interpolation", "dtype", "blocks", "mean_patch")
    key = table_key(backbone, source, {name: str(how[name]) for name in names if name in how})
    path = cache / f"{key}.npy"
    kept = kept_table(path, key, len(source))
    if kept is None and path.exists() and distributed.is_main():
        print(f"{path} is not the table of these features (cut, damaged or foreign); computed again", file=sys.stderr)
    if not distributed.all_processes(kept is not None, device_of(backbone)):
        found = extract(backbone, source, batch_size=batch_size, **how)
        if distributed.is_main():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                replace_file(path, lambda part: write_table(part, [found.values.numpy()], key))
            except OSError as error:
                print(f"features are not kept: {path} cannot be written ({error.strerror})", file=sys.stderr)
        distributed.barrier()
        return found
    values = torch.from_numpy(kept)
    ids = torch.arange(len(source))
    return Features(values, torch.as_tensor(np.asarray(source.labels), dtype=torch.int64), ids, tuple(source.classes))


def table_key(backbone: nn.Module, source: Source, settings: dict[str, str]) -> str:
    """What tells a table of features from any other: its weights, data and settings, in 32 characters."""
    facts = [__version__, _shape(backbone), digest(backbone), source.fingerprint(), settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _shape(module: nn.Module) -> str:
    """The modules and their numbers: a count of attention heads shows in no weight."""
    parts = [repr(module)]
    for name, part in module.named_modules():
        numbers = {k: v for k, v in vars(part).items() if k != "training" and isinstance(v, (bool, int, float, str))}
        parts.append(f"{name} {sorted(numbers.items())}")
    return "\n".join(parts)


def _seal(file: IO[bytes], key: str, end: int) -> bytes:
    """What stands behind a table: of what it is, and the checksum of the file's first `end` bytes."""
    crc = 0
    file.seek(0)
    while end > 0 and (piece := file.read(min(end, 1 << 22))):
        crc, end = zlib.crc32(piece, crc), end - len(piece)
    return f"{key} {crc:08x}\n".encode()


def write_table(path: Path, parts: Sequence[np.ndarray], key: str = "") -> None:
    """Writes tables [n, F], one below the other, as one .npy file; sealed, for `kept_table`, where a key is given."""
    header = np.lib.format.header_data_from_array_1_0(parts[0])
    header["shape"] = (sum(map(len, parts)), *parts[0].shape[1:])
    with open(path, "w+b") as file:  # np.save would not say why it failed
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)
        if key:
            file.write(_seal(file, key, file.tell()))


def kept_table(path: Path, key: str, rows: int) -> np.ndarray | None:
    """The table of `key` in a file, [rows, F], mapped; None where there is none, or anything else."""
    try:
        table = np.load(path, mmap_mode="c", allow_pickle=False)
        with open(path, "rb") as file:
            end = table.offset + table.nbytes
            seal = _seal(file, key, end)
            sealed = file.read() == seal
    except Exception:  # NumPy's reader raises whatever damaged bytes make it
        return None
    return table if sealed and table.ndim == 2 and len(table) == rows and table.dtype.kind == "f" else None


@torch.no_grad()  # not inference_mode: a position table that the network caches here must stay usable in training
def represent(backbone: nn.Module, images: Tensor, dtype: torch.dtype, blocks: int, mean_patch: bool) -> Tensor:
    """float32 [B, F] of normalised images [B, 3, S, S], computed under autocast to `dtype` (float32: none)."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = cast(Callable[..., Tensor], backbone.represent)
        return features(images, blocks=blocks, mean_patch=mean_patch).float()


def _untouched_random(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class _Pixels(nn.Module):
    def represent(self, images: Tensor, blocks: int, mean_patch: bool) -> Tensor:
        return images.flatten(1)


def pixels(source: Source, *, size: int = 32, **options) -> Features:
    """The raw-pixel baseline: the evaluation view at `size` x `size`, normalised per channel, as one vector.

    Args:
        source, options: as in `extract`.
        size: side of the view, in pixels.

    Returns:
        Features with values float32 [n, 3 x size x size].
    """
    return extract(_Pixels(), source, size=size, **options)
