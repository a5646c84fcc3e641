"""Every recipe in configs/ is accepted by the command it is for, and its networks can be built."""

from pathlib import Path

import pytest
import torch
import yaml

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
    assert path.name in head or path.stem == "quickstart"
