"""`report`: one page of HTML on one run or several: curves, pictures over time, settings, machines, evaluations.

The page holds everything itself (curves as SVG, pictures as data) and runs no script, so it opens anywhere, also from a
mail. What a run folder lacks is said in a line on the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml
from PIL import Image

from fastssl.config import Checked, ConfigError, NonNegativeInt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#7a3db8")  # of the runs
POINTS = 300  # of a curve; more are drawn as means of neighbours, with the range that they span
WIDTH, HEIGHT, LEFT, BELOW = 480, 250, 58, 40  # of a chart, and of its margins for numbers
LARGEST = 1e300  # larger numbers are not drawn, smaller ones than its inverse are 0
PICTURE = 900  # pixels: wider pictures are shrunk
CHARTS = {  # metric -> title, what it says
    "loss": ("loss", "Means between log lines. The first tenth of a run may lie above the frame."),
    "knn_top1": ("online k-NN, top-1 %", "Validation images classified by their nearest training images."),
    "lr": ("learning rate", ""),
    "weight_decay": ("weight decay", ""),
    "grad_norm": ("gradient norm", "Before clipping. A jump far above its usual value is a warning."),
    "feature_std": ("spread of features", "Over a batch: 1 is as spread as can be, near 0 they have collapsed."),
    "teacher_entropy": ("teacher's entropy / ln K", "Near 0: one class for every image. Near 1: it teaches nothing."),
    "teacher_student_kl": ("divergence of student from teacher", "0 where both agree."),
    "center_norm": ("length of the teacher's centre", ""),
    "images_per_s": ("images per second", ""),
    "data_wait": ("share of the time spent waiting for data", ""),
}
HEADLINES = ("top1", "miou", "box_ap", "loss")  # the first one that an evaluation has is shown at the top
NO_RESULTS = ("step", "seconds", "width", "k", "neighbours", "images", "train_images", "val_images", "batch_size")
WHERE = ("checkpoint", "data", "val", "cache", "dir", "workers", "device")  # do not change what is measured
MONITOR = ("k", "mean_patch", "train_images", "val_images")
UNLIKE = " <small>(not measured alike)</small>"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px; margin: auto;
  padding: 12px }
h1 { font-size: 1.5em; margin: .3em 0 } h2 { font-size: 1.2em; margin: 1.6em 0 .5em; border-bottom: 1px solid #ccc }
h3 { font-size: 1em; margin: 0 } p { margin: .3em 0 } .wide { overflow-x: auto } small, .note { color: #555 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
td { overflow-wrap: anywhere; min-width: 4em; max-width: 26em } thead th { border-bottom: 1px solid #999 }
.warn { background: #fff4d6; border-left: 4px solid #e0a000; padding: 2px 8px; margin: 4px 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr)); gap: 18px 24px }
section > svg { width: 100%; height: auto; display: block } .charts table { font-size: 12.5px; width: 100% }
.charts td { white-space: nowrap; overflow-wrap: normal; padding-right: 5px; min-width: 0 }
.charts th { font-weight: normal; overflow-wrap: anywhere; min-width: 5em; padding-right: 5px }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.strip { display: flex; gap: 14px; overflow-x: auto; align-items: flex-start; padding-bottom: 8px }
figure { margin: 0; flex: none; max-width: 88vw } figure img { max-width: 100%; display: block }
summary { cursor: pointer; color: #0056b3 } pre { overflow-x: auto; font-size: 12px; background: #f6f6f6; padding: 8px }
"""


class ReportError(ValueError):
    """No page can be made; the message names the folder or file and what is wrong with it."""


