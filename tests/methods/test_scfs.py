"""SCFS: a step against its loops, the search, the four centres, the teacher's statistics, the authors' layout."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny import finish_step
from torch import nn

from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model
from fastssl.kernels._path import forced
from fastssl.kernels.centering_softmax_loss import centering_softmax_loss
from fastssl.methods import METHODS, view_list
from fastssl.methods.dino import DINO
from fastssl.methods.scfs import SCFS, StageHead, crops, search
from fastssl.parse import parse_pretrain
from fastssl.step import Values
from fastssl.training.batch_norm import synchronise_batch_norm
from fastssl.training.optim import build_optimizer
from fastssl.training.schedule import warmup_cosine
from fastssl.training.timing import Stopwatch

B, M, K, E = 4, 3, 24, 16
RESNET = Model("resnet18", image_size=32, width=4, small_images=True)
VIT = Model("vit_tiny", 32, 8, 24, 4, 3)
VALUES = Values(3, 100, 1)


def make_config(model: Model = RESNET, large: int = 32, small: int = 16, kind: type = SCFS, **settings) -> Config:
    views = kind.Views()
    views.global1.size = views.global2.size = large
    views.local.size, views.local.count = small, M
    numbers = {"out_dim": K, "head_hidden": 16, "head_bottleneck": 8}
    if kind is SCFS:
        numbers |= {"stage_inner": 6, "stage_hidden": 10, "stage_out": E}
    return Config(kind.__name__.lower(), views, kind.Settings(**numbers | settings), model=model)


def make_batch(config: Config, images: int = B, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {
        v.name: torch.randn(images, v.count, 3, v.size, v.size, generator=generator) for v in view_list(config.views)
    }
    return Batch(torch.arange(images), torch.full((images,), -1), views=views)


def make_method(config: Config | None = None, kind: type = SCFS) -> SCFS:
    """A method whose teacher is not its student, with centres and batch norms that are not trivial."""
    torch.manual_seed(0)
    method = kind(config or make_config())
    generator = torch.Generator().manual_seed(1)
    for key, value in method.state_dict().items():
        if re.search(r"(bn\d|mlp\.[14])\.(weight|bias)$|^center", key):
            value.add_(torch.randn(value.shape, generator=generator) * 0.2)
    for parameter in method.teacher.parameters():
        parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return method


def double(method: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    return method.double(), batch.map(lambda value: value.double() if value.is_floating_point() else value)


# -- the method as the paper writes it, crop by crop ------------------------------------------------------------------


def plain_head(head: StageHead, x: torch.Tensor) -> torch.Tensor:
    y = head.bn1(head.conv1(x)).relu()
    y = head.bn2(head.conv2(y)).relu()
    y = (head.bn3(head.conv3(y)) + x).relu()
    u = head.mlp(y.mean(dim=(2, 3)))
    return u / u.norm(dim=1, keepdim=True)


def plain_maps(backbone: nn.Module, taps: tuple[int, ...], images: torch.Tensor) -> tuple[torch.Tensor, list]:
    if hasattr(backbone, "layer1"):
        maps = backbone.stages(images)
        return maps[-1].mean(dim=(2, 3)), [maps[tap - 1] for tap in taps]
    side = images.shape[-1] // backbone.patch_size
    x, maps = backbone.embed(images), {}
    for number, block in enumerate(backbone.blocks, 1):
        x = block(x)
        patches = backbone.norm(x)[:, 1:]  # [n, N, D]
        maps[number] = torch.stack([row.T.reshape(-1, side, side) for row in patches])
    return backbone.norm(x)[:, 0], [maps[tap] for tap in taps]


def plain_search(query: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """[B, C], [B, C, H, W] -> [B, 1, H, W], position by position."""
    maps = torch.zeros(len(query), 1, *feature.shape[2:], dtype=feature.dtype)
    for b in range(len(query)):
        for i in range(feature.shape[2]):
            for j in range(feature.shape[3]):
                maps[b, 0, i, j] = F.cosine_similarity(query[b], feature[b, :, i, j], dim=0)
    return maps.clamp(min=0)


def cross_entropy(target: torch.Tensor, logits: torch.Tensor, student_temp: float) -> torch.Tensor:
    """[B, K] each, image by image."""
    total = 0.0
    for b in range(len(target)):
        total = total - (target[b] * (logits[b] / student_temp).log_softmax(-1)).sum()
    return total / len(target)


def plain_step(method: SCFS, batch: Batch, temp: float) -> dict[str, torch.Tensor]:
    """Losses by the name of their metric, and the sum as "loss"; moves the centres and the running statistics."""
    s = method.settings
    images = {
        "global": [batch.views["global1"][:, 0], batch.views["global2"][:, 0]],
        "local": [batch.views["local"][:, m] for m in range(batch.views["local"].shape[1])],
    }
    seen = {}
    for network, names in (("student", ("global", "local")), ("teacher", ("global",))):
        for name in names:
            net = getattr(method, network)
            features, maps = plain_maps(net.backbone, method.taps, torch.cat(images[name]))
            outs = [
                plain_head(head, x).chunk(len(images[name]))
                for head, x in zip(net.stage_heads.values(), maps, strict=True)
            ]
            seen[network, name] = (net.head(features).chunk(len(images[name])), outs, maps)

    logits = [*seen["student", "global"][0], *seen["student", "local"][0]]
    teacher_logits = [t.detach() for t in seen["teacher", "global"][0]]
    total, pairs = 0.0, 0
    for t, row in enumerate(teacher_logits):
        for v, student in enumerate(logits):
            if v != t:
                total = total + cross_entropy(((row - method.center) / temp).softmax(-1), student, s.student_temp)
                pairs += 1
    losses = {"loss_dino": total / pairs}
    loss = losses["loss_dino"]
    assert pairs == 2 * len(logits) - 2
    method.center.copy_(0.9 * method.center + 0.1 * torch.cat(teacher_logits).mean(0))

    for i, tap in enumerate(method.taps):
        center = getattr(method, f"center_{tap}")
        first, second = seen["student", "global"][1][i]
        targets = [t.detach() for t in seen["teacher", "global"][1][i]]
        q = [((t - center) / temp).softmax(-1) for t in targets]
        cross = (cross_entropy(q[0], second, s.student_temp) + cross_entropy(q[1], first, s.student_temp)) / 2
        center.copy_(0.9 * center + 0.1 * torch.cat(targets).mean(0))

        found = []
        for view in range(1 if s.search == "first" else 2):
            feature = seen["teacher", "global"][2][i].detach().chunk(2)[view]
            searched = []
            for local in seen["student", "local"][2][i].detach().chunk(len(images["local"])):
                searched.append(plain_search(local.mean(dim=(2, 3)), feature) * feature)
            out = plain_head(method.teacher.stage_heads[str(tap)], torch.cat(searched)).detach()
            for target, student in zip(out.chunk(len(searched)), seen["student", "local"][1][i], strict=True):
                found.append(cross_entropy((target / temp).softmax(-1), student, s.student_temp))
        losses[f"loss_cross_{tap}"], losses[f"loss_searched_{tap}"] = cross, sum(found) / len(found)
        weight = s.stage_weights[i] if s.stage_weights else 1.0
        loss = loss + weight * (s.cross_weight * cross + s.searched_weight * losses[f"loss_searched_{tap}"])
    return losses | {"loss": loss}


CASES = {
    "paper": {},
    "both views, weights": {
        "search": "both", "cross_weight": 0.3, "searched_weight": 0.9, "stage_weights": (0.5, 1.0, 2.0),
    },
    "two taps": {"taps": (1, 3)},
    "ViT": {"model": VIT},
    "ViT, early blocks": {"model": VIT, "taps": (1, 2), "search": "both"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_loops_in_loss_gradients_centres_and_statistics(case):
    config = make_config(**CASES[case])
    method, batch = double(make_method(config), make_batch(config))
    other = copy.deepcopy(method)
    out = method(batch, VALUES)
    temp = 0.04 + 0.03 * 3 / 49
    expected = plain_step(other, batch, temp)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=1e-9, atol=1e-9)
    for name in expected.keys() - {"loss"}:
        torch.testing.assert_close(out.metrics[name], expected[name].detach(), rtol=1e-9, atol=1e-9)
    out.loss.backward()
    expected["loss"].backward()
    for (key, got), plain in zip(method.student.named_parameters(), other.student.parameters(), strict=True):
        if plain.requires_grad:
            torch.testing.assert_close(got.grad, plain.grad, rtol=1e-6, atol=1e-9, msg=lambda t, key=key: f"{key}: {t}")
    for (key, got), value in zip(method.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_float32_agrees_to_1e_5():
    config = make_config()
    method, batch = make_method(config), make_batch(config)
    exact = plain_step(*double(copy.deepcopy(method), batch), 0.04 + 0.03 * 3 / 49)
    assert method(batch, VALUES).loss.item() == pytest.approx(exact["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_kernels_and_reference_give_the_same_step(mode):
    config = make_config(RESNET, 16, 16, taps=(3, 4))
    method, batch = make_method(config), make_batch(config, 2)
    with forced("auto"):
        expected = copy.deepcopy(method)(batch, VALUES)
    with forced(mode):
        got = method(batch, VALUES)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_head_on_searched_maps_equals_the_head_on_the_products(training):
    torch.manual_seed(0)
    head = StageHead(12, inner=5, hidden=7, out=6).double().train(training)
    for norm in head.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    plain = copy.deepcopy(head)
    x, maps = torch.rand(4, 12, 3, 5, dtype=torch.float64), torch.rand(2, 4, 3, 5, dtype=torch.float64)
    got = head.searched(head.conv1(x).detach(), x, maps)
    expected = plain_head(plain, torch.cat([maps[m][:, None] * x for m in range(2)]))
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(got.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert not got.requires_grad
    for (key, value), other in zip(head.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, msg=lambda text, key=key: f"{key}: {text}")


def test_a_map_is_a_cosine_from_0_to_1():
    torch.manual_seed(0)
    local, feature = torch.rand(2, 3, 8, 2, 2), torch.rand(3, 8, 4, 5)
    maps = search(local, feature)
    assert maps.shape == (2, 3, 4, 5)
    assert 0 <= maps.min() < maps.max() <= 1 + 1e-6
    torch.testing.assert_close(search(local * 7, feature * torch.rand(3, 1, 4, 5)), maps)
    assert search(-local, feature).eq(0).all()
    for m in range(2):
        torch.testing.assert_close(maps[m], plain_search(local[m].mean((2, 3)), feature)[:, 0])


def test_where_all_positions_match_the_target_is_the_plain_output():
    method = make_method().eval()
    batch = make_batch(make_config())
    large, small = crops(batch)
    with torch.no_grad():
        teacher, student = method.teacher([large]), method.student([large, small])
        for i, tap in enumerate(method.taps):
            length = torch.rand(B, 1, 8, 8) + 0.1
            query = student.stages[1][i].map[0].mean((2, 3), keepdim=True)  # [B, C, 1, 1]
            feature = query * length
            head = method.teacher.stage_heads[str(tap)]
            inner = head.conv1(feature)
            maps = search(student.stages[1][i].map[:1], feature)
            torch.testing.assert_close(maps, torch.ones_like(maps))
            torch.testing.assert_close(head.searched(inner, feature, maps), head(feature, inner), rtol=1e-4, atol=1e-5)
    assert teacher.stages[0][0].map.shape[:2] == (2, B)


@pytest.mark.parametrize("which", ["first", "both"])
def test_only_the_first_large_crop_is_searched_unless_told_otherwise(which):
    method = make_method(make_config(search=which)).eval()
    batch = make_batch(make_config())
    large, small = crops(batch)
    with torch.no_grad():
        student, teacher = method.student([large, small]), method.teacher([large])
        changed = method.teacher([torch.stack([large[0], large[1].flip(-1) + 1])])
        before, after = (method.targets(1, student, seen) for seen in (teacher, changed))
    assert len(before) == len(after) == (1 if which == "first" else 2)
    torch.testing.assert_close(after[0], before[0])
    assert before[0].shape == (M, B, E)
    if which == "both":
        assert not torch.allclose(after[1], before[1])


# -- the losses -------------------------------------------------------------------------------------------------------


def test_shapes_and_sizes_of_the_published_network():
    """Oracle 1 of the method, and the parameter counts of the stage heads."""
    with torch.device("meta"):
        config = Config("scfs", SCFS.Views(), SCFS.Settings(out_dim=100), model=Model("resnet50"))
        method = SCFS(config)
        method.student.head = method.teacher.head = nn.Identity()  # autocast knows no meta device
        large, small = torch.zeros(2, 3, 3, 224, 224), torch.zeros(2, 3, 3, 96, 96)
        student, teacher = method.student([large, small]), method.teacher([large])
        targets = [method.targets(i, student, teacher)[0] for i in range(3)]
    assert student.features.shape == (4, 3, 2048)
    for group, sides in zip(student.stages, ((28, 14, 7), (12, 6, 3)), strict=True):
        for stage, side, channels in zip(group, sides, (512, 1024, 2048), strict=True):
            assert stage.out.shape == (2, 3, 256)
            assert stage.map.shape == (2, 3, channels, side, side)
    assert [t.shape for t in targets] == [(2, 3, 256)] * 3
    sizes = [sum(p.numel() for p in head.parameters()) for head in method.student.stage_heads.values()]
    assert sizes == [2_433_792, 3_745_536, 6_369_024]


def test_a_student_that_says_nothing_has_the_chance_loss():
    config = make_config(stage_weights=(1.0, 0.5, 2.0), cross_weight=0.4)
    method, batch = make_method(config), make_batch(config)
    original = method.student.forward

    def uniform(groups):
        seen = original(groups)
        stages = [[stage._replace(out=torch.full_like(stage.out, E**-0.5)) for stage in g] for g in seen.stages]
        return seen._replace(logits=torch.full_like(seen.logits, 0.3), stages=stages)

    method.student.forward = uniform
    out = method(batch, VALUES)
    assert out.metrics["loss_dino"].item() == pytest.approx(math.log(K), rel=1e-5)
    for tap in (2, 3, 4):
        assert out.metrics[f"loss_cross_{tap}"].item() == pytest.approx(math.log(E), rel=1e-5)
        assert out.metrics[f"loss_searched_{tap}"].item() == pytest.approx(math.log(E), rel=1e-5)
    expected = math.log(K) + 3.5 * 0.9 * math.log(E)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert method.chance_loss == pytest.approx(expected)


def test_the_least_loss_of_a_stage():
    one_hot = F.one_hot(torch.tensor([[3, 200]]), 256).double()
    sure = F.one_hot(torch.tensor([[3, 200]]), 256).double() * 1e6
    loss = centering_softmax_loss(one_hot, sure, None, 0.1, 0.04, pairs="matching").loss
    assert loss.item() == pytest.approx(0.01151, abs=5e-6)


def test_swapping_the_large_crops_changes_only_the_searched_losses():
    config = make_config()
    method, batch = double(make_method(config), make_batch(config))
    swapped = copy.copy(batch)
    swapped.views = batch.views | {"global1": batch.views["global2"], "global2": batch.views["global1"]}
    a, b = copy.deepcopy(method)(batch, VALUES).metrics, method(swapped, VALUES).metrics
    for name in ("loss_dino", "loss_cross_2", "loss_cross_3", "loss_cross_4"):
        torch.testing.assert_close(b[name], a[name])
    for name in ("loss_searched_2", "loss_searched_3", "loss_searched_4"):
        assert not torch.isclose(b[name], a[name])


def test_centres_take_the_plain_outputs_only_and_not_in_eval_mode():
    method, batch = make_method(), make_batch(make_config())
    keys = ["center", "center_2", "center_3", "center_4"]
    for key in keys:
        getattr(method, key).zero_()
    large, _ = crops(batch)
    with torch.no_grad():
        seen = copy.deepcopy(method.teacher)([large])
    method(batch, VALUES)
    outputs = [seen.logits, *(stage.out for stage in seen.stages[0])]
    for key, output in zip(keys, outputs, strict=True):
        torch.testing.assert_close(getattr(method, key), 0.1 * output.mean((0, 1)))
    method.eval()
    before = {key: getattr(method, key).clone() for key in keys}
    method(batch, VALUES)
    assert all(torch.equal(getattr(method, key), before[key]) for key in keys)


@pytest.mark.parametrize("tap", [2, 3, 4])
def test_a_centre_is_used_in_its_cross_loss_only(tap):
    method, batch = make_method(), make_batch(make_config())
    other = copy.deepcopy(method)
    getattr(other, f"center_{tap}").add_(torch.randn(E))
    a, b = method(batch, VALUES).metrics, other(batch, VALUES).metrics
    different = {name for name in a if name.startswith("loss_") and not torch.equal(a[name], b[name])}
    assert different == {f"loss_cross_{tap}"}


def test_without_taps_the_step_is_dinos():
    config = make_config(taps=(), head_batch_norm=True, warmup_teacher_temp_epochs=30)
    other = make_config(kind=DINO, head_batch_norm=True)
    batch = make_batch(config)
    torch.manual_seed(0)
    method = SCFS(config)
    torch.manual_seed(0)
    dino = DINO(other)
    a, b = method(batch, VALUES), dino(batch, VALUES)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    ours, theirs = method.state_dict(), dino.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])
    for p, q in zip(method.student.parameters(), dino.student.parameters(), strict=True):
        if q.requires_grad:
            # float32 sums in another order: 3e-6 where a gradient of 5e-3 is what many terms of 1 leave
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=5e-6)


# -- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_every_trainable_parameter_learns_and_the_teacher_does_not(model):
    config = make_config(model, norm_last_layer=False)
    method = make_method(config)
    method(make_batch(config), VALUES).loss.backward()
    for key, parameter in method.named_parameters():
        if key.startswith("teacher."):
            assert not parameter.requires_grad
            assert parameter.grad is None
        elif not re.search(r"mlp\.[03]\.bias", key) or key.startswith("student.head"):  # a batch norm follows: zero
            assert parameter.grad.abs().max() > 1e-8, key


def test_no_gradient_flows_through_the_search():
    """Searched loss alone: the student's maps of the small crops, as queries, leave its gradient unchanged."""
    config = make_config(cross_weight=0.0)
    method, batch = double(make_method(config), make_batch(config))
    other = copy.deepcopy(method)
    targets = []
    original = method.targets
    method.targets = lambda *arguments: targets.append(original(*arguments)) or targets[-1]
    method(batch, VALUES).loss.backward()
    other.targets = lambda tap, student, teacher: [t.detach().clone() for t in targets[tap]]
    other(batch, VALUES).loss.backward()
    assert not any(t.requires_grad for found in targets for t in found)
    for p, q in zip(method.student.parameters(), other.student.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_prototypes_rest_in_the_first_epoch_and_the_teachers_statistics_are_its_own():
    config = make_config()
    method = make_method(config)
    optimizer = build_optimizer(method, config.optim, averages=method.averages())
    last = method.student.head.last_layer
    moved = []
    for epoch in range(3):
        values = Values(epoch, 3, 1)
        before = last.weight_v.clone()
        head, mean = method.teacher.stage_heads["2"], method.teacher.backbone.bn1.running_mean.clone()
        method(make_batch(config, seed=epoch), values).loss.backward()
        teacher = {key: value.clone() for key, value in method.teacher.named_buffers()}
        finish_step(method, optimizer, values)
        moved.append(not torch.equal(last.weight_v, before))
        assert last.weight_g.eq(1).all()
        assert not torch.equal(method.teacher.backbone.bn1.running_mean, mean)
        assert all(torch.equal(value, teacher[key]) for key, value in method.teacher.named_buffers())
        assert head.bn1.num_batches_tracked == head.bn2.num_batches_tracked == head.bn3.num_batches_tracked
        assert head.bn1.num_batches_tracked == head.mlp[1].num_batches_tracked == 2 * (epoch + 1)
    assert moved == [False, True, True]


def test_schedules_of_the_recipe():
    method, steps = make_method(), 5004
    temps = [method.teacher_temp(Values(epoch * steps, 200 * steps, steps)) for epoch in (0, 1, 49, 50)]
    assert temps == pytest.approx([0.04, 0.0406122, 0.07, 0.07], abs=1e-7)
    optim = SCFS.defaults
    lr = [
        warmup_cosine(step, 200 * steps, 10 * steps, 0.1, 0.0048, peak_twice=SCFS.peak_twice)
        for step in (0, 50039, 50040, 200 * steps - 1)
    ]
    assert (optim["optim.lr"], optim["optim.min_lr"]) == (0.1, 0.0048)
    assert lr == pytest.approx([0.0, 0.1, 0.1, 0.0048], rel=1e-9)
    assert method.momentum(Values(0, 100, 1)) == pytest.approx(0.996)


def test_autocast_in_bfloat16_is_close():
    config = make_config()
    method, batch = make_method(config), make_batch(config)
    expected = copy.deepcopy(method)(batch, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch, VALUES)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.requires_grad)
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_the_step_names_its_parts():
    watch = Stopwatch(torch.device("cpu"))
    method, batch = make_method(), make_batch(make_config())
    with watch.listening():
        method(batch, VALUES)
    assert list(watch.read()) == ["student", "teacher", "search", "loss"]


