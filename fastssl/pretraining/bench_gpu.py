"""Everything about a GPU in one command, `fastssl bench gpu`: tests, proofs, kernels, steps, loader; then one page.

A part is some jobs, each a process of its own, so that none can end another. Jobs that time something prepare
themselves side by side (they import, compile, warm up), then work in turns, alone on the device. Every result is
appended to results.jsonl when it is there; what is in that file is not done again. The page is made from it after each
part.

This file imports no PyTorch: the command itself only starts, watches and ends processes. What they do is in
`fastssl.pretraining.bench_gpu_jobs`, the page in `fastssl.pretraining.bench_gpu_page`.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastssl.config import Checked, ConfigError, PositiveFloat, Run, check

# Part -> its share of the time; what one leaves over is the later ones'.
PARTS = {"tests": 30, "proofs": 20, "kernels": 20, "steps": 25, "loader": 5}
LIMIT = 235.0  # seconds, of any part
TURN = 50.0  # seconds, of one measurement
PREPARE = 0.65  # share of the time that is left, after which jobs that are not ready are ended ...
LONGEST = 110.0  # ... and in seconds
CASES = 3  # training sizes per op that are proven and timed
COPIES = 16  # times that the images are repeated, so that an epoch is long enough
SHARDS = {"in": 2, "cifar": 1}  # of the drawn image sets
IMAGES = {"in": 128, "cifar": 2048}  # images per shard

Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A row of the step table.

    Attributes:
        title: as on the page.
        config: below fastssl/configs; empty: nothing but `options`.
        images: per step.
        authors: images per second of the authors' code on one H200; None: not measured.
        before: ours at the first measurement, on the same card.
        goal: what we want there.
        data: which of the two drawn image sets.
        options: more of the recipe's options.
    """

    title: str
    config: str
    images: int
    authors: int | None = None
    before: int | None = None
    goal: int | None = None
    data: str = "in"
    options: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "dino": Recipe("DINO ViT-S/16 2+8", "imagenet/dino_vit_small.yaml", 64, 612, 900, 2000),
    "mae": Recipe("MAE ViT-B/16", "imagenet/mae_vit_base.yaml", 256, 2151, 3642, 6400),
    "scfs": Recipe("SCFS ResNet-50 2+8", "imagenet/scfs_resnet50_200ep.yaml", 64, 348, 428, 1050),
    "saae": Recipe("SAAE ViT-B/16", "imagenet/saae_vit_base.yaml", 64, 230, 1006, 1600),
    "cae": Recipe("CAE ViT-B/16", "imagenet/cae_vit_base_800ep.yaml", 64, 645, 615, 1950),
    "sit": Recipe("SiT ViT-S/16", "imagenet/sit_vit_small.yaml", 64, 622, 974, 1900),
    "semmae": Recipe("SemMAE ViT-B/16", "imagenet/semmae_vit_base_p16.yaml", 256, 2090, 3343, 6000),
    "cifar": Recipe("DINO ResNet-18, CIFAR-10", "cifar10/dino_resnet18.yaml", 512, None, 15114, 30000, data="cifar"),
}
TINY = {  # on a CPU
    "method": "mae", "model.name": "vit_tiny", "model.image_size": 32, "model.patch_size": 8, "model.width": 32,
    "model.depth": 1, "model.heads": 2, "views.main.size": 32, "mae.decoder_width": 32, "mae.decoder_depth": 1,
    "mae.decoder_heads": 2, "run.threads": 1, "data.workers": 1,
}  # fmt: skip
SMALL_RECIPES = {"tiny": Recipe("MAE, tiny, on a CPU", "", 8, options=TINY)}
SMALL_OPS = ["gather_tokens", "patch_pixel_loss"]


