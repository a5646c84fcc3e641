"""Runs a test module's function on several gloo processes (the fixture `on_processes`).

The processes are started once and serve one call after another: importing torch costs seconds each time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

SECONDS = 200  # that a call may take


class Processes:
    """`processes(2, function, *arguments)`: what `function(rank, *arguments)`, of a test module, returned on each."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen] = []

    def __call__(self, world: int, function, *arguments) -> list:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(arguments, f"{folder}/arguments.pt")
            while len(self.started) < world:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, __file__],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        stdin=subprocess.PIPE,
                        text=True,
                    )
                )
            path = sys.modules[function.__module__].__file__
            for rank, process in enumerate(self.started[:world]):
                call = [path, function.__name__, folder, rank, world, dict(os.environ)]
                process.stdin.write(json.dumps(call) + "\n")
                process.stdin.flush()
            answers = [Path(folder, f"{rank}.done") for rank in range(world)]
            try:
                self._wait(answers)
            except BaseException:
                self.close()  # one may hang in an exchange with the other: the next call starts new ones
                raise
            return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]

    def _wait(self, answers: list[Path]) -> None:
        deadline = time.monotonic() + SECONDS
        while not all(answer.exists() for answer in answers):
            assert time.monotonic() < deadline, f"the processes have not answered within {SECONDS} s"
            for answer, process in zip(answers, self.started, strict=False):
                assert process.poll() is None, f"a process ended with code {process.returncode}"
                assert not answer.exists() or not answer.read_text(), answer.read_text()
            time.sleep(0.005)
        texts = [answer.read_text() for answer in answers]
        assert not any(texts), "\n".join(texts)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.started:
            process.kill()
            process.wait()
            process.stdin.close()
        self.started.clear()


def serve() -> None:
    """One of the processes: answers the calls that come as lines of standard input."""
    from interpreter import speed_up

    from fastssl.training import distributed

    if os.environ.get("TRITON_INTERPRET") == "1":
        speed_up()
    for line in sys.stdin:
        path, name, folder, rank, world, environment = json.loads(line)
        os.environ.clear()
        os.environ.update(environment)
        error = ""
        try:
            spec = importlib.util.spec_from_file_location("module_under_test", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules["module_under_test"] = module
            spec.loader.exec_module(module)
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
            )
            arguments = torch.load(Path(folder, "arguments.pt"), weights_only=False)
            with contextlib.redirect_stdout(sys.stderr):
                torch.save(getattr(module, name)(rank, *arguments), Path(folder, f"{rank}.pt"))
        except BaseException:
            error = traceback.format_exc()
        finally:
            distributed.stop()
        done = Path(folder, f"{rank}.done")
        Path(f"{done}.part").write_text(error)
        Path(f"{done}.part").rename(done)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # for `from tiny import ...` in a test module
    serve()
