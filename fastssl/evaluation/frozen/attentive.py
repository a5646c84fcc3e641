"""Attentive probing: one learned query pools the tokens of a frozen ViT, several learning rates at once.

The protocol of Chen et al., "Context autoencoder for self-supervised representation learning" (arXiv 2202.03026): a
method without a loss on the class token is judged by what a single cross-attention block can gather from all tokens.
Letters: n images, B images per forward pass, N tokens of an image (the class token among them), D width, h heads, C
classes.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear

from fastssl.augment import augment
from fastssl.config import (
    ConfigError,
    Data,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    View,
    check,
)
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, central_view, check_labels, open_labelled
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.frozen.linear_probe import check_numbers, held_out_images
from fastssl.evaluation.options import EvaluateOptions
from fastssl.evaluation.record import recorded
from fastssl.evaluation.scoring import Scored, score
from fastssl.evaluation.shared import check_shared
from fastssl.loaders.engine import decoding_threads, open_loader
from fastssl.loaders.index import batch_ids, order
from fastssl.loaders.sources import Source
from fastssl.models import check_image_size
from fastssl.models.vit import ViT
from fastssl.training import distributed
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.loop import LOG_EVERY, Pace, Run, settings
from fastssl.training.schedule import warmup_cosine
from fastssl.weights.backbone import digest, open_backbone

EPS = 1e-6  # of the layer norms
MIN_LR = 1e-6  # at the end of the cosine
MOMENTUM = 0.1  # of the batch norm's running statistics
UPSTREAM_BATCH = 384  # images per batch norm in the authors' evaluation


@dataclass
class AttentiveOptions(EvaluateOptions):
    """Classification by one cross-attention block on the frozen tokens of a ViT."""

    batch_size: Annotated[int, Range(at_least=2)] = 256
    """Images per process and forward pass; in training the batch norm sees so many."""
    lrs: tuple[PositiveFloat, ...] = (0.004, 0.0125, 0.04, 0.125, 0.4)
    """Learning rates for a batch of 256, tried at once; the one that does best on a held-out tenth of data counts. CAE
    takes 0.4 for 8192 images: 0.0125 here."""
    epochs: PositiveInt = 90
    """Passes over data."""
    warmup_epochs: NonNegativeFloat = 10
    """Epochs of linear learning-rate warm-up from 0; half a cosine to 1e-6 follows."""
    step_size: PositiveInt = 1024
    """Images per optimizer step, over all processes, in whole batches (CAE: 8192); the learning rate is multiplied by
    step_size / 256."""
    heads: NonNegativeInt = 0
    """Attention heads of the block. 0: the network's."""
    augment: bool = True
    """Random crops and flips, put through the network anew in every epoch. False: the central crop goes through it
    once, and all tokens stay in memory (4 N D bytes per image)."""
    upstream_bn_eval: bool = False
    """Judge with the statistics of batches of 384 images instead of the running ones, as CAE's released code does."""
    dir: str = ""
    """Folder in which the probes are saved after every epoch; the same command continues there. Empty: not saved."""
    seed: Seed = 0
    """Seed of the first weights, the order, the crops and the held-out tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        check_numbers(self.lrs, self.epochs, self.batch_size)
        check(self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"at most epochs ({self.epochs})")


class AttentiveProbe(nn.Module):
    """A cross-attention block with one query, a batch norm without gains, and a linear layer.

        q = LN_q(query) W_q + b_q;   K = LN_k(X) W_k;   V = LN_v(X) W_v + b_v
        scores = BN(softmax(q K^T / sqrt(D / h)) V W_o + b_o) W_c + b_c

    With one query the products can be taken in another order: the query goes through W_k instead of all tokens, and
    what it gathered goes through W_v. That is the same function for about h / D of the work. The query starts at zero:
    at first the block is a mean over the tokens. The shift of LN_k changes nothing (softmax) and stays as it is.

    Args:
        width: D.
        heads: h.
        classes: C.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"heads is {heads}; it must divide the network's width, {width}")
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, momentum=MOMENTUM, affine=False)
        self.head = nn.Linear(width, classes)
        for layer, std in ((self.q, 0.02), (self.k, 0.02), (self.v, 0.02), (self.proj, 0.02), (self.head, 0.01)):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def pool(self, tokens: Tensor) -> Tensor:
        """What the query gathers from `standardised` tokens [B, N, D], before the batch norm: [B, D]."""
        query = self.q(self.norm_q(self.query)).view(self.heads, 1, -1)  # [h, 1, D/h]
        reader = (query @ self.k.weight.unflatten(0, (self.heads, -1)))[:, 0] * self.norm_k.weight  # [h, D]
        attention = (linear(tokens, reader) * query.shape[-1] ** -0.5).softmax(dim=1)  # [B, N, h]
        gathered = attention.transpose(1, 2) @ tokens  # [B, h, D]
        gathered = gathered * self.norm_v.weight + self.norm_v.bias
        values = torch.einsum("bhd,hed->bhe", gathered, self.v.weight.unflatten(0, (self.heads, -1)))
        return self.proj(values.flatten(1) + self.v.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`standardised` tokens [B, N, D] -> scores [B, C]."""
        return self.head(self.norm(self.pool(tokens)))


class Probes(nn.ModuleList):
    """Probes that train side by side: some see all images, the others (if any) not those that are held out."""

    def __init__(self, probes: Iterable[AttentiveProbe]) -> None:
        super().__init__(probes)
        for probe in self:
            probe.norm_k.bias.requires_grad_(False)  # changes nothing, so it has no gradient

    def __iter__(self) -> Iterator[AttentiveProbe]:
        return cast(Iterator[AttentiveProbe], super().__iter__())

    def forward(self, tokens: Tensor, labels: Tensor, held_out: Tensor, first: int) -> Tensor:
        """The sum of the probes' losses.

        Args:
            tokens: `standardised`, [B, N, D].
            labels: int64 [B].
            held_out: bool [B].
            first: how many probes see all images.
        """
        losses = [cross_entropy(probe(tokens), labels) for probe in self[:first]]
        tokens, labels = tokens[~held_out], labels[~held_out]
        share = distributed.all_reduce_mean((~held_out).sum().float()).clamp_min(1)  # so that every image counts alike
        if len(labels) > 1 or distributed.world() > 1:  # the batch norm needs two
            losses += [cross_entropy(probe(tokens), labels, reduction="sum") / share for probe in self[first:]]
        return reduce(torch.add, losses)


def standardised(tokens: Tensor) -> Tensor:
    """Tokens float [B, N, D] less their mean and over their standard deviation, as the block's layer norms begin."""
    return layer_norm(tokens.float(), tokens.shape[-1:], eps=EPS)


class _Tokens(nn.Module):
    """All output tokens of a ViT as one vector, for `features.extract`."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def represent(self, images: Tensor, blocks: int, mean_patch: bool) -> Tensor:
        return self.vit.tokens(images).flatten(1)


@dataclass(frozen=True)
class AttentiveEvaluation:
    """Accuracy of the chosen probe.

    Attributes:
        checkpoint: its path.
        step: optimizer steps of its run.
        scored: of the chosen probe, on val.
        lr: its learning rate, for a batch of 256 images.
        held_out: by learning rate, top-1 in percent on the held-out training images; empty where only one was tried.
        train_images: how many.
        seconds: in all.
    """

    checkpoint: str
    step: int
    scored: Scored
    lr: float
    held_out: dict[float, float]
    train_images: int
    seconds: float

    @property
    def top1(self) -> float:
        """In percent."""
        return self.scored.top1

    def as_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in vars(self).items() if key not in ("scored", "held_out")}
        return {**self.scored.as_dict(), "held_out": {str(lr): top1 for lr, top1 in self.held_out.items()}, **values}

    def table(self) -> str:
        rows = [
            ("learning rate", "top-1 %", "95 % interval", "top-5 %", "loss"),
            (f"{self.lr:g}", *self.scored.cells()),
        ]
        parts = [
            f"attentive, {self.checkpoint} (step {self.step}): {self.train_images} training images, "
            f"{self.scored.images} validation images, {self.seconds:.0f} s",
            format_table(rows),
        ]
        if self.held_out:
            tried = [(f"{lr:g}", f"{top1:.2f}") for lr, top1 in self.held_out.items()]
            parts.append(format_table([("learning rate", "top-1 % on the held-out tenth"), *tried]))
            if self.lr in (min(self.held_out), max(self.held_out)):
                parts.append("the chosen learning rate is the smallest or largest tried; others in --lrs may do better")
        return "\n\n".join(parts)


@recorded("attentive")
def evaluate_attentive(options: AttentiveOptions) -> AttentiveEvaluation:
    """Train a cross-attention block with one learned query on the frozen tokens of a checkpoint's ViT and classify
    images with it; under torchrun on many GPUs.

    Source: Chen et al. 2022 (CAE), section 4 and appendix.
    """
    return Probing(options).train()


Tokens = tuple[Tensor, Tensor, Tensor, list[int]]  # tokens [B, N, D], labels [B], held out? [B], ids


class Probing(Run[Tokens, AttentiveEvaluation]):
    """One probing on this process (one of several under torchrun).

    With several learning rates each has two probes, trained side by side on the same tokens: one sees all training
    images, its twin all but a held-out tenth, on which the learning rate is chosen.
    """

    kind = "probe"
    file_name = "probes.pt"
    ends_if_not_finite = ()  # one learning rate of several may diverge; it is not chosen then
    scales_loss = False  # the probes compute in float32

    def __init__(self, options: AttentiveOptions) -> None:
        self.options, begin = options, time.perf_counter()
        device = choose_device(options.device, "device")
        dtype = choose_dtype(options.precision, device, "precision")
        distributed.start(device)
        self.train_source, self.val_source = sources = open_labelled(options.data, options.val)
        check_shared(*sources, f"data ({options.data})", f"val ({options.val})", options.allow_shared)
        classes = check_labels(self.train_source, self.val_source, "data", "val")
        self.backbone = open_backbone(options.checkpoint, device)
        vit = self.backbone.module
        if not isinstance(vit, ViT):
            raise ConfigError(f"{options.checkpoint} holds a {self.backbone.model.name}; only a ViT has tokens")
        self.vit, self.weights = vit, digest(vit)
        self.size = options.size or self.backbone.image_size
        check_image_size(self.backbone.model, "size", self.size)
        self.view = {"size": self.size, **central_view(options.resize, self.backbone, self.size)}

        world, images = distributed.world(), len(self.train_source)
        self.batch_size = min(options.batch_size, images // world)
        check(self.batch_size >= 2, "data", options.data, f"at least {2 * world} images, 2 for each process")
        accumulate = max(1, min(options.step_size, images) // (self.batch_size * world))
        images_per_step = self.batch_size * world * accumulate
        steps = images // images_per_step  # per epoch

        self.lrs = options.lrs
        self.held_out = held_out_images(images, options.lrs, options.seed)
        self.twins = 2 if len(self.lrs) > 1 else 1
        torch.manual_seed(options.seed)
        heads = options.heads or cast(Attention, self.vit.blocks[0].attn).num_heads
        first = AttentiveProbe(self.vit.width, heads, classes)
        self.probes = Probes(copy.deepcopy(first) for _ in range(self.twins * len(self.lrs))).to(device)
        groups = [
            {"params": list(probe.parameters()), "peak": lr * images_per_step / 256}
            for probe, lr in zip(self.probes, self.lrs * self.twins, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
        pace = Pace(
            total_steps=options.epochs * steps,
            steps_per_epoch=steps,
            images_per_step=images_per_step,
            accumulate=accumulate,
            seed=options.seed,
            save_every=steps,
            log_every=min(LOG_EVERY, steps),
        )
        folder = Path(options.dir) if options.dir else None
        self.prepare(self.probes.train(), optimizer, pace, folder=folder, device=device, dtype=dtype)
        self.begun = begin

    # -- a step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Standardised tokens [B, N, D] of normalised images."""
        with self.autocast():
            tokens = self.vit.tokens(images)
        return standardised(tokens)

    def micro_batches(self) -> Generator[Tokens, None, None]:
        return self._drawn() if self.options.augment else self._stored()

    def _stored(self) -> Generator[Tokens, None, None]:
        """From a table of all tokens of the central crops, made once."""
        rows = extract(
            _Tokens(self.vit),
            self.train_source,
            **self.view,
            batch_size=self.batch_size,
            workers=decoding_threads(self.options.workers, distributed.local_world()),
            dtype=self.dtype,
            progress="tokens of data" if distributed.is_main() else "",
        )
        for epoch, positions in self._positions():
            ids = order(len(rows), self.options.seed, epoch)
            for position in positions:
                mine = torch.from_numpy(
                    batch_ids(ids, position, self.batch_size, distributed.rank(), distributed.world())
                )
                tokens = rows.values[mine].to(self.device).unflatten(1, (-1, self.vit.width))
                labels, held_out = rows.labels[mine].to(self.device), self.held_out[mine].to(self.device)
                yield standardised(tokens), labels, held_out, mine.tolist()

    def _drawn(self) -> Generator[Tokens, None, None]:
        """From random crops, put through the network anew in every epoch."""
        loader = open_loader(
            self.train_source,
            [View(name="train", size=self.size)],
            Data(batch_size=self.batch_size),
            seed=self.options.seed,
            rank=distributed.rank(),
            world=distributed.world(),
            threads=decoding_threads(self.options.workers, distributed.local_world()),
            pin_memory=self.device.type == "cuda",
        )
        with contextlib.closing(loader):
            for epoch, positions in self._positions():
                with contextlib.closing(loader.epoch(epoch, start=positions.start)) as stream:
                    for _ in positions:
                        batch = next(stream)
                        images = augment(batch.to(self.device)).views["train"][:, 0]
                        labels, held_out = batch.label.to(self.device), self.held_out[batch.id].to(self.device)
                        yield self.tokens(images), labels, held_out, batch.id.tolist()

    def _positions(self) -> Iterator[tuple[int, range]]:
        """Epochs from here on, each with the numbers of its micro-batches that are still to come."""
        epoch, done = divmod(self.step, self.pace.steps_per_epoch)
        while True:
            yield epoch, range(done * self.pace.accumulate, self.pace.steps_per_epoch * self.pace.accumulate)
            epoch, done = epoch + 1, 0

    def sample_ids(self, batch: Tokens) -> list[int]:
        return batch[3]

    def schedule(self) -> dict[str, float]:
        total, warmup = self.pace.total_steps, round(self.options.warmup_epochs * self.pace.steps_per_epoch)
        for group in self.optimizer.param_groups:
            end = min(MIN_LR, group["peak"])
            group["lr"] = warmup_cosine(self.step, total, warmup, group["peak"], end, peak_twice=True)
        return {}

    def losses(self, batch: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, labels, held_out, _ = batch
        with torch.autocast(self.device.type, enabled=False):
            return self.parallel(tokens, labels, held_out, len(self.lrs)), {}

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        same = settings(self.options, "step_size", "resize", "upstream_bn_eval")
        return {**same, "weights": self.weights, "images_per_step": self.pace.images_per_step, "size": self.size}

    def record(self) -> Checkpoint:
        return Checkpoint(self.kind, self.backbone.config, self.probes.state_dict(), None)

    # -- judging -------------------------------------------------------------------------------------------------------

    def finish(self) -> AttentiveEvaluation:
        """Chooses a learning rate and judges its probe."""
        self.probes.eval()
        held_out, best = self._choose()
        [scored] = self._score([list(self.probes)[best]], self.val_source, "val")
        if not np.isfinite(scored.loss):
            raise EvaluationError(f"the probe diverged with learning rate {self.lrs[best]}; try smaller ones")
        return AttentiveEvaluation(
            checkpoint=self.options.checkpoint,
            step=self.backbone.step,
            scored=scored,
            lr=self.lrs[best],
            held_out=held_out,
            train_images=len(self.train_source),
            seconds=round(time.perf_counter() - self.begun, 1),
        )

    def _choose(self) -> tuple[dict[float, float], int]:
        """Top-1 of the twins on the held-out tenth, and the number of the best learning rate."""
        if len(self.lrs) == 1:
            return {}, 0
        ids = np.flatnonzero(self.held_out.numpy())
        results = self._score(list(self.probes)[len(self.lrs) :], self.train_source, "held-out images", ids)
        best = max(range(len(self.lrs)), key=lambda i: (results[i].top1, -results[i].loss))
        return {lr: result.top1 for lr, result in zip(self.lrs, results, strict=True)}, best

    def _score(
        self, probes: list[AttentiveProbe], source: Source, progress: str, ids: np.ndarray | None = None
    ) -> list[Scored]:
        options, batch = self.options, self.options.batch_size
        if options.upstream_bn_eval:
            ids = np.arange(len(source)) if ids is None else ids
            count = -(-len(ids) // UPSTREAM_BATCH)
            batch = -(-len(ids) // count)
            ids = np.concatenate([ids[first::count] for first in range(count)])  # strides: classes lie side by side
        for probe in probes:
            probe.norm.train(options.upstream_bn_eval)
            probe.norm.momentum = 0.0  # batch statistics leave no trace

        def classify(images: Tensor) -> Tensor:
            tokens = self.tokens(images)
            return torch.stack([probe(tokens) for probe in probes])

        try:
            return score(
                classify,
                source,
                **self.view,
                classifiers=len(probes),
                batch_size=batch,
                workers=options.workers,
                device=self.device,
                ids=ids,
                progress=progress,
            )
        finally:
            for probe in probes:
                probe.norm.eval()
                probe.norm.momentum = MOMENTUM
