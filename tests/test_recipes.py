"""Every recipe in configs/ is accepted by the command it is for, and its networks can be built."""

from pathlib import Path

import pytest
import torch
import yaml

from fastssl.cli import main
from fastssl.evaluation.frozen.linear import LinearOptions
from fastssl.evaluation.tuned.detect import DetectOptions
from fastssl.evaluation.tuned.finetune import FinetuneOptions
from fastssl.evaluation.tuned.segment import SegmentOptions
from fastssl.methods import METHODS
from fastssl.parse import parse_options, parse_pretrain

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
PRETRAIN = [path for path in RECIPES if "method" in yaml.safe_load(path.read_text())]
KINDS = {"finetune": FinetuneOptions, "linear": LinearOptions, "segment": SegmentOptions, "detect": DetectOptions}


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", PRETRAIN, ids=name)
def test_pretraining(path):
    config, _ = parse_pretrain([f"--config={path}", "--data.path=x", "--data.val=y"])
    with torch.device("meta"):
        method = METHODS[config.method](config)
    assert any(key.startswith(method.backbone_prefix) for key in method.state_dict())


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in PRETRAIN], ids=name)
def test_evaluation(path):
    (kind,) = (kind for word, kind in KINDS.items() if word in path.stem)
    paths = ["--checkpoint=c.pt", "--data=x", "--val=y"]
    parse_options("x", "x", kind, [f"--config={path}", *paths], recipe=True)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_head_says_what_it_is_and_how_to_start_it(path):
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert "Command:" in head or path.stem == "quickstart"
    assert path.name in head or name(path) in head or path.stem == "quickstart"


def test_recipes_are_listed_by_name_with_paper_and_numbers_and_shown_whole(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(path.relative_to(CONFIGS).with_suffix("").as_posix() in listed.splitlines() for path in RECIPES)
    assert main(["recipes", "imagenet/mae"]) == 0
    one = capsys.readouterr().out
    assert "He et al. 2021" in one
    assert "Published: 83.3 top-1" in one
    assert "Cost (estimate): 56 GFLOP per image" in one
    assert "dino" not in one
    assert main(["recipes", "imagenet/mae_vit_base"]) == 0
    assert capsys.readouterr().out.strip() == (CONFIGS / "imagenet/mae_vit_base.yaml").read_text().strip()


@pytest.mark.parametrize("given", ["imagenet/mae_vit_base", "configs/imagenet/mae_vit_base.yaml"])
def test_a_recipe_is_found_by_name_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = parse_pretrain(["--config", given, "--data.path=x"])
    assert config.schedule.epochs == 800
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet/mae_vit_base").write_text("method: dino\n")  # a file of one's own comes first
    assert parse_pretrain(["--config=imagenet/mae_vit_base", "--data.path=x"])[0].method == "dino"
