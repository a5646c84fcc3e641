"""Tests use one thread per process: tiny tensors gain nothing from more, and busy machines lose much."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; must be set before triton is imported
if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import speed_up

    speed_up()


LONG = (  # half a minute and more: they begin first, so that workers that take file after file end together
    "test_bench_gpu.py", "test_compile.py", "test_kills.py", "test_proofs.py", "test_trainer.py", "test_kernel_path.py",
    "test_launches.py", "test_elastic.py", "test_heartbeat.py", "test_shard.py", "test_demo.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def on_processes():
    """on_processes(2, function, *arguments): results of `function(rank, *arguments)` on two gloo processes."""
    import gloo

    processes = gloo.Processes()
    yield processes
    processes.close()
