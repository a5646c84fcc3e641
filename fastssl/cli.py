"""The command line: each command parses its arguments, calls one function and prints what it returns.

What a command imports is named here and imported when it runs, so that `fastssl --help` is light.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastssl.config import ConfigError, printable, redacted
from fastssl.declared import declaration, declared
from fastssl.parse import parse_options, parse_pretrain, parse_recipe


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 bad arguments, 128 + N ended by signal N."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.argv = [redacted(word) for word in sys.argv]  # loggers and records write it down
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from fastssl import __version__

        print(f"fastssl {__version__}")
        return 0
    try:
        return _run(COMMANDS, arguments)
    except ConfigError as error:
        return _fail(str(error), 2)
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("fastssl") and not os.environ.get("FASTSSL_TRACEBACK"):
            return _fail(str(error), getattr(error, "code", 1))
        together = sys.modules.get("fastssl.training.distributed")
        if together and together.peer_is_gone(error) and not os.environ.get("FASTSSL_TRACEBACK"):
            cause = " ".join(str(error).split())[:200]
            return _fail(f"another process of this run has ended, or cannot be reached ({cause})", 1)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    finally:
        if "fastssl.training.distributed" in sys.modules:
            sys.modules["fastssl.training.distributed"].stop()


def _fail(message: str, code: int) -> int:
    print(f"fastssl: {'' if code > 128 else 'error: '}{_printable(redacted(message))}", file=sys.stderr)
    return code


def _show(result: Any, as_json: bool) -> int:
    """Prints a result, on the main process alone; 1 if it says of itself that it is not `ok`."""
    values = result if isinstance(result, dict) else result.as_dict()
    if int(os.environ.get("RANK", "0")) == 0:
        text = _lines(result) if isinstance(result, dict) else result.table()
        print(json.dumps(values) if as_json else _printable(text))
    return 0 if getattr(result, "ok", True) else 1


def _printable(text: str) -> str:
    """Text of several lines, without terminal escapes and the like that names of files and classes may hold."""
    return "\n".join(map(printable, text.split("\n")))


def _lines(values: dict[str, Any]) -> str:
    width = max(len(key) for key in values)
    return "\n".join(
        f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}"
        for key, value in values.items()
    )


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that turns an options dataclass into a result.

    Attributes:
        about: one line for --help; empty: the function's own docstring.
        module: where the next two are.
        options, function: names of the dataclass and of the function that takes it.
        positional: options that may be given without their names, in this order.
        recipe: it takes --config FILE.
    """

    about: str
    module: str
    options: str
    function: str
    positional: tuple[str, ...] = ()
    recipe: bool = False

    def __call__(self, name: str, arguments: list[str]) -> int:
        return _show(*self.run(name, arguments))

    def run(self, name: str, arguments: list[str]) -> tuple[Any, bool]:
        """The result, and whether --json was asked for."""
        module = f"fastssl.{self.module}"
        kind = declaration(module, self.options)
        about = self.about or declaration(module, self.function).__doc__ or ""
        options, as_json = parse_options(name, about, kind, arguments, *self.positional, recipe=self.recipe)
        return getattr(importlib.import_module(module), self.function)(options), as_json


@dataclass(frozen=True)
class Group:
    """Commands under one word: fastssl evaluate knn."""

    about: str
    members: dict[str, Command | Callable[[str, list[str]], int]]
    usage: str = ""

    def __call__(self, name: str, arguments: list[str]) -> int:
        if not arguments or arguments[0] in ("-h", "--help"):
            first = next(iter(self.members))
            print(f"usage: {name} {'|'.join(self.members)} [options]   ({name} {first} --help lists them){self.usage}")
            return 0
        if arguments[0] not in self.members:
            word = name.removeprefix("fastssl ")
            raise ConfigError(f"{word} '{arguments[0]}' is unknown; known: {', '.join(self.members)}")
        return self.members[arguments[0]](f"{name} {arguments[0]}", arguments[1:])


def pretrain(name: str, arguments: list[str]) -> int:
    """Pretrain a model: --config RECIPE.yaml [--optim.lr 1e-3 ...]; under torchrun on many GPUs."""
    config, as_json = parse_pretrain(arguments, must_exist=True)
    from fastssl.pretraining.trainer import pretrain as run

    return _show(run(config), as_json)


