"""The table of names: prefixes both ways, pieces that stay, older names, parts of a file."""

import pytest

from fastssl.methods.names import Names

NAMES = Names(
    [
        ("net.blocks.*.gamma_1", "body.layers.*.scale"),
        ("net.blocks.", "body.layers."),
        ("net.", "body."),
        ("loss.center", "center"),
    ],
    bare="net.",
    older=[("net.old.", "body.head.")],
    wrapped=("net",),
)
OURS = {"body.layers.3.scale": 1, "body.layers.3.norm.bias": 2, "body.head.weight": 3, "center": 4}


def test_both_ways():
    file = NAMES.theirs(OURS)
    assert file == {
        "net": {"module.blocks.3.gamma_1": 1, "module.blocks.3.norm.bias": 2, "module.head.weight": 3},
        "loss": {"center": 4},
    }
    assert NAMES.ours({**file, "epoch": 7, "optimizer": {"state": {}}}) == OURS


def test_wrapper_and_older_names_are_read():
    assert NAMES.ours({"net": {"old.weight": 3, "blocks.0.x": 5}}) == {"body.head.weight": 3, "body.layers.0.x": 5}


def test_a_file_without_parts_is_the_bare_one():
    assert NAMES.ours({"blocks.12.gamma_1": 1, "module.stem.weight": 2}) == {
        "body.layers.12.scale": 1,
        "body.stem.weight": 2,
    }


def test_a_star_is_one_piece_and_dots_are_dots():
    assert NAMES.ours({"blocks.1.2.gamma_1": 1, "blocksX1.gamma_1": 2}) == {
        "body.layers.1.2.gamma_1": 1,
        "body.blocksX1.gamma_1": 2,
    }


def test_a_key_that_nothing_fits():
    with pytest.raises(KeyError, match="other"):
        NAMES.theirs({"other": 1})
    with pytest.raises(KeyError, match="other"):
        NAMES.ours({"loss": {"other": 1}})
