"""The configuration of a run: typed dataclasses, each field documented beside it, its range declared in its type.

A recipe (YAML) and the command line fill these in; `fastssl.cli` turns an unknown key into an error. A method adds two
sections of its own: `views` (its view groups) and a section with the method's name (its numbers).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from fastssl.ranges import (  # noqa: F401  (this file hands on all that a configuration is written with)
    Ascending,
    BelowOne,
    Checked,
    ConfigError,
    Fraction,
    FractionRange,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    Seed,
    ZeroToOne,
    check,
    rules,
)

Hue = Annotated[float, Range(at_least=0, at_most=0.5, noun="hue")]
Sigma = Annotated[float, Range(above=0, at_most=2)]


@dataclass
class View(Checked):
    """One group of views: `count` random crops of the same kind, cut from one decoded image."""

    count: NonNegativeInt = 1
    """Crops per image in this group. 0: none, where the method can do without."""
    size: PositiveInt = 224
    """Side of the crop after resizing, in pixels."""
    scale: FractionRange = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], Ascending()] = (3 / 4, 4 / 3)
    """Range of the crop's width / height before resizing; drawn log-uniformly."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Resampling filter, antialiased as PIL defines it."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Hue] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation and hue jitter (torchvision's ColorJitter)."""
    jitter_p: Probability = 0.0
    """Probability that the four jitter operations are applied, in a drawn order."""
    gray: Probability = 0.0
    """Probability of turning the crop gray."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Annotated[tuple[Sigma, Sigma], Ascending()] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the crop; at most 2."""
    solarize: Probability = 0.0
    """Probability of solarizing (inverting values at or above the threshold)."""
    solarize_threshold: Annotated[int, Range(at_least=0, at_most=256)] = 128
    """Threshold of solarize, in gray levels 0-255."""
    same_crop_as: str | None = None
    """Name of another group whose boxes and flips this group reuses (at its own size). None: draws its own."""
    squash: NonNegativeInt = 0
    """Resize the whole image to this square, in pixels, ignoring its shape (bilinear), before cropping. 0: off."""
    name: str = ""
    """Name of the group; filled in from the key under `views`."""

    def key(self, name: str) -> str:
        return f"views.{self.name}.{name}" if self.name else f"view.{name}"


@dataclass
class Data(Checked):
    """Where the images come from and how they are read."""

    section: ClassVar[str] = "data"

    path: str = ""
    """Training images: .beton files or tars in WebDataset's layout (one, a glob 'train-*.beton', a brace list
    'train-{000..015}.tar'), a manifest of these (.json), or a folder of images; on a disk, or in a store (s3://, gs://,
    https:// and others of fsspec)."""
    val: str = ""
    """Labelled validation images for the online k-NN monitor, same forms as path. Empty: none."""
    engine: Literal["auto", "ffcv", "dali", "reference"] = "auto"
    """What decodes and crops: compiled code on the CPU (ffcv), NVIDIA's DALI, or PIL (reference). auto takes the
    fastest on the CPU that works here and says which."""
    batch_size: PositiveInt = 64
    """Images per process and micro-batch."""
    workers: NonNegativeInt = 0
    """Decoding threads per process. 0: this machine's cores divided by the processes on it."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead of the training step."""
    page_window: NonNegativeInt | None = None
    """For data that is read from far away or does not fit in memory: shuffle only the samples of so many pages (8 MiB
    each) at a time, pages in random order, so that it is read in large pieces. 0: shuffle everything. None: 64 for
    .beton and tar files in a store, 0 otherwise."""
    cache: str = ""
    """Folder that keeps what was fetched from a store, for all processes of a machine and for later runs; none: keep
    nothing. Empty: $FASTSSL_CACHE, or ~/.cache/fastssl."""
    cache_gb: NonNegativeFloat | None = None
    """Bound of the whole cache, in GB; 5 % of its disk stay free in any case. None: $FASTSSL_CACHE_GB, or 50."""
    on_bad: Literal["skip", "raise"] = "skip"
    """A sample that cannot be decoded is replaced by another one (skip) or ends the run (raise)."""
    max_bad: NonNegativeInt = 100
    """With on_bad=skip: more bad samples than this end the run."""


OLD_RESAMPLE = "antialiased"  # `Model.resample` of records that do not name it


