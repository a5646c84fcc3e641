"""The one training loop: pretraining, fine-tuning, segmentation, detection and attentive probes all run here.

A run brings what is its own (batches, loss, schedule, what it measures on the way); `Run` has what all of them share:
processes, arithmetic, accumulation, randomness, the stop at a loss that is not finite, log lines, checkpoints, signals.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import struct
import threading
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import ConfigError, plain
from fastssl.training import checkpoint, distributed
from fastssl.training.batch_norm import synchronise_batch_norm
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.training.heartbeat import Heartbeat
from fastssl.training.log import Clock, MetricRing, RunLog
from fastssl.training.masters import Masters
from fastssl.training.numbers import Numbers
from fastssl.training.optim import Optimizer, clip_gradients
from fastssl.training.shard import Shards
from fastssl.training.snapshot import Saver
from fastssl.training.timing import section

LOG_EVERY = 50  # optimizer steps between two readings of the scalars
B = TypeVar("B")  # a micro-batch
R = TypeVar("R")  # what a run returns


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what is kept."""


class Stopped(RuntimeError):
    """A signal ended the run before its last step; all is saved.

    Attributes:
        code: exit code for the command, 128 + the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Pace:
    """How many steps a run has and how one is made.

    Attributes:
        total_steps: optimizer steps of the whole schedule.
        steps_per_epoch: optimizer steps per pass over the data.
        images_per_step: images of one optimizer step, over all processes and micro-batches.
        accumulate: micro-batches per optimizer step.
        seed: of the run.
        save_every: optimizer steps between two checkpoints.
        log_every: optimizer steps between two readings of the scalars on the device.
        last_step: where this start of the run ends; None: at total_steps.
        clip_grad, clip_each: see `optim.clip_gradients`.
    """

    total_steps: int
    steps_per_epoch: int
    images_per_step: int
    accumulate: int = 1
    seed: int = 0
    save_every: int = 1000
    log_every: int = LOG_EVERY
    last_step: int | None = None
    clip_grad: float = 0.0
    clip_each: bool = False


class Run(ABC, Generic[B, R]):
    """One training on this process (one of several under torchrun). `train()` brings it to its end.

    A subclass builds its data, network and optimizer, then calls `prepare`. `B` is its micro-batch, `R` its result.
    """

    kind: ClassVar[str]  # of its checkpoints
    folder_option: ClassVar[str] = "--dir"
    change_option: ClassVar[str] = ""  # names keys that may differ from the checkpoint's
    file_name: ClassVar[str] = "last.pt"
    salt: ClassVar[bytes] = b""  # keeps the randomness of different kinds of runs apart
    ends_if_not_finite: ClassVar[tuple[str, ...]] = ("loss", "grad_norm")
    scales_loss: ClassVar[bool] = True  # where autocast is to float16
    loggers: Sequence[str] = ()  # beside TensorBoard
    hang_s: float = 600.0  # seconds that the run may stand still, see `heartbeat`; 0: for ever

    # -- what a run brings ---------------------------------------------------------------------------------------------

    @abstractmethod
    def micro_batches(self) -> Generator[B, None, None]:
        """Micro-batches of this process, from the present step on, without end or up to the last step."""

    @abstractmethod
    def losses(self, batch: B) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch (through `self.parallel`, under autocast) and detached scalars for the log."""

    @abstractmethod
    def schedule(self) -> dict[str, float]:
        """Sets the optimizer's learning rate (and the like) for the present step; returns what the log line says."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a continuation must have in common with this run, as plain values."""

    def may_change(self) -> Collection[str]:
        """Keys of the fingerprint that the user lets differ from the checkpoint's."""
        return ()

    @abstractmethod
    def sample_ids(self, batch: B) -> list[Any]:
        """Names or numbers of the batch's samples, for the message on a loss that is not finite."""

    @abstractmethod
    def record(self) -> Checkpoint:
        """The run's checkpoint record: configuration, network, and what only this kind keeps."""

    @abstractmethod
    def finish(self) -> R:
        """After the last step: judges, and returns the result."""

    def restore(self, saved: Checkpoint) -> None:
        """Takes back what only this kind keeps in `saved.extra`."""

    def describe(self) -> list[str]:
        """Lines that are printed before the first step."""
        return []

    def on_device(self, batch: B) -> B:
        """The batch as `losses` takes it."""
        return batch

    def scheduled(self) -> dict[str, float]:
        """Further numbers of the present step that `losses` reads from `self.numbers`; the same names at every step."""
        return {}

    def gradient_factors(self) -> list[tuple[Sequence[Tensor], Tensor]]:
        """Parameters whose gradients are multiplied by a number on the device; 0: they stay as they are."""
        return []

    def after_backward(self) -> None:
        """Between the backward passes and the optimizer, on unscaled gradients."""

    def after_step(self) -> None:
        """After the optimizer (a moving average of the weights, for example)."""

    def begin(self) -> None:
        """Before the first step of this start."""

    def observe(self, steps: list[int], rows: list[dict[str, float]]) -> None:
        """Sees every step's scalars (means over the processes) once, when they are read from the device."""

    def between(self) -> None:
        """After a step and its checkpoint: measurements on the way. Its time is not counted as training."""

    def kept_files(self) -> list[Path]:
        """After a step, before `between`: where its checkpoint is to be kept, beside the last one."""
        return []

    def logged(self, line: dict[str, float]) -> None:
        """Sees every log line."""

    def stopped(self, message: str, code: int) -> R:
        """What `train` does after a signal ended it and all is saved."""
        raise Stopped(message, code)

    # -- getting ready -------------------------------------------------------------------------------------------------

    def prepare(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        pace: Pace,
        *,
        folder: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        masters: Masters | None = None,
    ) -> None:
        """Takes what is trained, and goes to where the run folder's checkpoint stands.

        Args:
            network: on its device, in training mode; its batch norms are synchronised over the processes.
            optimizer: of its parameters.
            pace: the run's numbers.
            folder: for the checkpoint and the logs; None: nothing is kept.
            device: where it computes.
            dtype: of autocast; float32: none.
            masters: float32 values of the network's working copies, or its shards; None: it has neither.

        Raises:
            CheckpointError: the folder's checkpoint is not of this run, or another one on other processes.
        """
        self.network, self.optimizer, self.pace = network, optimizer, pace
        self.folder, self.device, self.dtype = folder, device, dtype
        self.graph: Callable[[B, bool], tuple[Tensor, dict[str, Tensor]]] | None = None  # takes the place of one_pass
        self.masters, self.numbers = masters or Masters(network, torch.float32), Numbers(device)
        if distributed.world() > 1:
            synchronise_batch_norm(network, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.scales_loss and dtype == torch.float16)
        self.begun = time.perf_counter()
        self.changes: list[str] = []  # what was asked to differ from the checkpoint
        self.step = 0
        self.saved_step = 0  # of the checkpoint that is there whole; 0: there is none
        self.asked_step = 0  # of the last one that was begun
        self.saver = Saver(self.write, device)
        self.signal = 0  # number of the signal that asked the run to stop
        self.ring, self.clock, self.agreement = MetricRing(), Clock(), distributed.Agreement(self.hang_s)
        self.recent_ids: dict[int, list[Any]] = {}  # step -> this process's sample ids, since the last reading
        self.unlogged: list[dict[str, float]] = []  # scalars of the steps since the last log line
        self.timed = 0  # how many of these steps this start has made
        self.rates: dict[str, float] = {}
        self.found = checkpoint.stamp(self.path)
        if self.path is not None and self.path.exists():
            if isinstance(self.masters, Shards):
                self._resume(*checkpoint.read_hollow(self.path, self.kind))
            else:
                self._resume(checkpoint.read(self.path, self.kind))
        steps = distributed.gather(torch.tensor([self.step], device=device)).tolist()
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{folder}: the processes have found the run at different steps ({min(steps)} to {max(steps)}); "
                f"{self.folder_option} must name one folder that all machines see"
            )

    @property
    def path(self) -> Path | None:
        """The file that the run continues from."""
        return None if self.folder is None else self.folder / self.file_name

    @property
    def last_step(self) -> int:
        """Where this start of the run ends."""
        last = self.pace.last_step
        return self.pace.total_steps if last is None else min(last, self.pace.total_steps)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.pace.steps_per_epoch

    @functools.cached_property
    def parallel(self) -> nn.Module:
        """The network as the processes train it together."""
        if distributed.world() == 1 or isinstance(self.masters, Shards):
            return self.network
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch 2.14 renames the option, 2.11 knows the old name alone
            parallel = DistributedDataParallel(self.network, device_ids=devices, broadcast_buffers=False)
        if len(self.masters):
            # Without annotations: PyTorch compares them with types, and here they are texts.
            parallel.register_comm_hook(None, lambda _, bucket: distributed.sum_in_float32(bucket))
        return parallel

    def _resume(self, saved: Checkpoint, shards: Mapping[str, Any] | None = None) -> None:
        self.changes = saved.check(self.fingerprint(), self.folder_option, self.may_change(), self.change_option)
        try:
            if isinstance(self.masters, Shards):
                self.masters.localise(saved, self.optimizer, shards or {})
            self.masters.load_state_dict(saved.network)
            self.optimizer.load_state_dict(saved.optimizer)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path} does not fit this network ({' '.join(str(error).split())[:160]}); "
                f"use the configuration that it was made with, or name another folder with {self.folder_option}"
            ) from None
        self.scaler.load_state_dict(saved.scaler)
        self.step = self.saved_step = self.asked_step = saved.step
        self.unlogged = list(saved.extra.get("unlogged", []))
        self.restore(saved)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> R:
        """Runs to the last step, or until SIGTERM, SIGUSR1 or Ctrl-C, which save a checkpoint first.

        Raises:
            TrainingError: a loss is not finite.
            Stopped: a signal ended the run (pretraining returns its summary instead, but for Ctrl-C).
        """
        stream = self.micro_batches()
        heart = Heartbeat(self.hang_s)
        with heart, self.logging() as self.log, signals(self.ask_to_stop), contextlib.closing(stream), self.saver:
            for line in self.describe():
                self.log.say(line)
            self.begin()
            self.clock.read()  # what was before the first step is no part of its speed
            while self.step < self.last_step and not self.agreement(self.signal > 0):
                heart.begin_step(self.step)
                self.train_step(stream)
                self.saver.check()
                self.log.progress()
                if self.step % self.pace.log_every == 0:
                    self.log_line()
                heart.aside()
                with self.clock.aside():
                    kept = self.kept_files()
                    if self.step % self.pace.save_every == 0 or kept:
                        self.save_last(also=kept)
                    with section("between"):
                        self.between()
            heart.aside()
            self.agreement.close()
            self.log_line()
            self.save_last(wait=True)
            if self.step < self.last_step:
                return self._stop()
            return self.finish()

    def train_step(self, stream: Iterator[B]) -> None:
        """One optimizer step; asks the device nothing."""
        pace = self.pace
        self.rates = self.schedule()
        self._write_numbers()
        ids, losses, metrics = [], [], []
        for micro in range(pace.accumulate):
            with section("data"), self.clock.waiting():
                batch = next(stream)
            ids += self.sample_ids(batch)
            torch.manual_seed(self.step_seed(micro))
            with section("augment"):
                batch = self.on_device(batch)
            with self.quiet(micro):
                loss, terms = self.one_pass(batch) if self.graph is None else self.graph(batch, micro == 0)
            losses.append(loss)
            metrics.append(terms)
        with section("optimizer"):
            if isinstance(self.masters, Shards):
                self.masters.exchange()
            self.scaler.unscale_(self.optimizer)
            self.after_backward()
            norm = self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        with section("ema"):
            self.after_step()
        self.step += 1
        self.recent_ids[self.step] = ids
        if len(losses) == 1:
            scalars = {"loss": losses[0], "grad_norm": norm, **metrics[0]}
        else:
            mean = {key: torch.stack([m[key] for m in metrics]).mean() for key in metrics[0]}
            scalars = {"loss": torch.stack(losses).mean(), "grad_norm": norm, **mean}
        self.ring.add(self.step, scalars)

    def one_pass(self, batch: B) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward pass of a micro-batch: its loss, detached, and scalars for the log."""
        with section("forward"), self.autocast():
            loss, terms = self.losses(batch)
        with section("backward"):
            self.scaler.scale(loss / self.pace.accumulate).backward()
        return loss.detach(), terms

    def _write_numbers(self) -> None:
        """Sends the step's numbers to the device."""
        values: dict[str, float | list[float]] = {**self.scheduled()}
        if isinstance(self.optimizer, Optimizer):
            values["optimizer"] = self.optimizer.host_numbers()
        if values:
            self.numbers.write(values)
            if isinstance(self.optimizer, Optimizer):
                self.optimizer.numbers = self.numbers["optimizer"]

    def _clip(self) -> Tensor:
        """Clips the gradients, now or in the optimizer's own pass; their norm before that."""
        pace = self.pace
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer.clip(pace.clip_grad, pace.clip_each, self.gradient_factors())
        return clip_gradients(self.network, pace.clip_grad, pace.clip_each)

    def autocast(self) -> AbstractContextManager:
        """The run's arithmetic."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def quiet(self, micro: int) -> AbstractContextManager:
        """No exchange of gradients but after the last micro-batch."""
        parallel = self.parallel
        if isinstance(self.masters, Shards):
            self.masters.last_pass(micro == self.pace.accumulate - 1)
        if micro == self.pace.accumulate - 1 or not isinstance(parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return parallel.no_sync()

    def step_seed(self, micro: int) -> int:
        """Seed of drop path and the like in a micro-batch: a function of where the run stands, so it is repeatable."""
        return zlib.crc32(self.salt + struct.pack("<4Q", self.pace.seed, self.step, micro, distributed.rank()))

    # -- between steps -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def logging(self) -> Iterator[RunLog]:
        """The run's log, open while the loop runs; the folder is this run's alone meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                if self.folder is not None and distributed.is_main():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(checkpoint.locked(self.folder, self.folder_option))
                    if checkpoint.stamp(self.path) != self.found:
                        raise checkpoint.InUseError(f"{self.path} has moved on since this start read it; start again")
                log = RunLog(self.folder, self.step, self.last_step, self.pace.images_per_step, self.loggers)
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder} cannot be written ({error.strerror}); free some space, or choose another "
                    f"{self.folder_option}"
                ) from None
            if log.told:
                self.unlogged.clear()
            yield stack.enter_context(contextlib.closing(log))

    def read_scalars(self) -> None:
        """Reads the scalars since the last reading; stops where one is not finite."""
        steps, own, mean = self.ring.drain()
        watched = [key for key in self.ends_if_not_finite if key == "loss" or not self.scaler.is_enabled()]
        broken = [(s, key) for s, row in zip(steps, own, strict=True) for key in watched if not math.isfinite(row[key])]
        if distributed.any_process(bool(broken), self.device):
            self.saver.wait()  # weights that are not finite come before the loss that they make
            raise TrainingError(self._non_finite(broken))
        self.recent_ids.clear()
        self.unlogged += mean
        self.timed += len(mean)
        self.observe(steps, mean)

    def _non_finite(self, broken: list[tuple[int, str]]) -> str:
        if not broken:
            return f"another process met a loss that is not finite near step {self.step}; kept: {self.kept()}"
        step, what = broken[0]
        ids = self.recent_ids.get(step, [])
        return (
            f"step {step}: the {'loss' if what == 'loss' else 'gradient norm'} is not finite; "
            f"samples of that step: {ids}; try a smaller learning rate; kept: {self.kept()}"
        )

    def kept(self) -> str:
        """What a message says of the last checkpoint; waits for one that is being written."""
        self.saver.settle()
        return f"{self.path} (step {self.saved_step})" if self.saved_step else "no checkpoint yet"

    def log_line(self) -> None:
        """Writes one log line: means over the steps since the last one."""
        self.read_scalars()
        if not self.unlogged:
            return
        elapsed, waited = self.clock.read()
        rows, timed = self.unlogged, self.timed
        self.unlogged, self.timed = [], 0
        line = {
            "step": self.step,
            "epoch": self.epoch,
            **{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]},
            **self.rates,
            "images_per_s": timed * self.pace.images_per_step / elapsed,
            "data_wait": waited,
        }
        self.log.record(line)
        self.logged(line)

    def save_last(self, again: bool = False, wait: bool = False, also: Sequence[Path] = ()) -> None:
        """Begins to write the checkpoint of this moment, unless there is one of this step already.

        Args:
            again: in any case.
            wait: until it is there.
            also: further files to write it to.
        """
        with section("save"):
            self.read_scalars()
            if self.path is None:
                return
            if again or self.step != self.asked_step:
                self.save(self.path, *also)
                if not distributed.is_main() and not isinstance(self.masters, Shards):
                    self.saved_step = self.asked_step  # the main process has waited for it
                self.asked_step = self.step
            if wait:
                self.saver.wait()
                distributed.barrier()
                self.saved_step = self.asked_step

    def save(self, path: Path, *also: Path) -> None:
        """Takes a copy of this moment, which a thread writes (main process; the others wait for the copy)."""
        sharded = isinstance(self.masters, Shards)
        if distributed.is_main() or sharded:
            saved = self.record()
            saved.step, saved.fingerprint = self.step, self.fingerprint()
            saved.extra["unlogged"] = self.unlogged
            saved.optimizer, saved.scaler = self.optimizer.state_dict(), self.scaler.state_dict()
            if sharded:
                for one in (path, *also):
                    self._write_shards(one, saved)
            else:
                self.saver.save(path, saved, *also)
        distributed.barrier()

    def _write_shards(self, path: Path, saved: Checkpoint) -> None:
        """Writes a record of which every process has a part; all of them write, and training waits."""
        broken = [key for key, value in saved.network.items() if not _finite(value)]
        if distributed.any_process(bool(broken), self.device):
            where = f"{broken[0]} and {len(broken) - 1} more" if broken else "another process's"
            raise TrainingError(
                f"step {saved.step}: {where} tensors of the network are not finite; nothing is written; "
                f"kept: {self.kept()}"
            )
        cast(Shards, self.masters).write(path, saved, self.optimizer)
        if path == self.path:
            self.saved_step = saved.step

    def write(self, path: Path, saved: Checkpoint) -> None:
        """Writes a record, in the saver's thread; one with values that are not finite never."""
        broken = [key for key, value in saved.network.items() if not _finite(value)]
        if broken:
            raise TrainingError(
                f"step {saved.step}: {broken[0]} and {len(broken) - 1} more tensors of the network are not finite; "
                f"nothing is written; kept: {self.kept()}"
            )
        checkpoint.write(path, saved, progress=self.saver.progress)
        if path == self.path:
            self.saved_step = saved.step

    # -- asked to stop -------------------------------------------------------------------------------------------------

    def ask_to_stop(self, number: int) -> None:
        """Ends the loop after the present step; a second Ctrl-C, or one where nothing is kept, ends it at once."""
        if number == signal.SIGINT and (self.signal or self.folder is None):
            raise KeyboardInterrupt
        self.signal = number

    def _stop(self) -> R:
        number = self.signal or signal.SIGTERM  # another process was asked
        name = signal.Signals(number).name
        where = "nothing was to be kept"
        if self.path is not None:
            where = f"step {self.step} is saved in {self.path}; the same command continues"
        return self.stopped(f"asked to stop ({name}): {where}", 128 + number)