def import_(name: str, arguments: list[str]) -> int:
    """Turn an authors' checkpoint into ours: fastssl import SRC DST --method M or --config RECIPE."""
    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if len(paths) != 2 and not {"-h", "--help"} & set(arguments):
        raise ConfigError("fastssl import needs SRC and DST: fastssl import official.pth ours.pt --method dino")
    about = f"{(import_.__doc__ or '').split(':')[0]}."
    config, as_json, _ = parse_recipe(f"{name} SRC DST", about, arguments[len(paths) :])
    from fastssl.weights.official import import_weights

    return _show(import_weights(config, *paths), as_json)


def bench_step(name: str, arguments: list[str]) -> int:
    """Measure a recipe's training step."""
    source = declared("fastssl.pretraining.bench_step")
    about = source.bench.__doc__.splitlines()[0]
    config, as_json, sections = parse_recipe(name, about, arguments, bench=source.StepBenchOptions)
    from fastssl.pretraining.bench_step import bench as run

    return _show(run(config, sections["bench"]), as_json)


def bench_gpu(name: str, arguments: list[str]) -> int:
    """Answer everything about this machine's GPU."""
    source = declared("fastssl.pretraining.bench_gpu")
    about = source.bench.__doc__.splitlines()[0]
    options, as_json = parse_options(name, about, source.GpuBenchOptions, arguments, section="bench")
    if options.job:
        from fastssl.pretraining.bench_gpu_jobs import work

        return work(json.loads(options.job), parse_recipe)
    from fastssl.pretraining.bench_gpu import bench as run

    return _show(run(options), as_json)


def bench_loader(name: str, arguments: list[str]) -> int:
    """Measure the loader on one's own images, or a recipe's."""
    kind = declaration("fastssl.loaders.bench", "LoaderBenchOptions")
    recipe: list[str] = []  # --config, --method, and keys with a dot, with their values
    own: list[str] = []
    mine = own
    for argument in arguments:
        key = argument.partition("=")[0]
        if key.startswith("--"):
            mine = recipe if "." in key or key in ("--config", "--method") else own
        mine.append(argument)
    options, as_json = parse_options(name, kind.__doc__ or "", kind, own)
    config = parse_recipe(name, "", recipe)[0] if recipe else None
    from fastssl.pretraining.bench_loader import bench as run

    return _show(run(options, config), as_json)


def _protocol(module: str, options: str, function: str) -> Command:
    return Command("", f"evaluation.{module}", options, function, ("checkpoint",), recipe=True)


