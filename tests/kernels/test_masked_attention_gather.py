"""Kept tokens: against the float64 reference, by loops over samples, and by their properties."""

import importlib

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._spec import Maker
from fastssl.kernels._verify import poisoned, verify
from fastssl.kernels.masked_attention_gather import (
    _default_backend,
    attention_reference,
    cases,
    gather_tokens,
    indexed_attention,
)

GATHER, ATTENTION = cases.OPS
PATHS = pytest.mark.parametrize("path", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _interpreted_bfloat16_dots(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 operands; here it multiplies their values."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    create_dot = interpreter.InterpreterBuilder.create_dot

    def value(handle):
        if handle.dtype.scalar != language.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), language.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, value(a), value(b), *rest),
    )


@pytest.mark.parametrize("dtype", GATHER.dtypes, ids=str)
@pytest.mark.parametrize("case", GATHER.proof)
def test_kept_tokens_equal_the_reference(case, dtype, device):
    verify(GATHER, GATHER.proof[case], dtype, device)


@pytest.mark.parametrize("dtype", ATTENTION.dtypes, ids=str)
@pytest.mark.parametrize("case", ATTENTION.proof)
def test_attention_equals_the_reference(case, dtype, device):
    verify(ATTENTION, ATTENTION.proof[case], dtype, device)


def tokens_example(device):
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    count = torch.tensor([2, 0, 4])
    ids = torch.where(torch.arange(4) < count[:, None], ids, -(1 << 40))  # not even valid as 32-bit numbers
    return torch.randn(3, 7, 20, device=device, requires_grad=True), ids.to(device), count.to(device)


@PATHS
def test_gather_equals_its_loop(path, device):
    tokens, ids, count = tokens_example(device)
    expected = torch.zeros(3, 4, 20, device=device)
    for b, length in enumerate(count.tolist()):
        for k, n in enumerate(ids[b, :length].tolist()):
            expected[b, k] = tokens[b, n]
    with forced(path):
        out = gather_tokens(tokens, ids, count=count)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(expected)
        [gradient] = torch.autograd.grad(out, tokens, upstream)
    assert torch.equal(gradient, torch.autograd.grad(expected, tokens, upstream)[0])


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gather_keeps_the_type(path, dtype, device):
    """The kernel does not take float64; the reference takes its place."""
    tokens, ids, count = tokens_example(device)
    tokens = tokens.detach().to(dtype).requires_grad_()
    with forced(path):
        out = gather_tokens(tokens, ids, count=count)
        assert out.dtype == dtype
        assert torch.autograd.grad(out.sum(), tokens)[0].dtype == dtype


def attention_by_loop(q, k, v, q_ids, kv_ids, q_count, kv_count, scale):
    """Sample by sample, head by head, query by query."""
    B, H, _, d = q.shape
    out = q.new_zeros(B, H, q_ids.shape[1], d)
    for b in range(B):
        named = kv_ids[b, : kv_count[b]].tolist()
        for h in range(H):
            for i, row in enumerate(q_ids[b, : q_count[b]].tolist()):
                scores = [scale * (q[b, h, row] * k[b, h, n]).sum() for n in named]
                if scores:
                    total = sum(score.exp() for score in scores)
                    weighted = zip(scores, named, strict=True)
                    out[b, h, i] = sum(score.exp() / total * v[b, h, n] for score, n in weighted)
    return out


@pytest.mark.parametrize("backend", ["reference", "triton", "sdpa"])
def test_attention_equals_its_loop(backend, device):
    torch.manual_seed(0)
    qkv = torch.randn(4, 9, 3, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    single = qkv.detach().float().requires_grad_()
    ids = torch.stack([torch.randperm(9, device=device) for _ in range(4)])
    lengths = {"q_count": torch.tensor([3, 5, 0, 1], device=device)}
    lengths["kv_count"] = torch.tensor([6, 1, 4, 0], device=device)
    named = {"q_ids": ids[:, 4:].int(), "kv_ids": ids[:, :6]}
    expected = attention_by_loop(*qkv.permute(2, 0, 3, 1, 4), **named, **lengths, scale=0.7)
    named["q_ids"] = named["q_ids"].masked_fill(torch.arange(5, device=device) >= lengths["q_count"][:, None], 1 << 30)
    named["kv_ids"] = named["kv_ids"].masked_fill(torch.arange(6, device=device) >= lengths["kv_count"][:, None], -5)
    with forced("reference" if backend == "sdpa" else backend):
        out = indexed_attention(
            *single.permute(2, 0, 3, 1, 4), **named, **lengths, scale=0.7,
            backend="sdpa" if backend == "sdpa" else "indexed",
        )  # fmt: skip
        upstream = torch.randn_like(expected)
        gradient = torch.autograd.grad(out, single, upstream.float())[0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, qkv, upstream)[0], rtol=1e-4, atol=1e-5)


