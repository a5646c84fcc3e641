"""CAE: the step against a slow version in the authors' names, what is seen and what learns, the authors' files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fastssl.augment import IMAGENET_MEAN, IMAGENET_STD, augment
from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model, Optim
from fastssl.loaders.masks import BlockMask, add_masks
from fastssl.methods import METHODS, view_list
from fastssl.methods.cae import CAE
from fastssl.models.blocks import Drop
from fastssl.models.dvae import PatchCodebook, Tokenizer, describe
from fastssl.models.vit import cut_patches
from fastssl.step import Values
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.optim import build_optimizer, param_groups

VALUES = Values(0, 10, 2, seed=5)
CODES = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    """A codebook's file: 24 codes of 4 x 4 pixels."""
    path = tmp_path_factory.mktemp("codebook") / "codebook.pt"
    patches = torch.rand(CODES, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    network = {"centres": describe(patches.flatten(1)), "patches": patches}
    checkpoint.write(path, Checkpoint("tokenizer", {}, network, None))
    return str(path)


def make_config(codebook="", model: Model | None = None, *, views: dict | None = None, **settings) -> Config:
    groups = CAE.Views()
    groups.main.size, groups.tokenizer.size = 32, 16
    for key, value in (views or {}).items():
        name, key = key.split(".")
        setattr(getattr(groups, name), key, value)
    numbers = {"tokenizer": codebook, "codes": CODES, "num_masked": 8, "min_block": 2, "width": 32, "heads": 2}
    numbers |= {"regressor_depth": 2, "decoder_depth": 2, **settings}
    return Config("cae", groups, CAE.Settings(**numbers), model=model or make_model())


def make_model(**changes) -> Model:
    shape = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3}
    return Model("vit_tiny", **{**shape, "positions": "sincos_rows", "layer_scale": 0.1, **changes})


def make_method(codebook="", model: Model | None = None, *, views: dict | None = None, **settings) -> CAE:
    torch.manual_seed(0)
    return CAE(make_config(codebook, model, views=views, **settings))


def shaken(method: CAE) -> CAE:
    """With weights, gains and shifts unlike their start values, where a wrong one cannot hide; keys keep no bias."""
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1)
            if key.endswith("attn.qkv.bias"):
                parameter.view(3, -1)[1] = 0
    return method


