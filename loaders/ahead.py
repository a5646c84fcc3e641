"""Work done ahead of its use: threads prepare items, the consumer gets them in order."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")
Prepare = Callable[[Key], tuple[Item, Iterable[Callable[[], None]]]]


def read_ahead(
    keys: Iterable[Key], make: Callable[[Key], Item], workers: int, prefetch: int = 0
) -> Generator[Item, None, None]:
    """`make(key)` of each key, in order; `workers` threads work ahead, on `prefetch` keys (0: two for each thread).

    Raises:
        Exception: what `make` raised, with the thread's traceback.
    """
    yield from Ahead(workers, prefetch or 2 * max(1, workers)).run(lambda key: (make(key), ()), keys)


_current = threading.local()


def halted() -> bool:
    """Whether this thread works for a pass that has been closed: what it waits for is of no more use."""
    crew = getattr(_current, "crew", None)
    return crew is not None and crew.closed


class Ahead:
    """A pool of threads for one pass over items that are named by keys, such as their numbers.

    A thread never waits for another one, and the consumer only waits for work that some thread has or will take, so
    every wait ends: with the item, with the worker's own exception, or because `close` was called.

    Args:
        workers: threads; 0 counts as 1.
        prefetch: items in work beyond the one that is asked for.
        halt: called first when the pass ends, from any thread and perhaps more than once: shortens the work in hand.
        preparing: at most so many threads are started for `prepare`, the others when there are pieces; None: all. With
            fewer than items in work, a thread that is done goes on with the next item at once.
    """

    def __init__(
        self, workers: int, prefetch: int, halt: Callable[[], None] = lambda: None, preparing: int | None = None
    ) -> None:
        self._workers = max(1, workers)
        self._preparing = preparing or self._workers
        self._crew = _Crew(halt)
        self._prefetch = prefetch
        self._end = weakref.finalize(self, self._crew.close)  # at the interpreter's exit, too

    def run(self, prepare: Prepare[Key, Item], keys: Iterable[Key]) -> Generator[Item, None, None]:
        """The items of `keys`, in this order. The threads are freed when the iterator ends or is dropped.

        Args:
            prepare: makes the item of a key, and the pieces of work that fill it; runs in the threads.
            keys: what the items are made of.

        Raises:
            RuntimeError: `close` was called meanwhile.
            Exception: what `prepare` or a piece raised, with the worker's traceback.
        """
        crew = self._crew
        pending: deque[SimpleQueue] = deque()

        def start(key: Key) -> tuple[Item, list[SimpleQueue]]:
            item, pieces = prepare(key)
            return item, [crew.submit(self._workers, piece) for piece in pieces]

        def finish() -> Item:
            item, pieces = _result(pending.popleft())
            for piece in pieces:
                _result(piece)
            return item

        try:
            for key in keys:
                pending.append(crew.submit(self._preparing, start, key))
                if len(pending) > self._prefetch:
                    yield finish()
            while pending:
                yield finish()
        except Exception:
            if crew.closed:
                raise RuntimeError("the loader was closed while its batches were being read") from None
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Drop the work that has not begun and wait for the threads to end."""
        self._crew.close()


class _Crew:
    """Threads that take tasks in order. What the standard library has for this costs several times as many Python calls
    and exchanges of the lock per task."""

    def __init__(self, halt: Callable[[], None]) -> None:
        self.closed = False
        self._halt = halt
        self._tasks: SimpleQueue = SimpleQueue()
        self._idle: SimpleQueue = SimpleQueue()  # one entry for each thread that waits for a task
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()  # a garbage collection inside may close this crew

    def submit(self, most: int, function: Callable[..., Any], *arguments: Any) -> SimpleQueue:
        """Gives a task to the threads, one more of them if none is idle and there are not so many; for `_result`.

        Raises:
            RuntimeError: after `close`.
        """
        box: SimpleQueue = SimpleQueue()
        self._tasks.put((box, function, arguments))
        try:
            self._idle.get_nowait()
        except Empty:
            with self._lock:
                if not self.closed and len(self._threads) < most:
                    name = f"fastssl-loader-{len(self._threads)}"
                    thread = threading.Thread(target=self._work, name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
        if self.closed:  # perhaps nobody takes this task any more
            raise RuntimeError("closed")
        return box

    def _work(self) -> None:
        _current.crew = self
        while task := self._next():
            box, function, arguments = task
            result: tuple[Any, BaseException | None]
            try:
                if self.closed:
                    raise RuntimeError("closed")
                result = function(*arguments), None
            except BaseException as error:
                result = None, error
            box.put(result)
            del task, box, function, arguments, result  # so that nothing is kept while waiting

    def _next(self) -> Any:
        if self.closed:
            return None
        try:
            return self._tasks.get_nowait()
        except Empty:
            self._idle.put(None)
            return self._tasks.get()

    def close(self) -> None:
        with self._lock:
            self.closed = True
        self._halt()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with contextlib.suppress(Empty):
            while True:
                if task := self._tasks.get_nowait():
                    task[0].put((None, RuntimeError("closed")))


def _result(box: SimpleQueue) -> Any:
    value, error = box.get()
    if error is None:
        return value
    try:
        raise error
    finally:
        del error  # its traceback holds this frame
