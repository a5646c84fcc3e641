"""CAE: context autoencoder (Chen et al. 2022, arXiv 2202.03026).

Half of an image's patches are hidden in blocks. The encoder sees only the others. A latent contextual regressor asks
them, by cross-attention, what the encoder would have made of the hidden ones, and a decoder names the visual code of
each hidden patch from that answer alone. So the encoder represents and the rest does the task; only the encoder is
kept. A second term, alignment, pulls the regressor's answer to what the encoder does make of the hidden patches.

Letters: B images, N patches, V visible, M masked, C width of the encoder, D of regressor and decoder, K visual codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from fastssl.config import (
    Checked,
    Config,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    View,
    check,
)
from fastssl.kernels.residual_norm import residual_add, residual_norm
from fastssl.kernels.token_cross_entropy import token_cross_entropy
from fastssl.loaders.masks import BlockMask, Mask
from fastssl.methods import names
from fastssl.methods.method import Method
from fastssl.models import build_vit, check_image_size
from fastssl.models.blocks import (
    WHOLE,
    Drop,
    Keep,
    Mlp,
    Unit,
    add_norm,
    branch_factors,
    run_blocks,
    transformer_blocks,
    working_type,
)
from fastssl.models.dvae import PUBLISHED, Tokenizer, load_tokenizer
from fastssl.models.vit import sincos_positions
from fastssl.pictures import Sheet, cover, cover_key, tint, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training.timing import section


@dataclass
class Views:
    """One crop at two sizes."""

    main: View = field(default_factory=lambda: View(size=224))
    """What the encoder sees: crop and flip, no colour changes."""
    tokenizer: View = field(default_factory=lambda: View(size=112, interpolation="lanczos", same_crop_as="main"))
    """What the tokenizer sees: the same pixels of the image, so that its cells are the encoder's patches."""


