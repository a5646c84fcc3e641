"""Images with boxes and masks in COCO's format (https://cocodataset.org/#format-data), read and checked.

Lin et al. 2014, arXiv 1405.0312. Categories may have any ids; a network sees labels 1 .. K in the order of the ids, and
0 is the background. Letters: N objects of an image, H and W its sides in pixels, K categories.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.config import ConfigError, printable
from fastssl.evaluation.data import EvaluationError
from fastssl.loaders.decode import DecodeError, Frame, read_picture
from fastssl.loaders.sources import Files

Target = dict[str, Tensor]
"""boxes float32 [N, 4] (left, top, right, bottom; pixels), labels int64 [N], masks uint8 [N, H, W]."""

TOLERANCE = 1.0  # pixels by which a box may reach over the image's edge; rounding does that in COCO itself


@dataclass(frozen=True)
class CocoSet:
    """An annotation file whose every entry is known to be usable.

    Attributes:
        path: of the annotation file.
        folder: holds the images.
        images: COCO's entries (id, file_name, height, width), by ascending id.
        objects: by image id, its annotations, crowds included.
        categories: COCO's ids in ascending order; label l of a network is categories[l - 1].
        names: of the categories; one that two have is followed by COCO's id.
        content: the whole file, as pycocotools takes it; only the ids of the annotations are others.
    """

    path: str
    folder: Path
    images: list[dict[str, Any]]
    objects: dict[int, list[dict[str, Any]]]
    categories: tuple[int, ...]
    names: tuple[str, ...]
    content: dict[str, Any]
    frame: Frame = ""

    def files(self) -> Files:
        """The images' files."""
        return Files([str(self.folder / image["file_name"]) for image in self.images])

    def usable(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The objects of an image that can be learned from: no crowds, boxes of at least one pixel either way."""
        return [o for o in self.objects.get(image["id"], ()) if not o["iscrowd"] and min(o["bbox"][2:]) >= 1]

    def picture(self, image: dict[str, Any]) -> Tensor:
        """uint8 [3, H, W].

        Raises:
            EvaluationError: it cannot be decoded, or has another size than the annotations say.
        """
        path = self.folder / image["file_name"]
        try:
            pixels = read_picture(str(path), (image["height"], image["width"]), self.frame)
        except DecodeError as error:
            raise EvaluationError(f"{printable(str(path))} {error} ({self.path})") from None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def target(self, image: dict[str, Any]) -> Target:
        """Boxes, labels and masks of the usable objects of an image, boxes cut at its edges."""
        height, width = image["height"], image["width"]
        objects = self.usable(image)
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        labels = torch.tensor([self.categories.index(o["category_id"]) + 1 for o in objects], dtype=torch.int64)
        masks = np.zeros((len(objects), height, width), np.uint8)
        for mask, one in zip(masks, objects, strict=True):
            mask[:] = _decode(self.path, one, height, width)
        return {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks)}


def read_coco(path: str, folder: str, key: str, image_key: str, frame: Frame = "") -> CocoSet:
    """Reads and checks an annotation file.

    Args:
        path: a .json file in COCO's format, with segmentations (polygons or run lengths).
        folder: holds the images; empty: the folder of the annotation file.
        key, image_key: what the messages call the two options.
        frame: as in `CocoSet`.

    Raises:
        ConfigError: no such file or folder, or not such a file.
        EvaluationError: an entry is unusable; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8", "surrogateescape"))
    except OSError as error:
        raise ConfigError(f"{key} is {path!r}, which cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{key} is {path!r}, which is not a JSON file; name annotations in COCO's format") from None
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise EvaluationError(f"{path} has no list of {part}; annotations in COCO's format have one")
        if not content[part]:
            raise EvaluationError(f"{path} is empty: it lists no {part}")
    images = _by_id(path, "image", content["images"])
    categories = _by_id(path, "category", content["categories"])
    root = Path(folder) if folder else Path(path).parent
    for image in images.values():
        if not all(isinstance(image.get(k), int) and image[k] > 0 for k in ("height", "width")):
            raise EvaluationError(f"{path}: image {image['id']} has no height and width in pixels")
        if not (root / str(image.get("file_name"))).is_file():
            raise EvaluationError(
                f"{path}: image {image['id']} is {root / str(image.get('file_name'))}, which does not exist; "
                f"name the folder that the file names start from with {image_key}"
            )
    objects: dict[int, list[dict[str, Any]]] = {}
    for number, one in enumerate(content["annotations"], start=1):
        _check_object(path, one, images, categories)
        # pycocotools takes an annotation with id 0 for "no match", and needs these keys.
        one["file_id"], one["id"] = one.get("id"), number
        one.setdefault("iscrowd", 0)
        if "area" not in one:
            image = images[one["image_id"]]
            one["area"] = float(_decode(path, one, image["height"], image["width"]).sum())
        objects.setdefault(one["image_id"], []).append(one)
    plain = [str(categories[i].get("name", i)) for i in sorted(categories)]
    names = tuple(
        f"{name} ({i})" if plain.count(name) > 1 else name for i, name in zip(sorted(categories), plain, strict=True)
    )
    ordered = [images[i] for i in sorted(images)]
    return CocoSet(path, root, ordered, objects, tuple(sorted(categories)), names, content, frame)


def check_categories(train: CocoSet, val: CocoSet) -> None:
    """Raises EvaluationError unless both files have the same categories with the same ids."""
    a, b = dict(zip(train.categories, train.names, strict=True)), dict(zip(val.categories, val.names, strict=True))
    for ours, theirs, here, there in ((a, b, train.path, val.path), (b, a, val.path, train.path)):
        for number, name in ours.items():
            if theirs.get(number) != name:
                other = f"'{theirs[number]}'" if number in theirs else "not there"
                raise EvaluationError(f"the categories differ: {number} is '{name}' in {here}, and {other} in {there}")


def _by_id(path: str, what: str, entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise EvaluationError(f"{path}: {what} {str(entry)[:80]} has no whole number as its id")
        if entry["id"] in found:
            raise EvaluationError(f"{path}: two entries have {what} id {entry['id']}")
        found[entry["id"]] = entry
    return found


def _check_object(path: str, one: Any, images: dict, categories: dict) -> None:
    if not isinstance(one, dict):
        raise EvaluationError(f"{path}: annotation {str(one)[:80]} is not an object with keys")
    name = f"{path}: annotation {one.get('id')}"
    if not isinstance(one.get("image_id"), int) or one["image_id"] not in images:
        raise EvaluationError(f"{name} is of image {one.get('image_id')}, which the file does not list")
    if not isinstance(one.get("category_id"), int) or one["category_id"] not in categories:
        raise EvaluationError(
            f"{name} has category {one.get('category_id')}, which the file does not list; "
            f"it lists {', '.join(map(str, sorted(categories)[:8]))}{' ...' if len(categories) > 8 else ''}"
        )
    box = one.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise EvaluationError(f"{name} has box {box}; it must be [left, top, width, height] in pixels")
    if not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise EvaluationError(f"{name} has box {box}; its sides must be 0 or more pixels")
    image = images[one["image_id"]]
    left, top, width, height = box
    over = max(-left, -top, left + width - image["width"], top + height - image["height"])
    if over > TOLERANCE:
        raise EvaluationError(
            f"{name} has box {box} (left, top, width, height), which reaches outside its image "
            f"of {image['width']} x {image['height']} pixels"
        )
    area = one.get("area", 0)
    if one.get("iscrowd", 0) not in (0, 1) or not isinstance(area, (int, float)) or not 0 <= area < math.inf:
        raise EvaluationError(f"{name} has iscrowd {one.get('iscrowd')} and area {area}; they are 0 or 1, and pixels")
    form = one.get("segmentation")
    if not form:
        raise EvaluationError(f"{name} has no segmentation; Mask R-CNN learns from masks")
    if isinstance(form, list):
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_finite, p)) for p in form):
            raise EvaluationError(f"{name} has a polygon that is not a list of three or more corners x, y in pixels")
        return
    counts = form.get("counts") if isinstance(form, dict) else None
    if not isinstance(counts, (list, str)) or form.get("size") != [image["height"], image["width"]]:
        raise EvaluationError(
            f"{name} has a segmentation that is neither polygons nor run lengths of the size of its image, "
            f"{[image['height'], image['width']]} (height, width)"
        )
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != image["height"] * image["width"]:
        raise EvaluationError(f"{name} has run lengths that are not the pixels of its image")


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers (pycocotools takes too few of them without a word): pieces of five bits
    and a sixth that says whether more follow; from the fourth on, the difference to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        piece = ord(letter) - 48
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            value -= (piece & 16) << (shift - 4)  # the sign
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs if not shift else []


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _decode(path: str, one: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The mask of an annotation, uint8 [H, W]: polygons, or run lengths in either of COCO's two forms."""
    codec = pycocotools("mask")
    form = one["segmentation"]
    try:
        if isinstance(form, list):
            form = codec.merge(codec.frPyObjects(form, height, width))
        elif isinstance(form["counts"], list):
            form = codec.frPyObjects(form, height, width)
        mask = codec.decode(form)
    except Exception as error:  # the codec raises many types on malformed entries
        reason = f"cannot be read ({error})"
        raise EvaluationError(f"{path}: the segmentation of annotation {one['file_id']} {reason}") from None
    return mask


def pycocotools(module: str) -> Any:
    """The module of pycocotools of this name; ConfigError says what to install where it is missing."""
    try:
        return importlib.import_module(f"pycocotools.{module}")
    except ImportError:
        raise ConfigError("evaluate detect needs pycocotools: pip install 'fastssl-vision[eval]'") from None
