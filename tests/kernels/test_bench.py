"""The bench: its gate, its rows and its errors (times need a GPU and are stubbed here)."""

import json
from dataclasses import replace

import pytest
import torch

from fastssl.cli import main
from fastssl.kernels import _bench
from fastssl.kernels._bench import FOLDERS, KernelBench, KernelBenchOptions, all_ops
from fastssl.kernels._check import KernelError
from fastssl.kernels.patch_pixel_loss.cases import OPS

CASES = {"small": {"B": 2, "size": (8, 8), "p": 4, "M": 2}}
SMALL = replace(OPS[0], proof=CASES, bench=CASES)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def with_made_up_times(monkeypatch):
    """The bench as it runs on a GPU, with made-up times; without a GPU the CPU stands in its place."""
    real_maker, real_verify = _bench.Maker, _bench.verify
    monkeypatch.setattr(_bench, "Maker", lambda device: real_maker(DEVICE))
    monkeypatch.setattr(_bench, "verify", lambda op, case, dtype, device: real_verify(op, case, dtype, DEVICE))
    monkeypatch.setattr(_bench, "build_all", lambda ops, archs: [])
    monkeypatch.setattr(_bench, "_copy_rate", lambda: 1e12)
    monkeypatch.setattr(_bench, "matrix_rate", lambda device, dtype: 1e15)
    monkeypatch.setattr(_bench.torch, "compile", lambda f, dynamic: f)

    def time(f, milliseconds):
        f()
        return {"ms": 2.0, "p20": 1.0, "p80": 3.0, "peak_mb": 0.5}

    monkeypatch.setattr(_bench, "_time", time)


def test_rows_have_the_promised_keys(with_made_up_times, capsys):
    result = _bench._time_all([SMALL], KernelBenchOptions(dtype="float32,bfloat16"))
    assert result.ok
    assert {row["dtype"] for row in result.rows} == {"float32", "bfloat16"}
    assert {row["path"] for row in result.rows} == {"triton", "eager", "compile"}
    assert {row["pass"] for row in result.rows} == {"forward", "forward+backward"}
    for row in result.rows:
        assert {"op", "case", "dtype", "path", "ms", "p20", "p80", "gbps", "fraction", "peak_mb"} <= row.keys()
    inputs = SMALL.inputs(_bench.Maker(DEVICE), torch.float32, **SMALL.bench["small"])
    least = SMALL.min_bytes(inputs, [], False)
    assert result.rows[0]["gbps"] == pytest.approx(least / 2e-3 / 1e9)
    assert result.rows[0]["fraction"] == pytest.approx(least / 2e-3 / 1e12)
    assert "patch_pixel_loss" in result.table()
    json.dumps(result.as_dict())


def test_no_numbers_for_an_op_whose_proof_fails(with_made_up_times, capsys):
    wrong = replace(SMALL, call=lambda **inputs: SMALL.reference(**inputs) * 1.1)
    result = _bench._time_all([wrong], KernelBenchOptions())
    assert not result.ok
    assert result.rows == []
    assert "not timed, because the proof failed: patch_pixel_loss" in result.failures[0]
    assert result.failures[0] in result.table()


def test_a_contender_that_fails_is_a_row_without_a_time(with_made_up_times, capsys):
    def broken(**inputs):
        raise RuntimeError("no such kernel\nmore")

    result = _bench._time_all([replace(SMALL, library={"other": broken})], KernelBenchOptions(path="library"))
    assert result.ok
    assert {row["error"] for row in result.rows} == {"RuntimeError: no such kernel"}
    assert all("ms" not in row for row in result.rows)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_op_says_what_the_table_needs(folder):
    for op in all_ops(folder):
        assert op.proof
        assert op.bench
        assert op.call.__doc__ or callable(op.call)
        name, case = next(iter(op.proof.items()))
        inputs = op.inputs(_bench.Maker(DEVICE), op.dtypes[0], **case)
        outputs = _bench.tensors(op.reference(**inputs))
        assert op.min_bytes(inputs, outputs, False) >= 0, name
        if op.gradients:
            assert op.min_bytes(inputs, outputs, True) >= 0, name
        assert op.flops(inputs, outputs, False) >= 0, name


def test_ops_are_chosen_by_name():
    assert [op.name for op in all_ops("patch_pixel_loss")] == ["patch_pixel_loss"]
    with pytest.raises(KernelError, match=r"op must be of .*patch_pixel_loss.*, not 'pixels'"):
        all_ops("pixels")
    with pytest.raises(KernelError, match="dtype must be of float32, float16, bfloat16, all, not 'half'"):
        KernelBenchOptions(dtype="half")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_the_command_says_what_works(capsys):
    assert main(["bench", "kernels"]) == 1
    assert "no CUDA device here; --compile-only builds the kernels without one" in capsys.readouterr().err
    assert main(["bench", "kernels", "--compile-only"]) == 1  # the tests interpret kernels
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    assert main(["bench", "weather"]) == 2
    assert "bench 'weather' is unknown; known: loader, kernels" in capsys.readouterr().err


def test_json_goes_to_the_file_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(_bench, "all_ops", lambda names: [])
    monkeypatch.setattr(_bench, "build_all", lambda ops, archs: [])
    out = tmp_path / "rows.json"
    result = _bench.bench(KernelBenchOptions(compile_only=True, out=str(out)))
    assert isinstance(result, KernelBench)
    assert json.loads(out.read_text()) == result.as_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
