"""Command-line arguments and recipes become typed configurations; an unknown key is an error."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fastssl.config import Config, ConfigError, Data, Health, Model, Monitor, Optim, Run, Schedule, rules

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
            text = f"unknown key '{key}'{self._nearest(key)}"
        raise ConfigError(text)

    def parse_args(self, args: list[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """As jsonargparse, but --max-bad and --max_bad are the same."""
        return super().parse_args([_underscored(argument) for argument in args], **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Options of commands are shown with dashes; configuration keys (with dots) as they stand in a recipe."""
        return re.sub(
            r"--[a-z]+(?:_[a-z]+)+(?![\w.])",
            lambda option: option[0].replace("_", "-"),
            super().format_help(*args, **kwargs),
        )

    def _nearest(self, key: str) -> str:
        known = [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"; did you mean '{near[0]}'?" if near else ""


def _underscored(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return "--" + key[2:].replace("-", "_") + equals + value if key.startswith("--") else argument


def parse_options(
    prog: str, about: str, kind: type, arguments: list[str], *positional: str, recipe: bool = False, section: str = ""
) -> tuple[Any, bool]:
    """Parses `arguments` into the dataclass `kind`; returns it and whether --json was asked for.

    A yes-or-no option alone (--compile-only) means yes. `about` is shown up to its first empty line. With `recipe`, the
    options may also come from a YAML file named with --config; what comes last on the command line wins. With
    `section`, options are written with its name: --bench.out.
    """
    parser = Parser(prog=prog, description=about.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    if recipe:
        parser.add_argument(
            "--config", action="config", help="Recipe: a YAML file with the same keys as these options."
        )
    first: list[str] = []
    while arguments and not arguments[0].startswith("-") and len(first) < len(positional):
        first.append(arguments[0])
        arguments = arguments[1:]
    given = [f"--{name}={value}" for name, value in zip(positional, first, strict=False)]
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
    missing = [name for name in positional if not namespace.get(name)]
    if missing:
        raise ConfigError(f"{prog} needs {missing[0].upper()} ({prog} --help explains it)")
    values = namespace.as_dict()
    return kind(**(values[section] if section else values)), as_json


def parse_pretrain(arguments: list[str]) -> tuple[Config, bool]:
    """The configuration of a pretraining run from the command line and the recipe it names, and whether --json is set.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type, value out of range, no data.
    """
    config, as_json, _ = parse_recipe("fastssl pretrain", "Pretrain a model.", arguments)
    if not config.data.path:
        raise ConfigError("data.path is empty; name a .beton file, a glob of shards, or a folder of images")
    return config, as_json


def parse_recipe(prog: str, about: str, arguments: list[str], **sections: type) -> tuple[Config, bool, dict[str, Any]]:
    """As `parse_pretrain`, for other commands that take a recipe; data.path may be empty.

    Args:
        sections: dataclasses with the command's own options, by the name before the dot.

    Returns:
        The configuration, whether --json is set, and the sections' values.
    """
    from fastssl.methods import METHODS

    method = _method_name(arguments)
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"method is '{method}'; did you mean '{near}'? (known: {', '.join(METHODS)})")
    kind = METHODS[method]
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
    namespace = parser.parse_args(arguments)
    for group in fields(kind.Views):
        namespace[f"views.{group.name}.name"] = group.name  # so that an error in it names the group
    values = parser.instantiate(namespace)
    common = {name: values[name] for name in SECTIONS}
    config = Config(method=method, views=values["views"], settings=values[method], **common)
    return config, values["json"], {name: values[name] for name in sections}


def _method_name(arguments: list[str]) -> str:
    """`method` as the command line or the recipe names it; the last one wins."""
    name = None
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
    if name is None:
        raise ConfigError("no method named; give --method NAME or a --config whose recipe has 'method:'")
    return name
