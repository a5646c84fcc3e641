"""The configuration of a run: typed dataclasses, each field documented beside it, each value checked when it is made.

A recipe (YAML) and the command line fill these in; `fastssl.cli` turns an unknown key into an error. A method adds two
sections of its own: `views` (its view groups) and a section with the method's name (its numbers).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration value is unusable; the message names the key, the value and what is allowed."""


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError, naming the key, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}")


def check_probability(key: str, value: float) -> None:
    """Raises ConfigError unless `value` lies between 0 and 1."""
    check(0.0 <= value <= 1.0, key, value, "a probability from 0 to 1")


@dataclass
class View:
    """One group of views: `count` random crops of the same kind, cut from one decoded image."""

    count: int = 1
    """Crops per image in this group. 0: none, where the method can do without."""
    size: int = 224
    """Side of the crop after resizing, in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height before resizing; drawn log-uniformly."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Resampling filter, antialiased as PIL defines it."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation and hue jitter (torchvision's ColorJitter)."""
    jitter_p: float = 0.0
    """Probability that the four jitter operations are applied, in a drawn order."""
    gray: float = 0.0
    """Probability of turning the crop gray."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the crop; at most 2."""
    solarize: float = 0.0
    """Probability of solarizing (inverting values at or above the threshold)."""
    solarize_threshold: int = 128
    """Threshold of solarize, in gray levels 0-255."""
    same_crop_as: str | None = None
    """Name of another group whose boxes and flips this group reuses (at its own size). None: draws its own."""
    squash: int = 0
    """Resize the whole image to this square, in pixels, ignoring its shape (bilinear), before cropping. 0: off."""
    name: str = ""
    """Name of the group; filled in from the key under `views`."""

    def __post_init__(self) -> None:
        where = f"views.{self.name}" if self.name else "view"
        check(self.count >= 0, f"{where}.count", self.count, "0 or more")
        check(self.size >= 1, f"{where}.size", self.size, "1 pixel or more")
        lo, hi = self.scale
        check(0.0 < lo <= hi <= 1.0, f"{where}.scale", self.scale, "a range inside (0, 1]")
        lo, hi = self.ratio
        check(0.0 < lo <= hi, f"{where}.ratio", self.ratio, "a range of positive numbers")
        brightness, contrast, saturation, hue = self.jitter
        check(min(brightness, contrast, saturation, hue) >= 0.0, f"{where}.jitter", self.jitter, "non-negative")
        check(hue <= 0.5, f"{where}.jitter", self.jitter, "at most 0.5 in hue (the fourth number)")
        for key in ("flip", "jitter_p", "gray", "blur", "solarize"):
            check_probability(f"{where}.{key}", getattr(self, key))
        lo, hi = self.blur_sigma
        check(0.0 < lo <= hi <= 2.0, f"{where}.blur_sigma", self.blur_sigma, "a range inside (0, 2] pixels")
        check(0 <= self.solarize_threshold <= 256, f"{where}.solarize_threshold", self.solarize_threshold, "0 to 256")
        check(self.squash >= 0, f"{where}.squash", self.squash, "0 (off) or a side in pixels")


