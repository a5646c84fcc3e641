"""The table of the kernels: time, bandwidth, memory and speedup on this machine's GPU, or only the build without one.

An op whose proof fails is not timed. Bytes are the contract's minimum, counted once per op for all contenders.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._check import KernelError, check
from fastssl.kernels._compile import ARCHS, Build, build_all, device_arch, triton_version
from fastssl.kernels._path import forced, has_triton
from fastssl.kernels._rate import matrix_rate
from fastssl.kernels._spec import Case, Maker, Op, map_tensors, tensors
from fastssl.kernels._verify import verify

FOLDERS = (
    "centering_softmax_loss",
    "masked_attention_gather",
    "ema_update",
    "photometric",
    "patch_pixel_loss",
    "token_cross_entropy",
    "patch_contrast",
    "uncrop",
    "feature_search",
    "corrupt",
    "residual_norm",
    "drop_path",
    "batch_norm_act",
    "unit_rows",
)
SLOW = 200.0  # milliseconds of a call that is not captured, because that calls it too often
PATHS = ("triton", "eager", "compile", "library")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class KernelBenchOptions:
    """What `fastssl bench kernels` runs."""

    op: str = ""
    """Ops or folders to run, separated by commas. Empty: all."""
    case: str = ""
    """Only cases whose name contains this."""
    dtype: str = "bfloat16"
    """Types of the inputs, separated by commas; 'all' for float32, float16 and bfloat16."""
    path: str = "triton,eager,compile,library"
    """Contenders, separated by commas: the kernel, the reference as it stands, torch.compile of it, library calls."""
    milliseconds: int = 100
    """Measuring time per contender and pass."""
    compile_only: bool = False
    """Only build every kernel ahead of time (no GPU needed) and list registers, spills and shared memory."""
    arch: str = "80,90,100"
    """Architectures to build for with compile_only, separated by commas."""
    out: str = ""
    """Also write the JSON to this file."""

    def __post_init__(self) -> None:
        for name, known in (("path", PATHS), ("dtype", (*DTYPES, "all")), ("arch", tuple(map(str, ARCHS)))):
            for value in _listed(getattr(self, name)):
                check(value in known, "bench kernels", name, f"of {', '.join(known)}", repr(value))


@dataclass
class KernelBench:
    """The result: facts about the machine, one row per contender and pass, proofs and builds that failed, known spills.

    Known spills (`fastssl.kernels._compile.KNOWN_SPILLS`) are no failures.
    """

    env: dict[str, Any]
    rows: list[dict[str, Any]]
    failures: list[str]
    known: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every proof passed and no build has spills that are not known."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {"env": self.env, "rows": self.rows, "failures": self.failures, "known": self.known}

    def table(self) -> str:
        """Fixed-width text."""
        built = bool(self.rows) and "ms" not in self.rows[0]
        columns = _BUILD_COLUMNS if built else _TIME_COLUMNS
        texts = [list(columns)] + [[_cell(row.get(key, "")) for key in columns.values()] for row in self.rows]
        widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
        head = [f"{key} {value}" for key, value in self.env.items()]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in texts]
        return "\n".join([", ".join(head), "", *(line.rstrip() for line in lines), *self.known, *self.failures])


_TIME_COLUMNS = {
    "op": "op", "case": "case", "dtype": "dtype", "pass": "pass", "path": "name", "call ms": "ms", "p20": "p20",
    "p80": "p80", "device ms": "device_ms", "GB/s": "gbps", "of the limit": "fraction", "MB": "peak_mb",
    "kernel is x faster": "speedup", "on the device": "device_speedup", "regs": "registers", "spills": "spills",
}  # fmt: skip
_BUILD_COLUMNS = {
    "op": "op", "case": "case", "dtype": "dtype", "kernel": "kernel", "arch": "arch", "regs": "registers",
    "spills": "spills", "shared": "shared", "warps": "warps",
}  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def all_ops(wanted: str = "") -> list[Op]:
    """Every op, or those that `wanted` names (op or folder, separated by commas)."""
    names = _listed(wanted)
    folders = names if names and set(names) <= set(FOLDERS) else FOLDERS
    found = {folder: importlib.import_module(f"fastssl.kernels.{folder}.cases").OPS for folder in folders}
    known = {*found, *(op.name for ops in found.values() for op in ops)}
    for name in names:
        check(name in known, "bench kernels", "op", f"of {', '.join(sorted(known))}", repr(name))
    return [op for folder, ops in found.items() for op in ops if not names or {folder, op.name} & set(names)]


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def bench(options: KernelBenchOptions) -> KernelBench:
    """Time the kernels on the GPU against PyTorch, or (--compile-only) build them for A100, H100 and B200.

    Raises:
        KernelError: no GPU or no Triton where they are needed, an unknown op.
    """
    ops = all_ops(options.op)
    if options.compile_only:
        archs = tuple(int(arch) for arch in _listed(options.arch))
        builds = build_all(ops, archs)
        rows = [build.as_dict() for build in builds]
        failures = [_complaint(build) for build in builds if not build.ok]
        known = [f"known of triton {triton_version()}: {_complaint(build)}" for build in builds if build.known]
        result = KernelBench(versions(), rows, failures, known)
    else:
        if not torch.cuda.is_available():
            raise KernelError("no CUDA device here; --compile-only builds the kernels without one")
        if not has_triton():
            raise KernelError("the package triton is not installed, so there are no kernels to time")
        result = _time_all(ops, options)
    if options.out:
        unfinished = Path(f"{options.out}.partial")
        unfinished.write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        unfinished.replace(options.out)
    return result


def _complaint(build: Build) -> str:
    what = f"{build.spills} bytes spilled" if build.spills else f"{build.shared} bytes of shared memory are too many"
    return f"{build.op}, {build.case}, {build.dtype}: {build.kernel} on sm_{build.arch}: {what}"


def _time_all(ops: list[Op], options: KernelBenchOptions) -> KernelBench:
    dtypes = [DTYPES[name] for name in (DTYPES if options.dtype == "all" else _listed(options.dtype))]
    copy, rates = device_rates()
    env = versions() | {"copy_gbps": round(copy / 1e9)}
    env |= {f"{name}_tflops": round(rates[dtype] / 1e12) for name, dtype in DTYPES.items()}
    rows, failures = [], []
    for op in ops:
        builds = {(b.case, b.dtype): b for b in _worst(build_all([op], _nearest_arch()))}
        failures += [_complaint(build) for build in builds.values() if not build.ok]
        error = _proof_error(op, op.proof, list(op.dtypes))
        for case, parameters in op.bench.items():
            if options.case not in case:
                continue
            for dtype in dtypes:
                if dtype not in op.dtypes:
                    continue
                name = str(dtype).removeprefix("torch.")
                print(f"{op.name}: {case}, {name}", file=sys.stderr, flush=True)
                bad = error or _proof_error(op, {case: parameters}, [dtype])
                if bad:
                    failures.append(bad)
                    continue
                build = builds.get((case, name))
                found = time_case(op, parameters, dtype, options, copy, rates[dtype])
                for row in found:
                    row |= {"op": op.name, "case": case, "dtype": name}
                    if row["path"] == "triton" and build:
                        row |= {"registers": build.registers, "spills": build.spills, "arch": f"sm_{build.arch}"}
                rows += found
    return KernelBench(env, rows, list(dict.fromkeys(failures)))


def _nearest_arch() -> tuple[int, ...]:
    """The architecture of ARCHS that this GPU runs."""
    here = device_arch() or ARCHS[0]
    return (max((arch for arch in ARCHS if arch <= here), default=ARCHS[0]),)


def _worst(builds: list[Build]) -> list[Build]:
    """Per case and dtype the kernel with the most registers (or spills)."""
    worst: dict[tuple[str, str], Build] = {}
    for build in builds:
        key = build.case, build.dtype
        if key not in worst or (build.spills, build.registers) > (worst[key].spills, worst[key].registers):
            worst[key] = build
    return list(worst.values())


def _proof_error(op: Op, cases: dict[str, Case], dtypes: list[torch.dtype]) -> str:
    """What is wrong with the op, or nothing."""
    for name, case in cases.items():
        for dtype in dtypes:
            try:
                verify(op, case, dtype, "cuda")
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # float64 of this size does not fit; the proof cases have passed
            except AssertionError as error:
                return f"not timed, because the proof failed: {error}"
            except Exception as error:
                return f"not timed: {op.name}, {name}, {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def time_case(
    op: Op, case: Case, dtype: torch.dtype, options: KernelBenchOptions, copy: float, rate: float,
    device: str = "cuda", compiled: Callable[..., Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one case: every contender, forward and (for an op with gradients) forward and backward.

    Args:
        op, case, dtype: what is timed.
        options: contenders, and for how long each is timed.
        copy, rate: what this device copies and multiplies per second (`device_rates`).
        device: where; a CPU shows only that it works.
        compiled: the reference compiled, which several calls may share; None: compiled here, and forgotten.
    """
    wanted = _listed(options.path)
    forget = compiled is None and "compile" in wanted
    if forget:
        compiled = torch.compile(op.reference, dynamic=False)
    contenders: list[tuple[str, str, str, Callable[..., Any]]] = [
        ("triton", "kernel", "triton", op.call),
        ("eager", "eager", "reference", op.reference),
        ("compile", "torch.compile", "reference", compiled or op.reference),
        *(("library", name, "reference", call) for name, call in op.library.items()),
    ]
    inputs = op.inputs(Maker(device), dtype, **case)
    rows = []
    for backward in (False, True) if op.gradients else (False,):
        leaves = map_tensors(inputs, lambda x: x.detach())
        if backward:
            for name in op.gradients:
                for leaf in tensors(leaves[name]):
                    leaf.requires_grad_()
        with forced("triton"):
            outputs = tensors(op.call(**leaves))
        least = op.min_bytes(inputs, outputs, False) + (op.min_bytes(inputs, outputs, True) if backward else 0)
        work = op.flops(inputs, outputs, False) + (op.flops(inputs, outputs, True) if backward else 0)
        del outputs
        mine = []
        for path, name, mode, call in contenders:
            if path not in wanted:
                continue
            row: dict[str, Any] = {"pass": "forward+backward" if backward else "forward", "path": path, "name": name}
            try:
                with forced(mode):
                    row |= _time(partial(_step, op, call, leaves), options.milliseconds)
            except Exception as error:  # a contender that cannot do it (memory, no such kernel) is a result too
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                row |= {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            else:
                seconds = (row.get("device_ms") or row["ms"]) / 1e3
                row |= {"gbps": least / seconds / 1e9, "fraction": max(least / copy, work / rate) / seconds}
            mine.append(row)
        for key, found in (("ms", "speedup"), ("device_ms", "device_speedup")):
            own = {row["name"]: row.get(key) for row in mine}.get("kernel")
            for row in mine:
                if own and row.get(key):
                    row[found] = row[key] / own
        rows += mine
    if forget:
        torch.compiler.reset()
    return rows


def _step(op: Op, call: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """One call, and its backward pass where an input asks for a gradient."""
    outputs = tensors(call(**inputs))
    leaves = [leaf for name in op.gradients for leaf in tensors(inputs[name]) if leaf.requires_grad]
    if not leaves:
        return outputs
    roots = [output for output in outputs if output.requires_grad]
    return list(torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots], allow_unused=True))


