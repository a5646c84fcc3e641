"""Semantics-consistent feature search: where in a teacher's map a local crop is found, and the head on what is found.

Everything here is the teacher's side, so nothing has a gradient: outputs never require one, whatever the inputs do.

    maps = search_maps(queries, T)                          # A_m, one cosine per crop and position
    y = conv1(T)                                            # 1x1 and linear: conv1(A_m T) = A_m conv1(T)
    x, mean, var = scale_norm_relu(y, maps, weight, bias)   # relu(bn1(conv1(A_m T))), the input of conv2
    z = conv3(relu(bn2(conv2(x))))
    v = residual_pool(z, weight, bias, mean, var, eps, maps, T)  # pooled relu(bn3(z) + A_m T)

Letters: M local crops, B images, C channels, H x W positions; rows of [M B] are crop-major. Maps may be contiguous or
channels_last; what has the shape of a map has the memory format of the map that it is made from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.feature_search import reference


class Moments(NamedTuple):
    """Statistics that merge across processes: BN's variance is m2 / count, its running one m2 / (count - 1).

    Attributes:
        count: values per channel.
        mean: [C], float32 (float64 for float64 inputs).
        m2: [C], sum of the squared deviations from the mean.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    m2: Tensor


class ScaleNormRelu(NamedTuple):
    """What `scale_norm_relu` gives.

    Attributes:
        out: [M B, C, H, W], dtype of y.
        mean: [C], of the normalisation, float32 (float64 for float64 inputs).
        var: [C], biased.
    """

    out: Tensor
    mean: Tensor
    var: Tensor


@torch.no_grad()
def search_maps(queries: Tensor, feature: Tensor) -> Tensor:
    """Cosine of each query with each position of its image's map (Song et al., "Semantics-Consistent Feature Search
    for Self-Supervised Visual Representation Learning", ICCV 2023).

        for m in range(M):
            for b in range(B):
                q = queries[m, b] / norm(queries[m, b])
                for i in positions:
                    maps[m, b, i] = dot(q, feature[b, :, i] / norm(feature[b, :, i]))  # norms at least 1e-12

    The feature is read once for all crops, and its norms are taken on the way.

    Args:
        queries: [M, B, C], the student's pooled local crops, not yet normalised.
        feature: [B, C, H, W], the teacher's map of the global view, not yet normalised.

    Returns:
        [M, B, H, W], float32 (float64 for a float64 feature); in [-1, 1], in [0, 1] after a ReLU.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "search_maps"
    _check(name, "queries: M B C, feature: B C H W", queries, feature)
    if use_triton(name, queries, feature) and feature.dtype in FLOATS[:3]:
        from fastssl.kernels.feature_search import kernel

        return kernel.search(queries, feature)
    return reference.search_maps(queries, feature)


@torch.no_grad()
def scaled_moments(y: Tensor, maps: Tensor) -> Moments:
    """Per channel the mean of maps[m, b] * y[b] over crops, images and positions, and its squared deviations.

        for c in range(C):
            x = [maps[m, b, i] * y[b, c, i] for m, b, i]
            mean[c] = sum(x) / (M B H W)
            m2[c] = sum((x - mean[c]) ** 2)

    y is read once. Deviations are taken from the mean of a block and blocks are merged (Chan et al. 1983), so a mean
    that is large against the spread costs no digits. The result is the same, bit for bit, at every run.

    Args:
        y: [B, C, H, W], conv1 of the feature.
        maps: [M, B, H, W].

    Returns:
        Count, mean and m2; zeros where there is nothing to count.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "scaled_moments"
    _check(name, "y: B C H W, maps: M B H W", y, maps)
    count = maps.numel()
    if use_triton(name, y, maps) and y.dtype in FLOATS[:3]:
        from fastssl.kernels.feature_search import kernel

        return Moments(count, *kernel.moments(y, maps, None, None, None, 0.0).unbind(0)[:2])
    return Moments(count, *reference.scaled_moments(y, maps))