def make_batch(count: int = 3, seed: int = 0) -> Batch:
    """Images at both sizes as the trainer hands them over: noise that differs from cell to cell, normalised."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(count, 1, 3, 8, 8, generator=generator)

    def view(scale):
        pixels = (cells.repeat_interleave(scale, -1).repeat_interleave(scale, -2) * 255).round().byte()
        return pixels

    raw = Batch(torch.arange(count) * 3 + 4, torch.full((count,), -1), 3, {"main": view(4), "tokenizer": view(2)})
    add_masks(raw, CAE.masks(make_config()), seed=5)
    return augment(raw)


def double(method: CAE, batch: Batch) -> tuple[CAE, Batch]:
    return method.double(), batch.map(lambda x: x.double() if x.is_floating_point() else x)


# -- the slow version, from the authors' names alone -----------------------------------------------------------------


def layer_norm(x, state, name):
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name, bias=None):
    bias = state.get(f"{name}.bias", 0) if bias is None else bias
    return x @ state[f"{name}.weight"].T + bias


def attend(q, k, v, heads):
    """[Nq, D], [Nk, D], [Nk, D] -> [Nq, D], head by head and query by query."""
    d = q.shape[1] // heads
    columns = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        rows = []
        for query in q[:, part]:
            weights = ((query * d**-0.5) @ k[:, part].T).exp()
            rows.append(weights / weights.sum() @ v[:, part])
        columns.append(torch.stack(rows))
    return torch.cat(columns, dim=1)


def mlp(x, state, name):
    hidden = linear(x, state, f"{name}.fc1")
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.fc2")


def block(x, state, name, heads):
    y = layer_norm(x, state, f"{name}.norm1")
    q_weight, k_weight, v_weight = state[f"{name}.attn.qkv.weight"].chunk(3)
    q = y @ q_weight.T + state[f"{name}.attn.q_bias"]
    k = y @ k_weight.T
    v = y @ v_weight.T + state[f"{name}.attn.v_bias"]
    x = x + state[f"{name}.gamma_1"] * linear(attend(q, k, v, heads), state, f"{name}.attn.proj")
    return x + state[f"{name}.gamma_2"] * mlp(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp")


def encode(image, keep, state, depth, heads):
    """One image [3, H, W], patches to keep -> class token and kept patches."""
    patches = F.conv2d(image[None], state["encoder.patch_embed.proj.weight"],
                       state["encoder.patch_embed.proj.bias"], stride=8)[0].flatten(1).T  # fmt: skip
    place = state["encoder.pos_embed"][0]
    x = torch.stack([state["encoder.cls_token"][0, 0] + place[0], *[patches[i] + place[1 + i] for i in keep]])
    for i in range(depth):
        x = block(x, state, f"encoder.blocks.{i}", heads)
    return layer_norm(x, state, "encoder.norm")


def regress(u, place, visible, visible_place, state, depth, heads):
    for i in range(depth):
        name = f"regresser.regressor_blocks.{i}"
        kv, position = torch.cat([visible, u]), torch.cat([visible_place, place])
        q = layer_norm(u + place, state, f"{name}.norm1_q")
        k = layer_norm(kv + position, state, f"{name}.norm1_k")
        v = layer_norm(kv, state, f"{name}.norm1_v")
        q = linear(q, state, f"{name}.cross_attn.q", state[f"{name}.cross_attn.q_bias"])
        k = linear(k, state, f"{name}.cross_attn.k")
        v = linear(v, state, f"{name}.cross_attn.v", state[f"{name}.cross_attn.v_bias"])
        a = linear(attend(q, k, v, heads), state, f"{name}.cross_attn.proj")
        y = layer_norm(u + state[f"{name}.gamma_1_cross"] * a, state, f"{name}.norm2_cross")
        u = y + state[f"{name}.gamma_2_cross"] * mlp(y, state, f"{name}.mlp_cross")
    return layer_norm(u, state, "regresser.norm")


def slow_step(state, images, labels, visible, masked, *, heads=3, narrow_heads=2, weight=2.0):
    """Image by image, token by token: loss over codes, alignment, estimates.

    Args:
        state: tensors under the authors' names.
        labels: [B, M].
    """
    codes, alignment, estimates = [], [], []
    count = {name: len({key.split(".")[2] for key in state if key.startswith(name)})
             for name in ("encoder.blocks.", "regresser.regressor_blocks.", "decoder.decoder_blocks.")}  # fmt: skip
    table = state["rd_pos_embed"][0, 1:]

    def project(x):
        if "encoder_to_regresser.weight" not in state:
            return x
        return layer_norm(linear(x, state, "encoder_to_regresser"), state, "encoder_to_regresser_norm")

    for b, image in enumerate(images):
        seen = project(encode(image, visible[b], state, count["encoder.blocks."], heads))[1:]
        with torch.no_grad():
            target = project(encode(image, masked[b], state, count["encoder.blocks."], heads))[1:]
        u = torch.stack([state["mask_token"][0, 0]] * len(masked[b]))
        estimate = regress(u, table[masked[b]], seen, table[visible[b]], state,
                           count["regresser.regressor_blocks."], narrow_heads)  # fmt: skip
        x = estimate + table[masked[b]]
        for i in range(count["decoder.decoder_blocks."]):
            x = block(x, state, f"decoder.decoder_blocks.{i}", narrow_heads)
        logits = linear(layer_norm(x, state, "decoder.norm"), state, "decoder.head")
        for row, label in zip(logits, labels[b], strict=True):
            codes.append(row.exp().sum().log() - row[label])
        alignment.append((estimate - target).square())
        estimates.append(estimate)
    return torch.stack(codes).mean(), weight * torch.stack(alignment).mean(), torch.stack(estimates)


def slow_codes(pixels, codebook):
    """Codes [N] of one image [3, H, W] in 0..1: the nearest centre of each 4 x 4 patch, one by one."""
    patches = checkpoint.read(codebook).network["patches"]
    centres = describe(patches.flatten(1))
    found = []
    for i in range(pixels.shape[1] // 4):
        for j in range(pixels.shape[2] // 4):
            patch = pixels[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(1, -1)
            found.append((centres - describe(patch)).square().sum(1).argmin())
    return torch.stack(found)


@pytest.mark.parametrize("width", [32, 48], ids=["with projection", "without"])
def test_loss_and_every_gradient_against_the_slow_version(codebook, width):
    method, batch = double(shaken(make_method(codebook, width=width)), make_batch())
    visible, masked = batch.masks["main"]
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (batch.views["tokenizer"][:, 0] * std + mean).float()
    labels = torch.stack([slow_codes(image, codebook)[m] for image, m in zip(pixels, masked, strict=True)])
    assert len(labels.unique()) > 4

    state = {key: value.clone() for key, value in CAE.to_official(method.state_dict())["model"].items()}
    state = {key: value.requires_grad_(not key.endswith("pos_embed")) for key, value in state.items()}
    codes, alignment, _ = slow_step(state, batch.views["main"][:, 0], labels, visible, masked)
    (1.7 * (codes + alignment)).backward()

    out = method(batch, VALUES)
    (1.7 * out.loss).backward()
    method.after_backward(VALUES)
    torch.testing.assert_close(out.metrics["loss_codes"], codes.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.metrics["loss_alignment"].double(), alignment.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, codes + alignment, rtol=1e-5, atol=1e-6)
    assert all(value.grad is None for key, value in state.items() if key.startswith("alignment_encoder"))
    expected = CAE.official({"model": {k: v.grad for k, v in state.items() if v.grad is not None} | {
        key: state[key].detach() for key in ("encoder.pos_embed", "rd_pos_embed")}})  # fmt: skip
    learning = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert learning.keys() == expected.keys() - {"encoder.pos_embed", "pos_embed"}
    for key, parameter in learning.items():
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_estimates_start_normalised_and_alignment_is_four_times_one_less_cosine(codebook):
    method, batch = make_method(codebook, width=48), make_batch(8)
    images = batch.views["main"][:, 0]
    visible, masked = batch.masks["main"]
    latent, _ = method.complete(method.encoder.tokens(images, visible)[:, 1:], visible, masked)
    target = method.target(images, masked)
    for rows in (latent, target):
        torch.testing.assert_close(rows.mean(-1), torch.zeros(8, 8), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.square().mean(-1), torch.ones(8, 8), rtol=1e-3, atol=1e-3)
    cosine = F.cosine_similarity(latent, target, dim=-1).mean()
    assert method(batch, VALUES).metrics["loss_alignment"].item() == pytest.approx(4 * (1 - cosine.item()), abs=1e-3)


def test_the_loss_over_codes_starts_near_chance(codebook):
    """ln K plus half of the logits' variance, as the Xavier-uniform head has it (9.0 to 9.25 at published size)."""

    class Noise(Tokenizer):
        codes, cell = 8192, 4

        def encode(self, pixels, cells):
            return torch.randint(0, 8192, cells.shape, generator=torch.Generator().manual_seed(0))

    method = make_method(codebook, codes=8192, width=768, heads=12, regressor_depth=1, decoder_depth=1)
    method._opened = [Noise()]
    with torch.no_grad():
        assert 9.0 < method(make_batch(8), VALUES).metrics["loss_codes"] < 9.25


