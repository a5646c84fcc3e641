"""Top-1 and top-5 accuracy from class scores, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEVER = 2**31  # the rank of a class that is not an answer at all
Z95 = 1.959964  # a normal variable is within this many standard deviations 95 % of the time


@dataclass(frozen=True)
class Accuracy:
    """How often the true class came first, or among the first five.

    Attributes:
        top1, top5: percent of the images.
        images: how many were classified.
    """

    top1: float
    top5: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of top1, in percent: what another sample of as many images would likely give."""
        return wilson(self.top1 / 100.0, self.images)

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"top1": self.top1, "top5": self.top5, "images": self.images, "top1_interval": [low, high]}

    def cells(self) -> tuple[str, ...]:
        """Top-1, its interval and top-5 as text for a table."""
        low, high = self.interval
        return f"{self.top1:.2f}", f"{low:.2f} to {high:.2f}", f"{self.top5:.2f}"


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one: 0 means right, below 5 means right among the first five.

    Equal scores are ordered by class index. A score of -inf or NaN for the true class never counts as right.

    Args:
        scores: [n, C], any float type.
        labels: int64 [n], 0 to C - 1.

    Returns:
        int64 [n], 0 to C - 1, or NEVER.
    """
    classes = scores.shape[1]
    true = scores.gather(1, labels[:, None])  # [n, 1]
    earlier = torch.arange(classes, device=scores.device) < labels[:, None]
    ranks = ((scores > true) | ((scores == true) & earlier)).sum(1)
    return torch.where(true[:, 0] > -math.inf, ranks, NEVER)


def top_accuracy(ranks: Tensor) -> tuple[float, float]:
    """(top-1, top-5) in percent from `class_ranks`."""
    return 100.0 * (ranks == 0).double().mean().item(), 100.0 * (ranks < 5).double().mean().item()


def wilson(share: float, images: int) -> tuple[float, float]:
    """95 % interval, in percent, of a probability of which `share` was seen in `images` trials.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927, p. 210. Unlike the normal
    approximation it stays inside 0 to 100 and keeps a width at both ends.
    """
    spread = Z95 * math.sqrt(share * (1.0 - share) / images + Z95**2 / (4.0 * images**2))
    middle, scale = share + Z95**2 / (2.0 * images), 1.0 + Z95**2 / images
    return max(0.0, 100.0 * (middle - spread) / scale), min(100.0, 100.0 * (middle + spread) / scale)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first one the header, as right-aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
