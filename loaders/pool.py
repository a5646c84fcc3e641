"""Work spread over processes, results in order; a worker that dies ends the work with an error instead of a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# fork starts a worker in milliseconds; workers run PIL and numpy only, which a fork does not disturb
CONTEXT = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


class WorkerDied(RuntimeError):
    """A worker process ended without a result, as when the system kills it for lack of memory."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    start: Callable[..., None] | None = None,
    start_arguments: tuple = (),
) -> Generator[Result, None, None]:
    """Results of `function` over `tasks`, in their order, computed by `workers` processes (a few tasks ahead).

    Each worker calls `start(*start_arguments)` once. An exception in a worker is raised here. Workers end when the
    iterator is closed, and when this process dies, however it dies.

    Raises:
        WorkerDied: a worker was killed or crashed, or none could be started.
    """
    try:
        pool = ProcessPoolExecutor(workers, CONTEXT, _start_worker, (start, start_arguments))
    except OSError as error:
        raise WorkerDied(f"worker processes cannot be started ({error.strerror}); is /dev/shm full?") from None
    try:
        waiting: deque[Future[Result]] = deque()
        for task in tasks:
            with warnings.catch_warnings():  # of fork beside threads (tqdm's, torch's): our workers touch neither
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(pool.submit(function, task))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkerDied(
            "a worker process died (killed by the system, perhaps for lack of memory); try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None] | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
