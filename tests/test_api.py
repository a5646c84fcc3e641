"""The commands as functions: the same names, checks and results; docs/tour.ipynb runs from end to end."""

import inspect
import json
from pathlib import Path

import matplotlib as mpl
import pytest

import fastssl
from fastssl.api import _arguments
from fastssl.cli import EVALUATE
from fastssl.config import ConfigError

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
TINY = {
    "FOLDER": "",
    "RECIPE": "quickstart",
    "RUN": "run",
    "TRAIN": 16,
    "VAL": 8,
    "OPTIONS": {
        "model": {"width": 24, "depth": 1, "heads": 2},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
        "run.device": "cpu",
        "data.batch_size": 8,
        "data.workers": 1,
        "mae.decoder_width": 16,
    },
}


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    settings = {}
    exec("".join(cells[0]["source"]), settings)
    assert settings.keys() - {"__builtins__"} == TINY.keys()
    names = dict(TINY)
    for cell in cells[1:]:
        exec("".join(cell["source"]), names)
    assert names["summary"]["step"] == 2
    assert names["features"].shape == (2, 24)
    assert 0 <= names["result"].top1 <= 100
    assert names["result"].as_dict()["checkpoint"] == names["checkpoint"]
    assert {path.name for path in Path("run").glob("features.*")} == {"features.npy", "features.csv", "features.png"}
    # Importing from the folder of the name has not taken the function away.
    again = fastssl.pretrain("quickstart", data={"path": names["train"]}, run={"dir": "run"}, monitor={"every": 0},
                             **TINY["OPTIONS"])  # fmt: skip
    assert (again["step"], again["finished"]) == (2, True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: fastssl.pretrain(method="dino", data={"pathh": "x"}),
            "unknown key 'data.pathh'; did you mean 'data.path'",
        ),
        (
            lambda: fastssl.pretrain(method="dino", **{"optim.lr": -1, "data.path": "x"}),
            r"optim\.lr is -1\.0; it must be",
        ),
        (lambda: fastssl.pretrain(method="dyno"), "method is 'dyno'; did you mean 'dino'"),
        (lambda: fastssl.evaluate("knnn", "c", "d"), "protocol is 'knnn'; it must be one of knn, linear"),
        (lambda: fastssl.evaluate("knn", "c", "d", "v", kk=3), "unknown key 'kk'"),
        (lambda: fastssl.load("no.pt"), "no.pt: no such checkpoint"),
    ],
)
def test_errors_are_the_command_lines(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert isinstance(caught.value, ConfigError) or "checkpoint" in words


def test_options_become_arguments():
    options = {
        "data": {"path": Path("a b"), "batch_size": 4},
        "optim.betas": (0.9, 0.95),
        "optim.weight_decay_end": None,
    }
    assert _arguments({**options, "baselines": True}) == [
        *("--data.path=a b", "--data.batch_size=4", "--optim.betas=[0.9, 0.95]", "--optim.weight_decay_end=null"),
        "--baselines=true",
    ]


def test_protocols_are_those_of_the_command():
    hint = inspect.get_annotations(fastssl.evaluate)["protocol"]
    names = fastssl.api.Protocols.__args__
    assert hint == "Protocols"
    assert set(names) == EVALUATE.members.keys()


def test_what_is_given_by_name_wins_over_a_recipe():
    assert _arguments({"epochs": 3, "config": "r.yaml"}) == ["--config=r.yaml", "--epochs=3"]
