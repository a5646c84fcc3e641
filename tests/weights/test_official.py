"""`fastssl import`: authors' files come in whole or not at all, and nothing in them is executed."""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import recipe

from fastssl.cli import main
from fastssl.methods import METHODS
from fastssl.parse import parse_recipe
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint
from fastssl.weights.backbone import open_backbone

MODEL = ["--model.name=vit_tiny", "--model.image_size=32", "--model.patch_size=8", "--model.width=32"]
MODEL += ["--model.depth=2", "--model.heads=2"]
DINO = ["--method=dino", *MODEL, "--dino.out_dim=64", "--dino.head_hidden=32", "--dino.head_bottleneck=16"]
DINO += ["--views.global1.size=32", "--views.global2.size=32", "--views.local.size=16"]
MAE = ["--method=mae", *MODEL, "--model.positions=sincos", "--views.main.size=32"]
MAE += ["--mae.decoder_width=32", "--mae.decoder_depth=1", "--mae.decoder_heads=2"]


def made(arguments):
    torch.manual_seed(0)
    config = parse_recipe("test", "", arguments)[0]
    return METHODS[config.method](config)


def official_dino(method):
    """A training file as DINO's code writes it: wrapped in DDP's prefix, with its arguments and NumPy scalars."""
    state = method.state_dict()
    file = {
        name: {f"module.{key.removeprefix(f'{name}.')}": value for key, value in state.items() if key.startswith(name)}
        for name in ("student", "teacher")
    }
    return {
        **file,
        "dino_loss": {"center": torch.randn(1, 64)},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", lr=np.float64(0.1)),
    }


def official_mae(method):
    def theirs(key):
        return key.removeprefix("encoder.") if key.startswith("encoder.") else _decoder(key)

    def _decoder(key):
        name = key.removeprefix("decoder.")
        return name if name == "mask_token" else f"decoder_{name}"

    return {"model": {theirs(key): value for key, value in method.state_dict().items()}, "epoch": 3}


@pytest.mark.parametrize(("arguments", "official"), [(DINO, official_dino), (MAE, official_mae)], ids=["dino", "mae"])
def test_a_training_file_comes_in_whole_and_gives_the_same_features(arguments, official, tmp_path, capsys):
    method = made(arguments)
    torch.save(official(method), tmp_path / "official.pth")
    assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "new/ours.pt"), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["whole"] is True
    state = checkpoint.read(tmp_path / "new/ours.pt").network
    assert result["tensors"] == len(state)
    for key, value in method.state_dict().items():
        if key != "center":
            assert torch.equal(state[key], value), key
    images = torch.randn(2, 3, 32, 32)
    module = open_backbone(tmp_path / "new/ours.pt").module
    torch.testing.assert_close(module(images), method.eval().backbone(images))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_what_it_can_read(name, tmp_path, capsys):
    arguments = [f"--{key}={value}" for key, value in {"method": name, **recipe(name)}.items()]
    method = made(arguments)
    with torch.no_grad():
        for i, value in enumerate(method.parameters()):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * 0.02)  # none is 0
    config = parse_recipe("test", "", arguments)[0].as_dict()
    saved = Checkpoint("pretrain", config, method.state_dict(), method.backbone_prefix, step=3)
    checkpoint.write(tmp_path / "run.pt", saved)
    assert main(["export", str(tmp_path / "run.pt"), str(tmp_path / "official.pth"), "--to", "official"]) == 0
    assert f"{name} as its authors save it" in capsys.readouterr().out
    official = torch.load(tmp_path / "official.pth", weights_only=True)
    torch.save({**official, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "official.pth")
    assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "ours.pt"), *arguments]) == 0
    assert f"{len(method.state_dict())} tensors" in capsys.readouterr().out
    state = checkpoint.read(tmp_path / "ours.pt").network
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        module = open_backbone(tmp_path / "ours.pt").module
        torch.testing.assert_close(module(images), method.eval().backbone(images))
    changed = {key for key, value in method.state_dict().items() if not torch.equal(state[key], value)}
    if name == "cae":  # its authors' keys have no bias, which softmax does not feel
        changed = {key for key in changed if not key.endswith("attn.qkv.bias")}
    assert not changed


def test_a_backbone_alone_is_not_exported_as_official(tmp_path, capsys):
    method = made(DINO)
    torch.save(method.backbone.state_dict(), tmp_path / "backbone.pth")
    assert main(["import", str(tmp_path / "backbone.pth"), str(tmp_path / "ours.pt"), *DINO]) == 0
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "o.pth"), "--to", "official"]) == 1
    assert "ours.pt does not hold a whole dino" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "o.safetensors"), "--to", "official"]) == 2
    assert not (tmp_path / "o.pth").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_bare_backbone(suffix, tmp_path, capsys):
    method = made(DINO)
    weights = {key: value.contiguous() for key, value in method.backbone.state_dict().items()}
    path = tmp_path / f"backbone.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    assert main(["import", str(path), str(tmp_path / "ours.pt"), *DINO]) == 0
    assert "the backbone of dino with vit_tiny" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(open_backbone(tmp_path / "ours.pt").module(images), method.eval().backbone(images))


class Bomb:
    def __reduce__(self):
        import os

        return os.system, ("touch exploded",)


def test_a_file_that_would_execute_code_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"student": {}, "teacher": {"x": Bomb()}}, "bomb.pth")
    assert main(["import", "bomb.pth", "ours.pt", *DINO]) == 1
    error = capsys.readouterr().err
    assert "bomb.pth is refused: reading it would execute code" in error
    assert "system" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "ours.pt").exists()
    with open("plain.pkl", "wb") as file:
        pickle.dump({"teacher": Bomb()}, file, protocol=2)
    assert main(["import", "plain.pkl", "ours.pt", *DINO]) == 1
    assert not (tmp_path / "exploded").exists()


def lose(file):
    del file["teacher"]["module.backbone.norm.weight"]


def add(file):
    file["student"]["module.head.extra"] = torch.zeros(1)


def reshape(file):
    file["teacher"]["module.backbone.pos_embed"] = torch.zeros(1, 5, 32)


def no_head(file):
    file["student"] = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose, "1 missing: teacher.backbone.norm.weight"),
        (add, "1 unexpected: student.head.extra"),
        (reshape, "1 of another shape: teacher.backbone.pos_embed is [1, 5, 32], the model's [1, 17, 32]"),
        (no_head, "is not a checkpoint of dino as its authors write it"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(change, words, tmp_path, capsys):
    file = official_dino(made(DINO))
    change(file)
    torch.save(file, tmp_path / "official.pth")
    assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "ours.pt"), *DINO]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"not a checkpoint", "cannot be read"), (b"PK\x03\x04 cut", "cannot be read")],
)
def test_bad_files(content, words, tmp_path, capsys):
    path = tmp_path / "official.pth"
    if content:
        path.write_bytes(content)
    assert main(["import", str(path), str(tmp_path / "ours.pt"), *DINO]) == 1
    assert words in capsys.readouterr().err


def test_both_paths_are_needed(capsys):
    assert main(["import", "only.pth", *DINO]) == 2
    assert "needs SRC and DST" in capsys.readouterr().err
