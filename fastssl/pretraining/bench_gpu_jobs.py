"""What the processes of `fastssl bench gpu` do, each in one function; their results go to results.jsonl at once.

There are dozens of them, so each function imports what it alone needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.config import Config
from fastssl.pretraining.bench_gpu import CASES, COPIES, RECIPES, SMALL_RECIPES, Results, recipe_file

if TYPE_CHECKING:
    import torch

    from fastssl.kernels._spec import Case, Op

SIDES = {"in": (256, 512), "cifar": (32, 32)}  # of the drawn images, in pixels
DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG

Say = Callable[[str], None]
Parse = Callable[..., tuple[Config, bool, dict[str, Any]]]


class Work:
    """A job's values, and the door to the command that started it.

    Args:
        values: what `fastssl.pretraining.bench_gpu` passes on: kind, key, device, results, data, and the kind's own.
        parse: makes a configuration of arguments (`fastssl.parse.parse_recipe`).
        say: tells the command a word.
    """

    def __init__(self, values: dict[str, Any], parse: Parse, say: Say) -> None:
        self.values, self.parse, self.say = values, parse, say
        self.device, self.small = values["device"], values["device"] == "cpu"
        self.results, self.data = Results(values["results"]), Path(values["data"])

    def add(self, key: str, **values: Any) -> None:
        """One result of this job's part."""
        self.results.add(self.values["kind"], key, **values)

    def turns(self) -> Iterator[str]:
        """Says that this job is ready, then yields each word that the command sends, and says that it was done."""
        self.say("ready")
        for line in sys.stdin:
            yield line.strip()
            self.say("done")


def work(values: dict[str, Any], parse: Parse) -> int:
    """Does one job; its exit code. What is printed meanwhile goes to the log."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    door = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(text: str) -> None:
        print(text, file=door, flush=True)

    print(f"--- {values['key']}", flush=True)
    try:
        KINDS[values["kind"]](Work(values, parse, say))
    except Exception as error:
        traceback.print_exc()
        say(f"error {_words(error)}")
        return 1
    return 0


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- the machine -------------------------------------------------------------------------------------------------------


def facts(work: Work) -> None:
    """Card, versions, commit, names of the ops; on a GPU also how fast it copies and multiplies."""
    import torch

    from fastssl.kernels import _bench as kernels
    from fastssl.kernels._path import has_triton
    from fastssl.loaders.pool import cores

    found: dict[str, Any] = {"python": platform.python_version(), "cores": cores(), **kernels.versions()}
    if "commit" not in found and (commit := os.environ.get("FASTSSL_COMMIT", "").strip()):
        found["commit"] = commit
    for package in ("torchvision", "numpy", "numba"):
        with contextlib.suppress(ImportError):
            found[package] = importlib.import_module(package).__version__
    if not work.small:
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
        copy, rates = kernels.device_rates()
        found |= {"copy": copy, "rates": {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}}
    work.add("facts", ops=[op.name for op in kernels.all_ops()] if has_triton() else [], **found)


def draw(work: Work) -> None:
    """Draws one shard of an image set, as `fastssl demo` does but of this set's size, with part maps."""
    from fastssl.loaders import synthetic
    from fastssl.loaders.convert import ConvertOptions, convert

    name, number, images = (work.values[key] for key in ("name", "number", "images"))
    sides = synthetic.SIDES if work.small else SIDES[name]
    work.data.mkdir(parents=True, exist_ok=True)
    target = work.data / f"{name}-{number}.beton"
    with tempfile.TemporaryDirectory(dir=work.data) as folder:
        drawn = synthetic.draw_images(folder, train=images, val=8, seed=number, sides=sides)
        parts = str(drawn / "parts" / "train")
        convert(ConvertOptions(str(drawn / "train"), str(target), parts=parts, workers=1, overwrite=True))


