"""A micro-batch's forward and backward pass as one CUDA graph: a thousand launches become one call of the host.

What the graph reads lies at fixed places: the batch is copied into buffers, the step's numbers are on the device
(`Numbers`), the gradients stay where the graph writes them. Optimizer, augmentation and everything that asks the host
stay outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.kernels._path import kernel_mode

WARM_UP = 3  # eager steps before a capture: libraries make their plans and workspaces
Pass = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]  # forward and backward; loss and scalars


@dataclass
class Captured:
    """One graph.

    Attributes:
        graph: what is replayed.
        batch: the buffers that it reads.
        names: of the scalars.
        scalars: float32 [1 + scalars]: the loss and they.
        gradients: by parameter; None where the pass leaves none.
        kept: what the graph reads and nothing else would hold.
    """

    graph: torch.cuda.CUDAGraph
    batch: Batch
    names: list[str]
    scalars: Tensor
    gradients: list[Tensor | None]
    kept: list[Any]


class StepGraph:
    """Runs passes of a network as CUDA graphs: one for each shape of the batch, and one more for micro-batches that
    add to gradients.

    Args:
        network: whose parameters get gradients.
        run: the pass, as it is run eagerly.
        check: compare the first replay of each graph with an eager pass.
        say: takes one line for people.
    """

    def __init__(self, network: nn.Module, run: Pass, *, check: bool, say: Callable[[str], None]) -> None:
        self.network, self.run, self.check, self.say = network, run, check, say
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.seen: dict[Any, int] = {}
        self.captured: dict[Any, Captured] = {}
        self.pool: Any = None
        self.given_up = False

    def __call__(self, batch: Batch, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The pass on a batch; gradients are written, or added to those that are there.

        Args:
            batch: on the device, with the epoch as a number.
            first: whether this is the step's first micro-batch: gradients that are there count for nothing.
        """
        key = (first, kernel_mode(), *shapes(batch))
        if first:
            for parameter in self.parameters:
                parameter.grad = None
        if self.given_up:
            return self.run(batch)
        if not first and (True, *key[1:]) not in self.captured:
            return self.run(batch)  # what it adds to does not lie at its place yet
        if key not in self.captured:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= WARM_UP:
                return self.run(batch)
            if not self._capture(key, batch, first):
                return self.run(batch)
            if self.check:
                return self._compare(self.captured[key], batch, first)
        return self._replay(self.captured[key], batch)

    def _capture(self, key: Any, batch: Batch, first: bool) -> bool:
        """Records the graph of a pass; False, and one line, where that cannot be done."""
        from fastssl.kernels.ema_update.kernel import plans

        before = [p.grad for p in self.parameters]
        static = as_buffers(batch)
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.get_rng_state()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # loaders go on
                loss, terms = self.run(static)
                scalars = torch.stack([loss.float(), *(value.float() for value in terms.values())])
        except Exception as error:  # whatever cannot be captured raises as it likes
            self.given_up = True
            torch.cuda.synchronize()
            torch.cuda.set_rng_state(generator)
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
            line = " ".join(str(error).split())[:160]
            self.say(f"run.graph: the step cannot be captured ({line}); training goes on without a graph")
            return False
        torch.cuda.set_rng_state(generator)
        self.pool = graph.pool()
        gradients = [p.grad for p in self.parameters]
        self.captured[key] = Captured(graph, static, list(terms), scalars, gradients, plans())
        return True

    def _replay(self, captured: Captured, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        into_buffers(captured.batch, batch)
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        captured.graph.replay()
        loss, *terms = captured.scalars.clone().unbind()  # the next replay writes there
        return loss, dict(zip(captured.names, terms, strict=True))

    def _compare(self, captured: Captured, batch: Batch, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass both ways from the same state; where they differ, graphs are given up and the eager one counts."""
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        generator = torch.cuda.get_rng_state()
        gradients = [None if first or p.grad is None else p.grad.clone() for p in self.parameters]
        out, _ = self._replay(captured, batch)
        replayed = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        moved = [buffer.clone() for buffer, _ in buffers]

        for buffer, value in buffers:
            buffer.copy_(value)
        torch.cuda.set_rng_state(generator)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        loss, _ = expected = self.run(batch)
        eager = [p.grad for p in self.parameters]
        worst = max(
            difference([out], [loss]), difference(replayed, eager), difference(moved, list(self.network.buffers()))
        )
        if worst <= TOLERANCE:
            how = "bit for bit" if worst == 0 else f"within {worst:.1e}, as sums in another order differ"
            self.say(f"run.graph: the captured step equals the eager one {how}")
            return expected
        self.given_up = True
        self.say(f"run.graph: the captured step differs from the eager one by {worst:.1e}; training goes on without it")
        return expected


TOLERANCE = 1e-2  # bfloat16 passes with atomic sums differ by less


def difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """||a - b|| / ||b|| of all tensors as one vector; infinite where one is missing or not a number."""
    apart, size = 0.0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            apart = apart if a is b else math.inf
            continue
        a, b = a.detach().double(), b.detach().double()
        apart += (a - b).square().sum().item()
        size += b.square().sum().item()
    found = math.sqrt(apart / max(size, 1e-60)) if apart else 0.0
    return math.inf if math.isnan(found) else found


def shapes(batch: Batch) -> tuple[Any, ...]:
    """Sizes and types of all tensors of the batch."""
    return tuple((tuple(value.shape), value.dtype) for value in tensors(batch))


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of the batch, in one order."""
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value)
        return value

    batch.map(note)
    return found


def as_buffers(batch: Batch) -> Batch:
    """A copy of the batch whose epoch, too, lies on the device."""
    copied = batch.map(torch.clone)
    copied.epoch = torch.tensor(batch.epoch, device=batch.id.device)  # type: ignore[assignment]
    return copied


def into_buffers(buffers: Batch, batch: Batch) -> None:
    """Writes a batch where `as_buffers` made room."""
    sources, targets = tensors(batch), tensors(buffers)
    for dtype in dict.fromkeys(value.dtype for value in targets):
        same = [i for i, value in enumerate(targets) if value.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in same], [sources[i] for i in same])
    buffers.epoch.fill_(batch.epoch)  # type: ignore[attr-defined]
