"""`fastssl doctor` answers wherever something is missing, broken or hangs."""

import importlib.util
import json
import time

import pytest

from fastssl import doctor as module
from fastssl.cli import main
from fastssl.doctor import DoctorOptions, Finding, doctor


def test_it_ends_with_one_line_that_names_every_check(tmp_path, capsys):
    code = main(["doctor", str(tmp_path)])
    *_, head, line = capsys.readouterr().out.splitlines()
    assert code == 0
    assert head == "for a bug report:"
    assert line.startswith("fastssl 0")
    assert all(f"; {name} " in line for name in ("PyTorch", "GPU", "Triton", "NCCL", "decoder", "cores", "disk"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_breaks_or_hangs_is_a_finding(tmp_path, monkeypatch, capsys):
    def breaks():
        raise SystemExit("libcuda.so.1\nis not there")

    find = importlib.util.find_spec
    gone = ("triton", "numba", "pycocotools")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setattr(module, "_nccl", breaks)
    monkeypatch.setattr(module, "_cores", lambda: time.sleep(60))
    found = doctor(DoctorOptions(str(tmp_path / "nowhere"), patience=1.0))
    assert not found.ok
    assert found.findings["NCCL"].text == "does not work: libcuda.so.1 is not there"
    assert found.findings["cores"].text == "no answer within 1 s"
    assert "pip install numba" in found.findings["decoder"].mend
    assert "pip install triton" in found.findings["Triton"].mend
    assert "without pycocotools" in found.findings["evaluation"].text
    assert "No such file" in found.findings["disk"].text
    table = found.table()
    assert table.count("BROKEN") == 2
    assert all(finding.cost in table and finding.mend in table for finding in found.findings.values())
    assert "\n" not in found.line
    json.dumps(found.as_dict())


@pytest.mark.parametrize(("limit", "quota"), [("max 100000", 0.0), ("150000 100000", 1.5), ("", 0.0)])
def test_a_containers_limit_is_read(limit, quota, monkeypatch):
    monkeypatch.setattr(module.Path, "read_text", lambda self: limit)
    assert module._quota() == quota


def test_a_slow_disk_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_timed", lambda move: (2**26, 60.0))
    found = module._disk(tmp_path)
    assert "page_window" in found.mend
    assert isinstance(found, Finding)
