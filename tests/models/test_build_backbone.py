"""Backbones by name, and what is said of names and numbers that do not fit."""

from __future__ import annotations

import pytest
import torch

from fastssl.config import ConfigError, Model
from fastssl.models import RESNETS, VITS, build_backbone, check_image_size


@pytest.mark.parametrize("name", [*VITS, *RESNETS])
def test_every_name(name):
    with torch.device("meta"):
        model = build_backbone(Model(name))
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, model.width)
        assert model.represent(torch.empty(2, 3, 224, 224)).shape == (2, model.width)


@pytest.mark.parametrize(
    ("name", "layout", "parts"), [("vit_tiny", torch.contiguous_format, 12), ("resnet18", torch.channels_last, 4)]
)
def test_backbones_say_how_they_are_laid_out_and_compiled(name, layout, parts):
    with torch.device("meta"):
        model = build_backbone(Model(name))
    assert model.memory_format == layout
    assert len(model.compile_parts()) == parts
    assert {id(part) for part in model.compile_parts()} <= {id(module) for module in model.modules()}


def test_known_parameter_counts():
    with torch.device("meta"):
        for patch, count in ((16, 85_647_360), (8, 85_204_992)):  # the trained ones, published with MAE's model
            model = build_backbone(Model("vit_base", patch_size=patch, positions="sincos"))
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert sum(p.numel() for p in build_backbone(Model("vit_small")).parameters()) == 21_665_664  # DINO's ViT-S/16
        assert sum(p.numel() for p in build_backbone(Model("resnet50")).parameters()) == 23_508_032


def test_numbers_override_the_name():
    model = build_backbone(Model("vit_tiny", image_size=32, patch_size=4, width=64, depth=2, heads=4, drop_path=0.3))
    assert (model.width, model.num_blocks, model.patch_size, model.grid) == (64, 2, 4, (8, 8))
    assert build_backbone(Model("vit_tiny", depth=1, layer_scale=1e-5)).blocks[0].ls1.gamma[0].item() == pytest.approx(
        1e-5
    )
    assert model.blocks[0].attn.num_heads == 4
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    without = build_backbone(Model("vit_tiny", depth=2, drop_path=0.3), drop_path=0.0)
    assert not hasattr(without.blocks[1].drop_path1, "drop_prob")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model("vit_smal"), "model.name is 'vit_smal'; did you mean 'vit_small'"),
        (Model("resnet-50"), "did you mean 'resnet50'"),
        (Model("vit_tiny", image_size=30), "model.image_size is 30; it must be a multiple of model.patch_size, 16"),
        (Model("vit_tiny", width=100), "model.width is 100; it must be a multiple of model.heads, 3"),
        (Model("vit_tiny", width=18, positions="sincos"), "multiple of 4, not 18"),
        (Model("vit_tiny", small_images=True), "model.small_images changes a ResNet's stem"),
        (Model("resnet18", depth=4), "change a ViT; model.name is 'resnet18'"),
        (Model("resnet18", layer_scale=0.1), "model.layer_scale change a ViT; model.name is 'resnet18'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages(model, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(model)


def test_image_size_matters_to_a_vit_only():
    check_image_size(Model("resnet50"), "views.main.size", 30)
    check_image_size(Model("vit_tiny"), "views.main.size", 32)
    with pytest.raises(ConfigError, match=r"views.main.size is 30; it must be a multiple of model.patch_size, 16"):
        check_image_size(Model("vit_tiny"), "views.main.size", 30)
