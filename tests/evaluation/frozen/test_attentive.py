import itertools
import json
import math

import numpy as np
import pytest
import torch
from tiny import draw_classes, save_checkpoint
from torch import nn
from torch.nn.functional import layer_norm

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.frozen import attentive
from fastssl.evaluation.frozen.attentive import (
    AttentiveOptions,
    AttentiveProbe,
    Probing,
    evaluate_attentive,
    standardised,
)
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError

VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=2)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("attentive")
    return {
        "checkpoint": save_checkpoint(root / "last.pt", VIT),
        "data": draw_classes(root / "train", 60, 0),
        "val": draw_classes(root / "val", 31, 1),
        "workers": 1,
        "batch_size": 16,
        "step_size": 32,
        "device": "cpu",
    }


QUICK = {"epochs": 6, "warmup_epochs": 1, "augment": False, "lrs": (0.1, 1.0)}


def plain_pool(probe, tokens):
    """The block as the card writes it, by PyTorch's multi-head attention."""
    width = tokens.shape[-1]
    block = nn.MultiheadAttention(width, probe.heads, batch_first=True)
    with torch.no_grad():
        block.in_proj_weight.copy_(torch.cat([probe.q.weight, probe.k.weight, probe.v.weight]))
        block.in_proj_bias.copy_(torch.cat([probe.q.bias, torch.zeros(width), probe.v.bias]))
        block.out_proj.weight.copy_(probe.proj.weight)
        block.out_proj.bias.copy_(probe.proj.bias)
    query = probe.norm_q(probe.query).expand(len(tokens), -1, -1)
    return block(query, probe.norm_k(tokens), probe.norm_v(tokens), need_weights=False)[0][:, 0]


def random_probe(width=24, heads=3, classes=5):
    torch.manual_seed(1)
    probe = AttentiveProbe(width, heads, classes)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return probe


def test_the_block_is_multi_head_attention():
    probe, tokens = random_probe(), torch.randn(4, 10, 24) * 3 + 1
    expected = plain_pool(probe, tokens)
    torch.testing.assert_close(probe.pool(standardised(tokens)), expected, atol=1e-5, rtol=1e-4)
    keys = ("query", "norm_q.weight", "norm_q.bias", "norm_k.weight", "norm_v.bias")
    upstream = torch.randn(4, 24)
    (expected * upstream).sum().backward()
    wanted = {key: probe.get_parameter(key).grad.clone() for key in keys}
    probe.zero_grad()
    (probe.pool(standardised(tokens)) * upstream).sum().backward()
    for key in keys:
        torch.testing.assert_close(probe.get_parameter(key).grad, wanted[key], atol=1e-4, rtol=1e-3)


def test_the_block_starts_as_a_mean_over_all_tokens():
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(24, 3, 5), torch.randn(4, 10, 24)
    values = probe.v(layer_norm(tokens, (24,), eps=1e-6)).mean(1)
    torch.testing.assert_close(probe.pool(standardised(tokens)), probe.proj(values), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("width", "heads", "parameters"), [(768, 12, 3_135_976), (1024, 16, 5_229_544)])
def test_trainable_parameters(width, heads, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in AttentiveProbe(width, heads, 1000).parameters()) == parameters


def test_accuracy_and_what_is_said(given):
    before = checkpoint.read(given["checkpoint"]).network
    evaluation = evaluate_attentive(AttentiveOptions(**given, **QUICK))
    values = evaluation.as_dict()
    assert values["top1"] == evaluation.top1 > 60  # chance: 33
    assert (values["images"], values["train_images"], values["step"]) == (31, 60, 7)
    assert set(values["held_out"]) == {"0.1", "1.0"}
    assert "held-out tenth" in evaluation.table()
    assert evaluate_attentive(AttentiveOptions(**given, **QUICK)).scored == evaluation.scored
    after = checkpoint.read(given["checkpoint"]).network
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_drawn_crops(given):
    evaluation = evaluate_attentive(AttentiveOptions(**given, **{**QUICK, "augment": True, "lrs": (0.5,)}))
    assert evaluation.top1 > 60
    assert evaluation.held_out == {}


