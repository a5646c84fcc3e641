"""SemMAE: the masking rule and the step as the paper's code runs them, one patch at a time, against ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastssl.batch import Batch
from fastssl.cli import main
from fastssl.config import Config, ConfigError, Model, Schedule
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss
from fastssl.loaders.masks import SemanticMask, add_masks
from fastssl.loaders.philox import random_words
from fastssl.loaders.synthetic import draw_images
from fastssl.methods import METHODS, view_list
from fastssl.methods.semmae import MAX_PARTS, SemMAE
from fastssl.models.vit import sincos_positions
from fastssl.step import Values
from fastssl.training.timing import Stopwatch

B, SIDE, PATCH, GRID = 3, 48, 8, 6
SEED, EPOCH, EPOCHS = 5, 3, 8
VALUES = Values(step=EPOCH * 2, total_steps=EPOCHS * 2, steps_per_epoch=2, seed=SEED)


def make_config(model: Model | None = None, size: int = SIDE, epochs: int = EPOCHS, **settings) -> Config:
    views = SemMAE.Views()
    views.main.size = size
    numbers = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, **settings}
    model = model or Model("vit_tiny", SIDE, PATCH, 24, 2, 3, positions="sincos")
    return Config("semmae", views, SemMAE.Settings(**numbers), model=model, schedule=Schedule(epochs, 1))


def make_method(model: Model | None = None, size: int = SIDE, epochs: int = EPOCHS, **settings) -> SemMAE:
    torch.manual_seed(0)
    return SemMAE(make_config(model, size, epochs, **settings))


def make_batch(dtype=torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 5, (B, 1, GRID, GRID), generator=generator)
    batch = Batch(torch.tensor([4, 9, 2]), torch.full((B,), -1), epoch=EPOCH, views={"main": images},
                  parts={"main": labels})  # fmt: skip
    add_masks(batch, SemMAE.masks(make_config()), seed=SEED)
    return batch


# -- the masking rule of the authors' code, patch by patch -------------------------------------------------------------


def naive_mask(labels: list[int], sample: int, alpha: float) -> tuple[list[int], list[int]]:
    count = len(labels)
    visible = int(count * 0.25)
    budget = count - visible
    blocks = -(-count // 4)
    words = random_words(SEED, "mask/semantic", sample, EPOCH, 0, np.arange(blocks + MAX_PARTS // 4))
    words = np.stack(words, -1).flatten()
    order = np.argsort(words[:count], kind="stable").tolist()
    parts = np.argsort(words[4 * blocks : 4 * blocks + MAX_PARTS], kind="stable").tolist()
    size = [labels.count(part) for part in range(MAX_PARTS)]
    hide, taken = {}, 0
    for part in parts:
        inter = min(max(budget - taken, 0), size[part])
        taken += size[part]
        hide[part] = round((1 - alpha) * round(0.75 * size[part]) + alpha * inter)
    seen = dict.fromkeys(range(MAX_PARTS), 0)
    shown, hidden = [], []
    for patch in order:
        seen[labels[patch]] += 1
        (hidden if seen[labels[patch]] <= hide[labels[patch]] else shown).append(patch)
    line = shown + hidden
    return sorted(line[:visible]), sorted(line[visible:])


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_masks_are_those_of_the_sequential_rule(epoch):
    batch = make_batch()
    add_masks(batch, SemMAE.masks(make_config()), seed=SEED, schedule_epoch=epoch)
    keep, masked = batch.masks["main"]
    assert keep.shape == (B, 9)
    assert masked.shape == (B, 27)
    for b in range(B):
        labels = batch.parts["main"][b, 0].flatten().tolist()
        shown, hidden = naive_mask(labels, int(batch.id[b]), ((epoch + 1) / EPOCHS) ** 2)
        assert keep[b].tolist() == shown
        assert masked[b].tolist() == hidden


def test_the_curriculum_of_the_paper():
    """Alpha = 1 - lambda; values of the authors' 800 epochs."""
    method = make_method(epochs=800)

    def alpha(epoch, step=0):
        return method.whole_parts(Values(epoch * 10 + step, 8000, 10))

    for epoch, value in ((0, 0.99999844), (199, 0.9375), (399, 0.75), (599, 0.4375), (799, 0.0)):
        assert 1 - alpha(epoch) == pytest.approx(value, abs=1e-8)
        assert alpha(epoch, 9) == alpha(epoch)
    assert sum(alpha(epoch) for epoch in range(800)) / 800 == pytest.approx(1 / 3, abs=1e-3)
    assert make_method(epochs=800, gamma=0.5).whole_parts(Values(1990, 8000, 10)) == pytest.approx(0.5)
    short = Values(1999, 2000, 10)  # epoch 199 of 200
    assert make_method(epochs=200).whole_parts(short) == 1.0
    assert make_method(epochs=200, curriculum_epochs=800).whole_parts(short) == pytest.approx(0.0625)