def attention_example(device, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 10, 16, device=device, dtype=dtype) for _ in range(3))
    ids = torch.stack([torch.randperm(10, device=device) for _ in range(2)])
    return q, k, v, ids[:, :6], ids[:, 6:]


@PATHS
def test_order_of_keys_does_not_matter_and_order_of_queries_is_kept(path, device):
    """CAE card, oracle 8."""
    q, k, v, visible, masked = attention_example(device)
    with forced(path):
        out = indexed_attention(q, k, v, q_ids=masked, kv_ids=visible, backend="indexed")
        turned = indexed_attention(q, k, v, q_ids=masked.flip(1), kv_ids=visible.flip(1), backend="indexed")
    torch.testing.assert_close(turned.flip(2), out)


@PATHS
@pytest.mark.parametrize("counted", [False, True])
def test_rows_that_take_no_part_are_never_used(path, counted, device):
    """CAE card, oracle 8: they hold NaN; no output or gradient does, and their own gradient is zero."""
    q, k, v, visible, masked = attention_example(device)
    used_q, used_kv = torch.zeros(2, 10, device=device), torch.zeros(2, 10, device=device)
    options = {}
    if counted:
        options = {"q_count": torch.tensor([1, 4], device=device), "kv_count": torch.tensor([5, 0], device=device)}
        for b in range(2):
            used_q[b, masked[b, : options["q_count"][b]]] = 1
            used_kv[b, visible[b, : options["kv_count"][b]]] = 1
    else:
        used_q.scatter_(1, masked, 1)
        used_kv.scatter_(1, visible, 1)
    inputs = []
    for x, used in ((q, used_q), (k, used_kv), (v, used_kv)):
        inputs.append(x.masked_fill(used[:, None, :, None] == 0, float("nan")).requires_grad_())
    with forced(path), poisoned():
        out = indexed_attention(*inputs, q_ids=masked, kv_ids=visible, **options, backend="indexed")
        gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert out.isfinite().all()
    for gradient, used in zip(gradients, (used_q, used_kv, used_kv), strict=True):
        assert gradient.isfinite().all()
        assert (gradient.transpose(1, 2)[used == 0] == 0).all()
    if counted:
        assert (out[0, :, 1:] == 0).all()
        assert (out[1] == 0).all()
        assert (gradients[0][1] == 0).all()


@PATHS
def test_counts_without_ids_read_the_first_rows_alone(path, device):
    q, k, v, _, _ = attention_example(device)
    count = torch.tensor([3, 7], device=device)
    with forced(path):
        out = indexed_attention(q, k, v, q_count=count, kv_count=count)
        for b, n in enumerate(count.tolist()):
            part = (x[b : b + 1, :, :n] for x in (q, k, v))
            torch.testing.assert_close(out[b : b + 1, :, :n], indexed_attention(*part, backend="indexed"))
            assert (out[b, :, n:] == 0).all()


