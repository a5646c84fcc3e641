"""Cases of centering_softmax_loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP16, Case, Maker, Op, nbytes
from fastssl.kernels.centering_softmax_loss import centering_softmax_loss, reference


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    V: int,
    B: int,
    K: int,
    T: int = 2,
    center: bool = True,
    temp: float = 0.04,
    on_device: bool = False,
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    student, teacher = make.normal(V, B, K, dtype=dtype), make.normal(T, B, K, dtype=dtype, scale=0.3)
    if strided:
        student = make.normal(V, K, 2 * B, dtype=dtype)[:, :, ::2].transpose(1, 2)
        teacher = make.normal(B, T, K, dtype=dtype).transpose(0, 1)
    return {
        "student": student,
        "teacher": teacher,
        "center": make.normal(K, scale=0.1) if center else None,
        "student_temp": 0.1,
        "teacher_temp": torch.tensor(temp, dtype=torch.float64, device=make.device) if on_device else temp,
        **options,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    student, teacher = nbytes(inputs["student"]), nbytes(inputs["teacher"])
    return 2 * student + teacher if backward else student + teacher


def cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor | None, student_temp: float, teacher_temp: float,
    pairs: str = "others",
) -> Tensor:  # fmt: skip
    """The same loss by F.cross_entropy with soft targets, one call per student crop."""
    q = ((teacher.float() if center is None else teacher.float() - center) / teacher_temp).softmax(-1)
    everything = q.sum(0)
    total = everything.new_zeros(())
    for v in range(len(student)):
        target = q[v] if pairs == "matching" else everything - q[v] if v < len(q) else everything
        total = total + F.cross_entropy(student[v].float() / student_temp, target)
    return total / (len(student) if pairs == "matching" else len(q) * (len(student) - 1))


PROOF: dict[str, Case] = {
    "dino": {"V": 5, "B": 3, "K": 700},
    "more than one stretch": {"V": 3, "B": 1, "K": 4500, "T": 1},
    "many rows": {"V": 2, "B": 17, "K": 65},
    "one prototype": {"V": 2, "B": 1, "K": 1},
    "cross-view": {"V": 2, "B": 4, "K": 256},
    "matching, no centre": {"V": 6, "T": 6, "B": 3, "K": 257, "center": False, "pairs": "matching", "temp": 0.07},
    "matching, one crop": {"V": 1, "T": 1, "B": 2, "K": 33, "pairs": "matching"},
    "three teachers, no centre": {"V": 3, "T": 3, "B": 2, "K": 130, "center": False},
    "temperature on the device": {"V": 4, "B": 3, "K": 300, "on_device": True},
    "strided": {"V": 4, "B": 3, "K": 90, "strided": True},
}

BENCH: dict[str, Case] = {
    "DINO V=10 B=64 K=65536": {"V": 10, "B": 64, "K": 65536, "on_device": True},
    "DINO V=10 B=64 K=262144": {"V": 10, "B": 64, "K": 262144},
    "cross-view V=2 B=256 K=65536": {"V": 2, "B": 256, "K": 65536},
    "SCFS stage, cross-view B=64 K=256": {"V": 2, "B": 64, "K": 256},
    "SCFS stage, searched M=8 B=64 K=256": {
        "V": 8, "T": 8, "B": 64, "K": 256, "center": False, "pairs": "matching", "temp": 0.07,
    },
}  # fmt: skip

OPS = [
    Op(
        "centering_softmax_loss", centering_softmax_loss, reference.centering_softmax_loss, inputs, PROOF, BENCH,
        min_bytes, gradients=("student",), library={"F.cross_entropy": cross_entropy}, upstream=1024.0,
        tolerance={torch.float32: (1e-5, 1e-4), FP16: (1e-3, 4e-3)},
    )
]  # fmt: skip
