"""Transformer blocks (Dosovitskiy et al. 2021, arXiv 2010.11929) with timm's keys and numbers, made to be launched from
Python without wasting its time.

Between the matrix products of pre-norm blocks stands always the same: a branch is scaled, perhaps dropped, added to the
stream, and the sum is normed for the next branch. `residual_norm` does this in one launch. The last sum of a block and
the first norm of the next one belong together too, so a block that is one of several (`run_blocks`) takes its tokens
with their norm, and hands on its own with the norm that comes next.

A block that is recomputed in the backward pass (`recompute`) stands alone instead: all that is kept of it is its input.

The linear layer that ends a branch leaves its bias to this sum: there the bias' gradient comes with those of the norm,
where in the layer it would be a launch of its own.

Images of several sizes pass the blocks together (`run_groups`): the tokens of all lie one behind the other, and only
attention tells the groups apart.

Letters: B rows of the batch, N tokens, D width, h heads, d = D / h, T tokens of all groups: the sum of their B x N.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastssl.kernels.drop_path import drop_path
from fastssl.kernels.residual_norm import residual_add, residual_norm

Keep = tuple[Tensor | None, Tensor | None]  # per branch of a block, float32 [B]: 0, or one over the share kept
WHOLE: Keep = (None, None)
Groups = tuple[tuple[int, int], ...]  # rows and tokens (B, N) of each group


@dataclass(frozen=True)
class Drop:
    """What stochastic depth is drawn from (`fastssl.kernels.drop_path`): not from ranks, the batch, or the order.

    Attributes:
        ids: int64 [B], sample ids of the images in the batch.
        seed: of the run.
        step: of the run; an int64 scalar on the device, or a number.
        purpose: name of the network; networks with different names drop different branches.
        together: crops of one image that stand side by side in the batch. A batch of more rows than B x together holds
            all images again, with further crops.
        first: number of the first crop.
    """

    ids: Tensor
    seed: int
    step: int | Tensor
    purpose: str
    together: int = 1
    first: int = 0

    def table(self, rate: float, layers: int, rows: int) -> Tensor:
        """float32 [2 x layers, rows], see the op."""
        return drop_path(
            self.ids, rate=rate, layers=layers, rows=rows, seed=self.seed, step=self.step, key=_crc(self.purpose),
            together=self.together, first=self.first,
        )  # fmt: skip


@cache
def _crc(purpose: str) -> int:
    return zlib.crc32(f"drop/{purpose}".encode())


class Unit(nn.Module):
    """A part of a network whose matrices are used nowhere but in its own `forward`, so they may lie elsewhere meanwhile
    (`fastssl.training.shard`), and what they made can be made again.

    Attributes:
        also: methods beside `forward` that are called from outside and use the matrices.
        recompute: keep only the input for the backward pass, and compute the rest again there.
    """

    also: ClassVar[tuple[str, ...]] = ()
    recompute: bool = False

    def run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """function(*inputs), recomputed in the backward pass if the part is to be; it must draw nothing at random."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def set_recompute(network: nn.Module) -> bool:
    """Lets every block of the network be recomputed in the backward pass; whether it has any."""
    units = [module for module in network.modules() if isinstance(module, Unit)]
    for unit in units:
        unit.recompute = True
    return any(isinstance(unit, Block) for unit in units)