@PATHS
@pytest.mark.parametrize("kv_count", [None, 40])
def test_large_scores_do_not_overflow(path, kv_count, device):
    """One key wins by far, in the last block; the softmax of the others is 0, not NaN. Scores from -1e4 to 1e4."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (3, 50, 50))
    winner = (kv_count or 50) - 1
    k[:, :, winner] = q[:, :, 0] * 3
    q = (q[:, :, :1] * 50).expand(-1, -1, 3, -1).clone().requires_grad_()
    options = {} if kv_count is None else {"kv_count": torch.tensor([kv_count], device=device)}
    with forced(path):
        out = indexed_attention(q, k, v, scale=1.0, **options, backend="indexed")
        gradient = torch.autograd.grad(out.sum(), q)[0]
    torch.testing.assert_close(out, v[:, :, [winner] * 3])
    assert gradient.abs().max() < 1e-4


@PATHS
def test_very_negative_scores_leave_padded_keys_out(path, device):
    """exp(0 - lse) of a padded key would be infinite here."""
    torch.manual_seed(0)
    k = torch.rand(1, 1, 5, 16, device=device) + 1
    q, v = -100 * k, torch.randn(1, 1, 5, 16, device=device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with forced(path):
        out = indexed_attention(*inputs, scale=1.0, backend="indexed")
        gradients = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=1.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["regressor", "ragged keys", "ragged rows without ids", "ragged, strided"])
@pytest.mark.parametrize("contender", ATTENTION.library)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_contenders_do_the_same(contender, case, device):
    inputs = ATTENTION.inputs(Maker(device), torch.float32, **ATTENTION.proof[case])
    expected = attention_reference.indexed_attention(**inputs)
    torch.testing.assert_close(ATTENTION.library[contender](**inputs), expected, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_default_backend(device, monkeypatch):
    assert [_default_backend(ragged=ragged) for ragged in (False, True)] == ["sdpa", "indexed"]
    q, k, v, ids, _ = attention_example(device)
    count = torch.tensor([2, 6], device=device)
    calls = []
    monkeypatch.setattr(attention_reference, "gathered_sdpa", lambda *_, **options: calls.append(options))
    indexed_attention(q, k, v, q_ids=ids, kv_ids=ids)
    assert len(calls) == 1
    indexed_attention(q, k, v, kv_ids=ids, kv_count=count)
    indexed_attention(q, k, v, q_count=count)
    assert len(calls) == 1


@PATHS
def test_both_backends_take_float64(path, device):
    """The kernel does not; the reference takes its place."""
    q, k, v, ids, _ = attention_example(device, torch.float64)
    exact = attention_reference.indexed_attention(q, k, v, kv_ids=ids)
    with forced(path):
        for backend in ("indexed", "sdpa"):
            torch.testing.assert_close(indexed_attention(q, k, v, kv_ids=ids, backend=backend), exact)


def test_bytes_and_operations_by_hand():
    """B = 2, rows of 2 heads x 8 float32 = 64 bytes; 1 and 3 keys for 4 queries each."""
    q, k = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 6, 8)
    inputs = {"q": q, "k": k, "v": k, "q_ids": torch.zeros(2, 4, dtype=torch.int32), "kv_ids": None}
    inputs |= {"q_count": None, "kv_count": torch.tensor([1, 3]), "scale": None}
    out = [torch.zeros(2, 2, 4, 8)]
    indices, taken = 2 * 4 * 4 + 2 * 8, 64 * (8 + 4 + 4)
    assert cases.attention_bytes(inputs, out, False) == indices + taken + 64 * 8
    assert cases.attention_bytes(inputs, out, True) == indices + taken + 64 * 16 + 64 * (10 + 12 + 12)
    assert cases.attention_flops(inputs, out, False) == 2 * 2 * (4 * 1 + 4 * 3) * 2 * 8
    assert cases.attention_flops(inputs, out, True) == 5 * 2 * (4 * 1 + 4 * 3) * 2 * 8


def test_gather_compiles_without_a_graph_break(device, compiles_whole):
    tokens, ids, count = tokens_example(device)
    compiles_whole(lambda x: gather_tokens(x, ids, count=count), tokens)
    compiles_whole(lambda x: gather_tokens(x, ids[:, :0]), tokens)


@pytest.mark.parametrize("backend", ["indexed", "sdpa"])
def test_attention_compiles_without_a_graph_break(backend, device, compiles_whole):
    q, k, v, visible, masked = attention_example(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiles_whole(
        lambda q, k, v: indexed_attention(q, k, v, q_ids=masked, kv_ids=visible, backend=backend).square(), *leaves
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ids": torch.zeros(3, 2, dtype=torch.int64)},
            r"gather_tokens: ids must be \[B, K\] with B = 2, not \[3, 2\]",
        ),
        ({"ids": torch.zeros(2, 2)}, "ids must be int32 or int64, not float32"),
        ({"count": torch.zeros(1, dtype=torch.int64)}, r"count must be \[B\] with B = 2, not \[1\]"),
    ],
)
def test_bad_arguments_of_gather_are_named(change, message):
    inputs = {"tokens": torch.zeros(2, 4, 8), "ids": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(KernelError, match=message):
        gather_tokens(**inputs | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 3, 4, 16)},
            r"indexed_attention: k must be \[B, H, N, d\] with B = 2, H = 2, d = 16, not",
        ),
        ({"v": torch.zeros(2, 2, 5, 16)}, r"v must be \[B, H, N, d\] with B = 2, H = 2, N = 4, d = 16, not"),
        ({"v": torch.zeros(2, 2, 4, 16).half()}, "v must be of q's type, torch.float32, not torch.float16"),
        ({"q": torch.zeros(2, 2, 4, 129)}, r"k must be \[B, H, N, d\] with B = 2, H = 2, d = 129"),
        ({name: torch.zeros(2, 2, 4, 129) for name in "qkv"}, r"q must be \[B, H, Nq, d\] with d from 1 to 128, not"),
        ({"q_ids": torch.zeros(3, 1, dtype=torch.int32)}, r"q_ids must be \[B, Kq\] with B = 2, not \[3, 1\]"),
        ({"kv_count": torch.zeros(2, 1, dtype=torch.int32)}, r"kv_count must be \[B\] with B = 2, not \[2, 1\]"),
        ({"backend": "flash"}, "backend must be 'auto' or 'indexed' or 'sdpa', not 'flash'"),
    ],
)
def test_bad_arguments_of_attention_are_named(change, message):
    inputs = {name: torch.zeros(2, 2, 4, 16) for name in "qkv"}
    with pytest.raises(KernelError, match=message):
        indexed_attention(**inputs | change)
