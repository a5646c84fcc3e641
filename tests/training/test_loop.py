"""What every run on the one loop promises: exact continuation, clean stops, clear errors, one process equals two."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import recipe, save_checkpoint

from fastssl.config import Model
from fastssl.evaluation.frozen.attentive import AttentiveOptions, Probing
from fastssl.evaluation.tuned.detect import Detection, DetectOptions
from fastssl.evaluation.tuned.finetune import FinetuneOptions, Finetuner
from fastssl.evaluation.tuned.segment import Segmentation, SegmentOptions
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.pretraining.trainer import Trainer
from fastssl.training import checkpoint, distributed
from fastssl.training.checkpoint import CheckpointError
from fastssl.training.loop import Stopped, TrainingError

KINDS = ("pretrain", "finetune", "segment", "detect", "probe")
CPU = torch.device("cpu")
MODELS = {
    "vit": Model(name="vit_tiny", image_size=32, patch_size=8, width=24, depth=4, heads=2),
    "resnet": Model(name="resnet18", width=16, small_images=True, image_size=32),
}
SEGMENT = {"crop": 32, "short_side": 32, "long_side": 64, "channels": 8, "warmup_steps": 2, "pictures": 0}
DETECT = {"short_sides": (64,), "long_side": 80, "crop_short_sides": (72,), "crop": (40, 64), "test_side": 64}
DETECT |= {"channels": 8, "rois": 16, "warmup_steps": 2, "drop_epochs": (1,)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A drawn image set (classes, masks, boxes) with 24 training and 8 validation images, and two checkpoints."""
    folder = draw_images(tmp_path_factory.mktemp("images"), train=24, val=8)
    for name, model in MODELS.items():
        save_checkpoint(folder / f"{name}.pt", model)
    return folder


def build(kind, images, folder, model="vit", batch_size=4, **changes):
    """A run of each kind, of 12 steps of 4 images, small enough for a second, with its randomness on."""
    common = {"checkpoint": f"{images}/{model}.pt", "dir": str(folder), "device": "cpu", "workers": 1}
    common["batch_size"] = batch_size
    folders = {"data": f"{images}/train", "val": f"{images}/val"}
    if kind == "pretrain":
        values = {"data.path": images / "train", "run.dir": folder, "data.batch_size": batch_size, "data.workers": 1}
        values |= {"schedule.epochs": 2, "schedule.warmup_epochs": 1, "run.device": "cpu", "run.log_every": 2}
        values |= {**recipe("mae"), "model.drop_path": 0.2, "monitor.pictures": 0} | changes
        return Trainer(parse_pretrain(["--method=mae", *(f"--{key}={value}" for key, value in values.items())])[0])
    if kind == "finetune":
        values = {"epochs": 2, "warmup_epochs": 1, "ema": 0.9, **changes}
        return Finetuner(FinetuneOptions(**{**common, **folders, **values}), CPU)
    if kind == "segment":
        labels = {"data_labels": f"{images}/masks/train", "val_labels": f"{images}/masks/val"}
        return Segmentation(
            SegmentOptions(**{**common, **folders, **labels, **SEGMENT, "steps": 12, "eval_every": 6, **changes})
        )
    if kind == "detect":
        files = {"data": f"{images}/instances_train.json", "val": f"{images}/instances_val.json"}
        return Detection(DetectOptions(**{**common, **files, **DETECT, "epochs": 2, **changes}))
    quick = {"epochs": 2, "warmup_epochs": 1, "lrs": (0.1, 0.4), "step_size": batch_size}
    return Probing(AttentiveOptions(**{**common, **folders, **quick, **changes}))


def stop_at(run, step, number):
    """Lets the signal `number` come to this process while the run makes the step after `step`."""
    after_step = run.after_step

    def and_signal():
        after_step()
        if run.step == step:
            os.kill(os.getpid(), number)

    run.after_step = and_signal


