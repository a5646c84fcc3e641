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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear
from tqdm import tqdm

from fastssl.augment import augment
from fastssl.config import ConfigError, Data, Model, View, check
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, check_labels, frozen, open_labelled
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.frozen.linear_probe import check_numbers, held_out_images
from fastssl.evaluation.options import EvaluateOptions
from fastssl.evaluation.scoring import Scored, check_weights, score
from fastssl.loaders.engine import decoding_threads, open_loader
from fastssl.loaders.index import batch_ids, order
from fastssl.loaders.sources import Source
from fastssl.models import check_image_size
from fastssl.models.vit import ViT
from fastssl.training import checkpoint, distributed
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.schedule import warmup_cosine
from fastssl.weights.libraries import open_backbone

EPS = 1e-6  # of the layer norms
MIN_LR = 1e-6  # at the end of the cosine
MOMENTUM = 0.1  # of the batch norm's running statistics
UPSTREAM_BATCH = 384  # images per batch norm in the authors' evaluation


@dataclass
class AttentiveOptions(EvaluateOptions):
    """Classification by one cross-attention block on the frozen tokens of a ViT."""

    batch_size: int = 256
    """Images per process and forward pass; in training the batch norm sees so many."""
    lrs: tuple[float, ...] = (0.004, 0.0125, 0.04, 0.125, 0.4)
    """Learning rates for a batch of 256, tried at once; the one that does best on a held-out tenth of data counts. CAE
    takes 0.4 for 8192 images: 0.0125 here."""
    epochs: int = 90
    """Passes over data."""
    warmup_epochs: float = 10
    """Epochs of linear learning-rate warm-up from 0; half a cosine to 1e-6 follows."""
    step_size: int = 1024
    """Images per optimizer step, over all processes, in whole batches (CAE: 8192); the learning rate is multiplied by
    step_size / 256."""
    heads: int = 0
    """Attention heads of the block. 0: the network's."""
    augment: bool = True
    """Random crops and flips, put through the network anew in every epoch. False: the central crop goes through it
    once, and all tokens stay in memory (4 N D bytes per image)."""
    upstream_bn_eval: bool = False
    """Judge with the statistics of batches of 384 images instead of the running ones, as CAE's released code does."""
    dir: str = ""
    """Folder in which the probes are saved after every epoch; the same command continues there. Empty: not saved."""
    seed: int = 0
    """Seed of the first weights, the order, the crops and the held-out tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        check_numbers(self.lrs, self.epochs, self.batch_size)
        check(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more, for the batch norm")
        check(self.step_size >= 1, "step_size", self.step_size, "1 or more")
        check(self.heads >= 0, "heads", self.heads, "0 (the network's) or more")
        check(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs,
               f"from 0 to epochs ({self.epochs})")  # fmt: skip
        check(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")


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


def evaluate_attentive(options: AttentiveOptions) -> AttentiveEvaluation:
    """Train a cross-attention block with one learned query on the frozen tokens of a checkpoint's ViT and classify
    images with it; under torchrun on many GPUs.

    Source: Chen et al. 2022 (CAE), section 4 and appendix.
    """
    return _Probing(options).run()


class _Probing:
    """One probing on this process (one of several under torchrun).

    With several learning rates each has two probes, trained side by side on the same tokens: one sees all training
    images, its twin all but a held-out tenth, on which the learning rate is chosen.
    """

    def __init__(self, options: AttentiveOptions) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.device = choose_device(options.device, "device")
        self.dtype = choose_dtype(options.precision, self.device, "precision")
        distributed.start(self.device)
        self.train_source, self.val_source = open_labelled(options.data, options.val)
        classes = check_labels(self.train_source, self.val_source, "data", "val")
        backbone = open_backbone(options.checkpoint, self.device)
        self.vit, self.step = backbone.module, backbone.step
        check_weights(self.vit, options.checkpoint)
        if not isinstance(self.vit, ViT):
            raise ConfigError(f"{options.checkpoint} holds a {backbone.config['model']['name']}; only a ViT has tokens")
        self.size = options.size or backbone.image_size
        check_image_size(Model(**backbone.config["model"]), "size", self.size)
        check(options.resize == 0 or options.resize >= self.size, "resize", options.resize,
               f"0 (automatic) or at least size, {self.size}")  # fmt: skip

        world, images = distributed.world(), len(self.train_source)
        self.batch_size = min(options.batch_size, images // world)
        check(self.batch_size >= 2, "data", options.data, f"at least {2 * world} images, 2 for each process")
        self.accumulate = max(1, min(options.step_size, images) // (self.batch_size * world))
        self.steps = images // (self.batch_size * world * self.accumulate)  # per epoch
        self.images_per_step = self.batch_size * world * self.accumulate

        self.lrs = options.lrs
        self.held_out = held_out_images(images, options.lrs, options.seed)
        twins = 2 if len(self.lrs) > 1 else 1
        torch.manual_seed(options.seed)
        first = AttentiveProbe(self.vit.width, options.heads or self.vit.blocks[0].attn.num_heads, classes)
        self.probes = nn.ModuleList(copy.deepcopy(first) for _ in range(twins * len(self.lrs))).to(self.device)
        groups = [
            {"params": list(probe.parameters()), "peak": lr * self.images_per_step / 256}
            for probe, lr in zip(self.probes, self.lrs * twins, strict=True)
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
        self.epoch = 0
        self._resume()

    # -- saved probes -------------------------------------------------------------------------------------------------

    def _fit(self) -> dict[str, Any]:
        """What a resumption must have in common with the probing that it continues."""
        o = self.options
        same = {key: getattr(o, key) for key in ("checkpoint", "data", "epochs", "warmup_epochs", "augment", "seed")}
        return {**same, "lrs": list(o.lrs), "images_per_step": self.images_per_step, "size": self.size}

    def _resume(self) -> None:
        path = Path(self.options.dir, "probes.pt")
        if not self.options.dir or not path.exists():
            return
        content = checkpoint.load(path, self.device)
        checkpoint.check_fit(path, content.get("fit", {}), self._fit(), "--dir")
        self.probes.load_state_dict(content["probes"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.epoch = content["epoch"]

    def _save(self) -> None:
        if self.options.dir and distributed.is_main():
            Path(self.options.dir).mkdir(parents=True, exist_ok=True)
            content = {"probes": self.probes.state_dict(), "optimizer": self.optimizer.state_dict()}
            checkpoint.save(Path(self.options.dir, "probes.pt"), {**content, "epoch": self.epoch, "fit": self._fit()})
        distributed.barrier()

    # -- tokens -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Standardised tokens [B, N, D] of normalised images."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.vit.tokens(images)
        return standardised(tokens)

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Any]:
        """A function: epoch -> this process's (tokens, labels, held out) of each micro-batch, on the device."""
        options, threads = self.options, decoding_threads(self.options.workers, distributed.local_world())
        rank, world, count = distributed.rank(), distributed.world(), self.steps * self.accumulate
        if not options.augment:
            how = {"size": self.size, "resize": options.resize, "workers": threads, "dtype": self.dtype}
            rows = extract(
                _Tokens(self.vit), self.train_source, batch_size=self.batch_size, progress="tokens of data", **how
            )

            def stored(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                ids = order(len(rows), options.seed, epoch)
                for position in range(count):
                    mine = torch.from_numpy(batch_ids(ids, position, self.batch_size, rank, world))
                    tokens = rows.values[mine].to(self.device).unflatten(1, (-1, self.vit.width))
                    yield standardised(tokens), rows.labels[mine].to(self.device), self.held_out[mine].to(self.device)

            yield stored
            return
        loader = open_loader(
            self.train_source,
            [View(name="train", size=self.size)],
            Data(batch_size=self.batch_size),
            seed=options.seed,
            rank=rank,
            world=world,
            threads=threads,
            pin_memory=self.device.type == "cuda",
        )

        def drawn(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            with contextlib.closing(loader.epoch(epoch)) as stream:
                for _ in range(count):
                    batch = next(stream)
                    images = augment(batch.to(self.device)).views["train"][:, 0]
                    yield self.tokens(images), batch.label.to(self.device), self.held_out[batch.id].to(self.device)

        with contextlib.closing(loader):
            yield drawn

    # -- training and judging -----------------------------------------------------------------------------------------

    def run(self) -> AttentiveEvaluation:
        """Trains to the last epoch, chooses, judges."""
        options = self.options
        show = distributed.is_main()
        bar = tqdm(total=options.epochs * self.steps, initial=self.epoch * self.steps, desc="attentive probes",
                   unit="step", leave=False, disable=None if show else True)  # fmt: skip
        with frozen(self.vit), self._batches() as batches, bar:
            while self.epoch < options.epochs:
                stream = batches(self.epoch)
                for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
                    self._train_step(stream, step)
                    bar.update()
                stream.close()
                self.epoch += 1
                self._average_statistics()
                self._save()
            self.probes.eval()
            held_out, best = self._choose()
            [scored] = self._score([self.probes[best]], self.val_source, "val")
        if not np.isfinite(scored.loss):
            raise EvaluationError(f"the probe diverged with learning rate {self.lrs[best]}; try smaller ones")
        return AttentiveEvaluation(
            checkpoint=options.checkpoint,
            step=self.step,
            scored=scored,
            lr=self.lrs[best],
            held_out=held_out,
            train_images=len(self.train_source),
            seconds=round(time.perf_counter() - self.begin, 1),
        )

    def _train_step(self, stream: Iterator, step: int) -> None:
        options = self.options
        total, warmup = options.epochs * self.steps, round(options.warmup_epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(step, total, warmup, group["peak"], min(MIN_LR, group["peak"]))
        self.optimizer.zero_grad(set_to_none=True)
        self.probes.train()
        for _ in range(self.accumulate):
            tokens, labels, held_out = next(stream)
            loss = sum(cross_entropy(probe(tokens), labels) for probe in self.probes[: len(self.lrs)])
            tokens, labels = tokens[~held_out], labels[~held_out]
            if len(labels) > 1:  # the batch norm needs two
                loss += sum(cross_entropy(probe(tokens), labels) for probe in self.probes[len(self.lrs) :])
            (loss / self.accumulate).backward()
        self._average_gradients()
        self.optimizer.step()

    def _average_gradients(self) -> None:
        """Over the processes, in one exchange; a parameter without a gradient anywhere stays without one."""
        if distributed.world() == 1:
            return
        trained = [p for name, p in self.probes.named_parameters() if not name.endswith("norm_k.bias")]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = distributed.all_reduce_mean(torch.cat([p.grad.flatten() for p in trained]))
        for p, piece in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad.copy_(piece.view_as(p))

    def _average_statistics(self) -> None:
        """The batch norms' running statistics over the processes, each of which saw its own images."""
        for buffer in self.probes.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce_mean(buffer)

    def _choose(self) -> tuple[dict[float, float], int]:
        """Top-1 of the twins on the held-out tenth, and the number of the best learning rate."""
        if len(self.lrs) == 1:
            return {}, 0
        ids = np.flatnonzero(self.held_out.numpy())
        results = self._score(list(self.probes[len(self.lrs) :]), self.train_source, "held-out images", ids)
        best = max(range(len(self.lrs)), key=lambda i: (results[i].top1, -results[i].loss))
        return {lr: result.top1 for lr, result in zip(self.lrs, results, strict=True)}, best

    def _score(
        self, probes: list[nn.Module], source: Source, progress: str, ids: np.ndarray | None = None
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
                size=self.size,
                resize=options.resize,
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
