"""Windows, scores, losses and the numbers of segmentation, against hand-made cases and other implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.label_maps import IGNORED
from fastssl.evaluation.tuned.segmenter import (
    Segmenter,
    best_classes,
    image_counts,
    overlap,
    pixel_loss,
    slide,
    whole,
    window_starts,
)
from fastssl.models.pyramid import Pyramid
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT

# -- the network -----------------------------------------------------------------------------------------------------


def small(auxiliary=True):
    torch.manual_seed(0)
    vit = ViT(width=24, depth=4, heads=2, patch_size=8, image_size=32)
    return Segmenter(Pyramid(vit), classes=5, width=16, auxiliary=auxiliary)


def test_network_learns_everywhere():
    network = small().train()
    scores, auxiliary = network(torch.randn(2, 3, 32, 48))
    assert scores.shape == (2, 5, 16, 24)
    assert auxiliary.shape == (2, 5, 4, 6)
    (scores.square().sum() + auxiliary.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_small_head_is_for_training_alone():
    assert small().eval()(torch.randn(1, 3, 32, 32))[1] is None
    assert small(auxiliary=False).train()(torch.randn(2, 3, 32, 32))[1] is None


def test_first_weights():
    network = small()
    assert network.head[1].weight.std().item() == pytest.approx(0.01, rel=0.3)
    fused = network.decoder.fusion_block[0]
    assert fused.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)  # Kaiming, fan out


def test_resnet_carries_the_decoder():
    torch.manual_seed(0)
    network = Segmenter(Pyramid(ResNet("resnet18", channels=8)), classes=3, width=16).eval()
    assert network(torch.randn(1, 3, 64, 96))[0].shape == (1, 3, 16, 24)


def test_published_size():
    """163.1 million parameters with CAE's decoder; ours has a layer norm on each of the four levels beside."""
    with torch.device("meta"):  # no memory, no first weights
        vit = ViT(width=768, depth=12, heads=12, positions="sincos")
    pyramid = Pyramid(vit, window=(32, 32))
    with torch.device("meta"):
        network = Segmenter(pyramid, classes=150, width=768)
    norms = sum(p.numel() for p in network.decoder.feature_norms.parameters())
    parameters = sum(p.numel() for p in network.parameters()) - norms
    assert parameters / 1e6 == pytest.approx(163.1, abs=0.2)


def test_loss_is_a_mean_over_all_pixels():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    labels[0] = IGNORED
    large = F.interpolate(scores, size=(8, 8), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large[1:], labels[1:]) / 2
    torch.testing.assert_close(pixel_loss(scores, labels), expected)
    assert pixel_loss(scores.bfloat16(), labels).dtype == torch.float32
    assert pixel_loss(scores[:1], labels[:1]) == 0


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (300, [0]),
        (512, [0]),
        (513, [0, 1]),
        (853, [0, 341]),
        (854, [0, 341, 342]),
        (2048, [0, 341, 682, 1023, 1364, 1536]),
    ],
)
def test_window_starts(length, starts):
    assert window_starts(length, 512, 341) == starts


def pointwise(images):
    """Scores that depend on each pixel alone."""
    return torch.stack([images.sum(1), images[:, 0] * 2, -images[:, 2]], dim=1)


def context(images):
    """Scores that depend on all pixels of a window, at half its resolution."""
    return F.avg_pool2d(pointwise(images) + images.mean((1, 2, 3), keepdim=True), 2)


def test_windows_of_a_pointwise_network_equal_the_whole():
    torch.manual_seed(0)
    image = torch.randn(3, 37, 53)
    torch.testing.assert_close(slide(pointwise, image, 16, 10), pointwise(image[None])[0])
    torch.testing.assert_close(whole(pointwise, image, 8), pointwise(image[None])[0])


@pytest.mark.parametrize("size", [(32, 32), (30, 21)])
def test_one_window_is_the_whole(size):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    torch.testing.assert_close(slide(context, image, 32, 21), whole(context, image, 32))


def test_windows_are_averaged():
    image = torch.arange(6.0).expand(3, 4, 6)

    def mean_of_window(images):
        return images.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    # Windows begin at columns 0, 1, 2 and have means 1.5, 2.5, 3.5.
    found = slide(mean_of_window, image, 4, 1)[0, 0]
    assert found.tolist() == pytest.approx([1.5, 2.0, 2.5, 2.5, 3.0, 3.5])


