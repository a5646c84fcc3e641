"""Stochastic depth in the methods: a function of seed, step, sample, crop and network, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from tiny import recipe

from fastssl.batch import Batch
from fastssl.loaders.masks import add_masks
from fastssl.methods import METHODS, view_list
from fastssl.models.blocks import Drop, set_recompute
from fastssl.parse import parse_pretrain
from fastssl.step import Values

B = 4
ROWS = {  # per pass of a network: (crops side by side, crops behind one another)
    "mae": [(1, 1)],
    "dino": [(2, 1), (2, 1)],
    "saae": [(1, 2)],
    "sit": [(1, 2)],
    "sit_v1": [(1, 2)],
}


def made(name):
    """A method whose blocks drop half of the samples, and a batch."""
    values = {"data.path": "none", "run.dir": "none", **recipe(name), "model.drop_path": 0.5}
    config = parse_pretrain([f"--method={name}", *(f"--{key}={value}" for key, value in values.items())])[0]
    torch.manual_seed(0)
    views = {v.name: torch.randn(B, v.count, 3, v.size, v.size) for v in view_list(config.views)}
    box = {name: torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(B, 1, 4) for name in views}
    flip = {name: torch.zeros(B, 1, dtype=torch.bool) for name in views}
    batch = Batch(torch.arange(B) * 5 + 2, torch.full((B,), -1), views=views, box=box, flip=flip)
    add_masks(batch, METHODS[name].masks(config), seed=0)
    return METHODS[name](config), batch


@pytest.fixture(params=ROWS)
def given(request):
    return request.param, *made(request.param)


@pytest.fixture
def drawn(monkeypatch):
    """The draws that were asked for: what they are drawn from, and the table."""
    found: list[tuple[Drop, torch.Tensor]] = []
    table = Drop.table

    def watched(self, *how):
        found.append((self, table(self, *how)))
        return found[-1][1]

    monkeypatch.setattr(Drop, "table", watched)
    return found


def test_every_crop_draws_by_its_number(given, drawn):
    name, method, batch = given
    method(batch, Values(3, 10, 2, seed=5))
    assert [(drop.together, len(table[0]) // (B * drop.together)) for drop, table in drawn] == ROWS[name]
    first = 0
    for drop, table in drawn:
        assert (drop.seed, drop.step, drop.first) == (5, 3, first)
        first += len(table[0]) // B
        assert torch.equal(drop.ids, batch.id)
    del drawn[:]
    method.eval()(batch, Values(3, 10, 2, seed=5))
    assert not drawn


def test_the_samples_of_a_smaller_batch_drop_the_same(given, drawn):
    _, method, batch = given
    method(batch, Values(3, 10, 2, seed=5))
    count = len(drawn)
    method(batch.map(lambda x: x[1:3]), Values(3, 10, 2, seed=5))
    for (drop, whole), (_, part) in zip(drawn[:count], drawn[count:], strict=True):
        shape = (-1, B, drop.together), (-1, 2, drop.together)
        assert torch.equal(part.unflatten(1, shape[1]), whole.unflatten(1, shape[0])[:, :, 1:3])


def test_another_step_or_seed_drops_others(given, drawn):
    _, method, batch = given
    for values in (Values(3, 10, 2, seed=5), Values(4, 10, 2, seed=5), Values(3, 10, 2, seed=6)):
        method(batch, values)
    first, *others = torch.cat([table.flatten() for _, table in drawn]).chunk(3)
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ("mae", "dino", "cae", "saae", "sit")), ("mae", torch.bfloat16)],
)
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(name, dtype):
    torch.manual_seed(1)
    method, batch = made(name)
    if name == "cae":
        method._opened.append(lambda pixels, masked: masked % 16)  # a tokenizer
    found, before = [], {key: value.clone() for key, value in method.state_dict().items()}
    for recompute in (False, True):
        if recompute:
            assert set_recompute(method)
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        torch.manual_seed(2)
        method.zero_grad()
        method.load_state_dict(before)  # DINO's centre moves in the pass
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            loss = method(batch, Values(3, 10, 2, seed=5)).loss
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in method.named_parameters() if p.requires_grad}, kept))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = found
    assert kept_again < 0.8 * kept
    torch.testing.assert_close(loss_again, loss)
    largest = max(gradient.abs().max() for gradient in gradients.values()).item()
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[key], gradient, rtol=1e-4, atol=bound * largest, msg=key)
