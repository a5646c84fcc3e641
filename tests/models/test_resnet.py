"""ResNets: torchvision's numbers with torchvision's weights, stage taps, the stem for small images."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from fastssl.config import ConfigError
from fastssl.models.resnet import ResNet


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_equals_torchvision(name, width):
    torch.manual_seed(0)
    model = ResNet(name).eval()
    twin = getattr(torchvision.models, name)()
    twin.fc = torch.nn.Identity()
    twin.load_state_dict(model.state_dict())  # strict: torchvision's keys, less fc
    twin.eval()
    images = torch.randn(2, 3, 64, 64)
    assert model.width == width
    torch.testing.assert_close(model(images), twin(images))
    torch.testing.assert_close(model.represent(images), twin(images))
    taps = create_feature_extractor(twin, [f"layer{i}" for i in range(1, 5)])(images)
    for ours, theirs in zip(model.stages(images), taps.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_stage_maps_of_both_stems():
    images = torch.randn(1, 3, 32, 32)
    shapes = [tuple(m.shape) for m in ResNet("resnet18").eval().stages(images)]
    assert shapes == [(1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2), (1, 512, 1, 1)]
    small = ResNet("resnet18", small_images=True).eval()
    shapes = [tuple(m.shape) for m in small.stages(images)]
    assert shapes == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8), (1, 512, 4, 4)]
    assert small(images).shape == (1, 512)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 128), ("resnet50", 512)])
@pytest.mark.parametrize("small_images", [False, True])
def test_channels_of_the_first_stage_scale_the_whole_network(name, width, small_images):
    model = ResNet(name, small_images, channels=16).eval()
    maps = model.stages(torch.randn(1, 3, 32, 32))
    assert model.width == width == maps[-1].shape[1]
    assert [m.shape[1] for m in maps] == [width // 8, width // 4, width // 2, width]
    kernel = model.layer2[0].conv1.weight
    fan_out = kernel.shape[0] * kernel.shape[2] * kernel.shape[3]
    assert kernel.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)  # He et al. 2015


def test_a_vits_options_are_refused():
    with pytest.raises(ConfigError, match="blocks is 4 and mean_patch False"):
        ResNet("resnet18").represent(torch.randn(1, 3, 32, 32), blocks=4)
