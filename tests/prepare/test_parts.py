"""Part maps: the learner against its formulas, k-means and matching against plain counting, and the whole walk."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.loaders.beton import Beton
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.sources import SourceError, open_source
from fastssl.loaders.synthetic import draw_images
from fastssl.loaders.verify import VerifyOptions, verify
from fastssl.models import build_backbone
from fastssl.prepare.parts.finder import PartFinder, load_finder, normalised, whole_images
from fastssl.prepare.parts.judge import JudgeOptions, judge, match
from fastssl.prepare.parts.learn import LearnOptions, learn
from fastssl.prepare.parts.learner import PartDecoder, PartLearner, add_background, blur, overlap, to_bytes
from fastssl.prepare.parts.tokens import ImportOptions, TokenFileError, import_parts, read_token_file
from fastssl.prepare.parts.write import WriteOptions, write
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint

CPU = torch.device("cpu")


# -- the learner -------------------------------------------------------------------------------------------------------


def test_maps_are_blurred_attention():
    torch.manual_seed(0)
    learner, tokens = PartLearner(8, 3, 16, 1), torch.randn(2, 1 + 16, 8)
    maps = learner.maps(tokens)
    line = [math.exp(-0.5), 1.0, math.exp(-0.5)]
    for b, part in itertools.product(range(2), range(3)):
        weight = learner.queries.weight[part * 8 : part * 8 + 8]
        query = weight @ tokens[b, 0] + learner.queries.bias[part * 8 : part * 8 + 8]
        score = torch.stack([(query * tokens[b, 1 + n]).sum() / math.sqrt(8) for n in range(16)])
        attention = (score.exp() / score.exp().sum()).view(4, 4)
        for row, column in itertools.product(range(4), range(4)):
            value = 0.0
            for i, j in itertools.product((-1, 0, 1), (-1, 0, 1)):
                r, c = (3 - abs(3 - abs(x)) for x in (row + i, column + j))  # mirrored at the outermost cells
                value = value + line[i + 1] * line[j + 1] * attention[r, c] / sum(line) ** 2
            torch.testing.assert_close(maps[b, part, row, column], value)


def test_blur_keeps_constant_maps_and_mass_inside():
    assert torch.allclose(blur(torch.full((1, 2, 5, 5), 0.3)), torch.tensor(0.3))
    spot = torch.zeros(1, 1, 7, 7)
    spot[..., 3, 3] = 1
    assert blur(spot).sum().item() == pytest.approx(1)


def test_maps_stay_exact_under_autocast():
    torch.manual_seed(0)
    learner, tokens = PartLearner(8, 3, 16, 1), torch.randn(2, 1 + 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        maps, painted = learner(tokens)
    assert torch.equal(maps, learner.maps(tokens))
    assert painted.isfinite().all()


def test_overlap_is_the_mean_pairwise_cosine():
    torch.manual_seed(0)
    maps = torch.rand(3, 4, 5, 5, dtype=torch.float64)
    pairs = [(m[i].flatten(), m[j].flatten()) for m in maps for i in range(4) for j in range(i)]
    values = [F.cosine_similarity(a, b, dim=0) for a, b in pairs]
    torch.testing.assert_close(overlap(maps), torch.stack(values).mean())
    apart = torch.eye(4).view(1, 4, 2, 2)
    assert overlap(apart).item() == 0
    assert overlap(apart.sum(1, keepdim=True).expand(1, 3, 2, 2)).item() == pytest.approx(1)


def test_decoder_is_convolutions_in_the_class_tokens_style():
    torch.manual_seed(0)
    decoder, maps, style = PartDecoder(8, 3, 16, 2), torch.rand(2, 3, 4, 4) / 16, torch.randn(2, 8)
    x = F.conv2d(maps * 16, decoder.first.weight, decoder.first.bias, padding=1)
    for i, channels in enumerate((8, 4)):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(x, decoder.steps[i].weight, decoder.steps[i].bias, padding=1)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        numbers = style @ decoder.styles[i].weight.T + decoder.styles[i].bias
        gain, bias = numbers[:, :channels, None, None], numbers[:, channels:, None, None]
        x = gain * (x - mean) / (var + 1e-5).sqrt() + bias
        x = torch.where(x > 0, x, 0.2 * x)
    x = F.conv2d(x, decoder.last.weight, decoder.last.bias)
    assert x.shape == (2, 3, 16, 16)
    torch.testing.assert_close(decoder(maps, style), x, rtol=1e-4, atol=1e-5)
    assert decoder.styles[0].bias.tolist() == [1] * 8 + [0] * 8


def test_every_parameter_learns():
    torch.manual_seed(0)
    learner = PartLearner(8, 3, 16, 2)
    maps, painted = learner(torch.randn(4, 1 + 16, 8))
    ((painted - torch.randn(4, 3, 16, 16)).abs().mean() + 0.1 * overlap(maps)).backward()
    idle = {f"decoder.steps.{i}.bias" for i in range(2)}  # the normalisation takes them away
    for key, parameter in learner.named_parameters():
        assert key in idle or parameter.grad.abs().sum() > 0, key


def test_background_is_what_no_part_needs():
    torch.manual_seed(0)
    maps = torch.rand(5, 3, 4, 4).square()
    found = add_background(maps)
    assert found.shape == (5, 4, 4, 4)
    assert torch.equal(found[:, :3], maps)
    for b in range(5):
        needed = set()
        for part in maps[b].flatten(1):
            mass = 0.0
            for n in part.argsort(descending=True).tolist():
                if mass >= 0.6 * part.sum():
                    break
                needed.add(n)
                mass += part[n]
        free = [n for n in range(16) if n not in needed]
        expected = torch.zeros(16)
        expected[free] = maps[b].max()
        assert torch.equal(found[b, 3].flatten(), expected)
        labels = found[b].argmax(0).flatten()
        assert (labels == 3).nonzero().flatten().tolist() == free


def test_bytes_have_one_scale_per_image():
    maps = torch.tensor([[0.1, 0.05], [0.02, 0.0]]).view(1, 2, 1, 2)
    assert to_bytes(torch.cat([maps, 7 * maps])).tolist() == [[[[255, 128]], [[51, 0]]]] * 2
    assert to_bytes(torch.zeros(1, 2, 1, 2)).max() == 0


# -- judging -----------------------------------------------------------------------------------------------------------


def naive_match(labels, truth, parts, true_parts):
    """Best matching per image, best matching for all, purity."""

    def score(image, way):
        values = []
        for t in range(true_parts):
            cells = {n for n, x in enumerate(truth[image]) if x == t}
            mine = {n for n, x in enumerate(labels[image]) if x == way[t]}
            if cells:
                values.append(len(cells & mine) / len(cells | mine))
        return sum(values) / len(values)

    images = range(len(labels))
    ways = list(itertools.permutations(range(max(parts, true_parts)), true_parts))
    pure = []
    for image in images:
        right = 0
        for part in range(parts):
            under = [t for t, x in zip(truth[image], labels[image], strict=True) if x == part]
            right += max((under.count(t) for t in range(true_parts)), default=0)
        pure.append(right / len(labels[image]))
    each = sum(max(score(image, way) for way in ways) for image in images) / len(labels)
    fixed = max(sum(score(image, way) for image in images) / len(labels) for way in ways)
    return 100 * each, 100 * fixed, 100 * sum(pure) / len(pure)


@pytest.mark.parametrize(("parts", "true_parts"), [(4, 3), (3, 3), (2, 4), (1, 3)])
def test_match_tries_all_ways(parts, true_parts):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, parts, (6, 20), generator=generator)
    truth = torch.randint(0, true_parts, (6, 20), generator=generator)
    truth[0] = 1  # lacks the other parts
    found = match("x", labels, truth, parts, true_parts, fixed=True)
    expected = naive_match(labels.tolist(), truth.tolist(), parts, true_parts)
    assert (found.iou, found.iou_fixed, found.purity) == pytest.approx(expected)


def test_match_of_renamed_parts_is_perfect():
    truth = torch.randint(0, 3, (5, 30), generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([4, 0, 2])[truth]
    found = match("x", renamed, truth, 5, 3, fixed=False)
    assert (found.iou, found.iou_fixed, found.purity) == (pytest.approx(100), None, pytest.approx(100))
    with pytest.raises(ConfigError, match="60 parts can be matched with 5 true ones in too many ways"):
        match("x", truth, truth, 60, 5, fixed=False)


# -- the whole walk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train.beton (with true maps), plain.beton, backbone.pt (random weights), parts.pt."""
    folder = tmp_path_factory.mktemp("parts")
    images = draw_images(folder / "images", train=24, val=8)
    convert(ConvertOptions(str(images / "train"), str(folder / "train.beton"), parts=str(images / "parts/train")))
    convert(ConvertOptions(str(images / "train"), str(folder / "plain.beton")))
    torch.manual_seed(0)
    model = Model("vit_tiny", 32, 4, 24, 2, 3)
    weights = {f"b.{key}": value for key, value in build_backbone(model).state_dict().items()}
    checkpoint.write(folder / "backbone.pt", Checkpoint("pretrain", {"model": vars(model)}, weights, "b."))
    learn(options(folder))
    return folder


