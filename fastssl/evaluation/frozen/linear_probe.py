"""Linear classification of frozen features, several learning rates at once.

The protocol of Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021: a linear layer on
the class tokens of the last blocks, SGD with momentum 0.9 and no weight decay, learning rate x batch / 256, cosine over
the epochs. Or that of He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, appendix A.1: a batch
norm without gains in front of the layer, LARS, 10 of 90 epochs of warm-up. Optionally with a hidden layer of tanh
units, the MLP probe of SiT's first version (arXiv 2104.03602v1).
Letters: n images, B images per step, F numbers per feature, C classes, L learning rates, R linear layers, H units.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastssl.augment import augment
from fastssl.config import ConfigError, Data, View
from fastssl.evaluation.accuracy import Accuracy, class_ranks, top_accuracy
from fastssl.evaluation.data import EvaluationError, check_labels, device_of, frozen
from fastssl.evaluation.frozen.features import Features, extract, represent
from fastssl.loaders.engine import decoding_threads, open_loader
from fastssl.loaders.sources import Source
from fastssl.progress import progress_bar
from fastssl.training import distributed
from fastssl.training.optim import trust_ratio
from fastssl.training.schedule import cosine, warmup_cosine

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for a batch of 256 images
MAE_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)  # the same for LARS; the authors' is 0.1
MOMENTUM = 0.9
TRUST = 0.001  # of LARS
HELD_OUT = 0.1  # share of the training images on which the learning rate is chosen

Minibatches = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""epoch -> (features float32 [B, F], labels int64 [B], held out bool [B]) of each step, on the device."""


