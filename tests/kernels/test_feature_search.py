"""Feature search: against the float64 reference, the loops of the method, and by its properties."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._verify import verify
from fastssl.kernels.feature_search import (
    cases,
    kernel,
    residual_pool,
    scale_norm_relu,
    scaled_moments,
    scaled_statistics,
    search_maps,
)


@pytest.mark.parametrize("case", ["several blocks", "off block", "strided"])
def test_moments_of_several_blocks_per_program_equal_the_reference(case, device, monkeypatch):
    monkeypatch.setattr(kernel, "SPLITS", 2)
    op = next(op for op in cases.OPS if op.name == "scaled_moments")
    verify(op, op.proof[case] | {"B": 5}, torch.float32, device)


class Head:
    """The convolutional part of SCFS's stage head, with random weights and training-mode batch norms."""

    def __init__(self, C, width, dtype, device):
        def draw(*shape):
            return torch.randn(shape, dtype=dtype).to(device)

        self.conv1, self.conv2, self.conv3 = draw(width, C, 1, 1), draw(width, width, 3, 3), draw(C, width, 1, 1)
        self.norms = [(draw(n), draw(n)) for n in (width, width, C)]

    def loop(self, searched):
        """The head as it is written down, on the searched feature [M B, C, H, W]."""
        x = searched
        for conv, padding, norm in zip((self.conv1, self.conv2), (0, 1), self.norms, strict=False):
            x = F.batch_norm(F.conv2d(x, conv, padding=padding), None, None, *norm, training=True).relu()
        x = F.batch_norm(F.conv2d(x, self.conv3), None, None, *self.norms[2], training=True)
        return (x + searched).relu().mean(dim=(2, 3))

    def fused(self, maps, feature):
        x = scale_norm_relu(F.conv2d(feature, self.conv1), maps, *self.norms[0]).out
        x = F.conv2d(x, self.conv2, padding=1)
        z = F.conv2d(F.batch_norm(x, None, None, *self.norms[1], training=True).relu(), self.conv3)
        var, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
        return residual_pool(z, *self.norms[2], mean, var, 1e-5, maps, feature)


def search_by_loop(queries, feature):
    """Crop by crop, as the method's card says it: maps [M, B, H, W] and the searched feature [M B, C, H, W]."""
    keys = F.normalize(feature, dim=1)
    maps, searched = [], []
    for crop in queries:
        a = (keys * F.normalize(crop, dim=1)[:, :, None, None]).sum(dim=1, keepdim=True)
        maps.append(a[:, 0])
        searched.append(a * feature)
    return torch.stack(maps), torch.cat(searched)


@pytest.mark.parametrize(("path", "cases"), [("reference", 100), ("triton", 6)])
def test_equals_the_methods_loops(path, cases, device):
    """SCFS card, oracle 3."""
    dtype, tolerance = (torch.float64, 1e-9) if path == "reference" else (torch.float32, 1e-5)
    for seed in range(cases):
        torch.manual_seed(seed)
        M, B, C, H, W = (int(torch.randint(low, high, ())) for low, high in ((1, 4), (2, 4), (2, 9), (2, 6), (2, 6)))
        feature = torch.randn(B, C, H, W, dtype=dtype).to(device).relu()
        queries = torch.rand(M, B, C, dtype=dtype).to(device)
        feature = feature.contiguous(memory_format=[torch.contiguous_format, torch.channels_last][seed % 2])
        head = Head(C, 4, dtype, device)
        expected_maps, searched = search_by_loop(queries, feature)
        with forced(path):
            maps = search_maps(queries, feature)
            torch.testing.assert_close(maps, expected_maps, rtol=0, atol=tolerance)
            got = head.fused(maps, feature)
        expected = head.loop(searched)
        torch.testing.assert_close(got, expected, rtol=0, atol=10 * tolerance * expected.abs().max().item())


