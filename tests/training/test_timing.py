"""The watch on the parts of a step."""

import time

import pytest
import torch

from fastssl.training.timing import Stopwatch, section


def wait(seconds):
    time.sleep(seconds)


def test_parts_add_up_and_inner_time_is_not_the_outer_ones():
    watch = Stopwatch(torch.device("cpu"))
    begin = time.perf_counter()
    with watch.listening():
        for _ in range(2):
            with section("outer"):
                wait(0.02)
                with section("inner"):
                    wait(0.05)
                wait(0.01)
            wait(0.03)
            with section("last"):
                wait(0.01)
    elapsed = time.perf_counter() - begin
    seconds = watch.read()
    assert list(seconds) == ["outer", "inner", "last"]
    assert 0.06 <= seconds["outer"] < elapsed - 0.18  # without inner, last and the time between
    assert 0.10 <= seconds["inner"] < elapsed - 0.14
    assert 0.02 <= seconds["last"] < elapsed - 0.22
    assert watch.read() == {}


def test_nobody_listens_outside():
    watch = Stopwatch(torch.device("cpu"))
    with watch.listening():
        pass
    with section("unheard"):
        pass
    assert watch.read() == {}


def test_a_part_that_raises_is_closed():
    watch = Stopwatch(torch.device("cpu"))
    with watch.listening():
        with pytest.raises(KeyError), section("broken"):
            raise KeyError
        with section("next"):
            wait(0.02)
    seconds = watch.read()
    assert seconds["broken"] < 0.02 <= seconds["next"]
