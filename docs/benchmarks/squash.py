"""CPU time of SAAE's three views from the original JPEGs, and from squashed images stored raw and as JPEG.

    python docs/benchmarks/squash.py FOLDER [--rounds 3] [--images 500]

One thread; rounds interleaved; median CPU milliseconds per image (lowest-highest), file size per image.
"""

import argparse
import statistics
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.engine import choose_engine, make_loader
from fastssl.loaders.sources import open_source
from fastssl.methods.saae import Views

FILES = {
    "originals": {},
    "squashed, JPEG": {"squash": 224},
    "squashed, raw": {"squash": 224, "mode": "raw"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    views = [replace(getattr(Views(), field.name), name=field.name) for field in fields(Views)]
    engine, _ = choose_engine("auto")
    with tempfile.TemporaryDirectory() as folder:
        loaders, sizes = {}, {}
        for name, how in FILES.items():
            path = Path(folder) / f"{len(loaders)}.beton"
            convert(ConvertOptions(options.folder, str(path), **how))
            source = open_source(str(path))
            loaders[name] = make_loader(engine, source, views, batch_size=1, seed=0, workers=1)
            sizes[name] = sum(source.read(i).data.nbytes for i in range(len(source))) / len(source) / 1e3
        ids = np.arange(min(options.images, len(source)))
        for loader in loaders.values():
            loader.stages(ids[:20])
        found = {name: [] for name in loaders}
        for epoch in range(options.rounds):
            for name, loader in loaders.items():
                found[name].append(loader.stages(ids, epoch))
        print(f"engine {engine}, {len(ids)} images, {options.rounds} rounds")
        print(f"{'file':<16} {'kB/image':>8} {'read':>6} {'decode':>6} {'crop':>6}   all (low-high)")
        for name, rounds in found.items():
            stage = {key: 1e3 * statistics.median(r[key] for r in rounds) for key in rounds[0]}
            whole = sorted(1e3 * sum(r.values()) for r in rounds)
            print(
                f"{name:<16} {sizes[name]:8.1f} {stage['read']:6.2f} {stage['decode']:6.2f} {stage['crop']:6.2f}   "
                f"{statistics.median(whole):.2f} ({whole[0]:.2f}-{whole[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