@dataclass
class Settings(Checked):
    """CAE's own numbers."""

    section: ClassVar[str] = "cae"

    tokenizer: str = ""
    """File of the tokenizer: DALL-E's encoder (https://cdn.openai.com/dall-e/encoder.pkl, or its state dict), or a
    stand-in made by `fastssl tokenizer`."""
    tokenizer_sha256: str = ""
    """SHA-256 that the tokenizer's file must have. Empty: not checked."""
    codes: PositiveInt = 8192
    """Visual codes of the tokenizer (K)."""
    num_masked: PositiveInt = 98
    """Patches hidden per image (M)."""
    min_block: PositiveInt = 16
    """Smallest block of hidden patches; the last ones may be smaller."""
    max_block: NonNegativeInt = 0
    """Largest block of hidden patches. 0: num_masked."""
    width: Annotated[int, Range(at_least=4, multiple_of=4)] = 768
    """Width of regressor and decoder (D). If it is not the encoder's, a linear layer and a norm stand in between."""
    heads: PositiveInt = 12
    """Attention heads of regressor and decoder."""
    regressor_depth: PositiveInt = 4
    """Cross-attention blocks of the regressor."""
    decoder_depth: PositiveInt = 4
    """Self-attention blocks of the decoder."""
    layer_scale: NonNegativeFloat = 0.1
    """Start value of the layer scale in regressor and decoder. 0: none."""
    align_weight: NonNegativeFloat = 2.0
    """Weight of the alignment in the loss."""
    target_drop_path: bool = True
    """Stochastic depth in the encoding that the regressor is aligned to, as in the authors' code."""
    fix_init: bool = False
    """Start values of linear layers: Xavier-uniform, as in all runs of the authors; or (true) what their flag
    --fix_init_weight was meant to give: normal, with the branches' last layers made smaller block by block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"0 (cae.num_masked) or at least cae.min_block, {self.min_block}"
        check(self.max_block == 0 or self.max_block >= self.min_block, "cae.max_block", self.max_block, allowed)
        check(self.width % self.heads == 0, "cae.width", self.width, f"a multiple of cae.heads, {self.heads}")


class CAE(Method):
    """Encoder, regressor, decoder and their loss.

    The tokenizer is opened when the first batch comes. It is no part of the state dict, for it never changes.

    Attention over keys does not feel a bias of the keys, and the authors' has none; here the encoder's and decoder's
    fused biases (timm's) hold zeros in that place, which never learn.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "model.name": "vit_base",
        "model.positions": "sincos_rows",
        "model.layer_scale": 0.1,
        "model.drop_path": 0.1,
        "optim.name": "adamw",
        "optim.lr": 1.5e-3,
        "optim.lr_batch": 2048,
        "optim.min_lr": 1e-5,
        "optim.weight_decay": 0.05,
        "optim.clip_grad": 3.0,
        "schedule.epochs": 300,
        "schedule.warmup_epochs": 10,
        "run.recipe_batch": 2048,
        "monitor.mean_patch": True,  # the class token's output has no loss at all
    }
    backbone_prefix = "encoder."
    layout = names.CAE
    pos_embed: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        s: Settings = config.settings
        main, second = config.views.main, config.views.tokenizer
        self.settings = s
        for name, view in (("main", main), ("tokenizer", second)):
            check(view.count == 1, f"views.{name}.count", view.count, "1 with method cae")
        check(second.same_crop_as == "main", "views.tokenizer.same_crop_as", second.same_crop_as, "'main'")
        self.encoder = build_vit(config.model, config.method)
        self.masks(config)  # for its checks
        self.side = main.size // self.encoder.patch_size
        self.tokenizer_side = second.size

        drop_path = config.model.drop_path
        self.project: nn.Module = nn.Identity()
        if self.encoder.width != s.width:
            self.project = nn.Sequential(nn.Linear(self.encoder.width, s.width), nn.LayerNorm(s.width, eps=1e-6))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.register_buffer("pos_embed", sincos_positions(s.width, self.side, self.side, rows_first=True))
        self.regressor = Regressor(s.width, s.regressor_depth, s.heads, drop_path, s.layer_scale)
        self.decoder = Decoder(s.width, s.decoder_depth, s.heads, s.codes, drop_path, s.layer_scale)
        init_(self, s.fix_init)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self._opened: list[Tokenizer] = []  # inside a list, it is not a submodule

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        images = batch.views["main"][:, 0]  # [B, 3, S, S]
        visible, masked = batch.mask("main")  # [B, V], [B, M]
        with section("tokenizer"):
            labels = self.tokenizer(images.device)(self.pixels(batch), masked)  # [B, M]
        with section("encoder"):
            drop = Drop(batch.id, values.seed, values.clock, "encoder")
            seen = self.encode(images, visible, drop)  # [B, V, C]
        latent, tokens = self.complete(seen, visible, masked, drop)  # [B, M, D] both
        with section("alignment"):  # last: autocast keeps the weights that it has cast; these have no gradient
            target = self.target(images, masked, replace(drop, purpose="target"))  # [B, M, D]

        with section("loss"):
            head = self.decoder.head
            if torch.is_autocast_enabled(tokens.device.type):
                tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
            named = token_cross_entropy(tokens.flatten(0, 1), head.weight, head.bias, labels.flatten())
            alignment = s.align_weight * F.mse_loss(latent.float(), target.float())
        metrics = {
            "loss_codes": named.loss.detach(),
            "loss_alignment": alignment.detach(),
            "code_accuracy": named.accuracy,
            "feature_std": feature_spread(seen.mean(dim=1)),
        }
        return Step(named.loss + alignment, metrics)

    @staticmethod
    def masks(config: Config) -> list[Mask]:
        """Visible and masked patches, in blocks."""
        s, size = config.settings, config.views.main.size
        check_image_size(config.model, "views.main.size", size)
        side = size // config.model.patch_size
        check(s.num_masked < side**2, "cae.num_masked", s.num_masked, f"below the image's {side**2} patches")
        return [BlockMask("main", (side, side), s.num_masked, s.min_block, s.max_block or None)]

    def encode(self, images: Tensor, patches: Tensor, drop: Drop | None = None) -> Tensor:
        """The encoder's output for some patches, int64 [B, V] -> [B, V, C]; not rounded, for positions are added to it
        and it is compared."""
        return self.encoder.tokens(images, patches, drop, self.encoder.cls_token.dtype)[:, 1:]

    @torch.no_grad()
    def target(self, images: Tensor, masked: Tensor, drop: Drop | None = None) -> Tensor:
        """What the encoder itself makes of the masked patches, [B, M, D]."""
        with self.whole_depth(not self.settings.target_drop_path):
            return self.project(self.encode(images, masked, drop))

    @contextmanager
    def whole_depth(self, on: bool) -> Iterator[None]:
        """While it lasts and `on`, the encoder drops no path."""
        training = self.encoder.training
        if on:
            self.encoder.eval()
        try:
            yield
        finally:
            if on:
                self.encoder.train(training)

    def complete(
        self, seen: Tensor, visible: Tensor, masked: Tensor, drop: Drop | None = None
    ) -> tuple[Tensor, Tensor]:
        """The masked patches from the visible ones.

        Args:
            seen: the encoder's output for the visible patches, [B, V, C].
            visible, masked: int64 [B, V] and [B, M].
            drop: what stochastic depth is drawn from; regressor and decoder draw for themselves.

        Returns:
            The regressor's estimate of the encoder's output, and the decoder's tokens, [B, M, D] both.
        """
        with section("regressor"):
            table = self.pos_embed[0, 1:]
            place = F.embedding(masked, table)  # [B, M, D]
            query = self.mask_token.expand(*masked.shape, -1)
            own = drop and replace(drop, purpose="regressor")
            latent = self.regressor(query, place, self.project(seen), F.embedding(visible, table), own)
        with section("decoder"):
            return latent, self.decoder(latent + place, drop and replace(drop, purpose="decoder"))

    def pixels(self, batch: Batch) -> Tensor:
        """What the tokenizer sees, no longer normalised: [B, 3, S', S'] from 0 to 1."""
        return (batch.views["tokenizer"][:, 0].float() * self.std + self.mean).clamp(0, 1)

    def tokenizer(self, device: torch.device) -> Tokenizer:
        """The tokenizer, opened and placed on `device` when it is first asked for.

        Raises:
            ConfigError: there is no such file, or it does not fit codes and views.
        """
        if not self._opened:
            s = self.settings
            if not s.tokenizer:
                raise ConfigError(
                    f"cae.tokenizer is empty; name the file of DALL-E's encoder ({PUBLISHED}) or of a stand-in "
                    "(fastssl tokenizer DATA OUT.pt)"
                )
            opened = load_tokenizer(s.tokenizer, s.tokenizer_sha256)
            check(s.codes == opened.codes, "cae.codes", s.codes, f"{opened.codes}, as {s.tokenizer} has them")
            check(self.tokenizer_side == self.side * opened.cell, "views.tokenizer.size", self.tokenizer_side,
                  f"{self.side * opened.cell}: {self.side} patches of the image times {opened.cell} pixels of a "
                  f"cell of {s.tokenizer}")  # fmt: skip
            self._opened.append(opened.place(device))
        return self._opened[0]

    def after_backward(self, values: Values) -> None:
        """Takes the gradient off the keys' part of the fused biases (zero but for rounding)."""
        biases = [block.attn.qkv.bias for block in [*self.encoder.blocks, *self.decoder.blocks]]
        torch._foreach_zero_([bias.grad.chunk(3)[1] for bias in biases])

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """Per image: the image, what the encoder sees, its codes, and with those of masked patches predicted; then,
        if the tokenizer can paint, both kinds of codes painted."""
        images = batch.views["main"][:, 0]
        visible, masked = batch.mask("main")
        tokenizer = self.tokenizer(images.device)
        codes = tokenizer(self.pixels(batch))  # [B, N]
        _, tokens = self.complete(self.encode(images, visible), visible, masked)
        predicted = codes.scatter(1, masked, self.decoder.head(tokens).argmax(dim=-1))
        hidden = torch.zeros_like(codes, dtype=torch.bool).scatter(1, masked, True)

        grid = (self.side, self.side)
        picture, count = to_picture(images), self.settings.codes
        maps = [map_.unflatten(1, grid) for map_ in (codes, predicted)]
        columns = [picture, cover(picture, hidden.unflatten(1, grid))]
        columns += [tint(picture, map_, count, strength=1.0) for map_ in maps]
        painted = [tokenizer.paint(map_) for map_ in maps]
        columns += [F.interpolate(pixels, picture.shape[-2:]) for pixels in painted if pixels is not None]
        titles = ["image", "what the encoder sees", "the tokenizer's codes", "codes, predicted where hidden",
                  "painted from the tokenizer's codes", "painted from the predicted codes"][: len(columns)]  # fmt: skip
        legend = [cover_key("hidden from the encoder"), (None, "A colour per code; equal colours are equal codes.")]
        return {"codes": Sheet(torch.stack(columns, dim=1), titles, legend)}


