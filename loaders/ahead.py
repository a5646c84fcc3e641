"""Work done ahead of its use: threads prepare items, the consumer gets them in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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


class Ahead:
    """A pool of threads for one pass over items that are named by keys, such as their numbers.

    A thread never waits for another one, and the consumer only waits for work that some thread has or will take, so
    every wait ends: with the item, with the worker's own exception, or because `close` was called.

    Args:
        workers: threads; 0 counts as 1.
        prefetch: items in work beyond the one that is asked for.
        halt: called first when the pass ends, from any thread and perhaps more than once: shortens the work in hand.
    """

    def __init__(self, workers: int, prefetch: int, halt: Callable[[], None] = lambda: None) -> None:
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fastssl-loader")
        self._prefetch = prefetch
        self._halt = halt
        self._closed = False

    def run(self, prepare: Prepare[Key, Item], keys: Iterable[Key]) -> Generator[Item, None, None]:
        """The items of `keys`, in this order. The threads are freed when the iterator ends or is dropped.

        Args:
            prepare: makes the item of a key, and the pieces of work that fill it; runs in the threads.
            keys: what the items are made of.

        Raises:
            RuntimeError: `close` was called meanwhile.
            Exception: what `prepare` or a piece raised, with the worker's traceback.
        """
        pending: deque[Future[tuple[Item, list[Future[None]]]]] = deque()
        try:
            for key in keys:
                pending.append(self._pool.submit(self._start, prepare, key))
                if len(pending) > self._prefetch:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        except Exception:
            if self._closed:
                raise RuntimeError("the loader was closed while its batches were being read") from None
            raise
        finally:
            self.close()

    def _start(self, prepare: Prepare[Key, Item], key: Key) -> tuple[Item, list[Future[None]]]:
        item, pieces = prepare(key)
        return item, [self._pool.submit(piece) for piece in pieces]

    @staticmethod
    def _finish(started: Future[tuple[Item, list[Future[None]]]]) -> Item:
        item, pieces = started.result()
        for piece in pieces:
            piece.result()
        return item

    def close(self) -> None:
        """Drop the work that has not begun and wait for the threads to end."""
        self._closed = True
        self._halt()
        self._pool.shutdown(wait=True, cancel_futures=True)
