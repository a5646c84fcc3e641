"""Layer-wise learning-rate decay: the published multipliers, and every trainable parameter in exactly one group."""

import pytest
from torch import nn

from fastssl.evaluation.tuned.layer_decay import layer_groups
from fastssl.models.pyramid import Pyramid
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT


def test_published_multipliers_of_a_vit():
    vit = ViT(width=16, depth=12, heads=2, image_size=32, positions="sincos")
    network = nn.ModuleDict({"head": nn.Linear(16, 3), "body": Pyramid(vit, window=(2, 2))})
    groups = layer_groups(network, vit, 0.65, 0.05)
    named = {id(p): name for name, p in network.named_parameters()}
    found = {named[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert found.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(groups) == 28
    body = "body.backbone."
    assert body + "pos_embed" not in found  # fixed table
    assert found[body + "cls_token"] == (pytest.approx(0.0036972, rel=1e-4), 0)
    assert found[body + "patch_embed.proj.weight"] == (pytest.approx(0.0036972, rel=1e-4), 0.05)
    assert found[body + "blocks.0.attn.qkv.weight"] == (pytest.approx(0.0056880, rel=1e-4), 0.05)
    assert found[body + "blocks.0.attn.relative_position_bias_table"] == (pytest.approx(0.0056880, rel=1e-4), 0.05)
    assert found[body + "blocks.11.norm1.weight"] == (pytest.approx(0.65), 0)
    assert found["body.resize.1.weight"] == found["head.weight"] == (1, 0.05)
    assert found["head.bias"] == (1, 0)


def test_published_multipliers_of_a_large_vit():
    vit = ViT(width=8, depth=24, heads=2, image_size=32)
    network = nn.ModuleDict({"body": vit, "head": nn.Linear(8, 3)})
    groups = layer_groups(network, vit, 0.75, 0.05)
    scales = {group["lr_scale"] for group in groups}
    assert len(scales) == 26
    assert min(scales) == pytest.approx(0.00075254, rel=1e-4)
    own = {id(vit.pos_embed), id(vit.cls_token)}
    assert {group["weight_decay"] for group in groups for p in group["params"] if id(p) in own} == {0}


def test_resnet_has_a_stem_and_four_stages():
    resnet = ResNet("resnet18", channels=8)
    network = nn.ModuleDict({"body": resnet, "head": nn.Linear(64, 3)})
    by_scale = {}
    named = {id(p): name for name, p in network.named_parameters()}
    for group in layer_groups(network, resnet, 0.5, 0.1):
        by_scale.setdefault(group["lr_scale"], set()).update(named[id(p)].split(".")[1] for p in group["params"])
    assert by_scale == {
        0.5**5: {"conv1", "bn1"},
        0.5**4: {"layer1"},
        0.5**3: {"layer2"},
        0.5**2: {"layer3"},
        0.5: {"layer4"},
        1: {"weight", "bias"},
    }
