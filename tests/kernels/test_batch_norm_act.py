"""Batch norm, residual sum and ReLU: against the float64 reference, PyTorch's modules, and by its properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.batch_norm_act import Running, batch_norm_act, kernel

FP32, BF16 = torch.float32, torch.bfloat16


def given(device="cpu", last=True, pair=True, residual=True, **changes):
    torch.manual_seed(0)
    shapes = [(3, 12, 4, 5), (2, 12, 3, 3)] if pair else [(3, 12, 4, 5)]
    form = torch.channels_last if last else torch.contiguous_format
    maps = [[torch.randn(s, device=device).contiguous(memory_format=form) for s in shapes] for _ in range(2)]
    running = Running(torch.zeros(12, device=device), torch.ones(12, device=device), torch.tensor(3).to(device), 0.1)
    inputs = {
        "xs": maps[0], "residuals": maps[1] if residual else None, "weight": torch.randn(12, device=device),
        "bias": torch.randn(12, device=device), "running": running, "eps": 1e-5, "relu": True, "together": False,
    }  # fmt: skip
    return inputs | changes


@pytest.mark.parametrize("last", [True, False])
def test_value_by_value(path, last, device):
    inputs = given(device, last)
    with forced(path):
        ys = batch_norm_act(**inputs)
    for x, residual, y in zip(inputs["xs"], inputs["residuals"], ys, strict=True):
        for c in range(12):
            values = x[:, c].flatten().tolist()
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / len(values) + 1e-5) ** 0.5
            weight, bias = inputs["weight"][c].item(), inputs["bias"][c].item()
            pairs = zip(values, residual[:, c].flatten().tolist(), strict=True)
            wanted = [max((v - mean) / deviation * weight + bias + more, 0.0) for v, more in pairs]
            torch.testing.assert_close(y[:, c].flatten().tolist(), wanted, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_those_of_pytorchs_module_after_each_group(path, device):
    inputs = given(device, relu=False, residual=False)
    norm = nn.BatchNorm2d(12).to(device)
    norm.num_batches_tracked.fill_(3)
    for x in inputs["xs"]:
        norm(x)
    with forced(path):
        batch_norm_act(**inputs)
    running = inputs["running"]
    torch.testing.assert_close(running.mean, norm.running_mean)
    torch.testing.assert_close(running.var, norm.running_var)
    assert running.batches == norm.num_batches_tracked == 5


@pytest.mark.parametrize("last", [True, False])
def test_two_groups_give_the_bits_of_each_alone_and_the_sum_of_their_gradients(last, device):
    with forced("triton"):
        inputs = given(device, last)
        leaves = [inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()]
        both = batch_norm_act(**inputs)
        gradients = torch.autograd.grad(sum(y.square().sum() for y in both), leaves)
        alone, parts = [], []
        for i in range(2):
            one = {name: [inputs[name][i]] for name in ("xs", "residuals")}
            alone += batch_norm_act(**{**inputs, **one, "running": None})
            parts.append(torch.autograd.grad(alone[-1].square().sum(), leaves))
    assert all(torch.equal(y, other) for y, other in zip(both, alone, strict=True))
    for gradient, first, second in zip(gradients, *parts, strict=True):
        torch.testing.assert_close(gradient, first + second)


@pytest.mark.parametrize("last", [True, False])
def test_outputs_and_gradients_have_the_memory_format(last, device):
    form = torch.channels_last if last else torch.contiguous_format
    inputs = given(device, last)
    leaves = [x.requires_grad_() for x in inputs["xs"] + inputs["residuals"]]
    with forced("triton"):
        ys = batch_norm_act(**inputs)
        upstream = [torch.randn(y.shape, device=device) for y in ys]  # of one format, whatever that of the outputs
        gradients = torch.autograd.grad(ys, leaves, upstream)
    assert all(x.is_contiguous(memory_format=form) for x in [*ys, *gradients])


def test_two_launches_each_way(device):
    inputs = given(device)
    for x in inputs["xs"]:
        x.requires_grad_()
    with forced("triton"), _launch.record() as launches:
        sum(y.sum() for y in batch_norm_act(**inputs)).backward()
    names = [kernel.__name__ for kernel, *_ in launches]
    assert names == ["_moments", "_normalise", "_sums", "_differentiate_values"]


def test_a_group_that_is_not_used_has_no_gradient_but_its_parameters_do(device):
    inputs = given(device)
    for x in (*inputs["xs"], inputs["weight"]):
        x.requires_grad_()
    with forced("triton"):
        first, _ = batch_norm_act(**inputs)
        first.sum().backward()
    assert inputs["xs"][1].grad.eq(0).all()
    assert inputs["weight"].grad.abs().max() > 0


def test_many_parts_are_merged_in_one_order(device, monkeypatch):
    """Programs of one block each: 79 parts, of which a program reads 64 at once."""
    monkeypatch.setattr(kernel, "LEAST", 1)
    torch.manual_seed(0)
    x = 100 + torch.randn(20_000, 16, device=device)
    inputs = given(device, xs=[x], residuals=None, relu=False, weight=None, bias=None, running=None)
    with forced("triton"):
        (y,), (again,) = batch_norm_act(**inputs), batch_norm_act(**inputs)
    assert torch.equal(y, again)
    exact = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-5)


def test_nan_shows_in_its_channel_alone(path, device):
    inputs = given(device)
    inputs["xs"][0][1, 3, 0, 0] = torch.nan
    with forced(path):
        y, other = batch_norm_act(**inputs)
    assert y[:, 3].isnan().all()
    assert not y[:, 4:].isnan().any()
    assert not other.isnan().any()


def test_compiles_without_a_graph_break(device, compiles_whole):
    inputs = given(device)
    buffers = [v.clone() for v in (inputs["running"].mean, inputs["running"].var, inputs["running"].batches)]

    def step(first, second, residual, weight, bias):
        residuals = [residual, inputs["residuals"][1]]
        given = {"xs": [first, second], "residuals": residuals, "weight": weight, "bias": bias}
        ys = batch_norm_act(**{**inputs, **given})
        return torch.cat([y.flatten() for y in ys])

    leaves = [*inputs["xs"], inputs["residuals"][0], inputs["weight"], inputs["bias"]]
    compiles_whole(step, *(leaf.requires_grad_() for leaf in leaves))
    running, moved = inputs["running"], Running(*buffers, 0.1)
    with forced("triton"), torch.no_grad():
        for _ in range(2):  # as often as the check has called it
            batch_norm_act(**{**inputs, "running": moved})
    assert running.batches == moved.batches == 7
    torch.testing.assert_close(running.mean, moved.mean)
    torch.testing.assert_close(running.var, moved.var)


# -- several processes ------------------------------------------------------------------------------------------------

SHARES = [(2, 2), (1, 3), (0, 4)]


def norm_of_share(rank, shares):
    """Outputs, gradients of values, gradients of weight and bias (of this process alone), running statistics."""
    torch.manual_seed(4)
    groups = [torch.randn(4, 5, 3, 2) + 1, torch.randn(4, 5, 2, 2)]
    residuals, upstream = ([torch.randn_like(x) for x in groups] for _ in range(2))
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    xs, residuals, upstream = ([x[mine].clone() for x in values] for values in (groups, residuals, upstream))
    leaves = [x.requires_grad_() for x in (*xs, *residuals, torch.rand(5) + 0.5, torch.randn(5))]
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)
    with forced("triton"):
        ys = batch_norm_act(xs, residuals, *leaves[4:], running, 1e-5, True, len(shares) > 1)
        gradients = torch.autograd.grad(ys, leaves, upstream)
    return [*(y.detach() for y in ys), *gradients[:4]], gradients[4:], [running.mean, running.var, running.batches]


def on_all_shares(rank):
    return [norm_of_share(rank, shares) for shares in SHARES]


def test_two_processes_give_what_one_gives(on_processes):
    maps, vectors, running = norm_of_share(0, (4,))
    for one, other in zip(*on_processes(2, on_all_shares), strict=True):
        for whole, *parts in zip(maps, one[0], other[0], strict=True):
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
        for whole, *parts in zip(vectors, one[1], other[1], strict=True):
            torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)
        for found in (one[2], other[2]):
            torch.testing.assert_close(found, running)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": [torch.zeros(2, 4, 3)]}, r"x must be \[B, C, H, W\], not \[2, 4, 3\]"),
        ({"residuals": [torch.zeros(2, 4, 3, 2)]}, r"residual must be \[B, C, H, W\] with .* not \[2, 4, 3, 2\]"),
        ({"residuals": [torch.zeros(2, 4, 3, 3).half()]}, "residual must be float32, not float16"),
        ({"xs": [torch.zeros(2, 4, 3, 3)] * 3}, "xs must be one or two groups, not 3"),
        ({"bias": None}, "weight must be given together with bias, not one of them alone"),
        ({"weight": torch.ones(3)}, r"weight must be \[C\] with C = 4, not \[3\]"),
        ({"together": True}, "together must be False without the kernel, not True"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {"xs": [torch.zeros(2, 4, 3, 3)], "residuals": None, "weight": torch.ones(4), "bias": torch.zeros(4)}
    with forced("reference"), pytest.raises(KernelError, match=f"batch_norm_act: {message}"):
        batch_norm_act(**{**inputs, "running": None, "eps": 1e-5, "relu": False, "together": False, **change})