def test_masks_are_the_blocks_of_the_recipe():
    """Exactly 98 of 196, with the authors' bias to the centre."""
    batch = Batch(torch.arange(4000), torch.zeros(4000))
    add_masks(batch, CAE.masks(Config("cae", CAE.Views(), CAE.Settings())), seed=5)
    visible, masked = batch.masks["main"]
    assert visible.shape == masked.shape == (4000, 98)
    both = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(196).expand(4000, -1))
    share = torch.zeros(4000, 196).scatter(1, masked, 1.0).mean(0).view(14, 14)
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item()
    assert (corners, share[6:8, 6:8].mean().item()) == (pytest.approx(0.061, abs=0.01), pytest.approx(0.863, abs=0.015))


def test_block_sizes_reach_the_mask():
    for numbers in ({"min_block": 1}, {"min_block": 1, "max_block": 1}, {"min_block": 4}):
        expected = BlockMask("main", (4, 4), 8, numbers["min_block"], numbers.get("max_block"))
        assert CAE.masks(make_config(**numbers)) == [expected]
    with pytest.raises(ConfigError, match=r"no block of 13 patches .* narrower than a grid of 4 x 4"):
        make_method(num_masked=14, min_block=13)


def test_positions_are_the_authors():
    table = make_method(width=768, heads=12, views={"main.size": 112}, num_masked=8).pos_embed[0]
    assert table.shape == (197, 768)
    assert table[0].abs().max() == 0
    torch.testing.assert_close(table[1:].square().sum(1), torch.full((196,), 384.0))
    channels = [0, 192, 384, 576]
    assert table[2, channels].tolist() == pytest.approx([0, 1, 0.841471, 0.540302], abs=1e-6)
    assert table[15, channels].tolist() == pytest.approx([0.841471, 0.540302, 0, 1], abs=1e-6)
    assert table[15, [1, 96]].tolist() == pytest.approx([math.sin(0.953162), math.sin(0.01)], abs=1e-6)
    encoder = make_method().encoder
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[0, 5, [0, 24]].tolist() == pytest.approx([0.841471, 0], abs=1e-6)  # row 1, column 0


def published(**settings) -> CAE:
    model = Model(settings.pop("name", "vit_base"), positions="sincos_rows", layer_scale=0.1, drop_path=0.1)
    with torch.device("meta"):
        return CAE(Config("cae", CAE.Views(), CAE.Settings(**settings), model=model))


