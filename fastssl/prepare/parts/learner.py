"""The part learner (SemMAE, arXiv 2206.10207, first stage): split an image so that the split alone can repaint it.

The tokens of a frozen, self-supervised ViT are attended by one query per part; the attention is the part's map. A
decoder paints the image from the maps. They are all it knows of where things are, so that they must become segments;
what the image shows enters by the class token, without a place.

Letters: B images, P parts, g side of the patch grid, N = g x g patches, D width of the ViT, S side of what is painted.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.config import ConfigError

KEPT_MASS = 0.6  # share of a part's map that its own patches must hold, for the background rule


class PartLearner(nn.Module):
    """Queries and decoder; the frozen ViT is not part of it.

    Args:
        width: D.
        parts: P.
        decoder_width: channels of the decoder's first layer, halved at each doubling of the side (ours: 512).
        doublings: how often the decoder doubles the side; it paints S = g x 2^doublings pixels.
    """

    def __init__(self, width: int, parts: int, decoder_width: int, doublings: int) -> None:
        super().__init__()
        self.parts = parts
        self.queries = nn.Linear(width, parts * width)
        self.decoder = PartDecoder(width, parts, decoder_width, doublings)

    def maps(self, tokens: Tensor) -> Tensor:
        """Where each part is.

            a[p] = softmax over the patches n of (query_p(class token) . token_n / sqrt(D))
            maps[p] = a[p], blurred by a 3 x 3 Gaussian with deviation 1

        The normaliser and the blur's width are ours.

        Args:
            tokens: [B, 1+N, D], the class token first, of a square grid.

        Returns:
            float32 [B, P, g, g]; each map sums up to about 1 (the border's mirror image shifts a little).
        """
        tokens = tokens.float()
        side = round((tokens.shape[1] - 1) ** 0.5)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = self.queries(tokens[:, 0]).unflatten(1, (self.parts, -1))  # [B, P, D]
            scores = queries @ tokens[:, 1:].transpose(1, 2) / tokens.shape[2] ** 0.5  # [B, P, N]
            return blur(scores.softmax(dim=2).unflatten(2, (side, side)))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1+N, D] -> maps [B, P, g, g] and the painted images [B, 3, S, S]."""
        maps = self.maps(tokens)
        return maps, self.decoder(maps, tokens[:, 0])


class PartDecoder(nn.Module):
    """Paints images from part maps: convolutions, with the class token as their style (AdaIN, Huang and Belongie 2017).

    The layers are ours; the paper's figure shows a decoder in the manner of StyleGAN.
    """

    def __init__(self, width: int, parts: int, first: int, doublings: int) -> None:
        super().__init__()
        sizes = [first >> i for i in range(doublings + 1)]
        if sizes[-1] < 1:
            raise ConfigError(
                f"decoder_width is {first}; it must be at least {1 << doublings} for {doublings} doublings"
            )
        self.first = nn.Conv2d(parts, first, 3, padding=1)
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))
        styles = [nn.Linear(width, 2 * size) for size in sizes[1:]]
        self.styles = nn.ModuleList(styles)
        self.last = nn.Conv2d(sizes[-1], 3, 1)
        for style in styles:
            nn.init.ones_(style.bias[: len(style.bias) // 2])
            nn.init.zeros_(style.bias[len(style.bias) // 2 :])

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """Maps [B, P, g, g] and class tokens [B, D] -> [B, 3, S, S]."""
        x = self.first(maps * (maps.shape[2] * maps.shape[3]))  # maps of mean 1
        for step, adapt in zip(self.steps, self.styles, strict=True):
            x = step(F.interpolate(x, scale_factor=2, mode="nearest"))
            gain, bias = adapt(style)[:, :, None, None].chunk(2, dim=1)
            x = F.leaky_relu(F.instance_norm(x) * gain + bias, 0.2)
        return self.last(x)


def blur(maps: Tensor) -> Tensor:
    """A 3 x 3 Gaussian of deviation 1 over maps [B, P, g, g], mirrored at the border."""
    line = torch.tensor([-1.0, 0.0, 1.0], device=maps.device).square().div(-2).exp()
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(maps, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel.expand(maps.shape[1], 1, 3, 3).to(maps.dtype), groups=maps.shape[1])


def overlap(maps: Tensor) -> Tensor:
    """The diversity loss: mean cosine between the maps of two parts of one image, scalar.

        for b in range(B):
            for i in range(P):
                for j in range(i):
                    total += cos(maps[b, i], maps[b, j])
        overlap = total / (B x P (P - 1) / 2)

    That the paper's term is this one is our reading of its figure.
    """
    flat = F.normalize(maps.flatten(2), dim=2)  # [B, P, N]
    parts = flat.shape[1]
    return ((flat @ flat.transpose(1, 2)).sum((1, 2)) - flat.square().sum((1, 2))).mean() / (parts * (parts - 1))


def add_background(maps: Tensor) -> Tensor:
    """The maps with one more for the background: the patches that no part needs to hold 60 % of its mass (ours).

    Args:
        maps: [B, P, g, g].

    Returns:
        [B, P+1, g, g]; the last one is the image's largest value on the background and 0 elsewhere.
    """
    flat = maps.flatten(2)
    order = flat.argsort(dim=2, descending=True)
    ranked = flat.gather(2, order)
    before = ranked.cumsum(2) - ranked
    needed = (before < KEPT_MASS * ranked.sum(2, keepdim=True)).gather(2, order.argsort(dim=2))
    free = ~needed.any(dim=1, keepdim=True)  # [B, 1, N]
    return torch.cat([flat, free * flat.amax((1, 2), keepdim=True)], dim=1).unflatten(2, maps.shape[2:])


def to_bytes(maps: Tensor) -> Tensor:
    """Maps [B, P, g, g] as uint8, 255 being the image's largest value: one scale, so that parts stay comparable."""
    return (255 * maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)).round().byte()