EVALUATE = Group(
    "Measure a checkpoint: fastssl evaluate PROTOCOL CHECKPOINT --data TRAIN --val VAL.",
    {
        "knn": _protocol("frozen.knn", "KNNOptions", "evaluate_knn"),
        "linear": _protocol("frozen.linear", "LinearOptions", "evaluate_linear"),
        "attentive": _protocol("frozen.attentive", "AttentiveOptions", "evaluate_attentive"),
        "finetune": _protocol("tuned.finetune", "FinetuneOptions", "evaluate_finetune"),
        "ssl": _protocol("ssl", "SSLOptions", "evaluate_ssl"),
        "segment": _protocol("tuned.segment", "SegmentOptions", "evaluate_segment"),
        "detect": _protocol("tuned.detect", "DetectOptions", "evaluate_detect"),
    },
)
BENCH = Group(
    "Measure the parts: fastssl bench loader|kernels|step|gpu.",
    {
        "loader": bench_loader,
        "kernels": Command(
            "Prove and time every kernel on a GPU, or build them all without one.",
            "kernels._bench",
            "KernelBenchOptions",
            "bench",
        ),
        "step": bench_step,
        "gpu": bench_gpu,
    },
)
PARTS = Group(
    "Part maps for SemMAE: fastssl parts learn|write|judge|import.",
    {
        "learn": Command("", "prepare.parts.learn", "LearnOptions", "learn"),
        "write": Command("", "prepare.parts.write", "WriteOptions", "write", ("parts", "data", "out")),
        "judge": Command("", "prepare.parts.judge", "JudgeOptions", "judge", ("parts", "data")),
        "import": Command("", "prepare.parts.tokens", "ImportOptions", "import_parts", ("src", "dst")),
    },
    "\n\n"
    "  fastssl parts learn --checkpoint C --data TRAIN --out PARTS.pt   learn to split images into parts\n"
    "  fastssl parts write PARTS.pt DATA.beton OUT.beton                the same images with their part maps\n"
    "  fastssl parts judge PARTS.pt DATA [--truth]                      numbers and pictures of the parts\n"
    "  fastssl parts import TOKENS MAPS                                 maps from the authors' token files",
)
MANIFEST = Group(
    "Name a data set's shards in one file: fastssl manifest make|add|drop|show M.json [SHARD ...].",
    {
        "make": Command("", "loaders.manifest", "MakeOptions", "make", ("manifest", "shards...")),
        "add": Command("", "loaders.manifest", "ChangeOptions", "add", ("manifest", "shards...")),
        "drop": Command("", "loaders.manifest", "ChangeOptions", "drop", ("manifest", "shards...")),
        "show": Command("", "loaders.manifest", "ShowOptions", "show", ("manifest",)),
    },
)
COMMANDS: dict[str, Command | Group | Callable[[str, list[str]], int]] = {
    "convert": Command(
        "Convert a folder of images into one FFCV .beton file.",
        *("loaders.convert", "ConvertOptions", "convert", ("src", "dst")),
    ),
    "verify": Command(
        "Read every sample of a .beton file, tar or manifest and list what is bad.",
        *("loaders.verify", "VerifyOptions", "verify", ("path",)),
    ),
    "manifest": MANIFEST,
    "pretrain": pretrain,
    "evaluate": EVALUATE,
    "embed": Command(
        "Write the features of a data set: fastssl embed CHECKPOINT DATA OUT -> OUT.npy, OUT.csv, OUT.png.",
        *("evaluation.frozen.embed", "EmbedOptions", "embed", ("checkpoint", "data", "out")),
    ),
    "look": Command(
        "Draw what a network sees in images: fastssl look CHECKPOINT IMAGE [IMAGE ...] [--data FOLDER].",
        *("evaluation.frozen.look", "LookOptions", "look", ("checkpoint", "images...")),
    ),
    "report": Command(
        "One page on runs: curves, pictures, settings, evaluations: fastssl report RUN [RUN ...].",
        *("report", "ReportOptions", "report", ("runs...",)),
    ),
    "import": import_,
    "export": Command(
        "Write a backbone for other libraries: fastssl export CHECKPOINT OUT --to timm|torchvision|hf|onnx|official.",
        *("weights.export", "ExportOptions", "export", ("checkpoint", "out")),
    ),
    "bench": BENCH,
    "demo": Command(
        "The whole walk on a drawn image set: make images, convert, pretrain, evaluate (minutes on a CPU).",
        *("prepare.demo", "DemoOptions", "demo"),
    ),
    "tokenizer": Command(
        "Make a stand-in for CAE's tokenizer from images: fastssl tokenizer DATA OUT.pt.",
        *("prepare.tokenizer", "TokenizerOptions", "train_tokenizer", ("data", "out")),
    ),
    "parts": PARTS,
    "doctor": Command(
        "Say what of this machine works, what is missing and how to mend it: fastssl doctor [FOLDER].",
        *("doctor", "DoctorOptions", "doctor", ("path",)),
    ),
    "recipes": Command(
        "List the recipes with their papers, numbers and cost, or show one: fastssl recipes [NAME].",
        *("recipes", "RecipesOptions", "recipes", ("name",)),
    ),
}


def _run(commands: dict[str, Any], arguments: list[str]) -> int:
    name = arguments[0]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.0)[0]
        return _fail(f"unknown command '{name}'; did you mean '{near}'? (fastssl --help lists all)", 2)
    return commands[name](f"fastssl {name}", arguments[1:])


def _help() -> str:
    about = {name: getattr(command, "about", None) or command.__doc__ or "" for name, command in COMMANDS.items()}
    lines = [f"  {name:<10} {text.splitlines()[0]}" for name, text in about.items()]
    return "\n".join(["usage: fastssl COMMAND [options]   (fastssl COMMAND --help for the options)", "", *lines])
