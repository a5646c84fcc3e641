"""Argument checks of the ops: one line with the op, the argument, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LIMIT = 256  # signatures of an op that are remembered


class KernelError(ValueError):
    """An op was called with arguments that it cannot take."""


def check(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raises KernelError "op: name must be expected, not got" unless the condition holds."""
    if not condition:
        raise KernelError(f"{op}: {name} must be {expected}, not {got}")


class Shapes:
    """Checks the tensors of one call against shapes that share letters.

        shapes = Shapes("centering_softmax_loss")
        V, B, K = shapes("student", student, "V B K")
        shapes("center", center, "K")  # K is now bound

    Args:
        op: name of the op, for the message.
        **sizes: letters whose sizes are known beforehand.
    """

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes = dict(sizes)
        self.device: torch.device | None = None

    def __call__(
        self, name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> tuple[int, ...]:
        """Checks one tensor and binds the letters of its shape.

        Args:
            name: the argument's name.
            tensor: the argument.
            shape: letters or numbers, one per dimension, separated by spaces; "" for a scalar.
            dtypes: types that it may have.

        Returns:
            The sizes.

        Raises:
            KernelError: wrong type, shape or device.
        """
        letters = shape.split()
        if not isinstance(tensor, Tensor):
            raise KernelError(f"{self.op}: {name} must be a tensor [{', '.join(letters)}], not {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise KernelError(f"{self.op}: {name} must be {kinds}, not {str(tensor.dtype).removeprefix('torch.')}")
        fits = tensor.ndim == len(letters)
        for letter, size in zip(letters, tensor.shape, strict=False):
            wanted = int(letter) if letter.isdigit() else self.sizes.get(letter, size)
            fits = fits and wanted == size
        if not fits:
            bound = ", ".join(f"{letter} = {self.sizes[letter]}" for letter in letters if letter in self.sizes)
            expected = f"[{', '.join(letters)}]" + (f" with {bound}" if bound else "")
            raise KernelError(f"{self.op}: {name} must be {expected}, not {list(tensor.shape)}")
        if self.device is not None and tensor.device != self.device:
            raise KernelError(f"{self.op}: {name} is on {tensor.device}, the other arguments on {self.device}")
        self.device = tensor.device
        for letter, size in zip(letters, tensor.shape, strict=True):
            if not letter.isdigit():
                self.sizes[letter] = size
        return tuple(tensor.shape)


def once(checks: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the checks of an op's arguments: a second call with the same signature only gets the first's result.

    The signature is the type, shape and device of each tensor, and every other argument as it is; nothing else may
    decide what the checks find. Errors are not remembered, nor calls whose options cannot be the key of a dict.
    """
    known: dict[Any, Any] = {}  # by signature; itself stands for what is missing

    def remembered(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return checks(*arguments)
        key: Any = tuple([(x.dtype, x.shape, x.device) if isinstance(x, Tensor) else x for x in arguments])
        try:
            found = known.get(key, known)
        except TypeError:
            key, found = None, known
        if found is not known:
            return found
        found = checks(*arguments)
        if key is not None:
            if len(known) >= LIMIT:
                known.clear()
            known[key] = found
        return found

    return remembered