class Block(Unit):
    """A pre-norm block: exact GELU, MLP ratio 4, biases everywhere. Parameters and start values are timm's.

    Args:
        width, heads: channels (D), attention heads (h).
        drop_path: share of the samples whose branch is dropped in training.
        layer_scale: start value of a learned gain per channel on both branches. 0: none.
    """

    also = ("class_attention",)

    def __init__(self, width: int, heads: int, drop_path: float = 0.0, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()  # holds the share alone
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    @property
    def rate(self) -> float:
        """Share of the samples whose branches are dropped."""
        return getattr(self.drop_path1, "drop_prob", 0.0)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        normed: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        keep: Keep | None = None,
        dtype: torch.dtype = torch.float32,
        groups: Groups | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The block by itself, block(x), or as one of several.

        Args:
            x: [B, N, D]; with `groups` [T, 1, D].
            attn_mask: added to the attention logits, broadcast to [B, h, N, N].
            normed: norm1(x), of the type that matrix products take. None: computed here.
            norm: what the result is normed with; goes with `normed`.
            keep: what the branches are multiplied with. None: what is dropped in training is drawn here.
            dtype: of the result's norm.
            groups: what stands in x, if that is groups of images.

        Returns:
            As x; with `normed`, a pair of this and its norm.
        """
        if keep is None:
            keep = WHOLE
            if self.training and self.rate > 0:
                first, second = _draw(self.rate, len(x), 1, x.device, rising=False).unbind()
                keep = first, second
        if normed is None:
            return self.run(self._alone, x, attn_mask, keep, groups)
        assert norm is not None
        x, branch = self._branches(x, normed, attn_mask, keep[0], groups)
        return add_norm(x, norm, dtype, branch, self.ls2, keep[1], self.mlp.fc2.bias)

    def class_attention(self, x: Tensor) -> Tensor:
        """What the first token's attention gives to the others, [B, N, D] -> [B, h, N-1]."""
        _, normed = add_norm(x, self.norm1, working_type(x, self.attn.qkv.weight))
        q, k, _ = self.attn.qkv(normed).unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.attn.scale * q[:, :, :1] @ k.transpose(-2, -1)).softmax(-1)[:, :, 0, 1:]

    def _alone(self, x: Tensor, attn_mask: Tensor | None, keep: Keep, groups: Groups | None) -> Tensor:
        """The block from its input alone."""
        _, normed = add_norm(x, self.norm1, working_type(x, self.attn.qkv.weight))
        x, branch = self._branches(x, normed, attn_mask, keep[0], groups)
        return residual_add(x, branch, gain_of(self.ls2), keep[1], self.mlp.fc2.bias)

    def _branches(
        self, x: Tensor, normed: Tensor, attn_mask: Tensor | None, keep: Tensor | None, groups: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream with the attention added, and what the MLP makes of it, less its bias."""
        branch = self.attn(normed, attn_mask, groups)
        working = working_type(branch, self.mlp.fc1.weight)
        x, normed = add_norm(x, self.norm2, working, branch, self.ls1, keep, self.attn.proj.bias)
        return x, self.mlp(normed)


class Attention(nn.Module):
    """Multi-head self-attention, all but the bias of `proj`: whoever adds the result to something adds it too."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, groups: Groups | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; the mask is added to the logits. With `groups` [T, 1, D] -> [T, 1, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if groups is None:
            return F.linear(attend(qkv.unbind(2), attn_mask).flatten(2), self.proj.weight)
        parts = _Parts.apply(qkv, groups)
        mixed = [attend(parts[i : i + 3], attn_mask).flatten(0, 1) for i in range(0, len(parts), 3)]
        return F.linear(torch.cat(mixed).flatten(1)[:, None], self.proj.weight)


def attend(qkv: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """What queries find among keys and values; all of them [B, N, h, d], as is the result."""
    q, k, v = (y.transpose(1, 2) for y in qkv)  # [B, h, N, d]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


class _Parts(torch.autograd.Function):
    """Queries, keys and values of each group, [B, N, h, d], as views of [T, 1, 3, h, d].

    Split and unbind would put their gradients together twice, first those of a group, then the groups.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        ctx.groups = groups
        return tuple(one for part in apart(qkv, groups) for one in part.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        tokens = sum(rows * count for rows, count in ctx.groups)
        whole = upstream[0].new_empty(tokens, 1, 3, *upstream[0].shape[2:])
        for i, part in enumerate(apart(whole, ctx.groups)):
            torch.stack(upstream[3 * i : 3 * i + 3], dim=2, out=part)
        return whole, None


def apart(x: Tensor, groups: Groups) -> list[Tensor]:
    """Views of what each group has in x: [T, 1, ..] -> [B, N, ..] each."""
    parts = x.squeeze(1).split([rows * tokens for rows, tokens in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, all but the bias of `fc2`, as in `Attention`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.fc1(x)), self.fc2.weight)


class LayerScale(nn.Module):
    """Holds the gain of a branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))