def learning(module, blocks=()) -> int:
    """Trained numbers, less the keys' biases, which hold zeros."""
    held = sum(len(b.attn.qkv.bias) // 3 for b in blocks)
    return sum(p.numel() for p in module.parameters() if p.requires_grad) - held


def test_sizes_of_the_published_models():
    method = published()
    parts = {"encoder": learning(method.encoder, method.encoder.blocks), "regressor": learning(method.regressor),
             "decoder": learning(method.decoder, method.decoder.blocks)}  # fmt: skip
    assert parts == {"encoder": 85_656_576, "regressor": 28_368_384, "decoder": 34_655_744}
    assert sum(parts.values()) + method.mask_token.numel() == 148_681_472
    for width, heads, total in ((768, 12, 366_938_112), (1024, 16, 412_320_768)):
        method = published(name="vit_large", width=width, heads=heads)
        assert learning(method, [*method.encoder.blocks, *method.decoder.blocks]) == total
        assert learning(method.encoder, method.encoder.blocks) == 303_124_480


def test_groups_of_the_optimizer():
    method = make_method()
    decay, rest = (set(map(id, group["params"])) for group in param_groups(method))
    for key, parameter in method.named_parameters():
        if not parameter.requires_grad:
            assert key == "encoder.pos_embed"
            assert id(parameter) not in decay | rest
        else:
            assert (id(parameter) in decay) == (parameter.ndim > 1), key
    assert {id(method.encoder.cls_token), id(method.mask_token)} <= decay


# -- who sees what ---------------------------------------------------------------------------------------------------


def test_the_encoder_sees_visible_patches_and_the_target_masked_ones(codebook):
    method, batch = make_method(codebook), make_batch()
    visible, masked = batch.masks["main"]
    images = batch.views["main"][:, 0].clone().requires_grad_()
    method.encoder.tokens(images, visible).square().sum().backward()
    touched = cut_patches(images.grad, 8).abs().sum(-1)
    assert touched.gather(1, masked).max() == 0
    assert touched.gather(1, visible).min() > 0


def test_a_masked_patch_changes_target_and_labels_only(codebook):
    method, batch = shaken(make_method(codebook)).eval(), make_batch()
    visible, masked = batch.masks["main"]
    seen, other = [], make_batch()
    b, patch = 1, masked[1, 3].item()
    row, column = divmod(patch, 4)
    main, small = other.views["main"], other.views["tokenizer"]
    main[b, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    small[b, 0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = (
        small[b, 0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flip(0) - 1
    )
    for given in (batch, other):
        images = given.views["main"][:, 0]
        z = method.encoder.tokens(images, visible)
        pixels = given.views["tokenizer"][:, 0] * torch.tensor(IMAGENET_STD).view(3, 1, 1)
        codes = method.tokenizer(CPU)(pixels + torch.tensor(IMAGENET_MEAN).view(3, 1, 1), masked)
        seen.append((z, *method.complete(z[:, 1:], visible, masked), method.target(images, masked), codes))
    for a, c in zip(seen[0][:3], seen[1][:3], strict=True):
        assert torch.equal(a, c)
    assert not torch.allclose(seen[0][3], seen[1][3])
    assert (seen[0][4] != seen[1][4]).nonzero().tolist() == [[1, 3]]


def test_the_target_is_the_encoder_itself_without_gradient(codebook):
    method, batch = shaken(make_method(codebook, width=48, model=make_model(drop_path=0.5))).eval(), make_batch()
    optimizer = build_optimizer(method, Optim(lr=1e-2))
    for _ in range(3):
        images, masked = batch.views["main"][:, 0], batch.masks["main"][1]
        target = method.target(images, masked)
        assert torch.equal(target, method.encoder.tokens(images, masked)[:, 1:])
        assert not target.requires_grad
        method(batch, VALUES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("on", [True, False])
def test_stochastic_depth_of_the_target(codebook, on):
    method = shaken(make_method(codebook, width=48, target_drop_path=on, model=make_model(drop_path=0.9)))
    images, masked = make_batch().views["main"][:, 0], make_batch().masks["main"][1]
    targets = [method.target(images, masked) for _ in range(4)]
    assert all(torch.equal(targets[0], other) for other in targets) != on
    assert method.encoder.training
    assert method.encoder.blocks[1].drop_path1.training
    method.eval()
    method.target(images, masked)
    assert not method.encoder.training


def test_the_encoder_learns_through_visible_tokens_alone(codebook):
    """The class token's output has no gradient, its parameter has; the target sends none."""
    method, batch = make_method(codebook), make_batch()
    kept, tokens = {}, method.encoder.tokens

    def watched(images, keep, *how):
        out = tokens(images, keep, *how)
        if out.requires_grad:
            out.retain_grad()
            kept["seen"] = out
        return out

    method.encoder.tokens = watched
    out = method(batch, VALUES)
    (out.loss - out.metrics["loss_codes"]).backward()
    assert kept["seen"].grad[:, 0].abs().max() == 0
    assert kept["seen"].grad[:, 1:].abs().sum(-1).min() > 0
    assert method.encoder.cls_token.grad.abs().max() > 0


def test_order_of_visible_and_of_masked_patches_does_not_matter():
    method = shaken(make_method()).eval()
    batch = make_batch()
    visible, masked = batch.masks["main"]
    seen = method.encoder.tokens(batch.views["main"][:, 0], visible)[:, 1:]
    latent, tokens = method.complete(seen, visible, masked)
    v, m = torch.randperm(8), torch.randperm(8)
    other_latent, other_tokens = method.complete(seen[:, v], visible[:, v], masked[:, m])
    torch.testing.assert_close(other_latent, latent[:, m], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other_tokens, tokens[:, m], rtol=1e-4, atol=1e-5)


def test_labels_are_the_codes_of_the_same_pixels(codebook, monkeypatch):
    method, batch = make_method(codebook), make_batch()
    seen = {}
    original = PatchCodebook.encode

    def watched(self, pixels, cells):
        seen["pixels"] = pixels
        return original(self, pixels, cells)

    monkeypatch.setattr(PatchCodebook, "encode", watched)
    method(batch, VALUES)
    raw = torch.rand(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))[:, 0]
    raw = (raw.repeat_interleave(2, -1).repeat_interleave(2, -2) * 255).round() / 255
    torch.testing.assert_close(seen["pixels"], raw, rtol=0, atol=1e-6)


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 48], ids=["with projection", "without"])
def test_every_trainable_parameter_learns_and_keys_keep_no_bias(codebook, width):
    method = shaken(make_method(codebook, width=width))
    optimizer = build_optimizer(method, Optim(lr=1e-2))
    for _ in range(3):
        method(make_batch(), VALUES).loss.backward()
        method.after_backward(VALUES)
        for key, parameter in method.named_parameters():
            assert (parameter.grad is None) == (key == "encoder.pos_embed"), key
            if parameter.grad is not None:
                assert parameter.grad.abs().sum() > 0, key
        optimizer.step()
        optimizer.zero_grad()
    for part in (*method.encoder.blocks, *method.decoder.blocks):
        q, k, v = part.attn.qkv.bias.chunk(3)
        assert k.abs().max() == 0
        assert q.abs().min() > 0
        assert v.abs().min() > 0


def test_layer_scale_off():
    method = make_method(layer_scale=0.0, model=make_model(layer_scale=0.0))
    assert not any(".ls1." in key for key in method.state_dict())
    gammas = {key: p for key, p in method.named_parameters() if "gamma" in key}
    assert len(gammas) == 4
    assert all(bool((p == 1).all()) and not p.requires_grad for p in gammas.values())


def test_start_values():
    method = make_method(layer_scale=0.2)
    for weight in (method.encoder.patch_embed["proj"].weight, method.encoder.cls_token, method.mask_token):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(0.01079, rel=0.25)
    linears = {name: m for name, m in method.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, layer in linears.items():
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound, name
        assert layer.bias is None or layer.bias.abs().max() == 0
    assert method.encoder.patch_embed["proj"].bias.abs().max() == 0
    first = {part: getattr(method, part).blocks[0] for part in ("encoder", "regressor", "decoder")}
    assert first["encoder"].ls1.gamma.tolist() == pytest.approx([0.1] * 48)
    assert first["regressor"].gamma2.tolist() == pytest.approx([0.2] * 32)
    assert first["decoder"].ls2.gamma.tolist() == pytest.approx([0.2] * 32)


def test_start_values_with_the_authors_flag():
    method = make_method(fix_init=True)
    named = {"encoder": "attn.proj", "regressor": "proj", "decoder": "attn.proj"}
    for part, proj in named.items():
        for number, part_block in enumerate(getattr(method, part).blocks, 1):
            for name in (proj, "mlp.fc2"):
                largest = part_block.get_submodule(name).weight.abs().max().item()
                assert largest == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.02), (part, name)
            assert part_block.mlp.fc1.weight.abs().max().item() == pytest.approx(0.02, rel=0.02)
    assert method.decoder.head.weight.abs().max().item() == pytest.approx(0.02, rel=0.02)


def test_stochastic_depth_grows_in_all_three():
    method = make_method(model=make_model(drop_path=0.2), regressor_depth=3, decoder_depth=3)
    assert [b.drop_path.drop_prob for b in method.regressor.blocks] == pytest.approx([0, 0.1, 0.2])
    for blocks, rates in ((method.encoder.blocks, [0, 0.2]), (method.decoder.blocks, [0, 0.1, 0.2])):
        assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in blocks] == pytest.approx(rates)
    method = shaken(make_method(model=make_model(drop_path=0.9)))
    u, drop = torch.randn(64, 2, 32), Drop(torch.arange(64), 0, 0, "test")
    for part, given in ((method.regressor, (u, u, u, u)), (method.decoder, (u,))):
        with_drops, without = part(*given, drop), part.eval()(*given, drop)
        assert 0.7 < ((with_drops - without).abs().amax((1, 2)) > 1e-6).float().mean() <= 1
        assert torch.equal(part.train()(*given, drop), with_drops)
        assert not torch.equal(part(*given), with_drops)


def test_stochastic_depth_is_a_function_of_step_and_sample(codebook, monkeypatch):
    """Encoder, target, regressor and decoder each draw for themselves, the same for a sample in any batch."""
    method = shaken(make_method(codebook, model=make_model(drop_path=0.5)))
    seen, table = [], Drop.table

    def watched(self, *how):
        seen.append((self.purpose, table(self, *how)))
        return seen[-1][1]

    monkeypatch.setattr(Drop, "table", watched)
    batch = make_batch()
    loss = method(batch, VALUES).loss
    assert [purpose for purpose, _ in seen] == ["encoder", "regressor", "decoder", "target"]
    assert [table.shape for _, table in seen] == [(4, 3)] * 4
    assert torch.equal(method(batch, VALUES).loss, loss)
    assert not torch.equal(method(batch, Values(1, 10, 2, seed=5)).loss, loss)
    assert not torch.equal(method(batch, Values(0, 10, 2, seed=6)).loss, loss)
    del seen[:]
    method(batch.map(lambda x: x[1:]), VALUES)
    parts = list(seen)
    method(batch, VALUES)
    for (_, part), (_, whole) in zip(parts, seen[4:], strict=True):
        assert torch.equal(part, whole[:, 1:])


def test_loss_falls_on_one_batch(codebook):
    method, batch = make_method(codebook), make_batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    first = method(batch, VALUES)
    for _ in range(60):
        out = method(batch, VALUES)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.metrics["loss_codes"] < 0.5 * first.metrics["loss_codes"]
    assert out.metrics["code_accuracy"] > 0.5 > first.metrics["code_accuracy"]
    assert 0 < out.metrics["feature_std"] < 1.5
    assert not any(value.requires_grad for value in out.metrics.values())


def test_bfloat16_is_close(codebook):
    method, batch = shaken(make_method(codebook)), make_batch()
    exact = method(batch, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch, VALUES)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    learning = {key: p for key, p in method.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(exact.loss, list(learning.values()))
    out.loss.backward()
    for (key, parameter), grad in zip(learning.items(), expected, strict=True):
        assert parameter.grad is not None, key
        if not key.endswith(("qkv.bias", "norm_k.bias")):  # softmax does not feel the keys' part: rounding alone
            assert (parameter.grad - grad).norm() < 0.15 * grad.norm(), key


def on_half(rank, codebook):
    """One process's half of a batch of four: loss and gradients that DDP averages."""
    method, batch = shaken(make_method(codebook)), make_batch(4)
    parallel = DistributedDataParallel(method, broadcast_buffers=False)
    loss = parallel(batch.map(lambda x: x[2 * rank : 2 * rank + 2]), VALUES).loss
    loss.backward()
    return loss.item(), {key: p.grad for key, p in method.named_parameters() if p.grad is not None}


def test_two_processes_equal_one(codebook, on_processes):
    method = shaken(make_method(codebook))
    loss = method(make_batch(4), VALUES).loss
    loss.backward()
    halves = on_processes(2, on_half, codebook)
    assert sum(value for value, _ in halves) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for key, parameter in method.named_parameters():
        if parameter.grad is not None:
            for _, grads in halves:
                torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-4, atol=1e-6, msg=key)


# -- the tokenizer's place -------------------------------------------------------------------------------------------


def test_the_tokenizer_is_opened_late_and_is_no_part_of_the_state(codebook):
    method = make_method("nowhere.pt")  # importing and evaluating need no tokenizer
    keys, count = set(method.state_dict()), len(list(method.modules()))
    with pytest.raises(ConfigError, match=r"nowhere\.pt: no such file"):
        method(make_batch(), VALUES)
    method = make_method(codebook)
    method(make_batch(), VALUES)
    assert set(method.state_dict()) == keys
    assert len(list(method.modules())) == count
    assert method.tokenizer(CPU) is method.tokenizer(CPU)


def test_pictures(codebook):
    method, batch = make_method(codebook).eval(), make_batch()
    with torch.no_grad():
        made = method.pictures(batch, VALUES)["codes"]
    sheet = made.pictures
    assert len(made.titles) == 6
    assert sheet.shape == (3, 6, 3, 32, 32)
    assert 0 <= sheet.min() <= sheet.max() <= 1
    _, masked = batch.masks["main"]
    hidden = torch.zeros(3, 16, dtype=torch.bool).scatter(1, masked, True)
    same = (cut_patches(sheet[:, 2], 8) == cut_patches(sheet[:, 3], 8)).all(-1)
    assert same[~hidden].all()  # visible cells keep their codes
    gray = (cut_patches(sheet[:, 1], 8) == 0.5).all(-1)
    assert torch.equal(gray, hidden)
    visible = cut_patches(sheet[:, 4], 8)[~hidden]
    torch.testing.assert_close(visible, cut_patches(sheet[:, 5], 8)[~hidden])
    with torch.no_grad():
        images = batch.views["main"][:, 0]
        seen, _ = batch.masks["main"]
        _, tokens = method.complete(method.encoder.tokens(images, seen)[:, 1:], seen, masked)
        predicted = method.decoder.head(tokens).argmax(-1)
    painted = cut_patches(sheet[:, 5], 8).gather(1, masked[..., None].expand(-1, -1, 192))
    mean = checkpoint.read(codebook).network["patches"].mean((1, 2, 3))[predicted]
    torch.testing.assert_close(painted.mean(-1), mean, rtol=1e-4, atol=1e-4)


# -- the authors' files ----------------------------------------------------------------------------------------------

BLOCK = ("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias",
         "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
         "mlp.fc2.bias")  # fmt: skip
CROSS = (
    *("gamma_1_cross", "gamma_2_cross", "cross_attn.q_bias", "cross_attn.v_bias", "cross_attn.q.weight"),
    *("cross_attn.k.weight", "cross_attn.v.weight", "cross_attn.proj.weight", "cross_attn.proj.bias"),
    *(f"{norm}.{kind}" for norm in ("norm1_q", "norm1_k", "norm1_v", "norm2_cross") for kind in ("weight", "bias")),
    *(f"mlp_cross.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")),
)


