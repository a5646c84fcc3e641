"""`fastssl import`: authors' files come in whole or not at all, and nothing in them is executed."""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import draw_classes, recipe

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


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in METHODS), ("saae", {"saae.teacher": "true"})], ids=str
)
def test_every_method_writes_what_it_can_read(name, more, tmp_path, capsys):
    arguments = [f"--{key}={value}" for key, value in {"method": name, **recipe(name), **more}.items()]
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


def not_finite(file):
    file["teacher"]["module.backbone.norm.bias"][3] = float("nan")


def quantised(file):
    name = "module.backbone.blocks.0.mlp.fc1.weight"
    file["teacher"][name] = file["teacher"][name].to(torch.int8)


def another_method(file):
    keys = [f"layer{i}.weight" for i in range(9)]
    file.clear()
    file["model"] = dict.fromkeys(keys, torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose, "1 missing: teacher.backbone.norm.weight"),
        (add, "1 unexpected: student.head.extra"),
        (reshape, "1 of another shape: teacher.backbone.pos_embed is [1, 5, 32], the model's [1, 17, 32]"),
        (not_finite, "official.pth: teacher.backbone.norm.bias is not finite; the weights are broken"),
        (quantised, "1 of another type: teacher.backbone.blocks.0.mlp.fc1.weight is torch.int8"),
        (another_method, "is not a checkpoint of dino as its authors write it; it holds: model"),
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


def wrapped(how, state):
    """A backbone's state dict as other people's code saves it, beside what it keeps there too."""
    other = {key: value + 1 for key, value in state.items()}

    def below(beginning, state=state):
        return {f"{beginning}{key}": value for key, value in state.items()}

    return {
        "compiled": below("_orig_mod."),
        "parallel and compiled": below("module._orig_mod.encoder."),
        "inside": {key.replace("blocks.", "blocks._orig_mod."): value for key, value in state.items()},
        "lightning": {"state_dict": below("model.encoder.") | {"model.head.weight": torch.zeros(3)}, "epoch": 3},
        "nested": {"checkpoint": {"model": {"state_dict": below("backbone.")}}},
        "teacher and student": {"student": below("module.", other), "teacher": below("module."), "step": 1},
        "flat teacher and student": {"state_dict": below("student.net.", other) | below("teacher.net.")},
    }[how]


WRAPPED = {
    "compiled": "without _orig_mod.",
    "parallel and compiled": "without _orig_mod. module. below 'encoder.'",
    "inside": "without _orig_mod.",
    "lightning": "['state_dict'] below 'model.encoder.'",
    "nested": "['checkpoint']['model']['state_dict'] below 'backbone.'",
    "teacher and student": "['teacher']",
    "flat teacher and student": "['state_dict'] below 'teacher.net.'",
}


@pytest.mark.parametrize("arguments", [DINO, MAE], ids=["dino", "mae"])
@pytest.mark.parametrize("how", WRAPPED)
def test_what_wrappers_put_around_a_backbone_is_found_and_said(how, arguments, tmp_path, capsys):
    method = made(arguments)
    torch.save(wrapped(how, method.backbone.state_dict()), tmp_path / "theirs.pth")
    assert main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pt"), *arguments]) == 0
    assert WRAPPED[how] in capsys.readouterr().out
    found = open_backbone(tmp_path / "ours.pt").module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in method.backbone.state_dict().items())


def test_a_wrapped_file_that_does_not_fit_names_the_beginning_and_two_that_fit_are_refused(tmp_path, capsys):
    state = made(MAE).backbone.state_dict()
    arguments = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pt"), *MAE]
    first, second = ({f"{name}.{key}": value.clone() for key, value in state.items()} for name in ("query", "key"))
    torch.save(first | second, tmp_path / "theirs.pth")
    assert main(["import", *arguments]) == 1
    assert "several state dicts that fit: below 'key.', below 'query.'; keep one" in capsys.readouterr().err
    del first["query.norm.weight"]
    torch.save(first, tmp_path / "theirs.pth")
    assert main(["import", *arguments]) == 1
    assert (
        "theirs.pth below 'query.' does not fit the configured model; 1 missing: encoder.norm"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "ours.pt").exists()


BAD_FILES = {
    "none": (None, "no such checkpoint"),
    "empty": (b"", "is empty (0 bytes)"),
    "noise": (b"\x00\x01\xfe" * 50, "cannot be read as a checkpoint (it is no PyTorch file, or damaged)"),
    "cut": (b"PK\x03\x04 cut", "cannot be read as a checkpoint"),
    "text": (b"404: Not Found\n", "is a text, not weights; it begins with '404: Not Found'"),
    "page": (b"\n <!DOCTYPE html>\n<html lang='en'>", "is an HTML page, not weights"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a Git LFS pointer"),
    "protocol 0": (pickle.dumps(Bomb(), protocol=0), "is refused: reading it would execute code of its own"),
    "protocol 5": (pickle.dumps(Bomb(), protocol=5), "is refused: it may execute code of its own"),
}
READERS = {  # every command that reads a checkpoint
    "import": (["import", "FILE", "out.pt", *DINO], ["out.pt"]),
    "export": (["export", "FILE", "out.pth"], ["out.pth"]),
    "official": (["export", "FILE", "out.pth", "--to=official"], ["out.pth"]),
    "embed": (["embed", "FILE", "images", "out", "--device=cpu"], ["out.npy"]),
    "knn": (["evaluate", "knn", "FILE", "--data=images", "--val=others", "--device=cpu"], []),
    "ssl": (["evaluate", "ssl", "FILE", "--data=images", "--device=cpu"], []),
    "finetuned": (["evaluate", "finetune", "FILE", "--val=images", "--eval", "--device=cpu"], []),
    "init": (["pretrain", *DINO, "--data.path=images", "--run.dir=run", "--run.device=cpu", "--init", "FILE"], []),
    "resume": (["pretrain", *DINO, "--data.path=images", "--run.dir=run", "--run.device=cpu"], []),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_command_calls_a_bad_file_by_its_name(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path / "images", 6, 0)
    draw_classes(tmp_path / "others", 6, 1)
    small = ["--data.batch_size=2", "--data.workers=1", "--monitor.every=0"]
    for content, words in BAD_FILES.values() if reader in ("import", "knn") else [BAD_FILES["protocol 0"]]:
        path = tmp_path / ("run/last.pt" if reader == "resume" else "given.pt")
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        arguments, written = READERS[reader]
        arguments = ["given.pt" if argument == "FILE" else argument for argument in arguments]
        assert main([*arguments, *(small if arguments[0] == "pretrain" else [])]) == 1, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{path.name} {words}" in error or f"{path.name}: {words}" in error
        assert not (tmp_path / "exploded").exists()
        assert not any((tmp_path / name).exists() for name in written)


def test_both_paths_are_needed(capsys):
    assert main(["import", "only.pth", *DINO]) == 2
    assert "needs SRC and DST" in capsys.readouterr().err
