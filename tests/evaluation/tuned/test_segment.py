"""The segmentation run: from a checkpoint and folders to numbers, resumption, several processes, messages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import save_checkpoint

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.label_maps import IGNORED, open_labelled_folder
from fastssl.evaluation.tuned.segment import Segmentation, SegmentOptions, evaluate_segment, judge, lr_factor
from fastssl.loaders.synthetic import draw_image
from fastssl.parse import parse_options
from fastssl.training import checkpoint, distributed

RECIPES = Path(__file__).parents[3] / "configs" / "ade20k"
VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=4, heads=2)
RESNET = Model(name="resnet18", width=8)
SMALL = {"crop": 48, "short_side": 48, "long_side": 100, "batch_size": 2, "warmup_steps": 2, "channels": 16}
SMALL |= {"device": "cpu", "workers": 1, "pictures": 0}


def draw(folder, images, seed):
    for i in range(images):
        picture, labels = draw_image(i % 8, seed=seed, number=i)
        for kind, pixels, ending in (("images", picture, "jpg"), ("labels", labels, "png")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{i:02d}.{ending}")
    return str(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options that every run needs: a checkpoint with random weights and labelled images."""
    root = tmp_path_factory.mktemp("segment")
    return {
        "checkpoint": save_checkpoint(root / "last.pt", VIT),
        "data": draw(root / "train", 9, 0),
        "val": draw(root / "val", 5, 1),
        **SMALL,
    }


def test_command_line(given, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({key: given[key] for key in SMALL}))
    names = tmp_path / "names.txt"
    names.write_text("scene\nbody\ndetail\n")
    arguments = ["evaluate", "segment", "--config", str(recipe), "--steps", "4", "--eval_every", "2"]
    for key in ("checkpoint", "data", "val"):
        arguments += [f"--{key}", given[key]]
    arguments += ["--dir", str(tmp_path / "run"), "--names", str(names), "--pictures", "2"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["steps"] == 4
    assert values["train_images"] == 9
    assert values["val_images"] == 5
    assert [line["name"] for line in values["classes"]] == ["scene", "body", "detail"]
    assert [step for step, _ in values["history"]] == [2]
    assert 0 <= values["interval"][0] <= values["miou"] <= values["interval"][1] <= 100
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2, 4}
    assert lines[-1]["miou"] == values["miou"]
    assert main([*arguments, "--mode", "whole"]) == 0  # trained already: judged again
    text = capsys.readouterr().out
    assert "mIoU %" in text
    assert "detail" in text


@pytest.mark.parametrize(
    "changes", [{"relative_positions": True}, {"auxiliary": 0.0}, {"scratch": True}, {"accumulate": 2}]
)
def test_variants_run(given, tmp_path, changes):
    result = evaluate_segment(SegmentOptions(**{**given, **changes}, steps=2, dir=str(tmp_path)))
    assert 0 <= result.miou <= 100
    assert result.overlap.images == 5


def test_resnet_runs(given, tmp_path):
    path = save_checkpoint(tmp_path / "resnet.pt", RESNET)
    options = SegmentOptions(
        **{**given, "checkpoint": path, "crop": 50}, mode="whole", steps=2, drop_path=0.0, dir=str(tmp_path)
    )
    assert 0 <= evaluate_segment(options).miou <= 100


def test_checkpoint_gives_the_weights_and_scratch_does_not(given, tmp_path):
    loaded = {}
    for scratch in (False, True):
        options = SegmentOptions(**given, scratch=scratch, seed=5, steps=2, dir=str(tmp_path))
        loaded[scratch] = Segmentation(options).network.pyramid.backbone.blocks[0].mlp.fc1.weight
    stored = checkpoint.read(given["checkpoint"]).network["teacher.blocks.0.mlp.fc1.weight"]
    assert torch.equal(loaded[False], stored)
    assert not torch.equal(loaded[True], stored)


