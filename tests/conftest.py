"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the tests that any device must pass run."""
    parser.addoption(
        "--device", default="cpu", help="device of tests/model/test_cuda.py: cpu (default), cuda or cuda:N"
    )
