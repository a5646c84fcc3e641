"""Ranges of configuration values: declared in a field's type, read by one check and by --help.

    lr: PositiveFloat = 1e-3
    size: Annotated[int, Range(at_least=8, multiple_of=8)] = 224

A dataclass that inherits `Checked` raises ConfigError, with one line, for a value out of its range. A file of its own,
since jsonargparse reads the source of each class in turn, with the file around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A configuration value is unusable; the message names the key, the value and what is allowed."""


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises ConfigError, naming the key, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}")


class Rule:
    """A condition on a value, as the second part of `Annotated[type, rule]`; its text completes "it must be ..."."""

    def holds(self, value: Any) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Rule):
    """Bounds of a number, None where there is none; `noun` says what kind of number it is, where that helps."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    noun: str = ""

    def holds(self, value: Any) -> bool:
        number = isinstance(value, Real)
        return (
            number
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        given = [f"{word} {bound}" for word, bound in bounds if bound is not None]
        text = " and ".join(given)
        if given == [f"at least {self.at_least}"]:
            text = f"{self.at_least} or more"
        elif given == ["above 0"]:
            text = "positive"
        elif self.at_least is not None and self.at_most is not None:
            text = f"from {self.at_least} to {self.at_most}"
        if self.multiple_of is not None:
            text = f"a multiple of {self.multiple_of}, {text}"
        return f"{self.noun} {text}".strip()


@dataclass(frozen=True)
class Ascending(Rule):
    """Several numbers, none of them smaller than the one before."""

    def holds(self, value: Any) -> bool:
        return all(first <= second for first, second in pairwise(value))

    def __str__(self) -> str:
        return "in ascending order"


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
ZeroToOne = Annotated[float, Range(at_least=0, at_most=1)]
Probability = Annotated[float, Range(at_least=0, at_most=1, noun="a probability")]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
Fraction = Annotated[float, Range(above=0, at_most=1)]
FractionRange = Annotated[tuple[Fraction, Fraction], Ascending()]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1, noun="a whole number")]


def holds(hint: Any, value: Any) -> bool:
    """Whether a value, and everything in it, is finite and keeps to the rules in a type."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return holds(parts[0], value) and all(rule.holds(value) for rule in parts[1:] if isinstance(rule, Rule))
    if get_origin(hint) in (Union, UnionType):
        return any(holds(part, value) for part in parts)
    if get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(kinds) == len(value) and all(map(holds, kinds, value))
    if hint is NoneType:
        return value is None
    return not isinstance(value, float) or math.isfinite(value)


def allowed(hint: Any) -> str:
    """The rules in a type, in words; empty if there are none."""
    parts = [part for part in get_args(hint) if part is not ...]
    if get_origin(hint) is Annotated:
        texts = [allowed(parts[0]), *(str(rule) for rule in parts[1:] if isinstance(rule, Rule))]
        return ", ".join(filter(None, texts))
    texts = [allowed(part) for part in parts]
    if get_origin(hint) is tuple and any(texts):
        count = f"{len(texts)} " if len(texts) > 1 else ""
        return f"{count}numbers" + (f", each {texts[0]}" if len(set(texts)) == 1 else f": {', '.join(texts)}")
    return " or ".join(filter(None, texts)) if get_origin(hint) in (Union, UnionType) else ""


def rules(kind: type, prefix: str = "") -> dict[str, str]:
    """The rules of a dataclass's fields in words, by key; those of a dataclass in a field (a view) too."""
    found: dict[str, str] = {}
    for name, hint in _hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found |= rules(hint, f"{prefix}{name}.")
        elif words := allowed(hint):
            found[f"{prefix}{name}"] = words
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their rules."""
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind)}


@dataclass
class Checked:
    """Base of all configurations: compares each value with the rules in its field's type, when the object is made.

    What concerns several values at once stands in the `__post_init__` of a subclass, which calls this one first.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, hint in _hints(kind).items():
            value = getattr(self, name)
            if not holds(hint, value):
                broken = isinstance(value, float) and not math.isfinite(value)
                words = [allowed(hint), "finite" if broken else ""]
                check(False, self.key(name), value, " and ".join(filter(None, words)))

    def key(self, name: str) -> str:
        """A field's name as the user writes it, with its section."""
        return f"{self.section}.{name}" if self.section else name