@dataclass(frozen=True)
class ProbeResult(Accuracy):
    """Accuracy of the chosen linear layer.

    Attributes:
        lr: its learning rate, for a batch of 256 images.
        held_out: by learning rate, top-1 in percent on the held-out training images; empty where only one was tried.
    """

    lr: float
    held_out: dict[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the smallest or largest one tried: a better one may lie beyond."""
        return bool(self.held_out) and self.lr in (min(self.held_out), max(self.held_out))

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "lr": self.lr, "held_out": {str(lr): top1 for lr, top1 in self.held_out.items()}}


def linear_probe(
    train: Features,
    val: Features,
    *,
    lrs: Sequence[float] = LRS,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: str = "",
    hidden: int = 0,
    protocol: Literal["dino", "mae"] = "dino",
) -> ProbeResult:
    """Trains linear layers on a table of features and judges one of them on `val`.

    With several learning rates, each has two layers, all trained side by side on the same minibatches: one sees all the
    training features, its twin all but a held-out tenth. The learning rate whose twin does best on that tenth is
    chosen, and its first layer is the one judged: `val` chooses nothing.

    Args:
        train, val: labelled, same classes, extracted with the same network and options.
        lrs: learning rates for a batch of 256 images.
        epochs: passes over the training features.
        batch_size: features per step.
        seed: of the first weights, the order of the features and the held-out tenth.
        device: where the layers are trained.
        progress: label of the progress bar; empty shows none.
        hidden: units of a hidden layer (tanh) before the linear one; 0: none.
        protocol: "dino", or "mae": batch norm and LARS. All layers share the batch norm, whose statistics thus come
            from the held-out tenth too.

    Raises:
        ConfigError: unusable lrs, epochs, batch_size or hidden.
        EvaluationError: unlabelled images, different classes or widths, or the chosen layer diverged.
    """
    check_numbers(lrs, epochs, batch_size, hidden, protocol)
    classes = check_labels(train, val, "the training features", "the validation features")
    if train.values.shape[1] != val.values.shape[1]:
        raise EvaluationError(
            f"training features have {train.values.shape[1]} numbers, validation features {val.values.shape[1]}; "
            "extract both with the same network and options"
        )
    device, batch_size = torch.device(device), min(batch_size, len(train))
    held_out = held_out_images(len(train), lrs, seed)
    judge = Features(train.values[held_out], train.labels[held_out], train.ids[held_out])

    steps = math.ceil(len(train) / batch_size)

    def minibatches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order.tensor_split(steps):  # evenly: no small rest to shake the layers
            yield train.values[rows].to(device, torch.float32), train.labels[rows].to(device), held_out[rows].to(device)

    training = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed}
    return _train_layers(minibatches, judge, val, classes, lrs, device, progress, hidden, protocol, **training)


def linear_probe_augmented(
    backbone: nn.Module,
    source: Source,
    val: Features,
    *,
    size: int,
    resize: int = 0,
    blocks: int = 1,
    mean_patch: bool = False,
    lrs: Sequence[float] = LRS,
    epochs: int = 100,
    batch_size: int = 1024,
    forward_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: str = "",
    hidden: int = 0,
    protocol: Literal["dino", "mae"] = "dino",
    interpolation: str = "bicubic",
) -> ProbeResult:
    """`linear_probe` on random crops and flips, drawn and put through the backbone anew in every epoch.

    An epoch is made of whole batches; the images left over, others each time, wait for the next one. The processes of a
    run share the images of a step (rounded down to a multiple of their number) and train the same layers.

    Args:
        backbone, size, resize, interpolation, blocks, mean_patch, workers, dtype: as in `extract`, and as `val` was
            made.
        source: labelled training images, same classes as `val`.
        forward_size: images per forward pass of the backbone; a step of `batch_size` images takes several.
        lrs, epochs, batch_size, seed, progress, hidden, protocol: as in `linear_probe`.

    Raises:
        ConfigError, EvaluationError: as `linear_probe`.
    """
    check_numbers(lrs, epochs, batch_size, hidden, protocol)
    classes = check_labels(source, val, "the training data", "the validation features")
    device, world = device_of(backbone), distributed.world()
    each = max(1, min(batch_size, len(source)) // world)
    held_out = held_out_images(len(source), lrs, seed)
    judge = val
    if held_out.any():
        judge = extract(
            backbone,
            source,
            size=size,
            resize=resize,
            interpolation=interpolation,
            batch_size=forward_size,
            workers=workers,
            dtype=dtype,
            blocks=blocks,
            mean_patch=mean_patch,
            ids=np.flatnonzero(held_out.numpy()),
            shared=True,
        )
    loader = open_loader(
        source,
        [View(name="train", size=size, interpolation="bilinear" if protocol == "dino" else "bicubic")],
        Data(batch_size=each, prefetch=2),
        seed=seed,
        rank=distributed.rank(),
        world=world,
        threads=decoding_threads(workers, distributed.local_world()),
        pin_memory=device.type == "cuda",
    )

    def minibatches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with contextlib.closing(loader.epoch(epoch)) as batches:
            for batch in batches:
                images = augment(batch.to(device)).views["train"][:, 0]
                pieces = [represent(backbone, piece, dtype, blocks, mean_patch) for piece in images.split(forward_size)]
                mine = (torch.cat(pieces), batch.label.to(device), batch.id.to(device))
                features, labels, ids = (distributed.gather(rows) for rows in mine)
                yield features, labels, held_out[ids.cpu()].to(device)

    with contextlib.closing(loader), frozen(backbone):
        training = {"epochs": epochs, "steps": loader.batches_per_epoch, "batch_size": each * world, "seed": seed}
        return _train_layers(minibatches, judge, val, classes, lrs, device, progress, hidden, protocol, **training)


def check_numbers(lrs: Sequence[float], epochs: int, batch_size: int, hidden: int = 0, protocol: str = "dino") -> None:
    """Raises a ConfigError that names the first unusable number."""
    if not lrs or not all(math.isfinite(lr) and lr > 0 for lr in lrs) or len(set(lrs)) < len(lrs):
        raise ConfigError(f"lrs is {list(lrs)}; it must name one or more different learning rates above 0")
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; it must be 1 or more")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
    if hidden < 0:
        raise ConfigError(f"hidden is {hidden}; it must be 0 (none) or a number of units")
    if protocol == "mae" and hidden:
        raise ConfigError(f"hidden is {hidden}; the protocol mae has no hidden layer")
    if protocol == "mae" and batch_size < 2:
        raise ConfigError(f"batch_size is {batch_size}; the batch norm of the protocol mae needs 2 or more")


def held_out_images(images: int, lrs: Sequence[float], seed: int) -> Tensor:
    """bool [n]: the tenth on which the learning rate is chosen; none of them where there is nothing to choose."""
    mask = torch.zeros(images, dtype=torch.bool)
    if len(lrs) > 1:
        order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
        mask[order[: math.ceil(HELD_OUT * images)]] = True
    return mask


def _train_layers(
    minibatches: Minibatches,
    judge: Features,
    val: Features,
    classes: int,
    lrs: Sequence[float],
    device: torch.device,
    progress: str,
    hidden: int,
    protocol: str,
    *,
    epochs: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> ProbeResult:
    """Trains R layers (L, or L and their L twins) in one matrix product, chooses by `judge`, judges by `val`."""
    mae = protocol == "mae"
    several = len(lrs) > 1
    twins = 2 if several else 1
    peak = torch.tensor([lr * batch_size / 256 for lr in lrs] * twins, device=device)[:, None]  # [R, 1]
    parameters = _start(val.values.shape[1], hidden, classes, len(peak), seed, device)
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    norm = nn.BatchNorm1d(val.values.shape[1], eps=1e-6, affine=False).to(device) if mae else nn.Identity()
    for epoch in progress_bar(epochs, progress, "epochs", iterable=range(epochs)):
        for step, (features, labels, held_out) in enumerate(minibatches(epoch)):
            lr = peak * (_mae_rate(epoch + step / steps, epochs) if mae else cosine(epoch, epochs, 1.0, 0.0))
            sees = torch.ones(len(labels), twins, len(lrs), device=device)  # 1 where the layer learns from the image
            sees[held_out, 1:] = 0.0
            loss = _loss(_logits(norm(features), parameters), labels, sees.flatten(1))
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, v, gradient in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(MOMENTUM).add_(_adapted(parameter, gradient) if mae else gradient)
                    parameter.sub_(lr * v)

    norm.eval()
    held_out_top1, best = {}, 0
    if several:
        twins_top1, _, twins_loss = _judge([p[..., len(lrs) :, :] for p in parameters], judge, norm)
        held_out_top1 = dict(zip(lrs, twins_top1, strict=True))
        best = max(range(len(lrs)), key=lambda i: (twins_top1[i], -twins_loss[i]))
    chosen = [p[..., best : best + 1, :] for p in parameters]
    if not all(torch.isfinite(p).all() for p in chosen):
        raise EvaluationError(f"the linear layer diverged with learning rate {lrs[best]}; try smaller ones")
    [top1], [top5], _ = _judge(chosen, val, norm)
    return ProbeResult(top1, top5, len(val), lrs[best], held_out_top1)


def _mae_rate(position: float, epochs: int) -> float:
    """Share of the peak learning rate at a position in epochs: linear over a ninth of them, then half a cosine to 0."""
    return warmup_cosine(position, epochs, epochs / 9, 1.0, 0.0)


def _adapted(parameter: Tensor, gradient: Tensor) -> Tensor:
    """LARS (You et al. 2017) for R weights [F, R, C], each by its own norm; biases [R, C] stay as they are."""
    if parameter.ndim < 3:
        return gradient
    size, change = (t.square().sum((0, 2), keepdim=True).sqrt() for t in (parameter, gradient))  # [1, R, 1]
    return gradient * trust_ratio(size, change, TRUST)


def _start(width: int, hidden: int, classes: int, layers: int, seed: int, device: torch.device) -> list[Tensor]:
    """Weight [F, R, C] and bias [R, C] of R equal layers; with a hidden layer of H units, first those of it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(width, hidden, 0.02), (hidden, classes, 0.01)] if hidden else [(width, classes, 0.01)]
    parameters = []
    for inputs, outputs, spread in sizes:
        weight = torch.randn(inputs, 1, outputs, generator=generator) * spread
        parameters.append(weight.repeat(1, layers, 1).to(device).requires_grad_())
        parameters.append(torch.zeros(layers, outputs, device=device, requires_grad=True))
    return parameters


