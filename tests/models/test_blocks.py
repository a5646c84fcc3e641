"""Transformer blocks: timm's bits, few launches, drops keyed by the sample, few graphs."""

from __future__ import annotations

import collections
from functools import partial

import pytest
import torch
import torch._dynamo
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels import _launch
from fastssl.kernels._path import forced
from fastssl.models.blocks import (
    Drop,
    apart,
    branch_factors,
    group_factors,
    last_norms,
    run_blocks,
    run_groups,
    transformer_blocks,
)
from fastssl.models.vit import ViT

D = 48


def both(layer_scale=0.0, drop_path=0.0, depth=3):
    """Our blocks and timm's, made from one seed, and a final norm."""
    torch.manual_seed(0)
    ours = transformer_blocks(D, depth, 3, drop_path, layer_scale)
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    more = {"qkv_bias": True, "init_values": layer_scale or None, "norm_layer": norm}
    theirs = nn.ModuleList(TimmBlock(D, 3, drop_path=drop_path * i / max(depth - 1, 1), **more) for i in range(depth))
    last = nn.LayerNorm(D, eps=1e-6)
    nn.init.normal_(last.weight)
    nn.init.normal_(last.bias)
    return ours, theirs, last


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_keys_order_and_start_values_are_timms(layer_scale):
    ours, theirs, _ = both(layer_scale)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_values_and_gradients_are_timms_bits(layer_scale, half):
    """Under autocast they are near: a branch is rounded without its last bias."""
    ours, theirs, norm = both(layer_scale)
    x = torch.randn(2, 17, D, requires_grad=True)
    upstream = torch.randn(2, 17, D)
    results = []
    for way in ("timm", "together", "alone"):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if way == "together":
                y = run_blocks(ours, x, norm, dtype=torch.float32)
            else:
                y = x
                for block in theirs if way == "timm" else ours:
                    y = block(y)
                y = norm(y)
        blocks = theirs if way == "timm" else ours
        results.append([y, *torch.autograd.grad(y, [x, *blocks.parameters()], upstream)])
    for timm, together, alone in zip(*results, strict=True):
        assert torch.equal(alone, together)
        if half:
            assert (together - timm).norm() < 0.01 * timm.norm()
        else:
            assert torch.equal(together, timm)


def test_a_mask_is_added_to_the_logits():
    ours, theirs, _ = both()
    x, mask = torch.randn(2, 9, D), torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(ours[0](x, mask), theirs[0](x, mask))
    assert not torch.allclose(ours[0](x, mask), ours[0](x))


