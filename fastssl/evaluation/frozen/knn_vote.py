"""Weighted k-nearest-neighbour classification of frozen features, in bounded memory.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4; the
protocol of Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021. Letters: N features
that vote (the memory), n that are classified (the queries), F numbers per feature, k neighbours, C classes; q queries
and m memory rows make a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.config import ConfigError
from fastssl.evaluation.accuracy import Accuracy, class_ranks, top_accuracy
from fastssl.evaluation.data import EvaluationError, check_labels
from fastssl.evaluation.frozen.features import Features
from fastssl.progress import progress_bar

LOW = 2**32 - 1  # mask of a key's lower half
SCALE = 2.0**30  # similarities are kept in steps of 1 / SCALE
EXCLUDED = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class KNNResult(Accuracy):
    """Accuracy of one k.

    Attributes:
        neighbours: how many voted: k, or all there are if they are fewer.
    """

    neighbours: int

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "neighbours": self.neighbours}


def knn_classify(
    train: Features,
    val: Features,
    ks: Sequence[int] = (10, 20, 100, 200),
    *,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    budget: int = 512 * 2**20,
    leave_one_out: bool = False,
    progress: str = "",
) -> dict[int, KNNResult]:
    """Classifies each feature of `val` by the k features of `train` with the largest cosine similarity s.

    Each neighbour votes for its class with weight exp(s / temperature); classes without a vote are never an answer.
    Nothing is left to chance: among equally similar neighbours the earlier one counts, among classes with equal votes
    the lower index comes first.

    Args:
        train, val: labelled, same classes.
        ks: numbers of neighbours; where `train` has fewer features than k, all of them vote.
        temperature: of the votes; small lets the nearest decide.
        device: where similarities are computed.
        budget: bytes of working memory beside the two tables; the table of all similarities is never formed.
        leave_one_out: `train` and `val` come from one data set: no image votes for itself (same id).
        progress: label of the progress bar; empty shows none.

    Returns:
        By k, ascending.

    Raises:
        ConfigError: a k or temperature that is not positive.
        EvaluationError: unlabelled images, different classes or widths, nobody to vote.
    """
    check_numbers(ks, temperature)
    classes = check_labels(train, val, "the training features", "the validation features")
    voters = len(train) - leave_one_out
    if voters < 1:
        raise EvaluationError("one image cannot be classified by the others of its data set: there are none")
    if train.values.shape[1] != val.values.shape[1]:
        raise EvaluationError(
            f"training features have {train.values.shape[1]} numbers, validation features {val.values.shape[1]}; "
            "extract both with the same network and options"
        )
    ks = sorted(set(ks))
    k = min(ks[-1], voters)
    ranks: dict[int, list[Tensor]] = {each: [] for each in ks}
    tile = tile_shape(len(train), len(val), train.values.shape[1], k, budget)
    voting = max(1, budget // 8 // (32 * classes))  # queries whose votes are counted at a time
    bar = progress_bar(len(val), progress)
    with bar:
        for rows, similarity, index in _search(train, val, k, tile, torch.device(device), leave_one_out):
            targets = val.labels[rows]
            for part in _slices(len(targets), voting):
                for each, votes in _vote(similarity[part], train.labels[index[part]], classes, ks, temperature):
                    ranks[each].append(class_ranks(votes, targets[part]))
            bar.update(len(targets))
    results = {}
    for each in ks:
        top1, top5 = top_accuracy(torch.cat(ranks[each]))
        results[each] = KNNResult(top1, top5, len(val), min(each, voters))
    return results


def check_numbers(ks: Sequence[int], temperature: float) -> None:
    """Raises a ConfigError that names the first unusable number."""
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks is {list(ks)}; it must name one or more numbers of neighbours, each 1 or more")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")


def tile_shape(memory: int, queries: int, width: int, k: int, budget: int) -> tuple[int, int]:
    """(q, m): how many queries meet how many memory rows at a time so that about `budget` bytes suffice."""
    per_query = 8 * width + 64 * k  # its feature twice; keys, similarities, labels and weights of its neighbours
    q = min(max(budget // 4 // per_query, 1), queries, 8192)
    per_row = 8 * width + 24 * q  # its feature twice; similarity, key, and the selection's copy of the key
    m = min(max(budget // 2 // per_row, 1), memory)
    return q, m


def _search(
    train: Features, val: Features, k: int, tile: tuple[int, int], device: torch.device, leave_one_out: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The k nearest neighbours of every query, tile by tile.

    A neighbour is one int64 key, its similarity above and its index (inverted) below: the k largest keys are the k most
    similar rows with the lower index first among equals, whatever the tiles, and selecting integers is faster too.

    Yields:
        rows of `val`; similarity float64 [q, k], descending; index int64 [q, k] into `train`; both on the CPU.
    """
    q, m = tile
    similarity = torch.empty(q, m, device=device)
    keys = torch.empty(q, k + m, dtype=torch.int64, device=device)  # the best so far, then the new ones
    for rows in _slices(len(val), q):
        queries = normalize(val.values[rows].to(device, torch.float32))
        best = keys[: len(queries), :k].fill_(EXCLUDED)
        for columns in _slices(len(train), m):
            memory = normalize(train.values[columns].to(device, torch.float32))
            s = torch.mm(queries, memory.T, out=similarity[: len(queries), : len(memory)])
            new = keys[: len(queries), k : k + len(memory)]
            new.copy_(s.mul_(SCALE)).bitwise_left_shift_(32)
            new.bitwise_or_(LOW - torch.arange(columns.start, columns.stop, device=device))
            if leave_one_out:
                same = val.ids[rows, None].to(device) == train.ids[None, columns].to(device)
                new.masked_fill_(same, EXCLUDED)
            best.copy_(keys[: len(queries), : k + len(memory)].topk(k).values)
        found = best.cpu()
        yield rows, (found >> 32) / torch.tensor(SCALE, dtype=torch.float64), LOW - (found & LOW)


def _vote(
    similarity: Tensor, labels: Tensor, classes: int, ks: list[int], temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """For every k in turn, scores float64 [q, C] of the classes: their votes, -inf for classes without any."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the common factor changes no order
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    counted = 0
    for k in ks:
        votes.scatter_add_(1, labels[:, counted:k], weights[:, counted:k])
        counted = k
        yield k, votes.masked_fill(votes == 0, -torch.inf)


def _slices(total: int, size: int) -> Iterator[slice]:
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))