def options(folder, **more):
    numbers = {"parts": 3, "decoder_width": 8, "steps": 10, "batch_size": 8, "lr": 1e-2, "judge": 10, "device": "cpu"}
    paths = {"checkpoint": folder / "backbone.pt", "data": folder / "plain.beton", "out": folder / "parts.pt"}
    return LearnOptions(**{**{key: str(path) for key, path in paths.items()}, **numbers, "workers": 1, **more})


def test_learning_repeats_itself_and_judges_its_result(folder):
    said = []
    result = learn(options(folder, out=str(folder / "again.pt")), said.append)
    first, second = (checkpoint.read(folder / name).network for name in ("parts.pt", "again.pt"))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert len(said) == 10
    assert said[-1].startswith("step 10: painting error")
    assert result.report.images == 10
    assert len(result.report.used) == 3
    assert 0 < result.report.cosine < 1
    assert (folder / "again.pt.png").exists()
    for words in ("painting error", "mean cosine of two parts' maps", "same part in the mirrored image"):
        assert words in result.table()


def test_learning_paints_better_and_leaves_the_backbone_alone(folder):
    result = learn(options(folder, steps=60, out=str(folder / "longer.pt")))
    first = learn(options(folder, steps=1, out=str(folder / "short.pt")))
    assert result.painting < 0.95 * first.painting
    given = checkpoint.read(folder / "backbone.pt").network
    for key, value in checkpoint.read(folder / "longer.pt").backbone().items():
        assert torch.equal(value, given[f"b.{key}"])


