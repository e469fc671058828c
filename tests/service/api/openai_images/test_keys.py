"""What OpenAI's client raises for keys that do not do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.service.processes import PATIENCE, ServerProcess

KEYS = {
    "acme": 'scopes = ["infer"]',
    "slow": 'scopes = ["infer"]\nrate = "1/day"',
    "prometheus": 'scopes = ["metrics"]',
}
"""By name, which is the secret too."""


@pytest.fixture(scope="module")
def guarded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with keys."""
    text = "\n".join(
        f'[{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{more}' for name, more in KEYS.items()
    )
    log = tmp_path_factory.mktemp("guarded") / "log"
    process = ServerProcess(log, "--models", models, "--default-model", "tiny-cond", TARFLOW_KEYS_INLINE=text)
    try:
        yield process.wait_ready()
    finally:
        process.kill()


def library(server: ServerProcess, key: str) -> openai.OpenAI:
    """The client with a key; it tries again as it does by default."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=PATIENCE)


def test_a_key_that_is_known(guarded: ServerProcess) -> None:
    with library(guarded, "acme") as client:
        assert {model.id for model in client.models.list()} >= {"tiny-cond"}
        assert client.images.generate(prompt="cat").data
        assert len(list(client.images.generate(prompt="cat", stream=True))) == 1


def test_a_key_that_is_not(guarded: ServerProcess) -> None:
    with library(guarded, "nobody") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.images.generate(prompt="cat")
    assert (refused.value.code, refused.value.type) == ("invalid_key", "authentication_error")
    assert refused.value.request_id


def test_a_key_of_another_scope(guarded: ServerProcess) -> None:
    with library(guarded, "prometheus") as client, pytest.raises(openai.PermissionDeniedError) as refused:
        client.images.generate(prompt="cat")
    assert (refused.value.code, refused.value.type) == ("wrong_scope", "permission_error")


def test_a_key_that_was_used_up(guarded: ServerProcess) -> None:
    """The client does not wait for a day."""
    with library(guarded, "slow") as client:
        assert client.models.list().data
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(prompt="cat")
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(refused.value.response.headers["retry-after"]) > 120
