"""Jobs belong to the key that asked for them."""

from __future__ import annotations

import hashlib

import httpx

from tests.service.api.test_jobs import SAMPLE, accepted, ended
from tests.service.conftest import Start
from tests.service.processes import ServerProcess


def keys(*names: str) -> str:
    """Keys whose secrets are their names."""
    return "\n".join(
        f'[{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\nscopes = ["infer"]\n' for name in names
    )


def of(server: ServerProcess, name: str) -> httpx.Client:
    client = server.client()
    client.headers["Authorization"] = f"Bearer {name}"
    return client


def test_jobs_of_others_are_not_there(start: Start) -> None:
    server = start(TARFLOW_KEYS_INLINE=keys("alice", "bob")).wait_ready()
    body = {name: value for name, value in SAMPLE.items() if name != "model"} | {"class": "Bag"}
    with of(server, "alice") as alice, of(server, "bob") as bob, server.client() as nobody:
        job = accepted(alice, "/v1/sample", body, **{"Idempotency-Key": "k"})
        assert ended(alice, job["id"])["state"] == "completed"
        for method, address in (
            ("GET", job["links"]["self"]),
            ("GET", job["links"]["self"] + "?wait=1"),
            ("GET", job["links"]["events"]),
            ("DELETE", job["links"]["self"]),
        ):
            refused = bob.request(method, address)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")
            unknown = bob.request(method, address.replace(job["id"], "sample_0"))
            assert (
                refused.json()["error"]["message"].replace(job["id"], "sample_0") == unknown.json()["error"]["message"]
            )
            assert nobody.request(method, address).status_code == 401
        assert bob.get("/v1/jobs").json()["data"] == []
        assert [each["id"] for each in alice.get("/v1/jobs").json()["data"]] == [job["id"]]
        # A key of one's own choosing is nobody else's.
        other = accepted(bob, "/v1/sample", {**body, "seed": 9}, **{"Idempotency-Key": "k"})
        assert other["id"] != job["id"]