def test_metrics_watch_the_searched_targets():
    config = make_config()
    method, batch = make_method(config), make_batch(config)
    seen = []
    original = method.targets
    method.targets = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
    metrics = method(batch, VALUES).metrics
    for tap, (target,) in zip(method.taps, seen, strict=True):
        q = (target / (0.04 + 0.03 * 3 / 49)).softmax(-1)
        entropy = -(q * q.log()).sum(-1).mean() / math.log(E)
        torch.testing.assert_close(metrics[f"searched_entropy_{tap}"], entropy, rtol=1e-4, atol=1e-5)
        spread = target.flatten(0, 1).std(dim=0, unbiased=False).mean() * E**0.5
        torch.testing.assert_close(metrics[f"searched_std_{tap}"], spread, rtol=1e-4, atol=1e-5)
    assert {"teacher_entropy", "teacher_student_kl", "feature_std"} <= set(metrics)
    assert not any(value.requires_grad for value in metrics.values())


# -- several processes ------------------------------------------------------------------------------------------------


def one_step(rank: int, state: dict, batch: Batch, model: Model, settings: dict) -> tuple[float, dict, dict]:
    """Loss, mean gradients and buffers after a step on this process's share of the batch."""
    config = make_config(model, **settings)
    method = SCFS(config).double()
    method.load_state_dict(state)
    if torch.distributed.is_initialized():
        synchronise_batch_norm(method, torch.device("cpu"))
        share = len(batch) // torch.distributed.get_world_size()
        batch = batch.map(lambda value: value[rank * share : (rank + 1) * share])
    out = method(batch, VALUES)
    out.loss.backward()
    values = [out.loss.detach()] + [p.grad for p in method.student.parameters() if p.grad is not None]
    if torch.distributed.is_initialized():
        for value in values:
            torch.distributed.all_reduce(value)
            value /= torch.distributed.get_world_size()
    gradients = {key: p.grad for key, p in method.student.named_parameters() if p.grad is not None}
    return values[0].item(), gradients, dict(method.named_buffers())


