"""The page of `fastssl bench gpu`: Markdown from the records of results.jsonl, failures first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastssl.pretraining.bench_gpu import PARTS, RECIPES, SMALL_RECIPES, Record, contenders

FACTS = ("gpu", "driver", "cuda", "torch", "triton", "torchvision", "numpy", "numba", "python", "cores", "commit")
TITLES = {
    "tests": "Tests",
    "proofs": "Proofs",
    "kernels": "Kernels",
    "steps": "Training steps",
    "loader": "Loader",
}


def page(records: list[Record], cores: int) -> str:
    """The whole page.

    Args:
        records: all that is known, one per part and key.
        cores: of this machine.
    """
    facts = next((record for record in records if record["part"] == "facts" and record["key"] == "facts"), {})
    lines = [f"# {facts.get('gpu', 'A CPU (a trial of the command, no measurement)')}", ""]
    lines += [", ".join(f"{key} {facts[key]}" for key in FACTS if facts.get(key)) or f"{cores} cores"]
    if facts.get("copy"):
        rates = ", ".join(f"{rate / 1e12:.0f} {dtype}" for dtype, rate in facts["rates"].items())
        lines[-1] += f". Copies {facts['copy'] / 1e12:.2f} TB/s, multiplies at {rates} TFLOP/s"
    lines[-1] += "; made by `fastssl bench gpu`"
    lines += ["", "## Failures, and what was not reached", "", *_failures(records)]
    bodies = {"steps": _steps, "kernels": _kernels, "proofs": _proofs, "tests": _tests, "loader": _loader}
    for part, body in bodies.items():
        mine = [record for record in records if record["part"] == part]
        if any(not _of_the_command(record) for record in mine):
            lines += ["", f"## {TITLES[part]}", "", *body(mine, records)]
    lines += ["", "## Parts", "", *_table(["part", "end", "seconds", "log"], _ends(records))]
    return "\n".join(lines) + "\n"


def failed_tests(records: list[Record]) -> list[str]:
    """Names of the tests that failed."""
    return [record["key"] for record in records if record["part"] == "tests" and record.get("outcome") == "failed"]


def _of_the_command(record: Record) -> bool:
    return record["key"] in ("end", "part") or record["key"].startswith("job ")


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _failures(records: list[Record]) -> list[str]:
    lines = []
    for part in ("facts", *PARTS):
        for record in records:
            if record["part"] == part and (record.get("error") or record.get("outcome") == "failed"):
                words = record.get("error") or record.get("words") or ""
                lines.append(f"- {part}: `{record['key'].removeprefix('job ').strip()}`: {words}".rstrip(": "))
    return lines or ["None."]


def _ends(records: list[Record]) -> list[list[str]]:
    ends = {record["part"]: record for record in records if record["key"] == "end"}
    return [
        [part, ends[part]["how"], f"{ends[part]['seconds']:.0f}", f"`{part}.log`"] if part in ends else [part, *"---"]
        for part in PARTS
    ]


def _number(value: Any, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form) if abs(value) < 1000 else f"{value:,.0f}"


# -- steps -------------------------------------------------------------------------------------------------------------


def _steps(mine: list[Record], records: list[Record]) -> list[str]:
    rows = [record for record in mine if "images_per_s" in record]
    rates = {(row["recipe"], row["contender"], row["loader"]): row["images_per_s"] for row in rows}
    ways = [way for way in (*contenders(), "plain") if any(row["contender"] == way for row in rows)]
    table = {**RECIPES, **SMALL_RECIPES}
    names = [name for name in table if any(row["recipe"] == name for row in rows)]
    head = ["recipe, images per step", "authors' code, one H200", "first measurement", "goal", *ways]
    head += ["best with the loader", "best / goal"]
    lines = []
    for name in names:
        recipe = table[name]
        own = [rates.get((name, way, False)) for way in ways]
        fed = [rates[name, way, True] for way in ways if (name, way, True) in rates]
        best = max(filter(None, own), default=None)
        share = f"{best / recipe.goal:.0%}" if best and recipe.goal else "-"
        known = [recipe.authors, recipe.before, recipe.goal]
        cells = [_number(value, ".0f") for value in (*known, *own, max(fed, default=None))]
        lines.append([f"{recipe.title}, {recipe.images}", *cells, share])
    words = "Images per second, on one batch again and again unless the loader is named. The first measurement and "
    words += "the goals are for one H200 too. `plain` is PyTorch without kernels."
    more = ["recipe", "way", "loader", "images/s", "ms", "MFU", "memory GB", "launches", "host ms", "longest parts, ms"]
    details = []
    for row in sorted(rows, key=lambda row: (names.index(row["recipe"]), row["loader"], ways.index(row["contender"]))):
        longest = sorted(row["parts"].items(), key=lambda item: -item[1])[:4]
        missed = row["contender"] == "graph" and not row.get("captured")
        details.append(
            [
                row["recipe"],
                row["contender"] + (" (not captured)" if missed else ""),
                "yes" if row["loader"] else "no",
                _number(row["images_per_s"]),
                _number(row["milliseconds"]),
                f"{row['mfu']:.1%}",
                f"{row['memory'] / 1e9:.2f}",
                str(row["launches"]),
                _number(row["host"]),
                ", ".join(f"{key} {value:.1f}" for key, value in longest),
            ]
        )
    return [words, "", *_table(head, lines), "", *_table(more, details)]


# -- ops ---------------------------------------------------------------------------------------------------------------


def _kernels(mine: list[Record], records: list[Record]) -> list[str]:
    rows = [record for record in mine if "pass" in record]
    bad = {record["op"] for record in records if record["part"] == "proofs" and record.get("outcome") == "failed"}
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["pass"]), []).append(row)
    lines = []
    for (op, case, what), group in groups.items():
        kernel = next((row for row in group if row["name"] == "kernel"), {})
        others = [_other(row) for row in group if row["name"] != "kernel"]
        lines.append(
            [
                f"{op} (a proof failed)" if op in bad else op,
                f"{case}, {group[0]['dtype']}",
                "f" if what == "forward" else "f+b",
                _number(kernel.get("ms")),
                _number(kernel.get("device_ms")),
                f"{kernel['fraction']:.0%}" if "fraction" in kernel else kernel.get("error", "-")[:60],
                _number(kernel.get("peak_mb"), ".0f"),
                "; ".join(others),
            ]
        )
    head = ["op", "case", "pass", "call ms", "device ms", "of the limit", "MB", "others as multiples: call, device"]
    words = "`call` is what a caller waits (launching included, L2 cold), `device` the same work replayed from a CUDA "
    words += "graph (what fits stays in L2; `-`: it cannot be captured). `of the limit`: of what bytes and products "
    words += "allow."
    return [words, "", *_table(head, lines)]


def _other(row: Record) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error'][:40]}"
    return f"{row['name']} {_number(row.get('speedup'), '.2f')}, {_number(row.get('device_speedup'), '.2f')}"


def _proofs(mine: list[Record], records: list[Record]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for record in mine:
        if "op" in record:
            counts.setdefault(record["op"], Counter())[record["outcome"]] += 1
    ends = {record["key"].removeprefix("job ").strip(): record["how"] for record in mine if "how" in record}
    rows = [
        [op, *(str(count[outcome]) for outcome in ("passed", "failed", "too large")), ends.get(op, "running")]
        for op, count in counts.items()
    ]
    words = "Outputs and gradients against float64, on this device; too large: float64 did not fit in memory."
    return [words, "", *_table(["op", "passed", "failed", "too large", "end"], rows)]


def _tests(mine: list[Record], records: list[Record]) -> list[str]:
    tests = [record for record in mine if "outcome" in record]
    counts = Counter(record["outcome"] for record in tests)
    longest = sorted(tests, key=lambda record: -record["seconds"])[:5]
    return [
        ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")) + ". The longest:",
        "",
        *(f"- {record['seconds']:.0f} s `{record['key']}`" for record in longest),
    ]


# -- the loader --------------------------------------------------------------------------------------------------------


def _loader(mine: list[Record], records: list[Record]) -> list[str]:
    rows = [record for record in mine if "threads" in record]
    threads = sorted({row["threads"] for row in rows})
    found = {(row["case"], row["threads"]): row for row in rows}
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [found.get((case, count)) for count in threads]
        lines.append(
            [case, *(f"{one['images_per_s']:,.0f} ({one['cpu_ms_per_image']:.2f})" if one else "-" for one in cells)]
        )
    words = f"Images per second of the engine {rows[0]['engine']} (CPU milliseconds per image), by threads."
    return [words, "", *_table(["case", *map(str, threads)], lines)]
