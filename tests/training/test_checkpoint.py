"""The checkpoint record: written whole or not at all, read with one clear line for whatever is wrong."""

import errno

import numpy as np
import pytest
import torch

from fastssl.cli import main
from fastssl.config import Model
from fastssl.loaders.synthetic import draw_images
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError


def saved(**changes):
    network = {"encoder.w": torch.arange(4.0), "head.w": torch.zeros(1000)}
    config = {"model": {"name": "vit_tiny", "depth": 2}, "optim": {"betas": [0.9, 0.95]}}
    plain = {"kind": "pretrain", "config": config, "network": network, "backbone_prefix": "encoder."}
    return Checkpoint(**plain | changes)


def test_a_record_comes_back_and_opens_without_this_package(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.write(path, saved(step=3, extra={"history": [[1, 2.5]]}))
    read = checkpoint.read(path)
    assert (read.kind, read.step, read.extra, read.path) == ("pretrain", 3, {"history": [[1, 2.5]]}, str(path))
    assert torch.equal(read.network["encoder.w"], torch.arange(4.0))
    assert list(read.backbone()) == ["w"]
    assert torch.load(path, weights_only=True)["config"] == saved().config
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.write(path, saved(step=1))

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*No space left on device.*free some space"):
        checkpoint.write(path, saved(step=2))
    assert checkpoint.read(path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_bad_files_get_one_line(tmp_path):
    whole = tmp_path / "last.pt"
    checkpoint.write(whole, saved())
    content = torch.load(whole, weights_only=True)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "text.pt").write_text("hello")
    made = {
        "foreign": {"model": {}},
        "older": {"format": "fastssl-1", "method": {}},
        "less": {key: value for key, value in content.items() if key != "config"},
        "more": {**content, "mood": 1},
        "odd": {**content, "step": "three"},
        "kind": {**content, "kind": "unheard"},
    }
    for name, values in made.items():
        torch.save(values, tmp_path / f"{name}.pt")
    cases = {
        "none.pt": "no such checkpoint",
        "": "is a folder",
        "cut.pt": "cannot be read as a checkpoint",
        "text.pt": "is a text, not weights",
        "foreign.pt": "is not a fastssl checkpoint",
        "older.pt": "is not a fastssl checkpoint",
        "less.pt": "config is missing",
        "more.pt": "(mood)",
        "odd.pt": "step is unusable",
        "kind.pt": "kind is unusable",
    }
    for name, words in cases.items():
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(tmp_path / name)
        assert words in str(error.value)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_another_kind_of_checkpoint_is_named(tmp_path):
    checkpoint.write(tmp_path / "a.pt", saved(kind="probe", backbone_prefix=None))
    with pytest.raises(CheckpointError, match=r"a\.pt is of attentive probes, not of a pretraining run or an import"):
        checkpoint.read(tmp_path / "a.pt", "pretrain", "import")
    with pytest.raises(CheckpointError, match=r"a\.pt is of attentive probes and holds no backbone"):
        checkpoint.read(tmp_path / "a.pt").backbone()


def test_sections_become_their_dataclasses_or_one_line():
    assert saved().section(Model, "model").depth == 2
    assert (
        saved().section(Model, "model", resample="dino").resample == "dino"
    )  # a record from before there was this key
    named = {"model": {"name": "vit_tiny", "resample": "plain"}}
    assert saved(config=named).section(Model, "model", resample="dino").resample == "plain"
    for config, words in (
        ({}, "does not describe its model"),
        ({"model": {"name": "vit_tiny", "colour": 3}}, "written with 'model.colour', which version"),
        ({"model": {"name": "vit_tiny", "drop_path": 7}}, "drop_path"),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            saved(config=config).section(Model, "model")
        assert "\n" not in str(error.value)


def test_a_continuation_with_other_settings_lists_every_key_that_differs():
    record = saved(fingerprint={"lr": 0.1, "images": 10, "seed": 0})
    record.check({"lr": 0.1, "images": 10, "seed": 0}, "--dir")
    with pytest.raises(CheckpointError) as error:
        record.check({"lr": 0.2, "images": 10, "size": 32}, "--dir")
    assert "lr (was 0.1, now 0.2), seed (was 0, now None), size (was None, now 32)" in str(error.value)
    assert "--dir" in str(error.value)


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_evaluate_without_a_checkpoint_says_so(tmp_path, capsys):
    images = draw_images(tmp_path, train=8, val=8)
    data = ["--data", str(images / "train"), "--val", str(images / "val")]
    code = main(["evaluate", "knn", "--checkpoint", str(tmp_path / "no.pt"), *data])
    assert code == 1
    assert "no.pt: no such checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("core", ["core", "_core"])
def test_scalars_of_either_numpy_are_read(core, tmp_path):
    torch.save({"lr": np.float64(0.5)}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "file.pth").read_bytes()
    (tmp_path / "file.pth").write_bytes(
        content.replace(b"numpy._core.multiarray\n", f"numpy.{core}.multiarray\n".encode())
    )
    assert checkpoint.load(tmp_path / "file.pth") == {"lr": 0.5}
