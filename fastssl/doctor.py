"""`fastssl doctor`: what of this machine works, what it costs where something is missing, and how to mend it."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl import __version__
from fastssl.config import Checked, PositiveFloat

PIECE, MEASURED = 2**20, 1.0  # bytes, and seconds for writing and for reading
SLOW_DISK = 200e6  # bytes per second: 1,800 ImageNet images
IMAGE = 110e3  # bytes of an ImageNet JPEG
IMPORTS = "PyTorch"  # the check that the others wait for


@dataclass
class DoctorOptions(Checked):
    """What to look at."""

    path: str = "."
    """Folder whose disk is measured: where the training images lie. 64 MiB are written there and deleted."""
    patience: PositiveFloat = 8.0
    """Seconds that a check may take; what does not answer by then counts as broken."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        text: what is there.
        cost: what does not work or is slow; empty where all is well.
        mend: what to do about it.
        ok: False where something that is there does not work.
        short: for the line of a bug report.
    """

    text: str
    cost: str = ""
    mend: str = ""
    ok: bool = True
    short: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings by name, and the line for a bug report."""

    findings: dict[str, Finding]
    line: str

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings.values())

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": {n: asdict(f) for n, f in self.findings.items()}, "line": self.line}

    def table(self) -> str:
        lines = []
        for name, finding in self.findings.items():
            mark = "ok" if not finding.cost else "missing" if finding.ok else "BROKEN"
            lines.append(f"{mark:<8} {name:<11} {finding.text}")
            if finding.cost:
                lines += [f"{'':<21}cost: {finding.cost}", f"{'':<21}mend: {finding.mend}"]
        return "\n".join([*lines, "", "for a bug report:", self.line])


def doctor(options: DoctorOptions) -> Diagnosis:
    """Look at GPU, driver, kernels, decoder, disk and cores: what works, what it costs if not, how to mend it."""
    checks: dict[str, Callable[[], Finding]] = {
        IMPORTS: _torch,
        "GPU": _gpu,
        "Triton": _triton,
        "NCCL": _nccl,
        "decoder": _decoder,
        "DALI": lambda: _package("nvidia-dali-cuda130", "the dali engine; the default, ffcv, does not need it"),
        "FFCV": lambda: _package("ffcv", "its column in 'fastssl bench loader' and 'make bench', nothing else"),
        "evaluation": _evaluation,
        "cores": _cores,
        "disk": lambda: _disk(Path(options.path)),
    }
    findings = {}
    for name, check in checks.items():
        findings[name] = _bounded(check, options.patience * (4 if name == IMPORTS else 1))
    parts = [f"{name} {finding.short or finding.text}" for name, finding in findings.items()]
    system = f"fastssl {__version__}{_commit()}; {platform.platform()}; Python {platform.python_version()}"
    return Diagnosis(findings, "; ".join([system, *parts]))