@torch.no_grad()
def scaled_statistics(
    y: Tensor, maps: Tensor, mean: Tensor, var: Tensor, batches: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm in training mode normalises maps[m, b] * y[b] with: `scaled_moments`, of one process.

    Args:
        y: [B, C, H, W], conv1 of the feature.
        maps: [M, B, H, W].
        mean, var: [C], running statistics, moved in place as PyTorch does.
        batches: int64 scalar, how often they moved; counted up.
        momentum: weight of these values in them.

    Returns:
        Mean and biased variance, [C], float32 (float64 for float64 inputs).

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "scaled_statistics"
    _check(name, "y: B C H W, maps: M B H W, running mean: C, running var: C", y, maps, mean, var)
    if use_triton(name, y, maps) and y.dtype in FLOATS[:3] and not torch.compiler.is_compiling():
        from fastssl.kernels.feature_search import kernel

        found = kernel.moments(y, maps, mean, var, batches, momentum).unbind(0)
        return found[0], found[2]
    count, new_mean, m2 = scaled_moments(y, maps)
    batches.add_(1)
    mean.lerp_(new_mean.to(mean.dtype), momentum)
    var.lerp_((m2 / max(count - 1, 1)).to(var.dtype), momentum)
    return new_mean, m2 / max(count, 1)


@torch.no_grad()
def scale_norm_relu(
    y: Tensor,
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> ScaleNormRelu:
    """ReLU of the batch norm of maps[m, b] * y[b], without the scaled map in memory.

        out[m B + b, c] = relu((maps[m, b] * y[b, c] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c])

    Running statistics are the caller's: they take `mean` and the unbiased variance, var * count / (count - 1). For
    statistics over several processes merge the `scaled_moments` of each and pass the mean and the variance.

    Args:
        y: [B, C, H, W], conv1 of the feature.
        maps: [M, B, H, W].
        weight, bias: [C], of the batch norm.
        eps: added to the variance.
        mean, var: [C], both or neither. None: those of this batch (training mode).

    Returns:
        The output, and the mean and biased variance used.

    Raises:
        KernelError: a shape or type that does not fit; only one of mean and var.
    """
    name = "scale_norm_relu"
    what = "y: B C H W, maps: M B H W, weight: C, bias: C"
    check((mean is None) == (var is None), name, "mean", "given together with var", "one of them alone")
    if mean is None or var is None:
        _check(name, what, y, maps, weight, bias)
        count, mean, m2 = scaled_moments(y, maps)
        var = m2 / max(count, 1)
    else:
        _check(name, what + ", mean: C, var: C", y, maps, weight, bias, mean, var)
    if use_triton(name, y, maps) and y.dtype in FLOATS[:3]:
        from fastssl.kernels.feature_search import kernel

        out = kernel.normalised(y, maps, weight, bias, mean, var, eps)
    else:
        out = reference.scale_norm_relu(y, maps, weight, bias, eps, mean, var)
    return ScaleNormRelu(out, mean, var)


@torch.no_grad()
def residual_pool(
    z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, maps: Tensor, feature: Tensor
) -> Tensor:
    """The end of the head's block on the searched feature: batch norm, residual, ReLU and global average pooling.

        for m in range(M):
            for b in range(B):
                x = relu((z[m B + b] - mean) / sqrt(var + eps) * weight + bias + maps[m, b] * feature[b])
                out[m B + b] = mean of x over positions

    Neither the searched feature nor the sum is ever written. The result is the same, bit for bit, at every run.

    Args:
        z: [M B, C, H, W], conv3's output, crop-major.
        weight, bias: [C], of the batch norm.
        mean, var: [C], of z.
        eps: added to the variance.
        maps: [M, B, H, W].
        feature: [B, C, H, W].

    Returns:
        [M B, C], dtype of z.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "residual_pool"
    what = "maps: M B H W, feature: B C H W, z: MB C H W, weight: C, bias: C, mean: C, var: C"
    _check(name, what, maps, feature, z, weight, bias, mean, var)
    if use_triton(name, z, maps, feature) and z.dtype in FLOATS[:3] and feature.dtype in FLOATS[:3]:
        from fastssl.kernels.feature_search import kernel

        return kernel.pool(z, weight, bias, mean, var, eps, maps, feature)
    return reference.residual_pool(z, weight, bias, mean, var, eps, maps, feature)


@once
def _check(op: str, what: str, *tensors: Tensor) -> None:
    """The tensors against `what`, "name: shape" of each; MB stands for M times B."""
    shapes = Shapes(op)
    for item, tensor in zip(what.split(", "), tensors, strict=True):
        argument, shape = item.split(": ")
        sizes = shapes.sizes
        shapes(argument, tensor, shape.replace("MB", str(sizes["M"] * sizes["B"])) if "MB" in shape else shape)
