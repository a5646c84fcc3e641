"""What a module declares, without importing what it computes with: `fastssl evaluate knn --help` needs no PyTorch.

    options = declared("fastssl.evaluation.frozen.knn").KNNOptions   # the dataclass, made from its source alone
    result = real(options)                                           # the module's own, now that it is wanted

An attribute is made when it is asked for, from its statement in the source and those that this one names. Dataclasses
are whole; another class has only such attributes as can be had; a function has only its docstring.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
from functools import cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "declared from "  # and a name without dots: such a module has no package
LIGHT = ("fastssl.config", "fastssl.ranges", "fastssl.evaluation.options")  # behind them, Python's own library alone


def declared(name: str) -> Any:
    """The declarations of a module of this project, by its full name; the module itself if that costs nothing."""
    if name in sys.modules or name in LIGHT:
        return importlib.import_module(name)
    return sys.modules.get(_twin(name)) or Declared(name)


def declaration(module: str, name: str) -> Any:
    """One of them; from the imported module where there is no source, or it does not tell."""
    try:
        return getattr(declared(module), name)
    except (AttributeError, ModuleNotFoundError):
        return getattr(importlib.import_module(module), name)


def first_line(module: str) -> str:
    """The first line of a module's docstring, which its file begins with."""
    path = _path(module)
    assert path is not None
    with open(path, encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def real(kind: Any) -> Any:
    """The class that a declared one stands for, from its module; any other class as it is."""
    if not kind.__module__.startswith(PREFIX):
        return kind
    return getattr(importlib.import_module(sys.modules[kind.__module__].__origin__), kind.__name__)


def at_sight(kind: Any, values: dict[str, Any]) -> None:
    """Makes the object and drops it, so that it says what is wrong with its values, as far as declarations can tell."""
    with contextlib.suppress(NameError):  # a check that needs the module itself
        kind(**values)


class Declared(ModuleType):
    """The declarations of the module `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(_twin(name))
        self.__origin__ = name
        self.__file__, tree = _source(name)
        self.__doc__ = ast.get_docstring(tree)
        self._statements = {word: node for node in tree.body for word in _defines(node)}
        sys.modules[self.__name__] = self

    def __getattr__(self, name: str) -> Any:
        if name in (statements := self.__dict__["_statements"]):
            node = statements.pop(name)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._bind(node, name)
            else:
                self._make(node)
        if name not in self.__dict__:
            raise AttributeError(f"{self.__name__} has no {name}", name=name, obj=self)
        return self.__dict__[name]

    def _bind(self, node: ast.Import | ast.ImportFrom, name: str) -> None:
        """What an import statement calls `name`; nothing where that is another library's."""
        (alias,) = (alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == name)
        module = alias.name if isinstance(node, ast.Import) else str(node.module)
        with contextlib.suppress(AttributeError):
            if module.split(".")[0] in sys.stdlib_module_names:
                found: Any = importlib.import_module(module)
                self.__dict__[name] = found if isinstance(node, ast.Import) else getattr(found, alias.name)
            elif module.startswith("fastssl") and isinstance(node, ast.ImportFrom):
                inner = f"{module}.{alias.name}"
                is_module = bool(_path(inner))
                self.__dict__[name] = declared(inner) if is_module else getattr(declared(module), alias.name)

    def _make(self, node: ast.stmt) -> None:
        """Runs the statement, after those that it names."""
        if isinstance(node, ast.FunctionDef):
            node = _stub(node)
        elif isinstance(node, ast.ClassDef) and not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            node = self._outline(node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                getattr(self, inner.id, None)
        tree = ast.fix_missing_locations(ast.Module([_FUTURE, node], []))
        with contextlib.suppress(NameError):
            exec(compile(tree, str(self.__file__), "exec"), self.__dict__)

    def _outline(self, node: ast.ClassDef) -> ast.ClassDef:
        """A class with the bases that are declared, and attributes that are plain values or declared themselves."""
        bases: list[ast.expr] = []
        for base in node.bases:
            with contextlib.suppress(AttributeError):
                first, *more = ast.unparse(base).split(".")
                reduce(getattr, more, getattr(self, first))
                bases.append(base)
        body: list[ast.stmt] = [
            one
            for one in node.body
            if isinstance(one, (ast.Assign, ast.AnnAssign))
            and one.value is not None
            and not any(isinstance(part, (ast.Call, ast.Attribute)) for part in ast.walk(one.value))
        ]
        return ast.copy_location(ast.ClassDef(node.name, bases, [], body or [ast.Pass()], [], type_params=[]), node)


def _twin(name: str) -> str:
    return PREFIX + name.replace(".", "/")


_FUTURE = ast.parse("from __future__ import annotations").body[0]


@cache
def _path(name: str) -> Path | None:
    """Where a module of this project lies, found without importing its packages."""
    place = Path(__file__).parent.joinpath(*name.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def _source(name: str) -> tuple[str, ast.Module]:
    path = _path(name)
    if path is None:
        raise ModuleNotFoundError(f"no module named {name}", name=name)
    return str(path), ast.parse(path.read_text(encoding="utf-8"))


def _defines(node: ast.stmt) -> list[str]:
    """Names that a statement gives a meaning to."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _stub(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function with its docstring alone; called, it raises NameError."""
    text = ast.get_docstring(node, clean=False)
    (stub,) = ast.parse(f"def {node.name}(*_, **__): raise NameError({node.name!r})").body
    assert isinstance(stub, ast.FunctionDef)
    if text is not None:
        stub.body.insert(0, ast.Expr(ast.Constant(text)))
    return stub