def _time(f: Callable[[], Any], milliseconds: int) -> dict[str, Any]:
    """Median, 20th and 80th percentile of a call in milliseconds with a cold L2; its time on the device without the
    host (`device_ms`); peak memory beyond the inputs in MB. With 0 milliseconds it is only called; on a CPU there is
    only the call."""
    f()  # compiles
    if not torch.cuda.is_available() or not milliseconds:
        begin = time.perf_counter()
        f()
        passed = 1e3 * (time.perf_counter() - begin)
        return {"ms": passed, "p20": passed, "p80": passed, "device_ms": None, "peak_mb": 0.0}
    from triton.testing import do_bench

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    median, low, high = do_bench(f, warmup=25, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    device = _device_time(f, milliseconds) if median < SLOW else None
    return {"ms": median, "p20": low, "p80": high, "device_ms": device, "peak_mb": peak}


def _device_time(f: Callable[[], Any], milliseconds: int) -> float | None:
    """Milliseconds of a call replayed from a CUDA graph, one behind the other, what fits staying in L2; None for a call
    that cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        # What it measures it replays ten times.
        return float(do_bench_cudagraph(f, rep=max(1, milliseconds // 10), return_mode="median"))
    except Exception as error:  # whatever cannot be captured raises as it likes
        print(f"not captured: {type(error).__name__}: {' '.join(str(error).split())[:160]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None


def device_rates() -> tuple[float, dict[torch.dtype, float]]:
    """Bytes per second that this GPU copies, and operations per second of its matrix products by type."""
    return _copy_rate(), {dtype: matrix_rate(torch.device("cuda"), dtype) for dtype in DTYPES.values()}


def _copy_rate() -> float:
    """Bytes per second of a large device-to-device copy, read and written both counted."""
    source = torch.randint(0, 255, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (_time(lambda: target.copy_(source), 200)["ms"] / 1e3)


def versions() -> dict[str, Any]:
    """Card, driver, versions and commit."""
    env: dict[str, Any] = {"torch": torch.__version__}
    if has_triton():
        env["triton"] = importlib.import_module("triton").__version__
    if torch.cuda.is_available():
        env["gpu"] = torch.cuda.get_device_name()
        env["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        env["driver"] = _output(query)
    commit = _output(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"])
    return env | ({"commit": commit} if commit else {})


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
