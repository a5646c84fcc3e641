"""Notices that a run stands still, says who does, and ends it, so that torchrun or the scheduler starts it again.

A thread of every process tells the process group's store, once per second, that it lives and where the main thread is.
A run stands still when no main thread has moved for a given time; while one moves, the others may wait for it. In a
step it moves when it enters another section; between steps, when it computes (in one place only for `ALONE` times as
long: who waits for a GPU has a core too). Bytes that the disk takes of a checkpoint are movement. Time is counted in
beats: a process that was stopped, or a machine that slept, has waited for one beat, not for hours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import distributed_c10d

from fastssl.training import distributed
from fastssl.training.timing import place

HUNG = 75  # exit code: EX_TEMPFAIL of sysexits.h, try again
BEAT = 1.0  # seconds
WATCHERS = 2  # processes that read all others' beats: the first ones that live
FREE_STEPS = 10  # of a start: they compile and capture, so computing counts as movement, as it does between steps
ALONE = 2  # times the given one: so long does computing in one place count as movement
COMPUTES = 0.005  # share of a beat that a main thread which moves has a core; one that waits in small portions has less


@dataclass(frozen=True)
class Beat:
    """What a process says of itself.

    Attributes:
        count: of its beats.
        still: seconds that its main thread has not moved.
        step: optimizer step that it makes, or has made last.
        moves: sections entered since that step began.
        section: the last one entered.
        frame: the package's line that is being executed.
        waits: whether that is an exchange with other processes.
        debugged: whether a debugger holds the main thread.
        left: the loop has ended here.
        host, pid: the process.
    """

    count: int = 0
    still: float = 0.0
    step: int = 0
    moves: int = 0
    section: str = ""
    frame: str = ""
    waits: bool = False
    debugged: bool = False
    left: bool = False
    host: str = ""
    pid: int = 0

    def where(self) -> str:
        """In words."""
        return f"step {self.step} in '{self.section}' ({self.frame})"


def judge(beats: Sequence[Beat | None], silent: Sequence[float], hang_s: float) -> tuple[int, str] | None:
    """The rank that the others wait for and a line on it, once nobody has moved for so long; else None.

    Args:
        beats: of every rank the last one heard; None: none yet.
        silent: seconds since then.
        hang_s: the time.
    """
    known = [beat or Beat(section="start", frame="not heard of yet") for beat in beats]
    idle = [beat.still + quiet for beat, quiet in zip(known, silent, strict=True)]
    if min(idle) < hang_s or any(beat.debugged for beat in known):
        return None
    lost = [quiet > hang_s / 2 and not beat.left for beat, quiet in zip(known, silent, strict=True)]

    def order(rank: int) -> tuple:
        beat = known[rank]
        return not lost[rank], beat.waits, beat.left, beat.step, beat.moves, -beat.still

    rank = min(range(len(known)), key=order)
    beat = known[rank]
    does = "has been gone" if beat.left else "has not answered" if lost[rank] else "has stood still"
    who = f"rank {rank} (process {beat.pid or '?'} on {beat.host or '?'})"
    places: dict[str, list[str]] = {}
    for other, its in enumerate(known):
        if other != rank:
            places.setdefault(f"at {its.where()}" if not lost[other] else "not heard of", []).append(str(other))
    waiting = [f"{', '.join(ranks[:8])}{', ..' if len(ranks) > 8 else ''} {at}" for at, ranks in places.items()]
    others = f"; the others wait: {'; '.join(waiting[:4])}" if waiting else ""
    return rank, f"{who} {does} for {idle[rank]:.0f} s, at {beat.where()}{others}; the job ends with code {HUNG}"


class Heartbeat:
    """The watch, as a context around a loop of the main thread; all processes of a group enter it.

    Args:
        hang_s: seconds without movement that end the job; 0: it does not watch.
    """

    _contexts = itertools.count()

    def __init__(self, hang_s: float) -> None:
        self.hang_s, self.every = hang_s, min(BEAT, hang_s / 5)
        self.rank, self.world = distributed.rank(), distributed.world()
        self.step = self.made = self.begun = self.count = 0
        self.strict = False  # only another section is movement
        self.still = self.alike = self.computed = 0.0
        self.before: tuple = ()
        self.beats: list[Beat | None] = [None] * self.world
        self.silent = [0.0] * self.world
        self.store: Any = None
        self.main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        name = f"heartbeat/{next(self._contexts)}"  # the same on every process
        if self.hang_s:
            distributed.be_patient(self.hang_s)
            if self.world > 1:
                store: Any = distributed_c10d._get_default_store()
                if store.has_extended_api():  # one over the network: a connection of its own, which may wait by itself
                    store = store.clone()
                    store.set_timeout(timedelta(seconds=2 * self.every))
                self.store = distributed_c10d.PrefixStore(name, store)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(4 * self.every)
            with contextlib.suppress(RuntimeError):  # the store may have gone
                self._tell(self._look(0.0, left=True))

    def begin_step(self, step: int) -> None:
        """A step of the loop begins; `step` were made before it. It moves by its sections."""
        self.step, self.begun, self.made = step + 1, place.entered, self.made + 1
        self.strict = self.made > FREE_STEPS

    def aside(self) -> None:
        """Up to the next step there is other work, an evaluation say: a main thread that computes moves."""
        self.strict = False

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.every):
            now = time.monotonic()
            passed, last = min(now - last, 4 * self.every), now
            self._beat(passed)

    def _beat(self, passed: float) -> None:
        mine = self._look(passed)
        self.beats[self.rank], self.silent[self.rank] = mine, 0.0
        verdict = ""
        try:
            verdict = self._exchange(mine, passed)
        except RuntimeError:  # the store does not answer: its process is gone or stopped
            for rank in range(self.world):
                self.silent[rank] += passed if rank != self.rank else 0.0
        if not verdict and self._watching():
            found = judge(self.beats, self.silent, self.hang_s)
            if found is not None:
                self._say(*found)
        if verdict:
            self._end_job(int(verdict.split()[1]))

    def _look(self, passed: float, left: bool = False) -> Beat:
        """Where the main thread is."""
        stack = list(_frames(sys._current_frames().get(self.main)))
        files = [frame.f_code.co_filename for frame in stack]
        seen = () if self.strict else tuple((frame.f_code, frame.f_lasti) for frame in stack)
        now = (place.entered, place.written, self.made, self.strict, seen)
        waits = any("distributed" in file or file.endswith("autograd/graph.py") for file in files[:4])
        computed, before = _computed(self.main), self.computed
        computes = not self.strict and not waits and computed - before > COMPUTES * passed
        self.alike = self.alike + passed if now == self.before else 0.0
        moves = not self.alike or (computes and self.alike <= ALONE * self.hang_s)
        self.still = 0.0 if moves else self.still + passed
        self.before, self.computed = now, computed
        self.count += 1
        ours = [frame for frame in stack if "fastssl" in Path(frame.f_code.co_filename).parts] or stack
        code = ours[0].f_code if ours else None
        return Beat(
            count=self.count,
            still=round(self.still, 2),
            step=self.step,
            moves=place.entered - self.begun,
            section=place.name,
            frame=f"{Path(code.co_filename).name}:{ours[0].f_lineno}, {code.co_name}" if code else "",
            waits=waits,
            debugged=any(Path(file).name in ("bdb.py", "pdb.py") or "pydevd" in file for file in files),
            left=left,
            host=platform.node(),
            pid=os.getpid(),
        )

    def _tell(self, mine: Beat) -> None:
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(asdict(mine)))

    def _exchange(self, mine: Beat, passed: float) -> str:
        """Tells the others this process's beat and hears theirs; the verdict if one has been given."""
        if self.store is None:
            return ""
        self._tell(mine)
        everyone = range(self.world if self._watching() else min(WATCHERS, self.world))
        others = [rank for rank in everyone if rank != self.rank]
        there = [rank for rank in others if self.beats[rank] is not None or self.store.check([str(rank)])]
        names = [str(rank) for rank in there]
        many = self.store.has_extended_api() and names
        heard = self.store.multi_get(names) if many else [self.store.get(name) for name in names]
        for rank in others:
            self.silent[rank] += passed
        for rank, text in zip(there, heard, strict=True):
            beat, known = Beat(**json.loads(text)), self.beats[rank]
            if known is None or beat.count != known.count:
                self.beats[rank], self.silent[rank] = beat, 0.0
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""

    def _watching(self) -> bool:
        return self.rank < WATCHERS or min(self.silent[:WATCHERS]) > self.hang_s / 2

    def _say(self, rank: int, line: str) -> None:
        """Ends the job for all; one process alone prints the line."""
        mine = f"{self.rank} {rank}"
        try:
            first = self.store is None or self.store.compare_set("verdict", "", mine).decode() == mine
        except RuntimeError:
            first = True
        if first:
            self._stack(rank)
            _write(f"fastssl: error: {line}\n")
            if self.world == 1 and hasattr(sys, "ps1"):  # somebody sits at this interpreter, who may interrupt it
                self.still = 0.0
                return
            time.sleep(2 * self.every)  # the others hear the verdict before whoever started them ends them
            os._exit(HUNG)

    def _end_job(self, rank: int) -> None:
        self._stack(rank)
        os._exit(HUNG)

    def _stack(self, rank: int) -> None:
        """Prints what the main thread is doing, if this is the rank."""
        frame = sys._current_frames().get(self.main)
        if rank == self.rank and frame is not None:
            _write("".join(["fastssl: the main thread stands here:\n", *traceback.format_stack(frame)]))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A stack, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _computed(thread: int) -> float:
    """Seconds that a thread has had a core."""
    clock = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
    return time.clock_gettime(clock(thread)) if clock else 0.0


def _write(text: str) -> None:
    """To standard error, past buffers whose locks the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
