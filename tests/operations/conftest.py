"""Redis, an API process with keys and a worker, watched by a real Prometheus with the configuration that is shipped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from model.config import NoiseProtocol
from service.access.keys import digest, made, written
from service.local import import_checkpoint
from tests.faults.cluster import Cluster, free_port
from tests.service.conftest import CLASSES, REFERENCE, calibrated, set_calibration
from tests.service.pictures import b64, file, normal
from tests.service.processes import PATIENCE, ApiProcess, Process, WorkerProcess, wait_until

DOCKER = Path(__file__).parents[2] / "docker"
SECRETS = {"acme": "tarflow_secret-of-acme", "prometheus": "tarflow_secret-of-prometheus"}
TINY = {"model": "tiny-cond", "num_images": 2, "seed": 0}
REQUEST_ID = "a-request-of-acme"
NOTHING = "/v1/nothing-that-anybody-should-log"


class Prometheus(Process):
    """The real one."""

    def __init__(self, directory: Path, config: Path) -> None:
        self._url = f"http://127.0.0.1:{free_port()}"
        flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}", "--log.level=warn"]
        command: list[str | Path] = ["prometheus", *flags, f"--web.listen-address={self._url.removeprefix('http://')}"]
        super().__init__(directory / "log", command, {})

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        response = httpx.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=PATIENCE)
        body = response.json()
        assert body["status"] == "success", (parameters, body)
        return body["data"]

    def answers(self) -> bool:
        """Whether it has started."""
        assert self.process.poll() is None, self.log
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def value(self, expression: str) -> list[dict[str, Any]]:
        """What a query comes to now."""
        found: list[dict[str, Any]] = self.ask("query", query=expression, time=str(time.time()))["result"]
        return found


@dataclass(frozen=True)
class Deployment:
    """All of it."""

    api: ApiProcess
    worker: WorkerProcess
    worker_url: str
    prometheus: Prometheus

    def scraped(self) -> tuple[str, str]:
        """What the API process and the worker tell Prometheus."""
        headers = {"authorization": f"Bearer {SECRETS['prometheus']}"}
        api = httpx.get(f"{self.api.url}/metrics", headers=headers, timeout=PATIENCE)
        assert api.status_code == 200, api.text
        return api.text, httpx.get(f"{self.worker_url}/metrics", timeout=PATIENCE).text


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-cond, and tiny-uncond with a calibration."""
    directory, noise = tmp_path_factory.mktemp("models"), NoiseProtocol(kind="gaussian", std=0.05)
    for name, checkpoint, classes in (("tiny-cond", "tiny_cond", CLASSES), ("tiny-uncond", "tiny_uncond", None)):
        import_checkpoint(REFERENCE / f"{checkpoint}.pth", directory / name, noise, name=name, class_names=classes)
    set_calibration(directory / "tiny-uncond", calibrated(directory / "tiny-uncond"))
    return directory


@pytest.fixture(scope="session")
def deployment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Started and used a little."""
    directory = tmp_path_factory.mktemp("deployment")
    keys, port = directory / "keys.toml", free_port()
    keys.write_text(
        written("acme", made(sha256=digest(SECRETS["acme"]).hex(), scopes=["infer"]))
        + written("prometheus", made(sha256=digest(SECRETS["prometheus"]).hex(), scopes=["metrics"]))
    )
    cluster = Cluster(directory, models)
    prometheus: Prometheus | None = None
    try:
        api = cluster.api("--keys", keys, "--log-level", "debug")
        worker = cluster.worker("--metrics-port", str(port), "--log-level", "debug")
        wait_until(lambda: api.process.poll() is not None or api.is_ready(), "a worker is ready")
        # The first scrape must see counters before they count.
        prometheus = Prometheus(directory, substituted(directory, {"api:8000": api.url, "worker:9100": str(port)}))
        wait_until(prometheus.answers, "Prometheus answers")
        watched = Deployment(api, worker, f"http://127.0.0.1:{port}", prometheus)
        wait_until(lambda: len(prometheus.value("up == 1")) == 2, "both are scraped")
        use(api)
        yield watched
        for process in (api, worker, prometheus):
            assert process.stop() == 0, process.log
    finally:
        if prometheus is not None:
            prometheus.kill()
        cluster.close()


def substituted(directory: Path, targets: dict[str, str]) -> Path:
    """The configuration that is shipped, with other addresses, a key, and oftener."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        [known] = job["static_configs"]
        ports = [targets.pop(target).rpartition(":")[2] for target in known["targets"]]
        known["targets"] = [f"127.0.0.1:{port}" for port in ports]
        if job["job_name"] == "tarflow-api":
            (directory / "key").write_text(SECRETS["prometheus"])
            job["authorization"] = {"credentials_file": str(directory / "key")}
    assert not targets
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def use(api: ApiProcess) -> None:
    """A bit of everything: samples, a verdict, a job for later, mistakes."""
    images = [b64(file(image)) for image in normal(3)]
    headers = {"authorization": f"Bearer {SECRETS['acme']}"}
    with httpx.Client(base_url=api.url, headers=headers, timeout=PATIENCE) as client:

        def post(path: str, body: dict[str, Any], status: int, **more: str) -> httpx.Response:
            response = client.post(path, json=body, headers=more)
            assert response.status_code == status, response.text
            return response

        post("/v1/sample?secret=in-a-query", {**TINY, "certify": True}, 200, **{"x-request-id": REQUEST_ID})
        post("/v1/sample", {**TINY, "solver": "jacobi"}, 200)
        post("/v1/score", {"model": "tiny-uncond", "images": images, "alpha": 0.1}, 200)
        later = post("/v1/sample", TINY, 202, prefer="respond-async").json()["id"]
        assert client.get(f"/v1/jobs/{later}", params={"wait": 60}).json()["state"] == "completed"
        post("/v1/sample", {**TINY, "class": "wolf"}, 422)
        post("/v1/sample", TINY, 422, **{"x-request-timeout": "never"})
        assert client.get(NOTHING).status_code == 404
        wrong = {"authorization": "Bearer tarflow_wrong-secret"}
        assert client.post("/v1/sample", json=TINY, headers=wrong).status_code == 401
