import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.config import ConfigError
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.frozen.features import Features
from fastssl.evaluation.frozen.knn_vote import knn_classify, tile_shape


def features(images, width=16, classes=7, seed=0, dtype=torch.float32, first_id=0):
    """Noisy clusters, one per class."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    values = centres[labels] + 1.5 * torch.randn(images, width, generator=generator)
    names = tuple(f"class{c}" for c in range(classes))
    return Features(values.to(dtype), labels, torch.arange(first_id, first_id + images), names)


def naive_knn(train, val, k, temperature, leave_one_out=False):
    """(top-1, top-5) in percent, by loops over plain numbers."""
    vectors = [[row.double() / row.double().norm() for row in data.values] for data in (train, val)]
    top1 = top5 = 0
    for i, query in enumerate(vectors[1]):
        ranked = []
        for j, row in enumerate(vectors[0]):
            if not (leave_one_out and train.ids[j] == val.ids[i]):
                ranked.append((-float(query @ row), j))
        votes = {}
        for negative, j in sorted(ranked)[:k]:
            label = int(train.labels[j])
            votes[label] = votes.get(label, 0.0) + math.exp(-negative / temperature)
        order = sorted(votes, key=lambda label: (-votes[label], label))
        top1 += order[0] == int(val.labels[i])
        top5 += int(val.labels[i]) in order[:5]
    return 100 * top1 / len(val), 100 * top5 / len(val)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_the_plain_definition(dtype, temperature):
    train, val = features(150, dtype=dtype), features(60, seed=1, dtype=dtype)
    results = knn_classify(train, val, (1, 10, 40), temperature=temperature)
    assert list(results) == [1, 10, 40]
    for k, result in results.items():
        assert (result.top1, result.top5) == pytest.approx(naive_knn(train, val, k, temperature))
        assert (result.images, result.neighbours) == (60, k)
    assert results[10].top1 > 30  # the clusters are there: chance is 14


def test_the_temperature_matters():
    # Two far neighbours of class 1 outvote one near neighbour of class 0 only where the votes are flat.
    train = Features(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1]), torch.arange(3))
    val = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.arange(1))
    assert knn_classify(train, val, (3,), temperature=0.07)[3].top1 == 100.0
    assert knn_classify(train, val, (3,), temperature=10.0)[3].top1 == 0.0


def test_features_are_compared_by_angle_not_length():
    train = Features(torch.tensor([[0.1, 0.0], [9.0, 9.0]]), torch.tensor([0, 1]), torch.arange(2))
    val = Features(torch.tensor([[3.0, 0.5]]), torch.tensor([0]), torch.arange(1))
    assert knn_classify(train, val, (1,))[1].top1 == 100.0


@pytest.mark.parametrize("budget", [1, 20_000, 60_000, 10**9])
def test_tiles_do_not_change_the_result(budget):
    # Small whole numbers make every similarity exact up to one rounding, and full of ties.
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-1, 2, (160, 4), generator=generator).float()
    labels = torch.randint(7, (160,), generator=generator)
    train = Features(values[:120], labels[:120], torch.arange(120))
    val = Features(values[120:], labels[120:], torch.arange(40))
    expected = knn_classify(train, val, (5, 30), budget=10**9)
    assert knn_classify(train, val, (5, 30), budget=budget) == expected


def test_tied_neighbours_go_by_position():
    train = Features(torch.ones(40, 3), torch.arange(40) // 10, torch.arange(40))  # all equally similar
    val = Features(torch.ones(1, 3), torch.tensor([0]), torch.arange(1))
    for budget in (1, 10**9):
        results = knn_classify(train, val, (10, 15), budget=budget)
        assert [result.top1 for result in results.values()] == [100.0, 100.0]
        assert results[10].top5 == 100.0


def test_tied_votes_go_by_class_index():
    train = Features(torch.ones(2, 3), torch.tensor([1, 0]), torch.arange(2))
    for label, top1 in ((0, 100.0), (1, 0.0)):
        val = Features(torch.ones(1, 3), torch.tensor([label]), torch.arange(1))
        assert knn_classify(train, val, (2,))[2].top1 == top1


def test_a_class_without_votes_is_not_among_the_first_five():
    train = Features(torch.eye(3), torch.tensor([0, 1, 2]), torch.arange(3))
    val = Features(torch.eye(3)[:1], torch.tensor([2]), torch.arange(1))
    results = knn_classify(train, val, (2, 3))
    assert (results[2].top5, results[3].top5) == (0.0, 100.0)


def test_more_neighbours_than_images_means_all_of_them():
    train, val = features(12), features(20, seed=1)
    results = knn_classify(train, val, (12, 200))
    assert results[200] == results[12]
    assert results[200].neighbours == 12


@pytest.mark.parametrize("budget", [1, 10**9])
def test_leave_one_out(budget):
    data = features(40)
    result = knn_classify(data, data, (5, 500), leave_one_out=True, budget=budget)
    assert (result[5].top1, result[5].top5) == pytest.approx(naive_knn(data, data, 5, 0.07, leave_one_out=True))
    assert result[500].neighbours == 39
    assert knn_classify(data, data, (1,))[1].top1 == 100.0  # each image finds itself
    assert knn_classify(data, data, (1,), leave_one_out=True)[1].top1 < 100.0


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return out


def test_memory_is_bounded_by_the_budget():
    train, val = features(20_000, width=8, dtype=torch.float16), features(3_000, width=8, dtype=torch.float16, seed=1)
    budget = 8 * 2**20  # all similarities would take 240 MB
    with LargestTensor() as largest:
        knn_classify(train, val, (20,), budget=budget)
    assert largest.bytes < budget


@pytest.mark.parametrize("budget", [64 * 2**20, 512 * 2**20])
def test_tile_at_imagenet_size(budget):
    q, m = tile_shape(1_281_167, 50_000, 768, 200, budget)
    similarities = q * m * (4 + 8 + 8)
    rows = (q + m) * 768 * 4 * 2
    assert budget / 4 < similarities + rows < budget
    assert q >= 512  # few readings of the memory
    assert m >= 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": ()}, r"ks is \[\]"),
        ({"ks": (10, 0)}, r"ks is \[10, 0\]; .* each 1 or more"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be above 0"),
    ],
)
def test_unusable_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        knn_classify(features(10), features(5), **change)


def test_unlabelled_features():
    train, val = features(10), features(5)
    unlabelled = Features(val.values, torch.full_like(val.labels, -1), val.ids)
    with pytest.raises(EvaluationError, match="the validation features has no labels"):
        knn_classify(train, unlabelled)


def test_different_widths():
    with pytest.raises(EvaluationError, match="training features have 16 numbers, validation features 8"):
        knn_classify(features(10), features(5, width=8))


def test_a_single_image_has_no_others():
    one = features(1)
    with pytest.raises(EvaluationError, match="there are none"):
        knn_classify(one, one, (1,), leave_one_out=True)
