"""What every evaluation leaves behind: a line in `evaluations.jsonl`, beside the checkpoint that was measured."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastssl.config import plain
from fastssl.training.checkpoint import stamp

NAME = "evaluations.jsonl"
F = TypeVar("F", bound=Callable[[Any], Any])


def recorded(protocol: str) -> Callable[[F], F]:
    """Decorates the function of a protocol (options -> result): the result is also kept, as one JSON object in a line.

    Its keys: protocol; checkpoint (path), sha256 and step of it (optimizer steps of its run); data, val (as given; null
    where the protocol has none); options (all others); results (`as_dict` of the result); time (seconds since 1970).
    Nothing is kept of a library's model, which lies in no folder of ours.
    """

    def decorate(evaluate: F) -> F:
        @functools.wraps(evaluate)
        def wrapper(options: Any) -> Any:
            path = Path(options.checkpoint)
            keeps = int(os.environ.get("RANK", "0")) == 0 and path.is_file()
            before, digest = stamp(path), _sha256(path) if keeps else None
            result = evaluate(options)
            if keeps:
                given, results = plain(vars(options)), result.as_dict()
                line = {
                    "protocol": protocol,
                    "checkpoint": given.pop("checkpoint"),
                    "sha256": digest if stamp(path) == before else None,  # a run may have gone on meanwhile
                    "step": results["step"],
                    "data": given.pop("data"),
                    "val": given.pop("val", None),
                    "options": given,
                    "results": results,
                    "time": round(time.time(), 3),
                }
                _append(path.parent / NAME, json.dumps(line))
            return result

        return wrapper  # type: ignore[return-value]

    return decorate


def _append(path: Path, line: str) -> None:
    """Adds a line in one piece; a full disk or a read-only folder costs the line alone."""
    try:
        with open(path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            cut = end > 0 and file.read(1) != b"\n"  # an earlier writer was ended within its line
            file.write(f"{chr(10) * cut}{line}\n".encode())
    except OSError as error:
        print(f"the result is not kept: {path} cannot be written ({error.strerror})", file=sys.stderr)


def _sha256(path: Path) -> str | None:
    """Checksum of a file's bytes; None where it cannot be read, which the evaluation will say."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()