@dataclass
class ReportOptions(Checked):
    """Of which runs, and where to."""

    runs: tuple[str, ...] = ()
    """Run folders (or checkpoints in them)."""
    out: str = ""
    """The page. Empty: report.html in the run's folder; of several runs, in the present folder."""
    x: Literal["epoch", "step", "hours"] = "epoch"
    """What the curves run over. hours: since the run's first log line, interruptions included."""
    pictures: NonNegativeInt = 4
    """How many drawings of each kind are shown, evenly spaced over the run. 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ConfigError("runs is empty; fastssl report RUN [RUN ...]")


@dataclass
class RunFolder:
    """What a run left behind, as far as it can be read.

    Attributes:
        folder: where; name: short, unlike that of the other runs.
        config: flat, by dotted key.
        lines: log lines with numbers, in the order of their steps; health: (step, warning).
        summary: of summary.json; starts, evaluations: of starts.jsonl and evaluations.jsonl.
        pictures: by kind, (step, file).
        notes: what is missing or damaged.
    """

    folder: Path
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    health: list[tuple[int, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str, x: str) -> tuple[list[float], list[float]]:
        """Where a metric was logged, and its values there (some may not be finite)."""
        times = [_number(line.get("time")) for line in self.lines]
        begin = next((time for time in times if time is not None), 0.0)
        found = []
        for line, now in zip(self.lines, times, strict=True):
            place = _number(line.get(x)) if x != "hours" else None if now is None else (now - begin) / 3600
            if place is not None and _is_number(line.get(key)):
                value = _number(line[key])
                found.append((place, math.nan if value is None else value))
        return [place for place, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The last finite value of a metric."""
        return next((value for line in self.lines[::-1] if (value := _number(line.get(key))) is not None), None)


Curve = tuple[RunFolder, list[float], list[float]]  # places and values


@dataclass(frozen=True)
class Report:
    """Where the page is, its size in bytes, and what was missing."""

    path: str
    bytes: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return "\n".join([f"{self.path} ({self.bytes / 1e6:.1f} MB)", *(f"note: {note}" for note in self.notes)])


def report(options: ReportOptions) -> Report:
    """Write one page on one or several runs: curves, pictures, settings that differ, machines, evaluations.

    Raises:
        ReportError: one of the folders is no run, or the page cannot be written.
    """
    runs = [read_run(name) for name in options.runs]
    for run, name in zip(runs, _short_names([run.folder for run in runs]), strict=True):
        run.name = name
    out = Path(options.out or (runs[0].folder / "report.html" if len(runs) == 1 else "report.html"))
    data = page(runs, options.x, options.pictures).encode(errors="replace")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ReportError(f"{out} cannot be written: {error.strerror}") from None
    return Report(str(out), len(data), [note for run in runs for note in run.notes])


# -- reading -----------------------------------------------------------------------------------------------------------


def read_run(name: str) -> RunFolder:
    """What is in a run's folder; `name` may also be a checkpoint in it.

    Raises:
        ReportError: there is no such folder, or neither a configuration nor a log in it.
    """
    folder = Path(name)
    if not folder.exists():
        raise ReportError(f"{name} does not exist; name the folder of a run")
    folder = folder if folder.is_dir() else folder.parent
    if not any((folder / file).exists() for file in ("metrics.jsonl", "config.yaml", "evaluations.jsonl")):
        raise ReportError(f"{folder} is no run folder: it has neither metrics.jsonl nor config.yaml")
    run = RunFolder(folder)
    run.config = dict(_flat("", _read(run, "config.yaml", yaml.safe_load, "its settings are not known")))
    run.summary = _read(run, "summary.json", json.loads)
    lines = [line for line in _read_lines(run, "metrics.jsonl", "no curves") if _number(line.get("step")) is not None]
    lines.sort(key=lambda line: line["step"])
    run.health = [(int(line["step"]), str(line["health"])) for line in lines if "health" in line]
    run.lines = [line for line in lines if "health" not in line]
    run.starts = _read_lines(run, "starts.jsonl")
    run.evaluations = _read_lines(run, "evaluations.jsonl")
    for path in sorted(folder.glob("pictures/*.png")):
        kind, _, step = path.stem.rpartition("-")
        if kind and step.isdecimal():
            run.pictures.setdefault(kind, []).append((int(step), path))
    return run


