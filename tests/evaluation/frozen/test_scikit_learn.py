"""k-NN and the linear layer against scikit-learn's, on the same features."""

import numpy as np
import pytest
import torch
from sklearn import linear_model, neighbors

from fastssl.evaluation.frozen.features import Features
from fastssl.evaluation.frozen.knn_vote import knn_classify
from fastssl.evaluation.frozen.linear_probe import linear_probe


def clusters(images, seed, classes=6, width=20, noise=2.5):
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    values = centres[labels] + noise * torch.randn(images, width, generator=generator)
    return Features(values, labels, torch.arange(images))


def unit(features):
    return torch.nn.functional.normalize(features.values, dim=1).double().numpy()


@pytest.mark.parametrize("k", [1, 20, 100])
def test_knn_is_scikit_learns_with_the_same_votes(k):
    train, val = clusters(1500, 0), clusters(700, 1)

    def votes(distance):  # of unit vectors: cosine = 1 - distance^2 / 2
        return np.exp((1 - distance**2 / 2) / 0.07)

    theirs = neighbors.KNeighborsClassifier(k, weights=votes, algorithm="brute").fit(unit(train), train.labels.numpy())
    expected = 100 * theirs.score(unit(val), val.labels.numpy())
    found = knn_classify(train, val, (k,))[k].top1
    assert found == pytest.approx(expected, abs=100 / 700 + 1e-9)  # one image: a tie that rounding decides
    assert 30 < found < 80  # neither chance (17) nor trivial


def test_linear_layer_comes_to_where_logistic_regression_does():
    train, val = clusters(4000, 0), clusters(4000, 1)
    theirs = linear_model.LogisticRegression(C=1e3, max_iter=500).fit(train.values.numpy(), train.labels.numpy())
    expected = 100 * theirs.score(val.values.numpy(), val.labels.numpy())
    found = linear_probe(train, val, lrs=(0.01, 0.1), epochs=60, batch_size=256)
    assert found.top1 == pytest.approx(expected, abs=1.0)  # one standard error is 0.8
    assert 35 < found.top1 < 90
