"""docs/deployment.md stays true: its figures, its override for Compose, and how it says to talk to Redis."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml

from model.config import NoiseProtocol
from service.api.jobs.streaming import KEEP_ALIVE_SECONDS
from service.local import import_checkpoint
from service.server import KEEP_ALIVE_SECONDS as CONNECTION_SECONDS
from service.settings import ApiSettings, ServeSettings, Settings, WorkerSettings
from tests.docker.compose import ROOT, raw
from tests.docker.test_compose import FORMS, check_schema
from tests.faults.cluster import free_port
from tests.service.pictures import answered, file, normal
from tests.service.processes import ApiProcess, Process, WorkerProcess, answers, environment, tarflow, wait_until

GUIDE = (ROOT / "docs" / "deployment.md").read_text()
PASSWORD = "open-sesame"  # noqa: S105


def blocks(language: str) -> list[str]:
    """The guide's code in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == language]


def default(name: str) -> int:
    return int(Settings.model_fields[name].default)


def test_the_override_fits_the_file_and_the_settings(tmp_path: Path) -> None:
    [block] = blocks("yaml")
    path = tmp_path / "docker-compose.override.yml"
    path.write_text(block)
    done = check_schema(path)
    assert done.returncode == 0, done.stdout
    override = yaml.safe_load(block)["services"]
    assert override.keys() <= raw()["services"].keys()
    known = {f"TARFLOW_{name.upper()}" for name in FORMS["api"].model_fields}
    assert override["api"]["environment"].keys() <= known


def test_variables_of_compose_are_all_there() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", GUIDE, re.MULTILINE))
    assert listed == used | {"COMPOSE_PROFILES"}


def test_settings_exist() -> None:
    others = {
        "help",
        "build",
        "build-arg",
        "extra-index-url",
        "target",
        "gpus",
        "rm",
        "user",
        "profile",
        "wait",
        "time",
    }
    others |= {"scope", "scale", "devices"}
    known = {
        name.replace("_", "-") for form in (ServeSettings, ApiSettings, WorkerSettings) for name in form.model_fields
    }
    assert set(re.findall(r"(?<![-\w])--([a-z][a-z-]*)", GUIDE)) - others <= known


def test_its_figures_are_those_of_the_service() -> None:
    [proxy] = blocks("nginx")
    limit, patience = re.search(r"client_max_body_size (\d+)m;", proxy), re.search(r"proxy_read_timeout (\d+)s;", proxy)
    assert limit is not None
    assert patience is not None
    assert int(limit[1]) * 2**20 >= default("max_calibration_bytes")
    assert int(patience[1]) > default("request_timeout")
    assert f"comment every {KEEP_ALIVE_SECONDS:g} seconds" in GUIDE
    assert f"kept for {CONNECTION_SECONDS} seconds" in GUIDE
    assert f"default of {default('max_queue_cost'):,} (`--max-queue-cost`) is 50 seconds" in GUIDE
    assert default("max_queue_cost") / 40_000 == 50
    assert f"below `--request-timeout` ({default('request_timeout')} seconds)" in GUIDE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    directory = tmp_path_factory.mktemp("models")
    checkpoint, noise = ROOT / "tests" / "reference" / "tiny_uncond.pth", NoiseProtocol(kind="gaussian", std=0.05)
    import_checkpoint(checkpoint, directory / "tiny", noise, name="tiny", class_names=None)
    return directory


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """URL of a Redis that speaks TLS only, and knows nobody but the guide's account."""
    certificate, key, port = tmp_path / "queue.pem", tmp_path / "queue.key", free_port()
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    new += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    subprocess.run([*new, certificate], check=True, capture_output=True)
    [account] = [block for block in blocks("") if block.startswith("user ")]
    lines = ["port 0", f"tls-port {port}", "tls-auth-clients no", f"tls-cert-file {certificate}", f"tls-key-file {key}"]
    lines += [f"tls-ca-cert-file {certificate}", "bind 127.0.0.1", f"dir {tmp_path}", "user default off"]
    settings = tmp_path / "redis.conf"
    settings.write_text("\n".join([*lines, account.replace("PASSWORD", PASSWORD)]))
    process = Process(
        tmp_path / "redis.log", ["redis-server", settings, "--maxmemory-policy", "noeviction"], environment()
    )
    [example] = [line for block in blocks("") for line in block.splitlines() if "rediss://" in line]
    url = example.partition("=")[2].replace("PASSWORD", PASSWORD)
    url = url.replace("queue.internal:6380", f"127.0.0.1:{port}").replace("/etc/ssl/queue.pem", str(certificate))
    with redis.Redis.from_url(url, protocol=2) as client:
        wait_until(lambda: process.process.poll() is not None or answers(client), "Redis answers")
    yield url
    process.kill()


def test_everything_works_with_tls_and_an_account_of_its_own(guarded: str, models: Path, tmp_path: Path) -> None:
    """Jobs, calibrations and rates, each with its own connections; and nothing beyond the prefix is open."""
    with redis.Redis.from_url(guarded, protocol=2) as client:
        for forbidden in (["GET", "other"], ["FLUSHALL"], ["CONFIG", "SET", "maxmemory", "1"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden)
    keys = tmp_path / "keys.toml"
    secret = tarflow("keys", "new", "acme", "--scope", "infer", "--rate", "1000/minute", "--keys", keys).stdout.strip()
    api = ApiProcess(tmp_path / "api.log", guarded, "--keys", keys)
    worker = WorkerProcess(tmp_path / "worker.log", guarded, "--models", models)
    try:
        wait_until(lambda: worker.process.poll() is not None or api.is_ready(), "a worker is ready")
        with api.client() as client:
            client.headers["authorization"] = f"Bearer {secret}"
            answer = client.post("/v1/sample", json={"seed": 1})
            assert len(answered(answer)) == 1
            assert answer.headers["x-ratelimit-remaining-requests"] == "999"
            files = [("files", (f"{i}.png", file(image))) for i, image in enumerate(normal(24))]
            made = client.post("/v1/calibrations", data={"name": "mine"}, files=files)
            assert made.status_code == 202, made.text

            def state() -> str:
                return str(client.get("/v1/calibrations/mine").json()["status"])

            wait_until(lambda: state() != "running", "it is made")
            judged = client.post("/v1/score", data={"calibration": "mine", "alpha": "0.2"}, files=files[:1])
            assert judged.status_code == 200, judged.text
        # It may ask for what matters of Redis's configuration, and warns.
        wait_until(lambda: "has appendonly no" in api.log, "it warns")
        assert worker.stop() == api.stop() == 0
        assert PASSWORD not in api.log + worker.log
        assert "Traceback" not in api.log + worker.log
    finally:
        for process in (api, worker):
            process.kill()
