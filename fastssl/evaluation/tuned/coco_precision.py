"""Average precision of a detector by pycocotools, the images dealt to the processes: every image counts once.

Letters: n detections of an image, H and W its sides in pixels, K categories.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.coco import CocoSet, pycocotools
from fastssl.evaluation.tuned.coco_views import read_ahead
from fastssl.progress import progress_bar
from fastssl.training import distributed

MASK_THRESHOLD = 0.5  # a pixel above it belongs to the mask


@dataclass(frozen=True)
class Precision:
    """COCO's numbers for boxes or for masks, in percent; None where the set has no such objects.

    Attributes:
        ap: average precision, mean over the IoU thresholds 0.50, 0.55, .. 0.95 and over categories: the headline.
        ap50, ap75: at the thresholds 0.50 and 0.75.
        small, medium, large: `ap` of objects of less than 32 x 32, up to 96 x 96, and more pixels.
        recall: average recall with 100 detections per image.
        by_category: `ap` of each category.
    """

    ap: float
    ap50: float
    ap75: float
    small: float | None
    medium: float | None
    large: float | None
    recall: float
    by_category: dict[str, float | None]


@torch.no_grad()
def detect(
    detector: nn.Module, data: CocoSet, device: torch.device, workers: int, progress: str = ""
) -> list[dict[str, Any]]:
    """All detections in the images of `data`, in COCO's results format, by image; on the main process, else empty.

    The images are dealt to the processes, each goes to one, alone: other images in a batch would change its padding.

    Args:
        detector: `build_detector`'s; left in eval mode.
        data: the images.
        device: where the detector is.
        workers: decoding threads.
        progress: label of the progress bar; empty shows none.
    """
    detector.eval()
    own = range(distributed.rank(), len(data.images), distributed.world())
    found: dict[int, list[dict[str, Any]]] = {}
    pictures = read_ahead(data, [[position] for position in own], data.picture, workers)
    bar = progress_bar(len(own), progress)
    with contextlib.closing(pictures), bar:
        for position, (picture,) in zip(own, pictures, strict=True):
            out = detector([picture.to(device) / 255])[0]
            found[position] = detections(data, data.images[position], out)
            bar.update()
    parts: list[Any] = [found]
    if distributed.world() > 1:
        parts = [None] * distributed.world()
        dist.gather_object(found, parts if distributed.is_main() else None)
    if not distributed.is_main():
        return []
    every = {position: entries for part in parts for position, entries in part.items()}
    return [entry for position in sorted(every) for entry in every[position]]


def detections(data: CocoSet, image: dict[str, Any], found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A network's detections in one image as entries of COCO's results format.

    Args:
        data: gives the categories' ids.
        image: its entry.
        found: boxes [n, 4] (left, top, right, bottom), labels [n] (1 .. K), scores [n], masks [n, 1, H, W] from 0 to 1;
            all in pixels of the original image.
    """
    codec = pycocotools("mask")
    corners = found["boxes"].float().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    masks = (found["masks"][:, 0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
    codes = codec.encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(boxes) else []
    return [
        {
            "image_id": image["id"],
            "category_id": data.categories[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        }
        for box, label, score, code in zip(
            boxes, found["labels"].tolist(), found["scores"].float().tolist(), codes, strict=True
        )
    ]


def average_precision(data: CocoSet, found: list[dict[str, Any]]) -> tuple[Precision, Precision]:
    """(boxes, masks): what pycocotools makes of all detections in all images of `data`.

    Raises:
        EvaluationError: a detection is of an image that `data` does not have, or a score is not finite.
    """
    known = {image["id"] for image in data.images}
    for one in found:
        if one["image_id"] not in known:
            raise EvaluationError(f"a detection is of image {one['image_id']}, which {data.path} does not list")
        if not math.isfinite(one["score"]) or not all(map(math.isfinite, one["bbox"])):
            raise EvaluationError(
                f"a detection in image {one['image_id']} is not finite; the network's weights are broken"
            )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        truth = pycocotools("coco").COCO()
        truth.dataset = data.content
        truth.createIndex()
        # By a mask's own area, not its box's, a detection counts as small or large: no boxes beside the masks.
        return (
            _judge(data, truth, "bbox", [{k: v for k, v in one.items() if k != "segmentation"} for one in found]),
            _judge(data, truth, "segm", [{k: v for k, v in one.items() if k != "bbox"} for one in found]),
        )


def _judge(data: CocoSet, truth: Any, kind: str, found: list[dict[str, Any]]) -> Precision:
    if not found:
        return Precision(0.0, 0.0, 0.0, None, None, None, 0.0, dict.fromkeys(data.names, 0.0))
    judge = pycocotools("cocoeval").COCOeval(truth, truth.loadRes(found), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    ap, ap50, ap75, small, medium, large = (_percent(value) for value in judge.stats[:6])
    precision = judge.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, K], -1 where there are no objects
    each = {name: _percent(precision[:, :, k].mean()) for k, name in enumerate(data.names)}
    return Precision(ap or 0.0, ap50 or 0.0, ap75 or 0.0, small, medium, large, _percent(judge.stats[8]) or 0.0, each)


def _percent(value: float) -> float | None:
    return None if value < 0 else 100.0 * float(value)