def test_images_of_a_step_do_not_depend_on_how_it_is_divided(given, tmp_path):
    views = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        changes = {"batch_size": batch_size, "accumulate": accumulate}
        run = Segmentation(SegmentOptions(**{**given, **changes}, steps=5, dir=str(tmp_path)))
        run.step = 1
        stream = run.micro_batches()
        views.append(torch.cat([next(stream)[0] for _ in range(12 // batch_size)]))
        stream.close()
    assert torch.equal(*views)


# -- several processes -----------------------------------------------------------------------------------------------


def answer(picture):
    """A classifier that is sometimes right."""
    return (picture.sum(0) % 3).long()


def run(rank, options):
    """What `judge` finds with `answer`, and what a short training run with as many images per step ends in."""
    torch.set_num_threads(1)
    judged = vars(judge(answer, open_labelled_folder(options["val"], "", "val"), 3))
    options["batch_size"] //= distributed.world()
    segmentation = Segmentation(SegmentOptions(**options))
    result = segmentation.train()
    network = segmentation.network
    trained = [network.decoder.fusion_block[1].running_mean, network.head[1].weight.detach()]
    return judged, result.overlap.images, trained


def first_loss(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_two_processes_are_as_one(given, tmp_path, on_processes):
    options = {**given, "batch_size": 4, "steps": 3, "drop_path": 0.0, "dropout": 0.0, "lr": 1e-3}
    judged, images, trained = run(0, {**options, "dir": str(tmp_path / "one")})
    assert judged["images"] == images == 5  # one more for the first process than for the second
    for found in on_processes(2, run, {**options, "dir": str(tmp_path / "two")}):
        assert found[:2] == (judged, images)
        torch.testing.assert_close(found[2][0], trained[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[2][1], trained[1], rtol=0, atol=1e-3)
    assert first_loss(tmp_path / "two") == pytest.approx(first_loss(tmp_path / "one"), rel=1e-4)


# -- judging ---------------------------------------------------------------------------------------------------------


def test_perfect_answers_are_perfect(given, tmp_path):
    data = open_labelled_folder(given["val"], "", "val")
    truth = iter([data.label_map(i).clamp_min(0) for i in range(5)])
    result = judge(lambda picture: next(truth), data, 3, draw=[0, 4], folder=tmp_path)
    assert result.miou == result.macc == result.aacc == 100
    assert result.constant < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000-00.png", "00004-04.png"]
    height, width = data.label_map(0).shape
    drawn = Image.open(tmp_path / "00000-00.png")
    assert drawn.width >= 3 * width
    assert drawn.height >= height


def test_windows_do_not_shift_the_answer(given, tmp_path):
    run = Segmentation(SegmentOptions(**given, steps=2, dir=str(tmp_path)))

    class Bright(torch.nn.Module):
        """Class 1 where an image is bright, at a quarter of the resolution."""

        def forward(self, images):
            level = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
            return torch.cat([-level, level, level - 99], dim=1), None

    run.segmenter = Bright()
    picture = torch.zeros(3, 120, 300, dtype=torch.uint8)
    picture[:, 60:, 150:] = 255
    found = run._classify(picture)
    assert found.shape == (120, 300)
    assert ((found == 1) == (picture[0] > 0)).float().mean() > 0.98
    run.segmenter = lambda images: (torch.full((len(images), 3, 4, 4), torch.nan), None)
    with pytest.raises(EvaluationError, match="scores are not finite"):
        run._classify(picture)


def test_lr_factor():
    assert lr_factor(0, 160000, 1500) == pytest.approx(1e-6)
    assert lr_factor(750, 160000, 1500) == pytest.approx((1 - 750 / 160000) * 0.5, rel=1e-5)
    assert lr_factor(1500, 160000, 1500) == 1 - 1500 / 160000
    assert lr_factor(80000, 160000, 1500) == 0.5
    assert lr_factor(159999, 160000, 1500) == pytest.approx(1 / 160000)
    assert lr_factor(0, 10, 0) == 1


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_recipes(recipe):
    given = ["--config", str(recipe), "--checkpoint", "c", "--data", "a", "--val", "b", "--classes", "150"]
    options, _ = parse_options("segment", "", SegmentOptions, given, recipe=True)
    assert (options.steps, options.warmup_steps, options.crop, options.batch_size * 8) == (160000, 1500, 512, 16)
    assert options.relative_positions
    assert options.reduce_zero_label
    assert set(yaml.safe_load(recipe.read_text())) <= set(vars(options))


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "checkpoint is empty"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"classes": 1}, "classes is 1; it must be 2 or more"),
        ({"warmup_steps": 9}, r"warmup_steps is 9; it must be at most steps \(4\)"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"drop_path": 2.0}, "drop_path is 2.0; it must be a probability"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"stride": 49}, r"stride is 49; it must be at most crop \(48\)"),
        ({"seed": -1}, "seed is -1"),
        ({"relative_positions": True, "mode": "whole"}, "mode is 'whole'; it must be slide"),
    ],
)
def test_wrong_options_are_named(given, changes, message):
    with pytest.raises(ConfigError, match=message):
        SegmentOptions(**{**given, "steps": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"crop": 44}, ConfigError, "crop is 44; it must be a multiple of model.patch_size, 8"),
        ({"classes": 2}, EvaluationError, r"\.png has label 2 in \d+ pixels; labels are 0 to 1"),
        ({"batch_size": 10}, ConfigError, "9 images, fewer than one optimizer step takes: 10"),
        ({"batch_size": 1}, ConfigError, "batch_size is 1 on one process"),
        ({"taps": (1, 2)}, ConfigError, "taps is"),
        ({"names": "nowhere.txt"}, ConfigError, "names is 'nowhere.txt', which cannot be read"),
        ({"data_labels": "nowhere"}, ConfigError, "data_labels is 'nowhere', which is not a folder"),
    ],
)
def test_wrong_numbers_are_named(given, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        Segmentation(SegmentOptions(**{**given, "steps": 2, "dir": str(tmp_path), **changes}))


def test_resnet_refuses_what_changes_a_vit(given, tmp_path):
    path = save_checkpoint(tmp_path / "resnet.pt", RESNET)
    with pytest.raises(ConfigError, match="relative_positions is True; it must be off with a ResNet"):
        Segmentation(
            SegmentOptions(**{**given, "checkpoint": path, "dir": str(tmp_path)}, steps=2, relative_positions=True)
        )


def test_ignored_pixels_count_nowhere(tmp_path):
    for kind, ending, pixels in (("images", "png", np.zeros((4, 4, 3))), ("labels", "png", np.eye(4) * 255)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / f"a.{ending}")
    data = open_labelled_folder(str(tmp_path), "", "val")
    assert (data.label_map(0) == IGNORED).sum() == 4
    result = judge(lambda picture: torch.eye(4).long(), data, 2)
    assert result.miou == result.aacc == 100
