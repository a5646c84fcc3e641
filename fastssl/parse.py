"""Command-line arguments and recipes become typed configurations; an unknown key is an error.

Options are read from declarations (`fastssl.declared`): help, and whatever is wrong at sight, wait for no PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import json
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fastssl.config import Config, ConfigError, Data, Health, Model, Monitor, Optim, Run, Schedule, View, rules
from fastssl.declared import at_sight, declaration, first_line, real
from fastssl.methods import CLASSES, METHODS
from fastssl.recipes import find_recipe, head, recipe_names

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SECTIONS = {
    "data": Data,
    "model": Model,
    "optim": Optim,
    "schedule": Schedule,
    "run": Run,
    "monitor": Monitor,
    "health": Health,
}
MAX_BYTES, MAX_VALUES = 1 << 17, 10_000  # of a recipe
SYNONYMS = {  # what other libraries call it
    **{"learning_rate": "lr", "base_lr": "lr", "wd": "weight_decay", "bs": "batch_size", "num_workers": "workers"},
    **{"output": "dir", "output_dir": "dir", "gpu": "device", "arch": "name", "accum_iter": "accumulate"},
}
COMMON = (  # what `--help` shows of a recipe's options before a method is named
    *("data.path", "data.val", "run.dir", "data.batch_size", "run.accumulate", "schedule.epochs", "optim.lr"),
    *("model.name", "model.init", "monitor.every"),
)


class Parser(ArgumentParser):
    """jsonargparse's parser, with one-line errors that name the nearest known key, and with ranges in the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("usage", "%(prog)s [options]")
        kwargs.setdefault("allow_abbrev", False)  # --run.step is not --run.steps
        super().__init__(*args, **kwargs)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """As jsonargparse; what a field's type allows stands in its help behind the type's name."""
        added = super().add_class_arguments(theclass, nested_key, **kwargs)
        words = rules(theclass, f"{nested_key}." if nested_key else "")
        for action in self._actions:
            if action.dest in words:
                action.help = f"{action.help} (type: %(type)s, {words[action.dest]}, default: %(default)s)"
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"\s+", " ", message).strip()
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", text)
        group = re.search(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", text)
        other = re.search(r"[Kk]ey '([\w.]+)' is not expected", text) or re.search(
            r"Option '([\w.]+)' is not accepted", text
        )
        key = None
        if unknown:
            key = unknown[1]
        elif group:
            key = f"{group[1]}.{group[2]}"
        elif other:
            key = other[1]
        if key:
            text = f"unknown key '{key}'{self._nearest(key) or f' ({self.prog} --help lists all)'}"
        raise ConfigError(text)

    def parse_args(self, args: list[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """As jsonargparse, but --max-bad and --max_bad are the same, and --config takes a recipe's name too."""
        return super().parse_args(_with_recipes([_underscored(argument) for argument in args]), **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Options of commands are shown with dashes; configuration keys (with dots) as they stand in a recipe."""
        return re.sub(
            r"--[a-z]+(?:_[a-z]+)+(?![\w.])",
            lambda option: option[0].replace("_", "-"),
            super().format_help(*args, **kwargs),
        )

    def _nearest(self, key: str) -> str:
        known = [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = nearest(key, known)
        return f"; did you mean '{near}'?" if near else ""


def nearest(key: str, known: list[str]) -> str:
    """The known key that is most likely meant; empty where none is like it.

    What is behind the last dot counts most: `--val` is data.val, and optim.learning_rate is optim.lr.
    """
    section, _, word = key.rpartition(".")
    by_word = {name: name.rpartition(".")[2] for name in known if name.startswith(section)}
    for wanted in (word, SYNONYMS.get(word, word)):
        if same := [name for name in by_word if by_word[name] == wanted]:
            return min(same, key=len)
    near = difflib.get_close_matches(word, by_word.values(), n=1, cutoff=0.6)
    if section and near:
        return next(name for name in by_word if by_word[name] == near[0])
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), "")


def _underscored(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return "--" + key[2:].replace("-", "_") + equals + value if key.startswith("--") else argument


def _with_recipes(arguments: list[str]) -> list[str]:
    """The arguments with the file of each recipe in place of its name."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            found[i] = f"--config={_bounded(find_recipe(argument.removeprefix('--config=')))}"
        elif i and arguments[i - 1] == "--config":
            found[i] = str(_bounded(find_recipe(argument)))
    return found


def _bounded(path: Path) -> Path:
    """A recipe's file, once it is sure that it is a small one, with its aliases written out too (parsing does that)."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"--config {path}: {path.stat().st_size} bytes are not a recipe")
        root = yaml.compose(path.read_text(), yaml.SafeLoader)
        values = _count(root, {}) if root else 0
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if values > MAX_VALUES:
        raise ConfigError(f"--config {path}: its aliases (*name) stand for more than {MAX_VALUES} values")
    return path


def _count(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node, aliases written out; without end where a node holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (one if isinstance(one, tuple) else (one,) for one in below)
        known[id(node)] = 1 + sum(_count(one, known) for pair in pairs for one in pair)
    return known[id(node)]


def parse_options(
    prog: str, about: str, kind: type, arguments: list[str], *positional: str, recipe: bool = False, section: str = ""
) -> tuple[Any, bool]:
    """Parses `arguments` into the dataclass `kind`; returns it and whether --json was asked for.

    A `positional` NAME... takes all words left, as a list. A yes-or-no option alone (--compile-only) means yes.
    `about` is shown up to its first empty line. With `recipe`, the options may also come from a YAML file named with
    --config; what comes last on the command line wins. With `section`, options are written with its name: --bench.out.
    """
    parser = Parser(prog=prog, description=about.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    if recipe:
        parser.add_argument(
            "--config", action="config", help="Recipe: a YAML file with the same keys as these options."
        )
    names = [name.removesuffix("...") for name in positional]
    many = any(name.endswith("...") for name in positional)
    first: list[Any] = []
    while arguments and not arguments[0].startswith("-") and (many or len(first) < len(names)):
        first.append(arguments[0])
        arguments = arguments[1:]
    if many and len(first) >= len(names):
        first[len(names) - 1 :] = [json.dumps(first[len(names) - 1 :])]
    given = [f"--{name}={value}" for name, value in zip(names, first, strict=False)]
    prefix = f"{section}." if section else ""
    switches = {f"--{prefix}{field.name}" for field in fields(kind) if field.type in (bool, "bool")}
    following = [*arguments, ""][1:]
    arguments = [
        f"{argument}=true" if _underscored(argument) in switches and after not in ("true", "false") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]
    parser.add_class_arguments(kind, section or None)
    if positional:
        parser.usage = f"%(prog)s {' '.join(name.upper() for name in positional)} [options]"
    namespace = parser.parse_args([*given, *arguments])
    as_json = namespace.pop("json")
    namespace.pop("config", None)
    missing = [name for name in names if not namespace.get(name)]
    if missing:
        raise ConfigError(f"{prog} needs {missing[0].upper()} ({prog} --help explains it)")
    values = namespace.as_dict()[section] if section else namespace.as_dict()
    at_sight(kind, values)
    return real(kind)(**values), as_json


def parse_pretrain(arguments: list[str], must_exist: bool = False) -> tuple[Config, bool]:
    """The configuration of a pretraining run from the command line and the recipe it names, and whether --json is set.

    Args:
        must_exist: the images must be there already.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type, value out of range, no data.
    """
    about = "Pretrain a model on a .beton file or a folder of images; under torchrun on many GPUs."
    config, as_json, _ = parse_recipe("fastssl pretrain", about, arguments, needs_data=True, must_exist=must_exist)
    return config, as_json


def parse_recipe(
    prog: str,
    about: str,
    arguments: list[str],
    needs_data: bool = False,
    must_exist: bool = False,
    **sections: type,
) -> tuple[Config, bool, dict[str, Any]]:
    """As `parse_pretrain`, for other commands that take a recipe; data.path may be empty.

    Args:
        sections: dataclasses with the command's own options, by the name before the dot.

    Returns:
        The configuration, whether --json is set, and the sections' values.
    """
    method = _method_name(arguments)
    if method is None and {"-h", "--help"} & set(arguments):
        print(_overview(prog, about, sections))
        sys.exit(0)
    if method is None:
        raise ConfigError(
            f"no method named; give --method NAME, or --config with a recipe that has 'method:' ({prog} --help)"
        )
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"method is '{method}'; {hint}(known: {', '.join(METHODS)})")
    kind = declaration(f"fastssl.methods.{method}", CLASSES[method])
    parser = Parser(
        prog=prog,
        description=f"{about} Options come from --config and from the command line, the last one wins.",
    )
    parser.add_argument("--config", action="config", help="Recipe: a YAML file with the same keys as these options.")
    parser.add_argument("--json", action="store_true", help="Print the summary as JSON.")
    parser.add_argument("--method", default=method, help=f"One of {', '.join(METHODS)}.")
    parser.add_class_arguments(kind.Views, "views", skip={f"{f.name}.name" for f in fields(kind.Views)})
    parser.add_class_arguments(kind.Settings, method)
    for name, section in {**SECTIONS, **sections}.items():
        parser.add_class_arguments(section, name)
    parser.set_defaults(kind.defaults)
    namespace = parser.parse_args([re.sub(r"^--init(?==|$)", "--model.init", argument) for argument in arguments])
    values = namespace.as_dict()
    views = {group.name: {**values["views"][group.name], "name": group.name} for group in fields(kind.Views)}
    groups = {name: View(**value) for name, value in views.items()}  # an error in it names the group
    common: dict[str, Any] = {name: section(**values[name]) for name, section in SECTIONS.items()}
    if needs_data and not common["data"].path:
        raise ConfigError("data.path is empty; name a .beton file, a glob of shards, a manifest, or a folder of images")
    for key in ("path", "val") if must_exist else ():
        path = getattr(common["data"], key)
        if path and not os.path.exists(path) and not glob.glob(path) and not re.search("://|{", path):  # seen later
            raise ConfigError(f"data.{key} is {path}, which does not exist")
    at_sight(kind.Views, groups)
    at_sight(kind.Settings, values[method])
    for name, section in sections.items():
        at_sight(section, values[name])

    from fastssl.models import resolved  # PyTorch from here on

    common["model"] = resolved(common["model"])
    settings = real(kind.Settings)(**values[method])
    config = Config(method=method, views=real(kind.Views)(**groups), settings=settings, **common)
    return config, values["json"], {name: real(section)(**values[name]) for name, section in sections.items()}


def _overview(prog: str, about: str, sections: dict[str, type]) -> str:
    """Help before a method is named: methods, recipes, and the options that matter most."""
    methods = {name: first_line(f"fastssl.methods.{name}") for name in METHODS}
    recipes = {name: head(name) for name in recipe_names()}
    titles = {name: parts["title"].split(". ")[0] for name, parts in recipes.items() if "pretrain" in parts["Command"]}
    parser = Parser(prog=prog, add_help=False)
    common = {name: section for name, section in SECTIONS.items() if any(key.startswith(f"{name}.") for key in COMMON)}
    for name, section in {**common, **sections}.items():
        parser.add_class_arguments(section, name)
    for action in parser._actions:
        if action.dest not in COMMON and action.dest.split(".")[0] not in sections:
            action.help = argparse.SUPPRESS
    blocks = re.split(r"\n\n+", parser.format_help())
    return "\n".join(
        [
            f"usage: {prog} --config RECIPE | --method METHOD [options]",
            *("", about),
            *("", f"methods ({prog} --method M --help lists all options of one):"),
            *(f"  {name:<8} {text}" for name, text in methods.items()),
            *("", "recipes (fastssl recipes NAME shows one; numbers on the command line come before a recipe's):"),
            *(f"  {name:<29} {title}" for name, title in titles.items()),
            *("", "options that matter most:"),
            *(line for block in blocks for line in block.splitlines() if line.startswith("  ") and "--" in block),
        ]
    )


def _method_name(arguments: list[str]) -> str | None:
    """`method` as the command line or the recipe names it; the last one wins. None: neither does."""
    name = None
    arguments = _with_recipes(arguments)
    for position, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in ("--method", "--config") and not equals:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        if key == "--config":
            try:
                with open(value) as file:
                    recipe = yaml.safe_load(file)
            except (OSError, yaml.YAMLError) as error:
                raise ConfigError(f"--config {value}: {str(error).splitlines()[0]}") from None
            if not isinstance(recipe, dict):
                raise ConfigError(f"--config {value}: not a recipe (expected keys like 'method:' and 'data:')")
            name = recipe.get("method", name)
        elif key == "--method":
            name = value
    return name
