"""Every evaluation is a line in evaluations.jsonl, beside the checkpoint; a checkpoint may come first on the line."""

import hashlib
import json

import pytest
from tiny import draw_classes, save_checkpoint

from fastssl.cli import EVALUATE, main
from fastssl.config import Model
from fastssl.evaluation.record import recorded

VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return [f"--data={draw_classes(root / 'a', 12, 0)}", f"--val={draw_classes(root / 'b', 9, 1)}", "--device=cpu"]


def read(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_what_was_measured_is_kept(data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.pt", VIT)
    (tmp_path / "evaluations.jsonl").write_text('{"protocol": "kn')  # of a process that was killed
    assert main(["evaluate", "knn", checkpoint, *data, "--ks=[3]", "--workers=1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        main(["evaluate", "linear", "--checkpoint", checkpoint, *data, "--epochs=2", "--lrs=[0.1]", "--workers=1"]) == 0
    )
    with open(tmp_path / "evaluations.jsonl") as file:
        assert file.readline() == '{"protocol": "kn\n'
        first, second = map(json.loads, file)
    assert list(first) == ["protocol", "checkpoint", "sha256", "step", "data", "val", "options", "results", "time"]
    assert [line["protocol"] for line in (first, second)] == ["knn", "linear"]
    assert first["results"] == printed
    assert (first["checkpoint"], first["step"]) == (checkpoint, 7)
    assert [f"--data={first['data']}", f"--val={first['val']}"] == data[:2]
    assert first["options"]["ks"] == [3]
    assert not {"checkpoint", "data", "val"} & first["options"].keys()
    assert first["sha256"] == hashlib.sha256((tmp_path / "last.pt").read_bytes()).hexdigest()
    assert 0 <= second["time"] - first["time"] < 600


def test_a_folder_that_cannot_be_written_costs_the_line_alone(data, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.pt", VIT)
    (tmp_path / "evaluations.jsonl").mkdir()
    assert main(["evaluate", "knn", checkpoint, *data, "--ks=[3]", "--workers=1"]) == 0
    assert "the result is not kept" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", EVALUATE.members)
def test_every_protocol_is_recorded_and_takes_the_checkpoint_first(protocol, tmp_path, monkeypatch, capsys):
    import importlib

    command = EVALUATE.members[protocol]
    module = importlib.import_module(f"fastssl.{command.module}")
    run = getattr(module, command.function)
    names = []

    class Result:
        table = staticmethod(lambda: "")
        as_dict = staticmethod(lambda: {"step": 3})

    def measure(options):
        names.append(options.checkpoint)
        return Result

    assert recorded("x")(measure).__code__ is run.__code__
    monkeypatch.setattr(module, command.function, recorded(protocol)(measure))
    (tmp_path / "last.pt").write_bytes(b"weights")
    assert (
        main(["evaluate", protocol, str(tmp_path / "last.pt"), "--data=a", *(["--val=b"] if protocol != "ssl" else [])])
        == 0
    )
    assert names == [str(tmp_path / "last.pt")]
    [line] = read(tmp_path)
    assert (line["protocol"], line["step"], line["val"]) == (protocol, 3, None if protocol == "ssl" else "b")
    assert main(["evaluate", protocol, "--data=a"]) == 2
    assert "needs CHECKPOINT" in capsys.readouterr().err