def test_two_processes_equal_one(on_processes):
    model, settings = RESNET, {"search": "both"}
    config = make_config(model, **settings)
    method, batch = double(make_method(config), make_batch(config))
    loss, gradients, buffers = one_step(0, method.state_dict(), batch, model, settings)
    for got_loss, got_gradients, got_buffers in on_processes(2, one_step, method.state_dict(), batch, model, settings):
        assert got_loss == pytest.approx(loss, rel=1e-9)
        for key, value in gradients.items():
            torch.testing.assert_close(
                got_gradients[key], value, rtol=1e-6, atol=1e-9, msg=lambda t, k=key: f"{k}: {t}"
            )
        for key, value in buffers.items():
            torch.testing.assert_close(got_buffers[key], value, rtol=1e-9, atol=1e-9, msg=lambda t, k=key: f"{k}: {t}")


# -- the authors' layout ----------------------------------------------------------------------------------------------


def layout(width: int, block: int, inner: int, hidden: int, out: int, head: tuple[int, int, int]) -> dict[str, tuple]:
    """The stage heads' and the final head's keys and shapes of the authors' files, without `module.`."""
    shapes = {}
    for tap in (2, 3, 4):
        c = width * block * 2 ** (tap - 1)
        name = f"layer{tap}_head"
        shapes |= {f"{name}.conv1.weight": (inner, c, 1, 1), f"{name}.conv2.weight": (inner, inner, 3, 3)}
        shapes |= {f"{name}.conv3.weight": (c, inner, 1, 1)}
        for norm, size in (("bn1", inner), ("bn2", inner), ("bn3", c), ("mlp.1", hidden), ("mlp.4", out)):
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.{norm}.{part}"] = (size,)
            shapes[f"{name}.{norm}.num_batches_tracked"] = ()
        shapes |= {f"{name}.mlp.0.weight": (hidden, c), f"{name}.mlp.0.bias": (hidden,)}
        shapes |= {f"{name}.mlp.3.weight": (out, hidden), f"{name}.mlp.3.bias": (out,)}
    c, (wide, neck, prototypes) = width * block * 8, head
    for number, (a, b) in zip((0, 2, 4), ((c, wide), (wide, wide), (wide, neck)), strict=True):
        shapes |= {f"head.mlp.{number}.weight": (b, a), f"head.mlp.{number}.bias": (b,)}
    return shapes | {"head.last_layer.weight_g": (prototypes, 1), "head.last_layer.weight_v": (prototypes, neck)}


