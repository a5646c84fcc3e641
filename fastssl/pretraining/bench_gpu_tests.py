"""A plugin for pytest (`-p fastssl.pretraining.bench_gpu_tests`): every outcome is written down when it is there.

A second run leaves out what has passed or was skipped in the first one.
"""

from __future__ import annotations

import os
from typing import Any

from fastssl.pretraining.bench_gpu import Results

PART = "tests"


def pytest_configure(config: Any) -> None:
    """Writes outcomes down in the main process only, which hears of every test."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Record(), "fastssl-outcomes")


def _results() -> Results:
    return Results(os.environ["FASTSSL_BENCH_RESULTS"])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what an earlier run has seen pass."""
    known = _results().of(PART)
    past = {key for key, record in known.items() if record.get("outcome") in ("passed", "skipped")}
    gone = [item for item in items if item.nodeid in past]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item.nodeid not in past]


class _Record:
    """One record per test; a failed set-up or tear-down counts as the test's failure."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            more = {"words": _last_line(report.longreprtext)} if report.outcome == "failed" else {}
            _results().add(PART, report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **more)


def _last_line(text: str) -> str:
    """What failed, in one line: the first line that pytest marks with an E, or the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines or [""])[0 if marked else -1][:300]
