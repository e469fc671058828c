"""Options of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

# A change is judged by the same examples everywhere; `pytest --hypothesis-profile random` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the tests that any device must pass run."""
    parser.addoption(
        "--device", default="cpu", help="device of tests/model/test_cuda.py: cpu (default), cuda or cuda:N"
    )
