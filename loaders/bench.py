"""Loader throughput on the user's data: our engines stage by stage and as a whole, beside the peers that are installed.

Rounds are interleaved, so that a slow minute of a shared machine hits all contenders alike. CPU time counts this
process and its workers; it is far steadier than the wall clock.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastssl.batch import Batch
from fastssl.config import (
    Checked,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    View,
    check,
)
from fastssl.loaders.beton import PartPlaces
from fastssl.loaders.cache import Block
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.decode import Places
from fastssl.loaders.engine import ENGINES, make_loader, working_engines
from fastssl.loaders.loader import Loader
from fastssl.loaders.masks import add_masks
from fastssl.loaders.peers import PEERS, Case, Missing, Peer
from fastssl.loaders.pool import cores
from fastssl.loaders.sources import Encoded, Source, open_source

_JITTER: dict[str, Any] = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray": 0.2}
DINO = [
    View(name="global1", size=224, scale=(0.4, 1.0), blur=1.0, **_JITTER),
    View(name="global2", size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2, **_JITTER),
    View(name="local", count=8, size=96, scale=(0.05, 0.4), blur=0.5, **_JITTER),
]
SINGLE = [View(name="crop", size=224, scale=(0.08, 1.0))]
CASES = {
    "dino": Case(DINO, True),
    "dino-uint8": Case(DINO, False),
    "single": Case(SINGLE, False),
}
DECODE = "decode"
RECIPE = ("recipe", "recipe-uint8")
BATCHES = 5  # at least so many are in an epoch, so that the loader works ahead as in training
Augment = Callable[[Batch], Batch]


@dataclass
class LoaderBenchOptions(Checked):
    """What `fastssl bench loader` measures. With --config RECIPE or --method NAME, and a recipe's keys such as
    --views.local.count 6: that recipe's own views, masks and part labels.

    Results are printed to stderr as they come.
    """

    data: str = ""
    """Images: a .beton file, a glob of shards, or a folder. Empty: the recipe's, or else drawn ones."""
    case: str = ""
    """Cases, separated by commas: dino (2 crops of 224 and 8 of 96 with all photometric operations, float32 out),
    dino-uint8 (the crops only), single (one crop of 224), decode (decoding only); recipe and recipe-uint8 likewise.
    Empty: the recipe's two, without a recipe the other four."""
    engine: str = ""
    """Engines and peers, separated by commas. Empty: all that work here; peers know no recipes."""
    seconds: PositiveFloat = 3.0
    """About this long per contender and round."""
    rounds: PositiveInt = 3
    """Interleaved rounds."""
    workers: str = "0"
    """Decoding threads or worker processes of each contender. 0: the usable cores. Several numbers, separated by
    commas: a sweep over them, with the share of its speed that a thread of small tensor operations keeps beside the
    contender."""
    batch_size: NonNegativeInt = 0
    """Images per batch. 0: the recipe's, without a recipe 64."""
    images: PositiveInt = 500
    """At most so many images, spread evenly over the data."""
    step_images_per_s: NonNegativeFloat = 0.0
    """Images per second that the training step takes; the advice then says how many cores feed it. 0: not known."""
    plot: str = ""
    """Also draw the result to this PNG file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("case", [*CASES, DECODE, *RECIPE]), ("engine", [*ENGINES, *PEERS])):
            for name in _listed(getattr(self, key)):
                check(name in known, key, name, f"of {', '.join(known)}")
        check(all(item.isdigit() for item in _listed(self.workers)), "workers", self.workers, "numbers such as 1,2,4")

    @property
    def worker_counts(self) -> list[int]:
        return [int(item) or cores() for item in _listed(self.workers)] or [cores()]


@dataclass
class LoaderBench:
    """The result: facts about machine and data, one row per case, contender and stage, what is missing, advice."""

    env: dict[str, Any]
    rows: list[dict[str, Any]]
    missing: list[str]
    advice: list[str]

    ok = True

    def as_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def table(self) -> str:
        """Fixed-width text."""
        lines = [", ".join(f"{key} {value}" for key, value in self.env.items()), ""]
        lines += [_HEAD, *map(_line, self.rows)]
        return "\n".join([*lines, "", *self.missing, *self.advice])


_HEAD = f"{'case':<12} {'engine':<16} {'stage':<12} {'img/s':>8} {'low':>8} {'high':>8} {'CPU ms':>7} {'CPU %':>6}"


def _line(row: dict[str, Any]) -> str:
    line = (
        f"{row['case']:<12} {row['engine']:<16} {row['stage']:<12} {row['images_per_s']:8.1f} "
        f"{row['low']:8.1f} {row['high']:8.1f} {row['cpu_ms_per_image']:7.2f} {row['cpu_percent']:6.0f}"
    )
    if "workers" in row:
        line += f"  {row['workers']} workers; a thread beside keeps {row['beside_percent']:.0f} %"
    return line


def bench(options: LoaderBenchOptions, augment: Augment, recipe: Case | None = None) -> LoaderBench:
    """Measure the loader on your data, stage by stage, beside the peers that are installed.

    Args:
        options: what to measure.
        augment: applies the photometric operations to a batch (`fastssl.augment.augment`).
        recipe: the case named recipe.

    Raises:
        SourceError: the data cannot be opened.
        ConfigError: no contender of those asked for works here, or a case needs a recipe or part maps.
    """
    check(bool(options.data), "data", options.data, "a .beton file, a glob of shards, or a folder of images")
    if options.plot:
        _figure()  # before the work, not after it
    cases = dict(CASES)
    if recipe:
        cases |= zip(RECIPE, (recipe, recipe._replace(floats=False)), strict=True)
    names = _listed(options.case) or list(RECIPE if recipe else [*CASES, DECODE])
    check(
        recipe is not None or not {*names} & {*RECIPE}, "case", options.case, "given with a recipe (--config, --method)"
    )
    source = open_source(options.data)
    counts = options.worker_counts
    ids = np.unique(np.linspace(0, len(source) - 1, min(options.images, len(source))).round().astype(np.int64))
    batch_size = min(options.batch_size or 64, len(ids))
    wanted = _listed(options.engine) or [*working_engines(), *PEERS]
    env = {
        "images": len(ids),
        "workers": counts[0] if len(counts) == 1 else counts,
        "batch": batch_size,
        "cores": cores(),
        "torch": torch.__version__,
    }
    result = LoaderBench(env, [], [], [])
    _tell(_HEAD)
    with ExitStack() as outer:
        beton = outer.enter_context(_as_beton(options.data)) if "peer-ffcv" in wanted else None
        for case in names:
            work = cases.get(case, cases["single"])
            for workers in counts:
                peer = Peer(source, ids, work, batch_size=batch_size, workers=workers, beton=beton)
                with ExitStack() as stack:
                    epochs = _contenders(case, wanted, peer, augment, stack, result.missing)
                    if len(counts) == 1:
                        result.rows += _measure(case, epochs, options)
                    else:
                        result.rows += _sweep(case, epochs, options, workers)
                if len(counts) == 1 and case != DECODE:
                    for name in epochs:
                        result.rows += _told(_stages(case, name, peer, augment) if name in ENGINES else [])
    if not result.rows:
        raise ConfigError("none of the contenders asked for works here: " + "; ".join(result.missing))
    result.missing = list(dict.fromkeys(result.missing))
    if len(counts) == 1:
        result.advice = advise(result.rows, source, ids, counts[0], options.step_images_per_s)
    if options.plot:
        draw(result, options.plot)
    return result


def _contenders(
    case: str, wanted: list[str], peer: Peer, augment: Augment, stack: ExitStack, missing: list[str]
) -> dict[str, Callable[[], int]]:
    """What runs one epoch of each contender; why some are left out is added to `missing`."""
    epochs: dict[str, Callable[[], int]] = {}
    for name in wanted:
        if (case == DECODE and name != "bare-decode") or (case not in (DECODE, "single") and name == "bare-decode"):
            continue
        if case in RECIPE and name in PEERS:
            missing.append(f"{name} is left out of {case}: it knows none of our masks and views")
            continue
        try:
            if name in ENGINES:
                epochs[name] = _engine_epoch(name, peer, augment, stack)
            else:
                epochs[name] = PEERS[name](peer, stack)
        except (Missing, ImportError) as error:
            missing.append(f"{name} is left out of {case}: {error}")
    return epochs


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


class _Part(Source):
    """Some samples of a data set."""

    def __init__(self, whole: Source, ids: np.ndarray) -> None:
        self.path, self.classes, self.has_parts = whole.path, whole.classes, whole.has_parts
        self.labels, self._whole, self._ids = whole.labels[ids], whole, ids
        self.in_store = whole.in_store

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._whole.sizes(self._ids[ids])

    def read(self, i: int) -> Encoded:
        return self._whole.read(int(self._ids[i]))

    def places(self, ids: np.ndarray) -> Places | None:
        return self._whole.places(self._ids[ids])

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        return self._whole.block_numbers(self._ids[ids])

    def block(self, number: int) -> Block:
        return self._whole.block(number)

    def parts(self, i: int) -> np.ndarray | None:
        return self._whole.parts(int(self._ids[i]))

    def part_places(self, ids: np.ndarray) -> PartPlaces | None:
        return self._whole.part_places(self._ids[ids])

    def name(self, i: int) -> str:
        return self._whole.name(int(self._ids[i]))

    def fingerprint(self) -> str:
        return f"{self._whole.fingerprint()} {self._ids.tolist()}"


def _engine_epoch(name: str, peer: Peer, augment: Augment, stack: ExitStack) -> Callable[[], int]:
    ids = np.resize(peer.ids, max(len(peer.ids), BATCHES * peer.batch_size))
    loader = _loader(name, peer, ids, peer.batch_size, peer.workers)
    stack.callback(loader.close)
    numbers = iter(range(sys.maxsize))

    def epoch() -> int:
        images = 0
        for batch in loader.epoch(next(numbers)):
            images += len(augment(batch) if peer.floats else batch)
        return images

    return epoch


def _loader(name: str, peer: Peer, ids: np.ndarray, batch_size: int, workers: int) -> Loader:
    more: dict[str, Any] = {"masks": peer.case.masks, "part_grid": peer.case.part_grid}
    source = _Part(peer.source, ids)
    return make_loader(name, source, peer.views, batch_size=batch_size, seed=0, workers=workers, **more)


@contextmanager
def _as_beton(path: str) -> Iterator[str | None]:
    """One .beton file with the data: itself, or made from a folder for the time of the measurement; None for shards."""
    if Path(path).is_dir():
        with tempfile.TemporaryDirectory() as folder:
            made = os.path.join(folder, "data.beton")
            convert(ConvertOptions(path, made))
            yield made
    else:
        yield path if Path(path).is_file() else None


# -- measuring -------------------------------------------------------------------------------------------------------


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        _tell(_line(row))
    return rows


def _measure(case: str, epochs: dict[str, Callable[[], int]], options: LoaderBenchOptions) -> Iterator[dict[str, Any]]:
    """Rows of the stage "overall", one per contender."""
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in epochs}  # images/s, CPU s/image, share
    for name, epoch in epochs.items():
        _tell(f"{case:<12} {name:<16} begins")
        epoch()  # compiles, starts workers, fills caches
    for turn in range(options.rounds):
        for name, epoch in epochs.items():
            images, wall, cpu = 0, time.perf_counter(), cpu_seconds()
            while time.perf_counter() - wall < options.seconds:
                images += epoch()
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            runs[name].append((images / wall, cpu / images, cpu / wall))
            _tell(f"{_line(_row(case, name, runs[name]))}  round {turn + 1} of {options.rounds}")
    yield from (_row(case, name, found) for name, found in runs.items())


def _row(case: str, name: str, found: list[tuple[float, float, float]]) -> dict[str, Any]:
    rates = [rate for rate, _, _ in found]
    return {
        "case": case,
        "engine": name,
        "stage": "overall",
        "images_per_s": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "cpu_ms_per_image": 1e3 * statistics.median(cpu for _, cpu, _ in found),
        "cpu_percent": 100 * statistics.median(share for _, _, share in found),
    }


def _sweep(
    case: str, epochs: dict[str, Callable[[], int]], options: LoaderBenchOptions, workers: int
) -> Iterator[dict[str, Any]]:
    """Rows as of `_measure`, one contender after the other, with `workers` and `beside_percent`."""
    for name, epoch in epochs.items():
        for row in _measure(case, {name: epoch}, options):
            row |= {"workers": workers, "beside_percent": 100 * _beside(epoch, min(options.seconds, 2.0))}
            yield from _told([row])


def _beside(epoch: Callable[[], int], seconds: float) -> float:
    """Share of its speed that a thread keeps while this one runs epochs: it does small operations on a tensor, like a
    training loop that queues kernels. Each of them gives Python's lock away and has to get it back."""
    counts, ended = [0], threading.Event()

    def spin() -> None:
        small = torch.zeros(1)
        while not ended.is_set():
            small.add_(1)
            counts[0] += 1

    thread = threading.Thread(target=spin)
    thread.start()
    rates = []
    try:
        for work in (lambda: time.sleep(min(seconds, 0.1)), epoch):
            begin, before = time.perf_counter(), counts[0]
            while time.perf_counter() - begin < seconds:
                work()
            rates.append((counts[0] - before) / (time.perf_counter() - begin))
    finally:
        ended.set()
        thread.join()
    return rates[1] / rates[0]


