"""MAE: a step in the order of the paper, what is seen and what learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss
from fastssl.loaders.masks import RandomMask, add_masks
from fastssl.methods import METHODS, view_list
from fastssl.methods.mae import MAE
from fastssl.models.vit import cut_patches
from fastssl.pictures import to_picture
from fastssl.step import Values
from fastssl.training.timing import Stopwatch

VALUES = Values(0, 10, 2, seed=5)


def make_method(model: Model | None = None, size: int = 32, count: int = 1, **settings) -> MAE:
    torch.manual_seed(0)
    views = MAE.Views()
    views.main.size, views.main.count = size, count
    numbers = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, **settings}
    model = model or Model("vit_tiny", 32, 8, 48, 2, 3, positions="sincos")
    return MAE(Config("mae", views, MAE.Settings(**numbers), model=model))


def make_batch(size: int = 32, seed: int = 0) -> Batch:
    images = torch.randn(3, 1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    batch = Batch(torch.tensor([4, 9, 2]), torch.full((3,), -1), epoch=3, views={"main": images})
    add_masks(batch, [RandomMask("main", (size // 8) ** 2, 0.75)], seed=5)
    return batch


def test_masks_are_asked_of_the_loader():
    config = Config("mae", MAE.Views(), MAE.Settings(mask_ratio=0.6))
    assert MAE.masks(config) == [RandomMask("main", 196, 0.6)]
    config.views.main.size, config.model.patch_size = 48, 8
    assert MAE.masks(config) == [RandomMask("main", 36, 0.6)]
    config.views.main.size = 36
    with pytest.raises(ConfigError, match=r"views\.main\.size is 36; it must be a multiple of model\.patch_size, 8"):
        MAE.masks(config)
    with pytest.raises(ValueError, match="the batch has no mask of the views 'main'"):
        make_method()(replace(make_batch(), masks={}), VALUES)


def test_a_step_in_the_order_of_the_paper():
    method, batch = make_method(), make_batch()
    keep, masked = batch.masks["main"]
    assert keep.shape == (3, 4)
    images = batch.views["main"][:, 0]
    prediction = method.decoder(method.encoder.tokens(images, keep), keep, masked)
    expected = patch_pixel_loss(prediction, images, masked, patch_size=8)
    out = method(batch, VALUES)
    torch.testing.assert_close(out.loss, expected)
    assert 0 < out.metrics["feature_std"] < 1.5


def test_the_encoder_does_not_see_masked_patches():
    method, batch = make_method(), make_batch()
    keep, masked = batch.masks["main"]
    images = batch.views["main"][:, 0].clone().requires_grad_()
    method.encoder.tokens(images, keep).square().sum().backward()
    seen = cut_patches(images.grad, 8).abs().sum(-1)
    assert seen.gather(1, masked).max() == 0
    assert seen.gather(1, keep).min() > 0


def test_every_trainable_parameter_learns():
    method = make_method()
    method(make_batch(), VALUES).loss.backward()
    for key, parameter in method.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, key
    assert [key for key, p in method.named_parameters() if not p.requires_grad] == [
        "encoder.pos_embed",
        "decoder.pos_embed",
    ]


def test_start_values_are_maes():
    method = make_method()
    assert method.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert method.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    for linear in (method.encoder.blocks[0].attn.qkv, method.decoder.pred):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound


def test_loss_falls_on_one_batch():
    method, batch = make_method(), make_batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = method(batch, VALUES).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_image_size_may_differ_from_the_models():
    method = make_method(size=48)
    assert method(make_batch(48), VALUES).loss.isfinite()


def test_official_checkpoint_round_trip():
    def official(key: str) -> str:
        side, _, rest = key.partition(".")
        return rest if side == "encoder" or rest == "mask_token" else f"decoder_{rest}"

    method = make_method()
    state = method.state_dict()
    checkpoint = {"model": {official(key): value for key, value in state.items()}, "epoch": 799}
    assert {"cls_token", "mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_pred.bias"} <= set(
        checkpoint["model"]
    )
    for given in (checkpoint, checkpoint["model"]):
        other = make_method()
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(MAE.official(given))
        for key, value in state.items():
            assert torch.equal(other.state_dict()[key], value), key


def test_to_official_is_the_inverse():
    state = make_method().state_dict()
    theirs = MAE.to_official(state)["model"]
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_blocks.0.attn.qkv.bias"} <= set(theirs)
    assert {"decoder_pos_embed", "decoder_embed.weight", "decoder_norm.bias", "decoder_pred.bias"} <= set(theirs)
    back = MAE.official({"model": theirs})
    assert back.keys() == state.keys()
    assert all(back[key] is state[key] for key in state)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_pictures_show_what_is_seen_and_what_is_predicted(norm_pixels):
    """The true patches, as the loss wants them, give the image back; a network that knows nothing shows nothing."""
    method, batch = make_method(norm_pixel_loss=norm_pixels).eval(), make_batch()
    keep, masked = batch.masks["main"]
    images = batch.views["main"][:, 0] * 0.3  # no pixel is cut off
    batch.views["main"] = images[:, None]
    true = (
        images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    )  # row, column, channel
    if norm_pixels:
        true = (true - true.mean(2, keepdim=True)) / (true.var(2, keepdim=True) + 1e-6).sqrt()
    answers = {"right": true, "nothing": torch.zeros_like(true)}

    def at(picture, ids):
        return cut_patches(picture, 8).gather(1, ids[..., None].expand(-1, -1, 192))

    for name, answer in answers.items():
        method.decoder.forward = lambda *_, answer=answer: answer.gather(1, masked[..., None].expand(-1, -1, 192))
        with torch.no_grad():
            sheet = method.pictures(batch, VALUES)["reconstruction"]
        crop, seen, *others = sheet.pictures.unbind(1)
        assert len(sheet.titles) == 2 + len(others) == (5 if norm_pixels else 3)
        assert torch.equal(crop, to_picture(images))
        assert (at(seen, masked) == 0.5).all()
        torch.testing.assert_close(at(seen, keep), at(crop, keep))
        torch.testing.assert_close(at(others[-1], keep), at(crop, keep))
        torch.testing.assert_close(at(others[0], keep), at(others[1] if norm_pixels else crop, keep))
        if name == "right":
            torch.testing.assert_close(others[-1], crop)
            torch.testing.assert_close(others[0], others[1] if norm_pixels else crop)
        else:  # one and the same colour, whatever was hidden
            assert at(others[0], masked).flatten(0, 1).flatten(0, 1).std() < (1e-6 if norm_pixels else 0.1)
            assert (at(others[0], masked) - at(others[-2] if norm_pixels else crop, masked)).abs().mean() > 0.05


def test_named_parts_of_the_step():
    watch = Stopwatch(torch.device("cpu"))
    with watch.listening():
        make_method()(make_batch(), VALUES)
    assert list(watch.read()) == ["encoder", "decoder", "loss"]


def test_backbone_stands_under_its_prefix():
    method = make_method()
    ours = {key for key in method.state_dict() if key.startswith(method.backbone_prefix)}
    assert ours == {method.backbone_prefix + key for key in method.backbone.state_dict()}
    assert method.chance_loss is None


def test_size_of_the_published_model():
    with torch.device("meta"):
        config = Config("mae", MAE.Views(), MAE.Settings(), model=Model("vit_base", positions="sincos"))
        count = sum(p.numel() for p in MAE(config).parameters() if p.requires_grad)
    assert count == 111_655_680


def test_view_is_that_of_the_paper():
    (view,) = view_list(METHODS["mae"].Views())
    assert (view.name, view.count, view.size, view.scale, view.flip) == ("main", 1, 224, (0.2, 1.0), 0.5)
    assert view.jitter_p == view.gray == view.blur == view.solarize == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 36}, "views.main.size is 36; it must be a multiple of model.patch_size, 8"),
        ({"count": 2}, "views.main.count is 2; it must be 1 with method mae"),
        ({"model": Model("resnet18")}, "model.name is 'resnet18'; method mae needs a ViT"),
        ({"mask_ratio": 1.0}, "mae.mask_ratio is 1.0; it must be above 0 and below 1"),
        ({"mask_ratio": 0.95}, "mae.mask_ratio is 0.95; it must be low enough to keep one of the image's 16 patches"),
        ({"decoder_heads": 3}, "mae.decoder_width is 32; it must be a multiple of mae.decoder_heads, 3"),
    ],
    ids=str,
)
def test_messages(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**arguments)
