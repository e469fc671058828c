"""Several processes and one Redis: claims that run out, outages, a full memory, and what stays in it."""

from __future__ import annotations

import time

import pytest
import redis

from service.errors import InternalError, Unavailable
from service.pending import Claim, PendingStore
from service.stores.redis import ARRIVING_SECONDS, CHUNK_BYTES, Connection, RedisCalibrations, RedisPending
from tests.service.broker.redis_server import RedisServer
from tests.service.processes import wait_until
from tests.service.stores.conftest import Connect
from tests.service.stores.test_contract import MOST, accept, claimed, images, pending

SHORT = 0.3
RUN = "{test}:calibrating:m:a"
HEARD = "{test}:calibrating-heard"


def keys(client: redis.Redis) -> dict[str, int]:
    """Every key with its milliseconds to live, but for the time of the last sign of life."""
    found = {key.decode(): client.pttl(key) for key in client.scan_iter()}
    found.pop(HEARD, None)
    return found


def takes(store: PendingStore) -> Claim:
    """What is claimed once another's claim has run out."""
    found: list[Claim] = []

    def try_it() -> bool:
        claim = store.claim(["m"])
        if claim is not None:
            found.append(claim)
        return bool(found)

    wait_until(try_it, "the run is taken up")
    return found[0]


def test_a_run_has_one_maker(connect: Connect) -> None:
    first, second = connect().pending, connect().pending
    accept(first, pending("a"))
    claim = claimed(second)
    assert first.claim(["m"]) is None
    # Whose answer was lost asks again, and is no crash.
    assert claimed(second) == claim
    accept(first, pending("b", created=2))
    assert claimed(first).pending.name == "b"
    assert claimed(second) == claim


def test_a_run_whose_maker_died_is_taken_up_and_counted(connect: Connect) -> None:
    dead, living = connect(SHORT), connect(SHORT)
    job = accept(dead.pending, pending("a"))
    for crashes in range(3):
        claim = takes((dead, living)[crashes % 2].pending)
        assert (claim.pending, claim.crashes) == (job, crashes)
        assert (living.pending.images(claim) == images()).all()
    # It was only slow, and comes too late.
    late = takes(living.pending)
    claim = takes(dead.pending)
    assert not living.pending.renew(late, 3)
    assert not living.pending.finish(late, b"late")
    living.pending.fail(late, InternalError("late"))
    living.pending.release(late)
    assert dead.pending.renew(claim, 3)
    assert dead.pending.finish(claim, b"in time")
    found = living.calibrations.read("m", "a")
    assert found is not None
    assert found[1] == b"in time"


def test_a_claim_that_is_renewed_does_not_run_out(connect: Connect) -> None:
    first, second = connect(SHORT).pending, connect(SHORT).pending
    accept(first, pending("a"))
    claim = claimed(first)
    until = time.monotonic() + 3 * SHORT
    while time.monotonic() < until:
        assert first.renew(claim, 1)
        assert second.claim(["m"]) is None
        time.sleep(SHORT / 10)


def test_an_outage_is_no_crash(connect: Connect, redis_server: RedisServer) -> None:
    """When nobody could be heard, a claim that has run out gets time to be renewed."""
    first, second = connect().pending, connect().pending
    accept(first, pending("a"))
    claim = claimed(first)
    with redis_server.client() as client:
        now = int(client.time()[0] * 1000)
        client.hset(RUN, "lease", now - 1000)
        client.set(HEARD, now - 6000)
        assert second.claim(["m"]) is None
        assert first.renew(claim, 1)
        # Where others were heard meanwhile, it was the maker's own fault.
        client.hset(RUN, "lease", now - 1000)
        assert claimed(second).crashes == 1


def test_what_stays_and_what_expires(connect: Connect, redis_server: RedisServer) -> None:
    state = connect()
    store = state.pending
    with redis_server.client() as client:
        job = pending("a", num_images=700)
        store.write(job, images(700, size=32))
        [(key, ttl)] = keys(client).items()
        assert 0 < ttl <= 1000 * ARRIVING_SECONDS
        assert max(len(value) for value in client.hvals(key)) == CHUNK_BYTES
        store.place(job, replace=False, most=MOST)
        assert set(keys(client).values()) == {-1}
        claim = claimed(store)
        store.renew(claim, 3)
        store.finish(claim, b"x")
        kept = {"{test}:calibration:m:a": -1, "{test}:calibrations:m": -1}
        assert keys(client) == kept
        # Of what is refused, replaced, failed or deleted no image stays.
        accept(store, pending("b"))
        accept(store, pending("b"), replace=True)
        store.fail(claimed(store), InternalError("no calibration of these"))
        late = pending("a")
        store.write(late, images())
        with pytest.raises(Exception, match="has a calibration"):
            store.place(late, replace=False, most=MOST)
        assert not any("images" in key for key in keys(client))
        accept(store, pending("b"))
        assert store.remove("m", "b")
        assert keys(client) == kept
        assert state.calibrations.delete("m", "a")
        assert keys(client) == {}


