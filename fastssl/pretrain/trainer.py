"""Pretraining: a configuration becomes parts, the parts become the loop at the end of this file."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl import __version__
from fastssl.augment import augment
from fastssl.batch import Batch
from fastssl.config import Config, ConfigError
from fastssl.loaders.engine import choose_engine, decoding_threads, open_loader
from fastssl.loaders.sources import open_source
from fastssl.methods import METHODS, view_list
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT
from fastssl.pictures import save as save_picture
from fastssl.pretrain.monitor import KNNMonitor
from fastssl.pretrain.preflight import preflight
from fastssl.step import Values
from fastssl.training import checkpoint, distributed
from fastssl.training.batch_norm import synchronise_batch_norm
from fastssl.training.device import Transfer, choose_device, choose_dtype
from fastssl.training.health import HealthWatch
from fastssl.training.log import Clock, MetricRing, RunLog
from fastssl.training.optim import build_optimizer, clip_gradients, set_hyperparameters
from fastssl.training.schedule import cosine, warmup_cosine
from fastssl.training.timing import section


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what is kept."""


class Trainer:
    """One pretraining run on this process (one of several under torchrun). `train()` runs it to its end.

    Args:
        config: the resolved configuration.

    Raises:
        ConfigError, SourceError, CheckpointError: something asked for does not exist or does not fit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.begin = time.perf_counter()

        # Where: device, arithmetic, processes, folder.
        self.device = choose_device(config.run.device)
        self.dtype = choose_dtype(config.run.precision, self.device)
        distributed.start(self.device)
        self.transfer = Transfer(self.device)
        _set_threads(config.run.threads, self.device)
        self.folder = Path(config.run.dir or f"runs/{config.method}")

        # Data.
        self.views = view_list(config.views)
        self.source = open_source(config.data.path)
        self.threads = decoding_threads(config.data.workers, distributed.local_world())
        part_grid = METHODS[config.method].part_grid(config)
        if part_grid and not self.source.has_parts:
            raise ConfigError(
                f"{config.data.path} has no part maps, which method {config.method} needs; 'fastssl parts learn' and "
                "'fastssl parts write' make a .beton that has them, 'fastssl convert --parts' takes maps made elsewhere"
            )
        self.loader = open_loader(
            self.source,
            self.views,
            config.data,
            seed=config.run.seed,
            rank=distributed.rank(),
            world=distributed.world(),
            threads=self.threads,
            pin_memory=self.device.type == "cuda",
            part_grid=part_grid,
        )
        self.images_per_step = config.data.batch_size * distributed.world() * config.run.accumulate
        self.steps_per_epoch = self.loader.batches_per_epoch // config.run.accumulate
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{config.data.path} has {len(self.source)} images, fewer than one optimizer step takes: "
                f"{self.images_per_step} (data.batch_size x processes x run.accumulate)"
            )
        self.total_steps = self.steps_per_epoch * config.schedule.epochs
        self.last_step = min(config.run.steps or self.total_steps, self.total_steps)

        # What is trained, and how.
        torch.manual_seed(config.run.seed)
        self.method = METHODS[config.method](config).to(self.device).train()
        if distributed.world() > 1:
            self.method = synchronise_batch_norm(self.method, self.device)
        if any(isinstance(m, ResNet) for m in self.method.modules()):
            self.method = self.method.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.method, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.peak_lr = config.optim.lr * (self.images_per_step / config.optim.lr_batch if config.optim.lr_batch else 1)

        # What watches it.
        self.watch = HealthWatch(config.health, self.method.chance_loss, first_step=self.steps_per_epoch)
        self.monitor = None
        if config.monitor.every and distributed.is_main():
            self.monitor = KNNMonitor(config, device=self.device, dtype=self.dtype, workers=self.threads)
        self.ring, self.clock = MetricRing(), Clock()
        self.recent_ids: dict[int, list[int]] = {}  # step -> this process's sample ids, since the last drain
        self.unlogged: list[dict[str, float]] = []  # scalars of the steps since the last log line
        self.last_record: dict[str, float] = {}
        self.knn: float | None = None
        self.stopping = False
        self.saved_step = 0  # step of last.pt; 0: there is none

        # Where it stands.
        self.step = 0
        self._resume()
        self.estimate = preflight(
            self.method,
            self.views,
            config,
            images=self.steps_per_epoch * self.images_per_step // distributed.world(),
            device=self.device,
            dtype=self.dtype,
        )
        if config.run.compile:
            _compile(self.method)
        self.parallel: nn.Module = self.method
        if distributed.world() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.method, device_ids=devices, broadcast_buffers=False)

    # -- checkpoint -------------------------------------------------------------------------------------------------

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def _resume(self) -> None:
        if not self.last_checkpoint.exists():
            return
        if not self.config.run.resume:
            raise ConfigError(f"{self.folder} already holds a run; choose another run.dir, or leave run.resume on")
        content = checkpoint.load(self.last_checkpoint)
        expected = {"method": self.config.method, "images_per_step": self.images_per_step, "images": len(self.source)}
        checkpoint.check_fit(self.last_checkpoint, content["fit"], expected, "--run.dir")
        try:
            self.method.load_state_dict(content["method"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{self.last_checkpoint} does not fit this model ({str(error).splitlines()[0]}); "
                "use the configuration saved beside it, or choose another run.dir"
            ) from None
        self.scaler.load_state_dict(content["scaler"])
        self.watch.load_state_dict(content["health"])
        self.step = self.saved_step = content["step"]

    def save(self, path: Path) -> None:
        """Writes a checkpoint of this moment (main process; the others wait)."""
        if distributed.is_main():
            content = {
                "version": __version__,
                "config": self.config.as_dict(),
                "fit": {
                    "method": self.config.method,
                    "images_per_step": self.images_per_step,
                    "images": len(self.source),
                },
                "step": self.step,
                "backbone_prefix": self.method.backbone_prefix,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "health": self.watch.state_dict(),
            }
            checkpoint.save(path, content)
        distributed.barrier()

    # -- one step ---------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Micro-batches without end, from the present step on; only full optimizer steps of each epoch."""
        accumulate = self.config.run.accumulate
        epoch, done = divmod(self.step, self.steps_per_epoch)
        while True:
            left = (self.steps_per_epoch - done) * accumulate
            stream = self.loader.epoch(epoch, start=done * accumulate)
            with contextlib.closing(stream):
                for _ in range(left):
                    yield next(stream)
            epoch, done = epoch + 1, 0

    def rates(self) -> tuple[float, float]:
        """(learning rate, weight decay) of the present step."""
        optim, warmup = self.config.optim, round(self.config.schedule.warmup_epochs * self.steps_per_epoch)
        lr = warmup_cosine(self.step, self.total_steps, warmup, self.peak_lr, optim.min_lr)
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        return lr, cosine(self.step, self.total_steps, optim.weight_decay, end)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step; asks the device nothing."""
        run, optim = self.config.run, self.config.optim
        values = Values(self.step, self.total_steps, self.steps_per_epoch, run.seed)
        set_hyperparameters(self.optimizer, *self.rates())
        ids, losses, metrics = [], [], []
        for micro in range(run.accumulate):
            with section("data"):
                waiting = time.perf_counter()
                batch = next(batches)
                self.clock.wait(time.perf_counter() - waiting)
            ids += batch.id.tolist()
            torch.manual_seed(_step_seed(run.seed, self.step, micro, distributed.rank()))
            with section("augment"):
                batch = augment(self.transfer(batch))
            last = micro == run.accumulate - 1
            quiet = self.parallel.no_sync() if distributed.world() > 1 and not last else contextlib.nullcontext()
            with quiet:
                autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
                with section("forward"), autocast:
                    out = self.parallel(batch, values)
                with section("backward"):
                    self.scaler.scale(out.loss / run.accumulate).backward()
            losses.append(out.loss.detach())
            metrics.append(out.metrics)
        with section("optimizer"):
            self.scaler.unscale_(self.optimizer)
            self.method.after_backward(values)
            norm = clip_gradients(self.method, optim.clip_grad, optim.clip_each)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with section("ema"):
            self.method.after_step(values)
        self.step += 1
        self.recent_ids[self.step] = ids
        mean = {key: torch.stack([m[key] for m in metrics]).mean() for key in metrics[0]}
        self.ring.add(self.step, {"loss": torch.stack(losses).mean(), "grad_norm": norm, **mean})

    # -- between steps ----------------------------------------------------------------------------------------------

    def drain(self, log: RunLog) -> None:
        """Reads the scalars since the last drain: stops on a non-finite loss, asks the health watch."""
        steps, own, mean = self.ring.drain()
        watched = ("loss",) if self.scaler.is_enabled() else ("loss", "grad_norm")
        broken = [(s, key) for s, row in zip(steps, own, strict=True) for key in watched if not math.isfinite(row[key])]
        if distributed.any_process(bool(broken), self.device):
            raise TrainingError(self._non_finite(broken))
        self.recent_ids.clear()
        self.unlogged += mean
        self._judge(log, [line for s, row in zip(steps, mean, strict=True) for line in self.watch.observe(s, row)])

    def record(self, log: RunLog) -> None:
        """Writes one log line: means over the steps since the last one."""
        self.drain(log)
        if not self.unlogged:
            return
        elapsed, waited = self.clock.read()
        lr, weight_decay = self.rates()
        rows, self.unlogged = self.unlogged, []
        self.last_record = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]},
            "lr": lr,
            "weight_decay": weight_decay,
            "images_per_s": len(rows) * self.images_per_step / elapsed,
            "data_wait": waited,
        }
        log.record(self.last_record)
        self._judge(log, self.watch.observe(self.step, {"data_wait": waited}), fatal=False)

    def _judge(self, log: RunLog, findings: list[str], fatal: bool = True) -> None:
        for line in findings:
            log.say(f"health: {line}")
        if findings and fatal and self.config.health.action == "stop":
            raise TrainingError(f"stopped by health.action=stop: {findings[0]}; kept: {self._kept()}")

    def _non_finite(self, broken: list[tuple[int, str]]) -> str:
        if not broken:
            return f"another process met a non-finite loss near step {self.step}; kept: {self._kept()}"
        step, what = broken[0]
        ids = self.recent_ids.get(step, [])
        return (
            f"step {step}: the {'loss' if what == 'loss' else 'gradient norm'} is not finite; "
            f"sample ids of that step: {ids}; kept: {self._kept()}"
        )

    def _kept(self) -> str:
        return f"{self.last_checkpoint} (step {self.saved_step})" if self.saved_step else "no checkpoint yet"

    def stop_requested(self) -> bool:
        """Whether SIGTERM or SIGUSR1 has come; several processes agree on it at log steps."""
        if distributed.world() == 1:
            return self.stopping
        return self.step % self.config.run.log_every == 0 and distributed.any_process(self.stopping, self.device)

    def _measure(self, log: RunLog) -> None:
        if self.monitor is not None:
            self.knn = self.monitor.measure(self.method.backbone)
            log.record({"step": self.step, "epoch": self.step / self.steps_per_epoch, "knn_top1": self.knn})
            log.say(f"step {self.step}: online k-NN {self.knn:.1f} % top-1")
        distributed.barrier()

    @torch.no_grad()
    def _draw(self) -> None:
        """Draws what the method sees and does into pictures/, for the first images of epoch 0."""
        count = min(self.config.monitor.pictures, self.config.data.batch_size)
        if not count:
            return
        with contextlib.closing(self.loader.epoch(0)) as stream:
            batch = next(stream).map(lambda value: value[:count])
        values = Values(self.step, self.total_steps, self.steps_per_epoch, self.config.run.seed)
        modes = [(module, module.training) for module in self.method.modules()]
        self.method.eval()
        with torch.random.fork_rng(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pictures = self.method.pictures(augment(self.transfer(batch)), values)
        for module, mode in modes:
            module.training = mode
        for name, rows in pictures.items() if distributed.is_main() else ():
            save_picture(self.folder / "pictures" / f"{name}-{self.step:07d}.png", rows)

    def describe(self) -> list[str]:
        """The derived numbers of the run, one line each, as printed before the first step."""
        c = self.config
        engine, why = choose_engine(c.data.engine)
        start = f"from step {self.step} of {self.last_checkpoint}" if self.step else "from scratch"
        return [
            f"{c.method} with {c.model.name} on {self.device}, {_name(self.dtype)}, "
            f"{distributed.world()} process(es); {start}",
            f"data: {len(self.source)} images, {len(self.source.classes)} classes from {c.data.path}; "
            f"engine {engine} ({why}), {self.threads} thread(s) per process",
            f"{self.images_per_step} images per step ({c.data.batch_size} x {distributed.world()} processes x "
            f"{c.run.accumulate} accumulated), {self.steps_per_epoch} steps per epoch, {self.total_steps} in all; "
            f"peak learning rate {self.peak_lr:.3g}",
            self.estimate.line(),
        ]

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, object]:
        """Runs to the end of the schedule, to `run.steps`, or until SIGTERM / SIGUSR1; returns the run's summary.

        Raises:
            TrainingError: non-finite loss, or a finding of the health watch with health.action=stop.
            BadSampleError: more samples cannot be decoded than data.max_bad allows.
        """
        run, monitor = self.config.run, self.config.monitor
        save_steps = max(1, round(run.save_every * self.steps_per_epoch))
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config.as_dict(), sort_keys=False))
        log = RunLog(self.folder, self.step, self.total_steps)
        batches = self.batches()
        try:
            with _signals(self._ask_to_stop):
                for line in self.describe():
                    log.say(line)
                while self.step < self.last_step and not self.stop_requested():
                    self.train_step(batches)
                    log.progress()
                    epoch, into = divmod(self.step, self.steps_per_epoch)
                    if self.step % run.log_every == 0:
                        self.record(log)
                    aside = time.perf_counter()
                    if self.step % save_steps == 0:
                        self._save_last(log)
                    if into == 0 and run.keep_every and epoch % run.keep_every == 0:
                        self.drain(log)
                        self.save(self.folder / f"epoch-{epoch:04d}.pt")
                    if into == 0 and monitor.every and epoch % monitor.every == 0:
                        self._measure(log)
                    if into == 0 and monitor.pictures_every and epoch % monitor.pictures_every == 0:
                        self._draw()
                    self.clock.skip(time.perf_counter() - aside)
                self.record(log)
                self._save_last(log)
                self._draw()
                return self._summarise(log)
        finally:
            batches.close()
            self.loader.close()
            log.close()

    def _ask_to_stop(self) -> None:
        self.stopping = True

    def _save_last(self, log: RunLog) -> None:
        self.drain(log)
        if self.step != self.saved_step:
            self.save(self.last_checkpoint)
            self.saved_step = self.step

    def _summarise(self, log: RunLog) -> dict[str, object]:
        summary = {
            "step": self.step,
            "total_steps": self.total_steps,
            "finished": self.step == self.total_steps,
            "seconds": round(time.perf_counter() - self.begin, 1),
            "checkpoint": str(self.last_checkpoint),
            "bad_samples": len(self.loader.bad),
            **{key: value for key, value in self.last_record.items() if key != "step"},
        }
        if self.knn is not None:
            summary["knn_top1"] = self.knn
        if distributed.is_main():
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if self.stopping:
            log.say(f"asked to stop: step {self.step} is saved in {self.last_checkpoint}; the same command continues")
        return summary


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _set_threads(threads: int, device: torch.device) -> None:
    if threads:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and distributed.local_world() > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // distributed.local_world()))


def _step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of drop path and the like in one micro-batch: a function of where the run stands, so a resume repeats it."""
    return zlib.crc32(struct.pack("<4Q", seed, step, micro, rank))


def _compile(method: nn.Module) -> None:
    """Compiles the repeated parts of the backbones (blocks, stages) where they stand; state-dict keys do not change."""
    for module in method.modules():
        if isinstance(module, ViT):
            for block in module.blocks:
                block.compile()
        elif isinstance(module, ResNet):
            for stage in (module.layer1, module.layer2, module.layer3, module.layer4):
                stage.compile()


@contextlib.contextmanager
def _signals(stop) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (a scheduler's warning before the end of a job) call `stop` while the block runs."""
    kinds = (signal.SIGTERM, signal.SIGUSR1)
    previous = [signal.signal(kind, lambda *_: stop()) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)


def pretrain(config: Config) -> dict[str, object]:
    """Builds the run and trains it; see `Trainer`. Returns the summary that summary.json holds."""
    try:
        return Trainer(config).train()
    finally:
        distributed.stop()