class Regressor(nn.Module):
    """The latent contextual regressor (section 3.2): masked queries ask the visible tokens, and one another.

        for block in blocks:
            keys, values = [visible; u] + positions, [visible; u]     # visible tokens first, then the estimates so far
            y = u + gamma1 * attention(norm_q(u + place), norm_k(keys), norm_v(values))
            y = norm2(y)
            u = y + gamma2 * mlp(y)                                   # the normalised y is carried on
        return norm(u)

    Args:
        width: channels (D).
        depth, heads: blocks, attention heads.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale: start value of gamma. 0: gamma is one and does not learn.
    """

    def __init__(self, width: int, depth: int, heads: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            RegressorBlock(width, heads, drop_path * i / max(depth - 1, 1), layer_scale) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, u: Tensor, place: Tensor, visible: Tensor, visible_place: Tensor, drop: Drop | None = None
    ) -> Tensor:
        """Masked queries [B, M, D] and visible tokens [B, V, D], each with its positions -> estimates [B, M, D]."""
        last = cast(RegressorBlock, self.blocks[-1])
        keeps = branch_factors(last.drop_path.drop_prob if self.training else 0.0, u, len(self.blocks), drop)
        places = torch.cat([visible_place, place], dim=1)
        visible = visible.to(u.dtype)
        for block, keep in zip(self.blocks, keeps, strict=True):
            u = block(u, place, visible, places, keep, self.norm if block is last else None)
        return u


