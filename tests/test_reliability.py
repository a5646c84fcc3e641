"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_row_has_its_test():
    text = (ROOT / "docs/reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("| fault |", "|---"))]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rsplit(" | ", 1)[-1]) for row in rows]
    assert rows
    assert all(named), [row for row, tests in zip(rows, named, strict=True) if not tests]
    missing = {
        f"{path}::{name}"
        for tests in named
        for path, name in tests
        if not (ROOT / path).is_file() or f"\ndef {name}(" not in (ROOT / path).read_text()
    }
    assert not missing
