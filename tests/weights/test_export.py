"""To and from timm and torchvision: their own code opens our files and computes our features, and the reverse."""

import json

import pytest
import timm
import torch
import torchvision

from fastssl.cli import main
from fastssl.config import Model
from fastssl.models import build_backbone
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.weights.backbone import from_timm, from_torchvision, open_backbone


def written(path, **model):
    """A checkpoint with a backbone whose weights, class token and table are all random."""
    torch.manual_seed(0)
    config = Model(**model)
    module = build_backbone(config)
    for value in module.state_dict().values():
        if value.dtype.is_floating_point:
            value.add_(torch.rand_like(value) * 0.02)
    method = {f"encoder.{key}": value for key, value in module.state_dict().items()}
    content = {"model": vars(config), "run": {"seed": 0}, "monitor": {}}
    checkpoint.write(path, Checkpoint("pretrain", content, method, "encoder.", step=3))
    return module.eval()


VITS = {
    "named": {"name": "vit_tiny", "image_size": 224},
    "own": {"name": "vit_small", "image_size": 64, "patch_size": 8, "width": 48, "depth": 2, "heads": 3},
    "cae": {"name": "vit_tiny", "image_size": 32, "patch_size": 8, "depth": 2, "layer_scale": 0.1,
            "positions": "sincos_rows"},
}  # fmt: skip


def run_lines(code):
    names = {}
    exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("form", ["pth", "safetensors", "hf"])
@pytest.mark.parametrize("kind", VITS)
def test_timm_opens_our_vit_by_the_printed_lines(kind, form, tmp_path, capsys):
    ours = written(tmp_path / "ours.pt", **VITS[kind])
    out = tmp_path / "sub" / ("folder" if form == "hf" else f"out.{form}")
    to = "hf" if form == "hf" else "timm"
    assert main(["export", str(tmp_path / "ours.pt"), str(out), "--to", to, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    theirs = run_lines(result["code"])
    side = VITS[kind]["image_size"]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.forward_features(images), ours.tokens(images), rtol=1e-4, atol=1e-4)
    left = {path.name for path in out.parent.rglob("*") if path.is_file()}
    assert left == ({"config.json", "model.safetensors"} if form == "hf" else {out.name})


def test_a_vit_base_is_timms_own_name(tmp_path, capsys):
    written(tmp_path / "ours.pt", name="vit_base")
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "out.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "timm.create_model('vit_base_patch16_224', num_classes=0)" in printed
    assert f"{tmp_path / 'out.safetensors'}: vit_base_patch16_224, 150 tensors" in printed


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_opens_our_resnet(name, tmp_path, capsys):
    ours = written(tmp_path / "ours.pt", name=name)
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "r.pth"), "--to=torchvision", "--json"]) == 0
    theirs = run_lines(json.loads(capsys.readouterr().out)["code"])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))


@pytest.mark.parametrize(
    ("model", "to", "words"),
    [
        ({"name": "vit_tiny", "depth": 1}, "torchvision", "is a ViT; export it --to timm or hf"),
        ({"name": "resnet18"}, "timm", "is a ResNet; export it --to torchvision"),
        ({"name": "resnet18", "small_images": True}, "torchvision", "has a stem or widths that torchvision's"),
        ({"name": "resnet18", "width": 16}, "torchvision", "has a stem or widths that torchvision's"),
    ],
)
def test_what_a_library_cannot_express_is_refused(model, to, words, tmp_path, capsys):
    written(tmp_path / "ours.pt", **model)
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "out.pth"), f"--to={to}"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_file_names_and_paths(tmp_path, capsys):
    assert main(["export", "a.pt", "b.bin"]) == 2
    assert "must end in .pth or .safetensors" in capsys.readouterr().err
    assert main(["export", "a.pt"]) == 2
    assert main(["export", str(tmp_path / "none.pt"), "b.pth"]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_timms_vit_as_ours(monkeypatch):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, init_values=0.3).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, **options: theirs if options["pretrained"] else None)
    backbone = open_backbone("timm:vit_tiny_patch16_224.augreg")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.module(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert (backbone.image_size, backbone.config["model"]["name"]) == (64, "vit_tiny")
    assert not backbone.module.training


def test_torchvisions_resnet_as_ours():
    theirs = torchvision.models.resnet18().eval()
    backbone = from_torchvision(theirs, "resnet18")
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.module.eval()(images), theirs(images))


def test_other_models_are_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="is not a plain ViT"):
        from_timm(timm.create_model("resnet18"), "resnet18")
    for odd, key in (
        ({"pre_norm": True}, "norm_pre"),
        ({"class_token": False, "global_pool": "avg"}, "cls_token"),
        ({"reg_tokens": 2}, "reg"),
    ):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **odd)
        with pytest.raises(CheckpointError, match=f"is not a backbone that we have; what differs: .*{key}"):
            from_timm(theirs, "odd")
    with pytest.raises(CheckpointError, match="torchvision:vgg11 is not known; known: resnet18"):
        open_backbone("torchvision:vgg11")
    with pytest.raises(CheckpointError, match="timm:no_such_model could not be loaded"):
        open_backbone("timm:no_such_model")


def test_a_path_is_a_path(tmp_path):
    ours = written(tmp_path / "a:b.pt", name="vit_tiny", image_size=32, patch_size=8, depth=1)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_backbone(str(tmp_path / "a:b.pt")).module(images), ours(images))
    assert open_backbone(str(tmp_path / "a:b.pt")).step == open_backbone(tmp_path / "a:b.pt").step == 3


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    written(tmp_path / "ours.pt", name="vit_tiny", image_size=32, patch_size=8, depth=1)

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "out.pth")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"ours.pt"}