class RegressorBlock(Unit):
    """One round of questions; see `Regressor`."""

    def __init__(self, width: int, heads: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.mlp = Mlp(width, 4 * width)
        self.drop_path = DropPath(drop_path)  # holds the share alone
        start = torch.full((width,), layer_scale or 1.0)
        self.gamma1, self.gamma2 = (nn.Parameter(start.clone(), requires_grad=layer_scale > 0) for _ in range(2))

    def forward(
        self,
        u: Tensor,
        place: Tensor,
        visible: Tensor,
        places: Tensor,
        keep: Keep = WHOLE,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """One block.

        Args:
            u: the estimates so far, [B, M, D].
            place: their positions, [B, M, D].
            visible: visible tokens, [B, V, D].
            places: positions of visible tokens and estimates, [B, V+M, D].
            keep: what the branches are multiplied with (stochastic depth).
            norm: of the result. None: none.

        Returns:
            [B, M, D], of the type of u.
        """
        return self.run(self._block, u, place, visible, places, keep, norm)

    def _block(
        self, u: Tensor, place: Tensor, visible: Tensor, places: Tensor, keep: Keep, norm: nn.LayerNorm | None
    ) -> Tensor:
        both = torch.cat([visible, u], dim=1)
        working = working_type(u, self.query.weight)
        q = self.query(add_norm(u, self.norm_q, working, place)[1])
        k = self.key(add_norm(both, self.norm_k, working, places)[1])  # [B, V+M, D]
        v = self.value(add_norm(both, self.norm_v, working)[1])
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        answer = F.linear(mixed, self.proj.weight)  # the bias comes with the sum; so it does below
        n, bias = self.norm2, self.proj.bias
        _, y = residual_norm(u, answer, self.gamma1, keep[0], n.weight, n.bias, n.eps, u.dtype, bias)
        answer = self.mlp(y.to(working))
        sum_of = y, answer, self.gamma2, keep[1]
        if norm is None:
            return residual_add(*sum_of, self.mlp.fc2.bias)
        return residual_norm(*sum_of, norm.weight, norm.bias, norm.eps, u.dtype, self.mlp.fc2.bias)[1]


class Decoder(nn.Module):
    """Names the codes of the masked patches from the regressor's estimates alone (section 3.2).

    Args:
        width, depth, heads: channels (D), blocks, attention heads.
        codes: outputs (K).
        drop_path, layer_scale: of the blocks; see `transformer_blocks`.
    """

    def __init__(self, width: int, depth: int, heads: int, codes: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.blocks = transformer_blocks(width, depth, heads, drop_path, layer_scale)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, codes)

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        """[B, M, D] -> the tokens that `head` takes, [B, M, D]."""
        return run_blocks(self.blocks, x, self.norm, drop)


@torch.no_grad()
def init_(method: CAE, fix_init: bool) -> None:
    """Start values: patch projection, class and mask token normal with standard deviation 0.02, cut off at one of it;
    biases 0; linear layers as `Settings.fix_init` says."""

    def cut_normal_(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    for module in method.modules():
        if isinstance(module, nn.Linear):
            cut_normal_(module.weight) if fix_init else nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = cast(nn.Conv2d, method.encoder.patch_embed["proj"])
    for weight in (patches.weight, method.encoder.cls_token, method.mask_token):
        cut_normal_(weight)
    nn.init.zeros_(cast(Tensor, patches.bias))
    for blocks in (method.encoder.blocks, method.regressor.blocks, method.decoder.blocks) if fix_init else ():
        for number, block in enumerate(cast(Any, blocks), 1):
            attention = block.proj if isinstance(block, RegressorBlock) else block.attn.proj
            for last in (attention, block.mlp.fc2):
                last.weight.div_(math.sqrt(2 * number))