def _read(run: RunFolder, name: str, parse: Callable[[str], Any], missing: str = "") -> dict[str, Any]:
    """A file that holds one dictionary; {} where it does not. `missing`: what to note if it is not there."""
    path = run.folder / name
    try:
        found = parse(path.read_text(errors="replace"))
    except FileNotFoundError:
        run.notes += [f"{path} is not there: {missing}"] if missing else []
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.notes.append(f"{path} cannot be read ({str(error).splitlines()[0]})")
        return {}
    if not isinstance(found, dict):
        run.notes.append(f"{path} cannot be read (it holds no keys)")
        return {}
    return found


def _read_lines(run: RunFolder, name: str, missing: str = "") -> list[dict[str, Any]]:
    """The readable lines of a file with one dictionary per line, and one note on the others."""
    path, found, bad = run.folder / name, [], []
    try:
        texts = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        run.notes += [f"{path} is not there: {missing}"] if missing else []
        return []
    except OSError as error:
        run.notes.append(f"{path} cannot be read ({error.strerror})")
        return []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            found.append(line)
        else:
            bad.append(number)
    if bad:
        where = "the last line is cut off" if bad == [len(texts)] else f"{len(bad)} lines, the first is line {bad[0]}"
        run.notes.append(f"{path} is damaged ({where}); the other {len(found)} lines are shown")
    elif not found and missing:
        run.notes.append(f"{path} is empty: {missing}")
    return found


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(each[-1:])} ({number})" for number, each in enumerate(parts, 1)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """A number that can be drawn; else None."""
    if not _is_number(value) or not abs(value) < LARGEST:
        return None
    return float(value) if abs(value) > 1 / LARGEST else 0.0


# -- the page ----------------------------------------------------------------------------------------------------------


def page(runs: Sequence[RunFolder], x: str, pictures: int) -> str:
    """The whole page; options as in `ReportOptions`."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    notes = [note for run in runs for note in run.notes]
    warnings = [(run.name, step, text) for run in runs for step, text in run.health]
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">Note: {escape(note)}</p>' for note in notes),
        *(f'<p class="warn"><b>{escape(name)}</b>, {escape(text)}</p>' for name, _, text in warnings[:20]),
        *([f"<p>and {len(warnings) - 20} more warnings</p>"] if len(warnings) > 20 else []),
        f'<div class="wide">{_overview(runs)}</div>',
        *_differences(runs),
        *_charts(runs, x),
        *_evaluations(runs),
        *_pictures(runs, pictures),
        *_machines(runs),
        *_settings(runs),
        f"<p><small>Made by fastssl report, {time.strftime('%Y-%m-%d %H:%M')}.</small></p>",
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _dot(runs: Sequence[RunFolder], run: RunFolder) -> str:
    """A run's name behind its colour."""
    colour = COLOURS[list(runs).index(run) % len(COLOURS)]
    return f'<span class="dot" style="background:{colour}"></span>{escape(run.name)}'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each row is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    """Any value as HTML."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _best(values: Sequence[float | None], form: str, alike: bool) -> list[str]:
    """Numbers as text; where they were measured alike, the largest of several in bold."""
    known = [value for value in values if value is not None] if alike else []
    texts = ["" if value is None else format(value, form) for value in values]
    return [
        f"<b>{text}</b>" if len(known) > 1 and value == max(known) else text
        for value, text in zip(values, texts, strict=True)
    ]


def _overview(runs: Sequence[RunFolder]) -> str:
    """What one asks first, a column per run."""

    def progress(run: RunFolder) -> str:
        last = run.lines[-1] if run.lines else run.summary
        text = f"step {last['step']}" if _is_number(last.get("step")) else "no step is known"
        total = run.summary.get("total_steps")
        text += f" of {total}" if _is_number(total) else ""
        epochs = run.config.get("schedule.epochs")
        if _number(last.get("epoch")) is not None:
            text += f", epoch {last['epoch']:.4g}" + (f" of {epochs:g}" if _is_number(epochs) else "")
        return escape(text + (", finished" if run.summary.get("finished") is True else ", not finished"))

    def hours(run: RunFolder) -> str:
        where, _ = run.series("step", "hours")
        return f"{where[-1]:.2f}" if where else ""

    def middle(run: RunFolder, key: str, form: str) -> str:
        values = [value for value in run.series(key, "step")[1] if math.isfinite(value)]
        return format(median(values), form) if values else ""

    def best_knn(run: RunFolder) -> str:
        where, values = run.series("knn_top1", "epoch")
        best = max((pair for pair in zip(values, where, strict=True) if math.isfinite(pair[0])), default=None)
        return f" (best {best[0]:.1f} in epoch {best[1]:g})" if best else ""

    how = ("data.path", "data.val", "model.image_size", *(f"monitor.{key}" for key in MONITOR))
    alike = len({json.dumps([run.config.get(key) for key in how], default=str) for run in runs}) == 1
    knn = _best([run.last("knn_top1") for run in runs], ".1f", alike)
    loss = [run.last("loss") for run in runs]
    rows: list[list[str]] = [
        ["method", *(_text(run.config.get("method", "")) for run in runs)],
        ["model", *(_text(run.config.get("model.name", "")) for run in runs)],
        ["progress", *map(progress, runs)],
        ["loss at the end", *("" if value is None else f"{value:.4f}" for value in loss)],
        [
            f"online k-NN, top-1 %{'' if alike else UNLIKE}",
            *(last + best_knn(run) for run, last in zip(runs, knn, strict=True)),
        ],
    ]
    for protocol in dict.fromkeys(str(one.get("protocol")) for run in runs for one in run.evaluations):
        newest = [[one for one in run.evaluations if str(one.get("protocol")) == protocol][-1:] for run in runs]
        results = [_results(one[0]) if one else {} for one in newest]
        key = next((key for key in HEADLINES if any(key in result for result in results)), None)
        if key:
            alike = len({_how(one[0]) for one in newest if one}) == 1
            texts = _best([result.get(key) for result in results], ".4g", alike and key != "loss")
            for i, (run, one) in enumerate(zip(runs, newest, strict=True)):
                if one and run.lines and one[0].get("step") != run.lines[-1]["step"]:
                    texts[i] += f" <small>at step {_text(one[0].get('step'))}</small>"
            rows.append([f"evaluate {escape(protocol)}, {key}{'' if alike else UNLIKE}", *texts])
    rows += [
        ["images per second", *(middle(run, "images_per_s", ".0f") for run in runs)],
        ["waiting for data", *(middle(run, "data_wait", ".0%") for run in runs)],
        ["hours, first to last log line", *map(hours, runs)],
        ["health warnings", *(str(len(run.health)) for run in runs)],
        ["folder", *(f"<small>{escape(str(run.folder))}</small>" for run in runs)],
    ]
    return _table(["", *(_dot(runs, run) for run in runs)], [row for row in rows if any(row[1:])])


def _differences(runs: Sequence[RunFolder]) -> list[str]:
    """The settings that are not the same in all runs."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return []
    keys = dict.fromkeys(key for run in known for key in run.config)
    partly = [key for key in keys if any(key not in run.config for run in known)]
    differing = [
        key
        for key in keys
        if key not in partly and len({json.dumps(run.config[key], default=str) for run in known}) > 1
    ]
    where = ("run.", "data.workers", "monitor.", "health.")  # say little about what was learned
    table = _keys(runs, sorted(differing, key=lambda key: key.startswith(where)))
    words = f"{len(partly)} settings that not all of the runs have"
    return [
        "<h2>Settings that differ</h2>",
        table if differing else "<p>None.</p>",
        *([f"<details><summary>{words}</summary>{_keys(runs, partly)}</details>"] if partly else []),
    ]


