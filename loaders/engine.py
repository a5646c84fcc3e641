"""Which engine decodes and crops; all engines take the same arguments and give the same batches."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from fastssl.config import ConfigError, Data, View
from fastssl.loaders.loader import Loader
from fastssl.loaders.masks import Mask
from fastssl.loaders.pool import cores
from fastssl.loaders.sources import FolderSource, Source

# name -> module and class, the package that it needs, what provides it
ENGINES = {
    "ffcv": ("fastssl.loaders.ffcv_loader", "FFCVLoader", "numba", "pip install numba"),
    "dali": ("fastssl.loaders.dali_loader", "DALILoader", "nvidia.dali", "pip install nvidia-dali-cuda130"),
    "reference": ("fastssl.loaders.reference_loader", "ReferenceLoader", "PIL", "pip install pillow"),
}


def working_engines() -> list[str]:
    """The engines whose packages are installed, the fastest on a CPU first."""
    return [name for name in ENGINES if not _missing(name)]


def _missing(name: str) -> str:
    """What to install for an engine; empty where nothing is missing."""
    _, _, package, remedy = ENGINES[name]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # not even the part before the dot
        found = None
    return "" if found else remedy


def choose_engine(name: str) -> tuple[str, str]:
    """The engine to use for `data.engine`, and why, in words.

    Raises:
        ConfigError: the engine asked for lacks a package.
    """
    if name == "auto":
        name = working_engines()[0]
        why = "the fastest here" if name == "ffcv" else f"the ffcv engine lacks a package: {_missing('ffcv')}"
    elif remedy := _missing(name):
        raise ConfigError(f"data.engine is '{name}', which needs a package that is not installed: {remedy}")
    else:
        why = "asked for"
    if name == "ffcv" and not importlib.import_module("fastssl.loaders.batch_pool").available():
        why += "; PIL decodes, at half the speed or less, as the compiled part is missing: install again where a C "
        why += "compiler and libjpeg-turbo's headers are"
    return name, why


def decoding_threads(workers: int, processes_here: int) -> int:
    """`data.workers`, or this machine's usable cores divided by the run's processes on it."""
    if workers:
        return workers
    return max(1, cores() // processes_here)


def make_loader(name: str, source: Source, views: Sequence[View], **settings: Any) -> Loader:
    """The loader of the engine `name`; settings as for `fastssl.loaders.loader.Loader`."""
    module, kind, _, _ = ENGINES[name]
    return getattr(importlib.import_module(module), kind)(source, views, **settings)


WINDOW = 64  # pages: 512 MiB of FFCV's


def page_window(source: Source, wanted: int | None) -> int:
    """`data.page_window` as a number. Of data in a store it is the same whatever the cache holds, as the order must be;
    images that lie there one by one are fetched one by one in any order."""
    if wanted is not None:
        return wanted
    return WINDOW if source.in_store and not isinstance(source, FolderSource) else 0


def open_loader(
    source: Source,
    views: list[View],
    data: Data,
    *,
    seed: int,
    rank: int,
    world: int,
    threads: int,
    pin_memory: bool,
    part_grid: dict[str, int] | None = None,
    masks: Sequence[Mask] = (),
) -> Loader:
    """The training loader that `data` asks for; see `fastssl.loaders.loader.Loader`."""
    engine, _ = choose_engine(data.engine)
    return make_loader(
        engine,
        source,
        views,
        batch_size=data.batch_size,
        seed=seed,
        rank=rank,
        world=world,
        workers=threads,
        prefetch=data.prefetch,
        page_window=page_window(source, data.page_window),
        on_bad=data.on_bad,
        max_bad=data.max_bad,
        pin_memory=pin_memory,
        part_grid=part_grid,
        masks=masks,
    )
