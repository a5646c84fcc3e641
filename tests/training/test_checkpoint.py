import errno

import pytest
import torch

from fastssl.cli import main
from fastssl.loaders.synthetic import draw_images
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError


def test_saved_content_comes_back_and_opens_without_this_package(tmp_path):
    content = {"step": 3, "method": {"w": torch.arange(4.0)}, "config": {"optim": {"betas": [0.9, 0.95]}}, "scaler": {}}
    checkpoint.save(tmp_path / "last.pt", content)
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 3
    assert torch.equal(loaded["method"]["w"], torch.arange(4.0))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["config"] == content["config"]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(content, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*No space left on device.*free some space"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_bad_files_get_one_line(tmp_path):
    whole = tmp_path / "last.pt"
    checkpoint.save(whole, {"step": 1, "w": torch.ones(1000)})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:700])
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    text = tmp_path / "text.pt"
    text.write_text("hello")
    cases = {
        tmp_path / "none.pt": "no such checkpoint",
        tmp_path: "is a folder",
        cut: "cannot be read as a checkpoint",
        text: "cannot be read as a checkpoint",
        foreign: "is not a fastssl checkpoint",
    }
    for path, words in cases.items():
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(path)
        assert words in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_evaluate_without_a_checkpoint_says_so(tmp_path, capsys):
    images = draw_images(tmp_path, train=8, val=8)
    data = ["--data", str(images / "train"), "--val", str(images / "val")]
    code = main(["evaluate", "knn", "--checkpoint", str(tmp_path / "no.pt"), *data])
    assert code == 1
    assert "no.pt: no such checkpoint" in capsys.readouterr().err
