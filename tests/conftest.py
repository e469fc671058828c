"""Options of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


LONGEST = ("tests/test_readme.py", "tests/faults/")
"""Files that take minutes each: where files go to several processes, these go first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What must outlive a service goes to a temporary directory: no test touches the tester's own."""
    before = os.environ.get("TARFLOW_STATE")
    os.environ["TARFLOW_STATE"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["TARFLOW_STATE"]
    else:
        os.environ["TARFLOW_STATE"] = before
