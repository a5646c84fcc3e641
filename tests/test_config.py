from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from fastssl.config import (
    Ascending,
    Checked,
    Config,
    ConfigError,
    Data,
    Health,
    Optim,
    PositiveInt,
    Range,
    Run,
    Schedule,
    View,
    ZeroToOne,
    rules,
)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Data, {"batch_size": 0}, "data.batch_size is 0; it must be 1 or more"),
        (Data, {"max_bad": -1}, "data.max_bad is -1"),
        (
            View,
            {"scale": (0.5, 0.2)},
            "scale is (0.5, 0.2); it must be 2 numbers, each above 0 and at most 1, in ascending order",
        ),
        (View, {"flip": 1.5}, "flip is 1.5; it must be a probability"),
        (View, {"jitter": (0.4, 0.4, 0.2, 0.9)}, "hue from 0 to 0.5"),
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
        (Optim, {"lr": float("inf")}, "optim.lr is inf; it must be positive and finite"),
        (Optim, {"lr": float("nan")}, "optim.lr is nan; it must be positive and finite"),
        (Optim, {"lr": "1e-3"}, "optim.lr is '1e-3'; it must be positive"),
        (Optim, {"betas": (0.9,)}, "optim.betas is (0.9,); it must be 2 numbers, each at least 0 and below 1"),
        (Optim, {"weight_decay_end": -0.1}, "optim.weight_decay_end is -0.1; it must be 0 or more"),
        (View, {"name": "local", "size": 0}, "views.local.size is 0; it must be 1 or more"),
        (Health, {"grad_spike": 1.0}, "health.grad_spike"),
    ],
)
def test_a_bad_value_names_its_key_and_what_is_allowed(kind, values, words):
    with pytest.raises(ConfigError) as error:
        kind(**values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@dataclass
class Several(Checked):
    """Each kind of range."""

    some: tuple[PositiveInt, ...] | None = None
    pair: Annotated[tuple[ZeroToOne, ZeroToOne], Ascending()] = (0.0, 1.0)
    eights: Annotated[int, Range(at_least=8, multiple_of=8)] = 8
    open: Annotated[float, Range(above=0, below=1)] = 0.5
    free: float = 0.0
    view: View | None = None


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"some": (1, 5)}, {"some": (1, 0)}, "some is (1, 0); it must be numbers, each 1 or more"),
        ({"some": ()}, {"some": 3}, "some is 3; it must be numbers, each 1 or more"),
        ({"pair": (0.5, 0.5)}, {"pair": (0.5, 0.4)}, "pair is (0.5, 0.4); it must be 2 numbers, each from 0 to 1, in"),
        ({"pair": [0.1, 1]}, {"pair": (0.5, 1.1)}, "pair is (0.5, 1.1); it must be 2 numbers, each from 0 to 1, in"),
        ({"eights": 16}, {"eights": 12}, "eights is 12; it must be a multiple of 8, 8 or more"),
        ({"open": 0.01}, {"open": 1.0}, "open is 1.0; it must be above 0 and below 1"),
        ({"free": -1e30}, {"free": float("nan")}, "free is nan; it must be finite"),
    ],
)
def test_ranges_hold_for_objects_made_in_python(good, bad, words):
    Several(**good)
    with pytest.raises(ConfigError) as error:
        Several(**bad)
    assert str(error.value).startswith(words)


def test_rules_in_words_by_key():
    words = rules(Several, "any.")
    assert words["any.some"] == "numbers, each 1 or more"
    assert words["any.open"] == "above 0 and below 1"
    assert not {"any.free", "any.view"} & set(words)


def test_as_dict_is_plain_and_puts_the_method_under_its_name():
    from fastssl.methods import METHODS

    dino = METHODS["dino"]
    values = Config("dino", dino.Views(), dino.Settings()).as_dict()
    assert values["dino"]["out_dim"] == 65536
    assert "settings" not in values
    assert values["optim"]["betas"] == [0.9, 0.999]
    assert "name" not in values["views"]["local"]
