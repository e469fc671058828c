"""The API's face of the Redis broker."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from redis.exceptions import RedisError

from service.broker.base import (
    USUAL,
    Accepted,
    Broker,
    Command,
    Event,
    JobStatus,
    Limits,
    QueueStats,
    Terms,
    WorkerStatus,
)
from service.broker.redis.calls import Calls
from service.broker.redis.connecting import public
from service.broker.redis.keys import REPLICA_SECONDS, SWEEP_SECONDS, Keys, common_arguments, milliseconds, name_of
from service.broker.redis.records import OUTCOME_FIELDS, Outcome, event_of, stats_of, status_of
from service.broker.redis.refusals import key_reused, refusal, share_of, unknown
from service.broker.redis.registry import Registry
from service.broker.redis.waits import Waits, chunks
from service.ending import ended
from service.errors import TimedOut, Unavailable
from service.jobs import FINAL, WEIGHTS, Job, JobResult, JobState, ModelInfo, lane_of
from service.messages import pack

log = logging.getLogger(__name__)

RECHECK_SECONDS = 5.0
_EVENT_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


class RedisBroker(Broker):
    """Any number of these, in as many processes, are one broker.

    Nothing connects before the first call; an unreachable Redis is an error of each call, never of the process.
    """

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        prefix: str = "tarflow",
        replica: str | None = None,
        replica_seconds: float = REPLICA_SECONDS,
        models_seconds: float = 0.0,
    ) -> None:
        self._url, self._limits, self._keys = url, limits, Keys(prefix)
        self._replica = replica or uuid.uuid4().hex
        self._calls = Calls(url, self._keys, common_arguments(limits, replica_seconds))
        self._registry = Registry(self._calls, self._keys, models_seconds)
        self._waits = Waits()
        self._answered: list[str] = []  # to be forgotten with the next sweep
        self._orphans: set[str] = set()  # to be canceled when Redis is back
        self._last_news = b"0-0"
        self._tasks: list[asyncio.Task[None]] = []
        self._reachable = True
        self._closing = False

    # Life.

    async def start(self) -> None:
        """Listen for results and look after leases, as every replica does."""
        with suppress(Unavailable):
            await self.sweep()
            await self._warn()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._look_after())]

    async def close(self) -> None:
        """Leave; jobs that only this process waited for are canceled."""
        self._closing = True
        await ended(*self._tasks)
        self._tasks = []
        with suppress(Unavailable):
            await self._calls.run("detach", self._replica)
        await self._calls.close()

    @property
    def idle(self) -> bool:
        """Whether nobody waits in this process."""
        return self._waits.empty

    async def _outcome(self, job_id: str) -> Outcome | None:
        return Outcome.of_job(await self._calls.fields(job_id, OUTCOME_FIELDS))

    # Accepting.

    async def check(self, model: str, cost: int, caller: str = "", caller_cost: int = 0) -> None:
        answer = await self._calls.run(
            "check", model, cost, caller, self._limits.max_queue_cost, share_of(self._limits), caller_cost
        )
        if refused := refusal(answer, model, cost, self._limits, caller_cost):
            raise refused

    async def submit(self, job: Job, terms: Terms = USUAL) -> Accepted:
        key = "" if terms.idempotency_key is None else name_of(terms.caller, terms.idempotency_key)
        arguments: tuple[str | bytes | int | float, ...] = (
            job.id, job.op, lane_of(job.op), job.model, job.rows, job.cost, terms.caller, terms.priority,
            WEIGHTS[terms.priority], milliseconds(terms.timeout), milliseconds(terms.keep_seconds), int(terms.detached),
            self._replica, key, terms.fingerprint, name_of(terms.caller), self._limits.max_queue_cost,
            share_of(self._limits), terms.caller_cost, pack(job.payload), terms.recipe, job.request_id,
        )  # fmt: skip
        if not terms.detached:
            self._waits.add(job.id, attached=True)  # its end may come before the answer
        try:
            answer = await self._calls.run("submit", *arguments)
            if answer[0] == b"idempotency_key_reused":
                raise key_reused(terms.idempotency_key or "")
            if refused := refusal(answer, job.model, job.cost, self._limits, terms.caller_cost):
                raise refused
        except BaseException as error:
            if not terms.detached:
                self._waits.drop(job.id)
            # It may have been accepted, and nobody knows of it; one with a key may be asked for again.
            refused_for_sure = isinstance(error, Exception) and not (
                isinstance(error, Unavailable) and error.code == "broker_unreachable"
            )
            if not refused_for_sure and not key:
                self._orphans.add(job.id)
            raise
        job_id, repeated = answer[1].decode(), answer[0] == b"repeated"
        if not terms.detached:
            if repeated:
                self._waits.drop(job.id)
                self._waits.add(job_id, attached=True)
            self._waits.accepted(job_id)
            if repeated:
                try:
                    await self._resolve_if_ended(job_id)
                except BaseException:
                    self._waits.drop(job_id)  # who is told of an error does not wait
                    raise
        return Accepted(job_id=job_id, repeated=repeated)

    async def wait(self, job_id: str, timeout: float) -> JobResult:
        attached = self._waits.is_attached(job_id)
        if not attached:
            await self._watch(job_id)
        ended = self._waits.ended(job_id)
        try:
            async with asyncio.timeout(timeout):
                outcome = await asyncio.shield(ended)
                while outcome.error is None and outcome.data is None:
                    outcome = await self._fetch(job_id)
        except TimeoutError:
            if not attached:
                raise TimedOut(f"not finished within {timeout:g} seconds; the job goes on") from None
            with suppress(Unavailable):
                await self.cancel(job_id)
            raise TimedOut(f"not finished within {timeout:g} seconds; the work was canceled") from None
        finally:
            self._waits.drop(job_id)
            if attached and ended.done() and not self._waits.is_attached(job_id):
                self._answered.append(job_id)
        return outcome.result()

    async def _watch(self, job_id: str) -> None:
        """Expect the end of a detached job."""
        self._waits.add(job_id, attached=False)
        try:
            if not await self._calls.run("watch", self._replica, job_id):
                raise unknown(job_id)
            self._waits.accepted(job_id)
            await self._resolve_if_ended(job_id)
        except BaseException:
            self._waits.drop(job_id)
            raise

    async def _resolve_if_ended(self, job_id: str) -> None:
        outcome = await self._outcome(job_id)
        if outcome is not None and outcome.state in FINAL:
            self._waits.resolve(job_id, outcome)

    async def _fetch(self, job_id: str) -> Outcome:
        """The outcome of a job that has ended, however long Redis is away.

        A Redis that was restarted may have forgotten that it has ended: then it ends once more.
        """
        while True:
            with suppress(Unavailable):
                outcome = await self._outcome(job_id) or _lost()
                if outcome.state in FINAL:
                    return outcome
            await asyncio.sleep(0.2)

    async def cancel(self, job_id: str) -> bool:
        try:
            return bool(await self._calls.run("cancel", job_id))
        except Unavailable:
            if self._waits.is_attached(job_id):
                self._orphans.add(job_id)  # nobody but this process knows that it is not wanted
            raise

    # Asking.

    async def status(self, job_id: str) -> JobStatus:
        found = await self._calls.run("status", job_id) if job_id else ()
        if not found:
            raise unknown(job_id)
        return status_of(found[0])

    async def result(self, job_id: str) -> JobResult | None:
        outcome = await self._outcome(job_id)
        if outcome is None:
            raise unknown(job_id)
        return outcome.result() if outcome.state in FINAL else None

    async def recipe(self, job_id: str) -> bytes:
        state, recipe = await self._calls.fields(job_id, ("state", "recipe"))
        if state is None:
            raise unknown(job_id)
        return recipe or b""

    async def jobs(self, caller: str, limit: int = 100) -> Sequence[JobStatus]:
        found: Any = 0
        while found == 0:  # so far it was busy with what is forgotten
            found = await self._calls.run("status", "", name_of(caller), limit)
        return [status_of(values) for values in found]

    async def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event, None]:
        key, names = self._keys.events(job_id), ("state", "detached")
        last = after if after is not None and _EVENT_ID.fullmatch(after) else "0-0"
        follows = False
        while True:
            try:
                state, detached = await self._calls.fields(job_id, names)
                if state is None or detached != b"1":
                    if follows:
                        return  # forgotten meanwhile
                    raise unknown(job_id)
                follows = True
                entries = await self._calls.entries(key, last)
                if not entries and JobState(state.decode()) not in FINAL:
                    entries = await self._calls.next_entries(key, last)
                while entries:
                    for event_id, fields in entries:
                        event = event_of(event_id, fields)
                        last = event.id
                        yield event
                        if event.final:
                            return
                    entries = await self._calls.next_entries(key, last)
                if JobState(state.decode()) in FINAL:
                    return
            except Unavailable:
                if not follows:
                    raise
                await asyncio.sleep(0.5)  # who listens already goes on listening

    async def models(self) -> Sequence[ModelInfo]:
        return await self._registry.models()

    async def workers(self) -> Sequence[WorkerStatus]:
        return await self._registry.workers()

    async def stats(self) -> QueueStats:
        return stats_of(await self._calls.run("stats"))

    async def command(self, command: Command) -> int:
        return int(await self._calls.run("command", json.dumps(asdict(command))))

    # What goes on by itself.

    async def _listen(self) -> None:
        """Tell those who wait in this process; one connection, however many they are."""
        inbox, missed = self._keys.inbox(self._replica), False
        while not self._closing:
            try:
                if missed:
                    await self._recheck(0.0)
                    missed = False
                for entry_id, fields in await self._calls.news(inbox, self._last_news):
                    news = {name.decode(): value for name, value in fields.items()}
                    self._last_news = entry_id
                    self._waits.resolve(news["id"].decode(), Outcome.of_news(news))
            except Unavailable:
                missed = True
                await asyncio.sleep(0.25)
            except RedisError as error:
                log.error("redis at %s: %s", public(self._url), error)
                missed = True
                await asyncio.sleep(1.0)

    async def _recheck(self, older_than: float) -> None:
        """Ask for what may have ended without this process having heard of it."""
        for ids in chunks(self._waits.open(older_than), 200):
            found = await self._calls.fields_of_many(ids, ("state", "error", "created", "started"))
            for job_id, (state, error_data, created, started) in zip(ids, found, strict=True):
                outcome = Outcome.of_job((state, error_data, None, created, started)) or _lost()
                if outcome.state in FINAL:
                    self._waits.resolve(job_id, outcome)

    async def _look_after(self) -> None:
        loop = asyncio.get_running_loop()
        rechecked = loop.time()
        while not self._closing:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
                for job_id in list(self._orphans):
                    await self.cancel(job_id)
                    self._orphans.discard(job_id)
                if loop.time() - rechecked > RECHECK_SECONDS:
                    await self._recheck(RECHECK_SECONDS)
                    rechecked = loop.time()
                if not self._reachable:
                    log.warning("redis at %s is back", public(self._url))
                self._reachable = True
            except Unavailable as error:
                if self._reachable:
                    log.error("redis at %s: %s (%s)", public(self._url), error.message, error.__cause__)
                self._reachable = False
            except RedisError as error:
                log.error("redis at %s: %s", public(self._url), error)

    async def sweep(self, every: float = SWEEP_SECONDS / 2) -> None:
        """What time does, when nobody has done it in the last ``every`` seconds; called regularly."""
        answered, self._answered = self._answered, []
        if count := await self._calls.run("sweep", self._replica, self._last_news, milliseconds(every), *answered):
            log.warning("%d jobs were given on: their worker has not been heard", count)

    async def _warn(self) -> None:
        """Say what of Redis's configuration breaks the promise; managed ones often keep it to themselves."""
        for name, wanted, danger in (
            ("maxmemory-policy", "noeviction", "when its memory is full, jobs that were accepted disappear"),
            ("appendonly", "yes", "when it is restarted, jobs that were accepted are lost"),
        ):
            found = await self._calls.setting(name)
            if found is not None and found != wanted:
                log.warning("redis at %s has %s %s: %s", public(self._url), name, found, danger)


def _lost() -> Outcome:
    error = Unavailable("the queue lost this request; send it again", code="broker_unreachable", retry_after=1.0)
    return Outcome(state=JobState.FAILED, error=error)
