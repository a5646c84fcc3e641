"""The methods, one file per paper; what each must offer stands in `fastssl.methods.method.Method`."""

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
