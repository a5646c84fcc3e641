"""Weights & Biases and MLflow: one run per run folder, whatever fails is said in one line; where installed, offline."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import draw_classes, recipe

from fastssl.cli import main
from fastssl.training.log import RunLog


class Fake:
    """The part of wandb and mlflow that is used, remembering all calls."""

    def __init__(self):
        self.calls = []
        self.info = SimpleNamespace(run_id="run-7")
        self.id = "run-7"
        self.config = SimpleNamespace(update=lambda values, **_: self.calls.append(("describe", dict(values))))

    def init(self, **options):
        self.calls.append(("start", options["id"]))
        return self

    def start_run(self, run_id, run_name):
        self.calls.append(("start", run_id))
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, line):
        self.calls.append(("record", dict(line)))

    def log_metrics(self, line, step):
        self.calls.append(("record", {**line, "step": step}))

    def log_params(self, some):
        self.calls.append(("describe", dict(some)))

    def log_image(self, image, name):
        self.calls.append(("record", {name: image}))

    Image = staticmethod(lambda image: image)

    def finish(self):
        self.calls.append(("end", None))

    end_run = finish


@pytest.fixture(params=["wandb", "mlflow"])
def library(request, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, request.param, fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return request.param, fake


def test_one_run_per_folder_with_numbers_configuration_and_pictures(library, tmp_path):
    name, fake = library
    for step in (0, 3):
        log = RunLog(tmp_path, step, 6, loggers=(name,))
        log.describe("text", {f"key{i}": i for i in range(150)}, ())
        log.record({"step": step + 1, "loss": 2.5})
        log.picture("attention", Image.new("RGB", (4, 4)), step + 1)
        log.close()
    assert [value for kind, value in fake.calls if kind == "start"] == [None, "run-7"]
    assert json.loads((tmp_path / "loggers.json").read_text()) == {name: "run-7"}
    described = [value for kind, value in fake.calls if kind == "describe"]
    assert {len(some) for some in described} == ({150} if name == "wandb" else {100, 50})
    records = [value for kind, value in fake.calls if kind == "record"]
    assert {"step": 1, "loss": 2.5} in records
    assert {"step": 4, "loss": 2.5} in records
    assert len(records) == 4
    assert [kind for kind, _ in fake.calls].count("end") == 2


def test_one_that_fails_is_left_out_and_one_that_cannot_start_ends_the_start(library, tmp_path, capsys, monkeypatch):
    name, fake = library

    def broken(*arguments, **options):
        raise ConnectionError("no\nserver")

    log = RunLog(tmp_path, 0, 6, loggers=(name,))
    for method in ("log", "log_metrics"):
        monkeypatch.setattr(fake, method, broken)
    for step in (1, 2):
        log.record({"step": step, "loss": 2.5})
    log.close()
    said = capsys.readouterr().err
    assert said.count(f"{name} failed (no server); training goes on without it") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    for method in ("init", "start_run"):
        monkeypatch.setattr(fake, method, broken)
    with pytest.raises(
        ValueError, match=rf"run\.loggers: {name} cannot start \(no server\); mend that, or leave it out"
    ):
        RunLog(tmp_path, 2, 6, loggers=(name,))


@pytest.mark.parametrize(
    ("names", "words"),
    [("wandb,tensorbord", "run.loggers names 'tensorbord'; known: wandb, mlflow"),
     ("mlflow", "run.loggers names mlflow, which is not installed: pip install 'fastssl-vision[mlflow]'")],
)  # fmt: skip
def test_what_is_not_there_is_said_before_anything_starts(names, words, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    here = {"wandb": "here", "mlflow": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: here[name] if name in here else real(name, *more)
    )
    run = tmp_path / "run"
    arguments = ["--method=dino", f"--data.path={tmp_path}", f"--run.dir={run}", f"--run.loggers={names}"]
    assert main(["pretrain", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_libraries_themselves_offline(name, tmp_path, capsys, monkeypatch):
    library = pytest.importorskip(name)
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    settings |= {"MLFLOW_TRACKING_URI": (tmp_path / "ml").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    images = draw_classes(tmp_path / "images", images=8, seed=0)
    values = {**recipe("mae"), "data.path": images, "data.batch_size": 4, "data.workers": 1, "schedule.epochs": 2,
              "schedule.warmup_epochs": 0, "run.dir": tmp_path / "run", "run.device": "cpu", "run.log_every": 1,
              "run.loggers": name, "monitor.pictures": 1}  # fmt: skip
    arguments = ["pretrain", "--method=mae", *(f"--{key}={value}" for key, value in values.items())]
    assert main([*arguments, "--run.steps=2"]) == 0
    known = json.loads((tmp_path / "run" / "loggers.json").read_text())
    assert main(arguments) == 0
    assert "failed" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "loggers.json").read_text()) == known
    if name == "wandb":
        assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known[name]}"))) >= 1
    else:
        run = library.get_run(known[name])
        history = library.MlflowClient().get_metric_history(known[name], "loss")
        assert [point.step for point in history] == [1, 2, 3, 4]
        assert run.data.params["method"] == "mae"
        assert run.info.status == "FINISHED"
