"""The token files that SemMAE's authors train on, and part maps from them.

One `.npy` per image, [196, 207]: the patches of 8 x 8 pixels (of 784 in a 224-pixel crop) that the authors selected, in
any order. Columns: 0-6 how many patches each of 7 parts has, 7-13 the patch's part as one-hot, 14 its place in the
grid of 28 x 28, row by row, 15-206 its pixels (row, column, channel). Whether pixels are normalised is not documented;
nor is the format of the "part mask" archive that the authors link for patches of 16, which is therefore not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.config import ConfigError

ROWS, COLUMNS, PARTS, SIDE = 196, 207, 7, 28


class TokenFileError(ValueError):
    """Not a token file; the message says why."""


@dataclass(frozen=True)
class TokenFile:
    """One image's selected patches, in the order of the file.

    Attributes:
        part: int64 [196], part of each patch from 0 to 6; -1: none.
        place: int64 [196], its place in the grid of 28 x 28, row by row.
        pixels: [196, 192] as stored: row, column, channel.
    """

    part: np.ndarray
    place: np.ndarray
    pixels: np.ndarray

    @property
    def maps(self) -> np.ndarray:
        """uint8 [8, 28, 28]: 255 where a patch belongs to one of the 7 parts; the last map has all other patches."""
        maps = np.zeros((PARTS + 1, SIDE * SIDE), np.uint8)
        known = self.part >= 0
        maps[self.part[known], self.place[known]] = 255
        maps[PARTS, maps[:PARTS].max(axis=0) == 0] = 255
        return maps.reshape(PARTS + 1, SIDE, SIDE)


def read_token_file(path: str | Path) -> TokenFile:
    """Reads one token file.

    Raises:
        TokenFileError: not an array of that shape, or its columns contradict each other.
    """
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TokenFileError(f"{path} cannot be read: {error}") from None
    if table.shape != (ROWS, COLUMNS):
        raise TokenFileError(f"{path} holds an array {list(table.shape)}; a token file has [{ROWS}, {COLUMNS}]")
    member, place = table[:, PARTS : 2 * PARTS], table[:, 2 * PARTS].astype(np.int64)
    if not np.isin(member, (0, 1)).all() or (member.sum(axis=1) > 1).any():
        raise TokenFileError(
            f"{path}: columns 7 to 13 are not one-hot, a patch has more than one part or a share of one"
        )
    if (table[:, :PARTS] != member.sum(axis=0)).any():
        raise TokenFileError(f"{path}: the counts in columns 0 to 6 are not those of columns 7 to 13")
    if place.min() < 0 or place.max() >= SIDE * SIDE or len(np.unique(place)) < ROWS:
        raise TokenFileError(f"{path}: column 14 must hold {ROWS} different places from 0 to {SIDE * SIDE - 1}")
    part = np.where(member.any(axis=1), member.argmax(axis=1), -1)
    return TokenFile(part, place, table[:, 2 * PARTS + 1 :])


@dataclass
class ImportOptions:
    """Whose token files become part maps, and where these go."""

    src: str = ""
    """Folder of token files, CLASS/NAME.npy."""
    dst: str = ""
    """Folder for the maps, CLASS/NAME.npy, as 'fastssl convert --parts' takes them. They cover the crop of the token
    file, so the images must be that crop."""


@dataclass(frozen=True)
class ImportedParts:
    """How many files were turned into maps, and where they are."""

    dst: str
    images: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return (
            f"{self.dst}: part maps of {self.images} images, [8, 28, 28]; the last map has the patches without a part"
        )


def import_parts(options: ImportOptions) -> ImportedParts:
    """Turns the authors' token files into part maps.

    Raises:
        ConfigError: no such folder, or nothing in it.
        TokenFileError: a file that is none.
    """
    source = Path(options.src)
    files = sorted(source.rglob("*.npy"))
    if not files:
        raise ConfigError(f"src is {options.src}, where no token files (.npy) are")
    for path in files:
        target = Path(options.dst) / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, read_token_file(path).maps)
    return ImportedParts(options.dst, len(files))
