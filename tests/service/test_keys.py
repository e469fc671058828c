"""Keys with real processes: the command that makes them, a service that follows its file, replicas that share rates."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.access.keyring import Keyring
from service.access.keys import digest
from tests.service.broker.redis_server import RedisServer
from tests.service.processes import PATIENCE, ApiProcess, HttpProcess, ServerProcess, tarflow, wait_until

MOST = 20


def new_key(path: Path, name: str, *flags: str) -> str:
    """A key that the command made."""
    done = tarflow("keys", "new", name, "--keys", path, *flags)
    assert done.returncode == 0, done.stderr
    [secret] = done.stdout.splitlines()
    assert secret not in done.stderr
    assert secret not in path.read_text()
    return secret


def test_the_command_makes_keys_and_shows_which_there_are(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    flags = ["--scope", "infer", "--scope", "metrics", "--priority", "low", "--rate", "600/minute"]
    secret = new_key(path, "acme", *flags, "--concurrent-cost", "1000", "--expires", "2999-01-31")
    caller = Keyring.of_file(path).find(secret)
    assert (caller.name, caller.priority, caller.rate, caller.concurrent_cost) == ("acme", "low", "600/minute", 1000)
    assert caller.scopes == {"infer", "metrics"}
    shown = tarflow("keys", "list", TARFLOW_KEYS=str(path), COLUMNS="200").stdout
    for word in ("acme", "infer, metrics", "low", "600/minute", "1000", "2999-01-31"):
        assert word in shown
    assert digest(secret).hex() not in shown
    before = path.read_text()
    for wrong, words in (
        (["acme", "--scope", "infer"], "already"),
        (["b/c", "--scope", "infer"], "no name of a key"),
        (["b", "--scope", "infer", "--rate", "often"], "rate: allowed"),
        (["b", "--scope", "infer", "--expires", "soon"], "expires: got 'soon'"),
        (["b", "--scope", "all"], "all"),
        (["b"], "scope"),
    ):
        done = tarflow("keys", "new", *wrong, "--keys", path)
        assert done.returncode == 2, wrong
        assert words in done.stderr
        assert done.stdout == ""
    assert path.read_text() == before


@pytest.mark.parametrize("form", ["serve", "api"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid", ""])
def test_without_keys_only_this_host_is_listened_to(form: str, host: str) -> None:
    done = tarflow(form, "--host", host, "--port", "0", TARFLOW_REDIS="redis://127.0.0.1:1/0")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: host: got ")
    for word in (repr(host), "--keys", "--anonymous true", "127.0.0.1"):
        assert word in line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TARFLOW_KEYS": "/nowhere/keys.toml"}, ["/nowhere/keys.toml", "No such file"]),
        ({"TARFLOW_KEYS_INLINE": "[a]\nsha256 = 'a-secret-by-mistake'"}, ["keys_inline: a.sha256"]),
        ({"TARFLOW_KEYS_INLINE": "a-secret-by-mistake", "TARFLOW_KEYS": "keys.toml"}, ["keys_inline", "not both"]),
        ({"TARFLOW_CORS": "https://a.example/path"}, ["cors", "https://a.example"]),
    ],
)
def test_wrong_keys_end_the_start_and_are_not_shown(variables: dict[str, str], words: list[str]) -> None:
    done = tarflow("api", "--port", "0", TARFLOW_REDIS="redis://127.0.0.1:1/0", **variables)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    for word in words:
        assert word in line
    assert "mistake" not in done.stdout + done.stderr


# A service.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.toml"


@pytest.fixture(scope="module")
def secret(keys: Path) -> str:
    return new_key(keys, "acme", "--scope", "infer")


@pytest.fixture(scope="module")
def service(keys: Path, secret: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`tarflow serve` for everybody who has a key, at its most talkative."""
    log = tmp_path_factory.mktemp("service") / "log"
    flags = ["--host", "0.0.0.0", "--log-level", "debug", "--models", models, "--keys", keys]
    process = ServerProcess(log, *flags)
    try:
        yield process.wait_ready()
        assert process.stop() == 0, process.log
    finally:
        process.kill()


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def status(service: HttpProcess, secret: str, path: str = "/v1/models") -> int:
    return httpx.get(service.url + path, headers=bearer(secret), timeout=PATIENCE).status_code


