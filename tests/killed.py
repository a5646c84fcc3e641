"""A pretraining run in a process of its own that ends itself with SIGKILL at a chosen moment.

In a module by itself, so that processes can be forked from one that has imported everything: a start costs a fork.
"""

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fastssl import cli
from fastssl.config import Config
from fastssl.pretraining.trainer import Trainer, pretrain
from fastssl.training import distributed
from fastssl.training.log import RunLog


@dataclass(frozen=True)
class Moment:
    """When a process kills itself.

    Attributes:
        event: at the so manieth of its events: a step begins, a file of the run folder is half written, is written, is
            put in its place, stands there; half a line of the log is written.
        delay: seconds later, wherever it may be by then. 0: at the event itself.
        share: how much of a half-written file is there.
        rank: the process that dies.
    """

    event: int
    delay: float = 0.0
    share: float = 0.5
    rank: int = 0


def start(world: int, config: Config, meeting: str, moment: Moment | None = None) -> list[int]:
    """Runs pretraining on so many processes until each has ended; their exit codes. As under torchrun, the others are
    asked to end when one has died, and killed where they cannot hear it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastssl.pretraining.trainer", "torch.utils.tensorboard", "numba.np.arraymath"])
    processes = [context.Process(target=_run, args=(rank, world, config, meeting, moment)) for rank in range(world)]
    for process in processes:
        process.start()
    processes[moment.rank if moment else 0].join(120)
    for process in processes:
        if moment:
            process.terminate()
            process.join(30)
            process.kill()
        process.join(120)
    return [process.exitcode for process in processes]


def _run(rank: int, world: int, config: Config, meeting: str, moment: Moment | None) -> None:
    with open(f"{meeting}.{rank}.txt", "w") as words:
        os.dup2(words.fileno(), sys.stderr.fileno())
        if world > 1:
            where = {"init_method": f"file://{meeting}", "rank": rank, "world_size": world}
            torch.distributed.init_process_group("gloo", **where)
        if moment is not None and moment.rank == rank:
            _watch(moment)
        _note_images(f"{meeting}.{rank}.images")
        cli._run = lambda *_: 0 if pretrain(config) else 1
        sys.exit(cli.main(["pretrain"]))


def hang(config: Config, faults: list[str]) -> None:
    """Pretraining, with a fault at the start of a step: the n-th fault in the n-th life of a process that torchrun
    starts again. "stopped": rank 1 is stopped by a signal; "loader": the last rank's loader gives no more batches;
    "evaluation": rank 0 takes longer between two steps than a run may stand still."""
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    fault = faults[life] if life < len(faults) else ""
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    step, batches, between = Trainer.train_step, Trainer.micro_batches, Trainer.between

    def stopped(self, stream):
        if self.step == self.first_step + 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        step(self, stream)

    def stuck(self):
        for batch in batches(self):
            if self.step == self.first_step + 2:
                time.sleep(1000)
            yield batch

    def slow(self):
        between(self)
        if self.step == self.first_step + 2:
            if rank == 0:
                begin = time.monotonic()
                while time.monotonic() < begin + 2 * config.run.hang_s:
                    time.sleep(0.01)
                    sum(range(30_000))
            distributed.barrier()

    if fault == "stopped" and rank == 1:
        Trainer.train_step = stopped
    if fault == "loader" and rank == last:
        Trainer.micro_batches = stuck
    if fault == "evaluation":
        Trainer.between = slow
    pretrain(config)


def _note_images(path: str) -> None:
    """Lets the run write down which images each of its steps takes, before the step can have been made."""
    sample_ids = Trainer.sample_ids

    def noted(self, batch):
        ids = sample_ids(self, batch)
        with open(path, "a") as file:
            file.write(json.dumps([self.step, ids]) + "\n")
        return ids

    Trainer.sample_ids = noted


def _watch(moment: Moment) -> None:
    left = moment.event
    lock = threading.Lock()  # checkpoints are written in a thread

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def passed(before=lambda: None) -> None:
        """An event; `before` leaves things as they are in the middle of it."""
        nonlocal left
        with lock:
            left -= 1
            now = left == 0
        if now and moment.delay:
            threading.Timer(moment.delay, kill).start()
        elif now:
            before()
            kill()

    def counted(function):
        @functools.wraps(function)
        def counting(*args, **kwargs):
            passed()
            return function(*args, **kwargs)

        return counting

    whole, record, replace = torch.save, RunLog.record, os.replace

    def save(content, part):
        whole(content, part)
        part.flush()
        passed(lambda: os.truncate(part.name, int(moment.share * Path(part.name).stat().st_size)))

    def log(self, line):
        if self.files:
            passed(lambda: self.file.write(f'{{"step": {line["step"]}, "lo') and self.file.flush())
        record(self, line)

    def put(part, path):
        passed()
        replace(part, path)
        passed()

    torch.save, RunLog.record, os.replace, os.fsync = save, log, put, counted(os.fsync)
    Trainer.train_step = counted(Trainer.train_step)
