"""`fastssl bench loader`: the loader's bench, also with a recipe's own views, masks and part labels."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace

from fastssl.augment import augment
from fastssl.config import Config
from fastssl.loaders import bench as loaders
from fastssl.loaders.bench import LoaderBench, LoaderBenchOptions
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.peers import Case
from fastssl.loaders.synthetic import draw_images
from fastssl.methods import METHODS, view_list

DRAWN, SIDES = 128, (256, 512)  # images that are drawn where none are named, and the range of their sides in pixels


def bench(options: LoaderBenchOptions, config: Config | None = None) -> LoaderBench:
    """Measures `options`, with a recipe its crops, masks and part labels; see `fastssl.loaders.bench.bench`.

    Args:
        config: the recipe, whose images, batch size and threads count where `options` name none.
    """
    if config is None:
        return loaders.bench(options, augment)
    method = METHODS[config.method]
    case = Case(view_list(config.views), True, method.masks(config), method.part_grid(config))
    with ExitStack() as stack:
        options = replace(
            options,
            data=options.data or config.data.path or _draw(stack.enter_context(tempfile.TemporaryDirectory())),
            batch_size=options.batch_size or config.data.batch_size,
            workers=str(config.data.workers) if options.workers == "0" else options.workers,
        )
        return loaders.bench(options, augment, case)


def _draw(folder: str) -> str:
    """A .beton of drawn images with part maps."""
    print(f"no images are named (--data): {DRAWN} are drawn", file=sys.stderr, flush=True)
    drawn = draw_images(f"{folder}/images", train=DRAWN, val=0, sides=SIDES)
    path = f"{folder}/drawn.beton"
    convert(ConvertOptions(str(drawn / "train"), path, parts=str(drawn / "parts" / "train")))
    return path
