"""The images are built, and do what they are for: minutes, and some gigabytes of disk, so `make verify` runs this."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docker import dockerfile
from tests.docker.images import USER, Builder, Container, builder
from tests.faults.cluster import free_port
from tests.service.pictures import answered, file, pixels
from tests.service.processes import PATIENCE, RedisProcess, metric, wait_until

pytestmark = pytest.mark.long
LARGEST_API = 250e6
"""Bytes that the api's image may have beyond its base."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    """All images, built."""
    with builder(tmp_path_factory.mktemp("images")) as made:
        for target in dockerfile.TARGETS:
            made.build(target)
        yield made


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis."""
    process = RedisProcess(tmp_path / "redis", free_port())
    yield process
    process.kill()


def check_answers(url: str) -> None:
    """Draw an image and score it."""
    body = {"class": "Ankle boot", "seed": 7}
    assert len(answered(httpx.post(f"{url}/v1/sample", json=body, timeout=PATIENCE))) == 1
    scored = httpx.post(f"{url}/v1/score", files={"files": file(pixels())}, timeout=PATIENCE)
    assert scored.status_code == 200, scored.text
    assert scored.json()["images"][0]["bits_per_dim"] > 0


def check_leaves(container: Container) -> None:
    """It runs without privileges, and SIGTERM ends it in order."""
    assert container.user() == USER
    assert container.stop() == 0, container.log
    assert "Traceback" not in container.log


def test_sizes(images: Builder) -> None:
    sizes = {target: images.added_bytes(target) for target in dockerfile.TARGETS}
    for target, size in sizes.items():
        print(f"{target}: {size / 1e6:.0f} MB beyond its base")
    assert sizes["api"] < LARGEST_API
    assert sizes["api"] < sizes["worker"]


def test_the_api_has_neither_torch_nor_models(images: Builder) -> None:
    program = (
        "import importlib.util, pathlib, service.app, model;"
        "print(importlib.util.find_spec('torch'), (pathlib.Path(model.__file__).parent / 'bundled').exists())"
    )
    assert images.output("api", ["python3", "-c", program]) == "None False"
    assert images.output("worker", ["python3", "-c", program.replace("service.app", "torch")]).endswith(" True")


@pytest.mark.parametrize("target", dockerfile.TARGETS)
def test_an_image_holds_what_the_dockerfile_says(images: Builder, target: str) -> None:
    config = images.config(target)
    assert config["User"] == str(USER)
    assert images.output(target, ["id", "-u"]) == str(USER)
    set_here = {pair.partition("=")[0] for pair in config["Env"]}
    assert dockerfile.variables(target).keys() <= set_here
    assert not [name for name in set_here if re.search(r"PIP_|PROXY|PASSWORD|TOKEN|SECRET|KEY", name, re.IGNORECASE)]
    # Its own code cannot be changed from within, and there is nothing to install more with.
    script = "test ! -w /opt/tarflow/bin/tarflow && test ! -e /opt/tarflow/bin/pip && tarflow --help"
    assert "Serve, train and use" in images.output(target, ["sh", "-c", script])


def test_api_and_worker_serve_together(images: Builder, queue: RedisProcess) -> None:
    port, metrics_port = free_port(), free_port()
    url, asked_at = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
    shared = {"TARFLOW_REDIS": queue.url, "OMP_NUM_THREADS": "1"}
    api = images.start("api", {**shared, "TARFLOW_HOST": "127.0.0.1", "TARFLOW_PORT": str(port)})
    worker = images.start("worker", {**shared, "TARFLOW_METRICS_PORT": str(metrics_port), "TARFLOW_DEVICE": "cpu"})
    try:
        for container in (api, worker):
            wait_until(lambda c=container: c.process.poll() is not None or c.healthy(), f"{container.name} is healthy")
            assert container.process.poll() is None, container.log
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the api knows of the worker")
        check_answers(url)
        assert metric(httpx.get(f"{asked_at}/metrics").text, "tarflow_images_total", op="sample") == 1
        check_leaves(worker)
        # It is alive, though nobody works for it.
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503, "nobody is ready")
        assert api.healthy()
        check_leaves(api)
    finally:
        for container in (api, worker):
            container.kill()


def test_the_image_of_a_plain_build_answers_by_itself(images: Builder) -> None:
    port = free_port()
    given = {"TARFLOW_HOST": "127.0.0.1", "TARFLOW_PORT": str(port), "TARFLOW_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    service = images.start("serve", given)
    try:
        wait_until(lambda: service.process.poll() is not None or service.healthy(), "it is ready")
        check_answers(f"http://127.0.0.1:{port}")
        check_leaves(service)
    finally:
        service.kill()
