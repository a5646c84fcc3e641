import time

import pytest

from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.parse import parse_pretrain


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_recipe_then_command_line_then_the_papers_defaults(tmp_path):
    given = recipe(tmp_path, "method: dino\ndata: {path: a.beton}\nviews: {local: {count: 4}}\noptim: {lr: 2e-3}\n")
    config, _ = parse_pretrain([given, "--views.local.size", "64", "--optim.lr=1e-3"])
    assert config.method == "dino"
    assert (config.views.local.count, config.views.local.size) == (4, 64)
    assert config.views.local.scale == (0.05, 0.4)
    assert config.optim.lr == 1e-3
    assert config.settings.out_dim == 65536


def test_method_defaults_are_the_papers():
    config, _ = parse_pretrain(["--method", "mae", "--data.path", "a.beton"])
    assert config.model.positions == "sincos"
    assert config.optim.betas == (0.9, 0.95)
    assert config.settings.mask_ratio == 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run.step=3"], "unknown key 'run.step'; did you mean 'run.steps'?"),
        (["--optim.lrr", "3"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["--optim.learning_rate=3"], "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
        (["--learning_rate=3"], "unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        (["--val", "x"], "unknown key 'val'; did you mean 'data.val'?"),
        (["--epochs=3"], "unknown key 'epochs'; did you mean 'schedule.epochs'?"),
        (["--run.zzzz=3"], "unknown key 'run.zzzz' (fastssl pretrain --help lists all)"),
        (["--views.local.sise=64"], "unknown key 'views.local.sise'; did you mean 'views.local.size'?"),
        (["--mae.mask_ratio=0.5"], "unknown key 'mae.mask_ratio'"),
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--optim.lr=-1"], "optim.lr is -1.0; it must be positive"),
        (["--views.global1.scale=[0.5,0.2]"], "views.global1.scale is (0.5, 0.2); it must be 2 numbers, each above 0"),
        (["--views.local.count=-1"], "views.local.count is -1; it must be 0 or more"),
    ],
)
def test_a_bad_argument_is_one_line_that_names_the_key(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse_pretrain(["--method=dino", "--data.path=a.beton", *arguments])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: dino\nviews: {local: {cuont: 4}}\n", "did you mean 'views.local.count'?"),
        ("method: dino\nshedule: {epochs: 4}\n", "did you mean 'schedule"),
        ("method: dion\n", "did you mean 'dino'?"),
        (
            "method: dino\noptim: {betas: [0.9, 1]}\n",
            "optim.betas is (0.9, 1.0); it must be 2 numbers, each at least 0",
        ),
        ("method: dino\nviews: {local: {flip: 2}}\n", "views.local.flip is 2.0; it must be a probability from 0 to 1"),
        ("method: [unclosed\n", "recipe.yaml"),
        ("just text\n", "not a recipe"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_key(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        parse_pretrain([recipe(tmp_path, text), "--data.path=a.beton"])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian"], "did you mean 'pretrain'?"),
        (["pretrain"], "no method named"),
        (["pretrain", "--method=dino"], "data.path is empty"),
        (["pretrain", "--method=dino", "--data.path=/nowhere/at/all.beton"], "/nowhere/at/all.beton"),
        (["pretrain", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["pretrain", "--config", "imagnet/mae_vit_base"], "did you mean 'imagenet/mae_vit_base'?"),
        (["pretrain", "--config", "imagenet/mae_vit_base"], "data.path is empty"),
        (["embed", "a", "b", "c", "--valid=d"], "unknown key 'valid' (fastssl embed --help lists all)"),
        (["recipes", "nothing/like/it"], "fastssl recipes lists them"),
        (["convert"], "needs SRC"),
        (["evaluate", "kn"], "known: knn, linear"),
        (["verify", "/nowhere.beton"], "/nowhere.beton"),
        (["pretrain", "--method=mae", "--optim.lr=-1"], "fastssl: error: optim.lr is -1.0; it must be positive"),
    ],
)
def test_commands_fail_with_one_line_and_a_code(arguments, words, capsys):
    code = main(arguments)
    printed = capsys.readouterr()
    assert code in (1, 2)
    assert words in printed.err + printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["convert", "verify", "pretrain", "evaluate", "bench", "demo"])
def test_every_command_has_help(command, capsys):
    arguments = ["--method=dino"] if command == "pretrain" else []
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([command, *arguments, "--help"]))
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_dashes_and_underscores_are_the_same(tmp_path):
    config, _ = parse_pretrain(["--method=mae", "--data.path=a-b_c.beton", "--data.batch-size", "32"])
    assert config.data.batch_size == 32
    assert config.data.path == "a-b_c.beton"


def test_help_shows_dashes_for_commands_and_underscores_for_configuration_keys(capsys):
    for arguments, shown in ((["convert"], "--max-resolution"), (["pretrain", "--method=mae"], "--data.batch_size")):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        assert shown in capsys.readouterr().out


def test_help_shows_what_a_value_may_be(capsys):
    for command, shown in (
        (["pretrain", "--method=dino"], "(type: float, positive, default: 0.0005)"),
        (["pretrain", "--method=dino"], "Probability of a horizontal flip. (type: float, a probability from 0 to 1,"),
        (["evaluate", "knn"], "Images per forward pass. (type: int, 1 or more, default: 64)"),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert shown in " ".join(capsys.readouterr().out.split())


def test_a_switch_alone_means_yes():
    from dataclasses import dataclass

    from fastssl.parse import parse_options

    @dataclass
    class Options:
        """What it does."""

        build_only: bool = False
        """Only build."""
        name: str = ""
        """A name."""

    for given, expected in (
        (["--build-only"], True),
        (["--build_only", "--name=x"], True),
        (["--build-only", "false"], False),
        (["--build-only=false", "--name", "x"], False),
        ([], False),
    ):
        options, _ = parse_options("fastssl thing", "About.", Options, given)
        assert options.build_only is expected, given


BOMB = "a: &a [0,0,0,0,0,0,0,0,0]\n"
for here, before in ("ba", "cb", "dc", "ed", "fe"):
    BOMB += f"{here}: &{here} [{f'*{before},' * 9}]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]\n", "aliases"),
        ("a: " + "[" * 1200 + "]" * 1200, "recursion"),
        ("#" * (1 << 20), "are not a recipe"),
    ],
)
@pytest.mark.parametrize("command", [["pretrain"], ["evaluate", "knn"]])
def test_a_recipe_that_would_take_minutes_to_read(tmp_path, capsys, text, words, command):
    begin = time.process_time()
    assert main([*command, recipe(tmp_path, f"method: mae\n{text}")]) == 2
    assert words in capsys.readouterr().err
    assert time.process_time() - begin < 10


def test_aliases_that_are_of_use_are_taken(tmp_path):
    given = recipe(tmp_path, "method: dino\ndata: {path: a.beton, batch_size: &n 8, workers: *n}\n")
    assert parse_pretrain([given])[0].data.workers == 8