def test_what_tokens_say_of_their_place_is_taken_out(folder):
    learn(options(folder, out=str(folder / "placed.pt"), place_images=6))
    finder = load_finder(folder / "placed.pt", CPU, torch.float32)
    source = open_source(str(folder / "plain.beton"))
    (batch,) = whole_images(source, np.array([0, 4, 8, 12, 16, 20]), 32, 6, 1)
    images = normalised(batch, CPU)
    tokens = torch.cat([finder.tokens(images), finder.tokens(images.flip(3))])
    mean = tokens[:, 1:].mean(0)  # [N, D]
    assert finder.place.abs().max() > 0.1
    torch.testing.assert_close(finder.place, mean - mean.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(finder.placeless(tokens)[:, 1:].mean(0), mean.mean(0).expand_as(mean), rtol=0, atol=1e-5)
    assert torch.equal(finder.placeless(tokens)[:, 0], tokens[:, 0])
    assert torch.equal(finder.maps(tokens), finder.learner.maps(finder.placeless(tokens)))
    learn(options(folder, out=str(folder / "unplaced.pt"), place_images=0, steps=1))
    plain = load_finder(folder / "unplaced.pt", CPU, torch.float32)
    assert torch.equal(plain.maps(tokens), plain.learner.maps(tokens))


@pytest.mark.parametrize("background", [False, True])
def test_written_maps_stand_beside_the_same_images(folder, background):
    out = folder / f"out-{background}.beton"
    result = write(WriteOptions(str(folder / "parts.pt"), str(folder / "train.beton"), str(out), background,
                                batch_size=7, workers=1, device="cpu"))  # fmt: skip
    assert (result.images, result.shape) == (24, (3 + background, 8, 8))
    assert verify(VerifyOptions(str(out), workers=1)).ok
    old, new = Beton(folder / "train.beton"), Beton(out)
    assert new.classes == old.classes
    assert np.array_equal(new.labels, old.labels)
    finder = load_finder(folder / "parts.pt", CPU, torch.float32)
    (batch,) = whole_images(open_source(str(out)), np.arange(24), 32, 24, 1)
    maps = to_bytes(finder.maps(finder.tokens(normalised(batch, CPU)), background)).numpy()
    for i in range(24):
        assert np.array_equal(new.image(i).data, old.image(i).data)
        assert new.side.name(i) == old.side.name(i)
        assert np.abs(new.parts(i).astype(int) - maps[i]).max() <= 1
    with pytest.raises(ConfigError, match=r"exists already; --overwrite true replaces it"):
        write(WriteOptions(str(folder / "parts.pt"), str(folder / "train.beton"), str(out)))


def test_semmae_trains_on_written_maps(folder, tmp_path):
    out = folder / "trained.beton"
    assert main(["parts", "write", *(str(folder / name) for name in ("parts.pt", "plain.beton")), str(out)]) == 0
    command = ["pretrain", "--method=semmae", f"--data.path={out}", f"--run.dir={tmp_path}", "--run.device=cpu"]
    command += ["--model.name=vit_tiny", "--model.width=24", "--model.heads=3", "--model.depth=1", "--run.steps=2"]
    command += ["--model.patch_size=8", "--model.image_size=32", "--views.main.size=32", "--data.batch_size=8"]
    command += ["--semmae.decoder_width=16", "--semmae.decoder_heads=2", "--semmae.decoder_depth=1"]
    assert main([*command, "--data.workers=1", "--schedule.epochs=2", "--schedule.warmup_epochs=0"]) == 0
    assert checkpoint.read(tmp_path / "last.pt").step == 2


def test_whole_images_are_squashed_in_order(folder):
    source = open_source(str(folder / "plain.beton"))
    batches = list(whole_images(source, np.array([5, 2, 9]), 16, 2, 1))
    assert [batch.id.tolist() for batch in batches] == [[5, 2], [9]]
    assert batches[0].views["whole"].shape == (2, 1, 3, 16, 16)
    assert torch.equal(batches[0].label, torch.tensor(source.labels[[5, 2]]))


def test_judge_compares_with_the_truth(folder, capsys):
    command = ["parts", "judge", str(folder / "parts.pt"), str(folder / "train.beton"), "--device=cpu", "--workers=1"]
    assert main([*command, "--truth", f"--pictures={folder / 'judged.png'}", "--images=10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["truth"]] == [
        "learned parts",
        "k-means over all images",
        "k-means in each image",
        "one part for all",
    ]
    assert (folder / "judged.png").exists()
    one = report["truth"][3]
    source = open_source(str(folder / "train.beton"))
    ids = np.arange(10) * 24 // 10
    share = [np.bincount(source.parts(int(i)).argmax(0).ravel()).max() / 196 for i in ids]
    assert one["purity"] == pytest.approx(100 * np.mean(share))
    assert report["truth"][0]["purity"] >= one["purity"] - 1e-9


def test_true_maps_are_judged_as_perfect(folder, monkeypatch):
    source = open_source(str(folder / "train.beton"))
    seen = []

    def tokens(finder, images):
        seen.append(len(images))
        return torch.zeros(len(images), 1 + 196, 24)

    def maps(finder, found, background=False):  # first the images, then the mirrored ones
        true = torch.from_numpy(np.stack([source.parts(i) for i in range(24)])).float()
        return true.flip(3) if len(seen) % 2 == 0 else true

    monkeypatch.setattr(PartFinder, "tokens", tokens)
    monkeypatch.setattr(PartFinder, "maps", maps)
    report = judge(JudgeOptions(str(folder / "parts.pt"), source.path, 24, truth=True, workers=1, device="cpu"))
    best = report.truth[0]
    assert (best.iou, best.iou_fixed, best.purity) == pytest.approx((100, 100, 100))
    assert report.truth[1].iou < 60
    assert report.mirror > 0.99
    true = torch.from_numpy(np.stack([source.parts(i) for i in range(24)])).argmax(1).flatten(1)
    shares = torch.stack([(true == part).float().mean(1) for part in range(3)], dim=1)
    assert report.largest == pytest.approx(shares.amax(1).mean().item())
    assert report.used == pytest.approx((shares > 0).float().mean(0).tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 30}, "size is 30; it must be a multiple of the checkpoint's patch side, 4, and two patches or more"),
        ({"size": 4}, "size is 4; it must be a multiple"),
        ({"parts": 1}, "parts is 1; it must be from 2 to 64"),
        ({"decoder_width": 3}, "decoder_width is 3; it must be at least 4 for 2 doublings"),
        ({"checkpoint": ""}, "checkpoint is empty; fastssl parts learn --checkpoint C"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
    ],
    ids=str,
)
def test_messages_of_learn(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        learn(options(folder, **change))


def test_other_messages(folder):
    with pytest.raises(ConfigError, match=r"out is 'maps'; it must end in \.beton"):
        WriteOptions("p", "d", "maps")
    with pytest.raises(SourceError, match=r"is not one \.beton file; 'fastssl convert' makes one"):
        write(WriteOptions(str(folder / "parts.pt"), str(folder / "images/train"), str(folder / "x.beton")))
    with pytest.raises(checkpoint.CheckpointError, match="is of a pretraining run, not of a part learner"):
        load_finder(folder / "backbone.pt", CPU, torch.float32)
    with pytest.raises(SourceError, match=r"plain\.beton has no part maps to compare with"):
        judge(JudgeOptions(str(folder / "parts.pt"), str(folder / "plain.beton"), truth=True))
    assert main(["parts", "draw"]) == 2
    assert main(["parts"]) == 0


# -- the authors' token files ------------------------------------------------------------------------------------------


def token_table(generator):
    table = np.zeros((196, 207), np.float32)
    part = generator.integers(-1, 7, 196)
    for row in np.flatnonzero(part >= 0):
        table[row, 7 + part[row]] = 1
    table[:, :7] = table[:, 7:14].sum(0)
    place = generator.permutation(784)[:196]
    table[:, 14] = place
    table[:, 15:] = generator.random((196, 192))
    return table, part, place


def test_token_files_become_maps(tmp_path):
    table, part, place = token_table(np.random.default_rng(0))
    (tmp_path / "in/n01").mkdir(parents=True)
    np.save(tmp_path / "in/n01/a.npy", table)
    found = read_token_file(tmp_path / "in/n01/a.npy")
    assert np.array_equal(found.part, part)
    assert np.array_equal(found.place, place)
    assert np.array_equal(found.pixels, table[:, 15:])
    result = import_parts(ImportOptions(str(tmp_path / "in"), str(tmp_path / "out")))
    maps = np.load(tmp_path / "out/n01/a.npy")
    assert (result.images, maps.shape, maps.dtype) == (1, (8, 28, 28), np.uint8)
    labels = maps.argmax(0)
    assert (maps.max(0) == 255).all()
    assert (maps.sum(0) == 255).all()
    for row in range(784):
        where = np.flatnonzero(place == row)
        expected = part[where[0]] if len(where) and part[where[0]] >= 0 else 7
        assert labels[row // 28, row % 28] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], r"holds an array \[195, 207\]; a token file has \[196, 207\]"),
        (lambda t: t.__setitem__((0, slice(7, 14)), 1), "columns 7 to 13 are not one-hot"),
        (lambda t: t.__setitem__((0, 0), 99), "the counts in columns 0 to 6 are not those of columns 7 to 13"),
        (lambda t: t.__setitem__((0, 14), 784), "column 14 must hold 196 different places from 0 to 783"),
        (lambda t: t.__setitem__((0, 14), t[1, 14]), "column 14 must hold 196 different places"),
    ],
)
def test_damaged_token_files(tmp_path, change, message):
    table, _, _ = token_table(np.random.default_rng(0))
    changed = change(table)
    np.save(tmp_path / "a.npy", table if changed is None else changed)
    with pytest.raises(TokenFileError, match=message):
        read_token_file(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"junk")
    with pytest.raises(TokenFileError, match="cannot be read"):
        read_token_file(tmp_path / "b.npy")
    with pytest.raises(ConfigError, match="where no token files"):
        import_parts(ImportOptions(str(tmp_path / "none"), str(tmp_path / "out")))
