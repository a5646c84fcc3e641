"""To and from timm and torchvision: their own code opens our files and computes our features, and the reverse."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from tiny import draw_classes, recipe

from fastssl.cli import main
from fastssl.config import Model
from fastssl.methods import METHODS
from fastssl.models import build_backbone
from fastssl.models.vit import ViT
from fastssl.parse import parse_recipe
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.weights.backbone import from_timm, from_torchvision, open_backbone
from fastssl.weights.export import ExportOptions, export


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


MODELS = {
    "named": {"name": "vit_tiny", "image_size": 224},
    "own": {"name": "vit_small", "image_size": 64, "patch_size": 8, "width": 48, "depth": 2, "heads": 3},
    "cae": {"name": "vit_tiny", "image_size": 32, "patch_size": 8, "depth": 2, "layer_scale": 0.1,
            "positions": "sincos_rows"},
    "resnet": {"name": "resnet18", "image_size": 64},
    "timm": {"name": "timm:test_convnext", "image_size": 64},
}  # fmt: skip


def run_lines(code):
    names = {}
    exec(code, names)
    return names["model"].eval()


@pytest.mark.parametrize("form", ["pth", "safetensors", "hf"])
@pytest.mark.parametrize("kind", MODELS)
def test_timm_opens_our_backbone_by_the_printed_lines(kind, form, tmp_path, capsys):
    ours = written(tmp_path / "ours.pt", **MODELS[kind])
    out = tmp_path / "sub" / ("folder" if form == "hf" else f"out.{form}")
    to = "hf" if form == "hf" else "timm"
    assert main(["export", str(tmp_path / "ours.pt"), str(out), "--to", to, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    theirs = run_lines(result["code"])
    side = MODELS[kind]["image_size"]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
        if isinstance(ours, ViT):
            torch.testing.assert_close(theirs.forward_features(images), ours.tokens(images), rtol=1e-4, atol=1e-4)
    left = {path.name for path in out.parent.rglob("*") if path.is_file()}
    assert left == ({"config.json", "model.safetensors", "README.md"} if form == "hf" else {out.name})


def test_a_vit_base_is_timms_own_name(tmp_path, capsys):
    written(tmp_path / "ours.pt", name="vit_base")
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "out.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "timm.create_model('vit_base_patch16_224', num_classes=0, pretrained_cfg_overlay={" in printed
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
        ({"name": "vit_tiny", "depth": 1}, "torchvision", "is a ViT; export it --to timm, hf or onnx"),
        ({"name": "timm:test_resnet"}, "torchvision", "is a model of timm; export it --to timm, hf or onnx"),
        ({"name": "resnet18", "small_images": True}, "torchvision", "has a stem or widths that the libraries'"),
        ({"name": "resnet18", "width": 16}, "timm", "has a stem or widths that the libraries'"),
    ],
)
def test_what_a_library_cannot_express_is_refused(model, to, words, tmp_path, capsys):
    written(tmp_path / "ours.pt", **model)
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "out.pth"), f"--to={to}"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_a_model_card_says_what_was_done_and_measured(tmp_path, capsys):
    config = parse_recipe(
        "test",
        "",
        [
            f"--{key}={value}"
            for key, value in {
                "method": "mae",
                **recipe("mae"),
                "data.path": "/private/mine",
                "model.init": "/private/start.pth",
                "run.dir": "/private/run",
            }.items()
        ],
    )[0]
    state = METHODS["mae"](config).state_dict()
    checkpoint.write(tmp_path / "last.pt", Checkpoint("pretrain", config.as_dict(), state, "encoder.", step=5))
    results = [
        {"protocol": "knn", "step": step, "val": "/private/val.beton", "results": {"top1": top1, "seconds": 3.0}}
        for step, top1 in ((5, 61.25), (4, 11.0))
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    assert main(["export", str(tmp_path / "last.pt"), str(tmp_path / "mine-mae"), "--to", "hf"]) == 0
    card = (tmp_path / "mine-mae" / "README.md").read_text()
    head, recipe_text = yaml.safe_load(card.split("---\n")[1]), card.split("```yaml\n")[1].split("```")[0]
    assert head == {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "timm", "self-supervised", "mae"],
    }
    assert "| method | MAE: masked autoencoders (He et al. 2022, arXiv 2111.06377). |" in card
    assert "| data | mine |" in card
    assert "| started from | start.pth |" in card
    assert "| knn | val.beton | top1 61.25 |" in card
    assert "11" not in card.split("## Numbers")[1].split("## Recipe")[0]
    assert yaml.safe_load(recipe_text)["mae"]["mask_ratio"] == 0.75
    assert "/private" not in card


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_onnx_gives_the_same_features(kind, tmp_path, capsys):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    ours = written(tmp_path / "ours.pt", **MODELS[kind])
    assert main(["export", str(tmp_path / "ours.pt"), str(tmp_path / "o.onnx"), "--to", "onnx", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = {"images": torch.randn(5, 3, 64, 64).numpy()}
    exec(result["code"], names)
    with torch.no_grad():
        expected = ours(torch.from_numpy(names["images"]))
    torch.testing.assert_close(torch.from_numpy(names["features"]), expected, rtol=1e-3, atol=1e-4)


def test_onnx_that_is_not_there_or_not_equal(tmp_path, capsys, monkeypatch):
    path = tmp_path / "ours.pt"
    written(path, **MODELS["own"])
    assert main(["export", str(path), str(tmp_path / "o.pth"), "--to", "onnx"]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert main(["export", str(path), str(tmp_path / "o.onnx"), "--to", "onnx"]) == 1
    assert "needs onnx and onnxscript and onnxruntime, not installed here: pip install" in capsys.readouterr().err
    session = SimpleNamespace(run=lambda names, given: [np.ones((3, 48), np.float32)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=lambda *a, **k: session))
    monkeypatch.setattr(torch.onnx, "export", lambda network, images, part, **options: open(part, "w").close())
    assert main(["export", str(path), str(tmp_path / "o.onnx"), "--to", "onnx"]) == 1
    assert "the ONNX file gives other features than PyTorch; it is not kept" in capsys.readouterr().err
    assert {found.name for found in tmp_path.iterdir()} == {"ours.pt"}


def test_file_names_and_paths(tmp_path, capsys):
    assert main(["export", "a.pt", "b.bin"]) == 2
    assert "must end in .pth or .safetensors" in capsys.readouterr().err
    assert main(["export", "a.pt"]) == 2
    assert main(["export", str(tmp_path / "none.pt"), "b.pth"]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_timms_vit_sees_images_as_timm_shows_them(crop_pct, tmp_path, monkeypatch):
    """Embedded, and exported again: timm's own transform and forward, for a model whose mean is 0.5."""
    torch.manual_seed(0)
    how = {"num_classes": 0, "img_size": 64, "init_values": 0.3, "pretrained_cfg_overlay": {"crop_pct": crop_pct}}
    theirs = timm.create_model("vit_tiny_patch16_224", **how).eval()
    torch.nn.init.normal_(theirs.patch_embed.proj.weight, std=0.1)  # so that pixels count beside the positions
    folder = draw_classes(tmp_path / "images", 6, 0, sides=(90, 111))
    names = sorted((tmp_path / "images").rglob("*.png"))

    def features(model):
        settings = timm.data.resolve_data_config(model=model) | {"input_size": (3, 64, 64)}
        shown = timm.data.create_transform(**settings)
        with torch.no_grad():
            return settings, model(torch.stack([shown(Image.open(name)) for name in names]))

    settings, expected = features(theirs)
    assert (settings["mean"], settings["crop_pct"]) == ((0.5, 0.5, 0.5), crop_pct)
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: theirs if options["pretrained"] else None)
        arguments = [folder, f"{tmp_path}/out", "--dtype=float32", "--device=cpu", "--workers=1", "--sheet=0"]
        assert main(["embed", "timm:vit_tiny_patch16_224", *arguments]) == 0
        codes = [
            export(ExportOptions("timm:vit_tiny_patch16_224", str(tmp_path / out), to)).code
            for out, to in (("hf", "hf"), ("out.pth", "timm"))
        ]
    for found in (torch.from_numpy(np.load(tmp_path / "out.npy")), *(features(run_lines(code))[1] for code in codes)):
        assert torch.cosine_similarity(found, expected).min() > 0.9999
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


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
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, act_layer="relu")  # no key tells
    with pytest.raises(CheckpointError, match="timm:odd computes something else with its weights than a plain ViT"):
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
