"""DINO: the loss against its nested loop, the centre, the teacher, what learns and what does not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import finish_step

from fastssl.batch import Batch
from fastssl.config import Config, ConfigError, Model
from fastssl.kernels.centering_softmax_loss import centering_softmax_loss
from fastssl.methods import METHODS, view_list
from fastssl.methods import dino as module
from fastssl.methods.dino import DINO, update_center
from fastssl.parse import parse_pretrain
from fastssl.pictures import heat, to_picture
from fastssl.step import Values
from fastssl.training.optim import build_optimizer
from fastssl.training.timing import Stopwatch

B, K = 4, 32
RECIPE = Path(__file__).parents[2] / "configs/imagenet/dino_vit_small.yaml"


def make_config(model: Model | None = None, large: int = 32, small: int = 16, **settings) -> Config:
    views = DINO.Views()
    views.global1.size = views.global2.size = large
    views.local.size, views.local.count = small, 3
    numbers = {"out_dim": K, "head_hidden": 16, "head_bottleneck": 8, **settings}
    return Config("dino", views, DINO.Settings(**numbers), model=model or Model("vit_tiny", 32, 8, 48, 2, 3))


def make_batch(config: Config, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {v.name: torch.randn(B, v.count, 3, v.size, v.size, generator=generator) for v in view_list(config.views)}
    return Batch(torch.arange(B), torch.full((B,), -1), views=views)


def make_method(config: Config | None = None) -> DINO:
    torch.manual_seed(0)
    return DINO(config or make_config())


def logits(dtype=torch.float64, views: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student = torch.randn(views, B, K, dtype=dtype, requires_grad=True)
    return student, torch.randn(2, B, K, dtype=dtype), torch.randn(K, dtype=dtype) / 2


def dino_loss(*arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The op that the method calls: loss, entropy and divergence."""
    result = centering_softmax_loss(*arguments)
    return result.loss, {"entropy": result.entropy, "divergence": result.divergence}


def nested_loop(student, teacher, center, student_temp, teacher_temp):
    """Equation 3, image by image and pair by pair."""
    total = 0.0
    for t in range(len(teacher)):
        for v in range(len(student)):
            if v == t:
                continue
            for b in range(student.shape[1]):
                q = ((teacher[t, b] - center) / teacher_temp).exp()
                q = q / q.sum()
                p = (student[v, b] / student_temp).exp()
                total = total - (q * (p / p.sum()).log()).sum() / student.shape[1]
    return total / (len(teacher) * len(student) - len(teacher))


