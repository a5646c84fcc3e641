"""A run that is killed again and again, at random moments and inside the writing of its files, is in the end the run
that nobody disturbed."""

import json
import os
import random

import pytest
import torch
from killed import Moment, start
from tiny import recipe

from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.training import checkpoint

KILLS = int(os.environ.get("FASTSSL_KILLS", "0"))  # of each run; 0: as many as continuous integration has time for
CLOCK = ("time", "images_per_s", "data_wait")  # what a log line has of the clock


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=32, val=4)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton")))
    return folder


def config(images, run, world, steps, save_every):
    values = {
        **recipe("mae"),
        "data.path": images / "train.beton",
        "data.batch_size": 8 // world,
        "data.workers": 1,
        "model.depth": 1,
        "model.drop_path": 0.2,
        "schedule.epochs": steps // 4,
        "schedule.warmup_epochs": 2,
        "monitor.pictures": 0,
        "run.dir": run,
        "run.device": "cpu",
        "run.threads": 1,
        "run.log_every": 3,
        "run.save_every": save_every,
    }
    return parse_pretrain(["--method=mae", *(f"--{key}={value}" for key, value in values.items())])[0]


def lines(run):
    """The log's whole lines, without the clock's numbers. Only the last one may be cut."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize(("world", "kills"), [(1, KILLS or 6), (2, KILLS or 3)], ids=["one", "two"])
def test_killed_again_and_again_a_run_ends_as_if_nobody_had(images, tmp_path, world, kills):
    dice, run, steps = random.Random(world), tmp_path / "run", 8 * kills
    given = config(images, run, world, steps, save_every=0.25)  # every step
    reached, killed, starts = 0, 0, 0
    while True:
        moment = None
        if killed < kills:
            delay = dice.choice([0.0, dice.uniform(0, 0.02)])
            rank = dice.randrange(world)
            event = dice.randint(1, 5 if rank else 40)  # other processes only make steps
            moment = Moment(event, delay, dice.random(), rank)
        codes = start(world, given, str(tmp_path / f"meeting{starts}"), moment)
        starts += 1
        if codes == [0] * world:
            break
        said = "\n".join((tmp_path / f"meeting{starts - 1}.{rank}.txt").read_text() for rank in range(world))
        assert moment is not None, said
        assert codes[moment.rank] == -9, said
        killed += 1
        if (run / "last.pt").exists():
            step = checkpoint.read(run / "last.pt").step
            assert step >= reached
            reached = step
        lines(run)
    assert killed == kills, f"the run was at its end after {killed} kills"
    assert start(world, config(images, tmp_path / "whole", world, steps, 1000), str(tmp_path / "alone")) == [0] * world

    ours, whole = (checkpoint.read(folder / "last.pt") for folder in (run, tmp_path / "whole"))
    assert ours.step == whole.step == steps
    assert ours.extra["health"] == whole.extra["health"]
    for part in ("network", "optimizer", "scaler", "fingerprint"):
        assert same(getattr(ours, part), getattr(whole, part)), part
    assert lines(run) == lines(tmp_path / "whole")
    assert len(lines(run)) == -(-steps // 3)
    assert not list(run.glob(".*.part"))
    assert json.loads((run / "summary.json").read_text())["finished"] is True
