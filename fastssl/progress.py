"""How far a command is: a bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import sys
from typing import Any

from tqdm import tqdm

FIRST, BETWEEN = 5.0, 20.0  # seconds before the first line in a log file, and between two


class _Lines(tqdm):
    """A bar for log files, where nothing can be drawn over."""

    disable: bool
    said = -math.inf  # when the last line was written, in seconds after the start

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        now = self.format_dict
        if msg is None and self.n and now["elapsed"] >= max(self.delay, self.said + 0.9 * self.mininterval):
            self.said = now["elapsed"]
            total = f" of {now['total']}" if now["total"] else ""
            rate = now["rate"] or now["n"] / max(now["elapsed"], 1e-9)
            left = f", {duration((now['total'] - now['n']) / rate)} left" if now["total"] else ""
            print(
                f"{self.desc}: {now['n']}{total} {now['unit']}, {number(rate)} per second{left}",
                file=self.fp,
                flush=True,
            )
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing is to be cleared before other lines are written."""

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress_bar(total: int | None, what: str, unit: str = "images", **more: Any) -> tqdm:
    """A progress bar on stderr, to be closed or used as a context; call its `update`.

    Args:
        what: what is going on, in a word or two; empty: nothing is shown.
        more: further arguments of tqdm.
    """
    more = {"total": total, "desc": what, "unit": unit, "leave": False, "file": sys.stderr, **more}
    if not what:
        return tqdm(**{**more, "disable": True})
    if on_terminal():
        return tqdm(**more)
    return _Lines(**{**more, "mininterval": BETWEEN, "delay": FIRST, "miniters": 1})


def on_terminal() -> bool:
    """Whether somebody sees a bar move."""
    return sys.stderr.isatty()


def number(rate: float) -> str:
    """A rate with two digits or more: 1250, 12, 1.2, 0.12."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """The time in the two units that matter: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