def test_images_that_expired_before_they_were_accepted(connect: Connect, redis_server: RedisServer) -> None:
    store, job = connect().pending, pending("a")
    store.write(job, images())
    with redis_server.client() as client:
        client.flushall()
    with pytest.raises(Unavailable, match="lost the images"):
        store.place(job, replace=False, most=MOST)
    assert store.runs("m") == []


def test_images_that_are_gone_are_an_error(connect: Connect, redis_server: RedisServer) -> None:
    store = connect().pending
    job = accept(store, pending("a"))
    with redis_server.client() as client:
        client.hdel("{test}:calibrating-images:" + job.id, "0")
    with pytest.raises(ValueError, match="chunk 0"):
        store.images(claimed(store))


def test_a_full_memory_refuses_uploads_and_finishes_what_was_accepted(
    connect: Connect, redis_server: RedisServer
) -> None:
    state = connect()
    store = state.pending
    for name in "abcd":
        accept(store, pending(name))
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(Unavailable) as caught:
                store.write(pending("e"), images())
            assert caught.value.code == "broker_full"
            claim = claimed(store)
            assert store.renew(claim, 1)
            store.release(claim)
            claim = claimed(store)
            assert store.finish(claim, b"x")
            store.fail(claimed(store), InternalError("no calibration of these"))
            store.interrupt(claimed(store), InternalError("a fault"))
            store.open()
            assert store.remove("m", "c")
            assert state.calibrations.delete("m", "a")
            assert [run.pending.name for run in store.runs("m")] == ["b", "d"]
        finally:
            client.config_set("maxmemory", 0)


def test_a_verdict_costs_one_small_question(connect: Connect, redis_server: RedisServer) -> None:
    calibrations = connect().calibrations
    calibrations.write("m", "a", bytes(100_000))
    calibrations.versions([("m", "a")])
    with redis_server.client() as client:
        client.config_resetstat()
        calibrations.versions([("m", "a")])
        stats = client.info("stats")
        asked = {
            name for name in client.info("commandstats") if name not in ("cmdstat_info", "cmdstat_config|resetstat")
        }
        assert asked == {"cmdstat_hget"}
        assert stats["total_net_output_bytes"] < 200
    assert calibrations.trust_seconds > 0


def test_an_unreachable_redis_is_a_typed_error(redis_server: RedisServer) -> None:
    connection = Connection("redis://127.0.0.1:1/0", "test")
    calibrations, store = RedisCalibrations(connection), RedisPending(connection, 60)
    for call in (
        lambda: calibrations.versions([("m", "a")]),
        lambda: calibrations.read("m", "a"),
        lambda: calibrations.names("m"),
        lambda: store.runs("m"),
        lambda: store.claim(["m"]),
        lambda: store.write(pending("a"), images()),
        lambda: store.check("m", "a", replace=False, most=MOST),
    ):
        with pytest.raises(Unavailable) as caught:
            call()
        assert (caught.value.code, caught.value.retry_after is not None) == ("broker_unreachable", True)
    connection.close()


def test_another_version_of_the_service(connect: Connect, redis_server: RedisServer) -> None:
    """Fields that it added are left out; a job that cannot be read is shown as failed."""
    store = connect().pending
    job = accept(store, pending("a"))
    with redis_server.client() as client:
        written = client.hget(RUN, "job")
        assert isinstance(written, bytes)
        client.hset(RUN, "job", written.replace(b"{", b'{"new": 1, ', 1))
        [run] = store.runs("m")
        assert run.pending == job
        client.hset(RUN, "job", b"{}")
    assert store.claim(["m"]) is None
    [run] = store.runs("m")
    assert run.pending.error is not None
    assert store.remove("m", "a")


def test_an_upload_expires_from_its_first_command_on(connect: Connect, redis_server: RedisServer) -> None:
    """A process may die after any."""
    store = connect().pending
    with redis_server.client() as client:
        store.write(pending("a", num_images=0), images(0))
        [ttl] = keys(client).values()
        assert 0 < ttl <= 1000 * ARRIVING_SECONDS
