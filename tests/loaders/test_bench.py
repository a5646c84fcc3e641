"""The loader bench: its rows, its peers, its advice and its errors."""

import json
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from fastssl.augment import augment
from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.loaders.bench import CASES, LoaderBenchOptions, advise, bench, cpu_seconds
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.peers import PEERS, Missing, Peer
from fastssl.loaders.sources import open_source

KEYS = {"case", "engine", "stage", "images_per_s", "low", "high", "cpu_ms_per_image", "cpu_percent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k in range(10):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg")
    return folder


def test_stages_and_the_whole_of_our_engines(folder, capsys, tmp_path):
    options = LoaderBenchOptions(
        str(folder), "dino,single,decode", "ffcv,reference,bare-decode", seconds=0.05, rounds=2, batch_size=4,
        workers="1", step_images_per_s=1000.0, plot=str(tmp_path / "rates.png"),
    )  # fmt: skip
    result = bench(options, augment)
    assert all(row.keys() == KEYS for row in result.rows)
    found = {(row["case"], row["engine"], row["stage"]) for row in result.rows}
    for engine in ("ffcv", "reference"):
        stages = {"overall", "read", "decode", "crop"}
        assert {stage for case, name, stage in found if (case, name) == ("single", engine)} == stages
        assert {stage for case, name, stage in found if (case, name) == ("dino", engine)} == stages | {"photometric"}
    assert ("decode", "bare-decode", "overall") in found
    for row in result.rows:
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert row["cpu_ms_per_image"] >= 0
    assert "use data.engine=" in result.table()
    assert "a step that takes 1000 img/s needs" in result.table()
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(result.as_dict())


def test_a_sweep_over_workers_tells_its_rows_as_they_come(folder, capsys, tmp_path):
    options = LoaderBenchOptions(
        str(folder), "single,decode", "ffcv,bare-decode", seconds=0.05, rounds=1, batch_size=4, workers="1, 2",
        plot=str(tmp_path / "rates.png"),
    )  # fmt: skip
    result = bench(options, augment)
    expected = [(c, e, w) for c, e in (("single", "ffcv"), ("single", "bare-decode")) for w in (1, 2)]
    expected += [("decode", "bare-decode", w) for w in (1, 2)]
    found = [(row["case"], row["engine"], row["workers"]) for row in result.rows]
    assert sorted(found) == sorted(expected)
    lines = capsys.readouterr().err.splitlines()
    for row in result.rows:
        assert row.keys() == KEYS | {"workers", "beside_percent"}
        assert row["beside_percent"] > 0
        [line] = [line for line in result.table().splitlines() if line in lines and line.startswith(row["case"])
                  and f" {row['engine']} " in line and f" {row['workers']} workers" in line]  # fmt: skip
        assert line.endswith(f"{row['workers']} workers; a thread beside keeps {row['beside_percent']:.0f} %")
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("case", CASES)
def test_every_peer_works_through_all_images(name, case, folder, tmp_path):
    needs = {"peer-dali": "nvidia.dali", "peer-ffcv": "ffcv"}.get(name)
    if needs:
        pytest.importorskip(needs)  # not by its first part: PyTorch brings other packages named nvidia.*
    path = tmp_path / "data.beton"
    convert(ConvertOptions(str(folder), str(path)))
    peer = Peer(open_source(str(path)), np.arange(10), CASES[case], batch_size=4, workers=1, beton=str(path))
    with ExitStack() as stack:
        if name == "peer-ffcv" and case != "single":
            with pytest.raises(Missing, match="one crop per decoding"):
                PEERS[name](peer, stack)
            return
        epoch = PEERS[name](peer, stack)
        assert [epoch(), epoch()] == [10, 10]


def test_cpu_time_of_children_counts():
    code = "import time\nwhile time.process_time() < 0.4: pass\nprint(time.process_time(), flush=True)\ninput()"
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        theirs = float(child.stdout.readline())
        spent = cpu_seconds() - before
        child.communicate(b"\n")
    assert 0.9 * theirs < spent < 1.8 * theirs  # once, and little of our own


def test_advice_names_the_bottleneck(folder):
    def row(engine, stage, ms):
        rate = 1e3 / ms
        numbers = {"images_per_s": rate, "low": rate, "high": rate, "cpu_ms_per_image": ms, "cpu_percent": 100.0}
        return {"case": "dino", "engine": engine, "stage": stage, **numbers}

    rows = [row("reference", "overall", 9.0), row("ffcv", "overall", 3.0), row("peer-dali", "overall", 1.0)]
    rows += [row("ffcv", "decode", 1.0), row("ffcv", "crop", 0.5), row("ffcv", "photometric", 1.5)]
    lines = "\n".join(advise(rows, open_source(str(folder)), np.arange(10), 2, 400.0))
    assert "use data.engine=ffcv (333 img/s with 2 workers)" in lines
    assert "the bottleneck is photometric: 1.50 of 3.00 CPU ms per image (50%)" in lines
    assert "a step that takes 400 img/s needs 1.2 cores" in lines


def test_the_command(folder, capsys):
    arguments = ["bench", "loader", "--data", str(folder), "--case", "single", "--engine", "ffcv", "--seconds", "0.05"]
    assert main([*arguments, "--rounds", "1", "--workers", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"env", "rows"} <= result.keys()
    for wrong, message in (
        (["--case", "dinosaur"], "case is 'dinosaur'; it must be of dino, dino-uint8, single, decode"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
        (["--rounds", "0"], "rounds is 0; it must be 1 or more"),
        (["--workers", "1,two"], "workers is '1,two'; it must be numbers such as 1,2,4"),
    ):
        assert main([*arguments, *wrong]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="none of the contenders asked for works here"):
        bench(LoaderBenchOptions(str(folder), "dino", "peer-ffcv", seconds=0.05), augment)
