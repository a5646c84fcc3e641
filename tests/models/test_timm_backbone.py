"""`--model.name timm:NAME`: plain ViTs become ours, all else stands behind the face of ours."""

import json

import pytest
import timm
import torch
from tiny import draw_classes, recipe
from torch import nn

from fastssl.augment import augment
from fastssl.cli import main
from fastssl.config import Config, ConfigError, Model
from fastssl.evaluation.tuned.layer_decay import layer_groups
from fastssl.methods import METHODS, view_list
from fastssl.models import build_backbone, check_image_size, resolved
from fastssl.models.pyramid import Pyramid
from fastssl.models.timm_backbone import TimmBackbone
from fastssl.models.vit import ViT
from fastssl.parse import parse_recipe
from fastssl.pretraining.preflight import trial_batch
from fastssl.step import Values
from fastssl.training import checkpoint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch14_dinov2", {"name": "vit_small", "patch_size": 14, "layer_scale": 1e-5}),
        ("vit_tiny_patch16_384", {"name": "vit_tiny"}),
        ("vit_small_patch14_reg4_dinov2", None),  # registers
        ("vit_base_patch16_rpn_224", None),  # our keys, other blocks
        ("convnext_atto", None),
    ],
)
def test_plain_vits_of_timm_are_ours(name, expected):
    model = Model(name=f"timm:{name}", image_size=56)
    assert resolved(model) == (model if expected is None else Model(image_size=56, **expected))


def test_a_vit_by_its_timm_name_computes_the_same():
    model = resolved(Model(name="timm:vit_tiny_patch16_224", image_size=64, resample="antialiased"))
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, dynamic_img_size=True).eval()
    ours = build_backbone(model).eval()
    assert isinstance(ours, ViT)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "timm:no_such"}, r"timm:no_such cannot be built \(Unknown model"),
        (
            {"name": "timm:vit_tiny_patch16_224", "patch_size": 8},
            r"model\.patch_size is 8, but model\.name, timm:vit_tiny",
        ),
        ({"name": "timm:test_convnext", "depth": 3}, r"model\.depth is 3, but model\.name"),
        ({"name": "timm:vgg11", "drop_path": 0.1}, r"timm:vgg11 has no stochastic depth; set model\.drop_path to 0"),
        ({"name": "vit_smal"}, "did you mean 'vit_small'.* and timm:NAME"),
    ],
)
def test_bad_names_and_numbers(model, words):
    with pytest.raises(ConfigError, match=words):
        build_backbone(resolved(Model(**model)))


def test_sizes_are_tried_before_anything_runs():
    check_image_size(Model(name="timm:convnext_atto"), "size", 96)
    with pytest.raises(
        ConfigError, match=r"views\.local\.size is 96; timm:maxvit_tiny_tf_224, made for .* cannot take it"
    ):
        check_image_size(Model(name="timm:maxvit_tiny_tf_224"), "views.local.size", 96)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dino", "scfs")])
