import math

import pytest
import torch
from torch import nn

from fastssl.config import ConfigError, Optim
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.frozen import linear_probe as probe
from fastssl.evaluation.frozen.features import Features
from fastssl.evaluation.frozen.linear_probe import linear_probe
from fastssl.training.masters import Masters
from fastssl.training.optim import LARS, set_hyperparameters
from fastssl.training.schedule import warmup_cosine


def clusters(images, seed, classes=5, width=12, noise=1.0):
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    values = centres[labels] + noise * torch.randn(images, width, generator=generator)
    return Features(values, labels, torch.arange(images))


def plain_probe(train, val, lr, epochs, batch_size, seed, hidden=0):
    """The same layers trained by PyTorch's own modules: Linear, Tanh, SGD, CosineAnnealingLR."""
    width, classes = train.values.shape[1], int(train.labels.max()) + 1
    layer = nn.Linear(width, classes)
    if hidden:
        layer = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear, spread in zip(layer[::2], (0.02, 0.01), strict=True) if hidden else [(layer, 0.01)]:
            start = torch.randn(linear.in_features, 1, linear.out_features, generator=generator) * spread
            linear.weight.copy_(start[:, 0].T)
            linear.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr * batch_size / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order.tensor_split(math.ceil(len(train) / batch_size)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(train.values[rows]), train.labels[rows]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = layer(val.values)
    top5 = (logits.topk(5).indices == val.labels[:, None]).any(1)
    return 100 * (logits.argmax(1) == val.labels).double().mean().item(), 100 * top5.double().mean().item()


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_agrees_with_pytorchs_own_optimizer(lr):
    train, val = clusters(230, 0, classes=9, noise=2.0), clusters(400, 1, classes=9, noise=2.0)
    result = linear_probe(train, val, lrs=(lr,), epochs=5, batch_size=50, seed=3)
    assert (result.top1, result.top5) == pytest.approx(plain_probe(train, val, lr, 5, 50, 3))
    assert result.top1 > 25  # chance: 11
    assert (result.lr, result.held_out, result.at_edge) == (lr, {}, False)


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_with_a_hidden_layer_agrees_with_pytorchs_own_modules(lr):
    train, val = clusters(230, 0, classes=9, noise=2.0), clusters(400, 1, classes=9, noise=2.0)
    result = linear_probe(train, val, lrs=(lr,), epochs=20, batch_size=50, seed=3, hidden=16)
    assert (result.top1, result.top5) == pytest.approx(plain_probe(train, val, lr, 20, 50, 3, hidden=16))
    assert result.top1 > 25  # chance: 11
    several = linear_probe(train, val, lrs=(lr, 1e-9), epochs=20, batch_size=50, seed=3, hidden=16)
    assert (several.top1, several.lr) == (pytest.approx(result.top1), lr)


def test_a_hidden_layer_learns_what_no_linear_one_can():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 2, generator=generator)
    data = Features(values, (values.prod(1) > 0).long(), torch.arange(400))
    options = {"lrs": (1.0, 3.0), "epochs": 200, "batch_size": 50}
    assert linear_probe(data, data, **options).top1 < 65
    assert linear_probe(data, data, **options, hidden=32).top1 > 90


def test_layers_side_by_side_do_not_feel_each_other():
    """A diverging neighbour, and a twin, leave a layer as it is when it is trained alone."""
    train, val = clusters(200, 0), clusters(300, 1)
    alone = linear_probe(train, val, lrs=(0.05,), epochs=5, batch_size=64)
    both = linear_probe(train, val, lrs=(0.05, 1e39), epochs=5, batch_size=64)
    assert both.lr == 0.05
    assert (both.top1, both.top5) == pytest.approx((alone.top1, alone.top5))
    assert both.held_out[1e39] < both.held_out[0.05]


