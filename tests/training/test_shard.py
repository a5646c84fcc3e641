"""A network spread over two processes trains as one that both have whole, and its checkpoint serves everybody."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import recipe

from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.loaders.synthetic import draw_images
from fastssl.parse import parse_pretrain
from fastssl.pretraining.trainer import Trainer
from fastssl.training import checkpoint, shard_files
from fastssl.training.checkpoint import CheckpointError

RUN = {
    **{"data.batch_size": 8, "data.workers": 1, "schedule.epochs": 2, "schedule.warmup_epochs": 0, "optim.lr_batch": 0},
    **{"run.device": "cpu", "run.threads": 1, "run.log_every": 1, "monitor.pictures": 0, "run.steps": 2},
}
MAE = {
    **{"method": "mae", "run.accumulate": 2, "data.batch_size": 4},
    **{"optim.name": "lars", "optim.clip_grad": 0.3, "optim.lr": 1.0},
}
# The learned gain of the prototypes, one number a row, and moments that begin when the first epoch is over.
DINO = {
    **{"method": "dino", "dino.norm_last_layer": "false", "optim.lr": 1e-4, "run.steps": 3, "run.keep_every": 1},
    **{"monitor.every": 1, "monitor.pictures": 2, "model.depth": 3, "model.width": 36},
}
BF16 = {**MAE, "run.precision": "bf16", "run.accumulate": 1, "data.batch_size": 8}
RUNS = {  # by folder, one after the other
    "mae": [MAE],
    "mae-fsdp": [{**MAE, "run.shard": "fsdp", "run.recompute": "true"}],
    "dino": [DINO],
    "dino-fsdp": [{**DINO, "run.shard": "fsdp"}],
    "bf16": [BF16],
    "bf16-fsdp": [{**BF16, "run.shard": "fsdp"}],
    "continued": [{**MAE, "run.shard": "fsdp", "run.steps": 1}, {**MAE, "run.shard": "fsdp"}],
    "from-whole": [{**MAE, "run.steps": 1}, {**MAE, "run.shard": "fsdp"}],
    "fp16": [{**MAE, "run.precision": "fp16", "run.shard": "fsdp"}],
    "resnet": [{"method": "dino", "model.name": "resnet18", "model.depth": 0, "model.heads": 0, "run.shard": "fsdp"}],
}


def configuration(root, name, given):
    values = {"data.path": root / "images/train", "data.val": root / "images/val", "run.dir": root / name}
    values = {**values, **RUN, **recipe(given["method"]), **given}
    return parse_pretrain([f"--{key}={value}" for key, value in values.items()])[0]


def train(rank, root):
    """The results, or what was refused, of every run."""
    found = {}
    for name, parts in RUNS.items():
        for given in parts:
            try:
                trainer = Trainer(configuration(Path(root), name, given))
                found[name] = {**trainer.train(), "estimate": trainer.estimate}
            except ConfigError as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory, on_processes):
    root = tmp_path_factory.mktemp("shard")
    draw_images(root / "images", train=32, val=16)
    first, second = on_processes(2, train, str(root))
    return root, first, second


def assert_close(first, second, bound):
    """Two checkpoints with the same tensors but for rounding: of weights, teacher and moments."""
    a, b = checkpoint.read(first), checkpoint.read(second)
    assert (a.step, a.network.keys()) == (b.step, b.network.keys())
    for key, value in a.network.items():
        torch.testing.assert_close(b.network[key], value, rtol=bound, atol=bound, msg=lambda s, key=key: f"{key}: {s}")
    assert a.optimizer["state"].keys() == b.optimizer["state"].keys()
    for i, row in a.optimizer["state"].items():
        for name, value in row.items():
            size = value.abs().max().item()
            torch.testing.assert_close(b.optimizer["state"][i][name], value, rtol=10 * bound, atol=10 * bound * size)
    assert a.optimizer.get("taken") == b.optimizer.get("taken")


@pytest.mark.parametrize(
    ("one", "other", "bound"),
    [
        ("mae", "mae-fsdp", 1e-5),
        ("dino", "dino-fsdp", 1e-4),
        ("bf16", "bf16-fsdp", 1e-2),
        ("mae", "from-whole", 1e-5),
        ("mae-fsdp", "continued", 1e-5),
    ],
)
def test_shards_train_as_the_whole(trained, one, other, bound):
    root, results, _ = trained
    for key in ("loss", "grad_norm"):
        assert results[other][key] == pytest.approx(results[one][key], rel=10 * bound)
    assert_close(root / one / "last.pt", root / other / "last.pt", bound)


def test_the_preflight_line_knows_shards_and_recomputation(trained):
    _, first, _ = trained
    whole, shared = first["dino"]["estimate"], first["dino-fsdp"]["estimate"]
    assert shared.memory < whole.memory
    assert (shared.checkpoint, shared.flops) == (whole.checkpoint, whole.flops)
    assert first["mae-fsdp"]["estimate"].flops > 1.2 * first["mae"]["estimate"].flops  # blocks are computed twice


def test_all_processes_measure_and_the_main_one_draws(trained):
    root, first, _ = trained
    assert first["dino-fsdp"]["knn_top1"] == pytest.approx(first["dino"]["knn_top1"], abs=7)  # one of 16 images
    assert [file.name for file in (root / "dino-fsdp/pictures").iterdir()] == ["attention-0000003.png"]


def test_a_checkpoint_is_a_small_file_with_a_folder_and_the_ones_before_are_gone(trained):
    root, *_ = trained
    run = root / "dino-fsdp"
    assert sorted(file.name for file in run.glob("*.pt*")) == [
        *("epoch-0001.pt", "epoch-0001.pt.shards-0000002", "last.pt", "last.pt.shards-0000003")
    ]
    saved, shards = checkpoint.read_hollow(run / "last.pt")
    matrices = [key for key, value in saved.network.items() if value.is_meta]
    assert "teacher.backbone.blocks.2.mlp.fc1.weight" in matrices
    assert "student.head.last_layer.weight_v" in matrices
    assert len(shards["files"]) == 2
    assert (run / "last.pt").stat().st_size < 0.5 * (root / "dino/last.pt").stat().st_size


def test_one_process_goes_on_with_what_two_kept_in_shards(trained):
    root, *_ = trained
    run = root / "to-whole"
    run.mkdir()
    for name in ("epoch-0001.pt", "epoch-0001.pt.shards-0000002"):
        (shutil.copytree if "shards" in name else shutil.copy)(root / "dino-fsdp" / name, run / name)
    (run / "epoch-0001.pt").rename(run / "last.pt")
    Trainer(configuration(root, "to-whole", {**DINO, "data.batch_size": 16, "monitor.every": 0})).train()
    assert_close(root / "dino/last.pt", run / "last.pt", 1e-4)
    with checkpoint.locked(run, "--run.dir"):  # as at the next start
        assert not list(run.glob("*.shards-*"))


def test_evaluation_and_export_put_it_together(trained, tmp_path, capsys):
    root, *_ = trained
    data = [f"--data={root / 'images/train'}", f"--val={root / 'images/val'}", "--device=cpu", "--workers=1"]
    printed = []
    for name in ("dino", "dino-fsdp"):
        file = str(root / name / "last.pt")
        assert main(["evaluate", "knn", f"--checkpoint={file}", *data]) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if "top-1" in line])
        assert main(["export", file, str(tmp_path / f"{name}.safetensors")]) == 0
    assert len(printed[0]) == len(printed[1])
    a, b = (checkpoint.load(tmp_path / f"{name}.safetensors") for name in ("dino", "dino-fsdp"))
    assert all(torch.allclose(b[key], value, atol=1e-4) for key, value in a.items())


def test_what_does_not_work_is_refused(trained, tmp_path, capsys):
    root, first, second = trained
    assert "run.precision" in first["fp16"]
    assert first["resnet"] == second["resnet"]
    assert "set run.shard none" in first["resnet"]
    with pytest.raises(ConfigError, match=r"run\.compile"):
        Trainer(configuration(root, "x", {**MAE, "run.shard": "fsdp", "run.compile": "true"}))
    Trainer(configuration(root, "x", {**MAE, "run.shard": "fsdp"}))
    assert "needs several processes (torchrun)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"run\.recompute computes a ViT's blocks"):
        Trainer(configuration(root, "x", {**RUNS["resnet"][0], "run.shard": "none", "run.recompute": "true"}))


def test_a_file_that_is_cut_or_missing_is_one_line(trained, tmp_path):
    root, *_ = trained
    run = tmp_path / "run"
    shutil.copytree(root / "mae-fsdp", run)
    (folder,) = run.glob("last.pt.shards-*")
    second = max(folder.iterdir())
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=rf"is not whole: .*{second.name} has \d+ bytes, not {len(content)}"):
        checkpoint.read(run / "last.pt")
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        checkpoint.read(run / "last.pt")
    second.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="cannot be read from"):
        checkpoint.read(run / "last.pt")
    folder.rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"has its tensors in {folder.name} beside it, and that folder is not"):
        checkpoint.read(run / "last.pt")


def test_folders_of_killed_runs_go_at_the_next_start_and_no_others(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "dino-fsdp", run)
    kept = {file.name for file in run.iterdir()}
    for name in ("last.pt.shards-0000009", "epoch-0002.pt.shards-0000008", "last.pt.shards-0000003-2"):
        (run / name).mkdir()
    assert shard_files.new_folder(run / "last.pt", 3) == "last.pt.shards-0000003-3"
    with checkpoint.locked(run, "--run.dir"):
        assert {file.name for file in run.iterdir()} == kept
    (run / "last.pt").rename(run / "mine.pt")
    with checkpoint.locked(run, "--run.dir"):
        assert checkpoint.read(run / "mine.pt").step == 3


def save(path, step):
    """As a sharded run does, on one process; returns the folder."""
    saved = checkpoint.Checkpoint("pretrain", {}, {"w": torch.full((8, 8), float(step))}, None, step)
    folder = path.with_name(shard_files.new_folder(path, step))
    shards = shard_files.save({"network/w": saved.network["w"]}, folder)
    checkpoint.write(path, replace(saved, network={"w": torch.empty(8, 8, device="meta")}), shards)
    return folder


def test_a_folder_stays_as_long_as_a_file_of_any_name_needs_it(tmp_path, capsys):
    last = tmp_path / "last.pt"
    folders = []
    for step, copy in ((1, "last.pt.bak"), (2, "half"), (3, "")):
        folders.append(save(last, step))
        if copy:
            shutil.copy(last, tmp_path / copy)
    os.truncate(tmp_path / "half", last.stat().st_size // 2)  # as while it is being copied
    save(last, 4)
    assert [folder.exists() for folder in folders] == [True, True, False]
    assert "half cannot be read; what it may need stays: last.pt.shards-0000002" in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "last.pt.bak").network["w"].mean() == 1
    (tmp_path / "half").write_bytes(b"PK\3\4 of something else")
    (tmp_path / "foreign.pt").write_text("not a checkpoint")
    folder = save(last, 5)
    assert {path.name for path in tmp_path.glob("*.shards-*")} == {folders[0].name, folder.name}
    assert not capsys.readouterr().err
    last.write_bytes(bytes(100))
    shard_files.tidy(tmp_path)
    assert folder.exists()
    assert "last.pt cannot be read" in capsys.readouterr().err


def test_a_run_killed_anywhere_in_a_save_has_a_whole_checkpoint(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    last = tmp_path / "last.pt"
    save(last, 1)
    for owner, name in (
        (os, "replace"),
        (shard_files, "tidy"),
        (shutil, "rmtree"),
    ):  # folder, file, then the old folder
        before = checkpoint.read(last).step
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                save(last, before + 1)
        step = before + (name != "replace")
        saved = checkpoint.read(last)
        assert (saved.step, saved.network["w"].mean()) == (step, step)
        assert len(list(tmp_path.glob("last.pt.shards-*"))) > 1
        with checkpoint.locked(tmp_path, "--run.dir"):  # the next start
            assert checkpoint.read(last).step == step
            assert len(list(tmp_path.glob("last.pt.shards-*"))) == 1


def test_a_reader_that_a_save_overtakes_gets_the_newer_checkpoint(tmp_path, monkeypatch):
    last = tmp_path / "last.pt"
    save(last, 1)
    fill = shard_files.fill

    def overtaken(*arguments, **keywords):
        monkeypatch.setattr(shard_files, "fill", fill)
        save(last, 2)
        fill(*arguments, **keywords)

    monkeypatch.setattr(shard_files, "fill", overtaken)
    assert checkpoint.read(last).network["w"].mean() == 2


def test_a_process_need_not_see_the_files_of_the_others(tmp_path, monkeypatch):
    folder = tmp_path / "last.pt.shards-0000001"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda _: iter(()))  # a network disk's old list
        files = shard_files.save({"w": torch.ones(8, 8)}, folder)["files"]
    assert files == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert len(files) == 1


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    folder = tmp_path / "last.pt.shards-0000001"
    folder.mkdir()
    with pytest.raises(shard_files.ShardError, match="No space left"):
        shard_files.save({}, folder)
    assert not folder.exists()
