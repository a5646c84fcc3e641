"""What a loader hands to a method: the crops of a batch, their geometry, drawn photometric parameters, ids, labels.

Letters: B images in the batch, n crops of the view group (View.count), S side in pixels, g side of the part grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per channel, of pixels from 0 to 1


@dataclass
class Photometric:
    """Drawn photometric parameters of one view group, one entry per crop; `fastssl.augment` applies them.

    Attributes:
        jitter: bool [B, n], whether the four jitter operations are applied.
        order: int64 [B, n, 4], the order in which they are applied (0 brightness, 1 contrast, 2 saturation, 3 hue).
        factor: float32 [B, n, 4], indexed by operation: brightness, contrast, saturation factors and the hue shift in
            turns (-0.5 to 0.5).
        gray: bool [B, n].
        blur_sigma: float32 [B, n], standard deviation in pixels; 0 means no blur.
        solarize: float32 [B, n], threshold in gray levels 0-255; above 255 means no solarize.
    """

    jitter: Tensor
    order: Tensor
    factor: Tensor
    gray: Tensor
    blur_sigma: Tensor
    solarize: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Photometric:
        return Photometric(**{name: f(value) for name, value in vars(self).items()})


@dataclass
class Batch:
    """One batch.

    Attributes:
        id: int64 [B], position of each sample in the data set; with seed and epoch it fixes all that was drawn.
        label: int64 [B], class index; -1 where the data has none.
        epoch: the epoch the draws belong to.
        views: per group [B, n, 3, S, S]; uint8 as loaded, normalised float after `fastssl.augment.augment`.
        box: per group float32 [B, n, 4], (top, left, height, width) as fractions of the decoded (or squashed) image.
        flip: per group bool [B, n].
        photometric: per group, the drawn parameters; a group that draws none is left out.
        parts: per group [B, n, g, g] part labels cut and flipped like the image; empty where the data has no part maps.
        masks: per masked group the patches of its first crop that are kept and that are hidden, int64 [B, K] and
            [B, M], ascending; `fastssl.loaders.masks` draws them.
    """

    id: Tensor
    label: Tensor
    epoch: int = 0
    views: dict[str, Tensor] = field(default_factory=dict)
    box: dict[str, Tensor] = field(default_factory=dict)
    flip: dict[str, Tensor] = field(default_factory=dict)
    photometric: dict[str, Photometric] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.id)

    def mask(self, name: str) -> tuple[Tensor, Tensor]:
        """Kept and hidden patches of a group; see `masks`.

        Raises:
            ValueError: none were drawn.
        """
        if name not in self.masks:
            raise ValueError(
                f"the batch has no mask of the views '{name}'; give what makes the batches the method's masks: "
                "masks=method.masks(config)"
            )
        return self.masks[name]

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `f` applied to every tensor."""

        def each(group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: f(value) for name, value in group.items()}

        return replace(
            self,
            id=f(self.id),
            label=f(self.label),
            views=each(self.views),
            box=each(self.box),
            flip=each(self.flip),
            parts=each(self.parts),
            masks={name: (f(kept), f(masked)) for name, (kept, masked) in self.masks.items()},
            photometric={name: p.map(f) for name, p in self.photometric.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the copies do not wait where the host memory is pinned. What lies in one
        piece of host memory (`fastssl.memory`) goes in one copy."""
        if torch.device(device).type == "cpu":
            return self.map(lambda value: value.to(device))
        return self.moved(lambda value: value.to(device, non_blocking=True))

    def moved(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch in other memory; `copy` is called once for each piece of memory."""
        pieces: dict[int, Tensor] = {}

        def move(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.nbytes() == value.nbytes or not value.is_contiguous():
                return copy(value)
            key = storage.data_ptr()
            if key not in pieces:
                whole = torch.empty(0, dtype=torch.uint8, device=value.device)
                pieces[key] = copy(whole.set_(storage))
            begin = value.storage_offset() * value.itemsize
            return pieces[key][begin : begin + value.nbytes].view(value.dtype).view(value.shape)

        return self.map(move)