def official_state(width: int = 32, old: bool = False, c: int = 48) -> dict[str, torch.Tensor]:
    """A training file's tensors with the authors' key list and shapes: two blocks of each kind, random values."""
    torch.manual_seed(3)

    def shape(key: str, d: int) -> tuple[int, ...]:
        if "fc1" in key:
            return (4 * d, d) if "weight" in key else (4 * d,)
        if "fc2" in key:
            return (d, 4 * d) if "weight" in key else (d,)
        if "qkv" in key:
            return (3 * d, d)
        return (d, d) if "weight" in key and "norm" not in key else (d,)

    def net(prefix: str) -> dict[str, tuple[int, ...]]:
        keys = {"cls_token": (1, 1, c), "pos_embed": (1, 17, c), "patch_embed.proj.weight": (c, 3, 8, 8),
                "patch_embed.proj.bias": (c,), "norm.weight": (c,), "norm.bias": (c,)}  # fmt: skip
        keys |= {f"blocks.{i}.{key}": shape(key, c) for i in (0, 1) for key in BLOCK}
        return {f"{prefix}.{key}": value for key, value in keys.items()}

    blocks, decoder_blocks = "regresser.regressor_blocks", "decoder.decoder_blocks"
    norms = {"regresser.norm": width, "decoder.norm": width}
    head, project = "decoder.head", "encoder_to_regresser"
    if old:
        blocks, decoder_blocks, head = (
            "pretext_neck.regressor_blocks",
            "pretext_neck.decoder_blocks",
            "pretext_neck.head",
        )
        norms, project = {"pretext_neck.norm": width, "pretext_neck.norm2": width}, "encoder_to_decoder"
    shapes = {"mask_token": (1, 1, width), **net("encoder")}
    if not old:
        shapes |= {"rd_pos_embed": (1, 17, width), **net("alignment_encoder")}
    if width != c:
        shapes |= {f"{project}.weight": (width, c), f"{project}.bias": (width,)}
        norms[f"{project}_norm"] = width
    shapes |= {f"{blocks}.{i}.{key}": shape(key, width) for i in (0, 1) for key in CROSS}
    shapes |= {f"{decoder_blocks}.{i}.{key}": shape(key, width) for i in (0, 1) for key in BLOCK}
    shapes |= {f"{name}.{kind}": (d,) for name, d in norms.items() for kind in ("weight", "bias")}
    shapes |= {f"{head}.weight": (CODES, width), f"{head}.bias": (CODES,)}
    state = {key: torch.randn(size) / 4 for key, size in shapes.items()}
    return state | {f"alignment_{k}": v for k, v in state.items() if k.startswith("encoder.") and not old}


