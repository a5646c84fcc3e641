"""The walk goes one way: which file may import which part of the project (docs/decisions.md has the map)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"fastssl": ROOT / "fastssl", "fastssl.kernels": ROOT / "kernels", "fastssl.loaders": ROOT / "loaders"}

# What a room (a file or folder below fastssl/) may import from the project besides itself, from the ground floor up.
ALLOWED = {
    "kernels": set(),
    "ranges": set(),
    "progress": set(),
    "config": {"ranges"},
    "declared": set(),  # reads the source of any module; imports none
    "recipes": {"config"},
    "report": {"config"},
    "step": set(),
    "batch": set(),
    "pictures": {"batch"},
    "memory": {"batch"},
    "augment": {"batch", "kernels", "memory"},
    "loaders": {"batch", "config", "memory", "progress"},
    "models": {"config", "kernels"},
    "training": {"batch", "config", "kernels", "progress"},
    "methods": {"batch", "config", "kernels", "loaders", "models", "pictures", "step", "training"},
    "doctor": {"config", "kernels", "loaders"},
    "parse": {"config", "declared", "methods", "models", "recipes"},
    "weights": {"batch", "config", "methods", "models", "training"},
    "evaluation": {"augment", "batch", "config", "loaders", "methods", "progress", "step", "training", "weights"},
    "evaluation.frozen": {
        *("augment", "config", "evaluation", "loaders", "models", "pictures", "progress", "training", "weights"),
    },
    "evaluation.tuned": {
        *("batch", "config", "evaluation", "loaders", "models", "pictures", "progress", "training", "weights"),
    },
    "pretraining": {
        *("augment", "batch", "config", "evaluation", "evaluation.frozen", "kernels", "loaders", "methods", "models"),
        *("pictures", "step", "training", "weights"),
    },
    "prepare": {
        *("augment", "batch", "config", "evaluation.frozen", "loaders", "models", "parse", "pictures", "pretraining"),
        *("progress", "training", "weights"),
    },
    "cli": {"config", "declared", "parse", "pretraining", "weights"},  # and by name, what a command runs
    "api": {"cli", "config", "models", "parse", "pretraining", "weights"},  # inside its functions
    "__main__": {"cli"},
    "__init__": {"api"},
}


def files():
    links = {ROOT / "fastssl" / name for name in ("kernels", "loaders", "configs")}
    found = [(name, path) for name, folder in TREES.items() for path in sorted(folder.rglob("*.py"))]
    return [(name, path) for name, path in found if not links & set(path.parents)]


def room(module: str) -> str:
    """The room that a module (its name without the leading 'fastssl.') lies in: the longest key that fits."""
    return max((key for key in ALLOWED if module == key or module.startswith(f"{key}.")), key=len, default=module)


def home(package: str, path: Path) -> str:
    """The room of a file."""
    inside = ".".join(path.relative_to(TREES[package]).with_suffix("").parts)
    return room(f"{package}.{inside}".removeprefix("fastssl."))


def project_imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, without the leading 'fastssl.'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert name.split(".")[0] not in ("kernels", "loaders", "configs"), f"{path}: import {name} needs fastssl."
            if name.startswith("fastssl."):
                found.add(name.removeprefix("fastssl."))
    return found


@pytest.mark.parametrize(("package", "path"), files(), ids=lambda v: str(v).replace(str(ROOT), ""))
def test_imports_only_what_the_house_allows(package, path):
    own = home(package, path)
    for name in project_imports(path) - {"__version__"}:
        other = room(name)
        assert other == own or other in ALLOWED[own], f"{path.relative_to(ROOT)} imports fastssl.{name}"


def test_every_allowance_is_used():
    used = {key: set() for key in ALLOWED}
    for package, path in files():
        used[home(package, path)] |= {room(name) for name in project_imports(path)}
    unused = {key: sorted(allowed - used[key]) for key, allowed in ALLOWED.items() if allowed - used[key]}
    assert unused == {}


def test_no_room_imports_one_above_it():
    floors = list(ALLOWED)
    for key, allowed in ALLOWED.items():
        assert all(floors.index(other) < floors.index(key) for other in allowed), key


def test_rule_catches_a_forbidden_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from fastssl.pretraining.trainer import Trainer\n")
    assert {room(name) for name in project_imports(bad)} == {"pretraining"}
    assert "pretraining" not in ALLOWED["loaders"]
    assert home("fastssl.loaders", ROOT / "loaders/draw.py") == "loaders"
    assert home("fastssl", ROOT / "fastssl/evaluation/frozen/knn.py") == "evaluation.frozen"


def test_import_fastssl_and_its_converter_is_light():
    heavy = "{'torch', 'triton', 'nvidia', 'numba', 'timm', 'ffcv'}"
    code = f"import fastssl, fastssl.loaders.convert, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
