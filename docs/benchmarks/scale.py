"""The tables of docs/scale.md: `python docs/benchmarks/scale.py`. Measured numbers stand at the top."""

from __future__ import annotations

from dataclasses import dataclass

GPUS = (1, 8, 64, 512)
PER_NODE = 8


@dataclass
class Recipe:
    """One recipe as measured.

    Attributes:
        images_per_s: of one H200 at `local` images per step (2026-11-26, commit 2b2a9b9, data in memory).
        cpu_ms: per image, of one core of that machine: reading, decoding, cropping.
        batch: images per optimizer step of the recipe.
        epochs: of the recipe.
        operations: that the host queues per step and micro-batch (docs/benchmarks/step.md).
        trained: parameters with a gradient, millions (counted).
        state: bytes of a checkpoint per trained parameter: weights, two moments, and the teacher where there is one.
    """

    name: str
    images_per_s: float
    local: int
    cpu_ms: float
    batch: int
    epochs: int
    operations: int
    trained: float
    state: int


RECIPES = [
    Recipe("DINO ViT-S/16, 2 + 8 crops", 900, 64, 1.64, 512, 100, 595, 44.0, 16),
    Recipe("MAE ViT-B/16", 3642, 256, 0.71, 4096, 1600, 569, 111.7, 12),
    Recipe("CAE ViT-B/16", 615, 64, 0.71, 2048, 800, 790, 148.7, 12),
]
WINDOW = 64 * (8 << 20)  # bytes that are shuffled together (data.page_window)
IMAGES, IMAGE_BYTES = 1_281_167, 118_000  # ImageNet-1k at 500 pixels; bytes measured on 500 of its images
GRADIENT_BYTES = 4  # per trained parameter and exchange: sums are made in float32
NVLINK, FAST, SLOW = 300e9, 8 * 50e9 * 0.8, 12.5e9 * 0.8  # bytes/s: of a GPU inside a node; of a node's network cards
QUEUE = 71.1e-3 / 1841  # s of the host per operation: DINO's step on the H200, which waited for the host throughout
BACKWARD = 2 / 3  # of a step; the exchange of gradients runs beside it
# One unplanned stop per so many GPU hours: 419 in 54 days of 16,384 GPUs (Llama 3, arXiv 2407.21783, table 5). 6.5 per
# 1,000 node days (Kokolis et al. 2024, arXiv 2410.21680) is one per 29,500 GPU hours.
MTBF = 54 * 24 * 16384 / 419
RESTART = 10 + 10 + 40  # s: imports, first step (docs/elastic.md), rendezvous and the other processes' end (assumed)
HANG = 600  # s until a silent process is noticed (run.hang_s); a dead one is noticed at once


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exchange(recipe: Recipe, gpus: int, network: float) -> float:
    """Seconds to sum the gradients: rings inside a node, then over the nodes through all network cards of each."""
    size = recipe.trained * 1e6 * GRADIENT_BYTES
    local, nodes = min(gpus, PER_NODE), -(-gpus // PER_NODE)
    return 2 * size * ((local - 1) / local / NVLINK + (nodes - 1) / nodes / network)


def step(recipe: Recipe, gpus: int, network: float) -> tuple[float, str]:
    """Seconds of a step, and what bounds it. The exchange runs beside the backward pass; a GPU that has fewer images
    than were measured is taken to keep its rate, until the host cannot queue operations fast enough."""
    images = recipe.batch / gpus
    computing = images / recipe.images_per_s
    queueing = -(-images // recipe.local) * recipe.operations * QUEUE
    bound = {"computing": computing, "queueing": queueing}
    name, whole = max(bound.items(), key=lambda item: item[1])
    exchanging = whole * (1 - BACKWARD) + exchange(recipe, gpus, network)
    return (exchanging, "network") if exchanging > whole else (whole, name)


def speed(recipe: Recipe) -> str:
    rows = []
    for gpus in GPUS:
        images = recipe.batch / gpus
        cells = []
        for network in (FAST, SLOW):
            seconds, bound = step(recipe, gpus, network)
            rate = recipe.batch / seconds
            cells.append(f"{rate:,.0f} ({rate / gpus / recipe.images_per_s:.0%}, {bound})")
        hours = IMAGES * recipe.epochs / (recipe.batch / step(recipe, gpus, FAST)[0]) / 3600
        split = f"{min(recipe.local, images):.0f} x {-(-images // recipe.local):.0f}"
        milliseconds = f"{images / recipe.images_per_s * 1e3:,.0f}", f"{exchange(recipe, gpus, FAST) * 1e3:.0f}"
        rows.append(
            [f"{gpus}", split, *milliseconds, cells[0], f"{hours:,.1f} h", cells[1] if gpus > PER_NODE else "-"]
        )
    head = ["GPUs", "images x accumulated", "computing, ms", "exchange, ms", "images/s (of linear, bound by)"]
    return table([*head, f"{recipe.epochs} epochs", "on 100 Gb/s per node"], rows)


def again(recipe: Recipe, gpus: int) -> float:
    """How many nodes read each page of the file in an epoch. A node's images of a micro-batch are neighbours in the
    order, so they come from one window, and touch most of its pages."""
    nodes, local = -(-gpus // PER_NODE), min(gpus, PER_NODE) * min(recipe.local, recipe.batch / gpus)
    return min(nodes, max(1.0, WINDOW / IMAGE_BYTES / local))


def feeding() -> str:
    rows = []
    for recipe in RECIPES:
        for gpus in GPUS:
            rate = recipe.batch / step(recipe, gpus, FAST)[0]
            nodes = -(-gpus // PER_NODE)
            rows.append([
                recipe.name if gpus == 1 else "", f"{gpus}", f"{rate / gpus * recipe.cpu_ms / 1e3:.1f}",
                _rate(rate * IMAGE_BYTES), f"{again(recipe, gpus):.0f}",
                _rate(rate * IMAGE_BYTES * again(recipe, gpus)), _bytes(IMAGES * IMAGE_BYTES * nodes),
            ])  # fmt: skip
    head = ["recipe", "GPUs", "cores per GPU", "needed", "nodes that read a page", "the store gives, no cache"]
    return table([*head, "in all, with a cache"], rows)


def surviving() -> str:
    rows = []
    for recipe in RECIPES:
        size = recipe.trained * 1e6 * recipe.state
        for gpus in GPUS[1:]:
            hours = MTBF / gpus
            day = 24 / hours
            minute = (30 + RESTART) * day
            epoch = IMAGES / (recipe.batch / step(recipe, gpus, FAST)[0])
            rows.append([
                recipe.name if gpus == GPUS[1] else "", f"{gpus}", _bytes(size), f"{hours / 24:,.1f} days",
                f"{minute:.1f} s ({minute / 86400:.3%})", f"{(epoch / 2 + RESTART) * day:.0f} s",
                f"{(30 + RESTART + HANG) * day:.0f} s",
            ])  # fmt: skip
    head = ["recipe", "GPUs", "a checkpoint, and per minute", "between failures", "lost per day, one per minute"]
    return table([*head, "one per epoch", "every failure a hang"], rows)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def _rate(size: float) -> str:
    return f"{_bytes(size)}/s"


def tables() -> dict[str, str]:
    """Name -> table, as docs/scale.md has them."""
    return {**{recipe.name: speed(recipe) for recipe in RECIPES}, "Feeding": feeding(), "Surviving": surviving()}


if __name__ == "__main__":
    print("\n\n".join(f"{name}\n\n{text}" for name, text in tables().items()))
