"""A run that is killed and goes on with another number of processes is the undisturbed run: the same images in the same
steps, each once per epoch, and the same losses but for rounding."""

import functools
import itertools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from killed import Moment, start
from tiny import recipe

from fastssl.config import ConfigError
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.index import order
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer
from fastssl.pretraining.trainer import Trainer, pretrain, split
from fastssl.training import checkpoint
from fastssl.training.loop import Stopped

KILLS = int(os.environ.get("FASTSSL_KILLS", "0"))  # of each run; 0: as many as continuous integration has time for
IMAGES, STEP = 48, 12  # of the data, and of one optimizer step
WORLDS = (4, 2, 3)  # processes, one start after the other: 1, 2 and 2 micro-batches of 3, 3 and 2 images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=IMAGES, val=4)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton"), parts=str(folder / "parts/train")))
    train_tokenizer(TokenizerOptions(str(folder / "train"), str(folder / "codebook.pt"), codes=16, cell=4, size=16))
    return folder


@functools.cache
def parsed(images, method):
    values = {
        **recipe(method),
        "data.path": images / "train.beton",
        "data.batch_size": 3,
        "data.workers": 1,
        "model.drop_path": 0.2,
        "optim.name": "sgd",  # Adam divides by gradients that are zero but for rounding
        "optim.lr": 1.6,
        "schedule.warmup_epochs": 1,
        "monitor.pictures": 0,
        "run.device": "cpu",
        "run.threads": 1,
        "run.log_every": 1,
        "run.save_every": 0.25,  # every step
        "run.images_per_step": STEP,
    }
    if method == "cae":
        values["cae.tokenizer"] = images / "codebook.pt"
    return parse_pretrain([f"--method={method}", *(f"--{key}={value}" for key, value in values.items())])[0]


def config(images, run, method, epochs, **more):
    made = parsed(images, method)
    for key, value in {"run__dir": str(run), "schedule__epochs": epochs, **more}.items():
        section, name = key.split("__")
        made = replace(made, **{section: replace(getattr(made, section), **{name: value})})
    return made


def noted(meeting, world):
    """Step -> the images that all processes of a start took in it."""
    taken = {}
    for rank in range(world):
        path = Path(f"{meeting}.{rank}.images")
        for line in path.read_text().splitlines() if path.exists() else ():
            step, ids = json.loads(line)
            taken.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in taken.items()}


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("method", ["mae", "semmae", "cae"])
def test_killed_on_four_two_and_three_processes_a_run_is_the_undisturbed_one(images, tmp_path, method):
    kills, dice, run = KILLS or 2, random.Random(method), tmp_path / "run"
    epochs = kills + 1
    taken = {}
    for life, world in enumerate(itertools.islice(itertools.cycle(WORLDS), kills + 1)):
        moment = None
        if life < kills:
            rank = dice.randrange(world)
            event = dice.randint(8, 20) if rank == 0 else dice.randint(3, 4)  # other processes only make steps
            moment = Moment(event, dice.choice([0.0, dice.uniform(0, 0.02)]), dice.random(), rank)
        meeting = str(tmp_path / f"meeting{life}")
        codes = start(world, config(images, run, method, epochs), meeting, moment)
        said = "\n".join(Path(f"{meeting}.{rank}.txt").read_text() for rank in range(world))
        if moment is None:
            assert codes == [0] * world, said
        else:  # the others end by themselves, or are asked to while they do
            assert codes.pop(moment.rank) == -9, said
            assert set(codes) <= {1, -15}, (codes, said)
            assert said.count("fastssl: error: another process of this run has ended") >= codes.count(1), said
            assert "Traceback" not in said
        taken |= noted(meeting, world)  # what a step took when it was made last: that one counts
    pretrain(config(images, tmp_path / "whole", method, epochs, data__batch_size=STEP))

    steps = epochs * IMAGES // STEP
    orders = np.concatenate([order(IMAGES, 0, epoch) for epoch in range(epochs)])  # every image once in each
    assert taken == {step: sorted(ids.tolist()) for step, ids in enumerate(orders.reshape(steps, STEP))}
    assert len(losses(run)) == steps
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert checkpoint.read(run / "last.pt").step == steps


