"""CPU time of `fastssl convert` against FFCV's own DatasetWriter, on the same images, alternating in one run.

    python docs/benchmarks/convert_vs_ffcv.py FOLDER [--workers 2] [--rounds 3]

FOLDER has one sub-folder per class. Both write JPEG mode, quality 90, with the same number of processes. CPU
milliseconds per image are user + system time of this process and its workers (start of the workers included); the
median over the rounds counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.sources import scan_folder

CASES = {"no size limit": 0, "at most 500 px": 500, "at most 256 px": 256}


class Images:
    """What FFCV's writer takes: (RGB image, label) by index, decoded as torchvision's ImageFolder does."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        _, self.files, self.labels = scan_folder(folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(os.path.join(self.folder, self.files[i])) as image:
            return image.convert("RGB"), int(self.labels[i])


def write_ours(folder: str, target: Path, side: int, workers: int) -> None:
    convert(ConvertOptions(folder, str(target), max_resolution=side, workers=workers, overwrite=True))


def write_ffcv(folder: str, target: Path, side: int, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField("jpg", max_resolution=side or None, jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(target), fields, num_workers=workers).from_indexed_dataset(Images(folder))


def cpu_seconds() -> float:
    while multiprocessing.active_children():  # collects finished workers: only then does their time count
        time.sleep(0.01)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    images = Images(options.folder)
    sizes = [Path(options.folder, name).stat().st_size for name in images.files]

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.beton")
        for write in (write_ours, write_ffcv):  # imports, compilation and the page cache, outside the measurement
            write(options.folder, target, 256, options.workers)
        for case, side in CASES.items():
            cpu, wall, stored = ({write: [] for write in (write_ours, write_ffcv)} for _ in range(3))
            for _ in range(options.rounds):
                for write in (write_ours, write_ffcv):
                    target.unlink(missing_ok=True)
                    os.sync()
                    begin, begin_cpu = time.perf_counter(), cpu_seconds()
                    write(options.folder, target, side, options.workers)
                    wall[write].append(time.perf_counter() - begin)
                    cpu[write].append((cpu_seconds() - begin_cpu) / len(images) * 1e3)
                    stored[write].append(target.stat().st_size / len(images) / 1e3)
            ours, theirs = (statistics.median(cpu[write]) for write in (write_ours, write_ffcv))
            spread = [f"{min(cpu[write]):.2f}-{max(cpu[write]):.2f}" for write in (write_ours, write_ffcv)]
            rate = [len(images) / statistics.median(wall[write]) for write in (write_ours, write_ffcv)]
            kilobytes = [statistics.median(stored[write]) for write in (write_ours, write_ffcv)]
            rows.append(
                f"| {case} | {ours:.2f} ({spread[0]}) | {theirs:.2f} ({spread[1]}) | {theirs / ours:.1f} | "
                f"{rate[0]:.0f} / {rate[1]:.0f} | {kilobytes[0]:.0f} / {kilobytes[1]:.0f} |"
            )

    versions = ", ".join(f"{name} {version(name)}" for name in ("ffcv", "pillow", "numpy", "opencv-python"))
    print(
        f"{len(images)} images, {np.mean(sizes) / 1e3:.0f} kB each; {options.workers} workers, {options.rounds} rounds"
    )
    print(f"Python {platform.python_version()}, {versions}\n")
    print("| case | ours, CPU ms/image (range) | FFCV, CPU ms/image (range) | ratio | img/s ours / FFCV | kB/image ours / FFCV |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
