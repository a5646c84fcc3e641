"""Parameter groups, the three optimizers, clipping: against plain formulas and the literature's own code paths."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from fastssl.config import Model, Optim
from fastssl.models import build_backbone
from fastssl.models.heads import DINOHead
from fastssl.training.masters import Masters
from fastssl.training.optim import build_optimizer, clip_gradients, param_groups, set_hyperparameters


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_what_decays():
    module = nn.ModuleDict(
        {
            "vit": build_backbone(Model("vit_tiny", 32, 8, 48, 1, 3)),
            "head": DINOHead(8, 4, hidden=8, bottleneck=4),
        }
    )
    names = {id(p): name for name, p in module.named_parameters()}
    groups = {g["decay"]: {names[id(p)] for p in g["params"]} for g in param_groups(module)}
    assert {"vit.cls_token", "vit.pos_embed", "vit.patch_embed.proj.weight", "vit.blocks.0.attn.qkv.weight",
            "head.mlp.0.weight", "head.last_layer.weight_v"} <= groups[True]  # fmt: skip
    assert {"vit.norm.weight", "vit.patch_embed.proj.bias", "vit.blocks.0.norm1.bias", "head.mlp.0.bias"} <= groups[
        False
    ]
    assert not groups[True] & groups[False]
    frozen = {"head.last_layer.weight_g"}
    assert groups[True] | groups[False] == set(names.values()) - frozen


def test_hyperparameters_reach_their_groups():
    optimizer = build_optimizer(make_module(), Optim(lr=0.3, weight_decay=0.1))
    set_hyperparameters(optimizer, 0.01, 0.5)
    assert [(g["decay"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (True, 0.01, 0.5),
        (False, 0.01, 0.0),
    ]


def adamw_by_hand(p, grads, lr, decay, betas, eps):
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        p = p - lr * decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def sgd_by_hand(p, grads, lr, decay, momentum):
    m = torch.zeros_like(p)
    for g in grads:
        m = momentum * m + g + decay * p
        p = p - lr * m
    return p


def lars_by_hand(p, grads, lr, decay, momentum, adapt):
    m = torch.zeros_like(p)
    for g in grads:
        d = g + decay * p
        if adapt:
            size, change = p.square().sum().sqrt(), d.square().sum().sqrt()
            d = d * (0.001 * size / change if size > 0 and change > 0 else 1.0)
        m = momentum * m + d
        p = p - lr * m
    return p


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_three_steps_by_hand(name):
    module = make_module()
    module[2].weight.data.zero_()  # LARS: a zero matrix must still learn
    start = [p.detach().clone() for p in module.parameters()]
    optim = Optim(name=name, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), momentum=0.7)
    optimizer = build_optimizer(module, optim)
    grads = []
    for seed in range(3):
        fill_gradients(module, seed)
        grads.append([p.grad.clone() for p in module.parameters()])
        optimizer.step()
    for i, parameter in enumerate(module.parameters()):
        own, decays = [step[i] for step in grads], parameter.ndim > 1
        decay = 0.2 if decays else 0.0
        if name == "adamw":
            expected = adamw_by_hand(start[i], own, 0.1, decay, (0.8, 0.9), 1e-8)
        elif name == "sgd":
            expected = sgd_by_hand(start[i], own, 0.1, decay, 0.7)
        else:
            expected = lars_by_hand(start[i], own, 0.1, decay, 0.7, adapt=decays)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_saved_state_continues_bitwise(name):
    def walk(module, optimizer, seeds):
        for seed in seeds:
            fill_gradients(module, seed)
            set_hyperparameters(optimizer, 0.1 / (1 + seed), 0.01 * seed)
            optimizer.step()

    straight = make_module()
    walk(straight, build_optimizer(straight, Optim(name=name)), range(6))

    first = make_module()
    optimizer = build_optimizer(first, Optim(name=name))
    walk(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    second = make_module()
    continued = build_optimizer(second, Optim(name=name))
    for target, state in zip((second, continued), torch.load(file), strict=True):
        target.load_state_dict(state)
    walk(second, continued, range(3, 6))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_gradient_stays():
    for name in ("adamw", "sgd", "lars"):
        module = make_module()
        optimizer = build_optimizer(module, Optim(name=name, lr=0.1, weight_decay=0.5))
        fill_gradients(module, 0)
        module[0].weight.grad = None
        before = module[0].weight.detach().clone()
        optimizer.step()
        assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_closures_are_called(name):
    module = make_module()
    optimizer = build_optimizer(module, Optim(name=name, lr=0.1))

    def closure() -> float:
        fill_gradients(module, 0)
        return 3.0

    before = module[0].weight.detach().clone()
    assert optimizer.step(closure) == 3.0
    assert not torch.equal(module[0].weight, before)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_against_pytorch(each, max_norm):
    module, twin = make_module(), make_module()
    fill_gradients(module, 1)
    fill_gradients(twin, 1)
    module[1].bias.grad = twin[1].bias.grad = None
    if max_norm:
        for group in [[p] for p in twin.parameters()] if each else [list(twin.parameters())]:
            torch.nn.utils.clip_grad_norm_(group, max_norm)
    flat = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    total = clip_gradients(module, max_norm, each)
    torch.testing.assert_close(total, flat.norm())
    for ours, expected in zip(module.parameters(), twin.parameters(), strict=True):
        if expected.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, expected.grad)


def test_clipping_without_gradients():
    assert clip_gradients(make_module(), 1.0).item() == 0


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_clipping_inside_the_step_is_clipping_before_it(name, max_norm, each):
    module, twin = make_module(), make_module()
    ours, plain = (build_optimizer(one, Optim(name=name, lr=0.1)) for one in (module, twin))
    for seed in range(3):
        fill_gradients(module, seed)
        fill_gradients(twin, seed)
        module[1].bias.grad = twin[1].bias.grad = None
        norm = clip_gradients(twin, max_norm, each)
        torch.testing.assert_close(ours.clip(max_norm, each), norm)
        ours.step()
        plain.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_factor_of_0_leaves_a_parameter_and_its_norm_out(name):
    module, twin = make_module(), make_module()
    ours, plain = (build_optimizer(one, Optim(name=name, lr=0.1, weight_decay=0.5)) for one in (module, twin))
    for seed in range(3):
        fill_gradients(module, seed)
        fill_gradients(twin, seed)
        twin[2].weight.grad = twin[2].bias.grad = None
        norm = ours.clip(0.5, False, [(list(module[2].parameters()), torch.zeros((), dtype=torch.float64))])
        torch.testing.assert_close(norm, clip_gradients(twin, 0.5))
        ours.step()
        plain.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_teacher_follows_what_is_trained_and_what_is_not(name):
    student, teacher = make_module(), make_module()
    student[0].requires_grad_(False)
    teacher.requires_grad_(False)
    student[0].weight.data.add_(1.0)
    optimizer = build_optimizer(student, Optim(name=name, lr=0.1), averages=[(teacher, student)])
    expected = [p.clone() for p in teacher.parameters()]
    for step, momentum in enumerate((0.5, 0.9)):
        fill_gradients(student, step)
        optimizer.teacher_momentum = momentum
        optimizer.step()
        expected = [t.lerp(s, 1 - momentum) for t, s in zip(expected, student.parameters(), strict=True)]
    for found, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_working_copies_are_the_rounded_masters():
    """The masters move as float32 weights do; network and teacher see them rounded once."""
    network = nn.ModuleDict({"student": make_module().float(), "teacher": make_module().float().requires_grad_(False)})
    plain = make_module().float()
    masters = Masters(network, torch.bfloat16)
    student, teacher = network["student"], network["teacher"]
    assert [p.dtype for p in student.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2
    optim = Optim(lr=0.1, weight_decay=0.1)
    optimizer = build_optimizer(network, optim, masters, [(teacher, student)])
    other = build_optimizer(plain, optim)
    average = [p.detach().clone() for p in plain.parameters()]
    for seed in range(3):
        fill_gradients(student, seed)
        for p, q in zip(plain.parameters(), student.parameters(), strict=True):
            p.grad = q.grad.float()
        norm = other.clip(1.0, True)
        torch.testing.assert_close(optimizer.clip(1.0, True), norm)
        optimizer.teacher_momentum = 0.75
        optimizer.step()
        other.step()
        average = [a.lerp(p.detach(), 0.25) for a, p in zip(average, plain.parameters(), strict=True)]
    state = masters.state_dict()
    for (key, p), a in zip(plain.named_parameters(), average, strict=True):
        torch.testing.assert_close(state[f"student.{key}"], p.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state[f"teacher.{key}"], a, rtol=1e-6, atol=1e-7)
    for name, module in network.items():
        for key, p in module.named_parameters():
            assert torch.equal(p, state[f"{name}.{key}"].to(p.dtype)), key
    fresh = nn.ModuleDict({"student": make_module().float(), "teacher": make_module().float()})
    again = Masters(fresh, torch.bfloat16)
    again.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_of_gradients_that_are_not_finite_is_left_out(name):
    """With PyTorch's own GradScaler, as in the loop."""
    module, scaler = make_module().float(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = build_optimizer(module, Optim(name=name, lr=0.1))
    before = [p.detach().clone() for p in module.parameters()]
    for broken in (True, False):
        scaler.scale(module(torch.ones(2, 4)).square().sum()).backward()
        if broken:
            module[0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        optimizer.clip(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 4.0
        kept = [torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]
        assert all(kept) if broken else not any(kept)
        assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("rest", [1, 40])
def test_corrections_begin_when_a_parameter_begins_to_move(rest):
    """DINO's prototypes rest for an epoch: their first steps are then as long as torch.optim.AdamW's first steps."""
    module, twin = make_module(), make_module()
    optim = Optim(lr=0.01, weight_decay=0.1, betas=(0.9, 0.999))
    ours = build_optimizer(module, optim)
    plain = torch.optim.AdamW(param_groups(twin), lr=0.01, betas=(0.9, 0.999), eps=optim.eps)
    for group in plain.param_groups:
        group["weight_decay"] = 0.1 if group["decay"] else 0.0
    for step in range(rest + 6):
        if step == rest + 3:  # a resumed run knows how many steps each has taken
            state = io.BytesIO()
            torch.save(ours.state_dict(), state)
            state.seek(0)
            ours = build_optimizer(module, optim)
            ours.load_state_dict(torch.load(state, weights_only=True))
        fill_gradients(module, step)
        fill_gradients(twin, step)
        learn = torch.tensor(float(step >= rest), dtype=torch.float64)
        if step < rest:
            twin[2].weight.grad = None
        ours.clip(0.0, False, [([module[2].weight], learn)])
        ours.step()
        plain.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_that_were_left_out_do_not_count():
    module, twin = make_module().float(), make_module().float()
    ours, plain = (build_optimizer(one, Optim(lr=0.01)) for one in (module, twin))
    for step, broken in enumerate((True, True, False, True, False)):
        fill_gradients(module, step)
        ours.found_inf = torch.tensor(float(broken))
        ours.step()
        del ours.found_inf
        if not broken:
            fill_gradients(twin, step)
            plain.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lars_keeps_the_sums_of_a_resting_parameter():
    module = make_module()
    optimizer = build_optimizer(module, Optim(name="lars", lr=0.1, weight_decay=0.5))
    fill_gradients(module, 0)
    optimizer.step()
    before = optimizer.state[module[2].weight]["momentum"].clone()
    fill_gradients(module, 1)
    optimizer.clip(0.0, False, [([module[2].weight], torch.zeros((), dtype=torch.float64))])
    optimizer.step()
    assert torch.equal(optimizer.state[module[2].weight]["momentum"], before)
