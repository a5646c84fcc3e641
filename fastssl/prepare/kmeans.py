"""k-means (Lloyd's algorithm) on points that fit into memory.

Letters: T points, F numbers of each, K centres.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.models.dvae import nearest
from fastssl.progress import progress_bar


def kmeans(
    points: Tensor, count: int, steps: int, generator: torch.Generator, tries: int = 1, progress: str = ""
) -> Tensor:
    """Lloyd's algorithm from points that k-means++ draws (Arthur and Vassilvitskii 2007).

    A centre that no point is nearest to becomes the point that is farthest from its own.

    Args:
        points: float [T, F], T at least `count`.
        count: K.
        steps: rounds over all points.
        generator: draws the first centres.
        tries: so many starts; the one whose points end up nearest to their centres is taken.
        progress: label of the progress bar; empty shows none.

    Returns:
        [K, F].
    """
    found = [_lloyd(points, count, steps, generator, progress) for _ in range(tries)]
    if tries == 1:
        return found[0]
    return min(found, key=lambda centres: (points - centres[nearest(points, centres)]).square().sum().item())


def _lloyd(points: Tensor, count: int, steps: int, generator: torch.Generator, progress: str) -> Tensor:
    centres = _spread_points(points, count, generator)
    for _ in progress_bar(steps, progress, "rounds", iterable=range(steps)):
        codes = nearest(points, centres)
        filled = torch.zeros(count).index_add_(0, codes, torch.ones(len(points)))
        sums = torch.zeros_like(centres).index_add_(0, codes, points)
        moved = sums / filled.clamp_min(1)[:, None]
        empty = (filled == 0).nonzero()[:, 0]
        distance = (points - centres[codes]).square().sum(dim=1)
        moved[empty] = points[distance.topk(len(empty)).indices]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _spread_points(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next point is drawn with a probability that grows with the square of its distance so far."""
    few = points[torch.randperm(len(points), generator=generator)[: 20 * count]]
    chosen = [few[0]]
    distance = torch.full((len(few),), math.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (few - chosen[-1]).square().sum(dim=1))
        weight = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen.append(few[torch.multinomial(weight, 1, generator=generator)[0]])
    return torch.stack(chosen)
