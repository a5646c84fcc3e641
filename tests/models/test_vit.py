"""The ViT: timm's numbers with timm's weights, positions, token selection, features for evaluation."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, vit_base_patch16_224

from fastssl.config import ConfigError
from fastssl.kernels._path import forced
from fastssl.kernels.masked_attention_gather import gather_tokens
from fastssl.models.blocks import Drop
from fastssl.models.vit import ViT, cut_patches, sincos_positions, xavier_init_


def small_vit(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"width": 48, "depth": 3, "heads": 3, "patch_size": 8, "image_size": 32, **changes}).eval()


def timm_twin(model: ViT, **changes) -> VisionTransformer:
    twin = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True, **changes
    )
    twin.load_state_dict(model.state_dict())  # strict: the keys are timm's
    return twin.eval()


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (8, 8)], ids=str)
def test_equals_timm(size):
    model = small_vit(resample="antialiased")
    twin = timm_twin(model)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(model.tokens(images), twin.forward_features(images))
    torch.testing.assert_close(model(images), twin(images))
    ours = model.intermediate(images, 2)
    theirs = twin.get_intermediate_layers(images, n=2, norm=True, return_prefix_tokens=True)
    for tokens, (patches, first) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tokens, torch.cat([first, patches], dim=1))


def test_layer_scale_equals_timm():
    model = small_vit(layer_scale=0.1)
    gains = [p for key, p in model.named_parameters() if key.endswith((".ls1.gamma", ".ls2.gamma"))]
    assert len(gains) == 6
    assert all(bool((gain == 0.1).all()) and gain.requires_grad for gain in gains)
    with torch.no_grad():
        for gain in gains:
            gain.copy_(torch.randn(48))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.tokens(images), timm_twin(model, init_values=1.0).forward_features(images))


def test_state_dict_of_vit_base_fits_timm():
    with torch.device("meta"):
        ours = ViT(width=768, depth=12, heads=12).state_dict()
        theirs = vit_base_patch16_224(num_classes=0).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_positions_of_the_own_grid_are_the_table_itself():
    model = small_vit()
    assert model.positions(4, 4) is model.pos_embed
    assert model.positions(6, 3).shape == (1, 19, 48)


@pytest.mark.parametrize("rule", ["plain", "dino", "antialiased"])
@pytest.mark.parametrize("grid", [(6, 6), (32, 20)], ids=str)
def test_positions_of_another_grid_are_the_authors(rule, grid):
    """PyTorch's interpolation, called as MAE (plain), DINO and timm call it."""
    model = ViT(width=16, depth=1, heads=2, resample=rule)
    x = model.pos_embed.detach().clone().requires_grad_()
    table = x[:, 1:].reshape(1, 14, 14, 16).permute(0, 3, 1, 2)
    how = {"size": grid, "antialias": rule == "antialiased", "align_corners": False}
    if rule == "dino":
        how = {"scale_factor": tuple((cells + 0.1) / 14 for cells in grid)}
    table = F.interpolate(table, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(1, -1, 16)
    expected = torch.cat([x[:, :1], table], dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.positions(*grid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(grad)
    torch.testing.assert_close(model.pos_embed.grad, x.grad, rtol=1e-5, atol=1e-5)


def test_small_crops_see_the_positions_of_a_fresh_table():
    """Antialiased, the table of 6 x 6 patches is an average that has lost 60 % of its deviation."""
    torch.manual_seed(0)
    model = ViT(width=384, depth=1, heads=6, resample="dino")
    assert model.positions(6, 6)[:, 1:].std().item() == pytest.approx(0.017, abs=5e-4)
    model.resample = "antialiased"
    assert model.positions(6, 6)[:, 1:].std().item() == pytest.approx(0.007, abs=5e-4)


def test_learned_positions_learn_at_every_size():
    for side in (32, 40):  # plain bicubic leaves rows out where it shrinks
        model = small_vit()
        model(torch.randn(2, 3, side, side)).square().sum().backward()
        assert model.pos_embed.grad.abs().sum(-1).gt(0).all()


def test_sincos_row_of_a_known_patch():
    table = sincos_positions(768, 28, 28)[0]
    assert table.shape == (785, 768)
    assert table[0].abs().max() == 0
    row = table[1 + 29]  # row 1, column 1
    expected = {0: math.sin(1), 192: math.cos(1), 384: math.sin(1), 576: math.cos(1)}
    for channel, value in expected.items():
        assert row[channel].item() == pytest.approx(value, abs=1e-7)


def test_sincos_table_against_a_loop():
    width, rows, columns = 16, 3, 5
    table = sincos_positions(width, rows, columns)[0, 1:]
    quarter = width // 4
    for r in range(rows):
        for c in range(columns):
            for k in range(quarter):
                w = 10000 ** (-k / quarter)
                expected = [math.sin(c * w), math.cos(c * w), math.sin(r * w), math.cos(r * w)]
                actual = table[r * columns + c, k::quarter].tolist()
                assert actual == pytest.approx(expected, abs=1e-6)


def test_sincos_rows_first_is_the_table_with_its_halves_exchanged():
    table, rows = sincos_positions(16, 3, 5), sincos_positions(16, 3, 5, rows_first=True)
    assert torch.equal(rows, torch.cat([table[..., 8:], table[..., :8]], dim=-1))
    assert rows[0, 6, 0].item() == pytest.approx(math.sin(1))  # patch 5: row 1, column 0
    model = small_vit(positions="sincos_rows")
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed, sincos_positions(48, 4, 4, rows_first=True))


def test_sincos_positions_are_fixed_but_saved():
    model = small_vit(positions="sincos")
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.state_dict()["pos_embed"], sincos_positions(48, 4, 4))


def test_patches_are_projected_as_by_a_convolution():
    model = small_vit()
    images = torch.randn(2, 3, 32, 16)
    conv = model.patch_embed["proj"](images).flatten(2).transpose(1, 2) + model.positions(4, 2)[:, 1:]
    torch.testing.assert_close(model.embed(images)[:, 1:], conv)
    assert cut_patches(images, 8).shape == (2, 8, 192)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_kept_tokens_against_selection_after_embedding(positions):
    model = small_vit(positions=positions)
    images = torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    whole = model.embed(images)
    x = torch.stack([torch.cat([whole[b, :1], whole[b, 1:][keep[b]]]) for b in range(2)])
    torch.testing.assert_close(model.embed(images, keep), x)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.tokens(images, keep), model.norm(x))


