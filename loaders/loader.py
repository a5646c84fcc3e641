"""What all engines share: which samples stand in which batch, what is drawn for them, threads, faults, memory.

An engine adds two things: how an image is decoded (`Loader._decode`) and how its crops are cut (`Loader._resize`). The
photometric part is left to `fastssl.augment`.

Letters: B images in the batch, n crops of the group, S side in pixels, g side of the part grid.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from fastssl.batch import Batch, Photometric
from fastssl.config import ConfigError, View
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.draw import Drawn, check_views, draw_all
from fastssl.loaders.index import batch_ids, batches_per_epoch, order, replacement
from fastssl.loaders.masks import Mask, add_masks
from fastssl.loaders.sources import DecodeError, Encoded, Source
from fastssl.memory import Memory

log = logging.getLogger(__name__)

PIECES = 2  # pieces of work per thread and batch

Prepare = Callable[[np.ndarray, int, int], tuple[Batch, list[Callable[[], None]]]]
"""(ids, epoch, schedule epoch) -> a batch, and the work that fills it."""


class BadSampleError(RuntimeError):
    """A sample cannot be read, or too many cannot; the message names index, source and reason of each.

    Attributes:
        sample: the index, where it is one sample; else -1.
    """

    def __init__(self, message: str, sample: int = -1) -> None:
        super().__init__(message)
        self.sample = sample


@dataclass
class Crops:
    """The crops of one group to be cut from one image.

    Attributes:
        view: the group.
        box: int64 [n, 4], (top, left, height, width) in pixels of the decoded (or squashed) image.
        flip: bool [n].
        out: uint8 [n, 3, S, S], to be filled; empty where the pixels come about elsewhere.
    """

    view: View
    box: np.ndarray
    flip: np.ndarray
    out: np.ndarray


class Loader(ABC):
    """Batches of uint8 crops, the same for a given seed whatever the threads, prefetch, batch size or ranks.

    Usable as a context manager; `close` also ends epochs that are being read.

    Args:
        source: where the encoded images come from.
        views: the view groups.
        batch_size: images per batch and rank.
        seed: seed of order and draws, 0 to 2^32 - 1.
        rank, world: which slice of every global batch to deliver.
        workers: decoding threads; 0 counts as 1.
        prefetch: batches in work beyond the one that is asked for.
        page_window: read the file nearly in its own order: so many random pages of it at a time, their samples
            shuffled together. 0: all samples shuffled, wherever they lie.
        on_bad: an unreadable sample is replaced by another one, chosen by (seed, epoch, id) (skip), or ends the epoch
            with a BadSampleError (raise).
        max_bad: with skip, more different bad samples than this end the epoch with a BadSampleError.
        pin_memory: deliver batches in page-locked memory, for asynchronous copies to a CUDA device.
        part_grid: side of the part-label grid per group; None delivers no part labels.
        masks: what to hide of the groups' first crops; drawn by the loader's threads.

    Attributes:
        batches_per_epoch: whole batches per epoch; images left over are not used in that epoch.

    Raises:
        ConfigError: the view groups do not fit together, the data has no part maps, or there are fewer images than one
            batch of all ranks.
        ValueError: no such rank or seed, a window over data without pages, or part labels of an unknown group.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        page_window: int = 0,
        on_bad: Literal["skip", "raise"] = "skip",
        max_bad: int = 100,
        pin_memory: bool = False,
        part_grid: dict[str, int] | None = None,
        masks: Sequence[Mask] = (),
    ) -> None:
        check_views(views)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; it must be from 0 to 2^32 - 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist; there are {world}")
        if part_grid and not source.has_parts:
            raise ConfigError(
                f"{source.path} has no part maps, which the method needs; 'fastssl parts learn' and 'fastssl parts "
                "write' make a .beton that has them, 'fastssl convert --parts' takes maps made elsewhere"
            )
        if unknown := set(part_grid or ()) - {view.name for view in views}:
            raise ValueError(f"part_grid names {sorted(unknown)}, which are not view groups")
        self.batches_per_epoch = batches_per_epoch(len(source), batch_size, world)
        self._source = source
        self._views = list(views)
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._workers, self._prefetch = workers, prefetch
        self._page_window = page_window
        self._pages = source.pages() if page_window else None
        self._on_bad, self._max_bad = on_bad, max_bad
        self._memory = Memory(pin_memory)
        self._part_grid = part_grid or {}
        self._masks = masks
        self._bad: dict[int, tuple[int, str, str]] = {}
        self._lock = threading.Lock()
        self._streams: set[Ahead] = set()
        self._closings = 0

    def _cut(self, encoded: Encoded, groups: list[Crops]) -> None:
        """Decodes one image once and fills the crops of all groups; raises DecodeError if it cannot be decoded."""
        self._resize(self._decode(encoded, groups), groups)

    @abstractmethod
    def _decode(self, encoded: Encoded, groups: list[Crops]) -> Any:
        """The image, or as much of it as the groups' boxes need; raises DecodeError."""

    @abstractmethod
    def _resize(self, image: Any, groups: list[Crops]) -> None:
        """Fills the crops of all groups from what `_decode` returned."""

    def stages(self, ids: Sequence[int], epoch: int = 0) -> dict[str, float]:
        """CPU seconds per image of reading, decoding and cropping the samples `ids`, one by one in this thread."""
        spent = {"read": 0.0, "decode": 0.0, "crop": 0.0}
        for sample in ids:
            marks = [time.thread_time()]
            encoded = self._source.read(int(sample))
            marks.append(time.thread_time())
            height, width = np.array([[encoded.height], [encoded.width]])
            drawn, batch = self._draw(np.array([sample]), height, width, epoch)
            for view in self._views:
                batch.views[view.name] = self._memory.take((1, view.count, 3, view.size, view.size))
            groups = [self._crops(batch, drawn, view, 0, 0) for view in self._views]
            begin = time.thread_time()
            image = self._decode(encoded, groups)
            middle = time.thread_time()
            self._resize(image, groups)
            for stage, seconds in zip(
                spent, (marks[1] - marks[0], middle - begin, time.thread_time() - middle), strict=True
            ):
                spent[stage] += seconds / len(ids)
        return spent

    @property
    def bad(self) -> list[tuple[int, str, str]]:
        """The samples that could not be read so far: (id, source name, reason), by id."""
        with self._lock:
            return sorted(self._bad.values())

    def epoch(self, epoch: int, start: int = 0, schedule_epoch: int | None = None) -> Generator[Batch, None, None]:
        """The batches of one epoch, from position `start` on (to resume inside an epoch).

        Args:
            schedule_epoch: the epoch at which the masks' schedules stand; None: `epoch`.

        Raises:
            ValueError: `start` lies behind the epoch's end.
            BadSampleError: see `on_bad`, `max_bad`; raised while iterating.
        """
        if not 0 <= start <= self.batches_per_epoch:
            raise ValueError(f"batch {start} of the epoch does not exist; there are {self.batches_per_epoch}")
        return self._epoch(epoch, start, epoch if schedule_epoch is None else schedule_epoch)

    def _epoch(self, epoch: int, start: int, schedule_epoch: int) -> Generator[Batch, None, None]:
        closings = self._closings
        ids = order(len(self._source), self._seed, epoch, self._pages, self._page_window)
        stream, make = self._stream()  # compiles, the first time
        self._streams.add(stream)

        def prepare(position: int) -> tuple[Batch, list[Callable[[], None]]]:
            mine = batch_ids(ids, position, self._batch_size, self._rank, self._world)
            return make(mine, epoch, schedule_epoch)

        try:
            if self._closings != closings:  # `close` came meanwhile, and did not know of this stream
                stream.close()
            with self._source.coming(self._mine(ids, start)):
                for batch in stream.run(prepare, range(start, self.batches_per_epoch)):
                    yield self._memory.pinned(batch)
        finally:
            stream.close()
            self._streams.discard(stream)

    def _mine(self, ids: np.ndarray, start: int) -> np.ndarray:
        """What this rank reads of an epoch, in its order, from batch `start` on: int64."""
        whole = ids[: self.batches_per_epoch * self._world * self._batch_size]
        return whole.reshape(-1, self._world, self._batch_size)[start:, self._rank].reshape(-1)

    def _stream(self) -> tuple[Ahead, Prepare]:
        """The threads of one epoch, and what makes a batch in them."""
        return Ahead(self._workers, self._prefetch), self._prepare

    def _prepare(self, ids: np.ndarray, epoch: int, schedule_epoch: int) -> tuple[Batch, list[Callable[[], None]]]:
        """A batch with its draws alone, and the work that fills in pixels, part labels and masks, some rows each."""
        batch, drawn, heights, widths = self._begin(ids, epoch)
        sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))

        def fill(row: int) -> None:
            self._fill(batch, drawn, row, sizes[row], self._cut)

        return batch, self._pieces(batch, range(len(ids)), fill, schedule_epoch)

    def _begin(self, ids: np.ndarray, epoch: int) -> tuple[Batch, dict[str, Drawn], np.ndarray, np.ndarray]:
        """A batch with its draws and memory for its pixels; its draws as arrays; its images' heights and widths."""
        heights, widths = np.maximum(self._source.sizes(ids), 1)  # 0: no readable header
        drawn, batch = self._draw(ids, heights, widths, epoch)
        for view in self._views:
            shape = (len(ids), view.count, 3, view.size, view.size)
            batch.views[view.name] = self._memory.take(shape)
        return batch, drawn, heights, widths

    def _pieces(
        self, batch: Batch, todo: Sequence[int], fill: Callable[[int], None], schedule_epoch: int
    ) -> list[Callable[[], None]]:
        """The work of filling the rows `todo`, some rows each; the piece that ends last draws the masks."""
        rows = -(-len(todo) // (PIECES * max(1, self._workers)))
        pieces = [todo[begin : begin + rows] for begin in range(0, len(todo), max(1, rows))]
        left = list(range(len(pieces)))  # each piece takes one off when it is done

        def work(piece: Sequence[int]) -> None:
            for row in piece:
                fill(row)
            if left.pop() == 0:  # the last one: ids and part labels are final
                self._add_masks(batch, schedule_epoch)

        return [partial(work, piece) for piece in pieces]

    def _add_masks(self, batch: Batch, schedule_epoch: int) -> None:
        add_masks(batch, self._masks, seed=self._seed, schedule_epoch=schedule_epoch, take=self._memory.take)

    def _draw(
        self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, epoch: int
    ) -> tuple[dict[str, Drawn], Batch]:
        """What is drawn for samples of known size: as arrays for cutting, and as a batch without pixels."""
        drawn = self._draw_all(heights, widths, epoch, ids)
        batch = Batch(id=torch.tensor(ids), label=torch.tensor(self._source.labels[ids]), epoch=epoch)
        sides = np.array([heights, widths, heights, widths]).T[:, None]
        for view in self._views:
            mine = drawn[view.name]
            batch.box[view.name] = torch.tensor(mine.box / (view.squash or sides), dtype=torch.float32)
            batch.flip[view.name] = torch.tensor(mine.flip)
            if mine.photometric:
                fields = {key: torch.from_numpy(value) for key, value in mine.photometric.items()}
                batch.photometric[view.name] = Photometric(**fields)
        for name, grid in self._part_grid.items():
            batch.parts[name] = torch.empty((*batch.box[name].shape[:2], grid, grid), dtype=torch.int64)
        return drawn, batch

    def _draw_all(self, heights: np.ndarray, widths: np.ndarray, epoch: int, ids: np.ndarray) -> dict[str, Drawn]:
        return draw_all(self._views, heights, widths, seed=self._seed, epoch=epoch, ids=ids)

    def _fill(
        self,
        batch: Batch,
        drawn: dict[str, Drawn],
        row: int,
        size: tuple[int, int],
        cut: Callable[[Encoded, list[Crops]], None],
    ) -> None:
        """Has `cut` take one row's crops from its image; from another image where that raises DecodeError."""
        wanted, epoch, drawn_row = int(batch.id[row]), batch.epoch, row
        sample, attempt = wanted, 0
        while True:
            try:
                encoded = self._source.read(sample)
                if attempt or (encoded.height, encoded.width) != size:  # else drawn already
                    height, width = np.array([[encoded.height], [encoded.width]])
                    drawn, substitute = self._draw(np.array([sample]), height, width, epoch)
                    _put(substitute, batch, row)
                    drawn_row = 0
                maps = self._source.parts(sample) if self._part_grid else None
                cut(encoded, [self._crops(batch, drawn, view, row, drawn_row) for view in self._views])
                break
            except DecodeError as error:
                self._note_bad(sample, str(error))
            sample = replacement(wanted, attempt, len(self._source), self._seed, epoch)
            attempt += 1
        if maps is not None:
            mine = {name: Drawn(d.box[[drawn_row]], d.flip[[drawn_row]], None) for name, d in drawn.items()}
            self._label_parts(batch, mine, slice(row, row + 1), maps[None], np.array([[encoded.height, encoded.width]]))

    def _label_parts(
        self, batch: Batch, drawn: dict[str, Drawn], rows: slice, maps: np.ndarray, sizes: np.ndarray
    ) -> None:
        """Part labels of some rows, from their draws, maps [B, N, h, w] and sizes [B, 2]."""
        for view in self._views:
            if view.name in self._part_grid:
                mine, out = drawn[view.name], batch.parts[view.name].numpy()[rows]
                frame = np.full_like(sizes, view.squash) if view.squash else sizes
                out[:] = part_labels(maps, mine.box, mine.flip, frame, out.shape[-1])

    def _crops(self, batch: Batch, drawn: dict[str, Drawn], view: View, row: int, drawn_row: int) -> Crops:
        mine = drawn[view.name]
        out = batch.views[view.name][row].numpy() if view.name in batch.views else np.empty(0, np.uint8)
        return Crops(view, mine.box[drawn_row], mine.flip[drawn_row], out)

    def _note_bad(self, sample: int, reason: str) -> None:
        name = self._source.name(sample)
        if self._on_bad == "raise":
            raise BadSampleError(f"sample {sample} ({name}) {reason}")
        with self._lock:
            new = sample not in self._bad
            self._bad[sample] = (sample, name, reason)
            count = len(self._bad)
        if new:
            log.warning("sample %d (%s) %s; another one replaces it", sample, name, reason)
        if count > self._max_bad or count == len(self._source):
            lines = [f"  sample {i} ({name}) {reason}" for i, name, reason in self.bad]
            raise BadSampleError(
                f"{count} samples cannot be read; data.max_bad allows {self._max_bad}. "
                "Repair the data (fastssl verify lists what is bad):\n" + "\n".join(lines)
            )

    def close(self) -> None:
        """End all epochs that are being read and free their threads."""
        self._closings += 1
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def part_labels(maps: np.ndarray, box: np.ndarray, flip: np.ndarray, frame: np.ndarray, grid: int) -> np.ndarray:
    """Part label of every patch of images' crops, int64 [B, n, g, g]: the strongest map at the patch's centre.

    The maps cover the whole image. They are sampled bilinearly, beyond their outermost cell centres with the value
    there; of equally strong maps the first wins (SemMAE, arXiv 2206.10207; maps rather than labels can be cropped).

    Args:
        maps: uint8 [B, N, h, w], one map per part on a common scale.
        box: [B, n, 4], (top, left, height, width) in the units of the frame.
        flip: bool [B, n].
        frame: [B, 2], height and width of each decoded (or squashed) image.
        grid: g, patches along a side of the crop.
    """
    from fastssl.loaders.masks_compiled import label_parts

    out = np.empty((*flip.shape, grid, grid), np.int64)
    maps, box, flip, frame = (
        np.require(array, kind, ["C", "W"])
        for array, kind in ((maps, np.uint8), (box, np.float64), (flip, np.bool_), (frame, np.float64))
    )
    label_parts(maps, box, flip, frame, out)
    return out


def _put(one: Batch, batch: Batch, row: int) -> None:
    """Copy a batch of one sample, without pixels, into a row of another batch."""
    batch.id[row], batch.label[row] = one.id[0], one.label[0]
    for name in one.box:
        batch.box[name][row], batch.flip[name][row] = one.box[name][0], one.flip[name][0]
    for name, fields in one.photometric.items():
        for key, value in vars(fields).items():
            getattr(batch.photometric[name], key)[row] = value[0]