def cpu_seconds() -> float:
    """CPU time of this process and of its living children, user and system."""
    total = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            except FileNotFoundError:  # it has ended meanwhile
                continue
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def _stages(case: str, name: str, peer: Peer, augment: Augment, images: int = 64) -> list[dict[str, Any]]:
    """Rows of the single stages of one of our engines, in one thread."""
    part = min(images, len(peer.ids))
    stages = _loader(name, peer, peer.ids, 1, 1).stages(range(part))
    if stages and (peer.floats or peer.case.masks):
        with _loader(name, peer, peer.ids, part, 1) as whole:
            batch = next(whole.epoch(0))
        if peer.case.masks:
            begin = time.process_time()
            add_masks(batch, peer.case.masks, seed=0)
            stages["masks"] = (time.process_time() - begin) / part
    if stages and peer.floats:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        augment(batch)  # compiles, takes memory
        begin = time.process_time()
        augment(batch)
        stages["photometric"] = (time.process_time() - begin) / part
        torch.set_num_threads(threads)
    if stages and torch.cuda.is_available():
        stages["copy"] = _copy_seconds(peer)
    return [
        {
            "case": case,
            "engine": name,
            "stage": stage,
            "images_per_s": 1 / seconds,
            "low": 1 / seconds,
            "high": 1 / seconds,
            "cpu_ms_per_image": 1e3 * seconds,
            "cpu_percent": 100.0,
        }
        for stage, seconds in stages.items()
        if seconds > 0
    ]


