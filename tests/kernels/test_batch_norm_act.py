"""Batch norm, residual sum and ReLU: against the float64 reference, PyTorch's modules, and by its properties."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._verify import verify
from fastssl.kernels.batch_norm_act import Running, batch_norm_act, cases, kernel

OP = cases.OPS[0]
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
@pytest.mark.parametrize("case", OP.proof)
def test_equals_the_reference(case, dtype, device):
    verify(OP, OP.proof[case], dtype, device)