def test_an_edit_is_in_force_without_a_restart_and_secrets_are_never_logged(
    service: ServerProcess, keys: Path, secret: str
) -> None:
    assert status(service, secret) == 200
    assert httpx.get(f"{service.url}/v1/models", timeout=PATIENCE).status_code == 401
    second = new_key(keys, "second", "--scope", "infer", "--scope", "metrics")
    wait_until(lambda: status(service, second) == 200, "the new key is known")
    # Secrets wherever people put them; what a call returns does not matter.
    secrets = [secret, second, "tarflow_wrong-secret"]
    for each in secrets:
        image = {"files": ("a.png", b"no image")}
        for headers in (bearer(each), {"x-api-key": each}, {"authorization": each}, {"authorization": f"Basic {each}"}):
            with httpx.Client(base_url=service.url, headers=headers, timeout=PATIENCE) as client:
                for response in (
                    client.get("/metrics"),
                    client.get("/nothing"),
                    client.post("/v1/score", files=image),
                    client.post("/v1/sample", json={"num_images": 0}),
                    client.post("/v1/sample", json={"model": "tiny-cond", "num_images": 1}),
                ):
                    assert each not in response.text
                    assert each not in str(response.headers)
    before = keys.read_text()
    keys.write_text(before.replace("sha256", "sha257"))
    wait_until(lambda: "stay in force" in service.log, "the bad edit is logged")
    assert status(service, secret) == 200
    keys.write_text(before)
    wait_until(lambda: service.log.count("was read again") == 2, "the mended file is read")
    assert '"method":"GET","route":"/metrics","status":200,' in service.log
    for each in secrets:
        assert each not in service.log
        assert digest(each).hex() not in service.log


def exchange(service: HttpProcess, *parts: bytes) -> bytes:
    """All that comes back on a connection until the service closes it."""
    url = httpx.URL(service.url)
    with socket.create_connection((url.host, url.port or 80), PATIENCE) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            # It had closed before all was sent; what it said may have come, or not.
            pass
        return answer


def test_a_body_that_comes_too_slowly_is_hung_up_on(service: ServerProcess, secret: str) -> None:
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: a.example\r\nAuthorization: Bearer {secret}\r\nX-Request-Timeout: 0.5\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    answer = exchange(service, head.encode(), b'{"images": [')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"slow_body"' in answer
    assert b"x-request-id: " in answer


def test_a_head_without_end_is_hung_up_on(service: ServerProcess) -> None:
    line = b"X-Filler: " + b"a" * 1000 + b"\r\n"
    for beginning in (b"GET /healthz HTTP/1.1\r\nHost: a\r\n", b"GET /" + b"a" * 100_000):
        answer = exchange(service, beginning, *[line] * 1000)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert httpx.get(f"{service.url}/healthz", timeout=PATIENCE).status_code == 200


# Replicas.


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(Path(directory)).start()
        yield server
        server.stop()


@pytest.fixture
def replicas(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[[Path], list[ApiProcess]]]:
    """Starts two `tarflow api`."""
    started: list[ApiProcess] = []

    def start(keys: Path) -> list[ApiProcess]:
        for number in range(2):
            flags = ["--keys", str(keys), "--log-level", "debug", "--metrics-port", "0"]
            started.append(ApiProcess(tmp_path / f"log-{number}", redis_server.url, *flags))
        return started

    yield start
    for process in started:
        process.kill()


@pytest.mark.anyio
async def test_a_rate_is_exact_over_two_replicas_and_closed_without_redis(
    replicas: Callable[[Path], list[ApiProcess]],
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.toml"
    limited = new_key(keys, "limited", "--scope", "infer", "--rate", f"{MOST}/hour")
    free = new_key(keys, "free", "--scope", "infer")
    started = replicas(keys)
    urls = [process.url for process in started]

    async def get(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.get(f"{urls[number % 2]}/v1/models", headers=bearer(limited))

    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        responses = await asyncio.gather(*(get(client, number) for number in range(3 * MOST)))
        assert Counter(response.status_code for response in responses) == {200: MOST, 429: 2 * MOST}
        left = [int(r.headers["x-ratelimit-remaining-requests"]) for r in responses if r.status_code == 200]
        assert sorted(left) == list(range(MOST))
        for response in responses:
            if response.status_code == 429:
                assert response.json()["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(response.headers["retry-after"]) <= 3600
        assert (await client.get(f"{urls[0]}/v1/models", headers=bearer(free))).status_code == 200
        redis_server.stop()
        try:
            for number in range(2):
                refused = await get(client, number)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "broker_unreachable")
                assert refused.headers["retry-after"]
        finally:
            redis_server.start()
    for process in started:
        assert limited not in process.log
        assert free not in process.log
