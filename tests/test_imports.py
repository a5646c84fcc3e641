"""The walk goes one way: which file may import which part of the project (docs/decisions.md has the map)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"fastssl": ROOT / "fastssl", "fastssl.kernels": ROOT / "kernels", "fastssl.loaders": ROOT / "loaders"}

# What a file or folder may import from the project, besides its own folder. "*" = everything but the commands on top.
ALLOWED = {
    "fastssl.config": set(),
    "fastssl.schedule": set(),
    "fastssl.step": set(),
    "fastssl.batch": set(),
    "fastssl.distributed": set(),
    "fastssl.memory": {"batch"},
    "fastssl.timing": set(),
    "fastssl.pictures": set(),
    "fastssl.sync_batch_norm": {"distributed"},
    "fastssl.augment": {"config", "batch", "kernels", "memory"},
    "fastssl.masks": {"config", "kernels"},
    "fastssl.models": {"config", "kernels"},
    "fastssl.methods": {
        "config",
        "batch",
        "step",
        "schedule",
        "timing",
        "ema",
        "masks",
        "models",
        "kernels",
        "distributed",
        "sync_batch_norm",
        "pictures",
    },
    "fastssl.device": {"batch", "config", "distributed"},
    "fastssl.optim": {"config"},
    "fastssl.ema": {"kernels"},
    "fastssl.checkpoint": {"config", "distributed", "models"},
    "fastssl.parts": {
        "augment",
        "batch",
        "checkpoint",
        "config",
        "device",
        "libraries",
        "loaders",
        "models",
        "pictures",
        "schedule",
    },
    "fastssl.tokenizer": {"config", "checkpoint", "models", "loaders"},
    "fastssl.convert_weights": {"config", "checkpoint", "methods"},
    "fastssl.libraries": {"config", "checkpoint", "methods", "models"},
    "fastssl.log": {"distributed"},
    "fastssl.health": {"config"},
    "fastssl.preflight": {"augment", "batch", "config", "step"},
    "fastssl.parse": {"config", "methods"},
    "fastssl.train": {"*"},
    "fastssl.monitor": {"config", "evaluation.features", "evaluation.knn", "loaders"},
    "fastssl.evaluation": {
        "augment",
        "batch",
        "config",
        "checkpoint",
        "convert_weights",
        "device",
        "distributed",
        "libraries",
        "log",
        "methods",  # evaluation.ssl: the methods' own losses
        "models",
        "loaders",
        "optim",
        "pictures",
        "schedule",
        "step",
        "sync_batch_norm",
    },
    "fastssl.bench_step": {"*"},
    "fastssl.demo": {"*", "evaluation"},
    "fastssl.cli": {"*", "evaluation", "demo", "bench_step"},
    "fastssl.kernels": set(),
    "fastssl.loaders": {"config", "batch", "memory"},
}
TOP = {"cli", "demo", "bench_step", "evaluation"}  # "*" does not include these


def files():
    return [(name, path) for name, folder in TREES.items() for path in sorted(folder.rglob("*.py"))]


def owner(package: str, path: Path) -> str:
    """The ALLOWED key that a file falls under."""
    inside = path.relative_to(TREES[package])
    if package != "fastssl":
        return package
    return f"fastssl.{inside.parts[0].removesuffix('.py')}"


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
    key = owner(package, path)
    if key in ("fastssl.__init__",):
        assert project_imports(path) == set()
        return
    allowed = ALLOWED[key]
    home = key.removeprefix("fastssl.")
    for name in project_imports(path):
        part = name.split(".")[0]
        fits = part == home or any(name == a or name.startswith(f"{a}.") for a in allowed)
        if "*" in allowed and part not in TOP:
            fits = True
        if name == "__version__":
            fits = True
        assert fits, f"{path.relative_to(ROOT)} imports fastssl.{name}; allowed: {sorted(allowed)}"


def test_rule_catches_a_forbidden_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from fastssl.train import Trainer\n")
    assert project_imports(bad) == {"train.Trainer"}
    assert not any("train.Trainer".startswith(a) for a in ALLOWED["fastssl.loaders"])


def test_import_fastssl_is_light():
    heavy = "{'torch', 'triton', 'nvidia', 'numba', 'timm', 'ffcv'}"
    code = f"import fastssl, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_light():
    code = "import sys, fastssl.cli as c; c.main(['--help']); print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