def _settings(runs: Sequence[RunFolder]) -> list[str]:
    """All settings, folded up."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    folded = f"<details><summary>All {len(keys)} settings</summary>{_keys(runs, keys)}</details>"
    return ["<h2>Settings</h2>", folded] if keys else []


def _keys(runs: Sequence[RunFolder], keys: Iterable[str]) -> str:
    """A table of settings, a column per run."""
    known = [run for run in runs if run.config]
    rows = [[escape(key), *(_text(run.config[key]) if key in run.config else "" for run in known)] for key in keys]
    return f'<div class="wide">{_table(["", *(_dot(runs, run) for run in known)], rows)}</div>'


def _machines(runs: Sequence[RunFolder]) -> list[str]:
    """Where each start of each run took place."""
    starts = [(run, start) for run in runs for start in run.starts]
    if not starts:
        return []
    keys = [key for key in dict.fromkeys(key for _, start in starts for key in start) if key not in ("time", "command")]
    rows = [
        [_dot(runs, run), _date(start.get("time")), *(_text(start[key]) if key in start else "" for key in keys)]
        for run, start in starts
    ]
    commands = "\n".join(dict.fromkeys(escape(str(start["command"])) for _, start in starts if "command" in start))
    table = _table(["run", "started", *map(escape, keys)], rows)
    return ["<h2>Where it ran</h2>", f'<div class="wide">{table}</div><pre>{commands}</pre>']


def _date(value: Any) -> str:
    """Seconds since 1970, or a date as text, as HTML."""
    if not _is_number(value):
        return escape(str(value or ""))
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    except (ValueError, OverflowError, OSError):
        return escape(str(value))


def _results(one: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, less those that only say how it was made."""
    results = one.get("results")
    items = results.items() if isinstance(results, dict) else ()
    return {key: value for key, value in items if _number(value) is not None and key not in NO_RESULTS}


