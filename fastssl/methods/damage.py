"""What both versions of SiT share: their views, the loss of the painted pixels, and its pictures.

Letters: B images per process, S side of a view in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.batch import Batch
from fastssl.config import Config, View, check
from fastssl.kernels.corrupt import Corrupted
from fastssl.models import check_image_size
from fastssl.pictures import Sheet, to_picture
from fastssl.training import distributed

NAMES = ("view1", "view2")


def check_views(method: str, config: Config) -> int:
    """The side of the two views of a SiT, once it is sure that its networks can take them.

    Raises:
        ConfigError: several crops per view, different sides, or a side that the patch does not divide.
    """
    for name in NAMES:
        view: View = getattr(config.views, name)
        check(view.count == 1, f"views.{name}.count", view.count, f"1 with method {method}")
        check_image_size(config.model, f"views.{name}.size", view.size)
    side = config.views.view1.size
    check(config.views.view2.size == side, "views.view2.size", config.views.view2.size, f"that of view1, {side}")
    return side


def check_group(key: str, group: int) -> None:
    """Raises ConfigError unless `group` is 0 or at least 2."""
    check(group == 0 or group >= 2, key, group, "0 (the whole batch) or 2 or more")


def both_views(batch: Batch) -> Tensor:
    """First views, then second views, [2B, 3, S, S]."""
    return torch.cat([batch.views[name][:, 0] for name in NAMES])


def pixel_loss(painted: Tensor, clean: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of |painted - clean|, over the damaged pixels or over all.

    The mean is over the damaged pixels of all processes together: their losses average to it. (The authors' is over
    each process's own pixels, so that a pixel's weight depends on the process it fell to.)

    Args:
        painted, clean: [B, 3, S, S].
        mask: bool [B, S, S], the pixels that count; None: all.
    """
    error = (wide(painted) - wide(clean)).abs().mean(dim=1)  # [B, S, S]
    if mask is None:
        return error.mean()
    count = distributed.all_reduce_mean(mask.sum().to(error.dtype))  # per process
    return (error * mask).sum() / count.clamp_min(1)


def picture_sheet(clean: Tensor, damaged: Corrupted, painted: Tensor) -> Sheet:
    """For both views: clean, damaged, painted, and painted where it was damaged (clean elsewhere).

    Args:
        clean, damaged, painted: [2B, 3, S, S], first views first.
    """
    restored = torch.where(damaged.mask[:, None], painted.to(clean.dtype), clean)
    kinds = [to_picture(kind) for kind in (clean, damaged.views, painted, restored)]
    views = [view for pair in zip(*(kind.chunk(2) for kind in kinds), strict=True) for view in pair]
    words = ("view {}", "view {} damaged", "painted from it", "painted where damaged, the rest of view {} kept")
    return Sheet(torch.stack(views, dim=1), [word.format(k) for k in (1, 2) for word in words])


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