def same(a, b):
    """Whether two values of a record are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_asked_to_stop_continues_bitwise(kind, images, tmp_path):
    whole = build(kind, images, tmp_path / "whole")
    whole.train()
    first = build(kind, images, tmp_path / "parts")
    # Four steps of six in the first epoch. SIGUSR1 is what SLURM sends ahead of the end.
    stop_at(first, 3, signal.SIGUSR1 if kind == "pretrain" else signal.SIGTERM)
    if kind == "pretrain":
        assert first.train()["finished"] is False
    else:
        with pytest.raises(
            Stopped, match=r"asked to stop \(SIGTERM\): step 4 is saved in .*; the same command"
        ) as stop:
            first.train()
        assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoint.read(first.path, kind).step == 4
    torch.manual_seed(77)
    second = build(kind, images, tmp_path / "parts")
    assert second.step == 4
    second.train()
    a, b = checkpoint.read(whole.path), checkpoint.read(second.path)
    assert a.step == b.step == 12
    for name in ("network", "optimizer", "scaler", "fingerprint"):
        assert same(getattr(a, name), getattr(b, name)), name
    for name in a.extra.keys() - {"options"}:
        assert same(a.extra[name], b.extra[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_saves_and_the_command_ends_with_130(kind, images, tmp_path):
    run = build(kind, images, tmp_path / "run")
    stop_at(run, 1, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="step 2 is saved") as stop:
        run.train()
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.read(run.path, kind).step == 2


def test_ctrl_c_where_nothing_is_kept_ends_at_once(images):
    run = build("probe", images, "")
    stop_at(run, 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_command_saves_and_says_so(images, tmp_path, number, code):
    command = [sys.executable, "-m", "fastssl", "evaluate", "finetune", f"--checkpoint={images}/vit.pt", "--lr=1e-4"]
    command += [f"--data={images}/train", f"--val={images}/val", f"--dir={tmp_path}", "--device=cpu", "--workers=1"]
    process = subprocess.Popen(
        [*command, "--batch_size=4", "--epochs=5000"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does: to the run and its decoding workers
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    step = checkpoint.read(tmp_path / "last.pt", "finetune").step
    assert f"asked to stop ({number.name}): step {step} is saved" in said.splitlines()[-1]


def test_a_checkpoint_that_is_being_written_is_not_kept_yet_and_a_full_disk_ends_the_run(images, tmp_path, monkeypatch):
    run = build("pretrain", images, tmp_path / "run", **{"run.save_every": 0.5})  # every third step
    write, kept = checkpoint.write, []

    def slow(path, saved, **more):
        kept.append((saved.step, run.saved_step))
        time.sleep(0.2)
        if saved.step == 6:
            raise CheckpointError(f"{path}: the checkpoint could not be written (No space left on device)")
        write(path, saved, **more)

    monkeypatch.setattr(checkpoint, "write", slow)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*No space left"):
        run.train()
    assert kept == [(3, 0), (6, 3)]
    assert run.saved_step == checkpoint.read(run.path).step == 3
    assert 6 <= run.step < 12
    assert f"{run.path} (step 3)" in run.kept()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "probe"])  # of its probes one may diverge
def test_a_loss_that_is_not_finite_names_step_and_samples(kind, images, tmp_path):
    run = build(kind, images, tmp_path / "run")
    losses, seen = run.losses, []

    def poisoned(batch):
        loss, terms = losses(batch)
        if run.step == 7:
            seen.extend(run.sample_ids(batch))
            loss = loss * float("nan")
        return loss, terms

    run.losses = poisoned
    with pytest.raises(TrainingError) as error:
        run.train()
    assert "step 8: the loss is not finite" in str(error.value)
    assert len(seen) == 4
    assert str(seen) in str(error.value)
    assert f"kept: {run.path} (step 6)" in str(error.value)
    assert checkpoint.read(run.path).step == 6


@pytest.mark.parametrize("kind", KINDS)
def test_another_runs_checkpoint_is_refused_with_the_keys_that_differ(kind, images, tmp_path):
    run = build(kind, images, tmp_path / "run")
    run.save(run.folder.mkdir() or run.path)
    run.saver.wait()
    other = {**{key: {"lr": 3.0} for key in KINDS}, "pretrain": {}, "probe": {"seed": 3}}
    more = {"run.images_per_step": 8} if kind == "pretrain" else {"batch_size": 8}
    with pytest.raises(CheckpointError) as error:
        build(kind, images, tmp_path / "run", **more, **other[kind])
    for key in (*other[kind], "images_per_step"):
        assert f"{key} (was " in str(error.value)
    assert run.folder_option in str(error.value)
    if kind != "probe":
        stranger = "segment" if kind == "finetune" else "finetune"
        with pytest.raises(CheckpointError, match=r"last\.pt is of .*, not of "):
            build(stranger, images, tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_and_split_may_change_when_a_run_goes_on(kind, images, tmp_path):
    run = build(kind, images, tmp_path / "run")
    run.save(run.folder.mkdir() or run.path)
    run.saver.wait()
    if kind == "pretrain":
        split = {"batch_size": 2, "run.accumulate": 2, "run.precision": "bf16"}
    else:
        split = {"batch_size": 2, "precision": "bf16"}
        split |= {"step_size": 4} if kind == "probe" else {"accumulate": 2}
    again = build(kind, images, tmp_path / "run", **split)
    assert again.dtype == torch.bfloat16
    assert again.pace.images_per_step == 4
    assert again.pace.accumulate == 2
    stream = again.micro_batches()
    again.train_step(stream)
    stream.close()
    assert all(value.isfinite().all() for value in again.network.state_dict().values())


def steps_on(rank, kind, images, folder, batch_size, changes):
    """Three steps of a run on one of several processes: its losses and its network."""
    run = build(kind, Path(images), Path(folder), batch_size=batch_size, **changes)
    stream, losses = run.micro_batches(), []
    for _ in range(3):
        run.train_step(stream)
        _, _, rows = run.ring.drain()
        losses.append(rows[0]["loss"])
    stream.close()
    return losses, {key: value.double() for key, value in run.network.state_dict().items()}


PLAIN = {"drop_path": 0.0}  # stochastic depth is drawn per process, but in pretraining by sample
SPLITS = {
    "pretrain": {"model.drop_path": 0.2, "optim.name": "sgd", "optim.lr": 1.0},
    "finetune": {**PLAIN, "model": "resnet", "augment": "", "erase": 0.0, "mixup": 0.0, "cutmix": 0.0},
    "segment": {**PLAIN, "dropout": 0.0, "lr": 1e-3},
    "probe": {},
}


@pytest.mark.parametrize("kind", SPLITS)
def test_two_processes_with_half_the_batch_are_one_with_the_whole(kind, images, tmp_path, on_processes):
    """Detection is left out: torchvision's losses are means over the boxes of one process, and its draws of boxes too.

    The losses differ by the rounding of sums in another order, a few units of 1e-7 per step, which batch norm over 8
    images enlarges; Adam divides by gradients, so weights differ by up to a thousandth of what they moved.
    """
    changes = SPLITS[kind]
    one, network = steps_on(0, kind, images, tmp_path / "one", 8, changes)
    if kind == "probe":
        changes = {"step_size": 8}
    pair = on_processes(2, steps_on, kind, str(images), str(tmp_path / "two"), 4, changes)
    for losses, weights in pair:
        assert losses == pytest.approx(one, rel=2e-5)
        for key, value in network.items():
            say = lambda text, key=key: f"{key}: {text}"  # noqa: E731
            torch.testing.assert_close(weights[key], value, rtol=2e-3, atol=2e-4, msg=say)


def agree(rank, raised):
    """At which call each process hears that one has raised its flag."""
    agreement = distributed.Agreement()
    for call in range(6):
        if agreement(rank == 1 and call >= raised):
            return call
    agreement.close()
    return None


def test_processes_agree_to_stop_at_the_same_step(on_processes):
    assert on_processes(2, agree, 2) == [3, 3]
    assert on_processes(2, agree, 9) == [None, None]


def test_fine_tunings_worker_processes_end_with_its_stream(images, tmp_path):
    """They leave signals to the run, so one that outlived the stream would keep the whole process from ending."""
    run = build("finetune", images, tmp_path / "run")
    before = set(multiprocessing.active_children())
    stream = run.micro_batches()
    next(stream)
    assert set(multiprocessing.active_children()) - before
    stream.close()
    assert set(multiprocessing.active_children()) <= before