def _bounded(check: Callable[[], Finding], seconds: float) -> Finding:
    """What a check finds; whatever it raises, or no answer, is a finding too."""
    found: list[Finding] = []

    def run() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(check())
        except BaseException as error:  # a package that ends the process on import, say
            words = " ".join(str(error).split())[:160] or type(error).__name__
            cost, mend = "what needs it does not work", "install it again"
            found.append(Finding(f"does not work: {words}", cost, mend, ok=False, short=f"broken ({words[:60]})"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    words = f"no answer within {seconds:.0f} s"
    return found[0] if found else Finding(words, "whatever needs it may hang", "look at dmesg", ok=False)


def _output(*command: str) -> str:
    """The first line that a command prints; empty where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip().split("\n")[0]


def _commit() -> str:
    short = _output("git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD")
    return f" ({short})" if short else ""


def _torch() -> Finding:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return Finding(f"{torch.__version__}, {build}", short=f"{torch.__version__}")


def _gpu() -> Finding:
    import torch

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda").item()
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        driver = f"driver {driver or 'unknown'}"
        return Finding(f"{names}; {driver}", short=f"{len(cards)} x {cards[0].name}, {driver}")
    if not driver:
        return Finding(
            "none is visible (no nvidia-smi)",
            "training runs on the CPU, far slower; good for trying things out",
            "install NVIDIA's driver; in a container start it with --gpus all; on a cluster ask for a GPU",
            short="none",
        )
    mend = f"a driver for CUDA {torch.version.cuda} or newer, or a PyTorch built for an older CUDA (pytorch.org)"
    if torch.version.cuda is None:
        mend = "install a PyTorch that is built for CUDA (pytorch.org)"
    return Finding(
        f"driver {driver} is there, but this PyTorch does not see a GPU (CUDA_VISIBLE_DEVICES="
        f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})",
        *("training runs on the CPU", mend),
        ok=False,
        short=f"not seen, driver {driver}",
    )


def _triton() -> Finding:
    import torch

    if not find_spec("triton"):
        cost = "every kernel falls back to plain PyTorch, which is slower on a GPU"
        return Finding("not installed", cost, "pip install triton", short="-")
    number = importlib.import_module("triton").__version__
    if not torch.cuda.is_available():
        return Finding(f"{number}; kernels are for GPUs, CPUs have their own paths", short=number)
    from fastssl.kernels.unit_rows import unit_rows

    rows = torch.arange(1.0, 129.0, device="cuda").view(4, 32)
    try:
        right = torch.allclose(unit_rows(rows), torch.nn.functional.normalize(rows))
    except Exception as error:
        words = " ".join(str(error).split())[:120]
        cost = "training fails at its first kernel (FASTSSL_KERNELS=reference goes without them)"
        mend = "a C compiler and Python's headers: apt-get install gcc python3-dev"
        return Finding(f"{number} cannot build a kernel: {words}", cost, mend, False, f"{number}, cannot build")
    if not right:
        cost, mend = "results may be wrong", "FASTSSL_KERNELS=reference, and a bug report"
        return Finding(f"{number}: a kernel's result differs from PyTorch's", cost, mend, False, f"{number}, wrong")
    return Finding(f"{number}; a kernel was built and is right", short=number)


def _nccl() -> Finding:
    import torch

    if torch.cuda.device_count() < 2:
        return Finding("not needed with fewer than two GPUs", short="-")
    if not torch.distributed.is_nccl_available():
        return Finding("missing in this PyTorch", "GPUs cannot train together", "install PyTorch's own wheel", ok=False)
    number = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding(number, short=number)


def _decoder() -> Finding:
    if not find_spec("numba"):
        cost = "PIL decodes and crops every image whole, many times slower (the reference engine)"
        return Finding("numba is missing", cost, "pip install numba", short="PIL")
    from fastssl.loaders import batch_pool, window_decoder

    if batch_pool.available():
        return Finding("compiled, in threads without Python's lock", short="pool")
    built = "a window at a time, without the pool" if window_decoder.works() else "the compiled part is missing"
    cost = "decoding takes about twice the CPU time"
    mend = "apt-get install gcc libjpeg-dev, then install fastssl again: pip install --force-reinstall --no-deps ."
    return Finding(built, cost, mend, short="window" if window_decoder.works() else "PIL")


def _package(name: str, cost: str) -> Finding:
    """An optional package: its version, or what is missed without it."""
    try:
        return Finding(version(name), short=version(name))
    except PackageNotFoundError:
        return Finding("not installed", cost, f"pip install {name}", short="-")


def _evaluation() -> Finding:
    wanted = {"torchmetrics": "torchmetrics", "pycocotools": "pycocotools"}
    wanted["segmentation-models-pytorch"] = "segmentation_models_pytorch"
    missing = [package for package, module in wanted.items() if not find_spec(module)]
    if missing:
        cost = "evaluate segment and evaluate detect; all else works"
        return Finding(f"without {', '.join(missing)}", cost, "pip install 'fastssl-vision[eval]'", short="partial")
    return Finding("all protocols", short="all")


def _cores() -> Finding:
    from fastssl.loaders.pool import cores

    shared = Path("/dev/shm")
    free = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize if shared.exists() else 0
    quota = _quota()
    text = f"{cores()} cores, {free / 2**30:.1f} GiB free in /dev/shm"
    if quota and quota < cores():
        text = f"{cores()} cores, of which the container may use {quota:g}"
        cost = "threads get in each other's way"
        return Finding(text, cost, f"--data.workers {max(1, int(quota))}", short=f"{quota:g} of {cores()}")
    if free < 2**28:
        cost = "worker processes (convert, verify, fine-tuning) may not start"
        return Finding(text, cost, "a container needs --shm-size 1g or more", short=text)
    return Finding(text, short=f"{cores()}")


def _quota() -> float:
    """CPUs that a container's limit allows; 0: no limit."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0.0 if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return 0.0


def _disk(folder: Path) -> Finding:
    """Writes a file that has no name and reads it back past the page cache."""
    piece = os.urandom(PIECE)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            begin = time.perf_counter()
            written, _ = _timed(lambda: file.write(piece))
            os.fsync(file.fileno())
            writing = time.perf_counter() - begin
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            read, reading = _timed(lambda: len(file.read(PIECE) or b""))
    except OSError as error:
        cost, mend = "nothing can be written there", "name another folder: fastssl doctor FOLDER"
        return Finding(f"{folder}: {error.strerror}", cost, mend, short="-")
    speed = read / reading
    short = f"{speed / 1e6:.0f} MB/s"
    text = f"{folder.resolve()} reads {short} ({speed / IMAGE:,.0f} ImageNet images/s), "
    text += f"writes {written / writing / 1e6:.0f} MB/s"
    if speed < SLOW_DISK:
        cost = "a GPU may wait for images until they are in memory"
        return Finding(text, cost, "images on a local disk, as a .beton, with --data.page_window 64", short=short)
    return Finding(text, short=short)


def _timed(move: Callable[[], int]) -> tuple[int, float]:
    """(bytes moved, seconds): 64 pieces at most, and no longer than `MEASURED`."""
    begin, moved = time.perf_counter(), 0
    for _ in range(64):
        now = move()
        moved += now
        if not now or time.perf_counter() - begin > MEASURED:
            break
    return moved, max(time.perf_counter() - begin, 1e-6)
