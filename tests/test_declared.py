"""Help and wrong arguments need no PyTorch, and what is declared is what the modules have."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from fastssl.cli import COMMANDS, Command, Group, main
from fastssl.declared import Declared, real
from fastssl.methods import CLASSES, METHODS

WRONG = [
    ["pretrain", "--method=mae", "--optim.learning_rate=1"],
    ["pretrain", "--method=scfs", "--data.path=.", "--scfs.cross_weight=-1"],
    ["pretrain", "--config=imagenet/nothing_like_it"],
    ["pretrain", "--method=mae", "--data.path=/nowhere"],
    ["evaluate", "knn", "--checkpoint=a", "--data=b"],
    ["evaluate", "finetune", "--checkpoint=a", "--data=b", "--val=c", "--epochs=0"],
    ["export", "a.pt", "b.txt"],
    ["bench", "step", "--method=dino", "--bench.steps=0"],
]
SCRIPT = """
import contextlib, io, json, sys
from fastssl.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    found.append([code, "usage" in out.getvalue(), sorted({"torch", "numpy", "timm", "numba"} & set(sys.modules))])
print(json.dumps(found))
"""


def commands(members=COMMANDS, path=()):
    for name, member in members.items():
        if isinstance(member, Group):
            yield from commands(member.members, (*path, name))
        else:
            yield [*path, name], member


OPTIONS = [(member.module, member.options) for _, member in commands() if isinstance(member, Command)]
OPTIONS += [("pretraining.bench_step", "StepBenchOptions"), ("pretraining.bench_gpu", "GpuBenchOptions")]
OPTIONS += [("loaders.bench", "LoaderBenchOptions")]


def test_help_and_wrong_arguments_import_nothing_heavy():
    helps = [[*path, "--help"] for path, _ in commands()]
    helps += [["pretrain", f"--method={name}", "--help"] for name in METHODS]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(helps + WRONG)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for arguments, (code, usage, heavy) in zip(helps + WRONG, found, strict=True):
        assert (code, usage, heavy) == ((0, True, []) if arguments in helps else (2, False, [])), arguments


@pytest.mark.parametrize(("module", "name"), OPTIONS, ids=str)
def test_the_declared_options_are_the_modules_own(module, name):
    kind = getattr(Declared(f"fastssl.{module}"), name)
    own = real(kind)
    assert own is not kind
    assert own.__module__ == f"fastssl.{module}"
    described = [[(f.name, f.type, f.default) for f in fields(one)] for one in (kind, own)]
    assert described[0] == described[1]
    assert kind.__doc__ == own.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_declaration_is_its_own(name):
    kind, own = getattr(Declared(f"fastssl.methods.{name}"), CLASSES[name]), METHODS[name]
    assert kind.defaults == own.defaults
    for section, value in (("Views", "default_factory"), ("Settings", "default")):
        given = [[(f.name, f.type, getattr(f, value)) for f in fields(getattr(one, section))] for one in (kind, own)]
        if section == "Views":
            given = [[(name, text, make()) for name, text, make in one] for one in given]
        assert given[0] == given[1]
    assert getattr(kind.Views, "optional", None) == getattr(own.Views, "optional", None)


@pytest.mark.parametrize("command", ["pretrain", "bench step", "import"])
def test_help_before_a_method_is_named_shows_methods_recipes_and_options(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"\n  {name:<8} " in text for name in METHODS)
    assert "imagenet/mae_vit_base" in text
    assert "--run.accumulate" in text
    assert ("--bench.rounds" in text) == (command == "bench step")