@pytest.mark.parametrize(
    ("images", "world", "most", "accumulate"),
    [
        (12, 1, 12, 1),
        (12, 4, 3, 1),
        (12, 2, 3, 2),
        (12, 3, 3, 2),
        (12, 1, 5, 3),
        (12, 12, 64, 1),
        (21, 3, 6, 7),
        (4096, 24 * 8, 64, 0),
    ],
)
def test_a_step_is_split_into_the_fewest_equal_micro_batches_that_fit(images, world, most, accumulate):
    if accumulate:
        assert split(images, world, most) == accumulate
    else:
        with pytest.raises(
            ConfigError, match=r"cannot be divided among 192 processes; .* take them: 1, 2, 4, .*, 256$"
        ):
            split(images, world, most)


def test_a_run_goes_on_with_its_images_per_step_and_says_how_they_are_split(images, tmp_path, capsys, monkeypatch):
    pretrain(config(images, tmp_path, "saae", 2, run__images_per_step=0, run__steps=1, data__batch_size=STEP))
    assert "split anew" not in capsys.readouterr().err
    pretrain(config(images, tmp_path, "saae", 2, run__images_per_step=0, run__steps=2, data__batch_size=5))
    said = capsys.readouterr().err
    assert "12 images per step (4 x 1 processes x 3 accumulated), 4 steps per epoch" in said
    assert "split anew: the checkpoint's images per step, 12, are 4 x 1 processes x 3 accumulated" in said
    assert "changed: images x processes of a micro-batch (was 12 x 1, now 4 x 1): the contrast of images, " in said
    assert "pre-flight" not in said
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(start["batch_size"], start["accumulate"]) for start in starts] == [(12, 1), (4, 3)]

    with pytest.raises(checkpoint.CheckpointError, match=r"images_per_step \(was 12, now 24\), steps_per_epoch"):
        Trainer(config(images, tmp_path, "saae", 2, run__images_per_step=24))
    odd = Trainer(config(images, tmp_path / "odd", "saae", 2, run__images_per_step=23, data__batch_size=STEP))
    assert "23, are 1 x 1 processes x 23 accumulated" in odd.resplit
    assert odd.resplit.endswith("; so few at once are slow: 22 or 24 images per step would be taken 11 or 12 at once")
    with pytest.raises(ConfigError, match="has 48 images, fewer than one optimizer step takes: 96"):
        Trainer(config(images, tmp_path / "other", "saae", 2, run__images_per_step=96))
    with monkeypatch.context() as other:
        other.setattr("fastssl.training.distributed.gather", lambda step: torch.cat([step, 0 * step]))
        with pytest.raises(
            checkpoint.CheckpointError, match=r"at different steps \(0 to 2\); --run\.dir must name one"
        ):
            Trainer(config(images, tmp_path, "saae", 2))
    monkeypatch.setattr("fastssl.training.distributed.from_main", lambda make: make())
    monkeypatch.setattr("fastssl.training.distributed.world", lambda: 5)
    with pytest.raises(ConfigError, match="12 images per optimizer step cannot be divided among 5 processes"):
        Trainer(config(images, tmp_path, "saae", 2))


def test_where_another_process_was_asked_to_stop_torchrun_starts_this_one_anew(images, tmp_path, monkeypatch):
    run = Trainer(config(images, tmp_path, "mae", 2))
    run.draw, run.log = lambda: None, Mock()
    assert run.stopped("asked to stop", 143)["finished"] is False
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(Stopped) as ended:
        run.stopped("asked to stop", 143)
    assert ended.value.code == 143
    run.signal = 15  # it was asked itself: torchrun is ending
    assert run.stopped("asked to stop", 143)["finished"] is False