@dataclass
class Model(Checked):
    """The backbone."""

    section: ClassVar[str] = "model"

    name: str = "vit_small"
    """vit_tiny, vit_small, vit_base, vit_large, vit_huge, resnet18, resnet34, resnet50 (see fastssl.models), or
    timm:NAME: a plain ViT of timm for every method, any other model of timm for dino and scfs."""
    image_size: PositiveInt = 224
    """Side of the image for which a ViT's position table is made, in pixels; other sizes are interpolated."""
    patch_size: PositiveInt = 16
    """Side of a ViT's patch, in pixels."""
    width: NonNegativeInt = 0
    """Width of a ViT's tokens, or channels of a ResNet's first stage (64 in the paper). 0: the named model's."""
    depth: NonNegativeInt = 0
    """Number of a ViT's blocks. 0: the named model's."""
    heads: NonNegativeInt = 0
    """Attention heads of a ViT. 0: the named model's."""
    positions: Literal["learned", "sincos", "sincos_rows"] = "learned"
    """A ViT's position table: learned, or fixed 2-D sine-cosine with the column in the first half of the channels
    (sincos, MAE's) or the row (sincos_rows, CAE's)."""
    resample: Literal["plain", "dino", "antialiased"] = "plain"
    """How a ViT's position table is brought to the patches of an image of another size, bicubic: plain (MAE, CAE), with
    scale (patches + 0.1) / side (dino: DINO, SAAE, SiT), or antialiased (timm). The method sets its authors' way."""
    layer_scale: NonNegativeFloat = 0.0
    """Start value of a ViT's layer scale, a learned gain per channel on every block's two branches. 0: none."""
    drop_path: Probability = 0.0
    """Stochastic depth of the student's last block; earlier blocks get proportionally less."""
    small_images: bool = False
    """ResNet only: 3x3 stem with stride 1 and no max-pool, for 32-pixel images."""
    init: str = ""
    """Weights that a new run starts from (short: --init): a checkpoint of ours, timm:NAME, torchvision:NAME, or a file
    of a method's authors or of timm. Read before the first step alone; a run that goes on has its own. Empty: drawn."""


@dataclass
class Optim(Checked):
    """The optimizer."""

    section: ClassVar[str] = "optim"

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw, sgd (momentum), or lars."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate for a batch of lr_batch images."""
    lr_batch: NonNegativeInt = 256
    """The peak is lr x (images per optimizer step) / lr_batch. 0: lr as written."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine; not scaled by the batch."""
    weight_decay: NonNegativeFloat = 0.04
    """Weight decay at the start (matrices only; never biases, norms)."""
    weight_decay_end: NonNegativeFloat | None = None
    """Weight decay at the end of a cosine. None: constant."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: NonNegativeFloat = 1e-8
    """AdamW's epsilon."""
    momentum: BelowOne = 0.9
    """Momentum of sgd and lars."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest gradient norm. 0: no clipping."""
    clip_each: bool = False
    """Clip every parameter tensor by its own norm (DINO, SiT) rather than all by their common norm."""


