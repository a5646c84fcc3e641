"""The command line: each command parses its arguments, calls one function and prints what it returns."""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from fastssl.config import ConfigError
from fastssl.parse import parse_options, parse_pretrain


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 bad arguments, 128 + N ended by signal N."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from fastssl import __version__

        print(f"fastssl {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        return _fail(f"unknown command '{name}'; did you mean '{near}'? (fastssl --help lists all)", 2)
    try:
        return COMMANDS[name](rest) or 0
    except ConfigError as error:
        return _fail(str(error), 2)
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("fastssl") and not os.environ.get("FASTSSL_TRACEBACK"):
            return _fail(str(error), getattr(error, "code", 1))
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"fastssl: {'' if code > 128 else 'error: '}{message}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fastssl COMMAND [options]   (fastssl COMMAND --help for the options)", "", *lines])


# -- the commands ----------------------------------------------------------------------------------------------------


def convert(arguments: list[str]) -> None:
    """Convert a folder of images into one FFCV .beton file."""
    from fastssl.loaders.convert import ConvertOptions
    from fastssl.loaders.convert import convert as run

    options, as_json = parse_options("fastssl convert", convert.__doc__ or "", ConvertOptions, arguments, "src", "dst")
    result = run(options)
    print(json.dumps(result.as_dict()) if as_json else result.summary())


def verify(arguments: list[str]) -> int:
    """Read every sample of a .beton file and list what is bad."""
    from fastssl.loaders.verify import VerifyOptions
    from fastssl.loaders.verify import verify as run

    options, as_json = parse_options("fastssl verify", verify.__doc__ or "", VerifyOptions, arguments, "path")
    report = run(options)
    print(json.dumps(report.as_dict()) if as_json else report.summary())
    return 0 if report.ok else 1


def pretrain(arguments: list[str]) -> None:
    """Pretrain a model: --config RECIPE.yaml [--optim.lr 1e-3 ...]; under torchrun on many GPUs."""
    from fastssl.pretrain.trainer import pretrain as run

    config, as_json = parse_pretrain(arguments)
    summary = run(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary) if as_json else _table(summary))


def evaluate(arguments: list[str]) -> None:
    """Measure a checkpoint: fastssl evaluate PROTOCOL --checkpoint C --data TRAIN --val VAL."""
    protocols = {  # name -> module, its options, its function
        "knn": ("fastssl.evaluation.frozen.knn", "KNNOptions", "evaluate_knn"),
        "linear": ("fastssl.evaluation.frozen.linear", "LinearOptions", "evaluate_linear"),
        "attentive": ("fastssl.evaluation.frozen.attentive", "AttentiveOptions", "evaluate_attentive"),
        "finetune": ("fastssl.evaluation.tuned.finetune", "FinetuneOptions", "evaluate_finetune"),
        "ssl": ("fastssl.evaluation.ssl", "SSLOptions", "evaluate_ssl"),
        "segment": ("fastssl.evaluation.tuned.segment", "SegmentOptions", "evaluate_segment"),
        "detect": ("fastssl.evaluation.tuned.detect", "DetectOptions", "evaluate_detect"),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: fastssl evaluate {'|'.join(protocols)} [options]   (fastssl evaluate knn --help lists them)")
        return
    if arguments[0] not in protocols:
        raise ConfigError(f"evaluate '{arguments[0]}' is unknown; known: {', '.join(protocols)}")
    module, kind, run = protocols[arguments[0]]
    protocol = importlib.import_module(module)
    run = getattr(protocol, run)
    options, as_json = parse_options(
        f"fastssl evaluate {arguments[0]}", run.__doc__, getattr(protocol, kind), arguments[1:], recipe=True
    )
    from fastssl.training import distributed

    try:
        result = run(options)
    finally:
        distributed.stop()
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result.as_dict()) if as_json else result.table())


def bench(arguments: list[str]) -> int:
    """Measure the parts: fastssl bench loader|kernels|step."""
    from fastssl.augment import augment
    from fastssl.kernels._bench import KernelBenchOptions
    from fastssl.kernels._bench import bench as bench_kernels
    from fastssl.loaders.bench import LoaderBenchOptions
    from fastssl.loaders.bench import bench as bench_loader

    benches: dict[str, tuple[type, Callable]] = {
        "loader": (LoaderBenchOptions, partial(bench_loader, augment=augment)),
        "kernels": (KernelBenchOptions, bench_kernels),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: fastssl bench {'|'.join([*benches, 'step'])} [options]   (fastssl bench step --help lists them)")
        return 0
    if arguments[0] == "step":
        return _bench_step(arguments[1:])
    if arguments[0] not in benches:
        raise ConfigError(f"bench '{arguments[0]}' is unknown; known: {', '.join([*benches, 'step'])}")
    kind, run = benches[arguments[0]]
    about = kind.__doc__ or ""
    options, as_json = parse_options(f"fastssl bench {arguments[0]}", about, kind, arguments[1:])
    result = run(options)
    print(json.dumps(result.as_dict()) if as_json else result.table())
    return 0 if result.ok else 1


def _bench_step(arguments: list[str]) -> int:
    from fastssl.parse import parse_recipe
    from fastssl.pretrain.bench_step import StepBenchOptions
    from fastssl.pretrain.bench_step import bench as run

    about = (run.__doc__ or "").splitlines()[0]
    config, as_json, sections = parse_recipe("fastssl bench step", about, arguments, bench=StepBenchOptions)
    result = run(config, sections["bench"])
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result.as_dict()) if as_json else result.table())
    return 0


