import math

import pytest

from fastssl.config import Health
from fastssl.training.health import HealthWatch

LN_K = math.log(65536)


def watch(patience=5, chance=LN_K, first_step=10, **config):
    return HealthWatch(Health(patience=patience, **config), chance, first_step)


def run(w, scalars, steps):
    return [line for step in steps for line in w.observe(step, scalars)]


def test_loss_pinned_at_ln_k_is_reported_once_after_patience():
    w = watch()
    assert run(w, {"loss": LN_K * 1.004}, range(10, 14)) == []
    (line,) = run(w, {"loss": LN_K * 0.998}, range(14, 40))
    assert "pinned at 11.090" in line
    assert "step 14" in line
    assert "since step 10" in line


def test_first_epoch_never_counts():
    assert run(watch(first_step=1000), {"loss": LN_K, "feature_std": 0.0}, range(999)) == []


def test_a_break_starts_the_count_again_and_rearms_the_report():
    w = watch()
    assert run(w, {"loss": LN_K}, range(10, 14)) == []
    assert run(w, {"loss": 8.0}, [14]) == []
    assert run(w, {"loss": LN_K}, range(15, 19)) == []
    assert len(run(w, {"loss": LN_K}, [19])) == 1
    assert run(w, {"loss": 8.0}, [20]) == []
    assert len(run(w, {"loss": LN_K}, range(21, 30))) == 1


@pytest.mark.parametrize(
    ("scalars", "words"),
    [
        ({"teacher_entropy": 0.001}, "every image the same class"),
        ({"teacher_entropy": 0.995}, "uniform"),
        ({"feature_std": 0.003}, "features have collapsed"),
        ({"data_wait": 0.6}, "waits for data 60%"),
        ({"grad_norm": math.inf}, "every step is left out, for its gradients are not finite"),
    ],
)
def test_each_sign_has_its_line(scalars, words):
    (line,) = run(watch(), scalars, range(10, 30))
    assert words in line


def test_healthy_numbers_say_nothing():
    healthy = {"loss": 9.0, "teacher_entropy": 0.5, "feature_std": 0.7, "grad_norm": 1.0, "data_wait": 0.01}
    assert run(watch(), healthy, range(10, 500)) == []


def test_gradient_spike_is_measured_against_the_running_median():
    w = watch()
    run(w, {"grad_norm": 0.5}, range(100))
    (line,) = w.observe(100, {"grad_norm": 15.0})
    assert "30 times its usual 0.5" in line
    assert w.observe(101, {"grad_norm": 0.6}) == []


def test_no_chance_loss_no_pin():
    assert run(watch(chance=None), {"loss": LN_K}, range(10, 100)) == []


def test_off_is_silent():
    assert run(watch(action="off"), {"loss": LN_K, "feature_std": 0.0}, range(10, 100)) == []


def test_state_carries_over_a_resume():
    first = watch()
    run(first, {"loss": LN_K, "grad_norm": 1.0}, range(10, 13))
    second = watch()
    second.load_state_dict(first.state_dict())
    assert run(second, {"loss": LN_K, "grad_norm": 1.0}, [13]) == []
    assert len(run(second, {"loss": LN_K, "grad_norm": 1.0}, [14])) == 1
