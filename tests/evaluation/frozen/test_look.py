"""`fastssl look`: every section shows what it says, for whole methods, bare backbones and ResNets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from tiny import draw_classes, recipe, save_checkpoint

from fastssl.cli import main
from fastssl.config import Model
from fastssl.evaluation.frozen import look as module
from fastssl.methods import METHODS
from fastssl.parse import parse_recipe
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of a whole MAE, a whole SemMAE and a bare ResNet; 12 images of three classes."""
    root = tmp_path_factory.mktemp("look")
    for name in ("mae", "saae", "semmae"):
        config, *_ = parse_recipe("", "", [f"--method={name}", *(f"--{k}={v}" for k, v in recipe(name).items())])
        torch.manual_seed(0)
        method = METHODS[name](config)
        saved = Checkpoint("pretrain", config.as_dict(), method.state_dict(), method.backbone_prefix, step=7)
        checkpoint.write(root / f"{name}.pt", saved)
    save_checkpoint(root / "resnet.pt", Model("resnet18", width=4, image_size=32, small_images=True))
    draw_classes(root / "images", 12, seed=0)
    (root / "other").mkdir()
    Image.new("L", (50, 40), 128).save(root / "other" / "0.png")
    return root


@pytest.fixture
def drawn(monkeypatch):
    """The parts of each page, as they are stacked."""
    pages, real = [], module.stack
    monkeypatch.setattr(module, "stack", lambda parts: pages.append(dict(parts)) or real(parts))
    return pages


def test_sections_of_a_whole_method(folder, tmp_path, drawn, capsys):
    names = [str(folder / "images" / "class0" / "0.png"), str(folder / "other" / "0.png")]
    command = ["look", str(folder / "mae.pt"), *names, f"--data={folder / 'images'}", f"--out={tmp_path / 'out'}"]
    assert main([*command, "--neighbours=5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == [str(tmp_path / "out" / name) for name in ("0.png", "0-2.png")]
    assert result["notes"] == []
    first, second = drawn
    heading = f"0.png: {folder / 'mae.pt'} (vit_tiny, step 7)"
    sections = [heading, "Attention of the last block, by head", "mae: reconstruction (central view)"]
    assert list(first) == list(second) == [*sections, "Nearest images"]
    assert first[heading].pictures.shape == (1, 3, 3, 32, 32)
    assert first[sections[1]].pictures.shape == (1, 2, 3, 32, 32)
    assert [words[:7] for words in first[sections[1]].captions[0]] == ["head 1:", "head 2:"]
    torch.testing.assert_close(first[sections[2]].pictures[0, 0], first[heading].pictures[0, 0], atol=1e-6, rtol=0)
    assert not torch.equal(first[sections[2]].pictures[0, 2], second[sections[2]].pictures[0, 2])
    near = first["Nearest images"]
    assert near.captions[0][:2] == ["the image", "1.000 class0"]  # itself
    assert torch.equal(near.pictures[0, 0], near.pictures[0, 1])
    assert near.pictures.shape[:2] == (1, 6)
    cosines = [float(words.split()[0]) for words in near.captions[0][1:]]
    assert cosines == sorted(cosines, reverse=True)
    assert all(Image.open(path).size[0] >= 6 * 96 for path in result["files"])


def test_a_method_that_compares_crops_gets_crops(folder, tmp_path, drawn):
    """The page of each image has its own row, whatever the order in which the loader drew them."""
    names = [str(path) for path in sorted((folder / "images").rglob("*.png"))[:3]]
    assert main(["look", str(folder / "saae.pt"), *names, f"--out={tmp_path}"]) == 0
    for page in drawn:
        first, *_, (heading, sheet) = page.items()
        assert heading == "saae: reconstruction (views drawn as in training)"
        whole, image = sheet.pictures[0, -1], first[1].pictures[0, 0]  # squashed, and its central view
        assert (whole.mean((1, 2)) - image.mean((1, 2))).abs().max() < 0.03
        assert torch.corrcoef(torch.stack([whole.flatten(), image.flatten()]))[0, 1] > 0.6
        assert not torch.equal(sheet.pictures[0, 0], whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet", "does not hold a whole dino with resnet18"),
        ("semmae", "method semmae needs part maps, and a file of an image has none"),
    ],
)
def test_what_cannot_be_shown_is_a_line(folder, tmp_path, drawn, capsys, name, words):
    image = str(folder / "other" / "0.png")
    assert main(["look", str(folder / f"{name}.pt"), image, f"--out={tmp_path}"]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: no picture of what the method does: ")
    assert words in note
    ((heading, *others),) = [list(page) for page in drawn]
    assert others == ([] if name == "resnet" else ["Attention of the last block, by head"])
    assert ("length of the last features" in drawn[0][heading].titles) == (name == "resnet")


def test_colours_are_principal_components_over_all_images():
    maps = torch.randn(2, 7, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8)[:, None, None]
    colours = module.principal_colours(maps)
    assert colours.shape == (2, 3, 5, 4)
    rows = maps.movedim(1, -1).flatten(0, 2).numpy()
    expected = PCA(3).fit_transform(rows)
    for got, component in zip(colours.movedim(1, -1).flatten(0, 2).T.numpy(), expected.T, strict=True):
        inside = (got > 0) & (got < 1)
        assert inside.mean() > 0.9
        assert abs(np.corrcoef(got[inside], component[inside])[0, 1]) > 0.9999
    assert torch.equal(module.principal_colours(maps), colours)
    assert module.principal_colours(torch.zeros(1, 2, 3, 3)).isfinite().all()  # few channels, nothing in them


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["mae.pt"], 2, "needs IMAGES"),
        (["mae.pt", "none.png"], 1, "none.png does not exist"),
        (["mae.pt", "images"], 1, "images is a folder; name the image files in it"),
        (["none.pt", "other/0.png"], 1, "no such checkpoint"),
        (["mae.pt", "mae.pt"], 1, "mae.pt"),
        (["mae.pt", "other/0.png", "--size=20"], 2, "multiple of model.patch_size"),
        (["mae.pt", "other/0.png", "--out=mae.pt/x"], 1, "cannot be written"),
        (["mae.pt", "other/0.png", "--data=none"], 1, "none does not exist"),
    ],
)
def test_messages(folder, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(folder)
    assert main(["look", *arguments]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastssl: error: ")
    assert words in error
    assert not (folder / "look").exists()
