"""Fixtures of every test: the local Hub, and the same random numbers for each."""

import pytest
import torch

from tests.hub.fixture import hub  # noqa: F401  # a fixture, found here by its name


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
