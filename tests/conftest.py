"""Tests use one thread per process: tiny tensors gain nothing from more, and busy machines lose much."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; must be set before triton is imported


@pytest.fixture(scope="session")
def on_processes():
    """on_processes(2, function, *arguments): results of `function(rank, *arguments)` on two gloo processes."""
    import gloo

    processes = gloo.Processes()
    yield processes
    processes.close()