@dataclass
class GpuBenchOptions(Checked):
    """What `fastssl bench gpu` runs, and for how long."""

    section: ClassVar[str] = "bench"

    out: str = ""
    """Folder of the results; a second start continues what is there. Empty: docs/benchmarks/gpu/<date>-<gpu>."""
    parts: str = ",".join(PARTS)
    """Parts to run, separated by commas, in this order: tests, proofs, kernels, steps, loader."""
    minutes: PositiveFloat = 8.0
    """Time for all of them. No part takes more than 4 minutes; one that is cut short is continued by the next start."""
    again: bool = False
    """Run the parts from their beginning, even if they are done."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a small version of every part, which shows that the command works and measures nothing."""
    ops: str = ""
    """Only these ops in proofs and kernels, separated by commas. Empty: all."""
    recipes: str = ""
    """Only these recipes in steps: dino, mae, scfs, saae, cae, sit, semmae, cifar. Empty: all."""
    data: str = ""
    """Folder of the drawn images, made if it is not there. Empty: data/ in the folder of the results."""
    tests: str = "tests"
    """Folder of the project's tests."""
    job: str = ""
    """For the command itself: what one of its processes does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("parts", PARTS), ("recipes", {**RECIPES, **SMALL_RECIPES})):
            for name in listed(getattr(self, key)):
                check(name in known, self.key(key), name, f"of {', '.join(known)}")


def listed(text: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def contenders() -> dict[str, dict[str, str]]:
    """Ways to run a step, by name, the plainest first: options of `run` as far as the configuration knows them."""
    known = {one.name for one in fields(Run)}
    off = {"run.compile": "false", **({"run.graph": "never"} if "graph" in known else {})}
    ways = {"eager": off}
    if "graph" in known:
        ways["graph"] = {**off, "run.graph": "auto"}
    return {**ways, "compile": {**off, "run.compile": "true"}}


# -- what is known so far ----------------------------------------------------------------------------------------------


class Results:
    """results.jsonl: one record per line, each with a part and a key; a later record replaces an earlier of its key."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def mend(self) -> None:
        """After a crash in the middle of a line: what follows begins on a line of its own."""
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            self._append(b"\n")

    def add(self, part: str, key: str, **values: Any) -> None:
        """Appends one record; several processes may do so at once."""
        line = json.dumps({"part": part, "key": key, **values, "time": round(time.time(), 1)})
        self._append(line.encode() + b"\n")

    def _append(self, content: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, content)
        finally:
            os.close(file)

    def read(self) -> dict[tuple[str, str], Record]:
        """All records by part and key, in the order of their first appearance."""
        found: dict[tuple[str, str], Record] = {}
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
                found[record["part"], record["key"]] = record
            except (ValueError, KeyError, TypeError):  # the line that a crash cut short
                continue
        return found

    def of(self, part: str) -> dict[str, Record]:
        """The records of a part, by key."""
        return {key: record for (name, key), record in self.read().items() if name == part}

    def forget(self, part: str) -> None:
        """Drops a part's records."""
        kept = [record for (name, _), record in self.read().items() if name != part]
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        unfinished.replace(self.path)


