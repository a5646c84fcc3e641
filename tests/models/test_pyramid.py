"""The pyramid: its maps against blocks and operations applied by hand, taps, options, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastssl.config import ConfigError
from fastssl.models.pyramid import Pyramid, default_taps
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT


def vit(depth=6, **settings):
    torch.manual_seed(0)
    return ViT(**{"width": 24, "depth": depth, "heads": 2, "patch_size": 8, "image_size": 32, **settings})


def test_maps_are_what_the_blocks_put_out(monkeypatch):
    torch.manual_seed(1)
    backbone = vit()
    reference = copy.deepcopy(backbone)
    pyramid = Pyramid(backbone, taps=[0, 2, 2, 4])
    pyramid.resize[0][1].running_mean.normal_()  # batch norm that does something
    pyramid.eval()
    images = torch.randn(2, 3, 24, 40)  # another grid than the table's
    outputs = {}
    for i, block in enumerate(reference.blocks):
        block.register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: output[0]}))
    reference.tokens(images)
    taps = [outputs[i][:, 1:].reshape(2, 3, 5, 24).permute(0, 3, 1, 2) for i in (0, 2, 2, 4)]
    weights = pyramid.resize.state_dict()

    def convolve(x, key):
        return F.conv_transpose2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], stride=2)

    mean, var = weights["0.1.running_mean"].view(-1, 1, 1), weights["0.1.running_var"].view(-1, 1, 1)
    expected = [
        convolve(F.gelu((convolve(taps[0], "0.0") - mean) / (var + 1e-5).sqrt()), "0.3"),
        convolve(taps[1], "1"),
        taps[2],
        F.max_pool2d(F.pad(taps[3], (0, 1, 0, 1), value=-torch.inf), 2),
    ]
    maps = pyramid(images)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 12, 20), (2, 24, 6, 10), (2, 24, 3, 5), (2, 24, 2, 3)]
    for ours, hand in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, hand)
    assert pyramid.strides == [2, 4, 8, 16]
    assert pyramid.channels == [24] * 4


def test_patches_of_16_give_strides_4_to_32():
    pyramid = Pyramid(vit(depth=4, patch_size=16, image_size=64)).eval()
    assert pyramid.strides == [4, 8, 16, 32]
    sides = [m.shape[-1] for m in pyramid(torch.randn(1, 3, 64, 64))]
    assert sides == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("depth", "taps"),
    [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (32, [7, 15, 23, 31]), (6, [0, 2, 3, 5]), (2, [0, 0, 0, 1])],
)
def test_default_taps(depth, taps):
    assert default_taps(depth) == taps


@pytest.mark.parametrize("taps", [[0, 1, 2], [0, 1, 2, 6], [-1, 0, 1, 2], [2, 1, 3, 4]])
def test_wrong_taps_are_named(taps):
    with pytest.raises(ConfigError, match=r"taps is .* out of 0 to 5"):
        Pyramid(vit(), taps=taps)


@pytest.mark.parametrize("settings", [{}, {"window": (4, 4)}, {"checkpointing": True}, {"taps": [0, 1, 2, 3]}])
def test_every_parameter_learns(settings):
    pyramid = Pyramid(vit(), drop_path=0.0, **settings)
    sum(m.square().sum() for m in pyramid(torch.randn(2, 3, 32, 32))).backward()
    silent = [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_checkpointing_changes_nothing():
    plain = Pyramid(vit())
    saving = Pyramid(copy.deepcopy(plain.backbone), checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for pyramid in (plain, saving):
        sum(m.square().sum() for m in pyramid(images)).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_relative_positions_start_at_zero_and_have_one_window():
    plain = Pyramid(vit()).eval()
    biased = Pyramid(vit(), window=(4, 4)).eval()
    biased.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 32, 32)
    before = biased(images)
    torch.testing.assert_close(before, plain(images))
    torch.nn.init.normal_(biased.backbone.blocks[0].attn.relative_position_bias_table)
    assert not torch.allclose(biased(images)[2], before[2])
    with pytest.raises(ConfigError, match="4 x 4 patches, the images have 3 x 4"):
        biased(torch.randn(1, 3, 24, 32))


def test_drop_path_replaces_the_backbones_own():
    pyramid = Pyramid(vit(drop_path=0.6), drop_path=0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in pyramid.backbone.blocks]
    assert rates == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])
    still = Pyramid(vit(drop_path=0.6))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(still(images)[2], still(images)[2], rtol=0, atol=0)


@pytest.mark.parametrize(("small", "strides"), [(False, [4, 8, 16, 32]), (True, [1, 2, 4, 8])])
def test_resnet(small, strides):
    torch.manual_seed(0)
    resnet = ResNet("resnet18", small_images=small).eval()
    pyramid = Pyramid(resnet)
    images = torch.randn(1, 3, 64, 64)
    maps = pyramid(images)
    assert pyramid.strides == strides == [64 // m.shape[-1] for m in maps]
    assert pyramid.channels == [m.shape[1] for m in maps] == [64, 128, 256, 512]
    torch.testing.assert_close(maps, resnet.stages(images))
    with pytest.raises(ConfigError, match="change a ViT"):
        Pyramid(resnet, drop_path=0.1)
