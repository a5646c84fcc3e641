"""The DALI engine: one decoding per image in NVIDIA's library, on the GPU (nvJPEG) where there is one, else on the CPU.

Order, boxes, flips and labels are those of every engine. DALI gets the encoded bytes and our boxes; whatever is no
ordinary JPEG (raw samples, CMYK, EXIF-rotated files) is decoded by PIL first and handed over without loss, as PPM.
DALI ends a whole batch with an error on one sample that it cannot decode; the batch's samples are then tried one by one
with PIL, the culprit is replaced as in every engine, and the epoch goes on.

Pixels differ from the reference's, because DALI does not round and clip between the two passes of a resize: by 0.2 grey
levels on average (0.9 where a crop is reduced several times), up to 25 beside sharp edges; on a GPU, nvJPEG's decoder
adds its own difference.

Letters: B images in the batch, n crops of the group, S side in pixels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import Batch
from fastssl.config import View
from fastssl.loaders import jpeg
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.decode import open_image, orientation
from fastssl.loaders.index import batch_ids, order
from fastssl.loaders.loader import Crops, Loader
from fastssl.loaders.sources import DecodeError, Encoded, decode

log = logging.getLogger(__name__)


class Feed:
    """One batch on its way into DALI.

    Attributes:
        batch: everything but the pixels.
        schedule_epoch: the epoch at which the masks' schedules stand.
        data: the encoded images, as DALI takes them.
        box: per group int32 [B, n, 4], (top, left, bottom, right).
        flip: per group int32 [B, n].
    """

    def __init__(self, batch: Batch, schedule_epoch: int) -> None:
        self.batch, self.schedule_epoch = batch, schedule_epoch
        self.data: list[np.ndarray] = [np.empty(0, np.uint8)] * len(batch)
        self.box = {name: np.zeros(box.shape, np.int32) for name, box in batch.box.items()}
        self.flip = {name: np.zeros(flip.shape, np.int32) for name, flip in batch.flip.items()}


class DALILoader(Loader):
    """The loader that decodes and crops with DALI; see `fastssl.loaders.loader.Loader`.

    Batches lie on the GPU if there is one, else in host memory. The epoch's last batch is whole, as in every engine;
    `prefetch` batches are in DALI's queue beyond the one that is asked for.

    Raises:
        ImportError: the package nvidia-dali is not installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import nvidia.dali  # noqa: F401, so that a missing package shows here

        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def _decode(self, encoded: Encoded, groups: list[Crops]) -> None:
        raise NotImplementedError("DALI works on whole batches")

    def _resize(self, image: Any, groups: list[Crops]) -> None:
        raise NotImplementedError("DALI works on whole batches")

    def stages(self, ids: Sequence[int], epoch: int = 0) -> dict[str, float]:
        """Nothing: DALI's stages cannot be told apart from outside."""
        return {}

    def _epoch(self, epoch: int, start: int, schedule_epoch: int) -> Generator[Batch, None, None]:
        ids = order(len(self._source), self._seed, epoch, self._pages, self._page_window)

        def prepare(position: int) -> tuple[Feed, list[Callable[[], None]]]:
            mine = batch_ids(ids, position, self._batch_size, self._rank, self._world)
            return self._feed(mine, epoch, schedule_epoch), []

        stream = Ahead(1, self._prefetch)  # reads and draws; DALI has threads of its own
        self._streams.add(stream)
        queue: deque[Feed] = deque()
        pipe = self._build(max(1, min(self._prefetch + 1, self.batches_per_epoch - start)))
        try:
            with self._source.coming(self._mine(ids, start)):
                for feed in stream.run(prepare, range(start, self.batches_per_epoch)):
                    queue.append(feed)
                    pipe.push(feed)
                    if len(queue) > self._prefetch:
                        batch, pipe = self._pop(pipe, queue)
                        yield batch
            while queue:
                batch, pipe = self._pop(pipe, queue)
                yield batch
        finally:
            stream.close()
            self._streams.discard(stream)

    def _feed(self, ids: np.ndarray, epoch: int, schedule_epoch: int) -> Feed:
        heights, widths = (np.maximum(sides, 1) for sides in self._source.sizes(ids))
        drawn, batch = self._draw(ids, heights, widths, epoch)
        feed = Feed(batch, schedule_epoch)
        for row, size in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            self._fill(batch, drawn, row, size, partial(_put, feed, row))
        self._add_masks(batch, schedule_epoch)
        return feed

    def _pop(self, pipe: Pipe, queue: deque[Feed]) -> tuple[Batch, Pipe]:
        """The pixels of the oldest batch in the queue, and the pipeline to go on with."""
        attempt = 0
        while True:
            try:
                crops = pipe.pop()
                break
            except Exception as error:  # DALI raises many kinds
                if attempt:
                    raise
                attempt += 1
                log.warning("DALI gave a batch up (%s); its samples are tried one by one", _first_line(error))
                self._repair(queue[0])
                pipe = self._build(len(queue))  # after an error a pipeline is of no more use
                for feed in queue:
                    pipe.push(feed)
        batch, rest = queue.popleft().batch, crops
        for view in self._views:
            mine, rest = rest[: view.count], rest[view.count :]
            batch.views[view.name] = torch.stack(mine, dim=1)  # a copy: DALI uses its memory again
        pipe.hold(crops)
        return batch, pipe

    def _repair(self, feed: Feed) -> None:
        """Decodes every sample of a batch with PIL; one that PIL cannot decode either is replaced."""
        batch = feed.batch
        heights, widths = (np.maximum(sides, 1) for sides in self._source.sizes(batch.id.numpy()))
        drawn, _ = self._draw(batch.id.numpy(), heights, widths, batch.epoch)
        for row, size in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            self._fill(batch, drawn, row, size, partial(_put, feed, row, by_pil=True))
        self._add_masks(batch, feed.schedule_epoch)

    def _build(self, depth: int) -> Pipe:
        return Pipe(self._views, self._batch_size, max(1, self._workers), self._device, depth)