# -- jobs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        key: its name among the part's results.
        command: what is run. With turns it prints "ready", then "done" for each turn that it reads from its input.
        turns: what it measures alone.
        good: exit codes of a job that did its work.
        always: it is run whatever is known of it.
    """

    key: str
    command: list[str]
    turns: tuple[str, ...] = ()
    good: tuple[int, ...] = (0,)
    always: bool = False

    def ends(self) -> list[str]:
        """Keys of the records that say how the job, or each of its turns, ended."""
        return [f"job {self.key} {turn}" for turn in self.turns] or [f"job {self.key}"]


class _Process:
    """A running job. Its events come through a queue: a line that it printed, or None at its end."""

    def __init__(self, job: Job, log: Path, events: queue.Queue[tuple[_Process, str | None]]) -> None:
        self.job, self.error, self.begin, self.alive = job, "", time.monotonic(), True
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                job.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
                env=environment, text=True, errors="replace",
            )  # fmt: skip
        self._events = events
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._events.put((self, line.strip()))

    def _wait(self) -> None:
        self.process.wait()
        self._reader.join(timeout=1)
        self._events.put((self, None))

    def tell(self, word: str) -> None:
        assert self.process.stdin
        with suppress(OSError):  # it has ended, and its event says so
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """Ends it and all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Runner:
    """Runs jobs and records how each ended: "done", "failed" (it will not be tried again) or "late" (it will).

    Args:
        results: where that is recorded.
        part: the part that the jobs belong to.
        log: file that takes what they print.
    """

    def __init__(self, results: Results, part: str, log: Path) -> None:
        self.results, self.part, self.log = results, part, log
        self._events: queue.Queue[tuple[_Process, str | None]] = queue.Queue()

    def run(self, jobs: list[Job], at_once: int, deadline: float) -> bool:
        """Prepares jobs side by side, then lets them take turns.

        Args:
            jobs: what to run, the most important first. What has been done or has failed before is left out.
            at_once: so many are prepared (or, without turns, run) at the same time.
            deadline: of `time.monotonic`; nothing runs after it.

        Returns:
            Whether nothing was late.
        """
        before = self.results.of(self.part)
        past = {key for key, record in before.items() if record.get("how") in ("done", "failed")}
        waiting = [job for job in jobs if job.always or not past >= set(job.ends())]
        turned = any(job.turns for job in waiting)
        left = max(deadline - time.monotonic(), 0)
        prepared = time.monotonic() + min(PREPARE * left, LONGEST) if turned else deadline
        started: list[_Process] = []
        preparing: list[_Process] = []
        ready: list[_Process] = []
        on_time = True
        try:
            while (waiting or preparing) and time.monotonic() < prepared:
                while waiting and len(preparing) < at_once:
                    preparing.append(_Process(waiting.pop(0), self.log, self._events))
                    started.append(preparing[-1])
                process, line = self._next(prepared)
                if process in preparing and line in (None, "ready"):
                    preparing.remove(process)
                    if line == "ready":
                        ready.append(process)
                    else:
                        self._ended(process)
            for process in preparing:
                process.kill()
            for job, words in [(one.job, "ended before it was done") for one in preparing] + [
                (job, "not reached") for job in waiting
            ]:
                on_time = False
                for key in job.ends():
                    self._record(key, "late", f"{words}: the part's time was up")
            turns = dict.fromkeys(turn for process in ready for turn in process.job.turns)
            for turn in turns:
                for process in ready:
                    if turn in process.job.turns and f"job {process.job.key} {turn}" not in past:
                        on_time = self._turn(process, turn, deadline) and on_time
        finally:
            for process in started:
                process.kill()
        return on_time

    def _next(self, until: float) -> tuple[_Process | None, str | None]:
        """The next event; (None, "") if there is none for a while."""
        try:
            process, line = self._events.get(timeout=max(0.0, min(1.0, until - time.monotonic())))
        except queue.Empty:
            return None, ""
        if line is None:
            process.alive = False
        elif line.startswith("error "):
            process.error = line.removeprefix("error ")
        return process, line

    def _turn(self, process: _Process, turn: str, deadline: float) -> bool:
        """Lets a process measure; whether it did so, or failed, in time."""
        key, begin = f"job {process.job.key} {turn}", time.monotonic()
        if begin >= deadline:
            self._record(key, "late", "not reached: the part's time was up")
            return False
        process.tell(turn)
        until = min(deadline, begin + TURN)
        while process.alive and time.monotonic() < until:
            one, line = self._next(until)
            if one is process and line == "done":
                self._record(key, "done", seconds=time.monotonic() - begin)
                return True
        if process.alive:
            process.kill()
            process.alive, process.error = False, "ended earlier, because it took too long"
            self._record(key, "late", f"took more than {time.monotonic() - begin:.0f} s")
            return False
        self._record(key, "failed", self._reason(process))
        return True

    def _ended(self, process: _Process) -> None:
        """Records the end of a process that is no longer there."""
        good = process.process.returncode in process.job.good and not process.job.turns
        for key in process.job.ends():
            if good:
                self._record(key, "done", seconds=time.monotonic() - process.begin)
            else:
                self._record(key, "failed", self._reason(process))

    def _reason(self, process: _Process) -> str:
        code = process.process.poll()
        return process.error or f"the process ended with exit code {code}; see {self.log.name}"

    def _record(self, key: str, how: str, error: str = "", seconds: float = 0.0) -> None:
        more = {"error": error} if error else {"seconds": round(seconds, 1)}
        self.results.add(self.part, key, how=how, **more)


# -- the command -------------------------------------------------------------------------------------------------------


@dataclass
class GpuBench:
    """The result: where it lies, the page, all records, and whether everything was done and nothing failed."""

    out: str
    page: str
    records: list[Record]
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        return {"out": self.out, "ok": self.ok, "records": self.records}

    def table(self) -> str:
        return f"{self.page}\n{self.out}/README.md"


