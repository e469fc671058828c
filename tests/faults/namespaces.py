"""Two hosts, played by two network namespaces, with a worker each; and the cable of one of them is pulled.

``sudo .venv/bin/python -m tests.faults.namespaces`` needs root, iproute2 and redis-server. Redis and the API are on the
host, at the end of a cable (a veth pair) to each namespace. It is not part of the suite, since few CI machines may make
namespaces. It ends with status 1 when a job is lost or answered twice.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import redis

from model.bundle import BUNDLED
from tests.faults.cluster import READY_SECONDS, SHARED, free_port
from tests.service.processes import PATIENCE, TARFLOW, ApiProcess, Process, environment, metric, wait_until

JOBS = 40
SAMPLE = {"num_images": 2, "guidance_scale": 1.0, "denoise": True}


def run(*command: str) -> None:
    """One command of the system, which must succeed."""
    subprocess.run(command, check=True)


class Namespace:
    """A network namespace with a cable to this host."""

    def __init__(self, number: int) -> None:
        self.name, self.cable = f"tarflow{number}", f"tarflow{number}"
        self.host, self.inside = f"10.213.{number}.1", f"10.213.{number}.2"

    @contextmanager
    def made(self) -> Iterator[Namespace]:
        """There as long as it is needed."""
        run("ip", "netns", "add", self.name)
        try:
            run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            run("ip", "address", "add", f"{self.host}/24", "dev", self.cable)
            self.plug()
            run("ip", "-n", self.name, "address", "add", f"{self.inside}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", self.name, "link", "set", device, "up")
            yield self
        finally:
            run("ip", "netns", "del", self.name)  # and with it the cable

    def plug(self) -> None:
        """Put the cable in."""
        run("ip", "link", "set", self.cable, "up")

    def pull(self) -> None:
        """Pull the cable: nothing gets through, and nobody is told."""
        run("ip", "link", "set", self.cable, "down")

    def worker(self, log: Path, port: int) -> Process:
        """A worker in here."""
        command: list[str | Path] = ["ip", "netns", "exec", self.name, TARFLOW, "worker", "--device", "cpu"]
        command += ["--threads", "1", "--models", BUNDLED, *SHARED]
        return Process(log, command, environment(TARFLOW_REDIS=f"redis://{self.host}:{port}/0"))


def _drawn(api: ApiProcess) -> Counter[str]:
    """Images by worker."""
    text = api.get("/metrics").text
    workers = [worker["id"] for worker in api.get("/readyz").json()["workers"]]
    return Counter({name: int(metric(text, "tarflow_images_total", worker=name, op="sample")) for name in workers})


def _ask(url: str, seed: int) -> int:
    answer = httpx.post(f"{url}/v1/sample", json={**SAMPLE, "seed": seed}, timeout=PATIENCE)
    return answer.status_code


def main() -> int:
    """Work on both sides, pull a cable in the middle, put it back."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [stack.enter_context(Namespace(number).made()) for number in (1, 2)]
        port = free_port()
        listens = ["127.0.0.1", *(side.host for side in sides)]
        command = ["redis-server", "--port", str(port), "--bind", *listens, "--protected-mode", "no", "--save", ""]
        server = Process(
            directory / "redis.log", [*command, "--appendonly", "yes", "--dir", str(directory)], environment()
        )
        stack.callback(server.kill)
        client = redis.Redis(port=port, protocol=2)
        stack.callback(client.close)
        wait_until(lambda: _answers(client), "Redis answers")
        for number, side in enumerate(sides):
            stack.callback(side.worker(directory / f"worker-{number}.log", port).kill)
        api = ApiProcess(directory / "api.log", f"redis://127.0.0.1:{port}/0", *SHARED)
        stack.callback(api.kill)
        api.wait_ready(workers=2)
        print("a worker in each of two namespaces is ready")
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(_ask, api.url, seed) for seed in range(JOBS)]
            wait_until(lambda: sum(future.done() for future in asked) > JOBS // 4, "some are drawn")
            both = _drawn(api)
            sides[0].pull()
            print(f"by worker {dict(both)}; a cable is pulled")
            statuses = Counter(future.result() for future in asked)
        print(f"answers by status {dict(statuses)}")
        wait_until(lambda: len(api.get("/readyz").json()["workers"]) == 1, f"one is missed for {READY_SECONDS:g} s")
        sides[0].plug()
        api.wait_ready(workers=2)
        with ThreadPoolExecutor(16) as pool:
            again = Counter(pool.map(lambda seed: _ask(api.url, seed), range(JOBS)))
        after = _drawn(api)
        print(f"the cable is back; answers by status {dict(again)}, by worker {dict(after)}")
        worked = len(both) == 2 and all(both.values()) and len(after) == 2 and all(after.values())
        ok = statuses == again == Counter({200: JOBS}) and worked
        print("nothing was lost" if ok else "FAILED")
        return 0 if ok else 1


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


if __name__ == "__main__":
    sys.exit(main())
