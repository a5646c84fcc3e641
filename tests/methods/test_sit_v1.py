"""The first SiT: a step against its plain loops, rotation, damage, the three losses, the authors' files."""

from __future__ import annotations

import copy
import math
import zlib

import pytest
import torch
import torch.nn.functional as F

from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model
from fastssl.kernels._philox import philox
from fastssl.kernels.corrupt import FirstBlocks, corrupt, draw_first
from fastssl.kernels.corrupt.reference import CANDIDATES, alien_source
from fastssl.methods import METHODS, view_list
from fastssl.methods.sit_v1 import SiTv1, damage, rotate, weighted_sum
from fastssl.models import build_backbone
from fastssl.step import Values
from fastssl.training import distributed
from fastssl.training.optim import param_groups

B, S = 16, 32
VALUES = Values(3, 10, 2, seed=5)
DOUBLE = torch.float64
WHERE = {"seed": 5, "epoch": 2}


def make_config(model: Model | None = None, size: int = S, **settings) -> Config:
    views = SiTv1.Views()
    views.view1.size = views.view2.size = size
    model = model or Model("vit_tiny", 32, 8, 24, 2, 2)
    return Config("sit_v1", views, SiTv1.Settings(**{"out_dim": 12, **settings}), model=model)


def make_batch(count: int = B, size: int = S, dtype=torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = {
        name: torch.randn(count, 1, 3, size, size, generator=generator, dtype=dtype) for name in ("view1", "view2")
    }
    return Batch(torch.arange(count) * 7 + 3, torch.full((count,), -1), epoch=2, views=views)


def make_method(config: Config | None = None) -> SiTv1:
    torch.manual_seed(0)
    method = SiTv1(config or make_config())
    for parameter in method.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return method


def part_of(batch: Batch, rows: slice) -> Batch:
    return batch.map(lambda value: value[rows])


def words(sample, purpose, block=0, view=1):
    key = (5, zlib.crc32(f"sit/{purpose}".encode()))
    return [int(w) for w in philox((torch.as_tensor([int(sample)]), 2, view, block), key)]


def damage_second(images: torch.Tensor, ids: torch.Tensor, group: int = 8, clean: bool = True):
    """Damaged views and mask of images that are both views, and are not turned: of the second views."""
    drawn = draw_first(ids, views=2, side=images.shape[-1], share=0.3, group=group, **WHERE)
    return (half.chunk(2)[1] for half in damage(torch.cat([images, images]), drawn, clean, ids=ids, **WHERE))


# -- the whole step, from the paper's words ----------------------------------------------------------------------------


def naive_block(sample, purpose, block, view, limit, side):
    """Top, left uniform in {0, .., side - least - 1}, height, width in {least, .., limit - 1}, cut at the border."""
    least = round(side * 11 / 224)
    top, left, height, width = words(sample, purpose, block, view)
    top, left = (w * (side - least) // 2**32 for w in (top, left))
    height, width = (least + w * (limit - least) // 2**32 for w in (height, width))
    return top, left, min(height, side - top), min(width, side - left)


def naive_blur(crop, half, sigma):
    """Row by row, then column by column; beyond the border lies the mirror image without the border itself."""

    def mirrored(k, n):
        while n > 1 and not 0 <= k < n:
            k = -k if k < 0 else 2 * (n - 1) - k
        return k if n > 1 else 0

    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-half, half + 1)]
    for dim in (1, 2):
        n, out = crop.shape[dim], torch.zeros_like(crop)
        for k in range(n):
            for d, weight in zip(range(-half, half + 1), weights, strict=True):
                out.select(dim, k).add_(crop.select(dim, mirrored(k + d, n)), alpha=weight / sum(weights))
        crop = out
    return crop


def naive_damage(images, ids, view, group=8, clean=True, share=0.3):
    """Image after image, step after step, as the authors' loop has it."""
    side, count = images.shape[-1], len(images)
    out, mask = images.clone(), torch.zeros(count, side, side, dtype=torch.bool)
    pick = torch.tensor([words(i, "damage", 0, view)[0] for i in ids])
    source = alien_source(pick, group)
    whole = torch.tensor([[[0, 0, side, side]]], dtype=torch.int32)
    for b, sample in enumerate(ids):

        def block(purpose, number=0, limit=side, b=b, sample=sample):
            top, left, height, width = naive_block(sample, purpose, number, view, limit, side)
            mask[b, top : top + height, left : left + width] = True
            return (slice(None), slice(top, top + height), slice(left, left + width)), height * width

        place, _ = block("gray")
        out[b][place] = out[b][place].mean(0, keepdim=True)
        place, _ = block("blur")
        kernel, spread, *_ = words(sample, "blur/kernel", 0, view)
        half = (3 + kernel * 13 // 2**32) // 2
        out[b][place] = naive_blur(out[b][place], half, 0.1 + 5 * spread / 2**32)
        _, noise_budget, alien_budget, _ = words(sample, "damage", 0, view)
        noise = corrupt(  # the numbers themselves: a block over all pixels
            images[b : b + 1], whole, torch.ones(1, 1, dtype=torch.int32), torch.tensor([0]),
            ids=ids[b : b + 1], seed=5, epoch=2, view=view,
        ).views[0]  # fmt: skip
        for purpose, budget in (("noise", noise_budget), ("alien", alien_budget)):
            j = int(source[b])
            if purpose == "alien" and j == b:
                continue
            area, number = 0, 0
            while area < budget / 2**32 * share * side * side:
                place, size = block(purpose, number, side // 4)
                out[b][place] = (noise if purpose == "noise" else images[j] if clean else out[j])[place]
                area, number = area + size, number + 1
    return out, mask


@pytest.mark.parametrize("size", [32, 48])
def test_damage_against_plain_loops(size):
    batch = make_batch(10, size, DOUBLE)
    images = batch.views["view2"][:, 0]
    damaged, where = damage_second(images, batch.id)
    expected, mask = naive_damage(images, batch.id, 1)
    assert torch.equal(where, mask)
    torch.testing.assert_close(damaged, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(damaged.movedim(1, -1)[~mask], images.movedim(1, -1)[~mask])


def test_the_authors_alien_blocks_show_what_is_damaged_by_then():
    batch = make_batch(12, dtype=DOUBLE)
    images = batch.views["view2"][:, 0]
    damaged, where = damage_second(images, batch.id, 0, False)
    expected, mask = naive_damage(images, batch.id, 1, group=0, clean=False)
    torch.testing.assert_close(damaged, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(where, mask)
    other, where = damage_second(images, batch.id, 0)
    assert not torch.allclose(other, expected)
    assert torch.equal(where, mask)


def naive_step(method, batch, values):
    """One image and one view at a time; plain formulas for heads and losses."""
    s = method.settings
    clean, damaged, masks, turns = [], [], [], []
    for view in (0, 1):
        images = batch.views[f"view{view + 1}"][:, 0]
        k = [words(i, "rotation", 0, view)[0] >> 30 for i in batch.id]
        turned = torch.stack([torch.rot90(x, -n, (1, 2)) for x, n in zip(images, k, strict=True)])
        out, mask = naive_damage(turned, batch.id, view, s.alien_group)
        clean, damaged, masks, turns = [*clean, *turned], [*damaged, *out], [*masks, *mask], [*turns, *k]
    encoder, named, codes, errors, pixels = method.encoder, [], [], 0.0, 0
    for x, target, mask in zip(damaged, clean, masks, strict=True):
        table = torch.cat([method.rotation_position, encoder.pos_embed], 1)
        projection = encoder.patch_embed["proj"]
        patches = F.conv2d(x[None], projection.weight, projection.bias, stride=8).flatten(2).transpose(1, 2)
        tokens = torch.cat([method.rotation_token, encoder.cls_token, patches], 1) + table
        for block in encoder.blocks:
            tokens = block(tokens)
        tokens = encoder.norm(tokens)
        named.append(method.rotation_head(tokens[0, 0]))
        codes.append(method.contrastive_head(tokens[0, 1]))
        maps = tokens[:, 2:].transpose(1, 2).unflatten(2, (4, 4))
        convolution = method.decoder.convTrans
        painted = F.conv_transpose2d(maps, convolution.weight, convolution.bias, stride=8)[0]
        region = mask if s.rec_region == "damaged" else torch.ones_like(mask)
        errors, pixels = errors + (painted - target)[:, region].abs().sum(), pixels + 3 * int(region.sum())
    count = len(codes)
    rotation = sum(x.logsumexp(0) - x[k] for x, k in zip(named, turns, strict=True)) / count
    contrastive = 0.0
    for a in range(count):
        similar = [codes[a] @ codes[b] / codes[a].norm() / codes[b].norm() / s.temperature for b in range(count)]
        partner = (a + count // 2) % count
        others = torch.stack([similar[b] for b in range(count) if b != a])
        contrastive = contrastive + (others.logsumexp(0) - similar[partner]) / count
    return {"rotation": rotation, "contrastive": contrastive, "reconstruction": errors / pixels}


@pytest.mark.parametrize("region", ["all", "damaged"])
def test_a_step_against_plain_loops_in_loss_and_all_gradients(region):
    method = make_method(make_config(rec_region=region)).to(DOUBLE)
    twin, batch = copy.deepcopy(method), make_batch(dtype=DOUBLE)
    out = method(batch, VALUES)
    losses, s = naive_step(twin, batch, VALUES), twin.uncertainty
    loss = sum(
        (-kappa * s[task]).exp() * losses[task] + s[task] / 2
        for task, kappa in (("rotation", 1), ("contrastive", 1), ("reconstruction", 0.5))
    ).squeeze()
    for task, value in losses.items():
        torch.testing.assert_close(out.metrics[task], value.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-10)
    out.loss.backward()
    loss.backward()
    for (key, mine), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-10, msg=lambda m, key=key: f"{key} {m}")


# -- rotation and damage -----------------------------------------------------------------------------------------------


def test_rotation_of_a_square():
    images = torch.tensor([[1.0, 2], [3, 4]]).expand(4, 3, 2, 2)
    out = rotate(images, torch.arange(4))[:, 0].tolist()
    assert out == [[[1, 2], [3, 4]], [[3, 1], [4, 2]], [[4, 3], [2, 1]], [[2, 4], [1, 3]]]


def test_rotations_are_uniform_and_depend_on_seed_epoch_id_and_view_alone():
    method, batch = make_method(), make_batch(4000, 4)
    turns = method.damage(batch, 5)[3]
    assert torch.bincount(turns, minlength=4).min() > 1850  # of 2000
    assert 900 < (turns[:4000] == turns[4000:]).sum() < 1100
    half = method.damage(part_of(batch, slice(100, 300)), 5)[3]
    assert torch.equal(half, torch.cat([turns[100:300], turns[4100:4300]]))
    assert not torch.equal(method.damage(batch, 6)[3], turns)
    batch.epoch = 3
    assert not torch.equal(method.damage(batch, 5)[3], turns)


def test_how_much_is_damaged():
    """Noise or alien blocks alone cover 14.9 % on average (at most 30.4 %), gray and blur blocks 13.5 % each."""
    drawn, cover = draw_first(torch.arange(1500), views=1, side=224, share=0.3, **WHERE), {}
    for name, boxes in zip(("noise", "alien"), drawn.boxes.chunk(2, dim=1), strict=True):
        used = boxes[..., 2] > 0
        assert used.sum(1).max() < CANDIDATES
        assert used.double().sum(1).mean() == pytest.approx(8.3, abs=0.5)
        area = (boxes[..., 2] * boxes[..., 3]).sum(1) / 224**2
        cover[name] = area.mean()
        assert area.max() < 0.3 + 55**2 / 224**2
    assert cover["noise"] == pytest.approx(0.159, abs=0.01)  # overlaps counted: 14.9 % of the pixels
    for box in drawn.soft.unbind(1):
        assert box[:, 2:].min() >= 11
        assert (box[:, :2] + box[:, 2:]).max() <= 224
        assert (box[:, 2] * box[:, 3]).double().mean() / 224**2 == pytest.approx(0.135, abs=0.01)
    few = FirstBlocks(*(values[:40] for values in drawn))._replace(source=torch.arange(40).roll(1))
    _, mask = damage(torch.randn(40, 3, 224, 224), few, True, ids=torch.arange(40), **WHERE)
    assert mask.double().mean() == pytest.approx(1 - (1 - 0.27) * (1 - 0.135) ** 2, abs=0.05)


def test_damage_does_not_depend_on_the_rest_of_the_batch():
    method, batch = make_method(), make_batch()
    whole, half = method.damage(batch, 5), method.damage(part_of(batch, slice(8, 16)), 5)
    for values, some in zip(whole, half, strict=True):
        assert torch.equal(some, torch.cat([values[8:16], values[24:32]]))
    assert not torch.equal(whole[2][:16], whole[2][16:])


# -- losses ------------------------------------------------------------------------------------------------------------


def test_weights_at_the_start_and_where_they_settle():
    losses = {"rotation": torch.tensor(1.3), "contrastive": torch.tensor(3.1), "reconstruction": torch.tensor(0.8)}
    scalars = {task: torch.ones(1, requires_grad=True) for task in losses}
    total = weighted_sum(losses, scalars)
    assert total.item() == pytest.approx(0.36788 * 1.3 + 0.36788 * 3.1 + 0.60653 * 0.8 + 1.5, abs=1e-4)
    total.backward()
    for task, kappa in (("rotation", 1.0), ("contrastive", 1.0), ("reconstruction", 0.5)):
        expected = 0.5 - kappa * math.exp(-kappa) * losses[task].item()
        assert scalars[task].grad.item() == pytest.approx(expected, abs=1e-5)
    held = {task: torch.tensor(0.7) for task in losses}
    optimizer = torch.optim.SGD(scalars.values(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weighted_sum(held, scalars).backward()
        optimizer.step()
    assert [scalars[task].item() for task in held] == pytest.approx([0.3365, 0.3365, -0.7133], abs=1e-3)
    assert math.exp(-scalars["rotation"].item()) * 0.7 == pytest.approx(0.5, abs=1e-3)
    assert math.exp(-0.5 * scalars["reconstruction"].item()) * 0.7 == pytest.approx(1.0, abs=1e-3)


# -- several processes -------------------------------------------------------------------------------------------------


def half_step(rank: int, gather: bool):
    method = make_method(make_config(rec_region="damaged", gather_negatives=gather)).to(DOUBLE)
    world = distributed.world()
    rows = slice(rank * B // world, (rank + 1) * B // world)
    out = method(part_of(make_batch(dtype=DOUBLE), rows), VALUES)
    out.loss.backward()
    return out.loss.detach(), out.metrics, {key: p.grad for key, p in method.named_parameters()}


def both_half_steps(rank: int):
    return [half_step(rank, gather) for gather in (True, False)]


def test_two_processes_equal_one_with_gathered_negatives_which_are_local_by_default(on_processes):
    loss, metrics, gradients = half_step(0, True)
    halves, local = zip(*on_processes(2, both_half_steps), strict=True)
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
    for key in ("contrastive", "rotation", "reconstruction", "rotation_top1"):
        torch.testing.assert_close((halves[0][1][key] + halves[1][1][key]) / 2, metrics[key])
    for key, gradient in gradients.items():
        torch.testing.assert_close((halves[0][2][key] + halves[1][2][key]) / 2, gradient, rtol=1e-6, atol=1e-10)

    method = make_method(make_config(rec_region="damaged")).to(DOUBLE)
    for rank, half in enumerate(local):
        out = method(part_of(make_batch(dtype=DOUBLE), slice(8 * rank, 8 * rank + 8)), VALUES)
        torch.testing.assert_close(half[1]["contrastive"], out.metrics["contrastive"])
        torch.testing.assert_close(half[1]["rotation"], out.metrics["rotation"])


# -- training ----------------------------------------------------------------------------------------------------------


def test_every_parameter_learns():
    method = make_method()
    method(make_batch(), VALUES).loss.backward()
    for key, parameter in method.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


def test_loss_falls_on_one_batch():
    method, batch = make_method(), make_batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        out = method(batch, VALUES)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert out.metrics["rotation_top1"] > 0.8


def test_bfloat16_is_close():
    method, batch = make_method(), make_batch()
    exact = method(batch, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch, VALUES)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("size", [32, 48])
def test_image_size_may_differ_from_the_models(size):
    method = make_method(make_config(size=size))
    assert method(make_batch(4, size), VALUES).loss.isfinite()


def test_evaluation_mode_tells_the_values_by_chance():
    method = make_method().eval()
    metrics = method(make_batch(), VALUES).metrics
    assert metrics["contrastive_chance"].item() == pytest.approx(math.log(2 * B - 1))
    assert metrics["rotation_chance"].item() == pytest.approx(math.log(4))
    assert "contrastive_chance" not in method.train()(make_batch(), VALUES).metrics


def test_pictures():
    method, batch = make_method().eval(), part_of(make_batch(), slice(0, 5))
    with torch.no_grad():
        rows = method.pictures(batch, VALUES)["reconstruction"].pictures
    assert rows.shape == (5, 8, 3, S, S)
    assert rows.min() >= 0
    assert rows.max() <= 1
    _, _, mask, _ = method.damage(batch, VALUES.seed)
    for view in (0, 1):
        hidden = mask[5 * view : 5 * view + 5]
        clean, damaged, painted, restored = rows[:, 4 * view : 4 * view + 4].movedim(2, -1).unbind(1)
        assert torch.equal(clean[~hidden], damaged[~hidden])
        assert not torch.equal(clean[hidden], damaged[hidden])
        assert torch.equal(restored, torch.where(hidden[..., None], painted, clean))


def test_backbone_is_a_plain_vit_under_its_prefix():
    method = make_method()
    ours = {key for key in method.state_dict() if key.startswith(method.backbone_prefix)}
    assert ours == {method.backbone_prefix + key for key in method.backbone.state_dict()}
    plain = build_backbone(make_config().model)
    plain.load_state_dict(method.backbone.state_dict())
    images = torch.randn(2, 3, S, S)
    torch.testing.assert_close(plain(images), method.encoder(images))


# -- the authors' recipe and files -------------------------------------------------------------------------------------


def test_official_checkpoint_round_trip():
    d, generator = 24, torch.Generator().manual_seed(1)
    shapes = {"rot_token": (1, 1, d), "contrastive_token": (1, 1, d), "pos_embed": (1, 18, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 8, 8), "patch_embed.proj.bias": (d,)}
    for i in range(2):
        block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for key, shape in {**block, "norm1": (d,), "norm2": (d,)}.items():
            shapes |= {f"blocks.{i}.{key}.weight": shape, f"blocks.{i}.{key}.bias": shape[:1]}
    for key, shape in (("norm", (d,)), ("rot_head", (4, d)), ("contrastive_head", (12, d))):
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    shapes |= {"convTrans.weight": (d, 3, 8, 8), "convTrans.bias": (3,)}
    shapes |= {"rot_w": (1,), "contrastive_w": (1,), "recons_w": (1,)}
    weights = {key: torch.rand(shape, generator=generator) * 0.2 for key, shape in shapes.items()}
    for given in ({"model": weights, "epoch": 3}, weights):
        method = make_method()
        method.load_state_dict(SiTv1.official(given))
        back = SiTv1.to_official(method.state_dict())["model"]
        assert back.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(back[key], value), key
    images = torch.randn(2, 3, S, S)
    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8)
    first = [weights[key].expand(2, -1, -1) for key in ("rot_token", "contrastive_token")]
    x = torch.cat([*first, x.flatten(2).transpose(1, 2)], dim=1) + weights["pos_embed"]
    for block in method.encoder.blocks:
        x = block(x)
    x = F.layer_norm(x, (d,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    torch.testing.assert_close(method.tokens(images), x)
    assert method.uncertainty["reconstruction"].item() == weights["recons_w"].item()


def test_size_of_the_published_model():
    with torch.device("meta"):
        method = SiTv1(Config("sit_v1", SiTv1.Views(), SiTv1.Settings(), model=Model("vit_base")))
    assert sum(p.numel() for p in method.parameters()) == 86_786_826


def test_recipe_is_the_authors():
    for view in view_list(METHODS["sit_v1"].Views()):
        assert (view.size, view.scale, view.ratio, view.flip) == (224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
        assert (view.jitter, view.jitter_p) == ((0.4, 0.4, 0.4, 0.0), 1.0)
        assert view.gray == view.blur == view.solarize == 0
    d = SiTv1.defaults
    assert d["optim.lr"] * 288 / d["optim.lr_batch"] == pytest.approx(5.625e-4)
    settings = SiTv1.Settings()
    assert (settings.out_dim, settings.temperature, settings.rec_region) == (512, 0.5, "all")


def test_tokens_and_position_tables_do_not_decay():
    method = make_method()
    names = {id(p): name for name, p in method.named_parameters()}
    decays = {names[id(p)] for group in param_groups(method) if group["decay"] for p in group["params"]}
    matrices = {name for name, p in method.named_parameters() if p.ndim > 1 and not name.endswith(".bias")}
    tables = {"rotation_token", "encoder.cls_token", "rotation_position", "encoder.pos_embed"}
    assert decays == matrices - tables
    assert tables < matrices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_dim": 0}, "sit_v1.out_dim is 0; it must be 1 or more"),
        ({"temperature": 0.0}, "sit_v1.temperature is 0.0; it must be positive"),
        ({"share": 1.0}, "sit_v1.share is 1.0; it must be at least 0 and below 1"),
        ({"alien_group": 1}, "sit_v1.alien_group is 1"),
        ({"size": 36}, "views.view1.size is 36; it must be a multiple of model.patch_size, 8"),
        ({"model": Model("resnet18")}, "model.name is 'resnet18'; method sit_v1 needs a ViT"),
    ],
    ids=str,
)
def test_messages(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(make_config(**settings))
