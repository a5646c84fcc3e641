"""Detection: annotations in, views, detections out, and numbers that pycocotools gives for the same files."""

import contextlib
import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fastssl.cli import main
from fastssl.config import ConfigError, Model
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.coco import check_categories, read_coco
from fastssl.evaluation.tuned.coco_precision import average_precision, detect, detections
from fastssl.evaluation.tuned.coco_views import Cuts, cut, read_ahead
from fastssl.evaluation.tuned.detect import Detection, DetectOptions, build_optimizer, evaluate_detect, lr_factor
from fastssl.evaluation.tuned.detector import build_detector
from fastssl.evaluation.tuned.label_maps import resized
from fastssl.loaders.synthetic import CLASSES, draw_images
from fastssl.models import build_backbone
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint

IDS = (3, 7, 40)  # of the categories: with gaps, as COCO's own
NAMES = ("cat", "dog", "owl")


def rectangle(left, top, width, height):
    right, bottom = left + width, top + height
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(number, image, category, box, **more):
    one = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
    return {**one, "iscrowd": 0, "segmentation": rectangle(*box), **more}


def write_set(folder, boxes=None, side=64, name="set.json", seed=0, **changes):
    """Images with coloured rectangles and their annotations; `boxes`: per image a list of (category, box)."""
    boxes = boxes or [[(3, (4, 8, 20, 12)), (40, (30, 30, 24, 24))], [], [(7, (10, 10, 40, 30))]]
    folder.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    rng = np.random.default_rng(seed)
    for i, found in enumerate(boxes):
        pixels = rng.integers(0, 60, (side, side + 8, 3), dtype=np.uint8)
        number = 100 - i
        for category, box in found:
            left, top, width, height = box
            pixels[top : top + height, left : left + width, IDS.index(category)] += 180
            objects.append(annotation(len(objects), number, category, box))
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": number, "file_name": f"{i}.png", "height": side, "width": side + 8})
    categories = [{"id": i, "name": n} for i, n in zip(IDS[::-1], NAMES[::-1], strict=True)]
    content = {"images": images, "annotations": objects, "categories": categories, **changes}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def opened(path):
    return read_coco(str(path), "", "data", "--data-images")


