"""The stand-in tokenizer: k-means finds what is there, and the command's file is one that CAE takes."""

from __future__ import annotations

import json

import pytest
import torch

from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.loaders.synthetic import draw_images
from fastssl.models.dvae import PatchCodebook, load_tokenizer, nearest
from fastssl.prepare.tokenizer import TokenizerOptions, kmeans, train_tokenizer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), train=64, val=8) / "train"


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    truth = torch.randn(9, 4) * 10
    points = truth.repeat_interleave(40, 0) + torch.randn(360, 4) / 10
    centres = kmeans(points, 9, 5, torch.Generator().manual_seed(0))
    codes = nearest(points, centres).view(9, 40)
    assert (codes == codes[:, :1]).all()
    means = points.view(9, 40, 4).mean(1)
    torch.testing.assert_close(centres[codes[:, 0]], means, rtol=1e-4, atol=1e-4)


def test_kmeans_leaves_no_centre_empty_where_points_suffice():
    points = torch.cat([torch.zeros(500, 2), torch.arange(12.0).view(6, 2)])
    centres = kmeans(points, 6, 8, torch.Generator().manual_seed(0))
    assert len(nearest(points, centres).unique()) == 6


def test_more_codes_than_different_patches_still_gives_finite_centres():
    centres = kmeans(torch.ones(50, 3), 4, 3, torch.Generator().manual_seed(0))
    assert centres.isfinite().all()


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
