import numpy as np
import pytest

from fastssl.training.schedule import cosine, linear_ramp, warmup_cosine


def test_cosine_goes_from_start_to_end_through_the_middle():
    assert cosine(0, 100, 0.996, 1.0) == pytest.approx(0.996)
    assert cosine(50, 100, 0.0, 1.0) == pytest.approx(0.5)
    assert cosine(100, 100, 0.996, 1.0) == 1.0
    assert cosine(250, 100, 0.996, 1.0) == 1.0


def test_warmup_is_linear_and_meets_the_cosine_at_its_peak():
    values = [warmup_cosine(step, 100, 10, peak=1.0, end=0.1) for step in range(101)]
    assert values[:11] == pytest.approx([i / 10 for i in range(11)])
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert len(set(values[10:])) == 91


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
def test_dinos_warmup_is_numpys_linspace(warmup):
    left = np.arange(20 - warmup)
    authors = 0.1 + 0.5 * (3.0 - 0.1) * (1 + np.cos(np.pi * left / len(left)))
    authors = np.concatenate([np.linspace(0.0, 3.0, warmup), authors])
    assert [warmup_cosine(step, 20, warmup, 3.0, 0.1, peak_twice=True) for step in range(20)] == pytest.approx(authors)


def test_no_warmup_starts_at_the_peak():
    assert warmup_cosine(0, 10, 0, peak=3.0, end=0.0) == 3.0


def test_linear_ramp_is_dinos_temperature_schedule():
    # 0.04 to 0.07 over 30 epochs, then constant.
    assert linear_ramp(0, 30, 0.04, 0.07) == 0.04
    assert linear_ramp(15, 30, 0.04, 0.07) == pytest.approx(0.055)
    assert linear_ramp(30, 30, 0.04, 0.07) == 0.07
    assert linear_ramp(0, 0, 0.04, 0.07) == 0.07
