"""`--init`: a new run starts from weights of ours, of timm, or of a method's authors; what does not fit is refused."""

import functools
import json
from dataclasses import replace

import pytest
import timm
import torch
from tiny import draw_classes, recipe

from fastssl.cli import main
from fastssl.methods import METHODS
from fastssl.parse import parse_recipe
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.weights.backbone import open_backbone
from fastssl.weights.init import start_from

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


@functools.cache
def parsed(method):
    values = {"method": method, **recipe(method)}
    return parse_recipe("test", "", [f"--{key}={value}" for key, value in values.items()])[0]


def configured(method, out_dim=0, **model):
    """The method's smallest recipe, with another `model` section or another head."""
    config = parsed(method)
    settings = replace(config.settings, out_dim=out_dim) if out_dim else config.settings
    return replace(config, model=replace(config.model, **model), settings=settings)


def drawn(config, seed):
    """A method whose values are all its own, tables and centres too."""
    torch.manual_seed(seed)
    method = METHODS[config.method](config)
    for value in method.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.02)
    return method


def of_timm(**options):
    torch.manual_seed(7)
    return timm.create_model("vit_tiny_patch16_224", **{**SIZES, "img_size": 32, **options}).eval()


def saved(network, path):
    torch.save(network.state_dict(), path)
    return str(path)


def started(method, init, **more):
    """A method that started there, and the lines it says."""
    config = configured(method, init=init, **more)
    method = drawn(config, seed=1)
    return method, "\n".join(start_from(method, config))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "scfs"])
def test_timms_weights_go_to_every_backbone_of_a_method(name, tmp_path):
    theirs = of_timm()
    method, said = started(name, saved(theirs, tmp_path / "file.pth"))
    ours = [module for module in method.modules() if type(module) is type(method.backbone)]
    assert len(ours) == (2 if name in ("dino", "sit") else 1)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for module in ours:
            module.eval()
            torch.testing.assert_close(module.tokens(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4)
    assert "left aside: head.bias, head.weight" in said
    assert "mean and deviation of the images: taken to be ImageNet's" in said
    assert f"the backbone ({34 if name == 'cae' else 30} tensors), for " in said
    assert "drawn anew: " in said


@pytest.mark.parametrize("name", METHODS)
def test_authors_files_are_recognised_and_give_all_networks_to_their_own_method(name, tmp_path):
    source = drawn(configured(name), seed=0)
    torch.save({**source.to_official(source.state_dict()), "epoch": 3}, tmp_path / "official.pth")
    method, said = started(name, str(tmp_path / "official.pth"))
    state = source.state_dict()
    other = {key for key, value in method.state_dict().items() if not torch.equal(state[key], value)}
    assert all(name == "cae" and key.endswith("attn.qkv.bias") for key in other)  # its authors' keys have no bias
    assert "drawn anew" not in said
    if name != "scfs":  # a ViT goes to any other method
        scale = {"layer_scale": 0.1} if name == "cae" else {}
        cousin, said = started("sit" if name == "dino" else "dino", str(tmp_path / "official.pth"), **scale)
        own = source.backbone.state_dict()
        for part in (cousin.student.backbone, cousin.teacher.backbone):
            other = {key for key, value in part.state_dict().items() if not torch.equal(own[key], value)}
            assert all(name == "cae" and key.endswith("attn.qkv.bias") for key in other)
        assert "drawn anew: " in said


def test_our_checkpoint_gives_heads_to_its_own_method_alone(tmp_path):
    config = configured("dino")
    source = drawn(config, seed=0)
    record = Checkpoint("pretrain", config.as_dict(), source.state_dict(), source.backbone_prefix, step=3)
    checkpoint.write(tmp_path / "run.pt", record)
    method, said = started("dino", str(tmp_path / "run.pt"))
    assert all(torch.equal(source.state_dict()[key], value) for key, value in method.state_dict().items())
    assert "also taken: center (1 tensor), student.head (8 tensors), teacher.head (8 tensors)" in said
    method, said = started("dino", str(tmp_path / "run.pt"), out_dim=32)
    assert "drawn anew: center (1 tensor), student.head (2 tensors), teacher.head (2 tensors)" in said
    method, said = started("mae", str(tmp_path / "run.pt"))
    assert torch.equal(method.encoder.blocks[0].mlp.fc1.weight, source.teacher.backbone.blocks[0].mlp.fc1.weight)
    assert "also taken" not in said


def test_tables_of_other_sizes_and_missing_layer_scale_are_made_to_fit(tmp_path):
    theirs = of_timm(img_size=64, no_embed_class=True)
    method, said = started("mae", saved(theirs, tmp_path / "file.pth"), layer_scale=0.1)
    assert "position table resampled from 8 x 8 to 4 x 4 patches" in said
    assert "the position table is the file's and does not learn" in said
    assert "layer scale: 1, for the file has none" in said
    assert method.encoder.pos_embed[0, 0].abs().max() == 0
    square = theirs.pos_embed.detach().reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(square, size=(4, 4), mode="bicubic")  # MAE's own rule: no antialiasing
    torch.testing.assert_close(method.encoder.pos_embed[:, 1:], plain.flatten(2).mT, rtol=1e-4, atol=1e-6)
    method, _ = started("mae", str(tmp_path / "file.pth"), layer_scale=0.1, image_size=64)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got = method.encoder.eval().tokens(images)
        torch.testing.assert_close(got, theirs.forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reg_tokens": 2}, "has registers, other than our ViT; methods dino and scfs take such a model"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, "has SwiGLU"),
        ({"pre_norm": True}, "has a norm before the first block"),
        ({"class_token": False, "global_pool": "avg"}, "no class token"),
        ({"patch_size": 4, "init_values": 0.1, "embed_dim": 16, "depth": 1},
         "add --model.width 16 --model.depth 1 --model.heads 1 --model.patch_size 4 --model.layer_scale 1e-5"),
        ({"qkv_bias": False}, r"does not fit .*; what differs: blocks\.0\.attn\.qkv\.bias"),
    ],
)  # fmt: skip
def test_what_our_vit_has_not_is_refused_by_name(options, words, tmp_path):
    config = configured("dino", init=saved(of_timm(**options), tmp_path / "file.pth"))
    method = drawn(config, seed=1)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        start_from(method, config)
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_files_that_are_no_weights_are_refused(tmp_path):
    state = of_timm().state_dict()
    state["blocks.1.mlp.fc1.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for file, words in (
        ("nan.pth", "not finite"),
        ("other.pth", "holds no backbone in a layout"),
        ("no.pth", "no such"),
    ):
        with pytest.raises(CheckpointError, match=words):
            started("mae", str(tmp_path / file))


