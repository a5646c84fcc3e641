"""The compiled CPU engine: each image decoded once, and only where its boxes lie; all crops cut without Python's lock.

It reads FFCV's files (and folders) but is not FFCV's loader, which decodes once per crop, cannot be given boxes,
ignores what its decoder reports, and waits for ever when its thread fails. It does not need the ffcv package. The
pixels are the reference engine's, to the bit; only files with missing or corrupt pixels differ: here they are bad
samples, while PIL fills some of them with gray.
"""

from __future__ import annotations

import numpy as np

from fastssl.loaders import resample, window_decoder
from fastssl.loaders.loader import Crops, Loader
from fastssl.loaders.sources import Encoded
from fastssl.loaders.window_decoder import Decoded, Window


class FFCVLoader(Loader):
    """The loader that decodes and crops in compiled code; see `fastssl.loaders.loader.Loader`."""

    def _decode(self, encoded: Encoded, groups: list[Crops]) -> Decoded:
        return window_decoder.decode(encoded, window(groups))

    def _resize(self, image: Decoded, groups: list[Crops]) -> None:
        frames = {0: (image.pixels, (image.top, image.left))}
        for group in groups:
            view = group.view
            if view.squash not in frames:
                frames[view.squash] = resample.squash(image.pixels, view.squash), (0, 0)
            frame, origin = frames[view.squash]
            resample.cut_all(frame, origin, group.box, group.flip, view.size, view.interpolation, group.out)


def window(groups: list[Crops]) -> Window | None:
    """The smallest window that holds all boxes of an image; None where all of it is needed."""
    if any(group.view.squash for group in groups):
        return None
    boxes = np.concatenate([group.box for group in groups]) if len(groups) > 1 else groups[0].box
    top, left = boxes[:, :2].min(axis=0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).tolist()
    return top, left, bottom - top, right - left
