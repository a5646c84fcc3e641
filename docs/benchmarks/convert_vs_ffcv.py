"""CPU time of `fastssl convert` against FFCV's own DatasetWriter, on the same images, alternating in one run.

    python docs/benchmarks/convert_vs_ffcv.py [FOLDER] [--workers 2] [--rounds 5] [--case TEXT]

FOLDER has one sub-folder per class; without it, 1000 small images are drawn. Both write JPEG mode, quality 90, with
the same number of processes. CPU milliseconds per image are user + system time of all processes, the start of the
workers included; the median over the rounds counts. The rows called "command" start Python anew each time, imports
included, as a user does.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.sources import scan_folder
from fastssl.loaders.synthetic import draw_images

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


def write_ours(folder: str, target: str, side: int, workers: int) -> None:
    convert(ConvertOptions(folder, target, max_resolution=side, workers=workers))


def write_ffcv(folder: str, target: str, side: int, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField("jpg", max_resolution=side or None, jpeg_quality=90), "label": IntField()}
    DatasetWriter(target, fields, num_workers=workers).from_indexed_dataset(Images(folder))


def command_ours(folder: str, target: str, side: int, workers: int) -> None:
    options = [f"--max_resolution={side}", f"--workers={workers}"]
    run_python("-m", "fastssl.cli", "convert", folder, target, *options)


def command_ffcv(folder: str, target: str, side: int, workers: int) -> None:
    script = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import convert_vs_ffcv"
    run_python("-c", f"{script}; convert_vs_ffcv.write_ffcv({folder!r}, {target!r}, {side}, {workers})")


def copy_bytes(folder: str, target: str, side: int, workers: int) -> None:
    """The floor: all files, one after the other, into one file, by one process, without looking at them."""
    with open(target, "wb", buffering=0) as file:
        for name in Images(folder).files:
            with open(os.path.join(folder, name), "rb", buffering=0) as source:
                file.write(source.read())


def run_python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cpu_seconds() -> float:
    while multiprocessing.active_children():  # collects finished workers: only then does their time count
        time.sleep(0.01)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(write, folder: str, target: Path, side: int, workers: int) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and bytes written."""
    target.unlink(missing_ok=True)
    os.sync()
    begin, begin_cpu = time.perf_counter(), cpu_seconds()
    write(folder, str(target), side, workers)
    return cpu_seconds() - begin_cpu, time.perf_counter() - begin, target.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", default="", help="measure only the cases whose name contains this")
    options = parser.parse_args()
    if importlib.util.find_spec("ffcv") is None:
        sys.exit("ffcv is not installed, so there is nothing to compare with (pip install ffcv opencv-python-headless)")
    with tempfile.TemporaryDirectory() as drawn:
        options.folder = options.folder or str(draw_images(drawn, train=1000, val=0) / "train")
        compare(options)


def compare(options: argparse.Namespace) -> None:
    files = [Path(options.folder, name) for name in Images(options.folder).files]
    cases = [(f"{name}, writer alone", side, (write_ours, write_ffcv)) for name, side in CASES.items()]
    cases += [(f"{name}, command", side, (command_ours, command_ffcv)) for name, side in CASES.items()]

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.beton")
        for write in (write_ours, write_ffcv):  # imports and the page cache stay outside the measurement
            measure(write, options.folder, target, 256, options.workers)
        for name, side, writers in (case for case in cases if options.case in case[0]):
            runs = {write: [] for write in writers}
            for _ in range(options.rounds):
                for write in writers:
                    runs[write].append(measure(write, options.folder, target, side, options.workers))
            cpu = [[run[0] / len(files) * 1e3 for run in runs[write]] for write in writers]
            median = [statistics.median(values) for values in cpu]
            rate = [len(files) / statistics.median(run[1] for run in runs[write]) for write in writers]
            stored = [runs[write][0][2] / len(files) / 1e3 for write in writers]
            cells = [f"{middle:.2f} ({min(v):.2f}-{max(v):.2f})" for middle, v in zip(median, cpu, strict=True)]
            rows.append(
                f"| {name} | {cells[0]} | {cells[1]} | {median[1] / median[0]:.1f} | "
                f"{rate[0]:.0f} / {rate[1]:.0f} | {stored[0]:.0f} / {stored[1]:.0f} |"
            )
            print(rows[-1], file=sys.stderr)
        copies = [measure(copy_bytes, options.folder, target, 0, 1)[0] for _ in range(options.rounds)]

    size = statistics.mean(file.stat().st_size for file in files) / 1e3
    versions = ", ".join(f"{name} {version(name)}" for name in ("ffcv", "pillow", "numpy", "opencv-python"))
    print(f"{len(files)} images of {size:.0f} kB on average; {options.workers} workers; {options.rounds} rounds;")
    print(f"Python {platform.python_version()}, {versions}; load average {os.getloadavg()[0]:.1f}.")
    print(
        f"Copying the bytes of all files into one: {statistics.median(copies) / len(files) * 1e3:.2f} CPU ms/image.\n"
    )
    print("| case | ours: CPU ms/image (range) | FFCV: CPU ms/image (range) | ratio | img/s ours / FFCV | kB/image |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
