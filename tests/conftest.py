"""Fixtures of every test: the local Hub, and the same random numbers for each; how tests are shared by processes."""

import os

import pytest
import torch

from tests.hub.fixture import hub  # noqa: F401  # a fixture, found here by its name

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # processes, each with its share of the cores
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup``, what shares fixtures runs in one process: a file, or a method's part of the matrix."""
    for item in items:
        method = getattr(getattr(item, "callspec", None), "params", {}).get("method")
        is_matrix = "matrix" in item.path.parts and method is not None
        item.add_marker(pytest.mark.xdist_group(f"matrix-{method.name}" if is_matrix else str(item.path)))