def test_methods_that_need_tokens_say_so(method):
    kind = METHODS[method]
    with pytest.raises(
        ConfigError, match=rf"model\.name is 'timm:test_resnet'; method {method} needs a ViT: vit_tiny, "
    ):
        METHODS[method](Config(method, kind.Views(), kind.Settings(), model=Model(name="timm:test_resnet")))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_maps_and_feature_of_one_pass_are_those_of_timm(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = TimmBackbone(name, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    taps = backbone.default_taps()
    with torch.no_grad():
        feature, maps = backbone.feature_and_maps(images, taps)
        torch.testing.assert_close(feature, backbone.net(images))
        every = backbone.stages(images)
    assert feature.shape == (2, backbone.width)
    assert taps == (len(every) - 2, len(every) - 1, len(every))
    assert [x.shape[1] for x in every] == backbone.maps
    for tap, x in zip(taps, maps, strict=True):
        torch.testing.assert_close(x, every[tap - 1])


def test_layers_and_pyramid():
    backbone = TimmBackbone("test_convnext", 64)
    network = nn.ModuleDict({"body": backbone, "head": nn.Linear(backbone.width, 3)})
    named = {id(p): name for name, p in network.named_parameters()}
    scales = {named[id(p)]: g["lr_scale"] for g in layer_groups(network, backbone, 0.5, 0.1) for p in g["params"]}
    assert scales.keys() == dict(network.named_parameters()).keys()
    stages = [scales[f"body.net.stages.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)]
    assert scales["body.net.stem.0.weight"] < stages[0] < stages[1] < stages[2] < stages[3] < scales["head.weight"] == 1
    pyramid = Pyramid(backbone)
    assert (pyramid.channels, pyramid.strides) == ([24, 32, 48, 64], [4, 8, 16, 32])
    assert [x.shape[1:] for x in pyramid(torch.randn(1, 3, 64, 64))] == [
        (24, 16, 16),
        (32, 8, 8),
        (48, 4, 4),
        (64, 2, 2),
    ]
    with pytest.raises(ConfigError, match="a pyramid needs 4 that double"):
        Pyramid(TimmBackbone("mixer_s32_224", 64))


def test_scfs_learns_on_the_maps_of_a_network_of_timm():
    recipes = {"method": "scfs", **recipe("scfs"), "model.name": "timm:test_resnet", "views.local.size": 32}
    for key in ("width", "depth", "heads", "patch_size", "small_images"):
        recipes.pop(f"model.{key}")
    config = parse_recipe("test", "", [f"--{key}={value}" for key, value in recipes.items()])[0]
    torch.manual_seed(0)
    method = METHODS["scfs"](config)
    assert method.taps == (3, 4, 5)
    batch = augment(trial_batch(view_list(config.views), 2))
    step = method(batch, Values(0, 1, 1, 0))
    assert {f"loss_searched_{tap}" for tap in method.taps} <= step.metrics.keys()
    step.loss.backward()
    assert all(p.grad is not None for p in method.student.backbone.parameters())
    assert method.pictures(batch, Values(0, 1, 1, 0))


def test_a_run_its_continuation_and_what_takes_its_checkpoint(tmp_path, capsys):
    method, name = "dino", "timm:test_convnext"
    images = draw_classes(tmp_path / "images", images=8, seed=0)
    values = {**recipe(method), "model.name": name, "model.image_size": 32,
              "views.local.size": 32, "data.path": images, "data.batch_size": 4, "data.workers": 1, "run.device": "cpu",
              "schedule.epochs": 1, "schedule.warmup_epochs": 0, "monitor.pictures": 1}  # fmt: skip
    for key in ("width", "depth", "heads", "patch_size", "small_images"):
        values.pop(f"model.{key}", None)
    arguments = ["pretrain", f"--method={method}", *(f"--{key}={value}" for key, value in values.items())]
    assert main([*arguments, f"--run.dir={tmp_path / 'run'}", "--run.steps=1"]) == 0
    assert main([*arguments, f"--run.dir={tmp_path / 'run'}"]) == 0
    run = checkpoint.read(tmp_path / "run" / "last.pt")
    assert run.step == 2
    assert not torch.equal(*(next(v for k, v in run.network.items() if k.startswith(part) and v.ndim == 4)
                             for part in ("student.backbone.", "teacher.backbone.")))  # fmt: skip
    assert list((tmp_path / "run" / "pictures").iterdir())
    capsys.readouterr()

    path = str(tmp_path / "run" / "last.pt")
    assert main(["evaluate", "knn", "--checkpoint", path, "--data", images, "--val", images, "--json", "--device=cpu",
                 "--workers=1", "--cache=none"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["checkpoint"] == path
    assert main(["export", path, str(tmp_path / "out.safetensors"), "--json"]) == 0
    names = {}
    exec(json.loads(capsys.readouterr().out)["code"], names)
    ours = build_backbone(resolved(Model(name=name, image_size=32)), 0.0).eval()
    ours.load_state_dict(run.backbone())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(pixels), ours(pixels))
