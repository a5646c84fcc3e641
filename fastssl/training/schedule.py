"""Schedules as pure functions of the optimizer step: printable, plottable, with no state to resume."""

from __future__ import annotations

import math


def cosine(step: float, total_steps: float, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 towards `end` at step `total_steps`; `end` from there on."""
    progress = min(step / max(total_steps, 1), 1.0)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(
    step: float,
    total_steps: float,
    warmup_steps: float,
    peak: float,
    end: float,
    start: float = 0.0,
    peak_twice: bool = False,
) -> float:
    """Linear from `start` towards `peak` over `warmup_steps`, then half a cosine from `peak` to `end` at `total_steps`.

    Args:
        peak_twice: the last step of the warm-up has the peak, as the first one after it (numpy's linspace, in DINO's
            code and in what is built on it). False: the first step after the warm-up has it first (MAE).
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1 if peak_twice else warmup_steps, 1)
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, end)


def linear_ramp(position: float, length: float, start: float, end: float) -> float:
    """Linear from `start` at 0 to `end` at `length`; `end` from there on. Positions and length in the same unit."""
    if position >= length:
        return end
    return start + (end - start) * position / length