def test_many_windows_are_seen_in_groups():
    sizes = []

    def look(images):
        sizes.append(len(images))
        return pointwise(images)

    slide(look, torch.randn(3, 40, 40), 10, 7)
    assert sum(sizes) == 36
    assert max(sizes) == 8


@pytest.mark.parametrize("classes", [3, 16, 40])
def test_best_classes(classes):
    torch.manual_seed(0)
    scores = torch.randn(classes, 7, 9)
    large = F.interpolate(scores[None], size=(20, 15), mode="bilinear", align_corners=False)[0]
    assert torch.equal(best_classes(scores, 20, 15), large.argmax(0))
    assert (best_classes(torch.zeros(40, 2, 2), 3, 3) == 0).all()  # the first of equals


# -- the numbers -----------------------------------------------------------------------------------------------------


def counts(*images, classes):
    return torch.stack([image_counts(torch.tensor([p]), torch.tensor([t]), classes) for p, t in images])


def test_hand_made_case():
    truth = [0, 0, 0, 0, 1, 1, IGNORED, IGNORED]
    found = [0, 0, 0, 1, 1, 1, 2, 0]
    result = overlap(counts((found, truth), classes=3))
    assert result.iou == [pytest.approx(75), pytest.approx(200 / 3), None]  # class 2: called so only where ignored
    assert result.miou == pytest.approx((75 + 200 / 3) / 2)
    assert result.acc == [pytest.approx(75), pytest.approx(100), None]
    assert result.macc == pytest.approx(87.5)
    assert result.aacc == pytest.approx(500 / 6)
    assert result.constant == pytest.approx(100 * 4 / 6 / 2)


def test_class_that_is_only_answered_counts_as_zero():
    result = overlap(counts(([0, 2], [0, 0]), classes=3))
    assert result.iou == [50, None, 0]
    assert result.miou == 25
    assert result.acc == [50, None, None]
    assert result.macc == 50


def test_pixels_are_summed_over_images_before_they_are_divided():
    one, other = ([0, 1], [0, 0]), ([0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0])
    result = overlap(counts(one, other, classes=2))
    assert result.iou == [pytest.approx(100 * 5 / 7), pytest.approx(100 / 3)]
    assert result.miou == pytest.approx(100 * (5 / 7 + 1 / 3) / 2)


def test_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 6, (12, 20, 30), generator=generator)
    guess = torch.randint(0, 7, (12, 20, 30), generator=generator)
    found = torch.where(torch.rand(12, 20, 30, generator=generator) < 0.6, truth.clamp_min(0), guess)
    result = overlap(torch.stack([image_counts(f, t, 8) for f, t in zip(found, truth, strict=True)]))
    how = {"num_classes": 8, "ignore_index": IGNORED}
    index = MulticlassJaccardIndex(**how, average="macro")(found, truth)
    assert result.miou == pytest.approx(100 * index.item(), abs=1e-4)
    recall = MulticlassAccuracy(**how, average="none")(found, truth)[:6]  # 6: never true, 7: never there
    assert result.macc == pytest.approx(100 * recall.mean().item(), abs=1e-4)
    micro = MulticlassAccuracy(**how, average="micro")(found, truth)
    assert result.aacc == pytest.approx(100 * micro.item(), abs=1e-4)
    assert result.iou[6] == 0
    assert result.iou[7] is None


def test_interval():
    same = overlap(counts(*[([0, 1, 1], [0, 0, 1])] * 5, classes=2))
    assert same.interval == pytest.approx((same.miou, same.miou))
    generator = np.random.default_rng(0)
    # Each image is all right or all wrong; with two classes alike, miou is s / (2 - s) of the share s that is right.
    right = generator.random(400) < 0.7
    result = overlap(counts(*[(([0, 1] if ok else [1, 0]), [0, 1]) for ok in right], classes=2))
    share = right.mean()
    assert result.miou == pytest.approx(100 * share / (2 - share))
    spread = 1.96 * math.sqrt(share * (1 - share) / 400) * 2 / (2 - share) ** 2 * 100
    assert result.interval == pytest.approx((result.miou - spread, result.miou + spread), abs=1.0)
    assert overlap(counts(([0, 1], [0, 0]), ([1, 1], [1, 0]), classes=2), seed=3).interval[0] >= 0


def test_nothing_to_judge():
    with pytest.raises(EvaluationError, match="no pixel of the 1 label pictures counts"):
        overlap(counts(([0, 1], [IGNORED, IGNORED]), classes=2))
