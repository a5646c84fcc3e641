"""The methods, one file per paper.

A method is an nn.Module with

    Views, Settings             dataclasses: its view groups, its numbers
    defaults                    its recipe, as dotted configuration keys
    forward(batch, values)      the views of a batch, normalised -> Step (loss and metrics of this micro-batch)
    after_backward(values)      before clipping and the optimizer's step
    after_step(values)          after it: the teacher's update
    backbone, backbone_prefix   what evaluation takes, and where it stands in the state dict
    chance_loss                 the loss of a constant output; None if there is no such value
    official(checkpoint)        the authors' file -> our state dict
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fastssl.config import View
from fastssl.methods.dino import DINO
from fastssl.methods.mae import MAE

METHODS = {"dino": DINO, "mae": MAE}


def view_list(views: Any) -> list[View]:
    """The view groups of a method's `Views`, each named after its field."""
    return [replace(getattr(views, field.name), name=field.name) for field in fields(views)]
