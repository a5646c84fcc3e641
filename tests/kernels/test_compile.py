"""Every kernel that the ops launch builds without spills and within the card's shared memory.

By default for one architecture and one dtype per op; FASTSSL_BUILD_ALL=1 builds for all architectures (several CPU
minutes), FASTSSL_BUILD_ALL=types for all dtypes too (three times as many).
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastssl.kernels import _bench, _compile
from fastssl.kernels._bench import FOLDERS, all_ops
from fastssl.kernels._compile import SHARED_LIMIT, Build

ALL = os.environ.get("FASTSSL_BUILD_ALL") == "types"
ARCHS = (80, 90, 100) if os.environ.get("FASTSSL_BUILD_ALL") else (90,)
MAIN = "import sys; from fastssl.cli import main; sys.exit(main())"
ONE_DTYPE = """
from dataclasses import replace
from torch import bfloat16, float32
from fastssl.kernels import _bench

every = _bench.all_ops
_bench.all_ops = lambda names="": [
    replace(op, dtypes=(bfloat16 if bfloat16 in op.dtypes else float32,)) for op in every(names)
]
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What `fastssl bench kernels --compile-only` finds, in a process whose kernels are not interpreted."""
    out = tmp_path_factory.mktemp("builds") / "builds.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MAIN if ALL else ONE_DTYPE + MAIN, "bench", "kernels", "--compile-only"]
    command += ["--arch", ",".join(map(str, ARCHS)), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_builds_without_spills(table):
    done, result = table
    assert result["failures"] == []
    assert done.returncode == 0
    assert {row["arch"] for row in result["rows"]} == {f"sm_{arch}" for arch in ARCHS}
    assert len(result["known"]) == sum(row["spills"] > 0 for row in result["rows"])
    for row in result["rows"]:
        assert 0 < row["registers"] <= 255, row
    assert "regs" in done.stdout
    assert f"sm_{ARCHS[-1]}" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_op_is_in_the_table(table):
    assert {row["op"] for row in table[1]["rows"]} == {op.name for op in all_ops()}
    assert len(all_ops()) >= len(FOLDERS)


def test_spills_and_too_much_shared_memory_are_not_ok():
    good = Build("op", "case", "float32", "kernel", 80, 64, 0, 1024, 4)
    assert good.ok
    assert not Build("op", "case", "float32", "kernel", 80, 255, 8, 1024, 4).ok
    assert not Build("op", "case", "float32", "kernel", 80, 64, 0, SHARED_LIMIT[80] + 1, 4).ok
    assert good.as_dict()["arch"] == "sm_80"


def test_a_known_spill_is_one_compilers_alone(monkeypatch):
    def build(dtype="float32", arch=100, spills=4, shared=1024):
        return Build("op", "case", dtype, "kernel", arch, 255, spills, shared, 4)

    monkeypatch.setattr(_compile, "triton_version", lambda: "3.8")
    monkeypatch.setattr(_compile, "KNOWN_SPILLS", {("3.8", "op", "float32", 100): 4})
    assert build().ok
    assert build().known
    assert not build(spills=0).known
    for other in (build(spills=8), build(arch=90), build("bfloat16"), build(shared=SHARED_LIMIT[100] + 1)):
        assert not other.ok
    monkeypatch.setattr(_compile, "triton_version", lambda: "3.9")
    assert not build().ok


def test_a_known_spill_is_printed_as_known(monkeypatch):
    monkeypatch.setattr(_compile, "KNOWN_SPILLS", {(_compile.triton_version(), "op", "float32", 80): 8})
    monkeypatch.setattr(_bench, "all_ops", lambda names: [])
    builds = [Build(op, "case", "float32", "kernel", 80, 255, 8, 1024, 4) for op in ("op", "other")]
    monkeypatch.setattr(_bench, "build_all", lambda ops, archs: builds)
    result = _bench.bench(_bench.KernelBenchOptions(compile_only=True))
    assert not result.ok
    assert result.failures == ["other, case, float32: kernel on sm_80: 8 bytes spilled"]
    [line] = result.known
    assert line.endswith(": op, case, float32: kernel on sm_80: 8 bytes spilled")
    assert line in result.table()
    assert replace(result, failures=[]).ok
