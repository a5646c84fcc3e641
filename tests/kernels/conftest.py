"""Kernel tests run on the GPU where there is one, and on the CPU through Triton's interpreter otherwise."""

from collections.abc import Callable

import pytest
import torch

from fastssl.kernels._path import forced


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, `pytest -m gpu` runs every kernel test, because all of them then run on it."""
    if torch.cuda.is_available():
        for item in items:
            if "kernels" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


torch.backends.cudnn.allow_tf32 = False  # what a test compares with has float32's own precision on a GPU too


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def path(request: pytest.FixtureRequest) -> str:
    """Each of the two implementations that `forced` can ask for."""
    return request.param


@pytest.fixture
def compiles_whole() -> Callable[..., None]:
    """Checks that torch.compile takes a function on the kernel path as one graph, with the same value and gradients."""

    def check(f: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> None:
        torch.compiler.reset()
        with forced("triton"):
            eager = f(*leaves)
            compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
            torch.testing.assert_close(compiled, eager)
            expected = torch.autograd.grad(eager.sum(), leaves)
            torch.testing.assert_close(torch.autograd.grad(compiled.sum(), leaves), expected)

    return check
