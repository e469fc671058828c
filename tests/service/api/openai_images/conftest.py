"""The unmodified client library."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.service.processes import PATIENCE, ServerProcess


@pytest.fixture(scope="session")
def library(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the session's server, as it is told of any other address; it does not try again."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client
