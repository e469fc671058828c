"""Requests without end, from a process of its own so that they do not count as the service's.

``python -m benchmarks.load`` reads one JSON :class:`Load` from its input and prints what became of every request. It
speaks plain HTTP/1.1 over kept connections: a client library would take as long as what it measures.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from model.images import encode_image

OK = 200


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for, and how often."""

    urls: list[str]
    """Services, taken in turns."""
    kind: str
    """score: one random image of 28x28; sample: one guided, denoised image."""
    seconds: float
    concurrency: int = 0
    """Requests on their way at all times; 0 for an open loop."""
    rate: float = 0.0
    """Requests a second of an open loop, answered or not."""
    path: str = ""
    """Instead of the service's own."""
    as_json: bool = False
    """Images as base64 in JSON, and not as files."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What became of the requests; seconds from the load's start."""

    sent: list[float]
    seconds: list[float]
    """How long each took."""
    statuses: list[int]
    """0 where the connection broke."""

    def of(self, status: int | None = OK, after: float = 0.0) -> list[float]:
        """How long those with a status took, or with any that is not 200, in order; sent after so many seconds."""
        rows = zip(self.sent, self.seconds, self.statuses, strict=True)
        return sorted(took for sent, took, got in rows if sent >= after and (got == status if status else got != OK))

    @property
    def throughput(self) -> float:
        """Requests a second that were answered well, from the first such answer to the last.

        Answers come in batches: what came with the first one is not counted, since its work began before; unless
        nothing came later.
        """
        rows = zip(self.sent, self.seconds, self.statuses, strict=True)
        ended = sorted(sent + took for sent, took, got in rows if got == OK)
        if not ended:
            return 0.0
        later = [end for end in ended if end > ended[0] + 0.1]
        return len(later) / (later[-1] - ended[0]) if later else len(ended) / ended[-1]


def percentile(values: list[float], share: float) -> float:
    """The smallest of sorted values that so large a share does not exceed; nan of none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def image_file(number: int) -> bytes:
    """A PNG file of random pixels."""
    return encode_image(np.random.default_rng(number).integers(0, 256, (1, 28, 28), dtype=np.uint8), "png")


def _request(load: Load, host: str, number: int) -> bytes:
    """The bytes of one request."""
    if load.kind == "score" and load.as_json:
        kind = "application/json"
        body = json.dumps({"images": [base64.b64encode(image_file(number % 16)).decode()]}).encode()
    elif load.kind == "score":
        kind = "multipart/form-data; boundary=frontier"
        head = b'--frontier\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + image_file(number % 16) + b"\r\n--frontier--\r\n"
    else:
        kind = "application/json"
        wanted = {"seed": number, "num_images": 1, "guidance_scale": 1.0, "denoise": True, "class": number % 10}
        body = json.dumps(wanted).encode()
    path = load.path or f"/v1/{load.kind}"
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Client:
    """Connections to the services, used again."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._places = [urlsplit(url) for url in load.urls]
        self._free: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self._start = time.perf_counter()
        self._number = 0
        self.rows: list[tuple[float, float, int]] = []

    async def ask(self) -> None:
        """One request, noted."""
        number = self._number
        self._number += 1
        begun = time.perf_counter()
        try:
            status = await self._exchange(number)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            status = 0
        self.rows.append((begun - self._start, time.perf_counter() - begun, status))

    async def _exchange(self, number: int) -> int:
        which = number % len(self._places)
        place, free = self._places[which], self._free.setdefault(which, [])
        # One that a burst has opened may have been closed by the service since, which waits only so long for more.
        while free and free[-1][0].at_eof():
            free.pop()[1].close()
        reader, writer = free.pop() if free else await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(_request(self._load, place.netloc, number))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = next(line for line in head.split("\r\n") if line.startswith("content-length:"))
            await reader.readexactly(int(length.partition(":")[2]))
        except BaseException:
            writer.close()
            raise
        if "connection: close" in head:
            writer.close()
        else:
            free.append((reader, writer))
        return int(head.split()[1])

    async def closed(self, until: float) -> None:
        """One request after the other."""
        while time.perf_counter() < until:
            await self.ask()


async def _run(load: Load) -> list[tuple[float, float, int]]:
    client = _Client(load)
    start = time.perf_counter()
    until = start + load.seconds
    if load.concurrency:
        await asyncio.gather(*(client.closed(until) for _ in range(load.concurrency)))
        return client.rows
    tasks = []
    for number in range(int(load.seconds * load.rate)):
        await asyncio.sleep(max(0.0, start + number / load.rate - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask()))
    await asyncio.gather(*tasks)
    return client.rows


@contextmanager
def loading(load: Load) -> Iterator[subprocess.Popen[str]]:
    """A load in a process of its own; :func:`answers` waits for its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        process.stdin.write(json.dumps(asdict(load)))
        process.stdin.close()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def answers(process: subprocess.Popen[str]) -> Answers:
    """What a load has found."""
    assert process.stdout is not None  # noqa: S101 - a pipe was asked for
    rows = json.loads(process.stdout.read())
    if process.wait() != 0:
        raise RuntimeError("the load generator failed; what it said is above")
    sent, seconds, statuses = zip(*sorted(rows), strict=True)
    return Answers(sent=list(sent), seconds=list(seconds), statuses=list(statuses))


def apply(load: Load) -> Answers:
    """Run one load to its end."""
    with loading(load) as process:
        return answers(process)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_run(Load(**json.load(sys.stdin))))))
