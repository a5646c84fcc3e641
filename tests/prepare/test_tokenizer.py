"""The stand-in tokenizer: the command's file is one that CAE takes."""

from __future__ import annotations

import json

import pytest
import torch

from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.loaders.synthetic import draw_images
from fastssl.models.dvae import PatchCodebook, load_tokenizer
from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), train=64, val=8) / "train"


def test_the_command_writes_a_tokenizer_that_fits_its_images(images, tmp_path, capsys):
    out = tmp_path / "codebook.pt"
    options = ["--size", "32", "--cell", "8", "--codes", "32", "--patches", "2000", "--steps", "6", "--workers", "1"]
    assert main(["tokenizer", str(images), str(out), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["codes"] == 32
    assert told["patches"] == 1024  # 64 images of 16 cells: all there are
    assert 8 < told["perplexity"] <= 32
    assert 0.3 < told["explained"] < 1
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, PatchCodebook)
    assert (tokenizer.codes, tokenizer.cell) == (32, 8)
    assert tokenizer.patches.mean((1, 2, 3)).diff().min() >= 0  # from dark to light
    pixels = tokenizer.paint(torch.arange(32).view(2, 4, 4))
    assert 0 <= pixels.min() <= pixels.max() <= 1
    again = tmp_path / "again.pt"
    main(["tokenizer", str(images), str(again), *options])
    assert "stand-in tokenizer of 32 codes" in capsys.readouterr().out
    assert torch.equal(load_tokenizer(again).centres, tokenizer.centres)


def test_patches_are_taken_from_many_images(images):
    few = train_tokenizer(TokenizerOptions(str(images), str(images.parent / "few.pt"), codes=4, size=32, patches=128))
    assert few.patches == 128  # two of each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 30}, "size is 30; it must be a multiple of cell, 8"),
        ({"codes": 0}, "codes is 0; it must be 1 or more"),
        ({"patches": 10}, "patches is 10; it must be at least codes, 512"),
    ],
    ids=str,
)
def test_messages(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerOptions(**options)


def test_too_few_images(images, tmp_path):
    options = TokenizerOptions(str(images), str(tmp_path / "x.pt"), size=8, codes=100)
    with pytest.raises(ConfigError, match="gives 64 patches, fewer than codes, 100"):
        train_tokenizer(options)
    assert not (tmp_path / "x.pt").exists()
