import math

import pytest
import torch

from fastssl.evaluation.accuracy import NEVER, Accuracy, class_ranks, format_table, top_accuracy, wilson


def test_ranks_count_the_classes_in_front():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert class_ranks(scores, torch.tensor([1, 2, 0])).tolist() == [0, 1, 2]


def test_equal_scores_go_by_class_index():
    assert class_ranks(torch.ones(3, 3), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("nothing", [-math.inf, math.nan])
def test_a_class_without_a_score_is_never_right(nothing):
    scores = torch.tensor([[nothing, nothing], [nothing, 1.0]])
    assert class_ranks(scores, torch.tensor([0, 0])).tolist() == [NEVER, NEVER]


def test_top_accuracy():
    top1, top5 = top_accuracy(torch.tensor([0, 0, 4, 5]))
    assert (top1, top5) == (50.0, 75.0)


# Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_interval_of_the_literature(right, images, low, high):
    assert wilson(right / images, images) == pytest.approx((low, high), abs=0.006)


def test_interval_stays_inside_0_to_100_and_narrows():
    assert wilson(1.0, 10)[1] == pytest.approx(100.0)
    assert wilson(0.0, 10)[0] == pytest.approx(0.0)
    narrow, wide = wilson(0.5, 10000), wilson(0.5, 100)
    assert wide[0] < narrow[0] < 50 < narrow[1] < wide[1]


def test_accuracy_as_plain_values():
    values = Accuracy(50.0, 75.0, 100).as_dict()
    assert values["top1"] == 50.0
    assert values["images"] == 100
    assert values["top1_interval"] == pytest.approx([40.4, 59.6], abs=0.05)


def test_table_is_aligned():
    assert format_table([("k", "top-1 %"), ("10", "5.00")]) == " k  top-1 %\n10     5.00"
