"""Thousands of damaged images: none stops the service, none is its fault, none stays in its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.damage import damaged, hostile, valid
from tests.service.pictures import b64
from tests.service.processes import ServerProcess

CLIENTS = 4
"""As many as decode at the same time."""
REFUSALS = {"invalid_image", "empty_image", "image_too_large", "animated_image", "unsupported_image"}
GROWTH = 64 * 2**20
"""Bytes by which a process may have grown when its images are gone; one of the largest takes more."""


def resident(pids: Iterable[int]) -> dict[int, int]:
    """Bytes of memory that processes hold."""
    sizes = {}
    for pid in pids:
        [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
        sizes[pid] = 1024 * int(line.split()[1])
    return sizes


def _sent(client: httpx.Client, number: int, name: str, data: bytes) -> str:
    """Send one image, as a file or in JSON; its fate, which the service must name."""
    if number % 4:
        files = {"files": ("image", data)}
        answer = client.post("/v1/score", files=files, data={"model": "tiny-uncond", "alpha": "0.1"})
    else:
        answer = client.post("/v1/score", json={"model": "tiny-uncond", "images": [b64(data)]})
    content = answer.json()
    if answer.status_code == httpx.codes.OK:
        assert content["images"][0]["log_likelihood"] is not None, name
        return "scored"
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY, (name, answer.status_code, answer.text)
    assert content["error"]["param"] in ("files.0", "images.0"), (name, answer.text)
    assert content["error"]["code"] in REFUSALS, (name, answer.text)
    return str(content["error"]["code"])


def test_what_is_whole_is_read_or_refused_for_what_it_is(client: httpx.Client) -> None:
    """The files that damage is done to are good ones: otherwise it would show nothing."""
    readable = ("png", "jpeg", "webp", "gif", "bmp", "tiff")
    expected = {"frames": "animated_image", "float": "unsupported_image", "signed": "unsupported_image"}
    for number, (name, data) in enumerate(valid().items()):
        kind, _, what = name.partition(" ")
        fate = "invalid_image" if kind not in readable else expected.get(what, "scored")
        assert _sent(client, number, name, data) == fate, name


@pytest.mark.parametrize(("rounds", "count"), [(3, 200), pytest.param(10, 1000, marks=pytest.mark.long)])
def test_damaged_images_harm_nobody(server: ServerProcess, client: httpx.Client, rounds: int, count: int) -> None:
    """Every image is scored or refused by name, by the same processes from the first to the last, which are as large
    after the last round as after the first: that one loads decoders and starts threads, which stay.
    """
    processes = [server.process.pid, server.worker()]
    fates: Counter[str] = Counter()
    sizes = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for seed in range(rounds):
            files = list(damaged(count, seed))
            sent = pool.map(lambda number, case: _sent(client, number, *case), range(count), files)
            fates.update(sent)
            sizes.append(resident(processes))
    print(f"{rounds * count} images: {dict(fates)}, resident {[sum(size.values()) >> 20 for size in sizes]} MiB")
    assert set(fates) == REFUSALS | {"scored"}
    assert [server.process.pid, server.worker()] == processes
    assert server.metric("tarflow_worker_restarts_total") == 0
    assert "Traceback" not in server.log
    for pid in processes:
        assert sizes[-1][pid] - sizes[0][pid] < GROWTH, sizes
    assert len(hostile()) < count