def test_layout_of_the_published_checkpoint():
    with torch.device("meta"):
        method = SCFS(Config("scfs", SCFS.Views(), SCFS.Settings(), model=Model("resnet50")))
        backbone = torchvision.models.resnet50().state_dict()
        official = SCFS.to_official(method.state_dict())
    expected = layout(64, 4, 256, 2048, 256, (2048, 256, 65536))
    expected |= {f"backbone.model.{key}": tuple(v.shape) for key, v in backbone.items() if not key.startswith("fc.")}
    for name in ("student", "teacher"):
        shapes = {key: tuple(value.shape) for key, value in official[name].items()}
        assert shapes == {f"module.{key}": shape for key, shape in expected.items()}
    centers = {name: tuple(value["center"].shape) for name, value in official.items() if "center" in value}
    assert centers == {"dino_loss_fn": (1, 65536), **{f"dino_loss_l{tap}_fn": (1, 256) for tap in (2, 3, 4)}}


def official_file(seed: int = 3) -> dict:
    """A training file as the authors write it, with tiny widths and random values."""
    torch.manual_seed(seed)
    shapes = layout(4, 1, 6, 10, E, (16, 8, K))
    backbone = make_method().backbone.state_dict()
    shapes |= {f"backbone.model.{key}": tuple(value.shape) for key, value in backbone.items()}

    def draw(key: str, shape: tuple) -> torch.Tensor:
        if key.endswith("num_batches_tracked"):
            return torch.tensor(7)
        return torch.rand(shape) + 0.5 if "running_var" in key else torch.randn(shape) * 0.3

    networks = {
        name: {f"module.{key}": draw(key, shape) for key, shape in shapes.items()} for name in ("student", "teacher")
    }
    centers = {"dino_loss_fn": {"center": torch.randn(1, K)}}
    centers |= {f"dino_loss_l{tap}_fn": {"center": torch.randn(1, E)} for tap in (2, 3, 4)}
    return networks | centers | {"epoch": 12, "arch": "resnet50"}