@contextlib.contextmanager
def _repeated(work: Work, name: str) -> Iterator[str]:
    """A glob of links to an image set's shards, each many times, so that an epoch is long."""
    shards = sorted(work.data.glob(f"{name}-*.beton"))
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(COPIES):
            for number, shard in enumerate(shards):
                (Path(folder) / f"{copy}-{number}.beton").symlink_to(shard.absolute())  # no side file
        yield f"{folder}/*.beton"


# -- ops ---------------------------------------------------------------------------------------------------------------


def _op(work: Work) -> Op:
    from fastssl.kernels import _bench as kernels

    [op] = [op for op in kernels.all_ops() if op.name == work.values["op"]]
    return op


def _sizes(work: Work, op: Op) -> dict[str, Case]:
    """The sizes to time: those of training, or one small one on a CPU."""
    return dict(list(op.proof.items())[:1] if work.small else list(op.bench.items())[:CASES])


def _dtype(op: Op, small: bool) -> torch.dtype:
    import torch

    return torch.bfloat16 if torch.bfloat16 in op.dtypes and not small else op.dtypes[0]


def prove(work: Work) -> None:
    """The float64 proofs of one op: all small cases in all types, training sizes in the type of training."""
    import torch

    from fastssl.kernels._verify import verify

    op = _op(work)
    cases = [(name, case, dtype) for name, case in op.proof.items() for dtype in op.dtypes]
    cases += [(name, case, _dtype(op, False)) for name, case in list(op.bench.items())[:CASES]]
    past = work.results.of("proofs")
    for name, case, dtype in cases[:2] if work.small else cases:
        key = f"{op.name} | {name} | {str(dtype).removeprefix('torch.')}"
        if past.get(key, {}).get("outcome") in ("passed", "too large"):
            continue
        begin, outcome, more = time.monotonic(), "passed", {}
        try:
            verify(op, case, dtype, work.device)
        except torch.OutOfMemoryError:  # of the float64 reference, at a training size
            outcome = "too large"
        except Exception as error:
            outcome, more = "failed", {"words": _words(error)}
        work.add(key, op=op.name, outcome=outcome, seconds=round(time.monotonic() - begin, 2), **more)
        if outcome == "too large":
            _free()


def time_kernels(work: Work) -> None:
    """Times one op: a first round compiles everything beside the other ops, the second is alone on the device."""
    import torch

    from fastssl.kernels import _bench as kernels

    op = _op(work)
    dtype, cases = _dtype(op, work.small), _sizes(work, op)
    paths = "triton,eager" if work.small else ",".join(kernels.PATHS)
    first, then = (kernels.KernelBenchOptions(milliseconds=ms, path=paths) for ms in (0, 5 if work.small else 40))
    known = work.results.of("facts").get("facts", {})
    copy, rate = known.get("copy", 1e9), known.get("rates", {}).get(str(dtype).removeprefix("torch."), 1e9)
    compiled = None
    if not work.small:
        torch._dynamo.config.recompile_limit = 64
        compiled = torch.compile(op.reference, dynamic=False)
    for case in cases.values():
        kernels.time_case(op, case, dtype, first, copy, rate, work.device, compiled)
        _free()
    for turn in work.turns():
        for name, case in list(cases.items())[int(turn.split()[1]) - 1 :][:1]:
            rows = kernels.time_case(op, case, dtype, then, copy, rate, work.device, compiled)
            for row in rows:
                row |= {"op": op.name, "case": name, "dtype": str(dtype).removeprefix("torch.")}
                work.add(f"{op.name} | {name} | {row['pass']} | {row['name']}", **row)
            _free()


# -- steps -------------------------------------------------------------------------------------------------------------