@dataclass
class Data:
    """Where the images come from and how they are read."""

    path: str = ""
    """Training images: a .beton file, a glob of shards ('train-*.beton'), or a folder of images."""
    val: str = ""
    """Labelled validation images for the online k-NN monitor, same forms as path. Empty: none."""
    engine: Literal["auto", "ffcv", "dali", "reference"] = "auto"
    """What decodes and crops: compiled code on the CPU (ffcv), NVIDIA's DALI, or PIL (reference). auto takes the
    fastest on the CPU that works here and says which."""
    batch_size: int = 64
    """Images per process and micro-batch."""
    workers: int = 0
    """Decoding threads per process. 0: this machine's cores divided by the processes on it."""
    prefetch: int = 4
    """Batches prepared ahead of the training step."""
    page_window: int = 0
    """For a .beton that does not fit in memory: shuffle only the samples of so many pages (8 MiB each) at a time, pages
    in random order, so that the disk is read in large pieces. 0: shuffle everything."""
    on_bad: Literal["skip", "raise"] = "skip"
    """A sample that cannot be decoded is replaced by another one (skip) or ends the run (raise)."""
    max_bad: int = 100
    """With on_bad=skip: more bad samples than this end the run."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        check(self.workers >= 0, "data.workers", self.workers, "0 (automatic) or more")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "1 or more")
        check(self.page_window >= 0, "data.page_window", self.page_window, "0 (off) or a number of pages")
        check(self.max_bad >= 0, "data.max_bad", self.max_bad, "0 or more")


@dataclass
class Model:
    """The backbone."""

    name: str = "vit_small"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge, resnet18, resnet34, resnet50 (see fastssl.models)."""
    image_size: int = 224
    """Side of the image for which a ViT's position table is made, in pixels; other sizes are interpolated."""
    patch_size: int = 16
    """Side of a ViT's patch, in pixels."""
    width: int = 0
    """Width of a ViT's tokens, or channels of a ResNet's first stage (64 in the paper). 0: the named model's."""
    depth: int = 0
    """Number of a ViT's blocks. 0: the named model's."""
    heads: int = 0
    """Attention heads of a ViT. 0: the named model's."""
    positions: Literal["learned", "sincos", "sincos_rows"] = "learned"
    """A ViT's position table: learned, or fixed 2-D sine-cosine with the column in the first half of the channels
    (sincos, MAE's) or the row (sincos_rows, CAE's)."""
    layer_scale: float = 0.0
    """Start value of a ViT's layer scale, a learned gain per channel on every block's two branches. 0: none."""
    drop_path: float = 0.0
    """Stochastic depth of the student's last block; earlier blocks get proportionally less."""
    small_images: bool = False
    """ResNet only: 3x3 stem with stride 1 and no max-pool, for 32-pixel images."""

    def __post_init__(self) -> None:
        check(self.image_size >= 1, "model.image_size", self.image_size, "1 pixel or more")
        check(self.patch_size >= 1, "model.patch_size", self.patch_size, "1 pixel or more")
        check(min(self.width, self.depth, self.heads) >= 0, "model.width/depth/heads",
               (self.width, self.depth, self.heads), "0 (the named model's) or positive")  # fmt: skip
        check_probability("model.drop_path", self.drop_path)
        check(self.layer_scale >= 0, "model.layer_scale", self.layer_scale, "0 (none) or positive")


@dataclass
class Optim:
    """The optimizer."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw, sgd (momentum), or lars."""
    lr: float = 5e-4
    """Peak learning rate for a batch of lr_batch images."""
    lr_batch: int = 256
    """The peak is lr x (images per optimizer step) / lr_batch. 0: lr as written."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; not scaled by the batch."""
    weight_decay: float = 0.04
    """Weight decay at the start (matrices only; never biases, norms)."""
    weight_decay_end: float | None = None
    """Weight decay at the end of a cosine. None: constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    clip_grad: float = 0.0
    """Largest gradient norm. 0: no clipping."""
    clip_each: bool = False
    """Clip every parameter tensor by its own norm (DINO, SiT) rather than all by their common norm."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "positive")
        check(self.lr_batch >= 0, "optim.lr_batch", self.lr_batch, "0 (no scaling) or a number of images")
        check(self.min_lr >= 0, "optim.min_lr", self.min_lr, "0 or more")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        check(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "0 (off) or more")
        for beta in self.betas:
            check(0.0 <= beta < 1.0, "optim.betas", self.betas, "two numbers in [0, 1)")


@dataclass
class Schedule:
    """How long the run lasts. Schedules are pure functions of the optimizer step (fastssl.training.schedule)."""

    epochs: int = 100
    """Passes over the data in the whole run."""
    warmup_epochs: float = 10
    """Epochs of linear learning-rate warm-up from 0."""

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "schedule.epochs", self.epochs, "1 or more")
        check(0 <= self.warmup_epochs <= self.epochs, "schedule.warmup_epochs", self.warmup_epochs,
               f"from 0 to schedule.epochs ({self.epochs})")  # fmt: skip


