"""What the trainer gives a method at each step, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Values:
    """Where the run stands at one optimizer step. Everything scheduled is a pure function of these numbers.

    Attributes:
        step: optimizer steps done before this one, counted from 0 over the whole run.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps per epoch.
        seed: seed of the run.
        numbers: what `Method.scheduled` says of this step, on the device; empty outside training.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int = 0
    numbers: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def clock(self) -> Tensor | int:
        """The step, on the device in training: what draws are keyed by, so that a captured step can be repeated."""
        return self.numbers.get("step", self.step)

    @property
    def epoch(self) -> int:
        """The epoch that this step belongs to, from 0."""
        return self.step // self.steps_per_epoch


@dataclass
class Step:
    """A method's answer for one micro-batch.

    Attributes:
        loss: scalar to minimise, mean over the images of this process.
        metrics: named scalars on the device, detached; logged as they are. Two names are read by the health watch:
            `teacher_entropy` (fraction of ln K, 0 to 1) and `feature_std` (`feature_spread` of the backbone's output).
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def feature_spread(features: Tensor) -> Tensor:
    """How spread the features of a batch are: 0 when all images get the same vector, about 1 for isotropic noise.

    Args:
        features: [B, D], any float type.

    Returns:
        Scalar: the standard deviation over the batch of the L2-normalised features, averaged over D, times sqrt(D).
    """
    x = features.detach()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-12)
    return unit.std(dim=0, unbiased=False).mean() * unit.shape[-1] ** 0.5