def test_maps_are_cosines(path, device):
    """SCFS card, oracle 2: within [0, 1] after a ReLU, blind to lengths, and 1 where the feature is the query."""
    torch.manual_seed(0)
    feature = torch.randn(2, 40, 3, 5, device=device).relu()
    queries = torch.rand(3, 2, 40, device=device)
    lengths = torch.rand(2, 1, 3, 5, device=device) + 0.1
    with forced(path):
        maps = search_maps(queries, feature)
        assert (maps >= 0).all()
        assert (maps <= 1 + 1e-6).all()
        assert maps.std() > 0.01
        torch.testing.assert_close(search_maps(queries * 1e-3, feature), maps, rtol=0, atol=1e-6)
        torch.testing.assert_close(search_maps(queries, feature * lengths), maps, rtol=0, atol=1e-6)
        torch.testing.assert_close(search_maps(-queries, feature), -maps, rtol=0, atol=1e-6)
        parallel = queries[1, :, :, None, None] * lengths
        ones = search_maps(queries[1:2], parallel)
        torch.testing.assert_close(ones, torch.ones_like(ones))


def test_maps_of_short_types_are_exact_in_the_query(path, device):
    """The query is not rounded to the feature's type, whatever its length."""
    torch.manual_seed(0)
    feature = torch.rand(2, 64, 4, 4, device=device).to(torch.float16)
    queries = torch.rand(2, 2, 64, device=device)
    expected, _ = search_by_loop(queries.double(), feature.double())
    for length in (1e-9, 1.0, 1e9):
        with forced(path):
            maps = search_maps(queries * length, feature)
        torch.testing.assert_close(maps.double(), expected, rtol=0, atol=1e-6)


def test_zero_vectors_give_zero(path, device):
    feature, queries = torch.ones(1, 4, 2, 2, device=device), torch.ones(2, 1, 4, device=device)
    feature[0, :, 1, 0], queries[1] = 0, 0
    with forced(path):
        maps = search_maps(queries, feature)
    torch.testing.assert_close(maps[:, 0].cpu(), torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))


def test_a_large_mean_costs_the_variance_no_digits(path, device):
    """The mean is 4096 times the spread: mean of squares less square of mean would leave nothing of it."""
    torch.manual_seed(0)
    y = 4096 + torch.randn(4, 3, 9, 9, device=device)
    maps = 1 + 1e-4 * torch.randn(5, 4, 9, 9, device=device)
    x = (maps.double()[:, :, None] * y.double()).transpose(0, 2).flatten(1)
    with forced(path):
        count, mean, m2 = scaled_moments(y, maps)
    assert count == x.shape[1]
    torch.testing.assert_close(mean.double(), x.mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double() / count, x.var(dim=1, correction=0), rtol=1e-3, atol=0)


def test_running_statistics_move_as_in_pytorchs_module(path, device):
    torch.manual_seed(0)
    y, maps = torch.randn(3, 6, 4, 5, device=device) + 2, torch.rand(2, 3, 4, 5, device=device)
    norm, buffers = torch.nn.BatchNorm2d(6).to(device), [torch.zeros(6), torch.ones(6), torch.tensor(0)]
    x = torch.cat([maps[m][:, None] * y for m in range(2)])
    norm(x)
    buffers = [buffer.to(device) for buffer in buffers]
    with forced(path):
        mean, var = scaled_statistics(y, maps, *buffers, 0.1)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(buffers, [norm.running_mean, norm.running_var, norm.num_batches_tracked])


def test_merged_moments_of_two_processes_normalise_as_one(path, device):
    torch.manual_seed(0)
    y, maps = torch.randn(5, 6, 4, 4, device=device) + 3, torch.rand(2, 5, 4, 4, device=device)
    weight, bias = torch.randn(6, device=device), torch.randn(6, device=device)
    with forced(path):
        whole = scale_norm_relu(y, maps, weight, bias)
        parts = [scaled_moments(y[:2], maps[:, :2]), scaled_moments(y[2:], maps[:, 2:])]
        count = sum(part.count for part in parts)
        mean = sum(part.count * part.mean for part in parts) / count
        var = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in parts) / count
        torch.testing.assert_close(mean, whole.mean)
        torch.testing.assert_close(var, whole.var)
        half = scale_norm_relu(y[:2], maps[:, :2], weight, bias, mean=mean, var=var).out
    torch.testing.assert_close(half.unflatten(0, (2, 2)), whole.out.unflatten(0, (2, 5))[:, :2])


