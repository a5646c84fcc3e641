"""Before the first step: what the run will take in memory, disk and time, estimated from a tiny trial step, and whether
the loader, tried for a moment, feeds it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from fastssl.augment import augment
from fastssl.batch import Batch, Photometric
from fastssl.config import Config, View
from fastssl.kernels._rate import matrix_rate
from fastssl.loaders.loader import BadSampleError, Loader
from fastssl.loaders.masks import add_masks
from fastssl.methods.method import Method
from fastssl.models.blocks import Unit
from fastssl.step import Values

TRIAL = 2  # images in the trial batch
REACHED = 0.4  # share of the device's matrix rate that training usually reaches
FEW_STEPS = 100  # a run of fewer does not try its loader
TRIED, SECONDS = 1024, 2.0  # images, and the time after which there are no more


@dataclass
class Preflight:
    """Estimates for one process.

    Attributes:
        memory: device bytes at the peak: weights, gradients, optimizer state, activations, input.
        host: bytes of host memory for batches in preparation.
        checkpoint: bytes of one checkpoint.
        flops: floating-point operations per image, forward and backward.
        images_per_s: what computing allows, data not counted.
        seconds: compute time of one epoch at that.
        epochs: epochs of the whole run.
    """

    memory: float
    host: float
    checkpoint: float
    flops: float
    images_per_s: float
    seconds: float
    epochs: int

    def line(self) -> str:
        return (
            f"pre-flight (estimates): {_size(self.memory)} device memory, {_size(self.host)} host buffers, "
            f"{_size(self.checkpoint)} per checkpoint, {self.flops / 1e9:.1f} GFLOP per image, "
            f"compute {_duration(self.seconds)} per epoch and {_duration(self.seconds * self.epochs)} in all"
        )

    def loader_line(self, rate: float) -> str:
        """Whether a loader that gives `rate` images per second feeds the step."""
        if rate > 1.3 * self.images_per_s:
            verdict = "enough"
        elif rate > 0.8 * self.images_per_s:
            verdict = "it may just feed the step"
        else:
            verdict = "the step will wait for data; 'fastssl bench loader' with this recipe says what would help"
        return (
            f"loader: gives about {_rate(rate)} images/s per process, the step is estimated to take "
            f"{_rate(self.images_per_s)}: {verdict}"
        )


def preflight(
    method: Method, views: list[View], config: Config, *, images: int, device: torch.device, dtype: torch.dtype
) -> Preflight:
    """Runs the method once on two made-up images and scales up; weights, buffers and gradients are left as found.

    Args:
        method: on `device`, in train mode.
        images: training images that this process handles per epoch.
        dtype: arithmetic of the networks (autocast).
    """
    before = {key: value.clone() for key, value in method.state_dict().items()}
    trial = trial_batch(views, TRIAL, type(method).part_grid(config))
    add_masks(trial, type(method).masks(config), seed=0)
    batch = augment(trial.to(device))
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not isinstance(whole, nn.Parameter):  # neither the network's own nor what shards are put together in
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    # What is recomputed is kept this once, to see what it would take.
    again = [unit for unit in method.modules() if isinstance(unit, Unit) and unit.recompute]
    begun: dict[nn.Module, tuple[int, int]] = {}
    passes: list[tuple[int, int, int]] = []  # bytes kept inside, operations, bytes of the input

    def enter(unit: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        begun[unit] = sum(saved.values()), counter.get_total_flops()

    def leave(unit: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        if torch.is_grad_enabled():
            bytes_before, flops_before = begun[unit]
            inside = sum(saved.values()) - bytes_before
            passes.append((inside, counter.get_total_flops() - flops_before, inputs[0].nbytes))

    hooks = [unit.register_forward_pre_hook(enter) for unit in again]
    hooks += [unit.register_forward_hook(leave) for unit in again]
    for unit in again:
        unit.recompute = False
    values = Values(step=0, total_steps=1, steps_per_epoch=1)
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = method(batch, values).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    for unit in again:
        unit.recompute = True
    flops = (counter.get_total_flops() + sum(operations for _, operations, _ in passes)) / TRIAL
    kept = sum(saved.values()) - sum(inside - given for inside, _, given in passes)
    kept += max((inside for inside, _, _ in passes), default=0)
    activations = kept / TRIAL * config.data.batch_size
    method.zero_grad(set_to_none=True)
    method.load_state_dict(before)

    trained = [p for p in method.parameters() if p.requires_grad]
    stored = list(before.values())
    masters = sum(4 * p.numel() for p in method.parameters() if p.dtype == torch.bfloat16)
    copies = {"adamw": 2, "sgd": 1, "lars": 1}[config.optim.name]
    moments = copies * sum(max(4, p.itemsize) * p.numel() for p in trained)
    held = float(sum(map(local_bytes, stored)) + masters + sum(map(local_bytes, trained)))
    held += copies * sum(max(4, p.itemsize) / p.itemsize * local_bytes(p) for p in trained)
    crops = sum(view.count * 3 * view.size**2 for view in views) * config.data.batch_size
    rate = REACHED * matrix_rate(device, dtype) / flops
    return Preflight(
        memory=held + _put_together(method, dtype, config.run.accumulate) + activations + 5 * crops,
        host=crops * config.data.prefetch,
        checkpoint=sum(value.nbytes for value in stored) + masters // 2 + moments,
        flops=flops,
        images_per_s=rate,
        seconds=images / rate,
        epochs=config.schedule.epochs,
    )


def local_bytes(value: torch.Tensor) -> int:
    """Bytes of a tensor that this process has."""
    return value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes


def _put_together(method: nn.Module, dtype: torch.dtype, accumulate: int) -> int:
    """Bytes at most of shards put together: of one part and the next, with the gradients of one; where micro-batches
    are accumulated, gradients of all."""
    shards = [[p for p in m.parameters() if isinstance(p, DTensor)] for m in method.modules() if hasattr(m, "also")]
    largest = max((sum(p.numel() for p in part) for part in shards), default=0)
    gradients = sum(p.numel() for part in shards for p in part if p.requires_grad) if accumulate > 1 else 0
    return largest * (3 * dtype.itemsize + 4) + 4 * gradients


def loading_rate(loader: Loader, epoch: int) -> float:
    """Images per second that a loader gives after its first batch; 0 where its data is too little, or bad, to say."""
    images, begin, now = 0, 0.0, 0.0
    with contextlib.closing(loader), contextlib.suppress(BadSampleError):
        for batch in loader.epoch(epoch):
            now = time.perf_counter()
            begin, images = (now, 0) if not begin else (begin, images + len(batch))
            if images >= TRIED or now - begin > SECONDS:
                break
    return images / (now - begin) if images else 0.0


def trial_batch(views: list[View], count: int, part_grid: dict[str, int] | None = None) -> Batch:
    """A batch of `count` images of noise with the shapes that `views` asks for and no photometric change.

    Args:
        part_grid: side of the part-label grid per group; every patch belongs to part 0.
    """

    def photometric(n: int) -> Photometric:
        return Photometric(
            jitter=torch.zeros(count, n, dtype=torch.bool),
            order=torch.arange(4).expand(count, n, 4),
            factor=torch.ones(count, n, 4),
            gray=torch.zeros(count, n, dtype=torch.bool),
            blur_sigma=torch.zeros(count, n),
            solarize=torch.full((count, n), 256.0),
        )

    noise = torch.Generator().manual_seed(0)
    return Batch(
        id=torch.arange(count),
        label=torch.full((count,), -1),
        views={
            v.name: torch.randint(0, 256, (count, v.count, 3, v.size, v.size), dtype=torch.uint8, generator=noise)
            for v in views
        },
        box={v.name: torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, v.count, 4) for v in views},
        flip={v.name: torch.zeros(count, v.count, dtype=torch.bool) for v in views},
        photometric={v.name: photometric(v.count) for v in views},
        parts={
            v.name: torch.zeros(count, v.count, grid, grid, dtype=torch.int64)
            for v in views
            if (grid := (part_grid or {}).get(v.name))
        },
    )


def _rate(count: float) -> str:
    return f"{count:.0f}" if count >= 10 else f"{count:.2g}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
