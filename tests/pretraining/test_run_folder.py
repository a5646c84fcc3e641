"""A run folder cannot lie: other settings or data, two runs at once, weights that are not finite, a full disk."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import recipe

from fastssl.cli import main
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.pretraining.trainer import Trainer, pretrain
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError, InUseError, locked
from fastssl.training.loop import TrainingError

RUN = {
    "data.batch_size": 8,
    "data.workers": 1,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 1,
    "run.device": "cpu",
    "run.threads": 1,
    "run.log_every": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=32, val=8)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton")))
    return folder


def arguments(images, run, data="train.beton", **more):
    values = {"data.path": images / data, "run.dir": run, **RUN, **recipe("mae")}
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return ["--method=mae", *(f"--{key}={value}" for key, value in values.items())]


def config(*given, **more):
    return parse_pretrain(arguments(*given, **more))[0]


def files(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.fixture
def finished(images, tmp_path):
    pretrain(config(images, tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule__epochs": 3}, r"epochs \(was 2, now 3\); .*\(--run\.change schedule\.epochs\)"),
        ({"schedule__epochs": 1, "schedule__warmup_epochs": 0}, r"schedule\.epochs \(was 2, now 1\), .*warmup_epochs"),
        ({"optim__lr": 0.5}, r"optim\.lr \(was 0\.00015, now 0\.5\)"),
        ({"mae__mask_ratio": 0.5}, r"mae\.mask_ratio \(was 0\.75, now 0\.5\)"),
        ({"views__main__flip": 0.1}, r"views\.main\.flip \(was 0\.5, now 0\.1\)"),
        ({"run__seed": 1}, r"run\.seed \(was 0, now 1\)"),
        ({"model__depth": 1}, r"model\.depth \(was 2, now 1\)"),
        ({"run__images_per_step": 4}, r"images_per_step \(was 8, now 4\)"),
    ],
)
def test_other_settings_are_listed_and_refused(finished, images, change, words):
    before = files(finished)
    with pytest.raises(CheckpointError, match=words):
        Trainer(config(images, finished, **change))
    assert files(finished) == before


def test_what_shapes_nothing_may_change(finished, images):
    for change in (
        {"data__engine": "reference", "data__workers": 2, "data__prefetch": 1},
        {"data__batch_size": 4, "run__accumulate": 2},
        {"run__log_every": 1, "run__save_every": 0.5, "monitor__k": 3, "health__patience": 3},
        {"run__precision": "bf16"},
    ):
        pretrain(config(images, finished, **change))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["loss"] > 0  # a start that trains nothing keeps what is known


def test_the_same_images_elsewhere_are_the_same_and_others_are_not(finished, images, tmp_path):
    (tmp_path / "moved").mkdir()
    for path in images.glob("train.beton*"):
        shutil.copy(path, tmp_path / "moved" / path.name)
    Trainer(config(tmp_path / "moved", finished))
    other = draw_images(tmp_path / "other", train=32, val=8, seed=5)
    convert(ConvertOptions(str(other / "train"), str(other / "train.beton")))
    with pytest.raises(CheckpointError, match=r"data \(was '\w+', now '\w+'\)"):
        Trainer(config(other, finished))


def test_a_folder_is_known_by_names_sizes_and_labels(images, tmp_path):
    pretrain(config(images, tmp_path / "run", "train"))
    shutil.copytree(images / "train", tmp_path / "train")
    Trainer(config(tmp_path, tmp_path / "run", "train"))
    first = next((tmp_path / "train").rglob("*.jpg"), None) or next((tmp_path / "train").rglob("*.png"))
    first.rename(first.with_name("zz" + first.name))
    with pytest.raises(CheckpointError, match=r"data \(was"):
        Trainer(config(tmp_path, tmp_path / "run", "train"))


def test_a_change_that_is_asked_for_is_said_and_kept(finished, images, capsys):
    more = {"schedule__epochs": 3, "run__change": "schedule.epochs"}
    pretrain(config(images, finished, **more))
    said = capsys.readouterr().err
    assert "changed: schedule.epochs (was 2, now 3)" in said
    assert "the schedule goes on at step 8 with learning rate" in said
    assert "4 steps are left" in said
    saved = checkpoint.read(finished / "last.pt")
    assert saved.step == 12
    assert saved.extra["changes"] == ["step 8: schedule.epochs (was 2, now 3)"]
    with pytest.raises(CheckpointError, match=r"optim\.lr"):
        Trainer(config(images, finished, **more, optim__lr=0.5))
    with pytest.raises(CheckpointError, match=r"'optim\.rate' is no setting"):
        Trainer(config(images, finished, schedule__epochs=3, run__change="optim.rate"))


def test_one_run_at_a_time(finished, images):
    before = files(finished)
    with locked(finished, "--run.dir"):
        words = rf"in use by process {os.getpid()} on .*; wait for it, or choose another --run\.dir"
        with pytest.raises(InUseError, match=words):
            Trainer(config(images, finished)).train()
    assert files(finished) == before
    pretrain(config(images, finished))


def test_a_checkpoint_that_moved_on_after_it_was_read_is_not_overwritten(finished, images):
    """A requeued start reads the checkpoint while the old one is still writing its last."""
    late = Trainer(config(images, finished, schedule__epochs=3, run__change="schedule.epochs"))
    pretrain(config(images, finished, schedule__epochs=3, run__change="schedule.epochs"))
    with pytest.raises(InUseError, match="has moved on since this start read it; start again"):
        late.train()
    assert checkpoint.read(finished / "last.pt").step == 12


def test_a_file_that_cannot_be_read_does_not_end_the_start(images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "train")
    first = next(path for path in (tmp_path / "train").rglob("*") if path.is_file())
    (first.parent / f"dangling{first.suffix}").symlink_to(tmp_path / "nowhere")
    assert pretrain(config(tmp_path, tmp_path / "run", "train", run__steps=1))["step"] == 1


def test_a_killed_process_leaves_no_lock_and_no_half_written_file(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fastssl.training.checkpoint import locked\n"
        "with locked(Path(sys.argv[1]), '--dir'):\n"
        "    (Path(sys.argv[1]) / '.last.pt.123.part').write_text('half'); print('in', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(InUseError, match=f"process {process.pid} on"):
        locked(tmp_path, "--dir").__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path, "--dir"):
        assert not list(tmp_path.glob(".*.part"))


def save_often(path, seed):
    torch.manual_seed(seed)
    for step in range(15):
        record = checkpoint.Checkpoint("pretrain", {}, {"weight": torch.full((2000,), float(seed))}, None, step=step)
        checkpoint.write(path, record)


def test_two_savers_in_one_folder_never_leave_half_a_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    context = multiprocessing.get_context("fork")
    savers = [context.Process(target=save_often, args=(path, seed)) for seed in (1, 2)]
    for saver in savers:
        saver.start()
    tries = 0
    while any(saver.is_alive() for saver in savers):
        if path.exists():
            weight = checkpoint.read(path).network["weight"]
            assert weight.unique().numel() == 1
            tries += 1
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert tries > 0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_weights_that_are_not_finite_never_replace_good_ones(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run", run__save_every=0.5))
    step = trainer.train_step

    def poisoned(stream):
        step(stream)
        if trainer.step == 4:
            trainer.method.decoder.pred.weight.data[0, 0] = torch.nan

    trainer.train_step = poisoned
    with pytest.raises(TrainingError, match=r"step 4: decoder\.pred\.weight and 0 more .* not finite; .*\(step 2\)"):
        trainer.train()
    saved = checkpoint.read(tmp_path / "run/last.pt")
    assert saved.step == 2
    assert all(value.isfinite().all() for value in saved.network.values())


def test_a_folder_that_cannot_be_written_is_one_line_before_the_first_step(finished, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    before, limits = files(finished), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk, nothing can be written
    try:
        for run in (finished, tmp_path / "new", tmp_path / "file/run"):
            assert main(["pretrain", *arguments(images, run)]) == 1
            error = capsys.readouterr().err
            assert re.fullmatch(rf"fastssl: error: {run} cannot be written \(.*\); free .*another --run\.dir\n", error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(finished) == before


def test_lines_have_a_time_and_a_log_that_cannot_be_written_is_said_once(images, tmp_path, capsys):
    trainer = Trainer(config(images, tmp_path / "run", run__log_every=1))
    step, begin = trainer.train_step, time.time()

    def full(stream):
        step(stream)
        if trainer.step == 3:
            trainer.log.file.close()

    trainer.train_step = full
    summary = trainer.train()
    assert summary["finished"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(begin - 1 < line["time"] < time.time() + 1 for line in lines)
    assert capsys.readouterr().err.count("the log cannot be written") == 1


def test_every_step_is_in_one_log_line(images, tmp_path):
    """The checkpoint of step 4 holds its scalars, which the start that made it has logged at its end."""
    for steps in (4, 8, 8):
        pretrain(config(images, tmp_path / "parts", run__log_every=3, run__steps=steps))
    pretrain(config(images, tmp_path / "whole", run__log_every=1))
    rows = [[json.loads(line) for line in (tmp_path / f"{run}/metrics.jsonl").open()] for run in ("parts", "whole")]
    loss = [row["loss"] for row in rows[1]]
    means = {3: sum(loss[:3]) / 3, 4: loss[3], 6: sum(loss[4:6]) / 2, 8: sum(loss[6:]) / 2}
    assert {row["step"]: row["loss"] for row in rows[0]} == pytest.approx(means)
    assert len(rows[0]) == 4


def test_pictures_that_cannot_be_written_do_not_end_the_run(images, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "pictures").write_text("in the way")
    assert pretrain(config(images, run, monitor__pictures=2))["finished"]
    assert "pictures cannot be written" in capsys.readouterr().err


def test_repeated_images_are_said(images, tmp_path, capsys):
    first = next((images / "train").rglob("*.*"))
    (tmp_path / "same").mkdir()
    for i in range(16):
        shutil.copy(first, tmp_path / "same" / f"{i}{first.suffix}")
    pretrain(config(tmp_path, tmp_path / "run", "same", run__steps=1))
    assert "of 16 images looked at only 1 differ" in capsys.readouterr().err


def test_workers_end_when_torchrun_is_killed(images, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastssl"]
    command += ["pretrain", *arguments(images, tmp_path / "run", schedule__epochs=4000, run__save_every=0.5)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.pt").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    output, _ = process.communicate(timeout=90)  # ends only when every worker has closed its end of the pipe
    assert "asked to stop (SIGTERM)" in output
    checkpoint.read(tmp_path / "run/last.pt")
