import contextlib
import io
import json
import os
import shutil
from unittest import mock

import pytest
from tiny import draw_classes, save_checkpoint

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.frozen.knn import KNNOptions, evaluate_knn
from fastssl.evaluation.frozen.linear import LinearOptions, evaluate_linear

VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=4, heads=2)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that every protocol needs: a checkpoint with random weights and images."""
    root = tmp_path_factory.mktemp("evaluate")
    return {
        "checkpoint": save_checkpoint(root / "last.pt", VIT),
        "data": draw_classes(root / "train", 60, 0, sides=(24, 20)),
        "val": draw_classes(root / "val", 30, 1, sides=(24, 20)),
        "workers": 1,
    }


def test_knn(given):
    evaluation = evaluate_knn(KNNOptions(**given))
    values = evaluation.as_dict()
    assert values["k"] == 20
    assert values["top1"] == evaluation.top1 == values["ks"]["20"]["top1"] > 60  # chance: 33
    assert values["top1_interval"][0] < values["top1"] < values["top1_interval"][1] or values["top1"] == 100.0
    assert list(values["ks"]) == ["10", "20", "100", "200"]
    assert values["ks"]["200"]["neighbours"] == 60
    expected = {"checkpoint": given["checkpoint"], "step": 7, "train_images": 60, "val_images": 30, "width": 24}
    assert {key: values[key] for key in expected} == expected
    table = evaluation.table()
    assert "200 (all 60)" in table
    assert f"{evaluation.top1:.2f}" in table


def test_knn_without_20_takes_the_first(given):
    assert evaluate_knn(KNNOptions(**given, ks=(5, 1))).k == 5


def test_knn_on_one_data_set_leaves_one_out(given):
    evaluation = evaluate_knn(KNNOptions(**{**given, "val": given["data"] + "/"}, ks=(1, 500)))
    assert evaluation.results[500].neighbours == 59
    assert evaluation.results[1].top1 < 100.0


def test_knn_options_reach_the_network(given):
    assert evaluate_knn(KNNOptions(**given, blocks=3, mean_patch=True)).measured.width == 4 * 24
    assert evaluate_knn(KNNOptions(**given, size=8, resize=30)).top1 != evaluate_knn(KNNOptions(**given)).top1


def test_linear(given):
    evaluation = evaluate_linear(LinearOptions(**given, epochs=20))
    values = evaluation.as_dict()
    assert values["width"] == 4 * 24  # DINO: the class tokens of four blocks
    assert values["top1"] == evaluation.top1 > 60
    assert len(values["held_out"]) == 7
    assert "top-1 % on the held-out tenth" in evaluation.table()


@pytest.mark.parametrize("augment", [False, True])
def test_linear_behind_a_hidden_layer(given, augment):
    options = {**given, "hidden": 8, "epochs": 6, "step_size": 20, "lrs": (1.0,), "augment": augment}
    evaluation = evaluate_linear(LinearOptions(**options))
    assert evaluation.top1 > 50
    assert evaluation.as_dict()["hidden"] == 8
    assert "linear behind 8 hidden units" in evaluation.table()
    assert evaluate_linear(LinearOptions(**{**options, "hidden": 0})).result != evaluation.result


def test_linear_with_drawn_crops(given):
    options = {**given, "augment": True, "epochs": 4, "step_size": 25, "lrs": (0.1, 1.0)}
    evaluation = evaluate_linear(LinearOptions(**options))
    assert evaluation.top1 > 60
    assert set(evaluation.result.held_out) == {0.1, 1.0}
    assert evaluate_linear(LinearOptions(**options)).result == evaluation.result
    assert evaluate_linear(LinearOptions(**options, seed=1)).result != evaluation.result


@pytest.mark.parametrize("augment", [False, True])
def test_linear_as_mae(given, augment):
    evaluation = evaluate_linear(
        LinearOptions(**given, protocol="mae", epochs=30, step_size=16, lrs=(100.0, 300.0), augment=augment)
    )
    assert evaluation.measured.width == 24  # the class token of the last block
    assert evaluation.top1 > 60
    assert LinearOptions(**given, protocol="mae").lrs == (0.01, 0.03, 0.1, 0.3, 1.0)


def test_linear_layers_of_wide_vits_and_resnets(given, tmp_path):
    wide = Model(name="vit_base", image_size=16, patch_size=8, depth=1)
    path = save_checkpoint(tmp_path / "wide.pt", wide)
    linear = {**given, "epochs": 1, "lrs": (0.1,)}
    assert evaluate_linear(LinearOptions(**{**linear, "checkpoint": path})).measured.width == 2 * 768
    shallow = Model(**{**vars(VIT), "depth": 3})  # has no four blocks
    path = save_checkpoint(tmp_path / "shallow.pt", shallow)
    assert evaluate_linear(LinearOptions(**{**linear, "checkpoint": path})).measured.width == 3 * 24
    resnet = Model(name="resnet18", image_size=32, small_images=True)
    path = save_checkpoint(tmp_path / "resnet.pt", resnet)
    evaluation = evaluate_linear(LinearOptions(**{**linear, "checkpoint": path}))
    assert evaluation.measured.width == 512
    assert "held-out" not in evaluation.table()


def test_command_line(given, capsys):
    arguments = [f"--{key}={given[key]}" for key in ("checkpoint", "data", "val")]
    assert main(["evaluate", "knn", *arguments, "--ks=[3]", "--device=cpu", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["k"] == 3
    assert values["top1"] > 60
    assert main(["evaluate", "linear", *arguments, "--epochs=2", "--lrs=[0.1]", "--mean_patch=true"]) == 0
    assert "linear, " in capsys.readouterr().out


def test_help_explains_every_option(capsys):
    for protocol in ("knn", "linear"):
        with pytest.raises(SystemExit, match="0"):
            main(["evaluate", protocol, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Checkpoint of a pretraining run" in text
        assert "Concatenate the class tokens of this many last blocks" in text
        assert "in pixels" in text


@pytest.mark.parametrize("kind", [KNNOptions, LinearOptions])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "checkpoint is empty; name a checkpoint with --checkpoint"),
        ({"val": ""}, "val is empty; name labelled images with --val"),
        ({"size": -1}, "size is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"blocks": -1}, "blocks is -1"),
    ],
)
def test_unusable_options(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{"checkpoint": "c.pt", "data": "a", "val": "b", **change})


def test_bad_numbers_are_found_before_any_work():
    paths = {"checkpoint": "c.pt", "data": "a", "val": "b"}
    with pytest.raises(ConfigError, match=r"ks is \(0,\); it must be numbers, each 1 or more"):
        KNNOptions(**paths, ks=(0,))
    with pytest.raises(ConfigError, match="epochs is 0"):
        LinearOptions(**paths, epochs=0)
    with pytest.raises(ConfigError, match=r"val is the same as data \(a\)"):
        LinearOptions(**{**paths, "val": "a"})


def test_data_that_does_not_fit(given, tmp_path):
    with pytest.raises(EvaluationError, match=r"data \(.*class0\) has no labels"):
        evaluate_knn(KNNOptions(**{**given, "data": given["data"] + "/class0"}))
    other = draw_classes(tmp_path, 2, 0)
    with pytest.raises(EvaluationError, match="'class2' is only in data"):
        evaluate_knn(KNNOptions(**{**given, "val": other}))


def test_sizes_that_do_not_fit(given):
    with pytest.raises(ConfigError, match=r"size is 20; it must be a multiple of model.patch_size, 8"):
        evaluate_knn(KNNOptions(**given, size=20))
    with pytest.raises(ConfigError, match=r"resize is 8; it must be 0 \(automatic\) or at least size, 16"):
        evaluate_linear(LinearOptions(**given, resize=8))


def linear_on(rank, options):
    return evaluate_linear(LinearOptions(**options)).as_dict()


@pytest.mark.parametrize("augment", [False, True])
def test_two_processes_train_the_linear_layers_of_one(given, augment, on_processes):
    options = {**given, "cache": "none", "epochs": 3, "lrs": (0.1, 0.3), "step_size": 20, "augment": augment}
    alone, *together = linear_on(0, options), *on_processes(2, linear_on, options)
    for values in (alone, *together):
        values.pop("seconds")
    assert together == [alone, alone]


def printed(rank, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as text, mock.patch.dict(os.environ, RANK=str(rank)):
        assert main(arguments) == 0
    return text.getvalue()


def test_two_processes_print_the_numbers_of_one_once(given, on_processes):
    arguments = ["evaluate", "knn", *(f"--{key}={value}" for key, value in given.items()), "--cache=none", "--json"]
    first, second = on_processes(2, printed, arguments)
    assert second == ""
    together, alone = json.loads(first), json.loads(printed(0, arguments))
    for values in (alone, together):
        values.pop("seconds")
    assert together == alone


def test_features_are_kept_beside_the_checkpoint_unless_told_otherwise(given, tmp_path):
    own = shutil.copy(given["checkpoint"], tmp_path / "last.pt")
    first = evaluate_knn(KNNOptions(**{**given, "checkpoint": str(own)}))
    kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 2  # of data and of val
    again = evaluate_knn(KNNOptions(**{**given, "checkpoint": str(own)}))
    assert again.top1 == first.top1
    assert sorted((tmp_path / "features").iterdir()) == kept
    evaluate_knn(KNNOptions(**{**given, "checkpoint": str(own), "cache": str(tmp_path / "else")}))
    assert len(list((tmp_path / "else").iterdir())) == 2
    shutil.rmtree(tmp_path / "features")
    evaluate_knn(KNNOptions(**{**given, "checkpoint": str(own), "cache": "none"}))
    assert not (tmp_path / "features").exists()
