"""Which engine decodes and crops; all engines take the same arguments and give the same batches."""

from __future__ import annotations

import os

from fastssl.config import Data, View
from fastssl.loaders.loader import Loader
from fastssl.loaders.reference_loader import ReferenceLoader
from fastssl.loaders.sources import Source

ENGINES = {"reference": ReferenceLoader}


def choose_engine(name: str) -> tuple[str, str]:
    """The engine to use for `data.engine`, and why, in words."""
    if name == "auto":
        return "reference", "PIL; the engine that works everywhere"
    return name, "asked for"


def decoding_threads(workers: int, processes_here: int) -> int:
    """`data.workers`, or this machine's usable cores divided by the run's processes on it."""
    if workers:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes_here)


def open_loader(
    source: Source, views: list[View], data: Data, *, seed: int, rank: int, world: int, threads: int, pin_memory: bool
) -> Loader:
    """The training loader that `data` asks for; see `fastssl.loaders.loader.Loader`."""
    engine, _ = choose_engine(data.engine)
    return ENGINES[engine](
        source,
        views,
        batch_size=data.batch_size,
        seed=seed,
        rank=rank,
        world=world,
        workers=threads,
        prefetch=data.prefetch,
        page_window=data.page_window,
        on_bad=data.on_bad,
        max_bad=data.max_bad,
        pin_memory=pin_memory,
    )
