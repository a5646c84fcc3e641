"""Runs a test module's function on several gloo processes (the fixture `on_processes`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def on_processes(world: int, function, *arguments) -> list:
    """What `function(rank, *arguments)`, a function of a test module, returned on each of `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, f"{folder}/arguments.pt")
        command = [sys.executable, __file__, sys.modules[function.__module__].__file__, function.__name__, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [*command, str(rank), str(world)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        try:
            outputs = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _main(path: str, name: str, folder: str, rank: str, world: str) -> None:
    from fastssl.training import distributed

    spec = importlib.util.spec_from_file_location("module_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["module_under_test"] = module
    spec.loader.exec_module(module)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(world)
    )
    try:
        arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
        torch.save(getattr(module, name)(int(rank), *arguments), Path(folder) / f"{rank}.pt")
    finally:
        distributed.stop()


if __name__ == "__main__":
    _main(*sys.argv[1:])
