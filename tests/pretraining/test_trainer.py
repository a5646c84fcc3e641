"""The trainer's promises: exact resume, the same result from one or two processes, clean ends, clear stops."""

import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import recipe

from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.masks import draw
from fastssl.loaders.synthetic import draw_images
from fastssl.methods import METHODS
from fastssl.parse import parse_pretrain
from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer
from fastssl.pretraining.preflight import loading_rate
from fastssl.pretraining.trainer import Trainer, pretrain
from fastssl.training import checkpoint
from fastssl.training.loop import TrainingError
from fastssl.training.snapshot import Saver

RUN = {
    "data.batch_size": 16,
    "data.workers": 1,
    "schedule.epochs": 8,
    "schedule.warmup_epochs": 1,
    "run.device": "cpu",
    "run.threads": 1,
    "run.log_every": 5,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw_images(tmp_path_factory.mktemp("images"), train=64, val=16)
    convert(ConvertOptions(str(folder / "train"), str(folder / "train.beton"), parts=str(folder / "parts/train")))
    train_tokenizer(TokenizerOptions(str(folder / "train"), str(folder / "codebook.pt"), codes=16, cell=4, size=16))
    return folder


def arguments(images, run, method="dino", **more):
    keys = {key.replace("__", "."): value for key, value in more.items()}
    data = images / ("train.beton" if method == "semmae" else "train")  # the one with part maps
    values = {"data.path": data, "run.dir": run, **RUN, **recipe(method), **keys}
    if method == "cae":
        values["cae.tokenizer"] = images / "codebook.pt"
    return [f"--method={method}", *(f"--{key}={value}" for key, value in values.items())]


def config(images, run, method="dino", **more):
    return parse_pretrain(arguments(images, run, method, **more))[0]


def same(a, b):
    """Whether two checkpoint contents are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_run(first, second):
    a, b = checkpoint.read(first / "last.pt"), checkpoint.read(second / "last.pt")
    assert a.step == b.step
    for key in ("network", "optimizer", "scaler"):
        assert same(getattr(a, key), getattr(b, key)), f"{key} differs"


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_resumed_for_ten_more_are_twenty_bitwise(images, tmp_path, method):
    more = {"model__drop_path": 0.2}
    pretrain(config(images, tmp_path / "whole", method, run__steps=20, **more))
    pretrain(config(images, tmp_path / "parts", method, run__steps=10, **more))
    assert checkpoint.read(tmp_path / "parts/last.pt").step == 10
    pretrain(config(images, tmp_path / "parts", method, run__steps=20, **more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize("method", ["dino", "scfs"])
def test_bfloat16_runs_keep_float32_weights_and_continue_bitwise(images, tmp_path, method):
    more = {"run__precision": "bf16", "model__drop_path": 0.2}
    pretrain(config(images, tmp_path / "whole", method, run__steps=4, **more))
    pretrain(config(images, tmp_path / "parts", method, run__steps=2, **more))
    trainer = Trainer(config(images, tmp_path / "parts", method, run__steps=4, **more))
    assert len(trainer.masters) > 10
    linear = trainer.method.student.head.mlp[0].weight
    assert linear.dtype == torch.bfloat16
    saved = checkpoint.read(tmp_path / "parts/last.pt").network
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    exact = saved["student.head.mlp.0.weight"]
    assert not torch.equal(exact, exact.bfloat16().float())  # more than the copy knows
    assert torch.equal(linear, exact.bfloat16())
    trainer.train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    pretrain(config(images, tmp_path / "parts", method, run__steps=5, model__drop_path=0.2))  # float32 may go on


def test_resume_inside_an_epoch_with_accumulation_is_exact(images, tmp_path):
    more = {"data__batch_size": 8, "run__accumulate": 2}
    pretrain(config(images, tmp_path / "whole", run__steps=7, **more))
    pretrain(config(images, tmp_path / "parts", run__steps=3, **more))
    pretrain(config(images, tmp_path / "parts", run__steps=7, **more))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(images, run, **more):
    command = [sys.executable, "-m", "fastssl", "pretrain", *arguments(images, run, **more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, run, step):
    """Waits until the run's checkpoint has reached `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "last.pt").exists() and checkpoint.read(run / "last.pt").step >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended early: {process.stdout.read()}")
        time.sleep(0.02)
    pytest.fail("no checkpoint within two minutes")


@pytest.mark.parametrize(("method", "shares"), [("dino", [0, 1 / 3, 2 / 3, 1, 1]), ("mae", [0, 0.25, 0.5, 0.75, 1])])
def test_the_warmup_is_the_authors(images, tmp_path, method, shares):
    """Of four steps. What is built on DINO's code has numpy's linspace, MAE's divides by the epoch."""
    assert {name for name, kind in METHODS.items() if not kind.peak_twice} == {"mae", "semmae", "sit_v1"}
    trainer = Trainer(config(images, tmp_path, method))
    for trainer.step, share in enumerate(shares):
        assert trainer.schedule()["lr"] == pytest.approx(share * trainer.peak_lr)


def test_sigterm_saves_and_ends_cleanly(images, tmp_path):
    process = start(images, tmp_path, schedule__epochs=4000, run__save_every=0.25)
    wait_for_step(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "asked to stop" in output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is False
    assert checkpoint.read(tmp_path / "last.pt").step == summary["step"]


def test_sigterm_to_torchrun_saves_on_all_processes_and_leaves_none_behind(images, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastssl", "pretrain"]
    more = {"data__batch_size": 8, "run__log_every": 500}  # a signal does not wait for a log line
    command += arguments(images, tmp_path, schedule__epochs=4000, run__save_every=0.25, **more)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # ends only when every worker has closed its end of the pipe
    assert "asked to stop" in output
    assert json.loads((tmp_path / "starts.jsonl").read_text())["processes"] == 2  # one run, not two
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is False
    assert checkpoint.read(tmp_path / "last.pt").step == summary["step"]


SAME = {"run__steps": 6, "run__log_every": 1, "model__drop_path": 0.2, "optim__name": "sgd"}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_on(rank, given):
    pretrain(parse_pretrain(given)[0])


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_in_loss_and_weights(images, tmp_path, method, on_processes):
    # Drop path is on: what it drops depends on the sample, not on the process. SGD, because Adam divides by gradients
    # that are zero but for rounding (the bias of the attention keys). SCFS's first gradients here are a hundred times
    # larger: at rate 0.003 weights that differ by 6e-8 differ by 1.3e-4 after 6 steps, on one process too, and at this
    # rate by 3e-5.
    more = {**SAME, "optim__lr": 0.001 if method == "scfs" else 1.6}
    pretrain(config(images, tmp_path / "one", method, **more))
    on_processes(2, run_on, arguments(images, tmp_path / "two", method, data__batch_size=8, **more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert_close_weights(tmp_path / "two", tmp_path / "one")


def test_two_processes_in_bfloat16_are_near_one(images, tmp_path, on_processes):
    """Working copies under DDP, which exchanges their bfloat16 gradients."""
    more = {**SAME, "optim__lr": 0.1, "run__precision": "bf16"}
    pretrain(config(images, tmp_path / "one", "mae", **more))
    on_processes(2, run_on, arguments(images, tmp_path / "two", "mae", data__batch_size=8, **more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    one, two = (checkpoint.read(tmp_path / run / "last.pt").network for run in ("one", "two"))
    assert all(value.dtype == torch.float32 for value in two.values())
    assert all((two[key] - one[key]).norm() <= 0.02 * one[key].norm() + 1e-3 for key in one)


def assert_close_weights(first, second):
    """Weights that differ by no more than sums in another order make of them.

    A gradient is a sum over batch, patches and width in float32: its error is some units of 1e-7 of its terms' size,
    and its terms may cancel. Six steps of rate 1.6 carry the error of what moved most into what moved least, so the
    bound is a share of the network's largest movement: 2e-4 of it, with a tensor's own rounding (1e-3 of an element).
    """
    a, b = (checkpoint.read(run / "last.pt").network for run in (first, second))
    for key in a:
        size = max(b[key].float().abs().max().item(), 0.1)
        torch.testing.assert_close(
            a[key], b[key], rtol=1e-3, atol=2e-4 * size, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_accumulated_micro_batches_equal_one_large_batch(images, tmp_path):
    more = {"run__steps": 4, "optim__name": "sgd", "optim__lr": 1.6}  # SGD: Adam would hide a gradient of wrong size
    pretrain(config(images, tmp_path / "large", "mae", **more))
    pretrain(config(images, tmp_path / "small", "mae", data__batch_size=4, run__accumulate=4, **more))
    large, small = (checkpoint.read(tmp_path / run / "last.pt").network for run in ("large", "small"))
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-3, atol=2e-5)


def test_collapse_is_said_in_one_line_and_can_stop_the_run(images, tmp_path):
    more = {"optim__lr": 1e-12, "optim__min_lr": 0.0, "dino__warmup_teacher_temp": 100.0, "dino__teacher_temp": 100.0}
    with pytest.raises(TrainingError, match=r"health\.action=stop: step \d+: .*(pinned|uniform|collapsed)"):
        pretrain(config(images, tmp_path, health__action="stop", health__patience=4, **more))
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["health"] for line in lines if "health" in line]  # kept with the numbers


def test_the_run_folder_holds_config_log_and_summary(images, tmp_path, monkeypatch):
    save, copied = Saver.save, []
    monkeypatch.setattr(Saver, "save", lambda *what: copied.append(what[2].step) or save(*what))
    summary = pretrain(config(images, tmp_path, run__steps=10, run__keep_every=2))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "epoch", "loss", "lr", "images_per_s", "data_wait", "grad_norm", "teacher_entropy"} <= set(line)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["step"] == 10
    again = parse_pretrain([f"--config={tmp_path / 'config.yaml'}"])[0]
    # the shuffle's window, which is chosen by where the data lies, as the number that was chosen
    assert again.as_dict() == config(images, tmp_path, run__steps=10, run__keep_every=2, data__page_window=0).as_dict()
    kept, last = checkpoint.read(tmp_path / "epoch-0002.pt"), checkpoint.read(tmp_path / "last.pt")
    assert (kept.step, last.step) == (copied[1], 10)
    assert copied == sorted(set(copied))  # training waits for one copy, not for a file after the other
    (start,) = [json.loads(text) for text in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert {"step": 0, "device": "cpu", "processes": 1, "torch": torch.__version__}.items() <= start.items()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert "loss" in board.Tags()["scalars"]
    assert "optim:" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    content = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    shown = HParamsPluginData.FromString(content).experiment.hparam_infos
    assert {"optim.lr", "dino.out_dim"} <= {one.name for one in shown}
    (name,) = board.Tags()["images"]
    drawn = Image.open(tmp_path / "pictures" / f"{name}-0000010.png")
    assert (board.Images(name)[0].width, board.Images(name)[0].height) == drawn.size


def test_the_online_monitor_measures_and_does_not_disturb_the_run(images, tmp_path):
    monitored = {"monitor__every": 1, "data__val": images / "val", "monitor__k": 5}
    pretrain(config(images, tmp_path / "plain", run__steps=8, model__drop_path=0.2))
    summary = pretrain(config(images, tmp_path / "watched", run__steps=8, model__drop_path=0.2, **monitored))
    assert 0 <= summary["knn_top1"] <= 100
    assert_same_run(tmp_path / "plain", tmp_path / "watched")


def test_the_preflight_line_estimates_and_leaves_the_model_as_it_was(images, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(config(images, tmp_path, run__seed=3))
    estimate = trainer.estimate
    weights = sum(p.nbytes for p in trainer.method.state_dict().values())
    assert estimate.memory > 2 * weights
    assert estimate.checkpoint > weights
    assert estimate.flops > 1e5
    assert estimate.host == 16 * 3 * (2 * 32**2 + 2 * 16**2) * 4
    assert "per epoch" in estimate.line()
    assert torch.equal(trainer.method.center, torch.zeros(64))
    assert all(p.grad is None for p in trainer.method.parameters())


def test_the_loader_is_tried_before_a_run_of_more_than_a_few_steps(images, tmp_path, monkeypatch):
    few = Trainer(config(images, tmp_path))
    assert not [line for line in few.describe() if line.startswith("loader:")]
    monkeypatch.setattr("fastssl.pretraining.trainer.FEW_STEPS", 0)
    (line,) = [line for line in Trainer(config(images, tmp_path)).describe() if line.startswith("loader:")]
    assert re.match(
        r"loader: gives about [1-9][\d.]* images/s per process, the step is estimated to take [\d.]+: ", line
    )
    estimate = few.estimate
    for times, words in ((2, "enough"), (1, "it may just feed the step"), (0.5, "the step will wait for data")):
        assert f": {words}" in estimate.loader_line(times * estimate.images_per_s)
    assert estimate.seconds * estimate.images_per_s == pytest.approx(64)


def test_trying_a_loader_takes_a_bounded_time_and_leaves_no_thread(images, tmp_path, monkeypatch):
    loader = Trainer(config(images, tmp_path)).loader
    monkeypatch.setattr("fastssl.pretraining.preflight.SECONDS", 0.0)
    taken = []
    monkeypatch.setattr(loader._memory, "pinned", lambda batch: taken.append(batch) or batch)
    assert loading_rate(loader, 0) > 0
    assert len(taken) == 2  # the first and the one that is measured
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl-loader")]


def test_resnet_trains(images, tmp_path):
    more = {"model__name": "resnet18", "model__small_images": "true", "model__drop_path": 0.0}
    more |= {"model__width": 0, "model__depth": 0, "model__heads": 0, "data__batch_size": 4}
    summary = pretrain(config(images, tmp_path, run__steps=2, **more))
    assert summary["step"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data__batch_size": 65}, "64 images, fewer than"),
        ({"run__device": "gpu"}, "run.device"),
        ({"run__precision": "fp16"}, "needs a GPU"),
        ({"model__name": "vit_smal"}, "vit_small"),
        ({"monitor__every": 1, "data__val": "nowhere"}, "data.val is nowhere, which does not exist"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(images, tmp_path, more, words, capsys):
    assert main(["pretrain", *arguments(images, tmp_path / "run", **more)]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_not_continued_with_another_batch_or_model_or_against_ones_will(images, tmp_path):
    pretrain(config(images, tmp_path, run__steps=2))
    with pytest.raises(ConfigError, match=r"already holds a run; choose another run\.dir"):
        Trainer(config(images, tmp_path, run__resume="false"))
    with pytest.raises(checkpoint.CheckpointError, match=r"images_per_step \(was 16, now 8\), steps"):
        Trainer(config(images, tmp_path, run__images_per_step=8))
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.width \(was 32, now 64\)"):
        Trainer(config(images, tmp_path, model__width=64))
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this network"):
        Trainer(config(images, tmp_path, model__width=64, run__change="model.width"))
    with pytest.raises(checkpoint.CheckpointError, match=r"method \(was 'dino', now 'mae'\)"):
        Trainer(config(images, tmp_path, "mae"))


def test_pictures_show_masks_of_epoch_0_with_schedules_as_they_stand(images, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(METHODS["semmae"], "pictures", lambda self, batch, values: seen.append(batch) or {})
    settings = config(images, tmp_path, "semmae", run__steps=9, run__seed=3, monitor__pictures=2)
    pretrain(settings)
    (batch,) = seen
    (mask,) = METHODS["semmae"].masks(settings)
    parts = batch.parts["main"][:, 0].flatten(1).numpy()
    expected = draw(mask, batch.id.numpy(), seed=3, epoch=0, parts=parts, schedule_epoch=2)  # 4 steps per epoch
    for a, b in zip(batch.masks["main"], expected, strict=True):
        assert torch.equal(a, torch.from_numpy(b))


def test_a_loader_without_its_compiled_part_is_said(images, tmp_path, monkeypatch):
    trainer = Trainer(config(images, tmp_path))
    assert not any("PIL decodes" in line for line in trainer.describe())
    monkeypatch.setattr("fastssl.loaders.batch_pool.available", lambda: False)
    assert any("PIL decodes, at half the speed or less" in line for line in trainer.describe())


def test_a_recipe_runs_on_a_flat_folder_and_says_what_is_off_and_what_its_batch_means(images, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").rglob("*.jpg"):
        (flat / f"{path.parent.name}-{path.name}").symlink_to(path)
    more = {"data__path": flat, "monitor__every": 1, "run__recipe_batch": 48, "run__steps": 1}
    pretrain(config(images, tmp_path / "run", "mae", **more))
    said = capsys.readouterr().err
    assert "online k-NN is off: data.val names no labelled images" in said
    assert "16 images per step where the recipe has 48: the peak learning rate is scaled by this" in said
    assert "--run.images_per_step 48 restores them" in said
    assert "step 1/1  loss " in said  # no terminal: a line per log step
    assert "\r" not in said

    more |= {"data__val": images / "val", "run__recipe_batch": 16}
    pretrain(config(images, tmp_path / "other", "mae", **more))
    said = capsys.readouterr().err
    assert f"online k-NN is off: {flat} has no labels" in said
    assert "where the recipe has" not in said