@dataclass
class Schedule(Checked):
    """How long the run lasts. Schedules are pure functions of the optimizer step (fastssl.training.schedule)."""

    section: ClassVar[str] = "schedule"

    epochs: PositiveInt = 100
    """Passes over the data in the whole run."""
    warmup_epochs: NonNegativeFloat = 10
    """Epochs of linear learning-rate warm-up from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"from 0 to schedule.epochs ({self.epochs})"
        check(self.warmup_epochs <= self.epochs, "schedule.warmup_epochs", self.warmup_epochs, allowed)


@dataclass
class Run(Checked):
    """One run: where it writes, on what it computes, how it is saved."""

    section: ClassVar[str] = "run"

    dir: str = ""
    """Run folder: config, logs, checkpoints. A run that finds last.pt there continues it. Empty: runs/<method>."""
    seed: Seed = 0
    """Seed of everything random, 0 to 2^32 - 1."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the networks. auto: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""
    steps: NonNegativeInt = 0
    """Stop after so many optimizer steps in all, with a checkpoint; schedules keep their length. 0: run to the end."""
    images_per_step: NonNegativeInt = 0
    """Images per optimizer step, however many processes there are: each takes its share in micro-batches of at most
    data.batch_size images. 0: data.batch_size x processes x run.accumulate at the run's first start, and as many
    whenever it goes on."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step; set by the run itself where these do not make its images per step."""
    recipe_batch: NonNegativeInt = 0
    """Images per optimizer step that the other numbers are for: a run with far fewer or more says what that changes. It
    sets nothing. 0: not known."""
    shard: Literal["none", "fsdp"] = "none"
    """fsdp: spread a ViT's matrices, their moments and the teacher's over the processes of torchrun, for a model that
    outgrows a card; checkpoints then have a folder beside them (docs/sharding.md). none: each process has all."""
    recompute: bool = False
    """Keep a ViT block's input alone for the backward pass and compute the block again there: far less memory for
    activations, about a third more computing."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    graph: Literal["never", "auto", "check"] = "never"
    """Capture forward and backward pass in a CUDA graph (one process, on a GPU), which frees the host of a thousand
    launches per step. auto: from the fourth step on; a step that cannot be captured goes on without, and says so.
    check: also compare its first step with the eager one."""
    threads: NonNegativeInt = 0
    """CPU threads of PyTorch. 0: PyTorch's own choice, divided among the processes on this machine."""
    log_every: PositiveInt = 10
    """Optimizer steps between two log lines (the device is read only then)."""
    loggers: str = ""
    """Further loggers beside TensorBoard, separated by commas: wandb, mlflow. Each is set up by its own environment
    variables (WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""
    save_every: PositiveFloat = 1.0
    """Epochs between two writings of last.pt (fractions allowed)."""
    keep_every: NonNegativeInt = 0
    """Epochs between checkpoints that are kept for good (epoch-0100.pt). 0: only the last."""
    hang_s: NonNegativeFloat = 600.0
    """Seconds that nobody's main thread may stand still: then the process that the others wait for is named and the job
    ends with exit code 75, so that torchrun or a scheduler starts it again. 0: it waits for ever."""
    resume: bool = True
    """Continue from last.pt in the run folder if there is one. False: refuse to overwrite such a folder."""
    change: str = ""
    """Keys, separated by commas, that may differ from what the run folder's checkpoint was written with: optim.lr, say.
    Any other difference that shapes the run is refused."""


@dataclass
class Monitor(Checked):
    """Online k-NN: the backbone of the moment classifies data.val by its nearest neighbours in data.path."""

    section: ClassVar[str] = "monitor"

    every: NonNegativeInt = 0
    """Epochs between two measurements. 0: off. Needs data.val and labels."""
    k: PositiveInt = 20
    """Neighbours that vote."""
    mean_patch: bool = False
    """The feature is the class token and the mean patch token of a ViT, rather than the class token alone."""
    train_images: PositiveInt = 10000
    """At most so many (evenly spaced) training images form the memory."""
    val_images: PositiveInt = 2000
    """At most so many (evenly spaced) validation images are classified."""
    pictures: NonNegativeInt = 8
    """Images whose views, masks, maps and reconstructions are drawn into the run folder (pictures/). 0: none."""
    pictures_every: NonNegativeInt = 0
    """Epochs between two drawings. 0: only at the end of the run."""


@dataclass
class Health(Checked):
    """The watch that says, in one line, when a run is going wrong (fastssl.training.health)."""

    section: ClassVar[str] = "health"

    action: Literal["off", "warn", "stop"] = "warn"
    """off, warn (one line per finding), or stop (end the run with an error; the last checkpoint stays as it is)."""
    patience: PositiveInt = 500
    """Optimizer steps that a bad sign must last before it counts. The first warm-up epoch never counts."""
    chance_margin: ZeroToOne = 0.01
    """The loss is pinned when it stays within this fraction of its value for a constant output (ln K for DINO)."""
    entropy_margin: ZeroToOne = 0.02
    """The teacher has collapsed when its entropy / ln K stays below this, or above 1 minus this."""
    feature_std: ZeroToOne = 0.02
    """Features have collapsed when their standard deviation over the batch (1 = as spread as can be) stays below."""
    grad_spike: Annotated[float, Range(above=1)] = 20.0
    """A gradient norm this many times its running median is a spike."""
    data_wait: ZeroToOne = 0.3
    """Warn when the step waits for data for more than this share of the time."""


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
        values = {key: plain(value) for key, value in asdict(self).items()}
        values[self.method] = values.pop("settings")
        for group in values["views"].values():
            group.pop("name")
        return values


def plain(value: Any) -> Any:
    """The value as files hold it: tuples become lists, in dicts too; URLs have lost their credentials."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """A name from a disk or a file as it may be printed, on one line: control characters (terminal escapes, line ends)
    and bytes that are not UTF-8 as \\xNN."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def shard_numbers(text: str) -> tuple[int, int]:
    """I and N of the option `shard`, I/N: which of how many parts, counted from 0; (0, 1) where it is empty.

    Raises:
        ConfigError: it is anything else.
    """
    index, slash, total = (text or "0/1").partition("/")
    numbers = (int(index), int(total)) if slash and index.isdecimal() and total.isdecimal() else (0, 0)
    check(numbers[0] < numbers[1], "shard", text, "I/N with I from 0 to N-1, such as 0/4")
    return numbers


_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_PORT = r"(?:(?<=http://)|(?<=https://)|(?<=ftp://)|(?<=hdfs://))[^/@:]*:\d+(?:/|$)"
USER = re.compile(rf"(?<=://)(?:[^/]*@|(?!{_PORT})[^/@:]*:[^@]*@)", re.I)  # a key may hold a slash; a port is none


def redacted(text: str) -> str:
    """A text whose URLs have lost what may be secret: user:password@, and the query (a presigned URL's signature)."""
    return _URL.sub(_without_secrets, text)


def _without_secrets(found: re.Match[str]) -> str:
    text = found[0].rstrip(")")  # a bracket around the URL
    url, mark, query = text.partition("?")
    if mark and not url.lower().startswith("http") and "=" not in query:  # a pattern's question mark
        url = text
    return USER.sub("", url, count=1) + found[0][len(text) :]


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode().replace("\\udc", "\\x")