def test_the_learning_rate_is_chosen_on_training_images_alone(monkeypatch):
    train, val = clusters(300, 0), clusters(200, 1)
    first = linear_probe(train, val, lrs=(1e-6, 0.1, 0.3), epochs=10, batch_size=64)
    shuffled = Features(val.values, val.labels.roll(1), val.ids)
    second = linear_probe(train, shuffled, lrs=(1e-6, 0.1, 0.3), epochs=10, batch_size=64)
    assert first.held_out == second.held_out
    assert first.lr == second.lr != 1e-6
    assert first.top1 > 60 > second.top1


def test_twins_never_see_the_held_out_tenth():
    """With labels at random, only a layer that has seen an image can know its label."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 400, generator=generator)  # wide enough to learn by heart
    data = Features(values, torch.randint(4, (200,), generator=generator), torch.arange(200))
    result = linear_probe(data, data, lrs=(1.0, 2.0), epochs=30, batch_size=50)
    assert result.top1 == 100.0
    assert max(result.held_out.values()) <= 60.0  # chance: 25, on 20 images


def test_equal_accuracies_go_by_the_loss():
    result = linear_probe(clusters(100, 0, noise=0.1), clusters(50, 1, noise=0.1), lrs=(0.1, 0.5, 0.3), epochs=10)
    assert set(result.held_out.values()) == {100.0}
    assert result.lr == 0.5


def test_the_best_at_the_edge_is_said():
    train, val = clusters(300, 0), clusters(100, 1)
    assert linear_probe(train, val, lrs=(1e-9, 0.1), epochs=3, batch_size=64).at_edge
    assert not linear_probe(train, val, lrs=(1e-9, 0.1, 1e39), epochs=3, batch_size=64).at_edge


def test_repeats_exactly_and_leaves_the_random_state():
    train, val = clusters(100, 0), clusters(100, 1)
    state = torch.get_rng_state()
    first = linear_probe(train, val, lrs=(0.01, 0.1), epochs=3, batch_size=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_probe(train, val, lrs=(0.01, 0.1), epochs=3, batch_size=30) == first
    assert linear_probe(train, val, lrs=(0.01, 0.1), epochs=3, batch_size=30, seed=1) != first


def test_loss_is_the_mean_over_seen_images_of_every_layer():
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    sees = torch.ones(6, 2)
    sees[2:, 1] = 0
    expected = nn.functional.cross_entropy(logits[:, 0], labels) + nn.functional.cross_entropy(
        logits[:2, 1], labels[:2]
    )
    assert probe._loss(logits, labels, sees) == pytest.approx(expected.item())
    sees[:, 1] = 0  # a minibatch of held-out images only
    assert probe._loss(logits, labels, sees) == pytest.approx(nn.functional.cross_entropy(logits[:, 0], labels).item())


def test_divergence_is_an_error():
    with pytest.raises(EvaluationError, match=r"diverged with learning rate 1e\+39; try smaller"):
        linear_probe(clusters(100, 0), clusters(50, 1), lrs=(1e39,), epochs=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": ()}, r"lrs is \[\]"),
        ({"lrs": (0.1, -1.0)}, r"lrs is \[0.1, -1.0\]; .* above 0"),
        ({"lrs": (0.1, 0.1)}, "different learning rates"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"hidden": -1}, "hidden is -1; it must be 0 .none. or a number of units"),
    ],
)
def test_unusable_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        linear_probe(clusters(20, 0), clusters(10, 1), **change)


def test_different_widths():
    with pytest.raises(EvaluationError, match="training features have 12 numbers, validation features 8"):
        linear_probe(clusters(20, 0), clusters(10, 1, width=8))


def plain_mae_probe(train, val, lr, epochs, batch_size, seed):
    """The same by PyTorch's batch norm and linear layer, and the optimizer of pretraining."""
    width, classes = train.values.shape[1], int(train.labels.max()) + 1
    network = nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False), nn.Linear(width, classes))
    with torch.no_grad():
        start = torch.randn(width, 1, classes, generator=torch.Generator().manual_seed(seed)) * 0.01
        network[1].weight.copy_(start[:, 0].T)
        network[1].bias.zero_()
    groups = [{"params": [network[1].weight], "decay": True}, {"params": [network[1].bias], "decay": False}]
    optimizer = LARS(groups, Optim(lr=lr), Masters(network, torch.float32), ())
    steps = math.ceil(len(train) / batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch))
        for step, rows in enumerate(order.tensor_split(steps)):
            rate = warmup_cosine(epoch * steps + step, epochs * steps, epochs * steps / 9, lr * batch_size / 256, 0.0)
            set_hyperparameters(optimizer, rate, 0.0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(train.values[rows]), train.labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        logits = network.eval()(val.values)
    top5 = (logits.topk(5).indices == val.labels[:, None]).any(1)
    return 100 * (logits.argmax(1) == val.labels).double().mean().item(), 100 * top5.double().mean().item()


@pytest.mark.parametrize("lr", [10.0, 50.0])
def test_mae_agrees_with_pytorchs_batch_norm_and_our_lars(lr):
    train, val = clusters(230, 0, classes=9, noise=2.0), clusters(400, 1, classes=9, noise=2.0)
    result = linear_probe(train, val, lrs=(lr,), epochs=60, batch_size=50, seed=3, protocol="mae")
    assert (result.top1, result.top5) == pytest.approx(plain_mae_probe(train, val, lr, 60, 50, 3))
    assert result.top1 > 30  # chance: 11
    assert result.top1 != linear_probe(train, val, lrs=(lr,), epochs=60, batch_size=50, seed=3).top1


def test_mae_does_not_feel_the_scale_of_the_features():
    train, val = clusters(200, 0), clusters(300, 1)
    scaled = [Features(1000.0 * data.values + 50.0, data.labels, data.ids) for data in (train, val)]
    how = {"lrs": (1.0, 10.0), "epochs": 9, "batch_size": 50, "protocol": "mae"}
    result = linear_probe(train, val, **how)
    assert linear_probe(*scaled, **how).top1 == pytest.approx(result.top1, abs=1.0)
    assert set(result.held_out) == {1.0, 10.0}


def test_mae_layers_side_by_side_do_not_feel_each_other():
    train, val = clusters(200, 0), clusters(300, 1)
    how = {"epochs": 5, "batch_size": 64, "protocol": "mae"}
    alone = linear_probe(train, val, lrs=(5.0,), **how)
    both = linear_probe(train, val, lrs=(5.0, 1e30), **how)
    assert both.lr == 5.0
    assert (both.top1, both.top5) == pytest.approx((alone.top1, alone.top5))


def test_mae_rate():
    """16384 images, 90 epochs, learning rate 0.1 for 256."""
    peak = 0.1 * 16384 / 256
    rates = {0: 0.0, 5: 3.2, 10: 6.4, 50: 3.2, 90: 0.0}
    assert [peak * probe._mae_rate(epoch, 90) for epoch in rates] == pytest.approx(list(rates.values()), abs=1e-9)


def test_lars_step_is_a_share_of_the_weight_whatever_the_gradient():
    weight = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))  # three layers
    weight[:, 1] *= 10.0
    gradient = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(1))
    sizes = weight.transpose(0, 1).flatten(1).norm(dim=1)
    for scale in (1e-3, 1.0, 1e3):
        step = probe._adapted(weight, scale * gradient).transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(step, 0.001 * sizes)
    assert torch.equal(probe._adapted(weight[0], gradient[0]), gradient[0])
    assert torch.equal(probe._adapted(weight * 0.0, gradient), gradient)


def test_mae_needs_a_batch_and_no_hidden_layer():
    with pytest.raises(ConfigError, match="hidden is 8; the protocol mae has no hidden layer"):
        linear_probe(clusters(20, 0), clusters(10, 1), hidden=8, protocol="mae")
    with pytest.raises(ConfigError, match="batch_size is 1; the batch norm of the protocol mae needs 2 or more"):
        linear_probe(clusters(20, 0), clusters(10, 1), batch_size=1, protocol="mae")
