"""docker-compose.yml is valid, starts with what is here, and opens nothing to others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from service.access.binding import check_binding
from service.settings import ApiSettings, SharedSettings, WorkerSettings
from tests.docker import dockerfile
from tests.docker.compose import PATH, ROOT, deployment, mounts, raw, seconds
from tests.faults.cluster import free_port
from tests.service.processes import PATIENCE, answers, wait_until

FORMS: dict[str, type[SharedSettings]] = {
    "api": ApiSettings,
    "worker": WorkerSettings,
    "worker-cpu": WorkerSettings,
}
"""What the services of our images run."""
PASSWORD = "letters4nd1digits"  # noqa: S105
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?")


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    """Judge a file by the schema of the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def variables(service: str, compose: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a service of ours: its image's, then what Compose sets."""
    described = compose["services"][service]
    return dockerfile.variables(described["build"]["target"]) | described["environment"]


def settings(service: str, monkeypatch: pytest.MonkeyPatch, **given: str) -> SharedSettings:
    """The settings that a service of ours starts with."""
    for name, value in variables(service, deployment(**given)).items():
        if name.startswith("TARFLOW_"):
            monkeypatch.setenv(name, value)
    return FORMS[service]()


def test_it_is_valid_by_the_specification(tmp_path: Path) -> None:
    done = check_schema(PATH)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(yaml.safe_dump(raw() | {"services": {"api": {"image": "api", "prots": ["8000:8000"]}}}))
    done = check_schema(wrong)
    assert done.returncode == 1
    assert "prots" in done.stdout


def test_all_that_is_mounted_exists() -> None:
    compose = deployment()
    for name, service in compose["services"].items():
        for source, target in mounts(service):
            assert source in compose["volumes"] or (ROOT / source).exists(), f"{name}: {source} for {target}"


def test_images_are_pinned_or_built_here() -> None:
    targets = set()
    for name, service in deployment()["services"].items():
        if "build" not in service:
            assert PINNED.fullmatch(service["image"]), service["image"]
            continue
        build = service["build"]
        assert name in FORMS
        assert ROOT / build["context"] / build["dockerfile"] == dockerfile.PATH
        assert service["image"] == f"tarflow-{build['target']}"
        targets.add(build["target"])
    assert targets == {"api", "worker"}
    assert targets < set(dockerfile.stages())


@pytest.mark.parametrize("service", FORMS)
def test_variables_are_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[service]
    known = {f"TARFLOW_{name.upper()}" for name in form.model_fields}
    assert set(deployment()["services"][service]["environment"]) <= known
    built = settings(service, monkeypatch)
    # Their values are those that the process really has.
    assert "TARFLOW_REDIS" in variables(service, deployment())
    if isinstance(built, ApiSettings):
        check_binding(built)
        assert (built.host, built.port) == ("0.0.0.0", 8000)
        patience = built.drain_seconds + 10
    else:
        assert isinstance(built, WorkerSettings)
        [(source, target)] = mounts(deployment()["services"][service])
        assert (ROOT / source, Path(target)) == (ROOT / "model" / "bundled", built.models)
        assert built.device == ("cpu" if service == "worker-cpu" else "cuda")
        patience = built.grace_seconds + 15
    assert seconds(deployment()["services"][service]["stop_grace_period"]) >= patience


def test_your_own_models_are_one_variable(tmp_path: Path) -> None:
    for service in ("worker", "worker-cpu"):
        [volume] = deployment(TARFLOW_MODELS=str(tmp_path))["services"][service]["volumes"]
        assert (volume["source"], volume["read_only"]) == (str(tmp_path), True)
        # A directory that is not there is an error, and not made.
        assert volume["bind"] == {"create_host_path": False}


def test_only_this_host_reaches_what_is_published() -> None:
    services = deployment(TARFLOW_PORT="8080")["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {
        "api": ["127.0.0.1:8080:8000"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert {name for name, service in services.items() if "queue" in service.get("networks", ())} == {"redis", *FORMS}
    assert services["redis"]["networks"] == ["queue"]
    assert deployment()["networks"]["queue"] == {"internal": True}


def test_no_secret_is_in_the_file() -> None:
    """Neither a password nor one that Grafana would have if it were told nothing."""
    for service in raw()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH$|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:-\}", value), name
    assert raw()["services"]["api"]["environment"]["TARFLOW_REDIS"] == "redis://:${REDIS_PASSWORD:-}@redis:6379/0"
    grafana = deployment()["services"]["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert (grafana["GF_AUTH_ANONYMOUS_ENABLED"], grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")


def test_one_profile_for_each_kind_of_host() -> None:
    services = deployment()["services"]
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        "worker": ["gpu"],
        "worker-cpu": ["cpu"],
    }
    [reservation] = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (reservation["driver"], reservation["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in services["worker-cpu"]


def test_who_dies_is_started_again_and_all_tell_their_health() -> None:
    services = deployment()["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert "healthcheck" in service or dockerfile.words(service["build"]["target"], "HEALTHCHECK"), name
        for other in service.get("depends_on", ()):
            assert "profiles" not in services[other], f"{name} waits for {other}, which may not be started"


def test_prometheus_finds_what_it_scrapes() -> None:
    services = deployment()["services"]
    assert services["worker-cpu"]["networks"]["default"] == {"aliases": ["worker"]}
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    targets = [t for job in scrape["scrape_configs"] for group in job["static_configs"] for t in group["targets"]]
    asked = dict(target.split(":") for target in targets if not target.startswith("localhost:"))
    assert asked == {"api": "8000", "worker": "9100"}
    for name, port in asked.items():
        assert port in dockerfile.last(name, "EXPOSE").split()


@pytest.mark.parametrize("password", ["", PASSWORD])
def test_redis_starts_and_keeps_what_it_accepts(password: str, tmp_path: Path) -> None:
    """The real server, with the command and the file that Compose gives it."""
    given = {"REDIS_PASSWORD": password, "REDIS_MEMORY": "64mb"}
    compose = deployment(**given)
    service, port = compose["services"]["redis"], free_port()
    [(source, target)] = [pair for pair in mounts(service) if pair[0].endswith(".conf")]
    command = [str(ROOT / source) if word == target else word for word in service["command"]]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)], stdout=log
        )
    try:
        [url] = {variables(name, compose)["TARFLOW_REDIS"] for name in FORMS}
        with redis.Redis.from_url(url.replace("redis:6379", f"127.0.0.1:{port}"), protocol=2) as client:
            wait_until(lambda: process.poll() is not None or answers(client), "Redis answers")
            found = {
                name: client.config_get(name)[name]
                for name in ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "save")
            }
        assert found == {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": str(64 * 2**20),
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        with redis.Redis(port=port, protocol=2) as anybody:
            assert answers(anybody) == (not password)
        # As its healthcheck asks.
        asked = subprocess.run(
            ["sh", "-c", service["healthcheck"]["test"][1].replace("redis-cli", f"redis-cli -p {port}")],
            env={"PATH": "/usr/bin:/bin", **service["environment"]},
            check=False,
        )
        assert asked.returncode == 0
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert process.returncode == 0