@dataclass
class Run:
    """One run: where it writes, on what it computes, how it is saved."""

    dir: str = ""
    """Run folder: config, logs, checkpoints. A run that finds last.pt there continues it. Empty: runs/<method>."""
    seed: int = 0
    """Seed of everything random, 0 to 2^32 - 1."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the networks. auto: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""
    steps: int = 0
    """Stop after so many optimizer steps in all, with a checkpoint; schedules keep their length. 0: run to the end."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    threads: int = 0
    """CPU threads of PyTorch. 0: PyTorch's own choice, divided among the processes on this machine."""
    log_every: int = 10
    """Optimizer steps between two log lines (the device is read only then)."""
    save_every: float = 1.0
    """Epochs between two writings of last.pt (fractions allowed)."""
    keep_every: int = 0
    """Epochs between checkpoints that are kept for good (epoch-0100.pt). 0: only the last."""
    resume: bool = True
    """Continue from last.pt in the run folder if there is one. False: refuse to overwrite such a folder."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, "run.seed", self.seed, "a whole number from 0 to 4294967295")
        check(self.steps >= 0, "run.steps", self.steps, "0 (to the end) or more")
        check(self.accumulate >= 1, "run.accumulate", self.accumulate, "1 or more")
        check(self.log_every >= 1, "run.log_every", self.log_every, "1 or more")
        check(self.save_every > 0, "run.save_every", self.save_every, "more than 0 epochs")
        check(self.keep_every >= 0, "run.keep_every", self.keep_every, "0 (only the last) or more")
        check(self.threads >= 0, "run.threads", self.threads, "0 (automatic) or more")


@dataclass
class Monitor:
    """Online k-NN: the backbone of the moment classifies data.val by its nearest neighbours in data.path."""

    every: int = 0
    """Epochs between two measurements. 0: off. Needs data.val and labels."""
    k: int = 20
    """Neighbours that vote."""
    mean_patch: bool = False
    """The feature is the class token and the mean patch token of a ViT, rather than the class token alone."""
    train_images: int = 10000
    """At most so many (evenly spaced) training images form the memory."""
    val_images: int = 2000
    """At most so many (evenly spaced) validation images are classified."""
    pictures: int = 8
    """Images whose views, masks, maps and reconstructions are drawn into the run folder (pictures/). 0: none."""
    pictures_every: int = 0
    """Epochs between two drawings. 0: only at the end of the run."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "monitor.every", self.every, "0 (off) or a number of epochs")
        check(self.pictures >= 0, "monitor.pictures", self.pictures, "0 (none) or a number of images")
        check(self.pictures_every >= 0, "monitor.pictures_every", self.pictures_every,
               "0 (at the end) or a number of epochs")  # fmt: skip
        for key in ("k", "train_images", "val_images"):
            check(getattr(self, key) >= 1, f"monitor.{key}", getattr(self, key), "1 or more")


@dataclass
class Health:
    """The watch that says, in one line, when a run is going wrong (fastssl.training.health)."""

    action: Literal["off", "warn", "stop"] = "warn"
    """off, warn (one line per finding), or stop (end the run with an error; the last checkpoint stays as it is)."""
    patience: int = 500
    """Optimizer steps that a bad sign must last before it counts. The first warm-up epoch never counts."""
    chance_margin: float = 0.01
    """The loss is pinned when it stays within this fraction of its value for a constant output (ln K for DINO)."""
    entropy_margin: float = 0.02
    """The teacher has collapsed when its entropy / ln K stays below this, or above 1 minus this."""
    feature_std: float = 0.02
    """Features have collapsed when their standard deviation over the batch (1 = as spread as can be) stays below."""
    grad_spike: float = 20.0
    """A gradient norm this many times its running median is a spike."""
    data_wait: float = 0.3
    """Warn when the step waits for data for more than this share of the time."""

    def __post_init__(self) -> None:
        check(self.patience >= 1, "health.patience", self.patience, "1 step or more")
        for key in ("chance_margin", "entropy_margin", "feature_std", "data_wait"):
            check_probability(f"health.{key}", getattr(self, key))
        check(self.grad_spike > 1, "health.grad_spike", self.grad_spike, "more than 1")


@dataclass
class Config:
    """Everything that defines a pretraining run. `views` and `settings` have the types that the method declares."""

    method: str
    views: Any
    settings: Any
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)
    monitor: Monitor = field(default_factory=Monitor)
    health: Health = field(default_factory=Health)

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain values, the method's numbers under the method's name, as in a recipe."""
        values = {key: _plain(value) for key, value in asdict(self).items()}
        values[self.method] = values.pop("settings")
        for group in values["views"].values():
            group.pop("name")
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