def hub_folder(path, name, cfg, **options):
    """What timm opens as local-dir:PATH."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=0, **options).eval()
    path.mkdir()
    save_file(theirs.state_dict(), path / "model.safetensors")
    described = {
        "architecture": name,
        "num_classes": 0,
        "model_args": options,
        "pretrained_cfg": {**cfg, "num_classes": 0},
    }
    (path / "config.json").write_text(json.dumps(described))
    return theirs


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto"])
def test_librarys_mean_and_deviation_become_the_datas(model, tmp_path):
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "first_conv": "stem.0"}
    vit = model.startswith("vit")
    options = {**SIZES, "img_size": 32} if vit else {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    theirs = hub_folder(tmp_path / "hub", model, cfg, **options)
    pixels = torch.rand(2, 3, 32, 32)
    normal = torch.stack([(pixels[:, c] - m) / s for c, (m, s) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True))], dim=1)  # fmt: skip
    with torch.no_grad():
        expected = theirs((pixels - 0.5) / 0.5)
        opened = open_backbone(f"timm:local-dir:{tmp_path / 'hub'}").module
        torch.testing.assert_close(opened(normal), expected, atol=1e-4, rtol=1e-4)
        if vit:
            method, _ = started("mae", str(tmp_path / "hub"))
            torch.testing.assert_close(method.encoder.eval()(normal), expected, atol=1e-4, rtol=1e-4)


def test_a_run_reads_it_once_and_keeps_what_it_was(tmp_path, capsys):
    images = draw_classes(tmp_path / "images", images=8, seed=0)
    init = saved(of_timm(), tmp_path / "file.pth")
    values = {**recipe("dino"), "data.path": images, "data.batch_size": 4, "data.workers": 1, "schedule.epochs": 1,
              "schedule.warmup_epochs": 0, "run.dir": tmp_path / "run", "run.device": "cpu",
              "monitor.pictures": 0}  # fmt: skip
    arguments = ["pretrain", "--method=dino", *(f"--{key}={value}" for key, value in values.items())]
    assert main([*arguments, "--init", init, "--run.steps=1"]) == 0
    said = capsys.readouterr().err
    assert f"weights from {init}: the backbone (30 tensors), for student.backbone and teacher.backbone" in said
    (tmp_path / "file.pth").unlink()
    assert main([*arguments, f"--init={init}"]) == 0
    assert "weights from" not in capsys.readouterr().err
    record = checkpoint.read(tmp_path / "run" / "last.pt")
    assert record.step == 2
    assert record.config["model"]["init"] == init
    assert record.extra["origin"][0].startswith(f"weights from {init}")
    assert main(arguments) == 1
    assert f"model.init (was '{init}', now '')" in capsys.readouterr().err
    assert main([*arguments, f"--init={init}", f"--run.dir={tmp_path / 'new'}"]) == 1
    assert "file.pth: no such" in capsys.readouterr().err
    assert not (tmp_path / "new" / "last.pt").exists()
