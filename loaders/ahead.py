"""Work done ahead of its use: threads prepare items, the consumer gets them in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepare = Callable[[int], tuple[Item, Iterable[Callable[[], None]]]]


class Ahead:
    """A pool of threads for one pass over numbered items.

    A thread never waits for another one, and the consumer only waits for work that some thread has or will take, so
    every wait ends: with the item, with the worker's own exception, or because `close` was called.

    Args:
        workers: threads; 0 counts as 1.
        prefetch: items in work beyond the one that is asked for.
    """

    def __init__(self, workers: int, prefetch: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fastssl-loader")
        self._prefetch = prefetch
        self._closed = False

    def run(self, prepare: Prepare[Item], positions: Iterable[int]) -> Iterator[Item]:
        """The items of `positions`, in this order. The threads are freed when the iterator ends or is dropped.

        Args:
            prepare: makes the item of a position, and the pieces of work that fill it; runs in the threads.
            positions: numbers of the items.

        Raises:
            RuntimeError: `close` was called meanwhile.
            Exception: what `prepare` or a piece raised, with the worker's traceback.
        """
        pending: deque[Future[tuple[Item, list[Future[None]]]]] = deque()
        try:
            for position in positions:
                pending.append(self._pool.submit(self._start, prepare, position))
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

    def _start(self, prepare: Prepare[Item], position: int) -> tuple[Item, list[Future[None]]]:
        item, pieces = prepare(position)
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
        self._pool.shutdown(wait=True, cancel_futures=True)