def test_norms_of_the_last_blocks():
    ours, theirs, norm = both()
    x, expected = torch.randn(2, 9, D), []
    y = x
    for block in theirs:
        y = block(y)
        expected.append(norm(y))
    for n in (1, 2, 3):
        for got, wanted in zip(last_norms(ours, x, norm, n), expected[-n:], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("half", [False, True], ids=["plain", "autocast"])
def test_linear_weights_of_a_short_type(half):
    """The linear layers of a network that trains in bfloat16 hold it; norms and the stream stay float32."""
    ours, _, norm = both(0.1)
    x = torch.randn(2, 9, D)
    for block in ours:
        for bias in (block.attn.proj.bias, block.mlp.fc2.bias):  # they are added as they are, in float32
            bias.data = bias.data.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_blocks(ours, x, norm)
    for module in ours.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        got = run_blocks(ours, x, norm)
        assert torch.equal(got, expected)
        assert got.dtype == torch.bfloat16
        y = x
        for block in ours:
            y = block(y)
        assert y.dtype == torch.float32
        assert run_blocks(ours.eval(), x, norm).dtype == torch.float32
    torch.testing.assert_close(norm(y), expected.float(), rtol=0.02, atol=0.02)


# -- launches ----------------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts what PyTorch would launch: no views, and no memory that is only reserved."""

    FREE = ("empty", "empty_like", "new_empty", "detach", "empty_strided", "new_empty_strided", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        view = func.is_view or (name in ("reshape", "_reshape_alias"))
        if not view and name not in self.FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches(blocks, norm, x, drop):
    """Launches of a forward and of a backward pass."""
    with _launch.record() as kernels, forced("triton"), Counter() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            y = run_blocks(blocks, x, norm, drop)
        forward = len(kernels) + counter.found.total()
        # Not `backward`: it would copy those gradients that the recorded launches hold too.
        torch.autograd.grad(y, [x, *blocks.parameters(), *norm.parameters()], y)
    return forward, len(kernels) + counter.found.total() - forward


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_launches_of_a_block(layer_scale, drop_path):
    """Working copies in bfloat16, autocast on: 8 forward, 17 back; stochastic depth costs one for all blocks."""
    totals = []
    drop = Drop(torch.arange(2), 0, 1, "test")
    for depth in (2, 3):
        blocks, _, norm = both(layer_scale, drop_path, depth)
        for module in blocks.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
        x = torch.randn(2, 16, D, requires_grad=True)
        totals.append(launches(blocks, norm, x, drop))
    forward, back = (b - a for a, b in zip(*totals, strict=True))
    assert forward == 8
    assert back == 17
    assert totals[0][0] == 2 * 8 + 1 + (drop_path > 0)  # and the first norm


# -- stochastic depth --------------------------------------------------------------------------------------------------


def test_drops_are_those_of_the_table():
    ours, theirs, norm = both(0.1, 0.6)
    x, drop = torch.randn(6, 5, D), Drop(torch.tensor([3, 8, 1, 0, 7, 99]), 5, 2, "test")
    got = run_blocks(ours, x, norm, drop)
    table = drop.table(0.6, 3, 6)
    for block in theirs:
        block.eval()
    y = x
    for i, block in enumerate(theirs):
        y = y + table[2 * i][:, None, None] * block.ls1(block.attn(block.norm1(y)))
        y = y + table[2 * i + 1][:, None, None] * block.ls2(block.mlp(block.norm2(y)))
    torch.testing.assert_close(got, norm(y))
    assert set(table[4:].flatten().tolist()) == {0.0, table.max().item()}
    assert torch.equal(run_blocks(ours, x, norm, drop), got)
    for change in ({"seed": 6}, {"step": 3}, {"purpose": "other"}, {"first": 1}):
        other = Drop(**{**vars(drop), **change})
        assert not torch.equal(run_blocks(ours, x, norm, other), got), change
    assert not torch.equal(run_blocks(ours, x, norm), got)
    ours.eval()
    torch.testing.assert_close(run_blocks(ours, x, norm, drop), run_blocks(ours, x, norm), rtol=0, atol=0)


def test_a_sample_drops_the_same_in_any_micro_batch():
    ours, _, norm = both(0.0, 0.5)
    x, ids = torch.randn(8, 5, D), torch.arange(8) * 7
    whole = run_blocks(ours, x, norm, Drop(ids, 0, 4, "test"))
    parts = [run_blocks(ours, x[i::2], norm, Drop(ids[i::2], 0, 4, "test")) for i in (0, 1)]
    for i in (0, 1):
        torch.testing.assert_close(parts[i], whole[i::2])


def test_without_a_key_the_drops_are_pytorchs():
    x = torch.zeros(20_000, 1, 1)
    factors = branch_factors(0.4, x, 3, None)
    assert all((keep == 1).all() for keep in factors[0])
    for layer, rate in ((1, 0.2), (2, 0.4)):
        for keep in factors[layer]:
            assert keep.gt(0).float().mean().item() == pytest.approx(1 - rate, abs=0.02)
            assert keep.max().item() == pytest.approx(1 / (1 - rate))
    assert branch_factors(0.0, x, 2, None) == [(None, None)] * 2
    assert not branch_factors(1.0, x, 2, None)[1][0].any()
    ours, _, _ = both(0.0, 0.5)
    x = torch.randn(2000, 2, D)
    kept = (ours[2](x) - x).abs().amax((1, 2)) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)  # 1 - 0.5 x 0.5
    assert torch.equal(ours.eval()[2](x), ours[2](x))


def test_groups_draw_what_they_draw_alone():
    ours, _, norm = both(0.0, 0.5)
    groups, ids = ((4, 5), (6, 3)), torch.tensor([9, 4])
    drops = [Drop(ids, 1, 2, "test", 2), Drop(ids, 1, 2, "test", 3, first=2)]
    x = torch.randn(4 * 5 + 6 * 3, 1, D)
    keeps = group_factors(0.5, x, 3, groups, drops)
    assert len(keeps) == 3
    for layer, keep in enumerate(keeps):
        for branch in (0, 1):
            wanted = [
                drop.table(0.5, 3, rows)[2 * layer + branch].repeat_interleave(tokens)
                for drop, (rows, tokens) in zip(drops, groups, strict=True)
            ]
            assert torch.equal(keep[branch], torch.cat(wanted))
    assert group_factors(0.0, x, 2, groups, drops) == [(None, None)] * 2
    parts = [run_blocks(ours, part, norm, drop) for part, drop in zip(apart(x, groups), drops, strict=True)]
    whole = run_groups(ours, x, norm, groups, drops)
    for found, wanted in zip(apart(whole, groups), parts, strict=True):
        torch.testing.assert_close(found, wanted)


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_blocks_of_a_network_share_their_graphs():
    """Twelve blocks are three graphs: training, without gradients, and eval."""
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    vit = ViT(width=24, depth=12, heads=2, patch_size=8, image_size=16, drop_path=0.3, layer_scale=0.1)
    images, drop = torch.randn(2, 3, 16, 16), Drop(torch.arange(2), 0, 0, "test")

    def passes():
        results = [vit.train().tokens(images, drop=drop)]
        with torch.no_grad():
            results.append(vit.tokens(images, drop=drop))
        results += [vit.eval().tokens(images), vit.represent(images, 4)]
        return results

    expected = passes()
    for part in vit.compile_parts():
        part.compile(backend=count)
    for step in range(2):
        drop = Drop(torch.arange(2), 0, step, "test")
        if step == 0:
            for got, wanted in zip(passes(), expected, strict=True):
                torch.testing.assert_close(got, wanted)
        else:
            passes()
    assert len(graphs) == 3
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_groups_of_images_are_one_graph(backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    vit = ViT(width=24, depth=6, heads=2, patch_size=8, image_size=16, drop_path=0.3)
    images = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)]
    drops = [Drop(torch.arange(2), 0, 0, "test", len(x) // 2) for x in images]

    def passed():
        tokens = vit.groups(images, drops)
        return [*tokens, *torch.autograd.grad(sum(x.square().sum() for x in tokens), list(vit.parameters()))]

    expected = passed()
    torch._dynamo.utils.counters.clear()
    for part in vit.compile_parts():
        part.compile(backend=backend, fullgraph=True)
    for found, wanted in zip(passed(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