def _finite(value: Tensor) -> bool:
    value = value.to_local() if isinstance(value, DTensor) else value
    return not value.is_floating_point() or bool(value.isfinite().all())


@contextlib.contextmanager
def signals(stop: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGUSR1 (a scheduler's warning before the end of a job) and Ctrl-C call `stop` while the block runs."""
    main = threading.current_thread() is threading.main_thread()  # Python has handlers there alone
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if main else ()
    previous = [signal.signal(kind, lambda number, _: stop(number)) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)


# -- what runs on labelled data say alike ------------------------------------------------------------------------------

FREE = (  # may change when a run goes on
    *("dir", "val", "allow_shared", "workers", "device", "precision", "batch_size", "accumulate"),
)


def settings(options: Any, *free: str) -> dict[str, Any]:
    """The fields of an options dataclass that a continuation must have in common, as plain values.

    Args:
        options: the dataclass.
        free: further fields than `FREE` that may change.
    """
    return {key: value for key, value in plain(vars(options)).items() if key not in FREE and key not in free}


def count_steps(images: int, batch_size: int, accumulate: int, data: str, what: str = "images") -> tuple[int, int]:
    """(images per optimizer step, optimizer steps per epoch).

    Raises:
        ConfigError: there are fewer images than one optimizer step takes.
    """
    images_per_step = batch_size * accumulate * distributed.world()
    if images < images_per_step:
        raise ConfigError(
            f"{data} has {images} {what}, fewer than one optimizer step takes: {images_per_step} "
            "(batch_size x accumulate x processes)"
        )
    return images_per_step, images // images_per_step


def run_folder(name: str, checkpoint: str, kind: str) -> Path:
    """The folder `name`; if empty, the folder `kind` beside the checkpoint, or runs/`kind` for a library's model."""
    if name:
        return Path(name)
    return (Path(checkpoint).parent if Path(checkpoint).is_file() else Path("runs")) / kind