def transformer_blocks(
    width: int, depth: int, heads: int, drop_path: float = 0.0, layer_scale: float = 0.0
) -> nn.ModuleList:
    """Blocks whose stochastic depth grows linearly from 0 to `drop_path`; `layer_scale` as in `Block`."""
    return nn.ModuleList(Block(width, heads, drop_path * i / max(depth - 1, 1), layer_scale) for i in range(depth))


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    norm: nn.LayerNorm,
    drop: Drop | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(the tokens after all blocks).

    Args:
        blocks: `transformer_blocks`.
        x: [B, N, D].
        norm: the final one.
        drop: what stochastic depth is drawn from. None: PyTorch's generator.
        dtype: of the result. None: in training what matrix products take (autocast's type, or the weights'), which is
            what comes next there; in eval mode that of x.
    """
    return last_norms(blocks, x, norm, 1, drop, dtype)[0]


def last_norms(
    blocks: Iterable[nn.Module],
    x: Tensor,
    norm: nn.LayerNorm,
    n: int,
    drop: Drop | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """norm(the tokens after a block) for each of the last `n` blocks; arguments as for `run_blocks`."""
    layers = cast(list[Block], list(blocks))
    return _run(layers, x, norm, n, branch_factors(_top_rate(layers), x, len(layers), drop), dtype)


def run_groups(
    blocks: Iterable[nn.Module], x: Tensor, norm: nn.LayerNorm, groups: Groups, drops: Sequence[Drop | None]
) -> Tensor:
    """`run_blocks` for images of several sizes in one pass.

    Args:
        x: [T, 1, D], the tokens of all groups.
        groups: rows and tokens (B, N) of each.
        drops: of each.

    Returns:
        [T, 1, D].
    """
    layers = cast(list[Block], list(blocks))
    keeps = group_factors(_top_rate(layers), x, len(layers), groups, drops)
    return _run(layers, x, norm, 1, keeps, groups=groups)[0]


def _run(
    layers: list[Block],
    x: Tensor,
    norm: nn.LayerNorm,
    n: int,
    keeps: list[Keep],
    dtype: torch.dtype | None = None,
    groups: Groups | None = None,
) -> list[Tensor]:
    last = len(layers) - 1
    working = working_type(x, layers[0].attn.qkv.weight)
    dtype = dtype or (working if layers[last].training else x.dtype)
    outputs: list[Tensor] = []
    if layers[last].recompute and layers[last].training:
        for i, layer in enumerate(layers):
            x = layer(x, keep=keeps[i], groups=groups)
            if i > last - n:
                outputs.append(add_norm(x, norm, dtype)[1])
        return outputs
    _, normed = add_norm(x, layers[0].norm1, working)
    for i in range(last):
        x, normed = layers[i](x, None, normed, layers[i + 1].norm1, keeps[i], working, groups)
        if i > last - n:
            outputs.append(add_norm(x, norm, dtype)[1])
    return [*outputs, layers[last](x, None, normed, norm, keeps[last], dtype, groups)[1]]


def branch_factors(rate: float, x: Tensor, layers: int, drop: Drop | None) -> list[Keep]:
    """Per layer what its two branches are multiplied with, for the rows of x [B, ..]; all of it is drawn at once.

    Args:
        rate: of the last layer; it grows linearly from 0. 0: nothing is dropped.
        drop: what it is drawn from. None: PyTorch's generator.
    """
    return _by_layer(_table(rate, len(x), layers, drop, x.device)) if rate else [WHOLE] * layers


def group_factors(rate: float, x: Tensor, layers: int, groups: Groups, drops: Sequence[Drop | None]) -> list[Keep]:
    """`branch_factors` of several groups, [T]: each token of x [T, ..] has its row's factor."""
    if not rate:
        return [WHOLE] * layers
    table = x.new_empty(2 * layers, len(x), dtype=torch.float32)
    parts = table.split([rows * tokens for rows, tokens in groups], dim=1)
    for part, (rows, tokens), drop in zip(parts, groups, drops, strict=True):
        part.unflatten(1, (rows, tokens)).copy_(_table(rate, rows, layers, drop, x.device)[:, :, None])
    return _by_layer(table)


def _top_rate(layers: list[Block]) -> float:
    """Share of the samples that the last layer drops; 0 in eval mode."""
    return layers[-1].rate if layers[-1].training else 0.0


def _table(rate: float, rows: int, layers: int, drop: Drop | None, device: torch.device) -> Tensor:
    """float32 [2 x layers, rows]."""
    return _draw(rate, rows, layers, device) if drop is None else drop.table(rate, layers, rows)


def _by_layer(table: Tensor) -> list[Keep]:
    rows = table.unbind()
    return list(zip(rows[::2], rows[1::2], strict=True))


def _draw(rate: float, rows: int, layers: int, device: torch.device, rising: bool = True) -> Tensor:
    """Factors from PyTorch's generator, float32 [2 x layers, rows]."""
    draws = torch.rand(2 * layers, rows, device=device)
    if not rising:
        return torch.where(draws < rate, 0.0, 1 / max(1 - rate, 1e-12))
    rates = torch.linspace(0, rate, layers, device=device).repeat_interleave(2)[:, None]
    return torch.where(draws < rates, 0.0, 1 / (1 - rates))


def working_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """What matrix products with this weight take: autocast's type, or the weight's."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def add_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
    branch: Tensor | None = None,
    scale: nn.Module | None = None,
    keep: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + keep x gain x (branch + shift), and its norm in `dtype`; `scale` holds the gain, if any."""
    return residual_norm(x, branch, gain_of(scale), keep, norm.weight, norm.bias, norm.eps, dtype, shift)


def gain_of(scale: nn.Module | None) -> Tensor | None:
    """What a layer scale holds; None for the identity."""
    return scale.gamma if isinstance(scale, LayerScale) else None