def _interval(one: dict[str, Any], key: str) -> str:
    """The 95 % interval of a result, where it has one."""
    found = one["results"].get("interval" if key == "miou" else f"{key}_interval") if _results(one) else None
    if not isinstance(found, list) or len(found) != 2 or None in map(_number, found):
        return ""
    return f" <small>({found[0]:.4g} to {found[1]:.4g})</small>"


def _how(one: dict[str, Any]) -> str:
    """What two evaluations must have in common to be compared."""
    options = one.get("options")
    kept = {key: value for key, value in options.items() if key not in WHERE} if isinstance(options, dict) else options
    return json.dumps([one.get("data"), one.get("val"), kept], default=str, sort_keys=True)


def _evaluations(runs: Sequence[RunFolder]) -> list[str]:
    """A table per protocol, a row per evaluation."""
    found: dict[str, list[tuple[RunFolder, dict[str, Any]]]] = {}
    for run in runs:
        for one in run.evaluations:
            found.setdefault(str(one.get("protocol", "unknown")), []).append((run, one))
    parts = ["<h2>Evaluations</h2>"] if found else []
    for protocol, rows in found.items():
        results = list(dict.fromkeys(key for _, one in rows for key in _results(one)))
        options = [dict(_flat("", one["options"])) if isinstance(one.get("options"), dict) else {} for _, one in rows]
        differing = [
            key
            for key in dict.fromkeys(key for each in options for key in each)
            if key not in WHERE and len({json.dumps(each.get(key), default=str) for each in options}) > 1
        ]
        head = ["run", "checkpoint", "step", *map(escape, results), *map(escape, differing), "val", "when"]
        alike = len({_how(one) for _, one in rows}) == 1
        best = {key: _best([_results(one).get(key) for _, one in rows], ".4g", alike) for key in HEADLINES[:-1]}
        cells = [
            [
                _dot(runs, run),
                escape(Path(str(one.get("checkpoint", ""))).name),
                _text(one.get("step", "")),
                *(
                    best[key][row] + _interval(one, key) if key in best else _text(_results(one).get(key, ""))
                    for key in results
                ),
                *(_text(options[row].get(key, "")) for key in differing),
                _text(one.get("val", "")),
                _date(one.get("time")),
            ]
            for row, (run, one) in enumerate(rows)
        ]
        whole = "\n".join(escape(json.dumps(one, default=str)) for _, one in rows)
        parts += [
            f"<h3>evaluate {escape(protocol)}</h3>",
            f'<div class="wide">{_table(head, cells)}</div>',
            f"<details><summary>as written</summary><pre>{whole}</pre></details>",
        ]
    return parts


