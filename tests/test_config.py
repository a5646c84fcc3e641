import pytest

from fastssl.config import Config, ConfigError, Data, Health, Optim, Run, Schedule, View


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Data, {"batch_size": 0}, "data.batch_size is 0; it must be 1 or more"),
        (Data, {"max_bad": -1}, "data.max_bad is -1"),
        (View, {"scale": (0.5, 0.2)}, "scale is (0.5, 0.2); it must be a range inside (0, 1]"),
        (View, {"flip": 1.5}, "flip is 1.5; it must be a probability"),
        (View, {"jitter": (0.4, 0.4, 0.2, 0.9)}, "at most 0.5 in hue"),
        (View, {"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        (Optim, {"lr": 0.0}, "optim.lr is 0.0; it must be positive"),
        (Optim, {"betas": (0.9, 1.0)}, "optim.betas"),
        (
            Schedule,
            {"epochs": 5, "warmup_epochs": 6},
            "schedule.warmup_epochs is 6; it must be from 0 to schedule.epochs",
        ),
        (Run, {"seed": -1}, "run.seed is -1"),
        (Run, {"save_every": 0.0}, "run.save_every"),
        (Health, {"grad_spike": 1.0}, "health.grad_spike"),
    ],
)
def test_a_bad_value_names_its_key_and_what_is_allowed(kind, values, words):
    with pytest.raises(ConfigError) as error:
        kind(**values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_as_dict_is_plain_and_puts_the_method_under_its_name():
    from fastssl.methods import METHODS

    dino = METHODS["dino"]
    values = Config("dino", dino.Views(), dino.Settings()).as_dict()
    assert values["dino"]["out_dim"] == 65536
    assert "settings" not in values
    assert values["optim"]["betas"] == [0.9, 0.999]
    assert "name" not in values["views"]["local"]