@pytest.mark.parametrize("width", [32, 48], ids=["with projection", "without"])
def test_current_files_go_both_ways(width):
    state = official_state(width)
    method = make_method(width=width)
    ours = CAE.official({"model": state, "epoch": 299})
    method.load_state_dict(ours)  # strict: no missing and no unexpected key
    back = CAE.to_official(method.state_dict())["model"]
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    prefixed = CAE.official({f"module.{key}": value for key, value in state.items()})
    assert prefixed.keys() == ours.keys()


@pytest.mark.parametrize("width", [32, 48], ids=["with projection", "without"])
def test_files_of_the_older_code(width):
    state = official_state(width, old=True)
    method = make_method(width=width)
    table = method.pos_embed.clone()
    method.load_state_dict(CAE.official(state))
    assert torch.equal(method.pos_embed, table)
    names = {"pretext_neck.norm.weight": "regresser.norm.weight", "pretext_neck.norm2.bias": "decoder.norm.bias",
             "pretext_neck.head.weight": "decoder.head.weight", "mask_token": "mask_token",
             "pretext_neck.regressor_blocks.1.norm2_cross.weight": "regresser.regressor_blocks.1.norm2_cross.weight",
             "pretext_neck.decoder_blocks.0.mlp.fc2.weight": "decoder.decoder_blocks.0.mlp.fc2.weight"}  # fmt: skip
    current = CAE.to_official(method.state_dict())["model"]
    for old, new in names.items():
        assert torch.equal(current[new], state[old]), old


