"""SiT: a step against its plain loops, the damage, the two losses, the teacher, the authors' files."""

from __future__ import annotations

import copy
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from tiny import finish_step

from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model, Optim
from fastssl.kernels._philox import philox
from fastssl.kernels.corrupt import draw_blocks
from fastssl.methods import METHODS, view_list
from fastssl.methods.damage import both_views
from fastssl.methods.sit import SiT
from fastssl.step import Values
from fastssl.training import distributed
from fastssl.training.batch_norm import synchronise_batch_norm
from fastssl.training.optim import build_optimizer, clip_gradients
from fastssl.training.schedule import cosine, warmup_cosine

B, S = 16, 32
VALUES = Values(3, 10, 2, seed=5)
DOUBLE = torch.float64


def make_config(model: Model | None = None, sizes: tuple[int, int] = (S, S), count: int = 1, **settings) -> Config:
    views = SiT.Views()
    views.view1.size, views.view2.size = sizes
    views.view1.count = count
    numbers = {"out_dim": 12, "head_hidden": 20, **settings}
    return Config("sit", views, SiT.Settings(**numbers), model=model or Model("vit_tiny", 32, 8, 24, 2, 2))


def make_batch(count: int = B, size: int = S, seed: int = 0, dtype=torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {
        name: torch.randn(count, 1, 3, size, size, generator=generator, dtype=dtype) for name in ("view1", "view2")
    }
    return Batch(torch.arange(count) * 7 + 3, torch.full((count,), -1), epoch=2, views=views)


def make_method(config: Config | None = None) -> SiT:
    """A method whose student has moved away from the teacher."""
    torch.manual_seed(0)
    method = SiT(config or make_config())
    for parameter in method.student.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return method


def damage(method: SiT, batch: Batch, seed: int):
    return method.damage(both_views(batch), batch, seed)


def part_of(batch: Batch, rows: slice) -> Batch:
    return batch.map(lambda value: value[rows])


# -- the whole step, from the paper's words ----------------------------------------------------------------------------


def naive_damage(settings, images, ids, epoch, view, seed):
    """Block after block, image after image."""
    side, out = images.shape[-1], images.clone()
    mask = torch.zeros(len(images), side, side, dtype=torch.bool)
    rule = {"height": side, "width": side, "seed": seed, "epoch": epoch, "views": 2, "max_side": settings.max_side}
    rule |= {"drop": settings.drop, "replace": settings.replace}
    for b in range(len(images)):
        path, _, other, _ = (
            int(w) for w in philox((ids[b : b + 1], epoch, view, 0), (seed, zlib.crc32(b"sit/damage")))
        )
        alien = path / 2**32 < settings.alien
        first = b // settings.alien_group * settings.alien_group
        group = [j for j in range(first, min(first + settings.alien_group, len(images))) if j != b]
        group = [j for j in group if j > b] + [j for j in group if j < b]
        source = group[other * len(group) // 2**32]
        blocks = draw_blocks(ids[b : b + 1], alien=float(alien), **rule).boxes[view]
        for top, left, height, width in blocks.tolist():
            block = (slice(None), slice(top, top + height), slice(left, left + width))
            out[b][block] = images[source][block] if alien else 0
            mask[b][block[1:]] = True
    return out, mask


def naive_head(state, x):
    """Linear, norm over the batch, ReLU; linear, norm, GELU; linear, norm without parameters."""

    def norm(x, key):
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{key}.weight"] + state[f"{key}.bias"] if f"{key}.weight" in state else x

    x = norm(F.linear(x, state["0.weight"], state["0.bias"]), "1").clamp(min=0)
    x = F.gelu(norm(F.linear(x, state["3.weight"], state["3.bias"]), "4"))
    return norm(F.linear(x, state["6.weight"], state["6.bias"]), "7")


def naive_paint(decoder, tokens, grid):
    for k in (0, 2, 4):
        tokens = F.gelu(F.linear(tokens, decoder.mlp[k].weight, decoder.mlp[k].bias))
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    return F.conv_transpose2d(maps, decoder.convTrans.weight, decoder.convTrans.bias, stride=decoder.convTrans.stride)


def naive_step(method, batch, values):
    s = method.settings
    clean = [batch.views["view1"][:, 0], batch.views["view2"][:, 0]]
    pairs = [naive_damage(s, x, batch.id, batch.epoch, v, values.seed) for v, x in enumerate(clean)]
    tokens = [[method.student.backbone.tokens(image[None])[0] for image in damaged] for damaged, _ in pairs]
    student = dict(method.student.head.named_parameters())
    codes = naive_head(student, torch.stack([t[0] for view in tokens for t in view]))
    with torch.no_grad():
        seen = torch.stack([method.teacher.backbone(image[None])[0] for view in clean for image in view])
        keys = naive_head(dict(method.teacher.head.named_parameters()), seen)
    count = len(clean[0])
    contrastive = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(count):
            q = codes[a * count + i]
            logits = torch.stack(
                [
                    (q @ keys[b * count + n]) / q.norm() / keys[b * count + n].norm() / s.temperature
                    for n in range(count)
                ]
            )
            contrastive = contrastive - 2 * s.temperature * (logits[i] - logits.logsumexp(0)) / count
    total, pixels = 0.0, 0
    for (_, mask), view, images in zip(pairs, tokens, clean, strict=True):
        for i in range(count):
            painted = naive_paint(method.student.decoder, view[i][None, 1:], (4, 4))[0]
            for c in range(3):
                total = total + (painted[c] - images[i][c])[mask[i]].abs().sum()
                pixels += int(mask[i].sum())
    return contrastive, total / pixels


def test_a_step_against_plain_loops_in_loss_and_all_gradients():
    method = make_method(make_config(rec_weight=0.7)).to(DOUBLE)
    twin, batch = copy.deepcopy(method), make_batch(dtype=DOUBLE)
    out = method(batch, VALUES)
    contrastive, reconstruction = naive_step(twin, batch, VALUES)
    torch.testing.assert_close(out.metrics["contrastive"], contrastive.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.metrics["reconstruction"], reconstruction.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.loss, contrastive + 0.7 * reconstruction, rtol=1e-9, atol=1e-10)
    out.loss.backward()
    (contrastive + 0.7 * reconstruction).backward()
    for (key, mine), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        if key.startswith("student."):
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=1e-6, atol=1e-10, msg=lambda m, key=key: f"{key} {m}"
            )
        else:
            assert mine.grad is None


def test_reconstruction_of_all_pixels():
    method, batch = make_method(make_config(rec_region="all")), make_batch()
    damaged, _ = damage(method, batch, VALUES.seed)
    clean = both_views(batch)
    painted = method.student.reconstruct(method.student.backbone.tokens(damaged), damaged)
    out = method(batch, VALUES)
    torch.testing.assert_close(out.metrics["reconstruction"], (painted - clean).abs().mean().detach())
    torch.testing.assert_close(out.loss.detach(), out.metrics["contrastive"] + out.metrics["reconstruction"])


# -- damage ------------------------------------------------------------------------------------------------------------


def big(**settings) -> tuple[SiT, Batch]:
    method = make_method(make_config(Model("vit_tiny", 224, 16, 12, 1, 2), (224, 224), **settings))
    return method, make_batch(24, 224)


def test_cover_and_content_of_the_damage():
    method, batch = big()
    damaged, mask = damage(method, batch, 1)
    clean = both_views(batch)
    where = mask[:, None].expand_as(clean)
    assert torch.equal(damaged[~where], clean[~where])
    blank = torch.stack([damaged[i][where[i]].eq(0).all() for i in range(48)])
    assert 12 <= blank.sum() <= 36
    assert not torch.equal(blank[:24], blank[24:])  # each view by itself
    cover = mask.sum((1, 2))
    assert cover[blank].min() >= 25088
    assert cover[~blank].min() >= 15053
    assert cover[blank].double().mean() / 224**2 == pytest.approx(0.511, abs=0.005)
    assert cover[~blank].double().mean() / 224**2 == pytest.approx(0.313, abs=0.005)
    for view, begin in ((0, 0), (1, 24)):
        images = batch.views[f"view{view + 1}"][:, 0]
        for i in range(24):
            if blank[begin + i]:
                continue
            group = range(i // 8 * 8, i // 8 * 8 + 8)
            matches = [
                j for j in group if torch.equal(damaged[begin + i][:, mask[begin + i]], images[j][:, mask[begin + i]])
            ]
            assert len(matches) == 1
            assert matches != [i]


@pytest.mark.parametrize(("uniform", "rate"), [(False, 0.04), (True, 0.51)])
def test_rate_of_the_top_left_patch(uniform, rate):
    """The authors' draw hardly ever reaches it."""
    method, batch = big(alien=0.0, uniform_rate=uniform)
    measured = damage(method, batch, 0).mask[:, :16, :16].double().mean().item()
    assert measured == pytest.approx(rate, abs=0.08 if rate < 0.1 else 0.2)


def test_damage_depends_on_seed_epoch_id_and_view_alone():
    method, batch = make_method(), make_batch()
    damaged, mask = damage(method, batch, 1)
    again = damage(method, batch, 1)
    assert torch.equal(damaged, again.views)
    half = damage(method, part_of(batch, slice(8, 16)), 1)
    assert torch.equal(half.views, torch.cat([damaged[8:16], damaged[24:32]]))
    assert torch.equal(half.mask, torch.cat([mask[8:16], mask[24:32]]))
    assert not torch.equal(mask[:16], mask[16:])
    assert not torch.equal(mask, damage(method, batch, 2).mask)
    batch.epoch = 3
    assert not torch.equal(mask, damage(method, batch, 1).mask)


@pytest.mark.parametrize("fill", ["zero", "noise", "zero-noise"])
def test_what_blanked_blocks_show(fill):
    method, batch = make_method(make_config(alien=0.0, fill=fill)), make_batch()
    damaged, mask = damage(method, batch, 1)
    values = [damaged[i][:, mask[i]] for i in range(2 * B)]
    blank = [bool((v == 0).all()) for v in values]
    assert {"zero": all(blank), "noise": not any(blank), "zero-noise": 4 < sum(blank) < 28}[fill]
    noise = torch.cat([v.flatten() for v, b in zip(values, blank, strict=True) if not b] or [torch.randn(9999)])
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_aligned_blocks_hide_whole_patches():
    method = make_method(make_config(align=8, max_side=0.6))
    cells = damage(method, make_batch(), 1).mask.unflatten(1, (4, 8)).unflatten(3, (4, 8)).double().mean((2, 4))
    assert set(cells.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("align", "max_side"), [(1, 0.3), (4, 0.5)])
def test_enough_blocks_are_drawn(share, align, max_side):
    method = make_method(make_config(drop=share, alien=0.0, align=align, max_side=max_side))
    cover = torch.cat([damage(method, make_batch(64), seed).mask.double().mean((1, 2)) for seed in range(3)])
    assert cover.min() >= min(0.5, share)


# -- several processes -------------------------------------------------------------------------------------------------


def half_step(rank: int):
    """One process's share of the batch: loss, metrics, gradients, buffers after the step."""
    method = synchronise_batch_norm(make_method().to(DOUBLE), torch.device("cpu"))
    world = distributed.world()
    rows = slice(rank * B // world, (rank + 1) * B // world)
    out = method(part_of(make_batch(dtype=DOUBLE), rows), VALUES)
    out.loss.backward()
    gradients = {key: p.grad for key, p in method.student.named_parameters()}
    return out.loss.detach(), out.metrics, gradients, dict(method.named_buffers())


def test_two_processes_equal_one(on_processes):
    loss, metrics, gradients, buffers = half_step(0)
    halves = on_processes(2, half_step)
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
    assert not torch.equal(halves[0][0], halves[1][0])
    for key in ("contrastive", "reconstruction", "contrastive_top1"):
        torch.testing.assert_close((halves[0][1][key] + halves[1][1][key]) / 2, metrics[key])
    for key, gradient in gradients.items():
        torch.testing.assert_close((halves[0][2][key] + halves[1][2][key]) / 2, gradient, rtol=1e-6, atol=1e-10)
    for half in halves:
        for key, value in buffers.items():
            torch.testing.assert_close(half[3][key], value, rtol=1e-6, atol=1e-10)


# -- teacher and training ----------------------------------------------------------------------------------------------


def test_teacher_is_the_moving_average_of_parameters_alone():
    method = make_method()
    method(make_batch(), VALUES)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    momentum = 1 - 0.004 * (1 + math.cos(math.pi * 0.3)) / 2
    finish_step(method, build_optimizer(method, Optim(), averages=method.averages()), VALUES)
    parameters = dict(method.teacher.named_parameters())
    assert parameters.keys() == dict(method.student.named_parameters()).keys()
    for key, value in method.teacher.state_dict().items():
        expected = before[f"teacher.{key}"]
        if key in parameters:
            expected = momentum * expected + (1 - momentum) * before[f"student.{key}"]
        torch.testing.assert_close(value, expected)
    assert torch.equal(method.student.state_dict()["head.0.weight"], before["student.head.0.weight"])
    assert [method.momentum(Values(t, 100, 1)) for t in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1])


def test_teacher_starts_as_the_student_sees_clean_views_and_keeps_its_own_statistics():
    torch.manual_seed(0)
    method = SiT(make_config(Model("vit_tiny", 32, 8, 24, 2, 2, drop_path=0.3)))
    for key, value in method.student.state_dict().items():
        assert torch.equal(method.teacher.state_dict()[key], value)
    assert not [m for m in method.teacher.modules() if getattr(m, "drop_prob", 0)]
    seen = []
    method.teacher.backbone.embed = lambda x, keep=None, f=method.teacher.backbone.embed: (seen.append(x), f(x))[1]
    batch = make_batch()
    method(batch, VALUES)
    assert torch.equal(seen[0], both_views(batch))
    assert not torch.equal(method.teacher.head[1].running_mean, method.student.head[1].running_mean)
    assert method.teacher.head[1].num_batches_tracked == 1
    assert method.backbone is method.teacher.backbone


def test_every_trainable_parameter_learns_and_the_teacher_does_not():
    method = make_method()
    method(make_batch(), VALUES).loss.backward()
    for key, parameter in method.named_parameters():
        if key.startswith("teacher."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, key
    clip_gradients(method, 1e-3, each=True)
    assert max(p.grad.norm() for p in method.student.parameters()) <= 1e-3 + 1e-8


def test_loss_falls_on_one_batch():
    method, batch = make_method(), make_batch()
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = method(batch, VALUES)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert out.metrics["contrastive_top1"] == 1


def test_bfloat16_is_close():
    method, batch = make_method(), make_batch()
    exact = method(batch, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch, VALUES)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.student.parameters())
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.03, atol=0)


def test_evaluation_mode_tells_the_value_by_chance():
    method = make_method(make_config(temperature=0.3)).eval()
    out = method(make_batch(), VALUES)
    assert out.metrics["contrastive_chance"].item() == pytest.approx(1.2 * math.log(B))
    assert "contrastive_chance" not in method.train()(make_batch(), VALUES).metrics


def test_pictures():
    method, batch = make_method().eval(), part_of(make_batch(), slice(0, 5))
    with torch.no_grad():
        pictures = method.pictures(batch, VALUES)
    assert set(pictures) == {"reconstruction"}
    rows = pictures["reconstruction"].pictures
    assert rows.shape == (5, len(pictures["reconstruction"].titles), 3, S, S) == (5, 8, 3, S, S)
    assert rows.min() >= 0
    assert rows.max() <= 1
    mask = damage(method, batch, VALUES.seed).mask
    for view in (0, 1):
        hidden = mask[5 * view : 5 * view + 5]
        clean, damaged, painted, restored = rows[:, 4 * view : 4 * view + 4].movedim(2, -1).unbind(1)
        assert torch.equal(clean[~hidden], damaged[~hidden])
        assert not torch.equal(clean[hidden], damaged[hidden])
        assert torch.equal(restored, torch.where(hidden[..., None], painted, clean))
        assert not torch.equal(painted, damaged)


# -- the authors' recipe and files -------------------------------------------------------------------------------------


def official_shapes(width: int, depth: int, patches: int, hidden: int, out: int) -> dict[str, tuple[int, ...]]:
    d, h = width, hidden
    shapes = {"backbone.cls_token": (1, 1, d), "backbone.pos_embed": (1, patches + 1, d)}
    shapes |= {"backbone.patch_embed.proj.weight": (d, 3, 8, 8), "backbone.patch_embed.proj.bias": (d,)}
    for i in range(depth):
        block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        block |= {"norm1": (d,), "norm2": (d,)}
        for key, shape in block.items():
            shapes[f"backbone.blocks.{i}.{key}.weight"] = shape
            shapes[f"backbone.blocks.{i}.{key}.bias"] = shape[:1]
    shapes |= {"backbone.norm.weight": (d,), "backbone.norm.bias": (d,)}
    for i, shape in ((0, (h, d)), (3, (h, h)), (6, (out, h))):
        shapes |= {f"head.mlp.{i}.weight": shape, f"head.mlp.{i}.bias": shape[:1]}
    for i in (1, 4):
        shapes |= {f"head.mlp.{i}.weight": (h,), f"head.mlp.{i}.bias": (h,)}
    for i, n in ((1, h), (4, h), (7, out)):
        shapes |= {f"head.mlp.{i}.{key}": (n,) for key in ("running_mean", "running_var")}
        shapes[f"head.mlp.{i}.num_batches_tracked"] = ()
    for i in (0, 2, 4):
        shapes |= {f"head_recons.mlp.{i}.weight": (d, d), f"head_recons.mlp.{i}.bias": (d,)}
    return shapes | {"head_recons.convTrans.weight": (d, 3, 8, 8), "head_recons.convTrans.bias": (3,)}


def test_official_checkpoint_round_trip_and_forward():
    generator = torch.Generator().manual_seed(1)
    shapes = official_shapes(24, 2, 16, 20, 12)
    checkpoint = {
        name: {
            f"module.{key}": torch.tensor(4)
            if key.endswith("tracked")
            else torch.rand(shape, generator=generator) * 0.3 + 0.01
            for key, shape in shapes.items()
        }
        for name in ("student", "teacher")
    }
    method = make_method()
    method.load_state_dict(SiT.official({**checkpoint, "epoch": 5}))
    back = SiT.to_official(method.state_dict())
    assert back.keys() == checkpoint.keys()
    for name in checkpoint:
        assert back[name].keys() == checkpoint[name].keys()
        for key, value in checkpoint[name].items():
            assert torch.equal(back[name][key], value), key
    images = torch.randn(4, 3, S, S)
    theirs = {key.removeprefix("module."): value for key, value in checkpoint["student"].items()}
    tokens = method.student.backbone.tokens(images)
    head = {key.removeprefix("head.mlp."): value for key, value in theirs.items() if key.startswith("head.mlp.")}
    torch.testing.assert_close(method.student.head(tokens[:, 0]), naive_head(head, tokens[:, 0]), rtol=1e-3, atol=1e-4)
    x = tokens[:, 1:]
    for i in (0, 2, 4):
        x = F.gelu(F.linear(x, theirs[f"head_recons.mlp.{i}.weight"], theirs[f"head_recons.mlp.{i}.bias"]))
    maps = x.transpose(1, 2).reshape(4, 24, 4, 4)
    painted = F.conv_transpose2d(maps, theirs["head_recons.convTrans.weight"], theirs["head_recons.convTrans.bias"], 8)
    torch.testing.assert_close(method.student.reconstruct(tokens, images), painted)


def test_official_backbone_alone():
    backbone = make_method().backbone.state_dict()
    assert set(SiT.official(backbone)) == {f"teacher.backbone.{key}" for key in backbone}


@pytest.mark.parametrize(
    ("name", "count"), [("vit_tiny", 24_420_099), ("vit_small", 41_827_587), ("vit_base", 109_156_611)]
)
def test_size_of_the_published_models(name, count):
    with torch.device("meta"):
        method = SiT(Config("sit", SiT.Views(), SiT.Settings(), model=Model(name)))
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count


def test_recipe_is_the_authors():
    view1, view2 = view_list(METHODS["sit"].Views())
    assert [v.name for v in (view1, view2)] == ["view1", "view2"]
    assert [(v.blur, v.solarize) for v in (view1, view2)] == [(1.0, 0.0), (0.1, 0.2)]
    for view in (view1, view2):
        assert (view.size, view.scale, view.flip, view.gray) == (224, (0.2, 1.0), 0.5, 0.2)
        assert (view.jitter, view.jitter_p) == ((0.4, 0.4, 0.2, 0.1), 0.8)
    steps, warmup, d = 4_008_204, 50_040, SiT.defaults
    rates, twice = (d["optim.lr"], d["optim.min_lr"]), SiT.peak_twice
    lr = [warmup_cosine(t, steps, warmup, *rates, peak_twice=twice) for t in (0, 50_039, 50_040, steps - 1)]
    assert lr == pytest.approx([0, 5e-4, 5e-4, 1e-6], rel=1e-9)
    decay = [cosine(t, steps, d["optim.weight_decay"], d["optim.weight_decay_end"]) for t in (0, steps // 2, steps)]
    assert decay == pytest.approx([0.04, 0.07, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": 1.0}, "sit.drop is 1.0; it must be at least 0 and below 1"),
        ({"alien": 1.5}, "sit.alien is 1.5; it must be a probability"),
        ({"max_side": 0.0}, "sit.max_side is 0.0"),
        ({"align": 0}, "sit.align is 0; it must be 1 or more"),
        ({"align": 9}, "sit.align is 9; it must be less than the largest block's side, 9 pixels"),
        ({"alien_group": 1}, "sit.alien_group is 1; it must be 0 .* or 2 or more"),
        ({"rec_weight": -1.0}, "sit.rec_weight is -1.0"),
        ({"out_dim": 0}, "sit.out_dim is 0; it must be 1 or more"),
        ({"temperature": 0.0}, "sit.temperature is 0.0; it must be positive"),
        ({"momentum_teacher": 2.0}, "sit.momentum_teacher is 2.0; it must be from 0 to 1"),
        ({"sizes": (36, 36)}, "views.view1.size is 36; it must be a multiple of model.patch_size, 8"),
        ({"sizes": (32, 40)}, "views.view2.size is 40; it must be that of view1, 32"),
        ({"count": 2}, "views.view1.count is 2; it must be 1 with method sit"),
        ({"model": Model("resnet18")}, "model.name is 'resnet18'; method sit needs a ViT"),
    ],
    ids=str,
)
def test_messages(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(make_config(**settings))