def test_one_step_is_pytorchs_nesterov(given, monkeypatch):
    """A step of two micro-batches moves the probe as SGD on the mean of their gradients does."""
    options = AttentiveOptions(**given, epochs=1, warmup_epochs=0, augment=False, lrs=(0.1,))
    probing = Probing(options)
    pace = probing.pace
    assert (probing.batch_size, pace.accumulate, pace.steps_per_epoch, pace.images_per_step) == (16, 2, 1, 32)
    probe = attentive.copy.deepcopy(probing.probes[0])
    pieces = list(itertools.islice(probing.micro_batches(), 2))
    probing.train_step(iter(pieces))
    optimizer = torch.optim.SGD(probe.parameters(), 0.1 * 32 / 256, momentum=0.9, nesterov=True)
    for tokens, labels, *_ in pieces:
        (nn.functional.cross_entropy(probe(tokens), labels) / 2).backward()
    optimizer.step()
    for ours, theirs in zip(probing.probes[0].parameters(), probe.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_probes_do_not_feel_each_other_and_twins_not_the_held_out_tenth(given):
    alone = Probing(AttentiveOptions(**given, **{**QUICK, "lrs": (0.1,)}))
    both = Probing(AttentiveOptions(**given, **{**QUICK, "lrs": (0.1, 5.0)}))
    assert int(both.held_out.sum()) == 6
    for probing in (alone, both):
        stream = list(itertools.islice(probing.micro_batches(), 4))
        probing.train_step(iter(stream))
        probing.train_step(iter(stream))
    for ours, theirs in zip(alone.probes[0].parameters(), both.probes[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)

    def twin_after(change):
        probing = Probing(AttentiveOptions(**given, **{**QUICK, "lrs": (0.1, 5.0)}))
        taken = itertools.islice(probing.micro_batches(), 4)
        stream = [(torch.where(h[:, None, None], change * t, t), y, h, ids) for t, y, h, ids in taken]
        assert any(h.any() for _, _, h, _ in stream)
        probing.step = probing.pace.steps_per_epoch
        probing.train_step(iter(stream))
        return [p.clone() for p in probing.probes[2].parameters()], [p.clone() for p in probing.probes[0].parameters()]

    (twin, full), (other_twin, other_full) = twin_after(1.0), twin_after(-3.0)
    assert all(torch.equal(a, b) for a, b in zip(twin, other_twin, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(full, other_full, strict=True))


def test_predictions_depend_on_the_batch_only_upstream(given):
    def scored(**change):
        return evaluate_attentive(AttentiveOptions(**{**given, **QUICK, "lrs": (0.3,), **change})).scored

    def on_other_batches(upstream):
        probing = Probing(AttentiveOptions(**{**given, **QUICK, "lrs": (0.3,), "upstream_bn_eval": upstream}))
        results = []
        for ids in (np.arange(31), np.arange(10)):
            probing.options.batch_size = 7
            before = probing.probes[0].norm.running_mean.clone()
            [result] = probing._score([probing.probes[0]], probing.val_source, "", ids)
            assert torch.equal(before, probing.probes[0].norm.running_mean)
            results.append(result.loss * result.images)
        [rest] = probing._score([probing.probes[0]], probing.val_source, "", np.arange(10, 31))
        return results[0], results[1] + rest.loss * rest.images

    whole, pieces = on_other_batches(False)
    assert whole == pytest.approx(pieces, rel=1e-6)
    whole, pieces = on_other_batches(True)
    assert abs(whole - pieces) > 1e-4
    assert math.isfinite(scored(upstream_bn_eval=True).loss)


def judge_on(rank, options):
    evaluation = evaluate_attentive(AttentiveOptions(**options))
    probing = Probing(AttentiveOptions(**{**options, "dir": ""}))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in probing.probes[0].parameters():
            parameter.copy_(torch.randn_like(parameter))
    [scored] = probing._score([probing.probes[0]], probing.val_source, "")
    return evaluation.scored, scored


def test_two_processes(given, tmp_path, on_processes):
    options = {**given, **QUICK, "lrs": (0.3,), "batch_size": 8}
    (trained, scored), other = on_processes(2, judge_on, {**options, "dir": str(tmp_path / "probes")})
    assert (trained, scored) == other
    assert trained.images == 31
    assert trained.top1 > 45
    _, alone = judge_on(0, options)
    assert (alone.top1, alone.top5) == (scored.top1, scored.top5)
    assert alone.loss == pytest.approx(scored.loss, rel=1e-6)


def test_command_line(given, capsys):
    paths = [f"--{key}={given[key]}" for key in ("checkpoint", "data", "val")]
    quick = ["--epochs=1", "--warmup_epochs=0", "--batch_size=16", "--lrs=[0.1]", "--augment=false", "--workers=1"]
    assert main(["evaluate", "attentive", *paths, *quick, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": ()}, r"lrs is \[\]"),
        ({"batch_size": 1}, "batch_size is 1; it must be 2 or more"),
        ({"warmup_epochs": 100}, r"warmup_epochs is 100; it must be at most epochs \(90\)"),
        ({"val": "a"}, r"val is the same as data \(a\)"),
        ({"heads": -1}, "heads is -1"),
    ],
)
def test_unusable_options(change, message):
    with pytest.raises(ConfigError, match=message):
        AttentiveOptions(**{"checkpoint": "c.pt", "data": "a", "val": "b", **change})


def test_networks_that_do_not_fit(given, tmp_path):
    resnet = save_checkpoint(tmp_path / "resnet.pt", Model(name="resnet18", image_size=32, small_images=True))
    with pytest.raises(ConfigError, match="holds a resnet18; only a ViT has tokens"):
        evaluate_attentive(AttentiveOptions(**{**given, **QUICK, "checkpoint": resnet}))
    with pytest.raises(ConfigError, match="heads is 5; it must divide the network's width, 24"):
        evaluate_attentive(AttentiveOptions(**given, **QUICK, heads=5))
    broken = save_checkpoint(tmp_path / "nan.pt", VIT, lambda weights: weights["teacher.norm.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"norm\.bias is not finite; the weights are broken"):
        evaluate_attentive(AttentiveOptions(**{**given, **QUICK, "checkpoint": broken}))
    with pytest.raises(EvaluationError, match=r"diverged with learning rate 1e\+30; try smaller"):
        evaluate_attentive(AttentiveOptions(**{**given, **QUICK, "lrs": (1e30,)}))
