import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from tiny import draw_classes, save_checkpoint
from torch import nn

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.classifier import Classifier, open_finetuned
from fastssl.evaluation.tuned.crops import TrainingImages, training_transform
from fastssl.evaluation.tuned.finetune import FinetuneOptions, Finetuner, evaluate_finetune
from fastssl.evaluation.tuned.layer_decay import layer_groups, set_rates
from fastssl.loaders.sources import open_source
from fastssl.models import build_backbone
from fastssl.models.relative_positions import relative_index
from fastssl.parse import parse_options
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError
from fastssl.training.loop import TrainingError
from fastssl.weights.backbone import open_backbone

VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=2, positions="sincos")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
PLAIN = {"augment": "", "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    return {
        "checkpoint": save_checkpoint(root / "last.pt", VIT, seed=11),
        "data": draw_classes(root / "train", 48, 0),
        "val": draw_classes(root / "val", 31, 1),
        "workers": 1,
        "batch_size": 8,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 0.02,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def tuned(given, tmp_path_factory):
    """A finished run with everything on, and what it said."""
    folder = tmp_path_factory.mktemp("tuned")
    options = FinetuneOptions(**given, dir=str(folder), ema=0.9, accumulate=2)
    return options, evaluate_finetune(options)


# -- the network and its groups --------------------------------------------------------------------------------------


def on_meta(name, depth_scale, **kinds):
    model = Model(name=name, positions="sincos_rows", layer_scale=depth_scale)
    with torch.device("meta"):
        network = Classifier(build_backbone(model), 1000, "mean", 224, **kinds)
    network.backbone.pos_embed.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("name", "layers", "decay", "lowest", "parameters"),
    [("vit_base", 12, 0.65, 0.0036972, 86_530_984), ("vit_large", 24, 0.75, 0.00075254, 304_430_568)],
)
def test_groups_and_parameters_of_cae(name, layers, decay, lowest, parameters):
    network = on_meta(name, 0.1, relative_positions=True)
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
    # The authors' attention has no bias of the keys, which a softmax does not feel.
    assert sum(p.numel() for p in trained.values()) == parameters + layers * network.backbone.width
    groups = layer_groups(network, network.backbone, decay, 0.05)
    assert len(groups) == 2 * (layers + 2)
    names = {id(p): key for key, p in trained.items()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(trained)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[0] == pytest.approx(lowest, rel=1e-4)
    assert scales == pytest.approx([decay ** (layers + 1 - i) for i in range(layers + 2)])
    for key, i in {
        "backbone.cls_token": 0,
        "backbone.patch_embed.proj.weight": 0,
        "backbone.blocks.0.norm1.weight": 1,
        "backbone.blocks.1.ls1.gamma": 2,
        f"backbone.blocks.{layers - 1}.mlp.fc2.bias": layers,
        "backbone.norm.weight": layers + 1,
        "head.weight": layers + 1,
    }.items():
        assert found[key]["lr_scale"] == pytest.approx(decay ** (layers + 1 - i)), key
    decays = {key for key, group in found.items() if group["weight_decay"] == 0.05}
    assert "backbone.blocks.3.attn.relative_position_bias_table" in decays
    assert "head.weight" in decays
    assert not any(key.endswith((".bias", "cls_token", "gamma", "norm1.weight")) for key in decays)


def test_a_trained_position_table_is_in_layer_0_and_does_not_decay():
    network = on_meta("vit_base", 0.0)
    network.backbone.pos_embed.requires_grad_(True)
    groups = layer_groups(network, network.backbone, 0.65, 0.05)
    assert len(groups) == 28
    [group] = [g for g in groups if any(p is network.backbone.pos_embed for p in g["params"])]
    assert (group["weight_decay"], group["lr_scale"]) == (0.0, pytest.approx(0.65**13))


def test_relative_index():
    index = relative_index(14, 14)
    assert index.shape == (197, 197)
    assert (index.min(), index.max()) == (0, 731)
    assert set(index[1:, 1:].diagonal().tolist()) == {364}
    assert set(index[0, 1:].tolist()) == {729}
    assert set(index[1:, 0].tolist()) == {730}
    assert index[0, 0] == 731
    wide = relative_index(2, 3)  # patches (0,0) (0,1) (0,2) (1,0) ..
    assert wide[1 + 0, 1 + 3] == (0 - 1 + 1) * 5 + (0 - 0 + 2)
    assert wide[1 + 5, 1 + 0] == (1 - 0 + 1) * 5 + (2 - 0 + 2)


def test_relative_positions_start_without_effect_and_act_on_their_pair(given):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    plain = Classifier(open_backbone(given["checkpoint"]).module, 3, "mean", 16).eval()
    biased = Classifier(open_backbone(given["checkpoint"]).module, 3, "mean", 16, relative_positions=True).eval()
    torch.testing.assert_close(biased.features(images), plain.features(images))
    table = biased.backbone.blocks[1].attn.relative_position_bias_table
    with torch.no_grad():  # patches of the last block look at the class token alone: all get the same update
        table[-2] = 1e4
    attended = {}
    attn = biased.backbone.blocks[1].attn
    hook = attn.register_forward_hook(lambda module, inputs, output: attended.update(x=output))
    biased.features(images)
    hook.remove()
    patches = attended["x"][:, 1:]
    torch.testing.assert_close(patches, patches[:, :1].expand_as(patches))
    assert not torch.allclose(attended["x"][:, 0], patches[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert biased(images).isfinite().all()


def test_what_the_linear_layer_sees(given):
    images = torch.randn(2, 3, 16, 16)
    backbone = open_backbone(given["checkpoint"]).module
    mean, token = (Classifier(backbone, 3, pool, 16).eval().features(images) for pool in ("mean", "class"))
    x = backbone.embed(images)
    for block in backbone.blocks:
        x = block(x)
    torch.testing.assert_close(mean, nn.functional.layer_norm(x[:, 1:].mean(1), (24,), eps=1e-6))
    torch.testing.assert_close(token, backbone(images))
    head = Classifier(backbone, 3, "mean", 16).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.3)
    assert head.bias.abs().max() == 0


def test_weights_and_switches_reach_the_network(given, tmp_path):
    def bump(weights):
        weights["teacher.norm.weight"].fill_(3.0)

    path = save_checkpoint(tmp_path / "bumped.pt", VIT, bump, seed=11)

    def network(**change):
        options = FinetuneOptions(**{**given, "checkpoint": path, "dir": str(tmp_path / "none"), **change})
        return Finetuner(options, CPU).network.backbone

    pretrained = open_backbone(path).module.state_dict()
    assert all(torch.equal(value, pretrained[key]) for key, value in network().state_dict().items())
    assert set(network(new_norm=True).norm.weight.tolist()) == {1.0}
    assert not network().pos_embed.requires_grad
    assert network(train_positions=True).pos_embed.requires_grad
    assert network(drop_path=0.3).blocks[1].drop_path1.drop_prob == 0.3
    scratch = network(scratch=True)
    assert not torch.equal(scratch.blocks[0].attn.qkv.weight, pretrained["blocks.0.attn.qkv.weight"])
    assert torch.equal(scratch.cls_token, network(scratch=True).cls_token)
    assert not torch.equal(scratch.cls_token, network(scratch=True, seed=1).cls_token)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_learns_and_says_what_it_found(tuned):
    options, evaluation = tuned
    values = evaluation.as_dict()
    assert values["images"] == 31
    assert values["train_images"] == 48
    assert values["ema"]["images"] == 31
    history = checkpoint.read(evaluation.path).extra["history"]
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["top1"] == evaluation.top1
    assert values["best_top1"] == max(line["top1"] for line in history)
    assert f"Acc@1 {evaluation.top1:.3f} Acc@5 100.000 loss {evaluation.final.loss:.3f}" in evaluation.table()
    assert "moving average" in evaluation.table()
    assert "chosen on val itself" in evaluation.table()
    lines = [json.loads(line) for line in (Path(options.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 3, 6, 6, 9, 9]  # training, and what it is worth
    assert {"loss", "lr", "images_per_s", "data_wait", "grad_norm"} <= set(lines[-2])


def test_learns(given, tmp_path, monkeypatch):
    write, written = checkpoint.write, []
    monkeypatch.setattr(checkpoint, "write", lambda *what, **how: written.append(what[1].step) or write(*what, **how))
    options = {**given, **PLAIN, "epochs": 12, "val_every": 5, "drop_path": 0.0, "lr_batch": 0, "lr": 3e-3}
    evaluation = evaluate_finetune(FinetuneOptions(**options, dir=str(tmp_path)))
    assert evaluation.top1 > 70  # chance: 33
    history = checkpoint.read(evaluation.path).extra["history"]
    assert [line["epoch"] for line in history if "top1" in line] == [5, 10, 12]
    per_epoch = written[0]
    assert written == [per_epoch * epoch for epoch in sorted([*range(1, 13), 5, 10, 12])]  # before and after judging


def test_eval_repeats_the_numbers(tuned, given, capsys):
    _, evaluation = tuned
    again = evaluate_finetune(FinetuneOptions(checkpoint=evaluation.path, val=given["val"], eval=True, workers=1))
    for ours, theirs in ((again.final, evaluation.final), (again.ema, evaluation.ema)):
        assert (ours.top1, ours.top5, ours.images) == (theirs.top1, theirs.top5, theirs.images)
        # The mean of losses in batches of 64 instead of 8: in float32 sums of another order, off by some units of 1e-7
        # of the largest score, which is all there is where the loss itself is near 0.
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert again.best is None
    arguments = ["evaluate", "finetune", "--eval", f"--checkpoint={evaluation.path}", f"--val={given['val']}"]
    assert main([*arguments, "--json", "--workers=1"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == evaluation.top1


def test_a_step_is_adamw_on_the_mean_of_its_micro_batches(given, tmp_path):
    options = FinetuneOptions(
        **{**given, **PLAIN, "accumulate": 2, "drop_path": 0.0, "warmup_epochs": 0}, dir=str(tmp_path)
    )
    run = Finetuner(options, CPU)
    backbone = open_backbone(given["checkpoint"]).module
    reference = Classifier(backbone, 3, "mean", 16)
    reference.load_state_dict(run.network.state_dict())
    reference.train()
    run.batches.epoch = 0
    pieces = list(run.open_loader())
    assert len(pieces) == 6
    run.schedule = lambda: set_rates(run.optimizer, 0.01)
    run.train_step(iter(pieces))
    loss = run.ring.drain()[1][0]["loss"]
    groups = [
        {"params": [p], "lr": 0.01 * group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in layer_groups(reference, reference.backbone, 0.65, 0.05)
        for p in group["params"]
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=False)
    losses = [nn.functional.cross_entropy(reference(images), labels) for images, labels, _ in pieces[:2]]
    (sum(losses) / 2).backward()
    optimizer.step()
    assert loss == pytest.approx((sum(losses) / 2).item(), rel=1e-5)
    for ours, theirs in zip(run.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def test_learning_rates_of_a_run(given, tmp_path, monkeypatch):
    rates = []
    losses = Finetuner.losses

    def noted(self, batch):
        rates.append([group["lr"] / group["lr_scale"] for group in self.optimizer.param_groups])
        return losses(self, batch)

    monkeypatch.setattr(Finetuner, "losses", noted)
    evaluate_finetune(FinetuneOptions(**given, **PLAIN, dir=str(tmp_path)))
    assert len(rates) == 18
    peak = 0.02 * 8 / 256
    assert all(row == pytest.approx([row[0]] * len(row)) for row in rates)
    assert [row[0] for row in rates[:7]] == pytest.approx([peak * i / 6 for i in range(7)])
    assert 1e-6 < rates[-1][0] < 0.03 * peak


def test_targets_and_losses(given, tmp_path):
    def run(**change):
        return Finetuner(FinetuneOptions(**{**given, **change}, dir=str(tmp_path)), CPU)

    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    images = torch.randn(8, 3, 16, 16)

    def mix(run, seed):
        torch.manual_seed(seed)
        return run.on_device((images.clone(), labels, []))[:2]

    mixed = run()
    assert isinstance(mixed.loss, SoftTargetCrossEntropy)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    seen, targets = mix(mixed, 3)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    again, same = mix(mixed, 3)
    assert torch.equal(seen, again)
    assert torch.equal(targets, same)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(seen, images)
    off = run(mixup=0.0, cutmix=0.0)
    assert isinstance(off.loss, LabelSmoothingCrossEntropy)
    assert off.loss.smoothing == 0.1
    assert torch.equal(mix(off, 3)[0], images)
    only = run(cutmix=0.0)  # mixup alone: pixels are weighted sums, and the target has the same weight
    seen, targets = mix(only, 5)
    weight = ((targets[0, 0] - 0.1 / 3) / 0.9).item()
    torch.testing.assert_close(seen[0], weight * images[0] + (1 - weight) * images[7], atol=1e-5, rtol=1e-4)


def test_crops_are_a_function_of_seed_epoch_and_id(given):
    source = open_source(given["data"])
    transform = training_transform(16, scale=(0.08, 1.0), flip=0.5, augment="rand-m9-mstd0.5-inc1", erase=0.25)
    crops = TrainingImages(source, transform, 0)
    first = [crops[0, i][0] for i in range(6)]
    torch.rand(5)
    assert all(torch.equal(crops[0, i][0], first[i]) for i in reversed(range(6)))
    assert not any(torch.equal(crops[1, i][0], first[i]) for i in range(6))
    assert not any(torch.equal(TrainingImages(source, transform, 1)[0, i][0], first[i]) for i in range(6))
    assert [crops[0, i][1] for i in range(48)] == source.labels.tolist()


def test_the_strongest_posterize_is_black():
    transform = training_transform(16, scale=(1.0, 1.0), flip=0.0, augment="rand-m10-mstd0-inc1-n1", erase=0.0)
    [augment] = [part for part in transform.transforms if hasattr(part, "ops")]
    [posterize] = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    assert np.asarray(posterize(white)).max() == 0
    posterize.magnitude = 5  # two bits are kept
    assert set(np.asarray(posterize(white)).flatten()) == {192}


def test_resnets(given, tmp_path):
    model = Model(name="resnet18", image_size=32, small_images=True, width=8)
    path = save_checkpoint(tmp_path / "resnet.pt", model)
    options = {**given, **PLAIN, "checkpoint": path, "epochs": 1, "batch_size": 16}
    evaluation = evaluate_finetune(FinetuneOptions(**options, dir=str(tmp_path / "run")))
    network = open_finetuned(evaluation.path)[0]["weights"]
    groups = layer_groups(network, network.backbone, 0.5, 0.05)
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(6)}  # stem, four stages, head
    with pytest.raises(ConfigError, match="change a ViT; the checkpoint holds none"):
        evaluate_finetune(FinetuneOptions(**options, dir=str(tmp_path / "other"), pool="class"))


def tune_on(rank, options, path):
    judged = evaluate_finetune(FinetuneOptions(checkpoint=path, val=options["val"], eval=True, workers=1, batch_size=7))
    return judged.final, judged.ema, evaluate_finetune(FinetuneOptions(**options))


def test_two_processes(tuned, given, tmp_path, on_processes):
    options = {**given, **PLAIN, "drop_path": 0.0, "dir": str(tmp_path / "two"), "epochs": 1}
    first, second = on_processes(2, tune_on, options, tuned[1].path)
    assert first[:2] == second[:2]
    for ours, alone in zip(first[:2], (tuned[1].final, tuned[1].ema), strict=True):
        assert (ours.top1, ours.top5, ours.images) == (alone.top1, alone.top5, 31)
        assert ours.loss == pytest.approx(alone.loss, rel=1e-6)
    assert first[2].final == second[2].final
    one = evaluate_finetune(FinetuneOptions(**{**options, "batch_size": 16, "dir": str(tmp_path / "one")}))
    ours, theirs = checkpoint.read(first[2].path).network, checkpoint.read(one.path).network
    for key, value in theirs.items():  # 2 x 8 images are 1 x 16
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-3)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_fine_tuned_network_is_a_checkpoint_like_any_other(tuned):
    backbone = open_backbone(tuned[1].path)
    assert backbone.step == 9
    assert backbone.module(torch.randn(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_authors_file_gives_timms_scores(tmp_path, pool, given, capsys):
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=3, global_pool=pool
    ).eval()
    nn.init.normal_(theirs.head.weight)
    path = tmp_path / "official.pth"
    torch.save({"model": theirs.state_dict(), "epoch": 78, "args": argparse.Namespace(lr=1)}, path)
    networks, size, epoch, names, _ = open_finetuned(str(path))
    assert (size, epoch, names) == (32, 79, [])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(networks["weights"].eval()(images), theirs(images), atol=1e-5, rtol=1e-4)
    arguments = ["evaluate", "finetune", "--eval", f"--checkpoint={path}", f"--val={given['val']}", "--workers=1"]
    assert main(arguments) == 0
    assert "Acc@1 " in capsys.readouterr().out


def test_files_that_do_not_fit(given, tuned, tmp_path):
    def judge(path, val=given["val"], **change):
        return evaluate_finetune(FinetuneOptions(checkpoint=str(path), val=val, eval=True, workers=1, **change))

    with pytest.raises(CheckpointError, match="is of a pretraining run, not of a fine-tuning run"):
        judge(given["checkpoint"])
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no fine-tuned ViT"):
        judge(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        judge(tmp_path / "none.pt")
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()
    state["blocks.0.attn.extra"] = torch.ones(1)
    torch.save({"model": state}, tmp_path / "extra.pth")
    with pytest.raises(CheckpointError, match="holds another network than MAE's ViT"):
        judge(tmp_path / "extra.pth")
    with pytest.raises(EvaluationError, match=r"val \(.*\) has 4 classes, but .* was fine-tuned for 3"):
        judge(tuned[1].path, draw_classes(tmp_path / "four", 8, 0, classes=4))
    with pytest.raises(EvaluationError, match=r"the classes of val .* are not those of"):
        judge(tuned[1].path, draw_classes(tmp_path / "two", 8, 0, classes=2))
    with pytest.raises(ConfigError, match="size is 20; it must be a multiple of 8"):
        judge(tuned[1].path, size=20)


def test_a_finished_run_is_no_answer_for_other_weights_of_the_same_name(given, tmp_path):
    """Of a run that went on meanwhile: its old number would be taken for the new one's."""
    options = {**given, "checkpoint": save_checkpoint(tmp_path / "last.pt", VIT), "dir": str(tmp_path / "run")}
    options |= {"epochs": 1, "warmup_epochs": 0}
    first = evaluate_finetune(FinetuneOptions(**options))
    save_checkpoint(tmp_path / "last.pt", VIT, seed=1)
    with pytest.raises(CheckpointError, match=r"was written with other settings: weights \(was '.*', now '.*'\)"):
        evaluate_finetune(FinetuneOptions(**options))
    save_checkpoint(tmp_path / "last.pt", VIT)
    assert evaluate_finetune(FinetuneOptions(**options)).top1 == first.top1


def test_bad_weights_images_and_rates(given, tmp_path):
    path = save_checkpoint(tmp_path / "nan.pt", VIT, lambda weights: weights["teacher.norm.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"norm\.bias is not finite; the weights are broken"):
        evaluate_finetune(FinetuneOptions(**{**given, "checkpoint": path}, dir=str(tmp_path / "a")))
    with pytest.raises(TrainingError, match=r"is not finite; samples of that step: \[.*\]; .*kept: no checkpoint yet"):
        evaluate_finetune(FinetuneOptions(**{**given, "lr": 1e30, "warmup_epochs": 0}, dir=str(tmp_path / "b")))
    data = draw_classes(tmp_path / "data", 16, 0)
    bad = Path(data) / "class1" / "1.png"
    bad.write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"sample 6 \(.*class1/1.png\) is not an image"):
        evaluate_finetune(FinetuneOptions(**{**given, "data": data}, dir=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match="has 16 images, fewer than one optimizer step takes: 24"):
        evaluate_finetune(FinetuneOptions(**{**given, "data": data, "batch_size": 24}, dir=str(tmp_path / "d")))
    with pytest.raises(ConfigError, match="augment is 'random', which timm does not know"):
        evaluate_finetune(FinetuneOptions(**given, augment="random", dir=str(tmp_path / "e")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "batch_size is 5; it must be even: mixup and cutmix work on pairs"),
        ({"epochs": 0}, "epochs is 0"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"warmup_epochs": 101}, r"warmup_epochs is 101; it must be at most epochs \(100\)"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"lr": float("nan")}, "lr is nan; it must be positive"),
        ({"scale": (0.5, 0.1)}, r"scale is \(0.5, 0.1\)"),
        ({"val": "a"}, r"val is the same as data \(a\)"),
        ({"eval": True, "scratch": True}, "scratch is True"),
        ({"data": ""}, "data is empty"),
    ],
)
def test_unusable_options(change, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneOptions(**{"checkpoint": "c.pt", "data": "a", "val": "b", **change})


RECIPES = sorted((ROOT / "configs/imagenet").glob("finetune_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes(recipe):
    paths = ["--checkpoint=c.pt", "--data=a", "--val=b"]
    options, _ = parse_options("x", "x", FinetuneOptions, [f"--config={recipe}", *paths], recipe=True)
    assert options.augment == "rand-m9-mstd0.5-inc1"
    options, _ = parse_options("x", "x", FinetuneOptions, [f"--config={recipe}", *paths, "--lr=0.5"], recipe=True)
    assert options.lr == 0.5


def test_cae_recipes_peak():
    assert len(RECIPES) == 6
    paths = ["--checkpoint=c.pt", "--data=a", "--val=b"]
    base, _ = parse_options("x", "x", FinetuneOptions, [f"--config={RECIPES[0]}", *paths], recipe=True)
    assert (base.lr, base.lr_batch, base.layer_decay, base.relative_positions) == (8e-3, 0, 0.65, True)


def test_unknown_key_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("layer_decai: 0.5\n")
    with pytest.raises(ConfigError, match="unknown key 'layer_decai'"):
        parse_options("x", "x", FinetuneOptions, [f"--config={path}"], recipe=True)
