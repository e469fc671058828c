"""Redis and the embedded broker decide alike: the same operations hand out the same jobs in the same order."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from heapq import heappop, heappush

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from service.broker.base import Terms
from service.broker.fairness import Turn, VirtualClock
from service.broker.memory import MemoryBroker
from service.broker.redis.api import RedisBroker
from service.broker.redis.worker import RedisWorkerBroker
from service.errors import ServiceError
from service.jobs import Job, Lane, Op, Priority
from tests.service.broker.conftest import AMPLE, held, info, job, result
from tests.service.broker.redis_server import RedisServer

LIMITS = replace(AMPLE, max_queue_cost=60, caller_share=0.5, max_attempts=2)
WORKERS = {"both": ["m", "n"], "one": ["m"]}

costs = st.integers(1, 12)
workers = st.sampled_from(sorted(WORKERS))
which = st.integers(0, 50)

submissions = st.lists(
    st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(Priority), st.sampled_from([1, 4, 16]), st.booleans()),
    min_size=12,
    max_size=60,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(submissions)
def test_the_order_is_that_of_the_virtual_clock(
    redis_server: RedisServer, submissions: list[tuple[str, Priority, int, bool]]
) -> None:
    """Costs that are powers of two make many equal finishes, and two digits of numbers."""
    with redis_server.client() as client:
        client.flushall()
    broker, worker = RedisBroker(redis_server.url, AMPLE), RedisWorkerBroker(redis_server.url, "w", AMPLE)
    worker.register(info("w", ["m", "n"]))
    clock, waiting, claimed, expected = VirtualClock(), list[tuple[Turn, str]](), list[str](), list[str]()

    def take() -> None:
        claimed.extend(j.id for j in worker.claim(frozenset(Lane), 1, 0))
        if waiting:
            turn, name = heappop(waiting)
            clock.took(turn)
            expected.append(name)

    async def submit_all() -> None:
        for number, (caller, priority, cost, takes) in enumerate(submissions, 1):
            name = f"job-{number}"
            terms = Terms(caller=caller, priority=priority, detached=True)
            await broker.submit(job(name, cost=cost, model="mn"[number % 2]), terms)
            heappush(waiting, (clock.turn(caller, priority, cost, number), name))
            if takes and number % 3 == 0:
                take()
        await broker.close()

    asyncio.run(submit_all())
    while waiting:
        take()
    worker.close()
    assert claimed == expected


class Alike(RuleBasedStateMachine):
    """Drives both brokers, and looks whether they agree."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        with self.server.client() as client:
            client.flushall()
        self.runner = asyncio.Runner()
        self.memory = MemoryBroker(LIMITS)
        self.redis = RedisBroker(self.server.url, LIMITS)
        self.faces: dict[str, RedisWorkerBroker] = {}
        self.owned: list[tuple[str, Job]] = []
        self.stale: list[tuple[str, Job]] = []
        self.ids: list[str] = []

    @initialize()
    def begin(self) -> None:
        for name in WORKERS:
            self.join(name)

    def join(self, name: str) -> None:
        self.memory.register(info(name, WORKERS[name]))
        self.faces[name] = RedisWorkerBroker(self.server.url, name, LIMITS)
        self.faces[name].register(info(name, WORKERS[name]))

    @rule(
        op=st.sampled_from([Op.SCORE, Op.SAMPLE]),
        model=st.sampled_from("mn"),
        rows=st.integers(1, 4),
        cost=costs,
        caller=st.sampled_from(["", "a", "b", "c"]),
        priority=st.sampled_from(Priority),
        key=st.sampled_from([None, None, None, "k"]),
        fingerprint=st.sampled_from("fg"),
    )
    def submit(
        self,
        op: Op,
        model: str,
        rows: int,
        cost: int,
        caller: str,
        priority: Priority,
        key: str | None,
        fingerprint: str,
    ) -> None:
        name = f"job-{len(self.ids)}"
        self.ids.append(name)
        new = job(name, op, rows=rows, cost=cost, model=model)
        terms = Terms(caller=caller, priority=priority, detached=True, idempotency_key=key, fingerprint=fingerprint)
        answers: list[object] = []
        for broker in (self.memory, self.redis):
            try:
                answers.append(self.runner.run(broker.submit(new, terms)))
            except ServiceError as error:
                answers.append(error.to_wire())
        assert answers[0] == answers[1]

    @rule(name=workers, lanes=st.sets(st.sampled_from(Lane), min_size=1), max_rows=st.integers(1, 8))
    def claim(self, name: str, lanes: set[Lane], max_rows: int) -> None:
        expected = self.runner.run(self.memory.claim(name, lanes, max_rows, 0))
        got = self.faces[name].claim(lanes, max_rows, 0)
        assert [(j.id, j.attempt) for j in got] == [(j.id, j.attempt) for j in expected]
        self.owned += [(name, claimed) for claimed in got]

    def pop(self, index: int) -> tuple[str, Job] | None:
        if not self.owned:
            return None
        self.stale.append(self.owned.pop(index % len(self.owned)))
        return self.stale[-1]

    @rule(index=which)
    def complete(self, index: int) -> None:
        if found := self.pop(index):
            name, done = found
            accepted = self.faces[name].complete(done, result())
            assert accepted == self.memory.complete(name, done.id, done.attempt, result())

    @rule(index=which)
    def release(self, index: int) -> None:
        if found := self.pop(index):
            name, given = found
            self.faces[name].release(given)
            self.memory.release(name, given.id, given.attempt)

    @rule(index=which)
    def cancel(self, index: int) -> None:
        if self.ids:
            name = self.ids[index % len(self.ids)]
            assert self.runner.run(self.redis.cancel(name)) == self.runner.run(self.memory.cancel(name))

    @rule(name=workers)
    def leave_and_join(self, name: str) -> None:
        self.faces[name].close()
        self.memory.unregister(name)
        self.owned = [(owner, lost) for owner, lost in self.owned if owner != name]
        self.stale = [(owner, lost) for owner, lost in self.stale if owner != name]
        self.join(name)

    @rule(index=which)
    def late(self, index: int) -> None:
        """What a worker handed back, ended or lost is no longer its own, unless it has it again."""
        if self.stale:
            name, given = self.stale[index % len(self.stale)]
            expected = self.memory.heartbeat(name, held(given)).lost
            assert self.faces[name].heartbeat(held(given)).lost == expected

    @invariant()
    def both_know_the_same(self) -> None:
        theirs, ours = (self.runner.run(broker.stats()) for broker in (self.memory, self.redis))
        assert dict(theirs.waiting) == dict(ours.waiting)
        assert dict(theirs.running) == dict(ours.running)
        assert (theirs.waiting_cost, theirs.callers, theirs.reclaimed, theirs.dead) == (
            *(ours.waiting_cost, ours.callers, ours.reclaimed, ours.dead),
        )
        assert theirs.ended == ours.ended
        for caller in ("", "a", "b", "c"):
            places = [
                [(s.id, s.state, s.attempt, s.position) for s in self.runner.run(broker.jobs(caller))]
                for broker in (self.memory, self.redis)
            ]
            assert places[0] == places[1]

    def teardown(self) -> None:
        for face in self.faces.values():
            face.close()
        self.runner.run(self.redis.close())
        self.runner.close()


def test_both_brokers_decide_alike(redis_server: RedisServer) -> None:
    Alike.server = redis_server
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        Alike, settings=settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=quiet)
    )
