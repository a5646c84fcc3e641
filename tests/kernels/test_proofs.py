"""Every op against its reference in float64, outputs and gradients: all small and ragged cases, in all types."""

import pytest

from fastssl.kernels._bench import all_ops
from fastssl.kernels._verify import verify
from fastssl.kernels.token_cross_entropy import kernel

PROOFS = [(op, case, dtype) for op in all_ops() for case in op.proof for dtype in op.dtypes]
# Tokens per chunk in some cases of token_cross_entropy, so that there are several.
CHUNKS = {"ragged": 10, "no bias": 4, "long rows": 6, "one value too many": 16, "strided": 5}


@pytest.mark.parametrize(("op", "case", "dtype"), PROOFS, ids=lambda x: getattr(x, "name", str(x)))
def test_equals_the_reference(op, case, dtype, device, monkeypatch):
    if op.name == "token_cross_entropy" and case in CHUNKS:
        monkeypatch.setattr(kernel, "rows_per_chunk", lambda tokens, classes: CHUNKS[case])
    verify(op, op.proof[case], dtype, device)