def test_official_file_there_and_back():
    official, method = official_file(), make_method()
    ours = SCFS.official(official)
    method.load_state_dict(ours)
    torch.testing.assert_close(method.center_4, official["dino_loss_l4_fn"]["center"][0])
    back = SCFS.to_official(method.state_dict())
    assert back.keys() == official.keys() - {"epoch", "arch"}
    for part, values in back.items():
        assert values.keys() == official[part].keys()
        for key, value in values.items():
            assert torch.equal(value, official[part][key]), key


def test_official_file_with_new_names_of_weight_norm():
    official = official_file()
    renamed = copy.copy(official)
    for network in ("student", "teacher"):
        new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        renamed[network] = {
            key.replace("weight_g", new["weight_g"]).replace("weight_v", new["weight_v"]): value
            for key, value in official[network].items()
        }
    a, b = SCFS.official(official), SCFS.official(renamed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_forward_of_an_official_file_is_the_authors():
    """The teacher's outputs, from the file's tensors by their official names."""
    official, method = official_file(), make_method()
    method.load_state_dict(SCFS.official(official))
    method.eval()
    tensors = {key.removeprefix("module."): value for key, value in official["teacher"].items()}
    large, _ = crops(make_batch(make_config()))
    with torch.no_grad():
        seen = method.teacher([large])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x, *(tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=1e-5
        )

    for i, tap in enumerate((2, 3, 4)):
        x, name = seen.stages[0][i].map[0], f"layer{tap}_head"
        y = norm(f"{name}.bn1", F.conv2d(x, tensors[f"{name}.conv1.weight"])).relu()
        y = norm(f"{name}.bn2", F.conv2d(y, tensors[f"{name}.conv2.weight"], padding=1)).relu()
        y = (norm(f"{name}.bn3", F.conv2d(y, tensors[f"{name}.conv3.weight"])) + x).relu().mean((2, 3))
        y = norm(f"{name}.mlp.1", F.linear(y, tensors[f"{name}.mlp.0.weight"], tensors[f"{name}.mlp.0.bias"])).relu()
        y = norm(f"{name}.mlp.4", F.linear(y, tensors[f"{name}.mlp.3.weight"], tensors[f"{name}.mlp.3.bias"]))
        torch.testing.assert_close(seen.stages[0][i].out[0], F.normalize(y, dim=1), rtol=1e-4, atol=1e-5)
    x = seen.features
    for number in (0, 2, 4):
        x = F.linear(x, tensors[f"head.mlp.{number}.weight"], tensors[f"head.mlp.{number}.bias"])
        x = x if number == 4 else F.gelu(x)
    v, g = tensors["head.last_layer.weight_v"], tensors["head.last_layer.weight_g"]
    logits = F.linear(F.normalize(x, dim=-1), g * v / v.norm(dim=1, keepdim=True))
    torch.testing.assert_close(seen.logits, logits, rtol=1e-4, atol=1e-5)


def test_official_backbone_alone():
    backbone = make_method().backbone.state_dict()
    assert set(SCFS.official(backbone)) == {f"teacher.backbone.{key}" for key in backbone}


# -- configuration and pictures ---------------------------------------------------------------------------------------


def test_views_and_defaults_are_those_of_the_paper():
    global1, global2, local = view_list(METHODS["scfs"].Views())
    assert [(v.count, v.size, v.scale) for v in (global1, global2, local)] == [
        (1, 224, (0.25, 1.0)),
        (1, 224, (0.25, 1.0)),
        (8, 96, (0.05, 0.25)),
    ]
    assert [(v.blur, v.solarize) for v in (global1, global2, local)] == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    for view in (global1, global2, local):
        assert (view.flip, view.jitter, view.jitter_p, view.gray) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    s = SCFS.Settings()
    assert (s.out_dim, s.freeze_last_layer, s.warmup_teacher_temp_epochs, s.search) == (65536, 1, 50, "first")
    assert (s.stage_inner, s.stage_hidden, s.stage_out) == (256, 2048, 256)


@pytest.mark.parametrize(
    ("recipe", "batch", "epochs"), [("scfs_resnet50_200ep", 256, 200), ("scfs_resnet50_800ep", 1024, 800)]
)
def test_recipes_of_the_paper(recipe, batch, epochs):
    config, _ = parse_pretrain([f"--config=configs/imagenet/{recipe}.yaml", "--data.path=x"])
    assert (config.data.batch_size * 8, config.schedule.epochs, config.model.name) == (batch, epochs, "resnet50")
    o = config.optim
    assert (o.name, o.lr, o.lr_batch, o.min_lr, o.momentum) == ("sgd", 0.1, 256, 0.0048, 0.9)
    assert (o.weight_decay, o.weight_decay_end, o.clip_grad, o.clip_each) == (1e-4, None, 3.0, True)
    assert config.schedule.warmup_epochs == 10


@pytest.mark.parametrize(
    ("dino", "scfs", "more"),
    [("dino_resnet_tiny", "scfs", []), ("dino_resnet18", "scfs_resnet18", ["--views.local.count=4"])],
)
def test_pairs_of_recipes_differ_only_in_the_method(dino, scfs, more):
    """DINO and SCFS are compared on the same backbone, images, steps and optimizer."""
    a, _ = parse_pretrain([f"--config=configs/cifar10/{dino}.yaml", "--data.path=x", *more])
    b, _ = parse_pretrain([f"--config=configs/cifar10/{scfs}.yaml", "--data.path=x"])
    first, second = a.as_dict(), b.as_dict()
    numbers = first.pop("dino")
    assert numbers == {key: second["scfs"][key] for key in numbers}
    second.pop("scfs")
    for values in (first, second):
        values["optim"].pop("weight_decay_end")  # None and a constant are the same
        values.pop("method")
    assert first == second
    assert a.optim.weight_decay == a.optim.weight_decay_end
    assert b.optim.weight_decay_end is None


def test_taps_and_weights_come_from_the_command_line():
    arguments = ["--method=scfs", "--data.path=x", "--scfs.taps=[3,4]", "--scfs.stage_weights=[1,0.5]"]
    config, _ = parse_pretrain([*arguments, "--scfs.search=both"])
    assert (config.settings.taps, config.settings.stage_weights) == ((3, 4), (1, 0.5))
    assert config.settings.search == "both"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_out": 0}, "scfs.stage_out is 0; it must be 1 or more"),
        ({"out_dim": 0}, "scfs.out_dim is 0; it must be 1 or more"),
        ({"searched_weight": -1.0}, "scfs.searched_weight is -1.0; it must be 0 or more"),
        ({"taps": (3, 2)}, r"scfs.taps is \(3, 2\); it must be stages or blocks in ascending order, from 1 on"),
        ({"taps": (0, 2)}, r"scfs.taps is \(0, 2\); it must be"),
        ({"taps": (2, 5)}, r"scfs.taps is \(2, 5\); it must be different numbers from 1 to 4, the backbone's stages"),
        ({"model": VIT, "taps": (2, 7)}, r"scfs.taps is \(2, 7\); .* from 1 to 4, the backbone's blocks"),
        ({"model": Model("vit_tiny", 32, 8, 24, 2, 3)}, r"scfs.taps is \(1, 1, 2\)"),
        ({"stage_weights": (1.0, 1.0)}, r"scfs.stage_weights is \(1.0, 1.0\); it must be 3 positive numbers"),
        ({"taps": (4,), "stage_weights": (0.0,)}, r"scfs.stage_weights is \(0.0,\); it must be numbers, each positive"),
    ],
    ids=str,
)
def test_messages(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_method(make_config(**settings))


def test_views_that_do_not_fit():
    config = make_config()
    config.views.global2.size = 40
    with pytest.raises(ConfigError, match=r"views.global2.size is 40; it must be views.global1.size, 32"):
        SCFS(config)
    config = make_config()
    config.views.global1.count = 2
    with pytest.raises(ConfigError, match=r"views.global1.count is 2; it must be 1 with method scfs"):
        SCFS(config)
    config = make_config()
    config.views.local.count = 0
    with pytest.raises(ConfigError, match=r"views.local.count is 0; it must be 1 or more"):
        view_list(config.views)


@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_pictures_show_crops_and_their_maps(model):
    config = make_config(model)
    method = make_method(config).eval()
    batch = make_batch(config)
    with torch.no_grad():
        (sheet,) = method.pictures(batch, VALUES).values()
    picture = sheet.pictures
    assert picture.shape == (B, len(sheet.titles), 3, 32, 32)
    level = "stage 4" if model is RESNET else "block "
    assert sheet.titles[0] == "large crop"
    for m in (1, 2):
        assert sheet.titles[4 * m - 3] == f"small crop {m}"
        assert all(title.startswith(f"crop {m} in {level[:5]}") for title in sheet.titles[4 * m - 2 : 4 * m + 1])
    assert 0 <= picture.min() < picture.max() <= 1
    for m in range(3):
        first = picture[:, 1 + 4 * m]
        small = batch.views["local"][:, m]
        shrunk = F.interpolate(first, size=16, mode="area")
        similar = torch.corrcoef(torch.stack([shrunk.flatten(), small.clamp(-2, 2).flatten()]))[0, 1]
        assert similar > 0.7