def test_a_loaded_file_computes_what_the_authors_layout_says():
    state = official_state()
    method, batch = make_method(), make_batch()
    method.load_state_dict(CAE.official(state))
    visible, masked = batch.masks["main"]
    images = batch.views["main"][:, 0]
    labels = torch.zeros_like(masked)
    exact = {key: value.double() for key, value in state.items()}
    _, _, expected = slow_step(exact, images.double(), labels, visible, masked)
    latent, _ = method.complete(method.encoder.tokens(images, visible)[:, 1:], visible, masked)
    torch.testing.assert_close(latent.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_bare_encoder_and_unknown_keys():
    state = {key.removeprefix("encoder."): v for key, v in official_state().items() if key.startswith("encoder.")}
    ours = CAE.official(state)
    method = make_method()
    method.backbone.load_state_dict({key.removeprefix("encoder."): value for key, value in ours.items()})
    assert all(key.startswith(CAE.backbone_prefix) for key in ours)
    odd = CAE.official({**official_state(), "encoder.rel_pos_bias": torch.ones(1), "teacher.x": torch.ones(1)})
    assert set(odd) - set(method.state_dict()) == {"encoder.rel_pos_bias"}
    narrow = official_state()
    narrow["decoder.decoder_blocks.0.attn.qkv.weight"] = torch.zeros(90, 32)
    with pytest.raises(ConfigError, match="an attention narrower than its tokens is not supported"):
        CAE.official(narrow)


def test_backbone_stands_under_its_prefix():
    method = make_method()
    ours = {key for key in method.state_dict() if key.startswith(method.backbone_prefix)}
    assert ours == {method.backbone_prefix + key for key in method.backbone.state_dict()}
    assert method.chance_loss is None


# -- settings --------------------------------------------------------------------------------------------------------


def test_views_are_one_crop_at_two_sizes():
    main, tokens = view_list(METHODS["cae"].Views())
    assert (main.name, main.size, main.scale, main.interpolation, main.flip) == (
        "main",
        224,
        (0.08, 1.0),
        "bicubic",
        0.5,
    )
    assert (tokens.name, tokens.size, tokens.interpolation, tokens.same_crop_as) == (
        "tokenizer",
        112,
        "lanczos",
        "main",
    )
    for view in (main, tokens):
        assert view.jitter_p == view.gray == view.blur == view.solarize == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": {"main.size": 36}}, "views.main.size is 36; it must be a multiple of model.patch_size, 8"),
        ({"views": {"main.count": 2}}, "views.main.count is 2; it must be 1 with method cae"),
        ({"views": {"tokenizer.count": 2}}, "views.tokenizer.count is 2; it must be 1 with method cae"),
        ({"views": {"tokenizer.same_crop_as": None}}, "views.tokenizer.same_crop_as is None; it must be 'main'"),
        ({"model": Model("resnet18")}, "model.name is 'resnet18'; method cae needs a ViT"),
        ({"num_masked": 16}, "cae.num_masked is 16; it must be below the image's 16 patches"),
        ({"num_masked": 0}, "cae.num_masked is 0; it must be 1 or more"),
        ({"max_block": 1}, "cae.max_block is 1; it must be 0 .* at least cae.min_block, 2"),
        ({"heads": 3}, "cae.width is 32; it must be a multiple of cae.heads, 3"),
        ({"width": 34}, "cae.width is 34; it must be a multiple of 4"),
        ({"layer_scale": -1.0}, r"cae.layer_scale is -1.0; it must be 0 or more"),
        ({"align_weight": -1.0}, r"cae.align_weight is -1.0"),
    ],
    ids=str,
)
def test_messages(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook": ""}, r"cae.tokenizer is empty; .*encoder.pkl"),
        ({"codes": 25}, "cae.codes is 25; it must be 24, as"),
        ({"views": {"tokenizer.size": 32}}, "views.tokenizer.size is 32; it must be 16: 4 patches .* times 4 pixels"),
        ({"tokenizer_sha256": "12"}, "its SHA-256 is .*, not 12"),
    ],
    ids=str,
)
def test_messages_of_a_tokenizer_that_does_not_fit(codebook, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_method(**{"codebook": codebook, **arguments}).tokenizer(CPU)


def test_the_alignment_weight_counts(codebook):
    batch = make_batch()
    one, two = (make_method(codebook, align_weight=weight)(batch, VALUES) for weight in (0.5, 2.0))
    assert two.metrics["loss_alignment"].item() == pytest.approx(4 * one.metrics["loss_alignment"].item(), rel=1e-5)
    torch.testing.assert_close(one.loss, one.metrics["loss_codes"] + one.metrics["loss_alignment"])
