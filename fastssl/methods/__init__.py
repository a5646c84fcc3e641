"""The methods, one file per paper; what each must offer stands in `fastssl.methods.method.Method`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fastssl.config import View, check

if TYPE_CHECKING:
    from fastssl.methods.method import Method

CLASSES = {  # by the name of the file
    "cae": "CAE",
    "dino": "DINO",
    "mae": "MAE",
    "scfs": "SCFS",
    "saae": "SAAE",
    "semmae": "SemMAE",
    "sit": "SiT",
    "sit_v1": "SiTv1",
}


class _Methods(Mapping[str, "type[Method]"]):
    """The methods' classes by name; a method's file is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        kind = CLASSES[name]
        return getattr(importlib.import_module(f"fastssl.methods.{name}"), kind)

    def __contains__(self, name: object) -> bool:
        return name in CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(CLASSES)

    def __len__(self) -> int:
        return len(CLASSES)


METHODS = _Methods()


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
