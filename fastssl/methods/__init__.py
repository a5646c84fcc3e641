"""The methods, one file per paper; what each must offer stands in `fastssl.methods.method.Method`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fastssl.config import View, check
from fastssl.methods.cae import CAE
from fastssl.methods.dino import DINO
from fastssl.methods.mae import MAE
from fastssl.methods.method import Method
from fastssl.methods.saae import SAAE
from fastssl.methods.scfs import SCFS
from fastssl.methods.semmae import SemMAE
from fastssl.methods.sit import SiT
from fastssl.methods.sit_v1 import SiTv1

METHODS: dict[str, type[Method]] = {
    "cae": CAE,
    "dino": DINO,
    "mae": MAE,
    "scfs": SCFS,
    "saae": SAAE,
    "semmae": SemMAE,
    "sit": SiT,
    "sit_v1": SiTv1,
}


def view_list(views: Any) -> list[View]:
    """The view groups of a method's `Views`, each named after its field, less those with count 0.

    Raises:
        ConfigError: count 0 in a group that `Views.optional` does not name.
    """
    groups = [replace(getattr(views, field.name), name=field.name) for field in fields(views)]
    for group in groups:
        dispensable = group.name in getattr(views, "optional", ())
        check(group.count >= 1 or dispensable, f"views.{group.name}.count", group.count, "1 or more")
    return [group for group in groups if group.count]
