"""The recipes that come with the package, by name: `--config imagenet/mae_vit_base`, `fastssl recipes`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastssl.config import ConfigError

FOLDER = Path(str(files("fastssl") / "configs"))


def recipe_names() -> list[str]:
    """The names of all recipes: imagenet/mae_vit_base, ..."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or a recipe of ours with or without configs/ and .yaml around its name.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    ours = name.removeprefix("configs/").removesuffix(".yaml")
    if ours in recipe_names():
        return FOLDER / f"{ours}.yaml"
    near = difflib.get_close_matches(ours, recipe_names(), n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"--config {name}: neither a file nor a recipe of ours (fastssl recipes lists them){hint}")


def head(name: str) -> dict[str, str]:
    """What the comment at the top of a recipe says: `title` (what it is, and the paper), and, where it has them,
    `Command`, `Data`, `Published` or `Reached` (numbers to expect) and `Cost`."""
    parts: dict[str, list[str]] = {"title": []}
    part = "title"
    for line in find_recipe(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        words = line.removeprefix("#").strip()
        if found := re.match(r"(Command|Data|Published|Reached|Cost)\b", words):
            part = found[1]
        parts.setdefault(part, []).append(words)
    return {key: " ".join(lines) for key, lines in parts.items()}


@dataclass
class RecipesOptions:
    """Which recipes to show."""

    name: str = "all"
    """A recipe, to print its file; the beginning of some names (imagenet/mae); or all."""


@dataclass(frozen=True)
class Recipes:
    """Heads of recipes by name; `text` is the file, where one was asked for."""

    heads: dict[str, dict[str, str]]
    text: str = ""

    def as_dict(self) -> dict[str, Any]:
        return self.heads

    def table(self) -> str:
        if self.text:
            return self.text
        blocks = []
        for name, parts in self.heads.items():
            shown = [parts[key] for key in ("title", "Published", "Reached", "Cost") if key in parts]
            blocks.append("\n".join([name, *(f"    {line}" for line in shown)]))
        return "\n\n".join([*blocks, "One by name, whole, with its command: fastssl recipes NAME"])


def recipes(options: RecipesOptions) -> Recipes:
    """List the recipes with their papers, the numbers to expect and what they cost; NAME: one of them, whole."""
    names = [name for name in recipe_names() if options.name == "all" or name.startswith(options.name)]
    if options.name in names or not names:
        return Recipes({options.name: head(options.name)}, find_recipe(options.name).read_text().rstrip())
    return Recipes({name: head(name) for name in names})
