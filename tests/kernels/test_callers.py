"""No op for show: training calls every public op, with every option that an op has."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALLERS = ("methods/*.py", "models/*.py", "training/*.py", "augment.py")

# Ops and options that nothing calls yet, by folder, function and option. The list may only become shorter.
EXEMPT: set[str] = set()


def functions() -> dict[str, tuple[list[str], set[str]]]:
    """Public functions of kernels/<op>/__init__.py: the arguments in order, and which of them may be left out."""
    found = {}
    for path in sorted(ROOT.glob("kernels/*/__init__.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                positional = [a.arg for a in node.args.args]
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                optional = {a.arg for a, default in pairs if default is not None}
                optional |= set(positional[len(positional) - len(node.args.defaults) :])
                found[f"{path.parent.name}.{node.name}"] = positional, optional
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of ops in a file: folder and function, and the call."""
    modules, names = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if node.module == "fastssl.kernels":
                    modules[alias.asname or alias.name] = alias.name
                elif node.module.startswith("fastssl.kernels."):
                    folder = node.module.removeprefix("fastssl.kernels.")
                    names[alias.asname or alias.name] = f"{folder}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Name) and f.id in names:
                yield names[f.id], node
            elif isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in modules:
                yield f"{modules[f.value.id]}.{f.attr}", node


def uncalled(trees: list[ast.AST]) -> set[str]:
    """Ops that no tree calls, and options that none of the calls gives; after * or ** an option counts as given."""
    known = functions()
    left = {name: {name, *(f"{name}({option})" for option in optional)} for name, (_, optional) in known.items()}
    for tree in trees:
        for name, call in calls(tree):
            if name not in known:
                continue
            given = known[name][0][: len(call.args)] + [keyword.arg for keyword in call.keywords]
            left[name] -= {name, *(f"{name}({option})" for option in given)}
            if None in given or any(isinstance(argument, ast.Starred) for argument in call.args):
                left[name] = set()
    return {item for name, items in left.items() for item in ({name} if name in items else items)}


def test_training_calls_every_op():
    paths = [path for pattern in CALLERS for path in sorted(ROOT.glob(f"fastssl/{pattern}"))]
    found = uncalled([ast.parse(path.read_text()) for path in paths])
    assert found == EXEMPT


def test_an_op_without_a_caller_is_found():
    tree = ast.parse(
        "from fastssl.kernels import ema_update as op\n"
        "from fastssl.kernels.uncrop import cells as f\n"
        "op.ema_update(a, b, 0.5, copies=c)\n"
        "f(box, 16)\n"
        "unseen(box, grid=4)\n"
    )
    found = uncalled([tree])
    assert {"uncrop.unseen", "ema_update.adamw_ema"} <= found
    assert not {"uncrop.cells", "ema_update.ema_update", "ema_update.ema_update(copies)"} & found