def bench(options: GpuBenchOptions) -> GpuBench:
    """Tests, proofs, kernels, steps and loader on this machine's GPU, part by part, and one page with the results.

    Raises:
        ConfigError: no GPU.
    """
    with _signals_raise():
        return _Bench(options).run()


class _Bench:
    def __init__(self, options: GpuBenchOptions) -> None:
        self.options, self.small = options, options.device == "cpu"
        name = "cpu" if self.small else _gpu_name()
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
        self.out = Path(options.out or f"docs/benchmarks/gpu/{time.strftime('%Y-%m-%d')}-{slug}")
        self.data = Path(options.data) if options.data else self.out / "data"
        self.out.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.out / "results.jsonl")
        self.results.mend()
        self.cores = len(os.sched_getaffinity(0))

    def run(self) -> GpuBench:
        parts = [part for part in PARTS if part in listed(self.options.parts)]
        for part in parts if self.options.again else ():
            self.results.forget(part)
        end = time.monotonic() + 60 * self.options.minutes
        try:
            if not self._facts().get("ops"):
                self.results.forget("facts")
                self._jobs("facts", [self._job("facts", "facts")], 1, min(end, time.monotonic() + LIMIT / 4))
            for place, part in enumerate(parts):
                if self.results.of(part).get("end", {}).get("how") == "done":
                    _say(f"{part}: done before (--bench.again runs it again)")
                    continue
                share = PARTS[part] / sum(PARTS[name] for name in parts[place:])
                self._part(part, min(LIMIT, share * max(end - time.monotonic(), 0)))
        finally:
            page = self._write_page()
        records = list(self.results.read().values())
        mine = [record for record in records if record["part"] in (*parts, "facts")]
        done = all(self.results.of(part).get("end", {}).get("how") == "done" for part in parts)
        failed = any(record.get("error") or record.get("outcome") == "failed" for record in mine)
        return GpuBench(str(self.out), page, records, done and not failed)

    def _facts(self) -> Record:
        return self.results.of("facts").get("facts", {})

    def _part(self, part: str, seconds: float) -> None:
        _say(f"{part}: at most {seconds:.0f} s")
        begin = time.monotonic()
        self.results.add(part, "end", how="late", seconds=0)
        if "part" in self.results.of(part):
            self.results.add(part, "part")  # what was wrong then may be right now
        how = "late"
        try:
            if all([self._jobs(part, jobs, at_once, begin + seconds) for jobs, at_once in self._phases(part)]):
                how = "done"
        except Exception as error:  # the other parts go on
            self.results.add(part, "part", error=f"{type(error).__name__}: {error}")
        finally:
            self.results.add(part, "end", how=how, seconds=round(time.monotonic() - begin, 1))
            self._write_page()
        _say(f"{part}: {how} after {time.monotonic() - begin:.0f} s")

    def _jobs(self, part: str, jobs: list[Job], at_once: int, deadline: float) -> bool:
        return Runner(self.results, part, self.out / f"{part}.log").run(jobs, at_once, deadline)

    def _job(
        self, kind: str, key: str, turns: tuple[str, ...] = (), threads: int = 0, always: bool = False, **values: Any
    ) -> Job:
        """A process of this package (`bench_gpu_jobs`)."""
        values |= {"kind": kind, "key": key, "device": self.options.device, "results": str(self.results.path)}
        values["data"] = str(self.data)
        settings = {"TRITON_INTERPRET": "1"} if self.small else {}
        settings |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)} if threads else {}
        command = [sys.executable, "-m", "fastssl", "bench", "gpu", f"--bench.job={json.dumps(values)}"]
        if settings:
            command = ["env", *(f"{name}={value}" for name, value in settings.items()), *command]
        return Job(key, command, turns, always=always)

    def _phases(self, part: str) -> Iterator[tuple[list[Job], int]]:
        """The jobs of a part, in groups that follow each other, and how many of each run side by side."""
        if part == "tests":
            yield [self._pytest()], 1
        elif part in ("proofs", "kernels"):
            turns = tuple(f"case {n}" for n in range(1, CASES + 1)) if part == "kernels" else ()
            wanted = listed(self.options.ops) or (SMALL_OPS if self.small else self._facts().get("ops", []))
            if not wanted:
                raise RuntimeError("no ops are known: triton is missing, or see facts.log")
            yield [self._job(part, op, turns, threads=1, op=op) for op in wanted], self.cores
        else:
            yield self._drawing(), self.cores
            if part == "loader":
                yield [self._job("loader", "loader", most=2 if self.small else 16)], 1
            else:
                yield from self._steps()

    def _steps(self) -> Iterator[tuple[list[Job], int]]:
        """Groups that fit the GPU's memory side by side; contender after contender, kernels before plain PyTorch."""
        table = SMALL_RECIPES if self.small else RECIPES
        names = listed(self.options.recipes) or list(table)
        size = max(2, int(self._facts().get("memory_gb", 0) // 18))
        ways: dict[str, dict[str, Any]]
        ways = {name: {"options": way, "kernels": "auto"} for name, way in contenders().items()}
        ways["plain"] = {"options": ways["eager"]["options"], "kernels": "reference"}
        for way, values in list(ways.items())[: 1 if self.small else None]:
            turns = ("step",) if way == "plain" else ("step", "loader")
            for first in range(0, len(names), size):
                group = names[first : first + size]
                yield [self._job("steps", f"{n} {way}", turns, recipe=n, contender=way, **values) for n in group], 4

    def _drawing(self) -> list[Job]:
        """Draws what is missing of the two image sets."""
        shards, counts = ({"in": 1}, {"in": 24}) if self.small else (SHARDS, IMAGES)
        both = [(name, number) for name, count in shards.items() for number in range(count)]
        missing = [(name, n) for name, n in both if not (self.data / f"{name}-{n}.beton").exists()]
        return [
            self._job("data", f"data {name}-{n}", threads=1, always=True, name=name, number=n, images=counts[name])
            for name, n in missing
        ]

    def _pytest(self) -> Job:
        """The tests that need a GPU; `bench_gpu_tests` writes every outcome down and leaves out what has passed."""
        folder = Path(self.options.tests)
        paths = sorted(
            path
            for path in folder.rglob("test_*.py")
            if "mark.gpu" in path.read_text() or path.parent.name == "kernels"
        )
        if self.small:
            paths = [path for path in paths if path.name == "test_check.py"]
        if not paths:
            raise ConfigError(f"no tests in {folder}; name the project's folder of tests with --bench.tests")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "fastssl.pretraining.bench_gpu_tests",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-q", "-m", "not gpu" if self.small else "gpu", f"--junitxml={self.out / 'tests.xml'}"]
        if find_spec("pytest_timeout"):
            command += ["--timeout=100"]
        if find_spec("xdist") and not self.small:
            command += ["-n", str(max(1, min(12, self.cores - 2))), "--dist", "worksteal"]
        record = f"FASTSSL_BENCH_RESULTS={self.results.path.absolute()}"
        shell = ["sh", "-c", 'exec "$@" 1>&2', "sh"]  # what it prints goes to the log
        return Job("pytest", ["env", record, *shell, *command, *map(str, paths)], good=(0, 1, 5))

    def _write_page(self) -> str:
        from fastssl.pretraining.bench_gpu_page import failed_tests, page

        records = list(self.results.read().values())
        text = page(records, self.cores)
        files_ = {
            "README.md": text,
            "results.json": json.dumps(records, indent=1) + "\n",
            "failed-tests.txt": "".join(f"{name}\n" for name in failed_tests(records)),
        }
        for name, content in files_.items():
            unfinished = self.out / f"{name}.partial"
            unfinished.write_text(content)
            unfinished.replace(self.out / name)
        return text


def _gpu_name() -> str:
    """Name of the first GPU. The driver is asked, not PyTorch, which would take seconds, and memory on the device."""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    codes: tuple[int, ...] = (-1,)
    with suppress(OSError):
        cuda = ctypes.CDLL("libcuda.so.1")
        codes = cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0), cuda.cuDeviceGetName(name, 256, device)
    if any(codes):
        raise ConfigError("no CUDA device here; --bench.device cpu runs a small version of every part, to try it")
    return name.value.decode()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: jobs are ended, the page is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def recipe_file(recipe: Recipe) -> str:
    """The recipe's YAML file."""
    return str(files("fastssl") / "configs" / recipe.config)