def test_from_within_parts_to_whole_parts():
    """First every part is three quarters hidden, at the end at most one is cut."""
    batch = make_batch()
    labels = torch.repeat_interleave(torch.arange(7), torch.tensor((70, 40, 30, 26, 14, 10, 6))).expand(B, -1)
    batch.parts["main"] = labels.view(B, 1, 14, 14)
    for gamma, counts in ((1e9, (52, 30, 22, 20, 10, 8, 4)), (1e-9, None)):
        wanted = SemMAE.masks(make_config(size=112, gamma=gamma))
        add_masks(batch, wanted, seed=SEED, schedule_epoch=1)
        _, masked = batch.masks["main"]
        assert masked.shape == (B, 147)
        hidden = F.one_hot(labels.gather(1, masked), 7).sum(1)
        if counts:
            assert (hidden - torch.tensor(counts)).abs().sum(1).tolist() == [1] * B  # they sum up to 146
        else:
            assert ((hidden > 0) & (hidden < torch.tensor((70, 40, 30, 26, 14, 10, 6)))).sum(1).max() <= 1


# -- a step as the authors' model does it ------------------------------------------------------------------------------


def naive_block(x, state, name, heads):
    """One sample's tokens [N, D] through a pre-norm block."""

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.{key}.weight"], state[f"{name}.{key}.bias"], 1e-6)

    def linear(x, key):
        return x @ state[f"{name}.{key}.weight"].T + state[f"{name}.{key}.bias"]

    width = x.shape[1] // heads
    q, k, v = linear(norm(x, "norm1"), "attn.qkv").chunk(3, dim=1)
    heads_out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        attention = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(dim=1)
        heads_out.append(attention @ v[:, part])
    x = x + linear(torch.cat(heads_out, dim=1), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def patch_of(image, index, channels_last):
    row, column = divmod(index, GRID)
    cut = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    return (cut.permute(1, 2, 0) if channels_last else cut).flatten()


def naive_loss(state, batch: Batch, alpha: float, norm_pixels: bool, order=None):
    """The authors' forward pass on one image at a time, from a state dict with their keys."""
    total = 0.0
    for b in range(B):
        image = batch.views["main"][b, 0]
        shown, hidden = naive_mask(batch.parts["main"][b, 0].flatten().tolist(), int(batch.id[b]), alpha)
        kernel = state["patch_embed.proj.weight"].flatten(1)
        tokens = [state["cls_token"][0, 0] + state["pos_embed"][0, 0]]
        for patch in shown:
            embedded = kernel @ patch_of(image, patch, False) + state["patch_embed.proj.bias"]
            tokens.append(embedded + state["pos_embed"][0, 1 + patch])
        x = torch.stack(tokens)
        for i in range(2):
            x = naive_block(x, state, f"blocks.{i}", 3)
        x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
        y = x @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
        full = [state["mask_token"][0, 0]] * (GRID * GRID)
        for place, patch in enumerate(shown):
            full[patch] = y[1 + place]
        z = torch.stack([y[0], *full]) + state["decoder_pos_embed"][0]
        z = naive_block(z, state, "decoder_blocks.0", 2)
        z = F.layer_norm(z, z.shape[-1:], state["decoder_norm.weight"], state["decoder_norm.bias"], 1e-6)
        out = (z @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[1:]
        for patch in hidden:
            target = patch_of(image, patch, True)
            if norm_pixels:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total = total + (out[patch] - target).square().mean() / (B * len(hidden))
    return total


def official_shapes(depth: int = 2, decoder_depth: int = 1) -> dict[str, list[int]]:
    """The keys of the authors' file with their shapes, at this test's widths."""
    width, small, count = 24, 16, 1 + GRID * GRID

    def block(name, d):
        return {
            **{f"{name}.{norm}.{kind}": [d] for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
            f"{name}.attn.qkv.weight": [3 * d, d],
            f"{name}.attn.qkv.bias": [3 * d],
            f"{name}.attn.proj.weight": [d, d],
            f"{name}.attn.proj.bias": [d],
            f"{name}.mlp.fc1.weight": [4 * d, d],
            f"{name}.mlp.fc1.bias": [4 * d],
            f"{name}.mlp.fc2.weight": [d, 4 * d],
            f"{name}.mlp.fc2.bias": [d],
        }

    shapes = {
        "cls_token": [1, 1, width],
        "mask_token": [1, 1, small],
        "pos_embed": [1, count, width],
        "decoder_pos_embed": [1, count, small],
        "patch_embed.proj.weight": [width, 3, PATCH, PATCH],
        "patch_embed.proj.bias": [width],
        "norm.weight": [width],
        "norm.bias": [width],
        "decoder_embed.weight": [small, width],
        "decoder_embed.bias": [small],
        "decoder_norm.weight": [small],
        "decoder_norm.bias": [small],
        "decoder_pred.weight": [3 * PATCH**2, small],
        "decoder_pred.bias": [3 * PATCH**2],
    }
    for i in range(depth):
        shapes |= block(f"blocks.{i}", width)
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", small)
    return shapes


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = {
        key: torch.randn(shape, generator=generator, dtype=torch.float64) / 5
        for key, shape in official_shapes().items()
    }
    state["decoder_pos_embed"][:, 0] = 0  # the class token's row is 0 in every sine-cosine table
    return state


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_gradients_against_the_authors_forward(official, norm_pixels):
    method = make_method(norm_pixel_loss=norm_pixels).double()
    method.load_state_dict(SemMAE.official({"model": official, "epoch": 799}))
    batch = make_batch(torch.float64)
    out = method(batch, VALUES)
    out.loss.backward()
    state = {key: value.clone().requires_grad_() for key, value in official.items()}
    alpha = ((EPOCH + 1) / EPOCHS) ** 2
    expected = naive_loss(state, batch, alpha, norm_pixels)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-9)
    assert out.metrics["whole_parts"].item() == pytest.approx(alpha)
    ours = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    theirs = SemMAE.to_official(ours)["model"]
    assert set(theirs) == set(state) - {"pos_embed", "decoder_pos_embed"}
    for key, grad in theirs.items():
        torch.testing.assert_close(grad, state[key].grad, rtol=1e-7, atol=1e-10, msg=key)


def test_official_round_trip(official):
    method = make_method()
    ours = SemMAE.official({"model": official})
    assert {key: list(value.shape) for key, value in ours.items()} == {
        key: list(value.shape) for key, value in method.state_dict().items()
    }
    back = SemMAE.to_official(ours)["model"]
    assert back.keys() == official.keys()
    assert all(back[key] is official[key] for key in official)


def test_the_order_of_patches_does_not_matter():
    method, batch = make_method().double(), make_batch(torch.float64)
    images = batch.views["main"][:, 0]
    keep, masked = batch.masks["main"]

    def loss(keep, masked):
        prediction = method.decoder(method.encoder.tokens(images, keep), keep, masked)
        return patch_pixel_loss(prediction, images, masked, patch_size=PATCH)

    shuffled = keep[:, torch.randperm(keep.shape[1])], masked[:, torch.randperm(masked.shape[1])]
    torch.testing.assert_close(loss(*shuffled), loss(keep, masked))


def test_row_of_the_position_table():
    table = sincos_positions(768, 28, 28)[0]
    assert table[0].abs().max() == 0
    row = table[1 + 29]  # row 1, column 1
    assert row[[0, 192, 384, 576]].tolist() == pytest.approx([math.sin(1), math.cos(1)] * 2)


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_the_loss_of_a_known_prediction(delta):
    images = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64)
    images[:, :, :PATCH, :PATCH] = 0.7  # a patch without contrast: its target is 0
    masked = torch.arange(GRID * GRID)[None]
    patches = torch.stack([patch_of(images[0], i, True) for i in range(GRID * GRID)])[None]
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    assert target[0, 0].abs().max() < 1e-9
    loss = patch_pixel_loss(target + delta, images, masked, patch_size=PATCH)
    torch.testing.assert_close(loss, torch.tensor(delta**2, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_every_trainable_parameter_learns():
    method = make_method()
    method(make_batch(), VALUES).loss.backward()
    for key, parameter in method.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, key


def test_bfloat16_stays_close():
    method, batch = make_method(), make_batch()
    exact = method(batch, VALUES).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(batch, VALUES).loss
    rough.backward()
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_pictures_show_parts_and_mask():
    method, batch = make_method().eval(), make_batch()
    sheet = method.pictures(batch, VALUES)["reconstruction"]
    pictures = sheet.pictures
    assert pictures.shape == (B, len(sheet.titles), 3, SIDE, SIDE) == (B, 6, 3, SIDE, SIDE)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    _, masked = batch.masks["main"]
    cells = F.avg_pool2d((pictures[:, 2] != 0.5).float().amax(1)[:, None], PATCH).flatten(1)
    assert cells.gather(1, masked).max() == 0
    assert (cells > 0).sum(1).tolist() == [9] * B
    assert not torch.equal(pictures[:, 1], pictures[:, 0])


def test_named_parts_of_the_step():
    watch = Stopwatch(torch.device("cpu"))
    with watch.listening():
        make_method()(make_batch(), VALUES)
    assert list(watch.read()) == ["encoder", "decoder", "loss"]


def test_one_label_per_patch_and_the_masks_are_asked_of_the_loader():
    config = Config("semmae", SemMAE.Views(), SemMAE.Settings(gamma=3.0), schedule=Schedule(300, 1))
    assert SemMAE.part_grid(config) == {"main": 14}
    assert SemMAE.masks(config) == [SemanticMask("main", 196, 0.75, MAX_PARTS, 300, 3.0)]
    config.model.patch_size, config.settings.curriculum_epochs = 8, 800
    assert SemMAE.part_grid(config) == {"main": 28}
    assert SemMAE.masks(config) == [SemanticMask("main", 784, 0.75, MAX_PARTS, 800, 3.0)]


@pytest.mark.parametrize(("patch", "count"), [(16, 111_655_680), (8, 110_917_824)])
def test_size_of_the_published_models(patch, count):
    with torch.device("meta"):
        model = Model("vit_base", patch_size=patch, positions="sincos")
        method = SemMAE(Config("semmae", SemMAE.Views(), SemMAE.Settings(), model=model))
        assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count


def test_recipe_is_maes():
    (view,) = view_list(METHODS["semmae"].Views())
    assert (view.name, view.count, view.size, view.scale, view.flip) == ("main", 1, 224, (0.2, 1.0), 0.5)
    assert SemMAE.defaults == METHODS["mae"].defaults
    settings = SemMAE.Settings()
    assert (settings.mask_ratio, settings.norm_pixel_loss, settings.gamma) == (0.75, True, 2.0)


def test_data_without_part_maps_end_before_the_first_step(tmp_path, capsys):
    images = draw_images(tmp_path / "images", train=8, val=8)
    command = ["pretrain", "--method=semmae", f"--data.path={images / 'train'}", f"--run.dir={tmp_path / 'run'}"]
    assert main([*command, "--run.device=cpu", "--data.batch_size=8"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "has no part maps, which the method needs; 'fastssl parts learn' and 'fastssl parts write'" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, "semmae.gamma is 0.0; it must be positive"),
        ({"curriculum_epochs": -1}, "semmae.curriculum_epochs is -1; it must be 0"),
        ({"mask_ratio": 1.0}, "semmae.mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"decoder_heads": 3}, "semmae.decoder_width is 16; it must be a multiple of semmae.decoder_heads, 3"),
        ({"model": Model("resnet18")}, "model.name is 'resnet18'; method semmae needs a ViT"),
        (
            {"mask_ratio": 0.98},
            "semmae.mask_ratio is 0.98; it must be low enough to keep one of the image's 36 patches",
        ),
    ],
    ids=str,
)
def test_messages(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**arguments)
