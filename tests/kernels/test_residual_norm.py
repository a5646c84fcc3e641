"""Residual sum and layer norm: against the float64 reference, PyTorch's modules, row by row, and by its properties."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import LayerScale
from torch import nn

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.residual_norm import kernel, residual_add, residual_norm

FP32, BF16 = torch.float32, torch.bfloat16


def given(device="cpu", B=3, N=4, D=20, **changes):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(B, N, D, device=device), "branch": torch.randn(B, N, D, device=device),
        "gain": torch.randn(D, device=device), "keep": torch.tensor([0.0, 1.0, 1.25], device=device)[:B],
        "weight": torch.randn(D, device=device), "bias": torch.randn(D, device=device), "eps": 1e-6,
        "out_dtype": FP32,
    }  # fmt: skip
    return inputs | changes


def test_row_by_row(path, device):
    inputs = given(device, shift=torch.randn(20, device=device))
    made = inputs["branch"] + inputs["shift"]
    with forced(path):
        total, normed = residual_norm(**inputs)
    for b in range(3):
        for n in range(4):
            row = [
                (inputs["x"][b, n, d] + inputs["keep"][b] * inputs["gain"][d] * made[b, n, d]).item() for d in range(20)
            ]
            mean = sum(row) / 20
            deviation = (sum((v - mean) ** 2 for v in row) / 20 + 1e-6) ** 0.5
            wanted = torch.tensor([(v - mean) / deviation for v in row], device=device)
            torch.testing.assert_close(total[b, n], torch.tensor(row, device=device))
            torch.testing.assert_close(normed[b, n], wanted * inputs["weight"] + inputs["bias"])


def test_the_plain_path_gives_the_bits_of_timms_modules():
    """On the CPU, the sum of a layer scale and a drop path and the norm of it."""
    inputs = given()
    scale, norm = LayerScale(20), nn.LayerNorm(20, eps=1e-6)
    with torch.no_grad():
        for parameter, name in ((scale.gamma, "gain"), (norm.weight, "weight"), (norm.bias, "bias")):
            parameter.copy_(inputs[name])
        drop = DropPath(0.3).train()
        torch.manual_seed(5)
        expected = inputs["x"] + drop(scale(inputs["branch"]))
        torch.manual_seed(5)
        inputs["keep"] = torch.empty(3, 1, 1).bernoulli_(0.7).div_(0.7).flatten()
        total, normed = residual_norm(**inputs)
        assert torch.equal(total, expected)
        assert torch.equal(normed, norm(expected))


def test_on_the_plain_path_a_shift_is_the_layers_bias_bit_by_bit():
    inputs, linear, y = given(), nn.Linear(20, 20), torch.randn(3, 4, 20)
    leaves = [linear.weight, linear.bias, inputs["gain"].requires_grad_()]
    results = []
    for branch, shift in ((linear(y), None), (F.linear(y, linear.weight), linear.bias)):
        total, normed = residual_norm(**inputs | {"branch": branch, "shift": shift})
        results.append([total, normed, *torch.autograd.grad(total.sin().sum() + normed.cos().sum(), leaves)])
    for apart, joined in zip(*results, strict=True):
        assert torch.equal(joined, apart)


@pytest.mark.parametrize("short", [True, False])
def test_a_shift_of_another_type(path, short, device):
    """The bias of a working copy, or a float32 one under autocast: added as it is, its gradient of its type."""
    shift, branch = torch.randn(20, device=device), torch.randn(3, 4, 20, device=device)
    if not short:
        branch = branch.to(BF16)
    else:
        shift = shift.to(BF16)
    shift.requires_grad_()
    inputs = given(device, branch=branch, shift=shift)
    with forced(path), torch.autocast(device, BF16):
        total, _ = residual_norm(**inputs)
        assert torch.equal(residual_add(**{k: inputs[k] for k in ("x", "branch", "gain", "keep", "shift")}), total)
    made = inputs["gain"] * (branch.float() + shift.float()) * inputs["keep"][:, None, None]
    torch.testing.assert_close(total, inputs["x"] + made)
    upstream = torch.randn_like(total)
    (found,) = torch.autograd.grad(total, shift, upstream)
    assert found.dtype == shift.dtype
    wanted = (upstream * inputs["keep"][:, None, None] * inputs["gain"]).sum((0, 1))
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7 if short else 1e-5, atol=1e-5)


def test_types_of_the_outputs(path, device):
    short = {"branch": torch.randn(3, 4, 20, device=device).to(BF16), "out_dtype": BF16}
    with forced(path), torch.autocast(device, BF16):
        total, normed = residual_norm(**given(device, **short))
        assert (total.dtype, normed.dtype) == (FP32, BF16)
        inputs = given(device, **short, x=torch.randn(3, 4, 20, device=device).to(BF16))
        total, normed = residual_norm(**inputs)
    assert (total.dtype, normed.dtype) == (BF16, BF16)
    norm = F.layer_norm(total.float(), (20,), inputs["weight"], inputs["bias"], 1e-6)  # of the sum as it is stored
    torch.testing.assert_close(normed, norm.to(BF16), rtol=2**-7, atol=1e-3)


def test_without_a_branch_the_sum_is_x_itself(path, device):
    inputs = given(device, branch=None, gain=None, keep=None)
    with forced(path):
        total, normed = residual_norm(**inputs)
    assert total is inputs["x"]
    norm = F.layer_norm(total, (20,), inputs["weight"], inputs["bias"], 1e-6)
    torch.testing.assert_close(normed, norm)


def test_the_sum_alone(path, device):
    inputs = given(device)
    with forced(path):
        total, _ = residual_norm(**inputs)
        inputs = {name: inputs[name] for name in ("x", "branch", "gain", "keep")}
        assert torch.equal(residual_add(**inputs), total)
        assert residual_add(**inputs | {"x": inputs["x"].to(BF16)}).dtype == BF16


def test_launches_of_the_sum_alone():
    """One each way, and another for gain and shift together."""
    ones = torch.ones(20, requires_grad=True)
    for gain, shift, wanted in ((None, None, 2), (ones, None, 3), (None, ones, 3), (ones, ones, 3)):
        inputs = given(gain=gain)
        with _launch.record() as launches, forced("triton"):
            residual_add(inputs["x"].requires_grad_(), inputs["branch"], gain, inputs["keep"], shift).sum().backward()
        assert len(launches) == wanted


def test_a_dropped_branch_has_no_part_in_anything(path, device):
    inputs = given(device, shift=torch.ones(20, device=device))
    leaf = inputs["branch"].requires_grad_()
    gain = inputs["gain"].requires_grad_()
    with forced(path):
        total, normed = residual_norm(**inputs)
        slope, gain_slope = torch.autograd.grad(total.square().sum() + normed.square().sum(), [leaf, gain])
        other = inputs | {"branch": leaf.detach().clone()}
        other["branch"][0] += 7
        again, _ = residual_norm(**other)
    assert torch.equal(total[0], inputs["x"][0])
    assert torch.equal(again, total)
    assert not slope[0].any()
    assert slope[1:].abs().min() > 0
    assert gain_slope.abs().min() > 0


@pytest.mark.parametrize("used", ["sum", "norm"])
@pytest.mark.parametrize("branch", [True, False])
def test_gradients_where_one_output_is_not_used(used, branch, device):
    shift = {"shift": torch.randn(20, device=device)}
    inputs = given(device, **shift) if branch else given(device, branch=None, gain=None, keep=None)
    leaves = [v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "keep"]
    grads = {}
    for path in ("reference", "triton"):
        with forced(path):
            output = residual_norm(**inputs)[used == "norm"]
            grads[path] = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
    for ours, expected in zip(grads["triton"], grads["reference"], strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        else:
            assert ours is None or not ours.any()


def test_a_branch_without_gradient(device):
    inputs = given(device, shift=torch.randn(20, device=device))
    leaves = [inputs[name].requires_grad_() for name in ("x", "gain", "weight", "bias", "shift")]
    grads = []
    for path in ("reference", "triton"):
        with forced(path):
            total, normed = residual_norm(**inputs)
            grads.append(torch.autograd.grad((total * normed).sum(), leaves))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_many_programs_add_up_the_same_way_every_time(device, monkeypatch):
    """Parts of several programs, the last with fewer rows; two runs give the same bits."""
    monkeypatch.setattr(kernel, "ROWS", 3)
    inputs = given(device, N=7, shift=torch.randn(20, device=device))
    leaves = [inputs[name].requires_grad_() for name in ("gain", "weight", "bias", "shift")]
    runs = []
    for path in ("reference", "triton", "triton"):
        with forced(path):
            total, normed = residual_norm(**inputs)
            runs.append(torch.autograd.grad((total + normed.exp()).sum(), leaves))
    for expected, once, twice in zip(*runs, strict=True):
        torch.testing.assert_close(once, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(once, twice)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("options", [{}, {"gain": None}, {"keep": None}, {"gain": None, "keep": None}])
def test_launches(options, shift):
    """One forward, two back."""
    inputs = given(**options, shift=torch.ones(20, requires_grad=True) if shift else None)
    for name in ("x", "branch", "weight"):
        inputs[name].requires_grad_()
    with _launch.record() as launches, forced("triton"):
        total, normed = residual_norm(**inputs)
        assert len(launches) == 1
        torch.autograd.backward([total, normed], [torch.ones_like(total), torch.ones_like(normed)])
    assert len(launches) == 3


@pytest.mark.parametrize("branch", [True, False])
def test_compiles_without_a_graph_break(branch, device, compiles_whole):
    inputs = given(device)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    leaf, shift = inputs["branch"].requires_grad_(), torch.randn(20, device=device, requires_grad=True)

    def f(x, leaf, weight, shift):
        norm = (weight, inputs["bias"], 1e-6, FP32)
        total, normed = residual_norm(x, leaf, inputs["gain"], inputs["keep"], *norm, shift)
        if not branch:
            _, normed = residual_norm(residual_add(total, leaf, None, None, shift), None, None, None, *norm)
        return total.sin() + normed.cos()

    compiles_whole(f, x, leaf, weight, shift)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.zeros(3, 4, 19)}, r"branch must be \[B, N, D\] with B = 3, N = 4, D = 20, not"),
        ({"gain": torch.zeros(19)}, r"gain must be \[D\] with D = 20, not \[19\]"),
        ({"keep": torch.zeros(3, 1)}, r"keep must be \[B\] with B = 3, not \[3, 1\]"),
        ({"bias": torch.zeros(20, dtype=BF16)}, "bias must be float32, not bfloat16"),
        ({"x": torch.zeros(3, 4)}, r"x must be \[B, N, D\], not \[3, 4\]"),
        ({"shift": torch.zeros(20, 1)}, r"shift must be \[D\] with D = 20, not \[20, 1\]"),
        ({"branch": None}, "gain, keep and shift must be None where branch is None"),
        ({"branch": None, "gain": None, "keep": None, "shift": torch.zeros(20)}, "must be None where branch is None"),
        ({"out_dtype": torch.int64}, "out_dtype must be a floating-point type"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(KernelError, match=message):
        residual_norm(**given(**change))