def import_(arguments: list[str]) -> None:
    """Turn an authors' checkpoint into ours: fastssl import SRC DST --method M or --config RECIPE."""
    from fastssl.parse import parse_recipe
    from fastssl.weights.official import import_weights

    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if len(paths) != 2 and not {"-h", "--help"} & set(arguments):
        raise ConfigError("fastssl import needs SRC and DST: fastssl import official.pth ours.pt --method dino")
    about = f"{(import_.__doc__ or '').split(':')[0]}."
    config, as_json, _ = parse_recipe("fastssl import SRC DST", about, arguments[len(paths) :])
    result = import_weights(config, *paths)
    print(json.dumps(result.as_dict()) if as_json else result.summary())


def export(arguments: list[str]) -> None:
    """Write a backbone for other libraries: fastssl export CHECKPOINT OUT --to timm|torchvision|hf|official."""
    from fastssl.weights.export import ExportOptions
    from fastssl.weights.export import export as run

    options, as_json = parse_options(
        "fastssl export", export.__doc__ or "", ExportOptions, arguments, "checkpoint", "out"
    )
    result = run(options)
    print(json.dumps(result.as_dict()) if as_json else result.table())


def embed(arguments: list[str]) -> None:
    """Write the features of a data set: fastssl embed CHECKPOINT DATA OUT -> OUT.npy, OUT.csv, OUT.png."""
    from fastssl.evaluation.frozen.embed import EmbedOptions
    from fastssl.evaluation.frozen.embed import embed as run
    from fastssl.training import distributed

    positional = ("checkpoint", "data", "out")
    options, as_json = parse_options("fastssl embed", embed.__doc__ or "", EmbedOptions, arguments, *positional)
    try:
        result = run(options)
    finally:
        distributed.stop()
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result.as_dict()) if as_json else result.table())


def demo(arguments: list[str]) -> None:
    """The whole walk on a drawn image set: make images, convert, pretrain, evaluate (minutes on a CPU)."""
    from fastssl.prepare.demo import DemoOptions
    from fastssl.prepare.demo import demo as run

    options, as_json = parse_options("fastssl demo", demo.__doc__ or "", DemoOptions, arguments)
    result = run(options)
    print(json.dumps(result.as_dict()) if as_json else result.table())


def tokenizer(arguments: list[str]) -> None:
    """Make a stand-in for CAE's tokenizer from images: fastssl tokenizer DATA OUT.pt."""
    from fastssl.prepare.tokenizer import TokenizerOptions, train_tokenizer

    options, as_json = parse_options(
        "fastssl tokenizer", tokenizer.__doc__ or "", TokenizerOptions, arguments, "data", "out"
    )
    result = train_tokenizer(options)
    print(json.dumps(result.as_dict()) if as_json else result.summary())


def parts(arguments: list[str]) -> None:
    """Part maps for SemMAE: fastssl parts learn|write|judge|import."""
    from fastssl.prepare.parts.judge import JudgeOptions, judge
    from fastssl.prepare.parts.learn import LearnOptions, learn
    from fastssl.prepare.parts.tokens import ImportOptions, import_parts
    from fastssl.prepare.parts.write import WriteOptions, write

    stages: dict[str, tuple[type, Callable, tuple[str, ...]]] = {
        "learn": (LearnOptions, learn, ()),
        "write": (WriteOptions, write, ("parts", "data", "out")),
        "judge": (JudgeOptions, judge, ("parts", "data")),
        "import": (ImportOptions, import_parts, ("src", "dst")),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: fastssl parts {'|'.join(stages)} [options]   (fastssl parts learn --help lists them)\n\n"
            "  fastssl parts learn --checkpoint C --data TRAIN --out PARTS.pt   learn to split images into parts\n"
            "  fastssl parts write PARTS.pt DATA.beton OUT.beton                the same images with their part maps\n"
            "  fastssl parts judge PARTS.pt DATA [--truth]                      numbers and pictures of the parts\n"
            "  fastssl parts import TOKENS MAPS                                 maps from the authors' token files"
        )
        return
    if arguments[0] not in stages:
        raise ConfigError(f"parts '{arguments[0]}' is unknown; known: {', '.join(stages)}")
    kind, run, positional = stages[arguments[0]]
    options, as_json = parse_options(
        f"fastssl parts {arguments[0]}", run.__doc__ or "", kind, arguments[1:], *positional
    )
    result = run(options)
    print(json.dumps(result.as_dict()) if as_json else result.table())


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "convert": convert,
    "verify": verify,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "embed": embed,
    "import": import_,
    "export": export,
    "bench": bench,
    "demo": demo,
    "tokenizer": tokenizer,
    "parts": parts,
}


def _table(values: dict[str, Any]) -> str:
    width = max(len(key) for key in values)
    return "\n".join(
        f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}"
        for key, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main())