def test_keeping_all_in_another_order_only_reorders():
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    kept, whole = model.tokens(images, order), model.tokens(images)
    torch.testing.assert_close(kept[:, 0], whole[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[:, 1:], gather_tokens(whole[:, 1:], order), rtol=1e-4, atol=1e-5)


SIZES = [(4, 32, 32), (6, 16, 24), (2, 40, 8)]  # images of a group, their height and width


def in_groups(model, keyed=True, together=True, **how):
    """Class tokens and gradients of images of several sizes, in one pass or in one per size."""
    torch.manual_seed(1)
    dtype = model.cls_token.dtype
    images = [torch.randn(rows, 3, *size, dtype=dtype, requires_grad=True) for rows, *size in SIZES]
    ids = torch.tensor([7, 3])
    drops = [Drop(ids, 5, 2, "test", len(x) // 2, 3 * i) if keyed else None for i, x in enumerate(images)]
    with torch.autocast("cpu", **how) if how else contextlib.nullcontext():
        if together:
            tokens = model.groups(images, drops)
        else:
            tokens = [model(x, drop) for x, drop in zip(images, drops, strict=True)]
    assert [tuple(x.shape) for x in tokens] == [(rows, model.width) for rows, *_ in SIZES]
    upstream = [torch.randn_like(x) for x in tokens]
    learned = [p for p in model.parameters() if p.requires_grad]
    return [*tokens, *torch.autograd.grad(tokens, [*images, *learned], upstream)]


@pytest.mark.parametrize("keyed", [False, True], ids=["PyTorch's draws", "keyed draws"])
@pytest.mark.parametrize("drop_path", [0.0, 0.6])
@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
def test_images_of_several_sizes_in_one_pass(layer_scale, drop_path, keyed):
    model = small_vit(layer_scale=layer_scale, drop_path=drop_path).train().double()
    for found, wanted in zip(in_groups(model, keyed), in_groups(model, keyed, together=False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    model.eval()
    for found, wanted in zip(in_groups(model, keyed), in_groups(model, keyed, together=False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("short", [False, True], ids=["float32 weights", "bfloat16 weights"])
def test_several_sizes_in_one_pass_in_bfloat16(short):
    model = small_vit(drop_path=0.6).train()
    if short:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    with forced("triton"):
        found = in_groups(model, dtype=torch.bfloat16)
        wanted = in_groups(model, together=False, dtype=torch.bfloat16)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.02 * theirs.abs().max().item())


def test_one_size_is_the_plain_pass():
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    (found,) = model.groups([images], [None])
    assert torch.equal(found, model(images))


def test_represent_is_the_protocol_of_dino():
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    last, previous = model.intermediate(images, 2)[::-1]
    torch.testing.assert_close(model.represent(images), model(images))
    expected = torch.cat([previous[:, 0], last[:, 0], last[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(model.represent(images, blocks=2, mean_patch=True), expected)


def test_drop_path_grows_to_the_last_block():
    model = small_vit(drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert model.state_dict().keys() == small_vit().state_dict().keys()


def test_attention_is_the_fused_one(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    small_vit()(torch.randn(1, 3, 32, 32))
    assert len(calls) == 3


def test_traces_into_one_graph():
    model = small_vit()
    compiled = torch.compile(model.tokens, backend="eager", fullgraph=True)
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[3, 1], [0, 15]])
    torch.testing.assert_close(compiled(images, keep), model.tokens(images, keep))


def test_xavier_init_fills_as_mae_does():
    model = small_vit(positions="sincos")
    xavier_init_(model)
    weight = model.patch_embed["proj"].weight
    bound = math.sqrt(6 / (48 + 192))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert model.blocks[0].mlp.fc1.weight.abs().max() <= math.sqrt(6 / (48 + 192))
    assert model.blocks[0].mlp.fc1.bias.abs().max() == 0
    torch.testing.assert_close(model.pos_embed, sincos_positions(48, 4, 4))


def test_messages():
    model = small_vit()
    with pytest.raises(ConfigError, match=r"images are 30 x 32 pixels; both sides must be multiples .* 8"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ConfigError, match="last 4 blocks were asked for; this model has 3"):
        model.represent(torch.randn(1, 3, 32, 32), blocks=4)
    with pytest.raises(ConfigError, match="multiple of 4, not 6"):
        sincos_positions(6, 2, 2)