def _pictures(runs: Sequence[RunFolder], count: int) -> list[str]:
    """What the methods drew, the same kind side by side over time."""
    parts = []
    for run in runs:
        for kind, files in run.pictures.items():
            chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(min(count, len(files)))]
            epochs = {int(line["step"]): line["epoch"] for line in run.lines if _number(line.get("epoch")) is not None}
            shown = []
            for step, path in dict(chosen[-count:] if count > 1 else files[-count:] if count else []).items():
                when = f"step {step}" + (f", epoch {epochs[step]:.4g}" if step in epochs else "")
                if (data := _embedded(path)) is None:
                    run_note = escape(f"{path} is no picture that can be read")
                    shown.append(f'<figure><p class="note">{run_note}</p></figure>')
                else:
                    alt = escape(f"{run.name}: {kind}, {when}")
                    shown.append(f'<figure><figcaption>{when}</figcaption><img alt="{alt}" src="{data}"></figure>')
            if shown:
                parts.append(f'<h3>{_dot(runs, run)}: {escape(kind)}</h3><div class="strip">{"".join(shown)}</div>')
    return ["<h2>Pictures over time</h2>", *parts] if parts else []


def _embedded(path: Path) -> str | None:
    """A picture as a data URL, shrunk if it is wide; None where it cannot be read."""
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if image.width > PICTURE:
        image = image.resize((PICTURE, max(1, round(image.height * PICTURE / image.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# -- curves ------------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[RunFolder], x: str) -> list[str]:
    """A chart per metric, in the order of `CHARTS`, then the others; what never changes is one line."""
    lines = [line for run in runs for line in run.lines]
    logged = dict.fromkeys(key for line in lines for key, value in line.items() if _is_number(value))
    losses = [key for key in logged if key.startswith("loss_")]
    keys = [
        key for key in ("loss", *losses, *CHARTS, *logged) if key in logged and key not in ("step", "epoch", "time")
    ]
    charts, constant = [], []
    for key in dict.fromkeys(keys):
        values = {value for run in runs for value in run.series(key, x)[1]}
        if len(values) == 1 and key not in ("loss", "knn_top1"):
            constant.append(f"{escape(key)} {_text(next(iter(values)))}")
            continue
        title, words = CHARTS.get(key, (key.replace("_", " "), ""))
        groups: dict[str, list[Curve]] = {}
        for run in runs:
            if (curve := (run, *run.series(key, x)))[1]:  # losses of two methods have no common scale
                groups.setdefault(str(run.config.get("method", "")) if key.startswith("loss") else "", []).append(curve)
        for method, drawn in groups.items():
            charts.append(_chart(runs, f"{title} ({method})" if len(groups) > 1 else title, words, drawn, x, key))
    parts = ["<h2>Curves</h2>", f'<div class="charts">{"".join(charts)}</div>'] if charts else []
    return parts + ([f"<p>Constant: {', '.join(constant)}.</p>"] if constant else [])


def _chart(runs: Sequence[RunFolder], title: str, words: str, drawn: Sequence[Curve], x: str, key: str) -> str:
    """A metric of some runs as SVG, and its numbers."""
    finite = [value for _, _, values in drawn for value in values if math.isfinite(value)]
    begin, end = (f(f(where) for _, where, _ in drawn) for f in (min, max))
    end = end if end > begin else begin + 1
    log = key == "grad_norm" and bool(finite) and 0 < 30 * min(finite) < max(finite)
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = (scale(min(finite)), scale(max(finite))) if finite else (0.0, 1.0)
    if key.startswith("loss"):  # the fall at the beginning would leave no room for what follows
        later = [v for _, where, values in drawn for at, v in zip(where, values, strict=True)
                 if at >= where[0] + (where[-1] - where[0]) / 10 and math.isfinite(v)]  # fmt: skip
        high = max(later, default=high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.05 * abs(low) or 0.05), high + (0.05 * abs(high) or 0.05)
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

    def left(value: float) -> float:
        return LEFT + (value - begin) / (end - begin) * (WIDTH - LEFT - 12)

    def top(value: float) -> float:
        return 8 + (high - scale(value)) / (high - low) * (HEIGHT - BELOW - 8)

    lines = []
    marks = _log_ticks(low, high) if log else _ticks(low, high)
    for mark, text in marks:
        y = top(mark)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 12}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for mark, text in _ticks(begin, end):
        lines.append(f'<text x="{left(mark):.1f}" y="{HEIGHT - BELOW + 17}" text-anchor="middle">{text}</text>')
    unit = f"{x}, logarithmic scale upwards" if log else x
    lines.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}" text-anchor="middle" fill="#555">{unit}</text>')
    rows = []
    frame = f'x="{LEFT - 4}" y="2" width="{WIDTH - LEFT}" height="{HEIGHT - BELOW + 2}"'
    box = f"{LEFT - 4} 2 {WIDTH - LEFT} {HEIGHT - BELOW + 2}"
    lines.append(f'<svg {frame} viewBox="{box}">')  # what lies outside is not drawn
    for run, where, values in drawn:
        colour = COLOURS[list(runs).index(run) % len(COLOURS)]
        for piece in _pieces(where, values):
            points = [(left(a), top(mean)) for a, _, mean, _ in piece]
            if any(lo < hi for _, lo, _, hi in piece):
                above, below = ([(left(each[0]), top(each[i])) for each in piece] for i in (3, 1))
                lines.append(f'<path d="{_path(above + below[::-1])}Z" fill="{colour}" opacity=".18"/>')
            lines.append(f'<path d="{_path(points)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            if len(points) <= 40:
                lines += [
                    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"><title>{escape(run.name)}: '
                    f"{mean:.5g} at {x} {at:.5g}</title></circle>"
                    for (a, b), (at, _, mean, _) in zip(points, piece, strict=True)
                ]
        rows.append([_dot(runs, run), *_extremes(where, values)])
    lines.append("</svg>")
    table = _table(["", "last", "lowest", "highest"], rows)
    about = f"<p><small>{escape(words)}</small></p>" if words else ""
    label = escape(f"{title} over {x}")
    return (
        f'<section><h3>{escape(title)}</h3>{about}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'font-size="12" font-family="system-ui, sans-serif">{"".join(lines)}</svg>{table}</section>'
    )


def _extremes(where: list[float], values: list[float]) -> list[str]:
    """The last value, and the least and largest with their places, as HTML."""
    known = [(value, at) for value, at in zip(values, where, strict=True) if math.isfinite(value)]
    broken = len(values) - len(known)
    last = f"{values[-1]:.4g}" + (f" ({broken} not finite)" if broken else "")
    if not known:
        return [last, "", ""]
    return [last, *(f"{value:.4g} <small>at {at:.3g}</small>" for value, at in (min(known), max(known)))]


def _pieces(where: list[float], values: list[float]) -> list[list[tuple[float, float, float, float]]]:
    """A curve as unbroken pieces of points (place, least, mean, largest of the values that the point stands for)."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, value in zip(where, values, strict=True):
        if math.isfinite(value):
            pieces[-1].append((at, value))
        elif pieces[-1]:
            pieces.append([])
    size = -(-len(where) // POINTS)
    made = []
    for piece in pieces:
        buckets = [piece[i : i + size] for i in range(0, len(piece), size)]
        if buckets:
            made.append([
                (sum(a for a, _ in each) / len(each), min(v for _, v in each), sum(v for _, v in each) / len(each),
                 max(v for _, v in each))
                for each in buckets
            ])  # fmt: skip
    return made


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round numbers between two, and how they are written."""
    raw = (high - low) / 5
    step = 10 ** math.floor(math.log10(raw))
    step = next(step * k for k in (1, 2, 5, 10) if step * k >= raw * 0.999)
    marks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(mark, f"{mark:.6g}") for mark in marks]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2 and 5 times powers of ten between 10^low and 10^high; powers alone where those are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    marks = [k * 10.0**power for power in powers[:: max(1, len(powers) // 6)] for k in factors]
    return [(mark, f"{mark:g}") for mark in marks if low <= math.log10(mark) <= high]
