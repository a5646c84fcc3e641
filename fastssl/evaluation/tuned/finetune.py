"""Fine-tuning: the whole network and a linear layer on top are trained on labelled images.

The protocol of Bao et al. 2022 (arXiv 2106.08254) as MAE, CAE and SemMAE use it: AdamW with a learning rate that
decays from layer to layer towards the input, RandAugment, random erasing, mixup, cutmix, label smoothing and stochastic
depth. Augmentation, losses, parameter groups and the moving average of the weights are timm's.
Letters: B images, N patches, D width, C classes, S side of the network's input in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastssl.config import ConfigError, Model, check, check_probability
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, check_labels, frozen, open_labelled
from fastssl.evaluation.options import EvaluateOptions
from fastssl.evaluation.scoring import Scored, check_weights, score
from fastssl.evaluation.tuned.classifier import Classifier, open_finetuned
from fastssl.evaluation.tuned.crops import Batches, Crops, collate, seed_of, training_transform
from fastssl.evaluation.tuned.layer_decay import layer_groups
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source, open_source
from fastssl.models import VITS, build_backbone, check_image_size
from fastssl.models.vit import ViT
from fastssl.training import checkpoint, distributed
from fastssl.training.checkpoint import CheckpointError
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.log import MetricRing, RunLog
from fastssl.training.optim import clip_gradients
from fastssl.training.schedule import warmup_cosine
from fastssl.weights.libraries import open_backbone

LOG_EVERY = 50  # optimizer steps between two readings of the loss
MAY_CHANGE = {"dir", "val", "val_every", "workers", "device", "batch_size", "accumulate"}  # when a run is resumed


@dataclass
class FinetuneOptions(EvaluateOptions):
    """Training of the whole network on labelled images."""

    batch_size: int = 64
    """Images per process and micro-batch; even, where mixup or cutmix is on."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    dir: str = ""
    """Folder for last.pt and the logs; the same command continues there. Empty: `finetune` beside the checkpoint."""
    eval: bool = False
    """Judge the fine-tuned network of --checkpoint on --val, and train nothing: a last.pt of this command, or a
    fine-tuned file of MAE's or SemMAE's authors."""
    scratch: bool = False
    """Start from random weights instead of the checkpoint's: the baseline that pretraining has to beat."""

    pool: Literal["mean", "class"] = "mean"
    """What the linear layer sees of a ViT: the norm of the mean patch token, or the class token."""
    new_norm: bool = False
    """Start a ViT's last norm afresh (MAE), not from the checkpoint's (CAE)."""
    train_positions: bool = False
    """Train a ViT's fixed (sine-cosine) position table too (MAE)."""
    relative_positions: bool = False
    """Add to a ViT's attention a learned bias per relative position, zero at the start (CAE)."""
    drop_path: float = 0.1
    """Stochastic depth of a ViT's last block; earlier blocks get proportionally less."""

    epochs: int = 100
    """Passes over data."""
    val_every: int = 1
    """Epochs between two judgements on val; the last epoch is always judged."""
    warmup_epochs: float = 5
    """Epochs of linear learning-rate warm-up from 0; half a cosine follows."""
    lr: float = 5e-4
    """Peak learning rate of the linear layer, for a batch of lr_batch images."""
    lr_batch: int = 256
    """The peak is lr x (images per optimizer step) / lr_batch. 0: lr as written."""
    min_lr: float = 1e-6
    """Learning rate at the end; not scaled by the batch."""
    layer_decay: float = 0.65
    """Each layer (a ViT's block, a ResNet's stage) learns at this multiple of the rate of the next one."""
    weight_decay: float = 0.05
    """Of matrices; never of biases, norms, the class token and the position table."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    clip_grad: float = 0.0
    """Largest gradient norm. 0: no clipping."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights, judged beside the weights. 0: none."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the training crop's area, as a fraction of the image's area."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment or AutoAugment in timm's words. Empty: none."""
    erase: float = 0.25
    """Probability of erasing a rectangle, by noise per pixel."""
    mixup: float = 0.8
    """Parameter of mixup's beta distribution. 0: no mixup."""
    cutmix: float = 1.0
    """Parameter of cutmix's beta distribution. 0: no cutmix."""
    mix: float = 1.0
    """Probability that a micro-batch is mixed."""
    switch: float = 0.5
    """Probability of cutmix, where both mixup and cutmix are on."""
    smoothing: float = 0.1
    """Label smoothing."""
    seed: int = 0
    """Seed of the linear layer, the order, the augmentation and stochastic depth."""

    def __post_init__(self) -> None:
        if self.eval:
            self.data = self.data or self.val  # not read
            check(not self.scratch, "scratch", True, "off with --eval, which trains nothing")
        super().__post_init__()
        if not self.eval and self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        for key in ("accumulate", "epochs", "val_every"):
            check(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("lr_batch", "min_lr", "weight_decay", "clip_grad", "mixup", "cutmix"):
            check(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("drop_path", "flip", "erase", "mix", "switch"):
            check_probability(key, getattr(self, key))
        for key in ("ema", "smoothing"):
            check(0 <= getattr(self, key) < 1, key, getattr(self, key), "at least 0 and below 1")
        for beta in self.betas:
            check(0.0 <= beta < 1.0, "betas", self.betas, "two numbers in [0, 1)")
        check(self.lr > 0, "lr", self.lr, "positive")
        check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")
        check(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs,
               f"from 0 to epochs ({self.epochs})")  # fmt: skip
        check(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "a range inside (0, 1]")
        check(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")
        check(self.eval or not (self.mixes and self.batch_size % 2), "batch_size", self.batch_size,
               "even: mixup and cutmix work on pairs (--mixup 0 --cutmix 0 turns them off)")  # fmt: skip

    @property
    def mixes(self) -> bool:
        """Whether micro-batches are mixed at all."""
        return self.mix > 0 and (self.mixup > 0 or self.cutmix > 0)


# -- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneEvaluation:
    """Accuracy of a fine-tuned network.

    Attributes:
        checkpoint: where training started, or what was judged.
        path: the fine-tuned network.
        epoch: passes over the training images.
        final: after the last one.
        ema: the same of the moving average of the weights, if there is one.
        best, best_epoch: of all epochs, chosen on val itself; None where nothing was trained.
        train_images: how many; 0 where nothing was trained.
        seconds: in all.
    """

    checkpoint: str
    path: str
    epoch: int
    final: Scored
    ema: Scored | None
    best: float | None
    best_epoch: int | None
    train_images: int
    seconds: float

    @property
    def top1(self) -> float:
        """In percent, of the weights after the last epoch."""
        return self.final.top1

    def as_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in vars(self).items() if key not in ("final", "ema", "best")}
        ema = None if self.ema is None else self.ema.as_dict()
        return {**self.final.as_dict(), "best_top1": self.best, "ema": ema, **values}

    def table(self) -> str:
        rows = [("", "epoch", "top-1 %", "95 % interval", "top-5 %", "loss")]
        for name, scored in (("weights", self.final), ("moving average", self.ema)):
            if scored is not None:
                rows.append((name, str(self.epoch), *scored.cells()))
        final = self.final
        lines = [
            f"fine-tuning of {self.checkpoint}: {self.train_images} training images, {final.images} validation images, "
            f"{self.seconds:.0f} s",
            "",
            format_table(rows),
            "",
            f"Acc@1 {final.top1:.3f} Acc@5 {final.top5:.3f} loss {final.loss:.3f}",
        ]
        if self.best is not None:
            lines.append(
                f"best of all epochs: {self.best:.3f} after {self.best_epoch} (chosen on val itself; quote the last)"
            )
        return "\n".join(lines)


def evaluate_finetune(options: FinetuneOptions) -> FinetuneEvaluation:
    """Train the whole network and a linear layer on labelled images, and judge it on others; under torchrun on many
    GPUs. With --eval, judge a fine-tuned network. Recipes: configs/imagenet/finetune_*.yaml.

    Sources: Bao et al. 2022; He et al. 2022, appendix A.1; Chen et al. 2024 (CAE), section 4.
    """
    device = choose_device(options.device, "device")
    distributed.start(device)
    return _judge(options, device) if options.eval else Finetuner(options, device).train()


class Finetuner:
    """One fine-tuning run on this process (one of several under torchrun).

    Raises:
        ConfigError, SourceError, EvaluationError, CheckpointError: something asked for does not exist or does not fit.
    """

    def __init__(self, options: FinetuneOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        self.begin = time.perf_counter()
        self.dtype = choose_dtype(options.precision, device, "precision")
        self.folder = Path(options.dir or Path(options.checkpoint).parent / "finetune")

        # Data.
        self.train_source, self.val_source = open_labelled(options.data, options.val)
        self.classes = check_labels(self.train_source, self.val_source, "data", "val")
        self.images_per_step = options.batch_size * distributed.world() * options.accumulate
        self.steps_per_epoch = len(self.train_source) // self.images_per_step
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{options.data} has {len(self.train_source)} images, fewer than one optimizer step takes: "
                f"{self.images_per_step} (batch_size x processes x accumulate)"
            )
        self.total_steps = self.steps_per_epoch * options.epochs

        # Network.
        pretrained = open_backbone(options.checkpoint)
        if not options.scratch:
            check_weights(pretrained.module, options.checkpoint)
        self.config = pretrained.config
        model = Model(**self.config["model"])
        self.size = options.size or pretrained.image_size
        check_image_size(model, "size", self.size)
        check(options.resize == 0 or options.resize >= self.size, "resize", options.resize,
               f"0 (automatic) or at least size, {self.size}")  # fmt: skip
        torch.manual_seed(options.seed)
        backbone = build_backbone(model, options.drop_path)
        if not options.scratch:
            backbone.load_state_dict(pretrained.module.state_dict())
        if isinstance(backbone, ViT):
            if options.new_norm:
                backbone.norm.reset_parameters()
            if options.train_positions:
                backbone.pos_embed.requires_grad_(True)
        self.network = Classifier(backbone, self.classes, options.pool, self.size, options.relative_positions)
        self.network = self.network.to(device).train()
        if model.name not in VITS:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.network, options.ema) if options.ema else None

        # How it learns.
        groups = layer_groups(self.network, self.network.backbone, options.layer_decay, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
        self.peak = options.lr * (self.images_per_step / options.lr_batch if options.lr_batch else 1.0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.mixup = None
        if options.mixes:
            self.mixup = Mixup(
                mixup_alpha=options.mixup,
                cutmix_alpha=options.cutmix,
                prob=options.mix,
                switch_prob=options.switch,
                label_smoothing=options.smoothing,
                num_classes=self.classes,
            )
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(options.smoothing)
        self.batches = Batches(
            len(self.train_source), options.batch_size, self.steps_per_epoch * options.accumulate, options.seed
        )
        transform = training_transform(
            self.size, scale=options.scale, flip=options.flip, augment=options.augment, erase=options.erase
        )
        self.loader = DataLoader(
            Crops(self.train_source, transform, options.seed),
            batch_sampler=self.batches,
            num_workers=decoding_threads(options.workers, distributed.local_world()),
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            multiprocessing_context="fork",  # a source cannot be sent to a new process, and is safe after a fork
        )

        # Where it stands.
        self.history: list[dict[str, Any]] = []
        self._resume()
        self.parallel: nn.Module = self.network
        if distributed.world() > 1:
            devices = [device] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.network, device_ids=devices, broadcast_buffers=False)

    @property
    def path(self) -> Path:
        """The fine-tuned network."""
        return self.folder / "last.pt"

    def _fit(self) -> dict[str, Any]:
        """What a resumption must have in common with the run that it continues."""
        same = {key: value for key, value in _plain(self.options).items() if key not in MAY_CHANGE}
        return {**same, "images_per_step": self.images_per_step, "images": len(self.train_source)}

    def _resume(self) -> None:
        if not self.path.exists():
            return
        content = checkpoint.load(self.path)
        if "finetune" not in content:
            raise CheckpointError(f"{self.path} is not of a fine-tuning run; name another folder with --dir")
        checkpoint.check_fit(self.path, content["fit"], self._fit(), "--dir")
        self.network.load_state_dict(content["method"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.history = content["history"]

    def _save(self) -> None:
        if distributed.is_main():
            content = {
                "config": self.config,
                "step": len(self.history) * self.steps_per_epoch,
                "backbone_prefix": "backbone.",
                "method": self.network.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "fit": self._fit(),
                "finetune": {**_plain(self.options), "size": self.size},
                "classes": list(self.train_source.classes),
                "num_classes": self.classes,
                "history": self.history,
            }
            checkpoint.save(self.path, content)
        distributed.barrier()

    def train(self) -> FinetuneEvaluation:
        """Runs to the last epoch, or from where last.pt stands.

        Raises:
            EvaluationError: a loss is not finite, or an image cannot be read.
        """
        options = self.options
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
        log = RunLog(self.folder, len(self.history) * self.steps_per_epoch, self.total_steps)
        try:
            log.say(
                f"{self.config['model']['name']} {'from random weights' if options.scratch else options.checkpoint}, "
                f"{self.classes} classes, on {self.device}: {self.images_per_step} images per step, "
                f"{self.steps_per_epoch} steps per epoch, {options.epochs} epochs, peak learning rate {self.peak:.3g}"
            )
            scored = None
            for epoch in range(len(self.history), options.epochs):
                loss, rate = self._epoch(epoch, log)
                judged = (epoch + 1) % options.val_every == 0 or epoch + 1 == options.epochs
                scored = self._score() if judged else {}
                line = {"epoch": epoch + 1, "loss": loss}
                for name, one in scored.items():
                    line |= _named(name, one)
                self.history.append(line)
                log.record({"step": (epoch + 1) * self.steps_per_epoch, **line, "images_per_s": rate})
                log.say(
                    f"epoch {epoch + 1}: training loss {loss:.4f}"
                    + "".join(f", {name} {one.top1:.2f} % top-1" for name, one in scored.items())
                )
                self._save()
            scored = scored or self._score()
        finally:
            log.close()
        best = max((line for line in self.history if "top1" in line), key=lambda line: line["top1"])
        return FinetuneEvaluation(
            checkpoint=f"{options.checkpoint}{' (random weights)' if options.scratch else ''}",
            path=str(self.path),
            epoch=options.epochs,
            final=scored["weights"],
            ema=scored.get("moving average"),
            best=best["top1"],
            best_epoch=best["epoch"],
            train_images=len(self.train_source),
            seconds=round(time.perf_counter() - self.begin, 1),
        )

    def _epoch(self, epoch: int, log: RunLog) -> tuple[float, float]:
        """Trains for one epoch; the mean loss over its images and processes, and images per second."""
        options, begin = self.options, time.perf_counter()
        self.network.train()
        self.batches.epoch = epoch
        stream = iter(self.loader)
        ring, losses = MetricRing(), []
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            warmup = round(options.warmup_epochs * self.steps_per_epoch)
            lr = warmup_cosine(step, self.total_steps, warmup, self.peak, options.min_lr)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            ring.add(step, {"loss": self._step(stream, step)})
            log.progress()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == (epoch + 1) * self.steps_per_epoch:
                steps, _, mean = ring.drain()
                losses += [row["loss"] for row in mean]
                broken = [s for s, row in zip(steps, mean, strict=True) if not np.isfinite(row["loss"])]
                if broken:
                    kept = f"{self.path} (epoch {epoch})" if epoch else "no checkpoint yet"
                    raise EvaluationError(f"step {broken[0]}: the loss is not finite; try a smaller lr; kept: {kept}")
        return sum(losses) / len(losses), len(losses) * self.images_per_step / (time.perf_counter() - begin)

    def _step(self, stream: Iterator, step: int) -> Tensor:
        """One optimizer step; its mean loss, on the device."""
        options, losses = self.options, []
        for micro in range(options.accumulate):
            batch = next(stream)
            if isinstance(batch, str):
                raise EvaluationError(f"{batch}; fastssl verify lists all that are bad in a .beton")
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            seed = seed_of("step", options.seed, step, micro, distributed.rank())
            torch.manual_seed(seed)
            images, target = self._mixed(images, labels, seed)
            last = micro == options.accumulate - 1
            if distributed.world() > 1:
                self.parallel.require_backward_grad_sync = last
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.loss(self.parallel(images).float(), target)
            self.scaler.scale(loss / options.accumulate).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.network, options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.network)
        return torch.stack(losses).mean()

    def _mixed(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images and soft targets [B, C] after mixup or cutmix; as they are where both are off."""
        if self.mixup is None:
            return images, labels
        before = np.random.get_state()  # noqa: NPY002 - timm's Mixup draws from the global generator
        np.random.seed(seed)  # noqa: NPY002
        mixed = self.mixup(images, labels)
        np.random.set_state(before)  # noqa: NPY002
        return mixed

    def _score(self) -> dict[str, Scored]:
        for module in (self.network, *([self.ema.module] if self.ema else [])):  # batch norms saw their own images
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    distributed.all_reduce_mean(buffer)
        networks = {"weights": self.network, **({"moving average": self.ema.module} if self.ema else {})}
        options = self.options
        return _score(networks, self.val_source, options, self.size, self.device, self.dtype)


def _score(
    networks: dict[str, nn.Module],
    source: Source,
    options: FinetuneOptions,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Scored]:
    """Accuracy of each network; EvaluationError where its scores are not finite."""
    classify = _Together(networks.values())
    with frozen(classify):
        results = score(
            classify,
            source,
            size=size,
            resize=options.resize,
            classifiers=len(networks),
            batch_size=options.batch_size,
            workers=options.workers,
            device=device,
            dtype=dtype,
            progress="val",
        )
    scored = dict(zip(networks, results, strict=True))
    for name, result in scored.items():
        if not np.isfinite(result.loss):
            raise EvaluationError(f"the scores of the {name} are not finite; the network is broken")
    return scored


class _Together(nn.Module):
    """Several networks on the same images: [B, 3, S, S] -> [R, B, C]."""

    def __init__(self, networks) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self.networks])


# -- a fine-tuned network from its file ------------------------------------------------------------------------------


def _judge(options: FinetuneOptions, device: torch.device) -> FinetuneEvaluation:
    begin = time.perf_counter()
    dtype = choose_dtype(options.precision, device, "precision")
    source = open_source(options.val)
    classes = check_labels(source, source, f"val ({options.val})", f"val ({options.val})")
    networks, made_for, epoch, names = open_finetuned(options.checkpoint)
    network, size = networks["weights"], options.size or made_for
    known = network.head.out_features
    if classes > known:
        raise EvaluationError(
            f"val ({options.val}) has {classes} classes, but {options.checkpoint} was fine-tuned for {known}"
        )
    if names and source.classes and names != list(source.classes):
        raise EvaluationError(f"the classes of val ({options.val}) are not those of {options.checkpoint}")
    if isinstance(network.backbone, ViT):
        check(size % network.backbone.patch_size == 0, "size", size, f"a multiple of {network.backbone.patch_size}")
        check(network.index is None or size == made_for, "size", size,
               f"{made_for}: the relative positions were trained for it")  # fmt: skip
    scored = _score({n: net.to(device) for n, net in networks.items()}, source, options, size, device, dtype)
    return FinetuneEvaluation(
        checkpoint=options.checkpoint,
        path=options.checkpoint,
        epoch=epoch,
        final=scored["weights"],
        ema=scored.get("moving average"),
        best=None,
        best_epoch=None,
        train_images=0,
        seconds=round(time.perf_counter() - begin, 1),
    )


def _named(name: str, scored: Scored) -> dict[str, float]:
    prefix = "" if name == "weights" else "ema_"
    return {f"{prefix}top1": scored.top1, f"{prefix}top5": scored.top5, f"{prefix}val_loss": scored.loss}


def _plain(options: FinetuneOptions) -> dict[str, Any]:
    """The options as values that a checkpoint can hold."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