def _logits(features: Tensor, parameters: list[Tensor]) -> Tensor:
    """[B, R, C] of features [B, F] under R layers."""
    weight, bias, *last = parameters
    x = (features @ weight.flatten(1)).unflatten(1, bias.shape) + bias
    return torch.einsum("brh,hrc->brc", x.tanh(), last[0]) + last[1] if last else x


def _loss(logits: Tensor, labels: Tensor, sees: Tensor) -> Tensor:
    """Sum over the R layers of each one's mean cross-entropy over the images that it sees; no layer feels another."""
    every = labels.repeat_interleave(logits.shape[1])
    each = cross_entropy(logits.flatten(0, 1), every, reduction="none").view_as(sees)  # [B, R]
    return ((each * sees).sum(0) / sees.sum(0).clamp_min(1.0)).sum()


@torch.no_grad()
def _judge(parameters: list[Tensor], data: Features, norm: nn.Module) -> tuple[list[float], list[float], list[float]]:
    """Top-1 and top-5 in percent, and mean cross-entropy, of each of the R layers."""
    ranks, losses = [], []
    for begin in range(0, len(data), 1024):
        rows = slice(begin, begin + 1024)
        device = parameters[0].device
        logits = _logits(norm(data.values[rows].to(device, torch.float32)), parameters)  # [B, R, C]
        labels = data.labels[rows].to(device)
        ranks.append(torch.stack([class_ranks(layer, labels) for layer in logits.unbind(1)]))
        losses.append(torch.stack([cross_entropy(layer, labels, reduction="sum") for layer in logits.unbind(1)]))
    top1, top5 = zip(*(top_accuracy(layer) for layer in torch.cat(ranks, dim=1)), strict=True)
    loss = torch.stack(losses).sum(0).nan_to_num(nan=math.inf) / len(data)
    return list(top1), list(top5), loss.tolist()
