"""Every kernel that the ops launch builds for every architecture: no spills, shared memory within the card's."""

import json
import os
import subprocess
import sys

import pytest

from fastssl.kernels._bench import FOLDERS
from fastssl.kernels._compile import SHARED_LIMIT, Build


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What `fastssl bench kernels --compile-only` finds, in a process whose kernels are not interpreted."""
    out = tmp_path_factory.mktemp("builds") / "builds.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "import sys; from fastssl.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "bench", "kernels", "--compile-only", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_builds_without_spills(table):
    done, result = table
    assert result["failures"] == []
    assert done.returncode == 0
    assert {row["arch"] for row in result["rows"]} == {"sm_80", "sm_90", "sm_100"}
    for row in result["rows"]:
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= 255, row
    assert "regs" in done.stdout
    assert "sm_100" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_op_is_in_the_table(table):
    from fastssl.kernels._bench import all_ops

    assert {row["op"] for row in table[1]["rows"]} == {op.name for op in all_ops()}
    assert len(all_ops()) >= len(FOLDERS)


def test_spills_and_too_much_shared_memory_are_not_ok():
    good = Build("op", "case", "float32", "kernel", 80, 64, 0, 1024, 4)
    assert good.ok
    assert not Build("op", "case", "float32", "kernel", 80, 255, 8, 1024, 4).ok
    assert not Build("op", "case", "float32", "kernel", 80, 64, 0, SHARED_LIMIT[80] + 1, 4).ok
    assert good.as_dict()["arch"] == "sm_80"
