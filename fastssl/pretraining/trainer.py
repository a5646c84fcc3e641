"""Pretraining: what is a pretraining run's own on the loop of `fastssl.training.loop`."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import __version__
from fastssl.augment import augment
from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, redacted
from fastssl.evaluation.data import frozen
from fastssl.loaders import cache
from fastssl.loaders.engine import choose_engine, decoding_threads, open_loader, page_window
from fastssl.loaders.loader import Loader
from fastssl.loaders.pool import cores
from fastssl.loaders.sources import open_source
from fastssl.methods import METHODS, view_list
from fastssl.models import AnyBackbone
from fastssl.models.blocks import set_recompute
from fastssl.pictures import save as save_picture
from fastssl.pretraining.identity import flat, identity, repeated, settings
from fastssl.pretraining.monitor import KNNMonitor, why_off
from fastssl.pretraining.preflight import FEW_STEPS, Preflight, loading_rate, preflight
from fastssl.step import Values
from fastssl.training import checkpoint, distributed
from fastssl.training.checkpoint import Checkpoint, CheckpointError, replace_file
from fastssl.training.device import Transfer, choose_device, choose_dtype
from fastssl.training.graph import StepGraph
from fastssl.training.health import HealthWatch
from fastssl.training.loggers import check_loggers
from fastssl.training.loop import Pace, Run, Stopped, TrainingError
from fastssl.training.masters import Masters
from fastssl.training.optim import Optimizer, build_optimizer, set_hyperparameters
from fastssl.training.schedule import cosine, warmup_cosine
from fastssl.training.shard import Shards
from fastssl.weights.init import start_from


class Trainer(Run[Batch, dict[str, Any]]):
    """One pretraining run on this process (one of several under torchrun). `train()` runs it to its end.

    Args:
        config: the resolved configuration.

    Raises:
        ConfigError, SourceError, CheckpointError: something asked for does not exist or does not fit.
    """

    kind = "pretrain"
    folder_option = "--run.dir"
    change_option = "--run.change"

    def __init__(self, config: Config) -> None:
        self.config = config
        begin, self.hang_s = time.perf_counter(), config.run.hang_s
        self.loggers = check_loggers([name.strip() for name in config.run.loggers.split(",") if name.strip()])

        # Where: device, arithmetic, processes.
        device = choose_device(config.run.device)
        dtype = choose_dtype(config.run.precision, device)
        distributed.start(device)
        self.transfer = Transfer(device)
        _set_threads(config.run.threads, device)
        folder = Path(config.run.dir or f"runs/{config.method}")
        if not config.run.resume and (folder / self.file_name).exists():
            raise ConfigError(f"{folder} already holds a run; choose another run.dir, or leave run.resume on")

        # Data.
        self.views = view_list(config.views)
        cache.use(config.data.cache, config.data.cache_gb)
        self.source = open_source(config.data.path)
        window = page_window(self.source, config.data.page_window)  # the number, so that a run goes on with the same
        self.config = config = replace(config, data=replace(config.data, page_window=window))
        self.threads = decoding_threads(config.data.workers, distributed.local_world())
        pace = self._pace(folder)
        self.batch_size = pace.images_per_step // distributed.world() // pace.accumulate
        self.loader = self._open_loader(self.batch_size, device)
        self.peak_lr = config.optim.lr * (pace.images_per_step / config.optim.lr_batch if config.optim.lr_batch else 1)

        # What is trained, and how.
        torch.manual_seed(config.run.seed)
        self.method = METHODS[config.method](config)
        new = not (folder / self.file_name).exists()
        self.origin = start_from(self.method, config) if config.model.init and new else []  # lines on what was taken
        if config.run.recompute and not set_recompute(self.method):
            raise ConfigError(f"run.recompute computes a ViT's blocks again; model.name is '{config.model.name}'")
        self.method.train()
        sharded = _shard(config, dtype)
        if sharded:
            masters: Masters = Shards(self.method, device, dtype)
        else:
            self.method = self.method.to(device)
            if device.type == "cuda":
                backbone = cast(AnyBackbone, self.method.backbone)
                self.method = self.method.to(memory_format=backbone.memory_format)
            # Gradients of several micro-batches are added up in float32, so the copies are for one.
            masters = Masters(self.method, dtype if dtype == torch.bfloat16 and pace.accumulate == 1 else torch.float32)
        optimizer = build_optimizer(self.method, config.optim, masters, self.method.averages())

        # What watches it.
        self.watch = HealthWatch(config.health, self.method.chance_loss, first_step=pace.steps_per_epoch)
        self.monitor = None
        self.monitor_off = why_off(config, self.source)
        if config.monitor.every and not self.monitor_off and (sharded or distributed.is_main()):
            self.monitor = KNNMonitor(config, device=device, dtype=dtype, workers=self.threads)
        self.last_line: dict[str, float] = {}
        self.history: list[str] = []  # settings that were changed on the way
        self.data = distributed.from_main(lambda: identity(self.source))
        self.settings = settings(config)
        self.knn: float | None = None

        # Where it stands.
        self.prepare(self.method, optimizer, pace, folder=folder, device=device, dtype=dtype, masters=masters)
        self.begun, self.first_step = begin, self.step
        self.estimate: Preflight | None = None
        if not self.step:  # who goes on knows what it takes, and waits for the first step
            self.estimate = preflight(
                self.method,
                self.views,
                replace(
                    config,
                    data=replace(config.data, batch_size=self.batch_size),
                    run=replace(config.run, accumulate=pace.accumulate),
                ),
                images=pace.steps_per_epoch * pace.images_per_step // distributed.world(),
                device=device,
                dtype=dtype,
            )
        if config.run.compile:
            _compile(self.method)
        if config.run.graph != "never" and device.type == "cuda" and distributed.world() == 1:
            check = config.run.graph == "check"
            self.graph = StepGraph(self.method, self.one_pass, check=check, say=self._say)

    def _open_loader(self, batch_size: int, device: torch.device) -> Loader:
        config, method = self.config, METHODS[self.config.method]
        return open_loader(
            self.source,
            self.views,
            replace(config.data, batch_size=batch_size),
            seed=config.run.seed,
            rank=distributed.rank(),
            world=distributed.world(),
            threads=self.threads,
            pin_memory=device.type == "cuda",
            part_grid=method.part_grid(config),
            masks=method.masks(config),
        )

    def _pace(self, folder: Path) -> Pace:
        """The run's numbers, from its checkpoint, the configuration, the processes and the size of the data."""
        config, world, accumulated = self.config, distributed.world(), self.config.run.accumulate
        accumulate, images_per_step = accumulated, config.data.batch_size * world * accumulated
        wanted = config.run.images_per_step or int(distributed.from_main(lambda: self._kept_images(folder)))
        self.resplit = ""  # a line where the run itself chose how a step is split
        if wanted not in (0, images_per_step):
            accumulate = split(wanted, world, config.data.batch_size)
            why = "run.images_per_step" if config.run.images_per_step else "the checkpoint's images per step"
            self.resplit = (
                f"split anew: {why}, {wanted}, are {wanted // world // accumulate} x {world} processes x {accumulate} "
                f"accumulated; data.batch_size {config.data.batch_size} and run.accumulate {accumulated} would make "
                f"{images_per_step}"
            )
            each, most = wanted // world, config.data.batch_size
            if 4 * each // accumulate < most:
                count = -(-each // most)
                near = sorted({each // count, -(-each // count)})
                self.resplit += (
                    f"; so few at once are slow: {' or '.join(str(size * count * world) for size in near)} images per "
                    f"step would be taken {' or '.join(map(str, near))} at once"
                )
            images_per_step = wanted
        steps_per_epoch = len(self.source) // images_per_step
        if steps_per_epoch == 0:
            raise ConfigError(
                f"{config.data.path} has {len(self.source)} images, fewer than one optimizer step takes: "
                f"{images_per_step} (run.images_per_step, or data.batch_size x processes x run.accumulate)"
            )
        return Pace(
            total_steps=steps_per_epoch * config.schedule.epochs,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            accumulate=accumulate,
            seed=config.run.seed,
            save_every=max(1, round(config.run.save_every * steps_per_epoch)),
            log_every=config.run.log_every,
            last_step=config.run.steps or None,
            clip_grad=config.optim.clip_grad,
            clip_each=config.optim.clip_each,
        )

    def _kept_images(self, folder: Path) -> str:
        """Images per optimizer step of the checkpoint that this start goes on from; 0: there is none, or they may
        change."""
        path = folder / self.file_name
        if "images_per_step" in self.may_change() or not path.exists():
            return "0"
        try:
            return str(checkpoint.read_hollow(path, self.kind, device="meta")[0].fingerprint.get("images_per_step", 0))
        except CheckpointError:
            return "0"  # `prepare` says what is wrong with it

    # -- a step --------------------------------------------------------------------------------------------------------

    @property
    def values(self) -> Values:
        """Where the run stands, as the method sees it."""
        pace = self.pace
        return Values(self.step, pace.total_steps, pace.steps_per_epoch, self.config.run.seed, self.numbers)

    def micro_batches(self) -> Generator[Batch, None, None]:
        """Micro-batches without end, from the present step on; only full optimizer steps of each epoch."""
        accumulate = self.pace.accumulate
        epoch, done = divmod(self.step, self.pace.steps_per_epoch)
        with contextlib.closing(self.loader):
            while True:
                with contextlib.closing(self.loader.epoch(epoch, start=done * accumulate)) as stream:
                    for _ in range((self.pace.steps_per_epoch - done) * accumulate):
                        yield next(stream)
                epoch, done = epoch + 1, 0

    def sample_ids(self, batch: Batch) -> list[int]:
        return batch.id.tolist()

    def schedule(self) -> dict[str, float]:
        config, pace, optim = self.config, self.pace, self.config.optim
        warmup = round(config.schedule.warmup_epochs * pace.steps_per_epoch)
        twice = self.method.peak_twice
        lr = warmup_cosine(self.step, pace.total_steps, warmup, self.peak_lr, optim.min_lr, peak_twice=twice)
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        weight_decay = cosine(self.step, pace.total_steps, optim.weight_decay, end)
        set_hyperparameters(self.optimizer, lr, weight_decay)
        return {"lr": lr, "weight_decay": weight_decay}

    def on_device(self, batch: Batch) -> Batch:
        return augment(self.transfer(batch))

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.parallel(batch, self.values)
        return out.loss, out.metrics

    def scheduled(self) -> dict[str, float]:
        numbers = self.method.scheduled(self.values)
        cast(Optimizer, self.optimizer).teacher_momentum = numbers.get("momentum", 1.0)
        return {**{name: float(value) for name, value in numbers.items()}, "step": self.step}

    def gradient_factors(self) -> list[tuple[Sequence[Tensor], Tensor]]:
        return [(parameters, self.numbers[name]) for name, parameters in self.method.factors().items()]

    def after_backward(self) -> None:
        self.method.after_backward(self.values)

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        pace = self.pace
        return {
            "images_per_step": pace.images_per_step,
            "steps_per_epoch": pace.steps_per_epoch,
            "images": len(self.source),
            "data": self.data,
            **self.settings,
        }

    def may_change(self) -> list[str]:
        return [key.strip() for key in self.config.run.change.split(",") if key.strip()]

    def record(self) -> Checkpoint:
        return Checkpoint(
            self.kind,
            self.config.as_dict(),
            self.masters.state_dict(),
            self.method.backbone_prefix,
            extra={
                "health": self.watch.state_dict(),
                "changes": self.history,
                "origin": self.origin,
                "micro_batch": [self.batch_size, distributed.world()],
            },
        )

    def restore(self, saved: Checkpoint) -> None:
        self.watch.load_state_dict(saved.extra["health"])
        self.origin = saved.extra.get("origin", [])
        self.changes += self._other_micro_batch(saved.extra.get("micro_batch"))
        self.history = [*saved.extra.get("changes", []), *(f"step {self.step}: {words}" for words in self.changes)]

    def _other_micro_batch(self, before: list[int] | None) -> list[str]:
        """A line where the last start had other micro-batches, and the loss has terms that are of a whole one."""
        now = [self.batch_size, distributed.world()]
        terms = [*self.method.batch_terms]
        if any(isinstance(module, _BatchNorm) for module in self.method.modules()):
            terms.append("batch norm")
        if before in (None, now) or not terms:
            return []
        sizes = " x ".join(map(str, before or ())), " x ".join(map(str, now))
        return [f"images x processes of a micro-batch (was {sizes[0]}, now {sizes[1]}): {', '.join(terms)} see as many"]

    # -- between steps -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if distributed.is_main() and self.folder is not None:
            text = yaml.safe_dump(self.config.as_dict(), sort_keys=False)
            self._keep("config.yaml", text)
            self.log.describe(text, dict(flat("", self.config.as_dict())), ("loss", "knn_top1"))
            self._note_start()

    def _note_start(self) -> None:
        """Adds a line to starts.jsonl: when, at which step, by which command, where, with which versions."""
        from fastssl.kernels._bench import versions

        line = {
            "time": round(time.time(), 3),
            "step": self.step,
            "command": redacted(shlex.join(sys.argv)),
            "host": platform.node(),
            "device": str(self.device),
            "processes": distributed.world(),
            "images": len(self.source),
            "images_per_step": self.pace.images_per_step,
            "batch_size": self.batch_size,
            "accumulate": self.pace.accumulate,
            "precision": _name(self.dtype),
            "engine": choose_engine(self.config.data.engine)[0],
            "cores": cores(),
            "fastssl": __version__,
            "python": platform.python_version(),
            **versions(),
        }
        assert self.folder is not None
        try:
            with open(self.folder / "starts.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self.log.warn(f"{self.folder / 'starts.jsonl'} cannot be written ({error})")

    def observe(self, steps: list[int], rows: list[dict[str, float]]) -> None:
        self._judge([line for step, row in zip(steps, rows, strict=True) for line in self.watch.observe(step, row)])

    def logged(self, line: dict[str, float]) -> None:
        self.last_line = line
        self._judge(self.watch.observe(self.step, {"data_wait": line["data_wait"]}), fatal=False)

    def _judge(self, findings: list[str], fatal: bool = True) -> None:
        for line in findings:
            self.log.finding(self.step, line)
        if findings and fatal and self.config.health.action == "stop":
            raise TrainingError(f"stopped by health.action=stop: {findings[0]}; kept: {self.kept()}")

    def _epochs_done(self, every: int) -> bool:
        """Whether an epoch has just ended whose number is a multiple of `every` (0: none is)."""
        epoch, into = divmod(self.step, self.pace.steps_per_epoch)
        return into == 0 and every > 0 and epoch % every == 0

    def kept_files(self) -> list[Path]:
        if self.folder is None or not self._epochs_done(self.config.run.keep_every):
            return []
        return [self.folder / f"epoch-{self.step // self.pace.steps_per_epoch:04d}.pt"]

    def between(self) -> None:
        if self._epochs_done(self.config.monitor.every):
            if self.monitor is not None:
                self.knn = self.monitor.measure(self.method.backbone)
                self.log.record({"step": self.step, "epoch": self.epoch, "knn_top1": self.knn})
                self.log.say(f"step {self.step}: online k-NN {self.knn:.1f} % top-1")
            distributed.barrier()
        if self._epochs_done(self.config.monitor.pictures_every):
            self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draws what the method sees and does into pictures/, for the first images of epoch 0."""
        count = min(self.config.monitor.pictures, self.batch_size)
        if not count or self.folder is None:
            return
        with contextlib.closing(self.loader.epoch(0, schedule_epoch=self.values.epoch)) as stream:
            batch = next(stream).map(lambda value: value[:count])
        gpus = [self.device] if self.device.type == "cuda" else []
        with frozen(self.method), torch.random.fork_rng(gpus), self.autocast():
            pictures = self.method.pictures(self.on_device(batch), self.values)
        try:
            for name, sheet in pictures.items() if distributed.is_main() else ():
                image = save_picture(self.folder / "pictures" / f"{name}-{self.step:07d}.png", sheet)
                self.log.picture(name, image, self.step)
        except OSError as error:
            self.log.warn(f"pictures cannot be written ({error}); training goes on")

    def describe(self) -> list[str]:
        """The derived numbers of the run, one line each, as printed before the first step."""
        c = self.config
        engine, why = choose_engine(c.data.engine)
        begin = f"from the weights of {c.model.init}" if c.model.init else "from scratch"
        start = f"from step {self.step} of {self.path}" if self.step else begin
        return [
            f"{c.method} with {c.model.name} on {self.device}, {_name(self.dtype)}, "
            f"{distributed.world()} process(es); {start}",
            f"data: {len(self.source)} images, {len(self.source.classes)} classes from {c.data.path}; "
            f"engine {engine} ({why}), {self.threads} thread(s) per process",
            f"{self.pace.images_per_step} images per step ({self.batch_size} x {distributed.world()} processes x "
            f"{self.pace.accumulate} accumulated), {self.pace.steps_per_epoch} steps per epoch, "
            f"{self.pace.total_steps} in all; peak learning rate {self.peak_lr:.3g}",
            *self._estimates(),
            *([self.masters.line()] if isinstance(self.masters, Shards) else ()),
            *(() if self.step else self.origin),
            *self._warnings(),
        ]

    def _estimates(self) -> list[str]:
        """What the run will take, and whether the loader feeds it; nothing when it goes on."""
        if self.estimate is None:
            return []
        if self.last_step < FEW_STEPS:
            return [self.estimate.line()]
        few = min(self.batch_size, 64)  # however large the batch, this takes about two seconds
        rate = loading_rate(self._open_loader(few, self.device), 0)
        return [self.estimate.line(), *([self.estimate.loader_line(rate)] if rate else [])]

    def _warnings(self) -> list[str]:
        """Lines on what is changed or looks wrong."""
        lines = [self.resplit] if self.resplit else []
        lines += [f"changed: {words}" for words in self.changes]
        lines += [f"online k-NN is off: {self.monitor_off}"] if self.monitor_off else []
        lines += self._batch_line()
        if self.changes:
            left = self.pace.total_steps - self.step
            rate = self.schedule()["lr"]
            lines.append(
                f"the schedule goes on at step {self.step} with learning rate {rate:.3g}; {left} steps are left"
            )
        if self.source.in_store:
            window = self.config.data.page_window
            how = f"shuffled by {window} pages at a time" if window else "shuffled as a whole"
            lines.append(f"data: from a store, {cache.described()}; {how} (data.page_window)")
        line = None if self.step else repeated(self.source)
        return lines + ([f"data: {line}"] if line else [])

    def _batch_line(self) -> list[str]:
        """A line where a step has far fewer or more images than the recipe is for."""
        c, here, recipe = self.config, self.pace.images_per_step, self.config.run.recipe_batch
        if not recipe or 0.5 <= here / recipe <= 2:
            return []
        scaled = "nothing is scaled by this"
        if c.optim.lr_batch:
            scaled = f"the peak learning rate is scaled by this, {c.optim.lr:g} x {here} / {c.optim.lr_batch}"
        restore = f"--run.images_per_step {recipe} restores them (batch norm and contrasts still see one micro-batch)"
        if recipe > len(self.source):
            restore = f"the data has too few images ({len(self.source)}) to restore them"
        return [
            f"{here} images per step where the recipe has {recipe}: {scaled}; epochs, warm-up, weight decay, averages "
            f"and temperatures stay as written; {restore}"
        ]

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Draws the last pictures and writes summary.json; returns what it holds."""
        self.draw()
        summary = {
            "step": self.step,
            "total_steps": self.pace.total_steps,
            "finished": self.step == self.pace.total_steps,
            "seconds": round(time.perf_counter() - self.begun, 1),
            "checkpoint": str(self.path),
            "bad_samples": len(self.loader.bad),
            **{key: value for key, value in self.last_line.items() if key != "step"},
        }
        if self.knn is not None:
            summary["knn_top1"] = self.knn
        if distributed.is_main() and self.folder is not None:
            path = self.folder / "summary.json"
            if self.step == self.first_step and path.exists():  # nothing was trained: what is known stays
                with contextlib.suppress(json.JSONDecodeError, OSError):
                    summary = {
                        **json.loads(path.read_text()),
                        **{key: summary[key] for key in ("total_steps", "finished")},
                    }
            self._keep("summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _say(self, line: str) -> None:
        """A line for people, in the log if there is one yet."""
        if hasattr(self, "log"):
            self.log.say(line)
        else:
            print(line, file=sys.stderr)

    def _keep(self, name: str, text: str) -> None:
        """Writes a small file of the run folder in one piece; where that fails it says so."""
        assert self.folder is not None
        try:
            replace_file(self.folder / name, lambda part: part.write_text(text))
        except OSError as error:
            self.log.warn(f"{self.folder / name} cannot be written ({error})")

    def stopped(self, message: str, code: int) -> dict[str, Any]:
        """The summary as it stands, for a scheduler's signal. Ctrl-C ends the command with its code; so does, under
        torchrun, a signal to another process: torchrun then starts those that stay anew."""
        summary = self.finish()
        if code == INTERRUPTED or (distributed.elastic() and not self.signal):
            raise Stopped(message, code)
        self.log.say(message)
        return summary


INTERRUPTED = 130  # exit code after Ctrl-C


def split(images: int, world: int, most: int) -> int:
    """Micro-batches of an optimizer step of `images`: as few as have the same number of images, and on each of `world`
    processes at most `most`.

    Raises:
        ConfigError: the processes cannot have equal shares.
    """
    each, rest = divmod(images, world)
    if rest:
        fitting = [count for count in range(1, min(images, 2 * world) + 1) if images % count == 0]
        raise ConfigError(
            f"{images} images per optimizer step cannot be divided among {world} processes; these numbers of processes "
            f"can take them: {', '.join(map(str, fitting))}"
        )
    return next(count for count in range(-(-each // most), each + 1) if each % count == 0)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _shard(config: Config, dtype: torch.dtype) -> bool:
    """Whether the processes share one network's memory.

    Raises:
        ConfigError: they are to, in a way that does not work.
    """
    if config.run.shard == "none":
        return False
    if dtype == torch.float16:
        raise ConfigError("run.shard fsdp computes in bf16 or fp32; set run.precision, or run.shard none")
    if config.run.compile:
        raise ConfigError("run.shard fsdp does not go with run.compile; leave one of them out")
    if distributed.world() == 1:
        print("run.shard fsdp needs several processes (torchrun); this one has the whole network", file=sys.stderr)
    return distributed.world() > 1


def _set_threads(threads: int, device: torch.device) -> None:
    if threads:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and distributed.local_world() > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // distributed.local_world()))


def _compile(method: nn.Module) -> None:
    """Compiles the repeated parts of the backbones (blocks, stages) where they stand; state-dict keys do not change."""
    for module in list(method.modules()):
        if isinstance(module, AnyBackbone):
            for part in module.compile_parts():
                part.compile()


def pretrain(config: Config) -> dict[str, Any]:
    """Builds the run and trains it; see `Trainer`. Returns the summary that summary.json holds."""
    try:
        return Trainer(config).train()
    finally:
        distributed.stop()