@pytest.mark.parametrize("last", [True, False])
def test_outputs_have_the_features_memory_format_and_no_gradient(path, last, device):
    """SCFS card, oracle 9: nothing flows to the teacher or, through the maps, to the student."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    feature = torch.rand(2, 4, 3, 3, device=device).contiguous(memory_format=memory_format).requires_grad_()
    queries = torch.rand(3, 2, 4, device=device, requires_grad=True)
    ones = torch.ones(4, device=device, requires_grad=True)
    with forced(path):
        maps = search_maps(queries, feature)
        norm = scale_norm_relu(feature, maps, ones, ones)
        pooled = residual_pool(norm.out.clone().requires_grad_(), ones, ones, ones, ones, 1e-5, maps, feature)
    for output in (maps, norm.out, norm.mean, norm.var, pooled):
        assert not output.requires_grad
    assert norm.out.is_contiguous(memory_format=memory_format)


def test_nan_shows(path, device):
    feature, maps = torch.ones(1, 2, 2, 2, device=device), torch.ones(1, 1, 2, 2, device=device)
    feature[0, 1, 0, 1] = torch.nan
    ones = torch.ones(2, device=device)
    with forced(path):
        out = scale_norm_relu(feature, maps, ones, ones, mean=ones, var=ones).out
        pooled = residual_pool(torch.zeros_like(feature), ones, ones, ones, ones, 1e-5, maps, feature)
    assert out.isnan().sum() == 1
    assert pooled.isnan().tolist() == [[False, True]]


def test_compiles_without_a_graph_break(device, compiles_whole):
    queries, feature = torch.rand(2, 2, 6, device=device), torch.rand(2, 6, 3, 3, device=device)
    feature = feature.contiguous(memory_format=torch.channels_last)
    ones = torch.ones(6, device=device)

    def step(leaf):
        maps = search_maps(queries, feature)
        out, mean, var = scale_norm_relu(feature, maps, ones, ones)
        pooled = residual_pool(out, ones, ones, out.mean((0, 2, 3)), ones, 1e-5, maps, feature)
        return leaf * (pooled + mean + var)

    compiles_whole(step, torch.rand(4, 6, device=device, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"z": torch.zeros(5, 4, 3, 3)},
            r"residual_pool: z must be \[6, C, H, W\] with C = 4, H = 3, W = 3, not \[5, ",
        ),
        ({"maps": torch.zeros(3, 2, 3, 4)}, r"feature must be \[B, C, H, W\] with B = 2, H = 3, W = 4, not \[2, 4, 3"),
        ({"weight": torch.zeros(3)}, r"weight must be \[C\] with C = 4, not \[3\]"),
        ({"feature": torch.zeros(2, 4, 3, 3, dtype=torch.int32)}, "feature must be float32 or .* not int32"),
    ],
)
def test_bad_arguments_of_residual_pool_are_named(change, message):
    inputs = {"z": torch.zeros(6, 4, 3, 3), "maps": torch.zeros(3, 2, 3, 3), "feature": torch.zeros(2, 4, 3, 3)}
    vectors = {name: torch.ones(4) for name in ("weight", "bias", "mean", "var")}
    with pytest.raises(KernelError, match=message):
        residual_pool(**{**inputs, **vectors, "eps": 1e-5, **change})


def test_bad_arguments_are_named():
    y, maps, vector = torch.zeros(2, 4, 3, 3), torch.zeros(3, 2, 3, 3), torch.zeros(4)
    with pytest.raises(KernelError, match=r"search_maps: feature must be \[B, C, H, W\] with B = 2, C = 5, not"):
        search_maps(torch.zeros(3, 2, 5), y)
    with pytest.raises(KernelError, match=r"scaled_moments: maps must be \[M, B, H, W\] with B = 2, .* not \[3, 1,"):
        scaled_moments(y, maps[:, :1])
    with pytest.raises(KernelError, match="scale_norm_relu: mean must be given together with var, not one of them"):
        scale_norm_relu(y, maps, vector, vector, mean=vector)
    with pytest.raises(KernelError, match=r"scale_norm_relu: bias must be \[C\] with C = 4, not \[3\]"):
        scale_norm_relu(y, maps, vector, vector[:3])