def _copy_seconds(peer: Peer) -> float:
    """Seconds per image to copy the crops from page-locked memory to the GPU."""
    size = sum(view.count * 3 * view.size**2 for view in peer.views)
    host = torch.empty((64, size), dtype=torch.uint8, pin_memory=True)
    host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 640


# -- what follows from it --------------------------------------------------------------------------------------------


def advise(rows: list[dict[str, Any]], source: Source, ids: np.ndarray, workers: int, step: float) -> list[str]:
    """What the numbers say: the fastest engine, its slowest stage, and what would help."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and row["engine"] in ENGINES]
        whole = [row for row in mine if row["stage"] == "overall"]
        if not whole:
            continue
        best = min(whole, key=lambda row: row["cpu_ms_per_image"])
        name, cost = best["engine"], best["cpu_ms_per_image"]
        lines.append(f"{case}: use data.engine={name} ({best['images_per_s']:.0f} img/s with {workers} workers)")
        stages = {row["stage"]: row["cpu_ms_per_image"] for row in mine if row["engine"] == name} | {"overall": 0.0}
        slowest = max(stages, key=lambda stage: stages[stage])
        if stages[slowest] > 0:
            share = stages[slowest] / sum(stages.values())
            lines.append(
                f"  the bottleneck is {slowest}: {stages[slowest]:.2f} of {cost:.2f} CPU ms per image ({share:.0%})"
            )
        if slowest == "photometric":
            lines.append("  a GPU takes the photometric part over by itself; without one, fewer blurs would help most")
        if slowest == "decode":
            heights, widths = source.sizes(ids)
            short = float(np.median(np.minimum(heights, widths)))
            if short > 300:
                gain = (short / 256) ** 2
                lines.append(
                    f"  half of the images have a shorter side above {short:.0f} pixels: fastssl convert "
                    f"--max-resolution 256 would make decoding about {gain:.1f} times cheaper, and small crops coarser"
                )
        if step:
            lines.append(f"  a step that takes {step:.0f} img/s needs {step * cost / 1e3:.1f} cores of this kind")
    return lines


def _figure() -> Any:
    """matplotlib's Figure class; ConfigError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot needs the package matplotlib: pip install matplotlib, or leave --plot out") from None
    return Figure


def draw(result: LoaderBench, path: str) -> None:
    """Bars of images per second, one panel per case, to a PNG file; ConfigError where matplotlib is not installed."""
    whole = [row for row in result.rows if row["stage"] == "overall"]
    cases = list(dict.fromkeys(row["case"] for row in whole))
    figure = _figure()(figsize=(4 * len(cases), 3), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        mine = sorted((row for row in whole if row["case"] == case), key=lambda row: row["images_per_s"])
        rates = [row["images_per_s"] for row in mine]
        spread = [
            [row["images_per_s"] - row["low"] for row in mine],
            [row["high"] - row["images_per_s"] for row in mine],
        ]
        colours = ["tab:blue" if row["engine"] in ENGINES else "tab:gray" for row in mine]
        names = [row["engine"] + (f" {row['workers']}" if "workers" in row else "") for row in mine]
        axes.barh(names, rates, xerr=spread, color=colours)
        axes.set(title=case, xlabel="images per second")
    partial = f"{path}.partial"
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)
