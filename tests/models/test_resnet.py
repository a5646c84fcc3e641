"""ResNets: torchvision's numbers with torchvision's weights, stage taps, the stem for small images."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fastssl.config import ConfigError
from fastssl.kernels import _launch
from fastssl.kernels._path import forced
from fastssl.models.norms import BatchNorm1d, BatchNorm2d, Chain
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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trains_with_torchvisions_bits(name):
    torch.manual_seed(0)
    model, twin = ResNet(name), getattr(torchvision.models, name)()
    twin.fc = nn.Identity()
    twin.load_state_dict(model.state_dict())
    for seed in range(2):
        torch.manual_seed(seed)
        images = torch.randn(2, 3, 64, 64)
        values, expected = model(images), twin(images)
        assert torch.equal(values, expected)
        values.square().sum().backward()
        expected.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_stage_of_two_groups_is_two_calls_and_kernels_give_what_pytorch_gives(name, path):
    torch.manual_seed(0)
    stage = ResNet(name, channels=4).layer2[:2]  # a block with a downsampling, one without
    channels = stage[0].conv1.in_channels
    twin, groups = copy.deepcopy(stage).double(), [torch.randn(4, channels, 8, 8), torch.randn(9, channels, 6, 4)]
    with forced(path):
        maps = stage(groups)
    expected = [twin([group.double()])[0] for group in groups]
    upstream = [torch.randn_like(x) for x in maps]
    with forced(path):
        torch.autograd.backward(maps, upstream)
    torch.autograd.backward(expected, [x.double() for x in upstream])
    for x, exact in zip(maps, expected, strict=True):
        assert (x - exact).norm() <= 1e-5 * exact.norm()
    for (key, p), q in zip(stage.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), key
    for (key, a), b in zip(stage.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), msg=lambda t, key=key: f"{key}: {t}", rtol=1e-5, atol=1e-5)


def test_a_norm_is_two_launches_for_both_groups_with_all_that_follows_it():
    model = ResNet("resnet50", channels=4)
    with forced("triton"), _launch.record() as launches:
        model.stages_of([torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)])
    assert len(launches) == 2 * 53


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_norms_keep_pytorchs_state_through_copies_and_files(path):
    norm, theirs = BatchNorm2d(6), nn.BatchNorm2d(6)
    x = torch.randn(4, 6, 3, 3)
    with forced(path):
        norm(x)
        norm = copy.deepcopy(norm)
        norm(x + 1, relu=True)
    theirs(x)
    theirs(x + 1)
    state = norm.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(state[key], value)
    again = BatchNorm2d(6)
    again.load_state_dict(state)
    with forced(path):
        assert torch.equal(again.eval()(x), norm.eval()(x))
    assert again.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_a_norm_of_any_momentum_moves_as_pytorchs(momentum):
    norm, theirs = BatchNorm1d(6, momentum=momentum), nn.BatchNorm1d(6, momentum=momentum)
    with forced("triton"):
        for x in torch.randn(3, 8, 6):
            torch.testing.assert_close(norm(x), theirs(x))
    torch.testing.assert_close(norm.state_dict(), theirs.state_dict())


def test_single_values_are_refused_as_by_pytorch():
    with forced("triton"), pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(6)(torch.randn(1, 6))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_a_chain_is_the_sequence_of_each_group(path):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), BatchNorm1d(6), nn.GELU(), nn.Linear(6, 4)]
    chain, groups = Chain(*layers, BatchNorm1d(4, affine=False)), [torch.randn(9, 5), torch.randn(4, 5)]
    theirs = [nn.BatchNorm1d(m.num_features, affine=m.affine) if isinstance(m, BatchNorm1d) else m for m in chain]
    plain = nn.Sequential(*copy.deepcopy(theirs))
    with forced(path):
        got = chain.joined(groups)
    torch.testing.assert_close(got, torch.cat([plain(group) for group in groups]), rtol=1e-4, atol=1e-5)
    assert chain.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(chain.state_dict()[key], value)


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