def test_pictures_are_those_of_every_other_command(tmp_path):
    """16 bits by their high byte, and turned as the annotations are."""
    data = opened(write_set(tmp_path))
    path, image = tmp_path / data.images[0]["file_name"], data.images[0]
    plain = data.picture(image)
    gray = plain[0].numpy()
    Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    assert np.array_equal(data.picture(image), np.stack([gray] * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for pixels in (np.rot90(gray), gray):  # stored turned, annotated upright; annotated as stored
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)
        assert np.array_equal(data.picture(image)[0], gray)
    exif[0x0112] = 3
    Image.fromarray(gray).save(path, exif=exif)
    with pytest.raises(EvaluationError, match=r"turned by EXIF \(orientation 3\).* --frame upright"):
        data.picture(image)
    assert np.array_equal(replace(data, frame="upright").picture(image)[0], gray[::-1, ::-1])


def perfect(data, keep=lambda one: True, score=lambda one: 0.9):
    """Detections equal to the annotations."""
    entries = []
    for image in data.images:
        target = data.target(image)
        kept = [i for i, one in enumerate(data.usable(image)) if keep(one)]
        found = {
            "boxes": target["boxes"][kept],
            "labels": target["labels"][kept],
            "scores": torch.tensor([score(data.usable(image)[i]) for i in kept]),
            "masks": target["masks"][kept][:, None].float(),
        }
        entries += detections(data, image, found)
    return entries


# -- average precision ------------------------------------------------------------------------------------------------


def test_perfect_detections_are_worth_100_and_none_0(tmp_path):
    data = opened(write_set(tmp_path))
    for precision in average_precision(data, perfect(data)):
        assert (precision.ap, precision.ap50, precision.recall) == pytest.approx((100, 100, 100))
        assert precision.by_category == pytest.approx({"cat": 100, "dog": 100, "owl": 100})
        assert precision.large is None
    assert [p.ap for p in average_precision(data, [])] == [0, 0]


def test_known_answers(tmp_path):
    # Two owls, one found: precision 1 up to recall 1/2, which is at 51 of the 101 recalls 0, 0.01 .. 1.
    boxes = [[(40, (2, 2, 20, 20)), (40, (30, 30, 20, 20))], [(3, (5, 5, 20, 20))]]
    data = opened(write_set(tmp_path, boxes))
    box, mask = average_precision(data, perfect(data, keep=lambda one: one["bbox"][0] != 30))
    for precision in (box, mask):
        assert precision.by_category == {"cat": pytest.approx(100), "dog": None, "owl": pytest.approx(100 * 51 / 101)}
        assert precision.ap == pytest.approx((100 + 100 * 51 / 101) / 2)

    # The wrong category, surer than the rest: cat's first detection is false, so its precision is 1/2 throughout.
    wrong = dict(perfect(data, keep=lambda one: one["bbox"][0] == 30)[0], category_id=3, score=0.99)
    box, _ = average_precision(data, [*perfect(data), wrong])
    assert box.by_category["cat"] == pytest.approx(50)

    # IoU 0.64 counts at the thresholds 0.50, 0.55 and 0.60 out of ten.
    near = perfect(data)
    for one in near:
        one["bbox"] = [*one["bbox"][:2], 16.0, 16.0]
    box, mask = average_precision(data, near)
    assert (box.ap, box.ap50, box.ap75) == pytest.approx((30, 100, 0))
    assert mask.ap == pytest.approx(100)


def test_numbers_are_pycocotools_own_on_files(tmp_path):
    rng = np.random.default_rng(1)
    boxes = []
    for _ in range(12):
        found = []
        for _ in range(int(rng.integers(0, 5))):
            width, height = (int(v) for v in rng.integers(8, 60, 2))
            left, top = int(rng.integers(0, 128 + 8 - width)), int(rng.integers(0, 128 - height))
            found.append((IDS[int(rng.integers(3))], (left, top, width, height)))
        boxes.append(found)
    path = write_set(tmp_path, boxes, side=128)
    data = opened(path)
    entries = []
    for image in data.images:
        target = data.target(image)
        n = 2 * len(target["labels"]) + 1
        rows = torch.from_numpy(rng.integers(0, max(n // 2, 1), n)) if n > 1 else torch.zeros(0, dtype=torch.int64)
        shift = torch.from_numpy(rng.integers(-5, 6, (len(rows), 2))).float().repeat(1, 2)
        masks = target["masks"][rows].float()
        for mask, (x, y) in zip(masks, shift[:, :2].int().tolist(), strict=True):
            mask.copy_(mask.roll((y, x), (0, 1)))
        found = {"boxes": target["boxes"][rows] + shift, "labels": target["labels"][rows], "masks": masks[:, None]}
        entries += detections(data, image, {**found, "scores": torch.from_numpy(rng.random(len(rows)))})
    ours = average_precision(data, entries)

    # The same with pycocotools' own reading of the files; annotation ids from 1, as it needs them.
    content = json.loads(path.read_text())
    for one in content["annotations"]:
        one["id"] += 1
    (tmp_path / "truth.json").write_text(json.dumps(content))
    for precision, kind, other in zip(ours, ("bbox", "segm"), ("segmentation", "bbox"), strict=True):
        found = [{k: v for k, v in one.items() if k != other} for one in entries]
        (tmp_path / "found.json").write_text(json.dumps(found))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / "truth.json"))
            judge = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        theirs = [100 * value if value >= 0 else None for value in judge.stats[[0, 1, 2, 3, 4, 5, 8]]]
        values = asdict(precision)
        values.pop("by_category")
        assert list(values.values()) == pytest.approx(theirs)
        assert 5 < precision.ap < 95


def test_a_mask_counts_as_small_by_its_own_area(tmp_path):
    """Its box is medium (40 x 40), the mask small (a frame of 156 pixels): found falsely, it spares the medium."""
    boxes = [[(3, (2, 2, 40, 40))]]
    data = opened(write_set(tmp_path, boxes, side=96))
    [good] = perfect(data)
    frame = np.zeros((96, 104), np.uint8, order="F")
    frame[50:90, 50:90] = 1
    frame[51:89, 51:89] = 0
    code = codec.encode(frame)
    bad = {**good, "score": 0.99, "bbox": [50.0, 50.0, 40.0, 40.0]}
    bad["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    box, mask = average_precision(data, [bad, good])
    assert box.medium == pytest.approx(50)
    assert mask.medium == pytest.approx(100)


def test_categories_are_mapped_to_labels_and_back(tmp_path):
    data = opened(write_set(tmp_path))
    assert data.categories == IDS
    assert data.names == NAMES
    target = {image["id"]: data.target(image) for image in data.images}
    assert target[100]["labels"].tolist() == [1, 3]
    assert target[98]["labels"].tolist() == [2]
    assert target[100]["boxes"].tolist() == [[4, 8, 24, 20], [30, 30, 54, 54]]
    assert target[100]["masks"].sum((1, 2)).tolist() == [20 * 12, 24 * 24]
    assert target[99]["masks"].shape == (0, 64, 72)
    assert sorted(one["category_id"] for one in perfect(data)) == [3, 7, 40]
    [entry] = [one for one in perfect(data) if one["image_id"] == 98]
    assert entry["bbox"] == [10, 10, 40, 30]
    assert codec.decode(entry["segmentation"]).sum() == 40 * 30


def test_crowds_and_slivers_are_not_learned_from(tmp_path):
    boxes = [[(3, (4, 8, 20, 12)), (7, (30, 30, 24, 24)), (40, (1, 1, 30, 4))]]
    path = write_set(tmp_path, boxes)
    content = json.loads(path.read_text())
    content["annotations"][1].update(iscrowd=1, segmentation={"size": [64, 72], "counts": [64 * 72]})
    content["annotations"][2]["bbox"] = [1, 1, 30, 0.5]
    for key in ("area", "iscrowd"):
        del content["annotations"][0][key]
    path.write_text(json.dumps(content))
    data = opened(path)
    assert data.target(data.images[0])["labels"].tolist() == [1]
    assert data.objects[100][0]["area"] == 20 * 12


# -- bad input --------------------------------------------------------------------------------------------------------


def broken(where, **values):
    def change(content):
        content["annotations"][where].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(annotations=[]), "is empty: it lists no annotations"),
        (lambda c: c.pop("categories"), "has no list of categories"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png, which does not exist"),
        (lambda c: c["images"][0].pop("height"), "image 100 has no height and width"),
        (lambda c: c["images"][0].update(id=99), "two entries have image id 99"),
        (broken(1, category_id=5), "annotation 1 has category 5, which the file does not list; it lists 3, 7, 40"),
        (broken(1, image_id=5), "annotation 1 is of image 5"),
        (broken(2, bbox=[60, 10, 20, 5]), "reaches outside its image of 72 x 64 pixels"),
        (broken(2, bbox=[-2, 10, 20, 5]), "reaches outside its image"),
        (broken(2, bbox=[10, 10, -5, 5]), "its sides must be 0 or more pixels"),
        (broken(2, bbox=[10, float("nan"), 5, 5]), "its sides must be"),
        (broken(2, bbox=[10, 10, 5]), "must be [left, top, width, height]"),
        (broken(2, segmentation=[]), "has no segmentation"),
        (broken(2, id=77, segmentation=[[1, 2]]), "annotation 77 has a polygon that is not a list of three or more"),
        (broken(2, segmentation=[[1, 2, 3, 4, None, 6]]), "has a polygon"),
        (broken(2, segmentation={"size": [8, 8], "counts": [64]}), "run lengths of the size of its image, [64, 72]"),
        (broken(2, segmentation={"size": [64, 72], "counts": [64]}), "run lengths that are not the pixels"),
        (broken(2, segmentation={"size": [64, 72], "counts": "zzzz"}), "run lengths that are not the pixels"),
        (broken(2, iscrowd="no"), "has iscrowd no"),
        (broken(2, image_id=[1]), "is of image [1]"),
        (lambda c: c["annotations"].append(5), "annotation 5 is not an object"),
    ],
)
def test_bad_annotations_are_one_line_that_names_them(tmp_path, change, words):
    path = write_set(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=r"(?s)^[^\n]*$") as caught:
        opened(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_bad_files_and_pictures(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        opened(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ConfigError, match="not a JSON file"):
        opened(tmp_path / "text.json")
    data = opened(write_set(tmp_path))
    (tmp_path / "0.png").write_bytes(b"nothing")
    Image.new("RGB", (9, 9)).save(tmp_path / "2.png")
    by_name = {image["file_name"]: image for image in data.images}
    with pytest.raises(EvaluationError, match=r"0\.png is not an image"):
        data.picture(by_name["0.png"])
    with pytest.raises(EvaluationError, match=r"has 9 x 9 pixels, .* 72 x 64"):
        data.picture(by_name["2.png"])


def test_two_categories_of_one_name_stay_two(tmp_path):
    same = [{"id": i, "name": n} for i, n in zip(IDS, ("cat", "owl", "owl"), strict=True)]
    data = opened(write_set(tmp_path, categories=same))
    for precision in average_precision(data, perfect(data, keep=lambda one: one["category_id"] != 7)):
        assert precision.by_category == {"cat": pytest.approx(100), "owl (7)": 0.0, "owl (40)": pytest.approx(100)}


def test_other_categories_in_val_are_an_error(tmp_path):
    a = opened(write_set(tmp_path / "a"))
    named = [{"id": i, "name": n} for i, n in zip(IDS, ("cat", "fox", "owl"), strict=True)]
    b = opened(write_set(tmp_path / "b", categories=named))
    more = [{"id": i, "name": n} for i, n in zip((*IDS, 41), (*NAMES, "emu"), strict=True)]
    c = opened(write_set(tmp_path / "c", categories=more))
    check_categories(a, a)
    with pytest.raises(EvaluationError, match=r"7 is 'dog' in .*a/set.json, and 'fox' in .*b/set.json"):
        check_categories(a, b)
    with pytest.raises(EvaluationError, match=r"41 is 'emu' in .*c/set.json, and not there in .*a/set.json"):
        check_categories(a, c)


def test_a_detection_that_is_not_finite_or_of_no_image_is_an_error(tmp_path):
    data = opened(write_set(tmp_path))
    found = perfect(data)
    with pytest.raises(EvaluationError, match="not finite"):
        average_precision(data, [{**found[0], "score": float("nan")}])
    with pytest.raises(EvaluationError, match="of image 1, which"):
        average_precision(data, [{**found[0], "image_id": 1}])


# -- training views ---------------------------------------------------------------------------------------------------

WHOLE = Cuts(short_sides=(64,), long_side=1000, crop_short_sides=(), crop=(1, 1), flip=0.0)


def checked_view(data, image, cuts, epoch=0, seed=0):
    """A view of an image whose every box fits its mask."""
    view, target = cut(data.picture(image), data.target(image), cuts, seed=seed, epoch=epoch, number=image["id"])
    assert view.dtype == torch.float32
    assert target["masks"].shape[1:] == view.shape[1:]
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - edges).abs().max() <= 3.5  # a pixel of a crop that is then magnified
    return view, target


def test_an_untouched_view_is_the_image(tmp_path):
    data = opened(write_set(tmp_path))
    view, target = checked_view(data, data.images[2], WHOLE)
    assert torch.equal((view * 255).round().to(torch.uint8), data.picture(data.images[2]))
    assert target["boxes"].tolist() == [[4, 8, 24, 20], [30, 30, 54, 54]]


def test_a_flip_is_a_mirror(tmp_path):
    data = opened(write_set(tmp_path))
    view, target = checked_view(data, data.images[2], Cuts((64,), 1000, (), (1, 1), flip=1.0))
    assert torch.equal((view * 255).round().to(torch.uint8), data.picture(data.images[2]).flip(2))
    assert target["boxes"].tolist() == [[72 - 24, 8, 72 - 4, 20], [72 - 54, 30, 72 - 30, 54]]


def test_boxes_masks_and_pixels_stay_together_through_resizes_and_crops(tmp_path):
    boxes = [[(3, (4, 8, 20, 12)), (7, (40, 5, 20, 30)), (40, (30, 40, 24, 20))]]
    data = opened(write_set(tmp_path, boxes))
    cuts = Cuts(short_sides=(48, 80, 96), long_side=110, crop_short_sides=(56, 72), crop=(30, 50))
    sizes, objects, flipped = set(), 0, 0
    for epoch in range(60):
        view, target = checked_view(data, data.images[0], cuts, epoch)
        sizes.add(tuple(view.shape[1:]))
        objects += len(target["labels"])
        assert max(view.shape) <= 110
        for label, box in zip(target["labels"].tolist(), target["boxes"], strict=True):
            left, top, right, bottom = box.tolist()
            inside = view[:, int(top + bottom) // 2, int(left + right) // 2]
            assert inside.argmax() == label - 1  # each category has its own colour
            assert inside[label - 1] > 0.6
        where = dict(zip(target["labels"].tolist(), target["boxes"][:, 0].tolist(), strict=True))
        flipped += where.get(1, 0) > where.get(2, 999)
    assert len(sizes) > 20
    assert 60 < objects < 3 * 60  # crops leave some out
    assert 5 < flipped < 45


def test_an_object_of_which_a_crop_leaves_no_pixel_is_dropped(tmp_path):
    path = write_set(tmp_path, [[(3, (0, 0, 72, 64))]])
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = rectangle(0, 0, 10, 10)  # a small part of its box
    path.write_text(json.dumps(content))
    data = opened(path)
    [image] = data.images
    left = []
    for epoch in range(30):
        cuts = Cuts((64,), 200, (64,), (20, 30))
        _, target = cut(data.picture(image), data.target(image), cuts, seed=0, epoch=epoch, number=1)
        assert target["masks"].flatten(1).sum(1).all()
        left.append(len(target["boxes"]))
    assert 0 in left
    assert 1 in left


def test_views_are_a_function_of_seed_epoch_and_image(tmp_path):
    data = opened(write_set(tmp_path))
    cuts = Cuts((48, 80), 110, (56, 72), (30, 50))
    first = checked_view(data, data.images[2], cuts)
    again = checked_view(data, data.images[2], cuts)
    assert torch.equal(first[0], again[0])
    others = [checked_view(data, data.images[2], cuts, *key)[0] for key in ((1, 0), (2, 0), (0, 1), (0, 2))]
    assert any(o.shape != first[0].shape or not torch.equal(o, first[0]) for o in others[:2])
    assert any(o.shape != first[0].shape or not torch.equal(o, first[0]) for o in others[2:])
    same = data.picture(data.images[2]), data.target(data.images[2]), cuts
    images = [cut(*same, seed=0, epoch=0, number=number)[0] for number in range(4)]
    assert any(o.shape != images[0].shape or not torch.equal(o, images[0]) for o in images[1:])


def test_published_sizes():
    assert resized(480, 640, 800, 1333) == (800, 1067)
    assert resized(400, 1000, 800, 1333) == (533, 1333)
    assert resized(640, 427, 480, 1333) == (719, 480)
    options = DetectOptions("c", "d", "v")
    assert options.short_sides == tuple(range(480, 801, 32))
    image, boxes = torch.zeros(3, 300, 500, dtype=torch.uint8), torch.tensor([[10.0, 10, 400, 290]])
    masks = torch.ones(1, 300, 500, dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": masks}
    shapes = {tuple(cut(image, target, options.cuts, seed=0, epoch=e, number=1)[0].shape[1:]) for e in range(24)}
    whole = {resized(300, 500, short, 1333) for short in options.short_sides}
    assert shapes & whole  # first way
    assert shapes - whole  # second way
    assert all(max(shape) <= 1333 and min(shape) <= 800 for shape in shapes)


def test_images_come_in_order_from_threads(tmp_path):
    data = opened(write_set(tmp_path))
    rows = [[2, 0], [1], [0, 1, 2]]
    made = list(read_ahead(data, rows, lambda image: image["id"], workers=3))
    assert made == [[100, 98], [99], [98, 99, 100]]

    def fail(image):
        raise EvaluationError(f"image {image['id']}")

    with pytest.raises(EvaluationError, match="image 100"):
        list(read_ahead(data, rows, fail, workers=2))


# -- the network ------------------------------------------------------------------------------------------------------


def small_vit(patch=8):
    return ViT(width=24, depth=4, heads=3, patch_size=patch, image_size=64)


def small_detector(backbone=None, **options):
    torch.manual_seed(0)
    options = {"channels": 8, "rois": 16, "short_side": 64, "long_side": 96, **options}
    return build_detector(backbone or small_vit(), 3, **options)


@pytest.mark.parametrize("backbone", [small_vit, lambda: small_vit(16), lambda: ResNet("resnet18", channels=8)])
def test_levels_have_the_strides_that_anchors_and_pooling_assume(backbone):
    detector = small_detector(backbone())
    strides = detector.backbone.strides
    maps = detector.backbone(torch.zeros(1, 3, 128, 192))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(128 // s, 192 // s) for s in (*strides, 2 * strides[-1])]
    assert [m.shape[1] for m in maps.values()] == [8] * 5
    for pooler in (detector.roi_heads.box_roi_pool, detector.roi_heads.mask_roi_pool):
        assert pooler.scales == [1 / s for s in strides]
    assert detector.rpn.anchor_generator.sizes == tuple((8 * s,) for s in (*strides, 2 * strides[-1]))


def test_16_pixel_patches_have_the_papers_anchors_and_levels():
    detector = small_detector(small_vit(16))
    assert detector.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    # Level floor(log2(side / 56)) from P2 on, between P2 and P5.
    sides = (20.0, 111.0, 113.0, 223.0, 225.0, 447.0, 449.0, 2000.0)
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    assert detector.roi_heads.box_roi_pool.map_levels([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_patches_that_cannot_be_halved_twice_are_an_error():
    for patch in (2, 14, 12):
        with pytest.raises(ConfigError, match=f"model.patch_size is {patch}"):
            small_detector(ViT(width=24, depth=4, heads=3, patch_size=patch, image_size=168))


def losses_of(detector, data, images):
    detector.train()
    views = [checked_view(data, image, Cuts((64,), 96, (), (1, 1))) for image in images]
    torch.manual_seed(1)
    return detector([view for view, _ in views], [target for _, target in views])


@pytest.mark.parametrize("backbone", [small_vit, lambda: ResNet("resnet18", channels=8)])
def test_every_parameter_learns_and_an_image_without_objects_is_no_trouble(tmp_path, backbone):
    data = opened(write_set(tmp_path))
    detector = small_detector(backbone())
    losses = losses_of(detector, data, [data.images[2], data.images[1]])  # the second is empty
    assert len(losses) == 5
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None and p.requires_grad]
    assert without == []
    detector.zero_grad()
    losses = losses_of(detector, data, [data.images[1], data.images[1]])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None and p.requires_grad] == []


def test_bf16_reaches_backbone_and_heads_but_not_the_boxes(tmp_path):
    data = opened(write_set(tmp_path))
    detector = small_detector(dtype=torch.bfloat16)
    dtypes = {}
    for name in ("backbone.fpn.layer_blocks.0.0", "roi_heads.box_head.module.0.0", "rpn.head.module.cls_logits"):
        hook = lambda module, inputs, out, name=name: dtypes.update({name: out.dtype})  # noqa: E731
        detector.get_submodule(name).register_forward_hook(hook)
    losses = losses_of(detector, data, data.images)
    assert set(dtypes.values()) == {torch.bfloat16}
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    detector.eval()
    with torch.no_grad():
        out = detector([torch.rand(3, 100, 130)])[0]
    assert out["boxes"].dtype == out["masks"].dtype == torch.float32


def test_training_images_are_not_resized_and_padded_with_the_mean():
    detector = small_detector()
    seen = []
    detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    views = [torch.rand(3, 40, 50), torch.rand(3, 80, 33)]
    target = {"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}
    targets = [{**target, "masks": torch.ones(1, *view.shape[1:], dtype=torch.uint8)} for view in views]
    detector.train()(views, targets)
    assert seen[0].shape == (2, 3, 96, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(seen[0][0, :, :40, :50], (views[0] - mean) / std, atol=1e-5)
    assert seen[0][0, :, 40:].abs().max() == 0


def test_detections_are_in_pixels_of_the_image_that_went_in():
    """A detector that always finds the same box in its own frame, on images of other sizes."""
    detector = small_detector(short_side=64, long_side=96).eval()
    seen = {}

    class Heads(torch.nn.Module):
        def forward(self, features, proposals, sizes, targets=None):
            seen["sizes"] = sizes
            found = {
                "boxes": torch.tensor([[8.0, 16.0, 32.0, 48.0]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.5]),
                "masks": torch.ones(1, 1, 28, 28),
            }
            return [found], {}

    detector.roi_heads = Heads()
    out = detector([torch.rand(3, 128, 160)])[0]
    assert seen["sizes"] == [(64, 80)]
    assert out["boxes"].tolist() == [[16, 32, 64, 96]]
    mask = out["masks"][0, 0] > 0.5
    assert mask.shape == (128, 160)
    assert abs(int(mask.sum()) - 48 * 64) < 2 * (48 + 64)
    assert mask[64, 40]
    assert not mask[20, 40]


# -- the whole command ------------------------------------------------------------------------------------------------

MODEL = {"name": "vit_tiny", "image_size": 64, "patch_size": 8, "width": 24, "depth": 4, "heads": 3}
SIZES = {
    "short_sides": (64, 80),
    "long_side": 96,
    "crop_short_sides": (72,),
    "crop": (40, 64),
    "test_side": 64,
    "channels": 8,
    "rois": 16,
}


@pytest.fixture
def ready(tmp_path):
    """Options of a small run, with their files."""
    torch.manual_seed(5)
    model = Model(**MODEL)
    state = {f"backbone.{key}": value for key, value in build_backbone(model).state_dict().items()}
    config = {"model": asdict(model), "run": {"seed": 0}, "monitor": {"mean_patch": False}}
    checkpoint.write(tmp_path / "backbone.pt", Checkpoint("pretrain", config, state, "backbone.", step=9))
    boxes = [[(IDS[i % 3], (4 + i, 8, 24, 20))] if i % 4 else [] for i in range(12)]
    train = write_set(tmp_path / "train", boxes)
    val = write_set(tmp_path / "val", boxes[:5], seed=1)
    return {
        "checkpoint": str(tmp_path / "backbone.pt"),
        "data": str(train),
        "val": str(val),
        "dir": str(tmp_path / "run"),
        "epochs": 2,
        "drop_epochs": (1,),
        "warmup_steps": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "workers": 2,
        "device": "cpu",
        **SIZES,
    }


def test_a_run_gives_numbers_files_and_the_same_result_again(ready, tmp_path, capsys):
    arguments = [f"--{k}={list(v) if isinstance(v, tuple) else v}" for k, v in ready.items()]
    assert main(["evaluate", "detect", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"box_ap", "mask_ap", "box", "mask", "train_images", "val_images", "steps"} <= set(result)
    assert (result["train_images"], result["val_images"], result["steps"]) == (9, 5, 4)  # 3 of 12 have no object
    found = json.loads(Path(result["detections"]).read_text())
    data = opened(ready["val"])
    assert average_precision(data, found)[0].ap == pytest.approx(result["box_ap"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["lr"] == pytest.approx(1e-4)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["mask_ap"] == result["mask_ap"]

    # Finished: only the judging is done again. With another option it is refused.
    assert main(["evaluate", "detect", *arguments]) == 0
    text = capsys.readouterr().out
    assert "9 training images, 4 steps, 5 validation images" in text
    assert f"{result['box_ap']:.1f}" in text
    assert main(["evaluate", "detect", *arguments, "--lr", "0.5"]) == 1
    assert "other settings: lr (was 0.001, now 0.5);" in capsys.readouterr().err


def test_the_checkpoints_weights_are_taken_unless_told_otherwise(ready):
    stored = checkpoint.read(ready["checkpoint"]).network
    key = "blocks.1.attn.qkv.weight"
    taken = Detection(DetectOptions(**ready)).backbone.module.state_dict()[key]
    assert torch.equal(taken, stored[f"backbone.{key}"])
    random = Detection(DetectOptions(**ready, scratch=True)).backbone.module.state_dict()[key]
    assert not torch.equal(random, stored[f"backbone.{key}"])


def test_learning_rates_by_layer_and_step(ready):
    run = Detection(DetectOptions(**ready))
    rates = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in run.detector.named_parameters()}
    backbone = "backbone.body.backbone."
    assert by_name[f"{backbone}patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.75**5)
    assert by_name[f"{backbone}blocks.0.mlp.fc1.weight"]["lr_scale"] == pytest.approx(0.75**4)
    assert by_name[f"{backbone}blocks.3.mlp.fc1.weight"]["lr_scale"] == pytest.approx(0.75)
    for name, group in by_name.items():
        if not name.startswith(backbone):
            assert group["lr_scale"] == 1
        if name.endswith("bias"):
            assert group["weight_decay"] == 0
    assert by_name["roi_heads.box_predictor.cls_score.weight"]["weight_decay"] == 0.05
    sgd = build_optimizer(run.detector, run.backbone.module, DetectOptions(**ready, optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    factors = [lr_factor(step, 100, 50, (9, 11)) for step in (0, 25, 50, 899, 900, 1099, 1100)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, "data is empty"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"short_sides": ()}, "short_sides is ()"),
        ({"crop": (50, 40)}, "crop is (50, 40)"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"flip": 2.0}, "flip is 2.0"),
        ({"batch_size": 10}, "has 9 images with objects, fewer than one optimizer step takes: 10"),
    ],
)
def test_bad_options_are_one_line(ready, changes, words):
    with pytest.raises(ConfigError) as caught:
        Detection(DetectOptions(**{**ready, **changes}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_pycocotools_the_error_says_what_to_install(ready, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ConfigError, match=r"needs pycocotools: pip install 'fastssl-vision\[eval\]'"):
        Detection(DetectOptions(**ready))


def test_the_drawn_set_is_read_with_its_true_boxes_and_masks(tmp_path):
    folder = draw_images(tmp_path, train=16, val=0)
    data = opened(folder / "instances_train.json")
    assert data.names == CLASSES
    for image in data.images:
        target = data.target(image)
        truth = np.asarray(Image.open(folder / "masks" / Path(image["file_name"]).with_suffix(".png"))) > 0
        assert np.array_equal(target["masks"][0].numpy(), truth)
        assert CLASSES[int(target["labels"][0]) - 1] in image["file_name"]
        checked_view(data, image, WHOLE)
    assert [p.ap for p in average_precision(data, perfect(data))] == pytest.approx([100, 100])


def test_only_crowds_are_an_error(ready, tmp_path):
    content = json.loads(Path(ready["val"]).read_text())
    for one in content["annotations"]:
        one["iscrowd"] = 1
    Path(ready["val"]).write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match="has no object that is not a crowd"):
        Detection(DetectOptions(**ready))


def run_on_rank(rank, options):
    result = evaluate_detect(DetectOptions(**options))
    return asdict(result), checkpoint.read(Path(options["dir"]) / "last.pt").step, rank


def test_two_processes_judge_every_image_once_and_give_the_number_of_one(ready, on_processes):
    ready["batch_size"] = 2
    (first, step, _), (second, _, _) = on_processes(2, run_on_rank, ready)
    assert step == first["steps"] > 0
    assert first.pop("seconds") >= 0
    second.pop("seconds")
    assert first == second
    # The saved weights, judged by one process, give the detections and the number that two gave.
    run = Detection(DetectOptions(**{**ready, "dir": ready["dir"] + "-alone", "batch_size": 4}))
    run.detector.load_state_dict(checkpoint.read(Path(ready["dir"]) / "last.pt").network)
    found = detect(run.detector, run.val, run.device, 1)
    assert {one["image_id"] for one in found} == {image["id"] for image in run.val.images}
    assert found == json.loads(Path(first["detections"]).read_text())
    box, mask = average_precision(run.val, found)
    assert (box.ap, mask.ap) == pytest.approx((first["box"]["ap"], first["mask"]["ap"]))


def test_published_recipes_parse(ready):
    from fastssl.parse import parse_options

    root = Path(__file__).parents[3] / "configs" / "coco"
    files = ["--checkpoint=c", "--data=d", "--val=v"]
    vit, _ = parse_options(
        "p", "", DetectOptions, ["--config", str(root / "detect_cae_vit_base.yaml"), *files], recipe=True
    )
    assert (vit.lr, vit.layer_decay, vit.drop_path, vit.epochs, vit.drop_epochs) == (3e-4, 0.75, 0.2, 12, (9, 11))
    resnet, _ = parse_options(
        "p", "", DetectOptions, ["--config", str(root / "detect_resnet50.yaml"), *files], recipe=True
    )
    assert (resnet.optimizer, resnet.lr, resnet.layer_decay) == ("sgd", 0.02, 1.0)
