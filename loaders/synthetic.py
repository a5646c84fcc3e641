"""A labelled image set drawn from nothing, for the demo and for tests: textured objects in textured scenes.

A class is an object (shape and surface) and, mostly, the scene it stands in. Colours, place, size, turn, light, noise
and image size vary freely, so that raw pixels say little about the class. Every image comes with its class, a part map
(0 scene, 1 body, 2 detail), and the object's box.
"""

from __future__ import annotations

import colorsys
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disk", "square", "triangle", "star", "ring", "cross", "crescent", "bars")
PARTS = ("scene", "body", "detail")
PART_GRID = 14  # side of the stored part maps, in cells
SIDES = (72, 128)  # range of an image's sides, in pixels
OWN_SCENE = 0.8  # probability that an object stands in its class's own scene


def draw_images(folder: str | Path, *, train: int, val: int, seed: int = 0, sides: tuple[int, int] = SIDES) -> Path:
    """Draws the set into `folder`: {train,val}/<class>/<n>.jpg, parts/ (maps), masks/ (labels), annotations.jsonl,
    and instances_{train,val}.json with every object's box and mask in COCO's format.

    Args:
        folder: created; existing files of the same names are replaced.
        train, val: images per split, spread evenly over the classes.
        seed: the same seed draws the same set.
        sides: range of an image's sides, in pixels.

    Returns:
        The folder.
    """
    folder = Path(folder)
    lines = []
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        images, objects = [], []
        for kind in CLASSES:
            for sub in (name, f"parts/{name}", f"masks/{name}"):
                (folder / sub / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            label = index % len(CLASSES)
            image, mask = draw_image(label, seed=seed, number=2 * index + split, sides=sides)
            stem = f"{CLASSES[label]}/{index // len(CLASSES):05d}"
            Image.fromarray(image).save(folder / name / f"{stem}.jpg", quality=90)
            Image.fromarray(mask).save(folder / "masks" / name / f"{stem}.png")
            np.save(folder / "parts" / name / f"{stem}.npy", part_maps(mask))
            top, left, height, width = box_of(mask)
            box = [left, top, width, height]
            lines.append({"file": f"{name}/{stem}.jpg", "class": CLASSES[label], "box": box})
            number, size = index + 1, list(mask.shape)
            images.append({"id": number, "file_name": f"{name}/{stem}.jpg", "height": size[0], "width": size[1]})
            code = {"size": size, "counts": run_lengths(mask > 0)}
            one = {"id": number, "image_id": number, "category_id": label + 1, "bbox": box, "segmentation": code}
            objects.append({**one, "area": int((mask > 0).sum()), "iscrowd": 0})
        categories = [{"id": label + 1, "name": kind} for label, kind in enumerate(CLASSES)]
        instances = {"images": images, "annotations": objects, "categories": categories}
        (folder / f"instances_{name}.json").write_text(json.dumps(instances))
    (folder / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw_image(label: int, *, seed: int, number: int, sides: tuple[int, int] = SIDES) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image of a class.

    Args:
        label: index into CLASSES.
        seed, number: name the image; the same pair gives the same picture.
        sides: range of its sides, in pixels.

    Returns:
        image uint8 [H, W, 3] and part labels uint8 [H, W] (index into PARTS).
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * rng.random()

    height, width = (int(uniform(sides[0], sides[1] + 1)) for _ in range(2))
    scene = label if rng.random() < OWN_SCENE else int(uniform(0, len(CLASSES)))
    body, detail = _shapes(label, height, width, uniform)
    layers = [(np.ones((height, width), bool), scene), (body, (label + 3) % len(CLASSES)), (detail, None)]

    image = np.zeros((height, width, 3))
    base_hue = rng.random()
    for depth, (where, texture) in enumerate(layers):
        hue = (base_hue + depth * uniform(0.25, 0.5)) % 1.0
        dark = np.array(colorsys.hsv_to_rgb(hue, uniform(0.3, 0.9), uniform(0.15, 0.5)))
        light = np.array(colorsys.hsv_to_rgb((hue + uniform(-0.08, 0.08)) % 1.0, uniform(0.2, 0.7), uniform(0.6, 1.0)))
        weight = _texture(texture, height, width, uniform, rng) if texture is not None else np.ones((height, width))
        colour = dark + (light - dark) * weight[..., None]
        image[where] = colour[where]

    y, x = np.mgrid[0:height, 0:width]
    light = 1.0 + uniform(-0.3, 0.3) * (x / width - 0.5) + uniform(-0.3, 0.3) * (y / height - 0.5)
    image = image * light[..., None] + uniform(0.0, 0.06) * (rng.random((height, width, 3)) - 0.5)
    mask = np.where(detail, 2, np.where(body, 1, 0)).astype(np.uint8)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def part_maps(mask: np.ndarray) -> np.ndarray:
    """Share of each part in each cell of a grid over the image: uint8 [len(PARTS), PART_GRID, PART_GRID], 255 = all."""
    maps = [
        Image.fromarray(((mask == part) * 255).astype(np.uint8)).resize((PART_GRID, PART_GRID), Image.Resampling.BOX)
        for part in range(len(PARTS))
    ]
    return np.stack([np.asarray(m) for m in maps])


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The object's box (top, left, height, width) in pixels, from part labels [H, W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask, bool [H, W]: down the columns, outside and inside by turns, outside first."""
    column_major = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(column_major[1:] != column_major[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


def _shapes(label: int, height: int, width: int, uniform) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the body and of its detail (a spot on the body), bool [H, W] each."""
    side = min(height, width)
    radius = uniform(0.25, 0.4) * side
    centre_x, centre_y = uniform(radius, width - radius), uniform(radius, height - radius)
    turn = uniform(0, 2 * math.pi)
    y, x = (np.mgrid[0:height, 0:width] + 0.5) - np.array([centre_y, centre_x])[:, None, None]
    u = (math.cos(turn) * x + math.sin(turn) * y) / radius
    v = (-math.sin(turn) * x + math.cos(turn) * y) / radius
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    body = {
        "disk": distance < 0.95,
        "square": np.maximum(abs(u), abs(v)) < 0.75,
        "triangle": np.maximum.reduce([v, -0.5 * v + 0.866 * u, -0.5 * v - 0.866 * u]) < 0.5,
        "star": distance < 0.65 + 0.33 * np.cos(5 * angle),
        "ring": (distance < 1.0) & (distance > 0.5),
        "cross": (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95),
        "crescent": (distance < 1.0) & (np.hypot(u - 0.45, v) > 0.75),
        "bars": (abs(u) < 0.85) & (abs(v) < 0.85) & (np.cos(3.5 * math.pi * v) > -0.2),
    }[CLASSES[label]]
    spots = np.argwhere(body)
    spot_y, spot_x = spots[int(uniform(0, len(spots)))]
    reach = uniform(0.2, 0.3) * radius
    near = np.hypot(*(np.mgrid[0:height, 0:width] - np.array([spot_y, spot_x])[:, None, None])) < reach
    return body, body & near


def _texture(kind: int, height: int, width: int, uniform, rng: np.random.Generator) -> np.ndarray:
    """A texture of the given family, [H, W] in 0..1, with random pitch, phase and a small turn."""
    turn, pitch = uniform(-0.3, 0.3), uniform(7.0, 12.0)
    y, x = np.mgrid[0:height, 0:width].astype(float)
    u = (math.cos(turn) * x + math.sin(turn) * y) / pitch + uniform(0, 1)
    v = (-math.sin(turn) * x + math.cos(turn) * y) / pitch + uniform(0, 1)
    fraction_u, fraction_v = u % 1.0, v % 1.0
    if kind == 0:  # horizontal stripes
        return (fraction_v < 0.5).astype(float)
    if kind == 1:  # checks
        return ((fraction_u < 0.5) ^ (fraction_v < 0.5)).astype(float)
    if kind == 2:  # dots
        return (np.hypot(fraction_u - 0.5, fraction_v - 0.5) < 0.3).astype(float)
    if kind == 3:  # clouds
        coarse = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255.0
    if kind == 4:  # bricks
        shifted = (u + 0.5 * (np.floor(2 * v) % 2)) % 1.0
        return ((shifted > 0.12) & ((2 * v) % 1.0 > 0.2)).astype(float)
    if kind == 5:  # waves
        return 0.5 + 0.5 * np.sin(2 * math.pi * (v + 0.4 * np.sin(math.pi * u)))
    if kind == 6:  # vertical stripes, thin
        return (fraction_u < 0.25).astype(float)
    return (rng.random((height, width)) < 0.35).astype(float)  # speckle
