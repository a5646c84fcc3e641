"""The package installs as a wheel, from its source archive and in place, with kernels, loaders and recipes inside."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import json, fastssl, fastssl.kernels, fastssl.loaders.index
from importlib.resources import files
from fastssl.recipes import find_recipe
assert find_recipe("imagenet/mae_vit_base").exists()
print(json.dumps([fastssl.__file__, fastssl.kernels.__file__, fastssl.loaders.index.__file__,
                  str(files("fastssl") / "configs/quickstart.yaml")]))
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive of the tree, and the wheel that is built from that archive alone."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "demo", "runs", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore, symlinks=True)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def wheel(built):
    return built[1]


def test_the_links_are_the_top_folders():
    for name in ("kernels", "loaders", "configs"):
        link = ROOT / "fastssl" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_the_wheel_holds_all_three_trees_and_the_recipes(wheel):
    assert wheel.name.startswith("fastssl_vision-")
    names = set(zipfile.ZipFile(wheel).namelist())
    for tree, package in (("fastssl", "fastssl"), ("kernels", "fastssl/kernels"), ("loaders", "fastssl/loaders")):
        expected = {f"{package}/{p.relative_to(ROOT / tree)}" for p in (ROOT / tree).rglob("*.py")}
        assert expected <= names, expected - names
    recipes = {f"fastssl/configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert recipes <= names
    assert {"fastssl/py.typed", "fastssl/__main__.py"} <= names
    assert not any(name.split("/")[0] in ("kernels", "loaders", "configs", "tests") for name in names)
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in zipfile.ZipFile(wheel).read(metadata).decode()
    assert metadata.replace("METADATA", "licenses/LICENSE") in names


def test_the_installed_wheel_imports_from_where_it_was_installed(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel)
    places = run(sys.executable, "-c", CHECK, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert places.count(str(tmp_path)) == 4
    assert (tmp_path / "fastssl/configs/quickstart.yaml").exists()


def test_the_editable_install_uses_the_source_tree(tmp_path):
    query = "from importlib.metadata import distribution as d; print(d('fastssl-vision').read_text('direct_url.json'))"
    if '"editable": true' not in run(sys.executable, "-c", query, cwd=tmp_path):
        pytest.skip("not an editable install")
    places = run(sys.executable, "-c", CHECK, cwd=tmp_path)
    assert f'"{ROOT}/fastssl/kernels/__init__.py"' in places
    assert f'"{ROOT}/fastssl/loaders/index.py"' in places
    assert f'"{ROOT}/fastssl/configs/quickstart.yaml"' in places


@pytest.mark.parametrize("where", ["the clone", "its parent", "elsewhere"])
def test_the_editable_install_works_from_any_folder(where, tmp_path):
    (tmp_path / "fastssl").symlink_to(ROOT)  # the clone under its usual name: a folder `fastssl` in its parent
    folder = {"the clone": ROOT, "its parent": tmp_path, "elsewhere": Path("/")}[where]
    assert run(sys.executable, "-m", "fastssl", "--version", cwd=folder).startswith("fastssl ")
    places = run(sys.executable, "-c", CHECK, cwd=folder)
    assert f'"{ROOT}/fastssl/__init__.py"' in places


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="fastssl")
    assert script.value == "fastssl.cli:main"
