"""Pictures of what a method sees and does: pieces that methods put together, and sheets of them with words.

Images here are float [..., 3, H, W] in 0 to 1. Letters: g side of a grid of cells (patches, positions of a map).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD

GAP = 2  # pixels between the pictures of a sheet
SMALLEST = 112  # pixels: smaller pictures are enlarged by a whole number
LINES = 2  # of a caption; the rest is cut off
NARROWEST = 400  # pixels: width of a sheet that has a legend
SWATCH = 72  # pixels: width of a colour scale in the legend

Key = tuple[Tensor | None, str]  # colours from left to right, float [3, n]; and what they mean


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows and columns, and the words that explain them.

    Attributes:
        pictures: float [rows, columns, 3, H, W] in 0 to 1, usually one image of the batch per row.
        titles: of the columns; none: no titles.
        legend: what the colours mean, and what else a reader must know.
        captions: words under each picture, by row; none: no captions.
    """

    pictures: Tensor
    titles: Sequence[str] = ()
    legend: Sequence[Key] = ()
    captions: Sequence[Sequence[str]] = ()


def to_picture(views: Tensor) -> Tensor:
    """Normalised views [..., 3, H, W] (ImageNet mean and standard deviation) as pictures, cut off at 0 and 1."""
    mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.float() * std + mean).clamp(0, 1)


def heat(picture: Tensor, maps: Tensor, strength: float = 0.6) -> Tensor:
    """A map laid over a picture, dark blue (its least value) over red to yellow (its largest).

    Args:
        picture: [..., 3, H, W].
        maps: [..., g, g], any range; each map is stretched to its own range.
    """
    lo, hi = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    level = _enlarge(((maps - lo) / (hi - lo).clamp_min(1e-12)).float(), picture.shape[-2:])
    return (1 - strength) * picture + strength * _heat_colours(level, dim=-3)


def _heat_colours(level: Tensor, dim: int) -> Tensor:
    colours = (2 * level).clamp(0, 1), (2 * level - 1).clamp(0, 1), (0.6 - 1.2 * level).clamp(0, 1)
    return torch.stack(colours, dim=dim)


def heat_key(what: str) -> Key:
    """The legend of `heat`."""
    return _heat_colours(torch.linspace(0, 1, SWATCH), dim=0), f"{what}: least to most, each map over its own range"


def cover_key(what: str) -> Key:
    """The legend of `cover`."""
    return torch.full((3, SWATCH), 0.5), what


def cover(picture: Tensor, cells: Tensor, colour: float = 0.5) -> Tensor:
    """The picture with the marked cells painted in one gray.

    Args:
        picture: [..., 3, H, W].
        cells: bool [..., g, g], the cells to hide.
    """
    hidden = _enlarge(cells.float(), picture.shape[-2:])[..., None, :, :]
    return picture * (1 - hidden) + colour * hidden


def tint(picture: Tensor, labels: Tensor, count: int, strength: float = 0.6) -> Tensor:
    """The picture with each cell tinted in the colour of its label.

    Args:
        picture: [..., 3, H, W].
        labels: int [..., g, g], from 0 to count - 1; others are not tinted.
        count: how many labels there are.
    """
    palette = torch.tensor([colorsys.hsv_to_rgb(i / count, 0.9, 1.0) for i in range(count)], device=picture.device)
    known = (labels >= 0) & (labels < count)
    colour = palette[labels.clamp(0, count - 1)].movedim(-1, -3)  # [..., 3, g, g]
    weight = strength * _enlarge(known.float(), picture.shape[-2:])[..., None, :, :]
    return picture * (1 - weight) + weight * _enlarge(colour, picture.shape[-2:])


def draw(sheet: Sheet) -> Image.Image:
    """The sheet as one picture on white: titles, rows with their captions, legend. Small pictures are enlarged."""
    rows, columns, _, height, width = sheet.pictures.shape
    scale = max(1, SMALLEST // width)
    cells = (sheet.pictures.float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    height, width = scale * height, scale * width
    total = columns * (width + GAP) - GAP
    size = 12 if width < 160 else 14
    font, line = _font(size), round(1.25 * size)
    titles = [_wrap(title, font, width - 4) for title in sheet.titles]
    captions = [[_wrap(text, font, width - 4)[:LINES] for text in row] for row in sheet.captions]
    total = max(total, NARROWEST) if sheet.legend else total
    legend = [(colours, _wrap(text, font, total - SWATCH - 8)) for colours, text in sheet.legend]
    head = line * max(map(len, titles), default=0) + (6 if titles else 0)
    below = [line * max(map(len, row), default=0) + (4 if row else 0) for row in captions] or [0] * rows
    foot = sum(line * len(text) + 4 for _, text in legend) + (6 if legend else 0)
    image = Image.new("RGB", (total, head + rows * (height + GAP) - GAP + sum(below) + foot), "white")
    pen = ImageDraw.Draw(image)

    def write(left: int, top: int, lines: list[str]) -> None:
        for i, text in enumerate(lines):
            pen.text((left, top + i * line), text, fill="black", font=font)

    for column, title in enumerate(titles):
        write(column * (width + GAP) + 2, head - 4 - line * len(title), title)  # they stand on the pictures
    top = head
    for row in range(rows):
        for column in range(columns):
            cell = Image.fromarray(cells[row, column]).resize((width, height), Image.Resampling.NEAREST)
            image.paste(cell, (column * (width + GAP), top))
            if captions:
                write(column * (width + GAP) + 2, top + height + 1, captions[row][column])
        top += height + GAP + below[row]
    top += 4
    for colours, text in legend:
        if colours is not None:
            bar = (colours.cpu().clamp(0, 1) * 255).round().byte().T[None].contiguous().numpy()
            image.paste(Image.fromarray(bar).resize((SWATCH, size), Image.Resampling.NEAREST), (0, top + 1))
        write(0 if colours is None else SWATCH + 8, top, text)
        top += line * len(text) + 4
    return image


def stack(parts: Sequence[tuple[str, Sheet]]) -> Image.Image:
    """Sheets one below the other, each under its heading."""
    drawn = [(heading, draw(sheet)) for heading, sheet in parts]
    font, head, gap = _font(18), 29, 16
    width = max(max(image.width, round(font.getlength(heading)) + 2) for heading, image in drawn)
    whole = Image.new("RGB", (width, sum(head + image.height + gap for _, image in drawn) - gap), "white")
    top = 0
    for heading, image in drawn:
        ImageDraw.Draw(whole).text((0, top), heading, fill="black", font=font)
        whole.paste(image, (0, top + head))
        top += head + image.height + gap
    return whole


def save(path: Path, sheet: Sheet) -> Image.Image:
    """Writes a sheet as one PNG file, and makes its folder; returns the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = draw(sheet)
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return image


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, in pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words where that is possible."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _enlarge(cells: Tensor, size: tuple[int, ...]) -> Tensor:
    """[..., g, g] -> [..., H, W] by nearest neighbour."""
    lead = cells.shape[:-2]
    return F.interpolate(cells.reshape(-1, 1, *cells.shape[-2:]), size=tuple(size), mode="nearest").reshape(
        *lead, *size
    )