@pytest.mark.parametrize("views", [2, 3, 10])
def test_loss_and_gradient_against_the_nested_loop(views):
    student, teacher, center = logits(views=views)
    loss, _ = dino_loss(student, teacher, center, 0.1, 0.04)
    (grad,) = torch.autograd.grad(loss * 1.7, student)
    expected = nested_loop(student, teacher, center, 0.1, 0.04)
    (expected_grad,) = torch.autograd.grad(expected * 1.7, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_bfloat16_logits_lose_nothing_more():
    student, teacher, center = (x.detach().bfloat16() for x in logits())
    loss, metrics = dino_loss(student, teacher, center, 0.1, 0.04)
    exact, exact_metrics = dino_loss(student.double(), teacher.double(), center.double(), 0.1, 0.04)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for key, value in metrics.items():
        torch.testing.assert_close(value.double(), exact_metrics[key], rtol=1e-4, atol=1e-5)


def test_metrics_of_the_loss():
    student, teacher, center = logits()
    loss, metrics = dino_loss(student, teacher, center, 0.1, 0.04)
    q = ((teacher - center) / 0.04).softmax(-1)
    entropy = -(q * q.log()).nan_to_num().sum(-1).mean()
    torch.testing.assert_close(metrics["entropy"], entropy)
    torch.testing.assert_close(metrics["divergence"], loss.detach() - entropy)
    assert not any(value.requires_grad for value in metrics.values())


def test_order_of_images_and_of_the_large_crops_does_not_matter():
    student, teacher, center = logits()
    loss, _ = dino_loss(student, teacher, center, 0.1, 0.04)
    order = torch.randperm(B)
    shuffled, _ = dino_loss(student[:, order], teacher[:, order], center, 0.1, 0.04)
    torch.testing.assert_close(shuffled, loss)
    swapped, _ = dino_loss(student[[1, 0, 2, 3, 4]], teacher.flip(0), center, 0.1, 0.04)
    torch.testing.assert_close(swapped, loss)


def test_a_crop_is_not_compared_with_itself():
    student, teacher, center = logits(views=2)
    loss, _ = dino_loss(student, teacher, center, 0.1, 0.04)
    (grad,) = torch.autograd.grad(loss, student)
    teacher[0] += torch.randn(B, K)
    loss, _ = dino_loss(student, teacher, center, 0.1, 0.04)
    (other,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(other[0], grad[0])
    assert not torch.allclose(other[1], grad[1])


def test_constant_student_gives_ln_k():
    _, teacher, center = logits()
    loss, _ = dino_loss(torch.zeros(5, B, K, dtype=torch.float64), teacher, center, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(K), abs=1e-12)
    assert make_method().chance_loss == pytest.approx(math.log(K))


def test_centre_is_the_moving_mean():
    _, teacher, center = logits()
    means = [sum(teacher[t, b, k].item() for t in range(2) for b in range(B)) / (2 * B) for k in range(K)]
    expected = [0.9 * old + 0.1 * mean for old, mean in zip(center.tolist(), means, strict=True)]
    update_center(center, teacher.sum((0, 1)), 2 * B, 0.9)
    assert center.tolist() == pytest.approx(expected, abs=1e-12)


def test_centre_takes_the_mean_over_processes(monkeypatch):
    _, teacher, center = logits()
    other = torch.randn(2, B, K, dtype=torch.float64)
    both = center.clone()
    update_center(both, (teacher + other).sum((0, 1)), 4 * B, 0.9)
    monkeypatch.setattr(module.distributed, "all_reduce_mean", lambda mean: (mean + other.mean((0, 1))) / 2)
    update_center(center, teacher.sum((0, 1)), 2 * B, 0.9)
    torch.testing.assert_close(center, both)


def test_a_step_uses_the_centre_and_then_moves_it():
    method = make_method()
    batch = make_batch(make_config())
    large = [batch.views["global1"], batch.views["global2"]]
    with torch.no_grad():
        _, student = method.student([*large, batch.views["local"]])
        _, teacher = method.teacher(large)
    for step, temp in ((0, 0.04), (40, 0.07)):
        before = method.center.clone()
        out = method(batch, Values(step, 100, 1))
        expected, metrics = dino_loss(student, teacher, before, 0.1, temp)
        torch.testing.assert_close(out.loss.detach(), expected)
        torch.testing.assert_close(method.center, 0.9 * before + 0.1 * teacher.mean((0, 1)))
        torch.testing.assert_close(out.metrics["teacher_entropy"], metrics["entropy"] / math.log(K))
        torch.testing.assert_close(out.metrics["teacher_student_kl"], metrics["divergence"])
    method.eval()
    before = method.center.clone()
    method(batch, Values(0, 100, 1))
    assert torch.equal(method.center, before)


def test_temperature_rises_epoch_by_epoch(monkeypatch):
    seen = []
    original = module.centering_softmax_loss
    monkeypatch.setattr(module, "centering_softmax_loss", lambda *a: seen.append(a[4]) or original(*a))
    config = make_config(warmup_teacher_temp_epochs=50)
    method = make_method(config)
    for epoch in (0, 1, 49, 50, 99):
        method(make_batch(config), Values(epoch * 10 + 3, 1000, 10))
    assert seen == pytest.approx([0.04, 0.0406122, 0.07, 0.07, 0.07], abs=1e-6)


def test_crops_of_all_groups_in_order():
    method = make_method().eval()
    batch = make_batch(make_config())
    features, out = method.student([batch.views[name] for name in ("global1", "global2", "local")])
    crops = [batch.views["global1"][:, 0], batch.views["global2"][:, 0], *batch.views["local"].unbind(1)]
    assert len(features) == len(crops) == 5
    for v, crop in enumerate(crops):
        torch.testing.assert_close(features[v], method.student.backbone(crop), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[v], method.student.head(method.student.backbone(crop)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_every_trainable_parameter_learns_and_the_teacher_does_not(name):
    model = None if name == "vit" else Model("resnet18", small_images=True)
    method = make_method(make_config(model, norm_last_layer=False))
    method(make_batch(make_config()), Values(0, 10, 10)).loss.backward()
    for key, parameter in method.named_parameters():
        if key.startswith("teacher."):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, key


def test_prototypes_rest_in_the_first_epochs():
    method = make_method(make_config(freeze_last_layer=2))
    optimizer = build_optimizer(method, make_config().optim)
    moved = []
    for epoch in range(4):
        values = Values(epoch, 4, 1)
        before = method.student.head.last_layer.weight_v.clone()
        method(make_batch(make_config()), values).loss.backward()
        finish_step(method, optimizer, values)
        moved.append(not torch.equal(method.student.head.last_layer.weight_v, before))
    assert moved == [False, False, True, True]
    assert method.student.head.last_layer.weight_g.eq(1).all()


def test_teacher_is_the_moving_average():
    method = make_method()
    for parameter in method.student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    pairs = list(zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    before = [(t.clone(), s.clone()) for t, s in pairs]
    values = Values(25, 100, 10)
    momentum = 1 - 0.004 * (1 + math.cos(math.pi * 0.25)) / 2
    assert method.momentum(values) == pytest.approx(momentum, abs=1e-12)
    finish_step(method, build_optimizer(method, make_config().optim, averages=method.averages()), values)
    for (teacher, student), (old_teacher, old_student) in zip(pairs, before, strict=True):
        assert torch.equal(student, old_student)
        torch.testing.assert_close(teacher, old_teacher.lerp(old_student, 1 - momentum), rtol=0, atol=1e-7)
    assert method.momentum(Values(0, 100, 10)) == pytest.approx(0.996)
    assert method.momentum(Values(100, 100, 10)) == 1


def test_the_average_may_end_below_1():
    method = make_method(make_config(momentum_teacher=0.99, momentum_teacher_end=0.99))
    assert [method.momentum(Values(step, 100, 10)) for step in (0, 50, 100)] == pytest.approx([0.99] * 3)


def test_teacher_starts_as_the_student_without_drop_path():
    model = Model("vit_tiny", 32, 8, 48, 2, 3, drop_path=0.5)
    method = make_method(make_config(model))
    for key, value in method.student.state_dict().items():
        assert torch.equal(method.teacher.state_dict()[key], value)
    rates = [
        [m.drop_prob for m in network.modules() if hasattr(m, "drop_prob")]
        for network in (method.student, method.teacher)
    ]
    assert rates == [[0.5, 0.5], []]
    assert method.backbone is method.teacher.backbone


def test_without_small_crops():
    config = make_config(head_layers=2)
    config.views.local.count = 0
    batch = make_batch(config)
    assert list(batch.views) == ["global1", "global2"]
    method = make_method(config)
    assert len(method.student.head.mlp) == 3  # linear, GELU, linear
    _, student = method.student(list(batch.views.values()))
    _, teacher = method.teacher(list(batch.views.values()))
    out = method(batch, Values(0, 10, 1))
    torch.testing.assert_close(out.loss, nested_loop(student, teacher, torch.zeros(K), 0.1, 0.04))
    config.views.global1.count = 0
    with pytest.raises(ConfigError, match=r"views.global1.count is 0; it must be 1 or more"):
        view_list(config.views)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_pictures_show_where_the_teacher_looks(name):
    config = make_config(None if name == "vit" else Model("resnet18", width=4, small_images=True))
    method, batch = make_method(config).eval(), make_batch(config)
    with torch.no_grad():
        (sheet,) = method.pictures(batch, Values(0, 10, 1)).values()
        looks = [module.attention(method.teacher.backbone, batch.views[f"global{i}"][:, 0]) for i in (1, 2)]
    picture = sheet.pictures
    assert picture.shape == (B, len(sheet.titles), 3, 32, 32) == (B, 4, 3, 32, 32)
    assert ("attention" in sheet.legend[0][1]) == (name == "vit")
    for column, view in ((0, "global1"), (2, "global2")):
        torch.testing.assert_close(picture[:, column], to_picture(batch.views[view][:, 0]))
        torch.testing.assert_close(picture[:, column + 1], heat(picture[:, column], looks[column // 2]))


def test_attention_is_that_of_the_last_block():
    method, captured = make_method().eval(), []
    backbone = method.teacher.backbone
    images = make_batch(make_config()).views["global1"][:, 0]
    last = backbone.blocks[-1].attn
    last.register_forward_hook(lambda _, inputs, __: captured.append(inputs[0]))
    with torch.no_grad():
        got = module.attention(backbone, images)
        backbone(images)
        q, k, _ = last.qkv(captured[0]).unflatten(-1, (3, 3, 16)).unbind(2)  # [B, 1+N, heads, 16]
    for b in range(B):
        heads = [(q[b, 0, h] @ k[b, :, h].T / 16**0.5).softmax(-1)[1:] for h in range(3)]
        torch.testing.assert_close(got[b].flatten(), sum(heads) / 3)


def test_the_step_names_its_parts():
    watch = Stopwatch(torch.device("cpu"))
    method, batch = make_method(), make_batch(make_config())
    with watch.listening():
        method(batch, Values(0, 10, 1))
    assert list(watch.read()) == ["student", "teacher", "loss"]


def test_backbone_stands_under_its_prefix():
    method = make_method()
    ours = {key for key in method.state_dict() if key.startswith(method.backbone_prefix)}
    assert ours == {method.backbone_prefix + key for key in method.backbone.state_dict()}


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_official_checkpoint_round_trip(wrapped):
    method = make_method()
    state = method.state_dict()
    official = {
        name: {wrapped + key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(name)}
        for name in ("student", "teacher")
    }
    official |= {"dino_loss": {"center": torch.randn(1, K)}, "epoch": 100}
    other = make_method(make_config())
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(DINO.official(official))
    for key, value in state.items():
        expected = official["dino_loss"]["center"][0] if key == "center" else value
        assert torch.equal(other.state_dict()[key], expected), key


def test_official_there_and_back():
    state = make_method().state_dict()
    state["center"] = torch.randn(K)
    official = DINO.to_official(state)
    assert set(official) == {"student", "teacher", "dino_loss"}
    assert all(key.startswith("module.") for key in official["student"])
    assert {"backbone.cls_token", "head.last_layer.weight_g", "head.mlp.4.bias"} <= set(official["teacher"])
    assert official["dino_loss"]["center"].shape == (1, K)
    back = DINO.official(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_official_backbone_alone():
    backbone = make_method().backbone.state_dict()
    assert set(DINO.official(backbone)) == {f"teacher.backbone.{key}" for key in backbone}


def test_views_are_those_of_the_paper():
    global1, global2, local = view_list(METHODS["dino"].Views())
    assert [v.name for v in (global1, global2, local)] == ["global1", "global2", "local"]
    assert [(v.count, v.size, v.scale) for v in (global1, global2, local)] == [
        (1, 224, (0.4, 1.0)),
        (1, 224, (0.4, 1.0)),
        (8, 96, (0.05, 0.4)),
    ]
    assert [(v.blur, v.solarize) for v in (global1, global2, local)] == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    for view in (global1, global2, local):
        assert (view.flip, view.jitter, view.jitter_p, view.gray) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_dim": 0}, "dino.out_dim is 0; it must be 1 or more"),
        ({"teacher_temp": 0.0}, "dino.teacher_temp is 0.0; it must be positive"),
        ({"momentum_teacher": 1.1}, "dino.momentum_teacher is 1.1; it must be from 0 to 1"),
        ({"freeze_last_layer": -1}, "dino.freeze_last_layer is -1"),
    ],
    ids=str,
)
def test_messages(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_crop_that_the_patch_does_not_divide():
    with pytest.raises(ConfigError, match=r"views.local.size is 20; it must be a multiple of model.patch_size, 8"):
        make_method(make_config(small=20))


@pytest.mark.parametrize(
    ("epochs", "expected"), [(0, [0.07] * 4), (1, [0.04, 0.07, 0.07, 0.07]), (3, [0.04, 0.055, 0.07, 0.07])]
)
def test_the_teachers_temperature_rises_over_its_epochs_as_the_authors(epochs, expected):
    """numpy.linspace(0.04, 0.07, epochs), then 0.07: with one epoch it has the first temperature alone."""
    method = make_method(make_config(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=epochs))
    assert [method.teacher_temp(Values(epoch * 5, 100, 5)) for epoch in range(4)] == pytest.approx(expected)


def test_the_recipes_temperature_is_that_of_the_authors_command():
    config = parse_pretrain([f"--config={RECIPE}", "--data.path=x"])[0]
    method = SimpleNamespace(settings=config.settings)
    assert [DINO.teacher_temp(method, Values(epoch, 100, 1)) for epoch in (0, 1, 30, 99)] == [0.04] * 4
