"""Which of an op's implementations a call takes, and that they agree."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.kernels._op import op

bodies = []


@op("fastssl_tests::scaled")
def scaled(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """x factor, y factor, and the number of values."""
    bodies.append("scaled")
    assert not (torch.is_grad_enabled() and x.requires_grad)
    other = torch.zeros_like(x) if y is None else y * factor
    return x * factor, other, torch.full((), x.numel())


@scaled.register_fake
def _(x, y, factor):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((), dtype=torch.int64)


@op("fastssl_tests::scaled_backward")
def scaled_backward(upstream: Tensor, factor: float) -> Tensor:
    bodies.append("scaled_backward")
    return upstream * factor


@scaled_backward.register_fake
def _(upstream, factor):
    return torch.empty_like(upstream)


def _save(ctx, inputs, output):
    ctx.factor = inputs[2]
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, x, y, _):
    gradients = [None if g is None else scaled_backward(g, ctx.factor) for g in (x, y)]
    return gradients[0], gradients[1] if ctx.needs_input_grad[1] else None, None


scaled.register_autograd(_differentiate, setup_context=_save)


@pytest.fixture(autouse=True)
def dispatched(monkeypatch):
    """Calls that went to a custom op."""
    bodies.clear()
    calls = []
    for each in (scaled, scaled_backward):

        def overload(*arguments, each=each, original=each.overload):
            calls.append(each.__name__)
            return original(*arguments)

        monkeypatch.setattr(each, "overload", overload)
    return calls


def leaf():
    return torch.arange(3.0, requires_grad=True)


def test_plain_tensors_never_reach_the_dispatcher(dispatched):
    x, y = leaf(), torch.nn.Parameter(torch.ones(3))
    a, b, number = scaled(x, y, 2.0)
    assert (number.item(), number.requires_grad) == (3, False)
    (a.sum() + 3 * b.sum()).backward()
    assert x.grad.tolist() == [2] * 3
    assert y.grad.tolist() == [6] * 3
    assert bodies == ["scaled", "scaled_backward", "scaled_backward"]
    assert not dispatched


def test_outputs_that_are_not_used_cost_nothing(dispatched):
    x, y = leaf(), leaf()
    scaled(x, y, 2.0)[1].sum().backward()
    assert x.grad is None
    assert y.grad.tolist() == [2] * 3
    assert bodies == ["scaled", "scaled_backward"]


def test_without_a_gradient_there_is_no_graph(dispatched):
    with torch.no_grad():
        assert scaled(leaf(), None, 2.0)[0].grad_fn is None
    with torch.inference_mode():
        assert scaled(leaf(), None, 2.0)[0].is_inference()
    assert scaled(leaf().detach(), None, 2.0)[0].grad_fn is None
    assert scaled(leaf(), None, 2.0)[0].requires_grad
    assert not dispatched


def test_tensors_without_values_take_the_custom_op(dispatched):
    assert scaled(torch.empty(3, device="meta"), None, 2.0)[0].is_meta
    with FakeTensorMode():
        assert scaled(torch.empty(3), None, 2.0)[0].shape == (3,)
    assert dispatched == ["scaled", "scaled"]
    assert not bodies


def test_gradients_of_gradients_are_refused():
    x = leaf()
    a, *_ = scaled(x, None, 2.0)
    [gradient] = torch.autograd.grad(a.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_compiled_as_one_graph(compiles_whole):
    compiles_whole(lambda x, y: scaled(x, y, 2.0)[0] * scaled(y, None, 3.0)[0], leaf(), leaf())