class Pipe:
    """DALI's pipeline: encoded bytes and boxes in, crops out, `depth` batches in work.

    Args:
        views: the view groups.
        batch_size: samples per batch.
        threads: of DALI, on the CPU.
        device: number of the GPU; None for the CPU.
        depth: batches that are pushed before the first is popped.
    """

    def __init__(self, views: list[View], batch_size: int, threads: int, device: int | None, depth: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
        self._views, self._depth, self._pushed = views, depth, 0
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._pipe = Pipeline(batch_size, threads, device, prefetch_queue_depth=depth, exec_dynamic=True)

        def given(name: str, kind: Any, ndim: int) -> Any:
            return fn.external_source(name=name, dtype=kind, ndim=ndim)

        def resized(image: Any, side: int, interpolation: str) -> Any:
            return fn.resize(
                image, size=[side, side], interp_type=filters[interpolation], antialias=True, dtype=types.UINT8
            )

        with self._pipe:
            image = fn.decoders.image(
                given("data", types.UINT8, 1),
                device="cpu" if device is None else "mixed",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            frames, outputs = {0: image}, []
            for name, view, _ in _crops(views):
                if view.squash not in frames:
                    frames[view.squash] = resized(image, view.squash, "bilinear")
                # Cut first: with resize's own region of interest, pixels beside the box would have a part in the crop.
                region = fn.slice(
                    frames[view.squash],
                    start=given(f"{name}-start", types.INT32, 1),
                    end=given(f"{name}-end", types.INT32, 1),
                    axes=[0, 1],
                )
                outputs.append(
                    fn.crop_mirror_normalize(
                        resized(region, view.size, view.interpolation),
                        mirror=given(f"{name}-flip", types.INT32, 0),
                        output_layout="CHW",
                        dtype=types.UINT8,
                        mean=[0.0] * 3,
                        std=[1.0] * 3,
                    )
                )
            self._pipe.set_outputs(*outputs)
        self._pipe.build()

    def push(self, feed: Feed) -> None:
        """Hands a batch to DALI, which starts on it once `depth` batches are there."""
        self._pipe.feed_input("data", feed.data)
        for name, view, crop in _crops(self._views):
            box = feed.box[view.name][:, crop]
            self._pipe.feed_input(f"{name}-start", np.ascontiguousarray(box[:, :2]))
            self._pipe.feed_input(f"{name}-end", np.ascontiguousarray(box[:, 2:]))
            self._pipe.feed_input(f"{name}-flip", np.ascontiguousarray(feed.flip[view.name][:, crop]))
        self._pushed += 1
        if self._pushed >= self._depth:
            self._pipe.schedule_run()  # the first call starts on all `depth` batches

    def hold(self, crops: list[Tensor]) -> None:
        """Keeps what `pop` gave until the GPU has done what is queued with it now, the copy out of DALI's memory."""
        if not crops or not crops[0].is_cuda:
            return
        event = torch.cuda.Event()
        event.record()
        self._held.append((event, crops))
        while len(self._held) > 1 and (len(self._held) > self._depth or self._held[0][0].query()):
            self._held.popleft()[0].synchronize()

    def pop(self) -> list[Tensor]:
        """The crops of the oldest batch, each uint8 [B, 3, S, S], in DALI's memory without a copy."""
        return [torch.from_dlpack(output.as_tensor()) for output in self._pipe.outputs()]


def _crops(views: list[View]) -> Iterator[tuple[str, View, int]]:
    """Name, group and number of every crop, in the order of DALI's outputs."""
    for view in views:
        for crop in range(view.count):
            yield f"{view.name}-{crop}", view, crop


def _put(feed: Feed, row: int, encoded: Encoded, groups: list[Crops], by_pil: bool = False) -> None:
    """Puts one sample into a row. Raises DecodeError where that can be told without decoding (or PIL cannot)."""
    feed.data[row] = ppm(decode(encoded)) if by_pil else payload(encoded)
    for group in groups:
        top, left, height, width = group.box.T
        feed.box[group.view.name][row] = np.stack([top, left, top + height, left + width], axis=-1)
        feed.flip[group.view.name][row] = group.flip


def payload(encoded: Encoded) -> np.ndarray:
    """Bytes that DALI decodes to the sample's pixels: an ordinary JPEG as it is, anything else as PPM.

    Raises:
        DecodeError: the JPEG is truncated or damaged, or not of the promised size; or PIL cannot decode the sample.
    """
    if encoded.mode == "raw":
        return ppm(decode(encoded))
    data = encoded.data.tobytes()
    if not data.startswith(jpeg.SOI):
        return ppm(decode(encoded))
    found = jpeg.scan(data)
    if found.fault:
        raise DecodeError(found.fault)
    sideways = encoded.mode == "file" and found.app1 and orientation(open_image(data)) != 1
    if not found.common or sideways or (found.height, found.width) != (encoded.height, encoded.width):
        return ppm(decode(encoded))
    return encoded.data


def ppm(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as a PPM file, the plainest lossless format that DALI reads."""
    height, width, _ = pixels.shape
    return np.concatenate([np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8), pixels.reshape(-1)])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line and "Critical" not in line), lines[0] if lines else "")