def time_steps(work: Work) -> None:
    """Times a recipe's training step in one way: on one batch again and again, and with the loader."""
    import torch

    from fastssl.models.dvae import DalleEncoder
    from fastssl.pretraining import bench_step
    from fastssl.pretraining.trainer import Trainer

    recipe = {**RECIPES, **SMALL_RECIPES}[work.values["recipe"]]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options = {
            "data.path": stack.enter_context(_repeated(work, recipe.data)),
            "data.batch_size": recipe.images,
            "run.device": work.device,
            "monitor.every": 0,
            **recipe.options,
            **work.values["options"],
        }
        if recipe.config:
            options = {"config": recipe_file(recipe), **options}
        if work.values["recipe"] == "cae":  # the speed of OpenAI's weights is that of any
            torch.manual_seed(0)
            torch.save(DalleEncoder().state_dict(), f"{folder}/encoder.pkl")
            options["cae.tokenizer"] = f"{folder}/encoder.pkl"
        config, _, _ = work.parse("fastssl bench gpu", "", [f"--{key}={value}" for key, value in options.items()])
        config = replace(
            config,
            run=replace(config.run, dir=f"{folder}/run", steps=0),
            monitor=replace(config.monitor, every=0, pictures=0),
        )
        trainer = Trainer(config)
        stack.callback(trainer.loader.close)
        more = 1 if work.small else 2
        once = bench_step.StepBenchOptions(
            kernels=work.values["kernels"], steps=1, warmup=2 * more, rounds=1, repeat_batch=True
        )
        bench_step._bench(trainer, once)
        _free()
        for turn in work.turns():
            then = replace(once, steps=3 * more, warmup=more, rounds=more, repeat_batch=turn == "step")
            measured = bench_step._bench(trainer, then)
            [row] = measured.rows
            graph = getattr(trainer, "graph", None)
            work.add(
                f"{work.values['recipe']} | {work.values['contender']} | {turn}",
                recipe=work.values["recipe"],
                contender=work.values["contender"],
                loader=turn == "loader",
                captured=bool(graph and graph.captured and not graph.given_up),
                **asdict(row),
                run=measured.run,
            )
            _free()


# -- the loader --------------------------------------------------------------------------------------------------------


def time_loader(work: Work) -> None:
    """Images per second of the default engine over the number of threads, after its first batches."""
    from fastssl.augment import augment
    from fastssl.loaders import bench as loaders
    from fastssl.loaders.engine import choose_engine, make_loader
    from fastssl.loaders.sources import open_source

    engine, _ = choose_engine("auto")
    cases = {"single": loaders.CASES["single"]} if work.small else loaders.CASES
    seconds, first = (0.2, 2) if work.small else (1.2, 10)
    past = work.results.of("loader")
    with _repeated(work, "in") as path:
        source = open_source(path)
        for name, case in cases.items():
            for threads in (n for n in (1, 2, 4, 8, 16) if n <= work.values["most"]):
                if f"{name} | {threads}" in past:
                    continue
                batch = 8 if work.small else 64
                loader = make_loader(engine, source, case.views, batch_size=batch, seed=0, workers=threads)
                images, begin, cpu = 0, 0.0, 0.0
                with contextlib.closing(loader), contextlib.closing(_batches(loader)) as batches:
                    for count, one in enumerate(batches):
                        done = augment(one) if case.floats else one
                        if count == first:  # compiled, and what was ready has been taken
                            begin, cpu = time.perf_counter(), loaders.cpu_seconds()
                        elif count > first:
                            images += len(done)
                            if time.perf_counter() - begin > seconds:
                                break
                    wall, cpu = time.perf_counter() - begin, loaders.cpu_seconds() - cpu
                more = {"images_per_s": images / wall, "cpu_ms_per_image": 1e3 * cpu / images}
                work.add(f"{name} | {threads}", case=name, threads=threads, engine=engine, **more)


def _batches(loader: Any) -> Generator[Any, None, None]:
    for epoch in itertools.count():
        with contextlib.closing(loader.epoch(epoch)) as stream:
            yield from stream


KINDS: dict[str, Callable[[Work], None]] = {
    "facts": facts,
    "data": draw,
    "proofs": prove,
    "kernels": time_kernels,
    "steps": time_steps,
    "loader": time_loader,
}
