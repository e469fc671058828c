"""Workers and their models, as workers announce them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from service.broker.base import WorkerStatus
from service.broker.redis.calls import Calls
from service.broker.redis.keys import Keys
from service.broker.redis.records import pairs
from service.jobs import ModelInfo, WorkerInfo
from service.messages import unpack


class Registry:
    """Metadata may be large, and is fetched once: a digest names it, so it never changes."""

    def __init__(self, calls: Calls, keys: Keys, models_seconds: float) -> None:
        """``models_seconds`` is the most that :meth:`models` may be behind."""
        self._calls, self._keys, self._models_seconds = calls, keys, models_seconds
        self._models: dict[bytes, ModelInfo] = {}
        self._list: Sequence[ModelInfo] = ()
        self._asked = -models_seconds

    async def models(self) -> Sequence[ModelInfo]:
        """Every known model, by name. Every request asks, so an answer may be used again for a little while."""
        now = time.monotonic()
        # An empty list is never used again: who was told that a worker is ready is not told that there is no model.
        if not self._list or now - self._asked >= self._models_seconds:
            self._list, self._asked = await self._known(), now
        return self._list

    async def _known(self) -> Sequence[ModelInfo]:
        digests = pairs(await self._calls.run("models"))
        await self._learn(digests.values())
        return [self._models[digests[name]] for name in sorted(digests) if digests[name] in self._models]

    async def workers(self) -> Sequence[WorkerStatus]:
        """The registered workers, by who was silent for longest."""
        workers = await self._calls.run("workers")
        served = [digests.split() for _, _, digests, *_ in workers]
        await self._learn(digest for digests in served for digest in digests)
        standings = [unpack(standing) for *_, standing in workers]
        return [
            WorkerStatus(
                info=WorkerInfo(
                    id=worker_id.decode(),
                    device=device.decode(),
                    models=tuple(self._models[digest] for digest in digests if digest in self._models),
                    states=standing[0],
                    loads=standing[1],
                ),
                heartbeat_age=age / 1000,
                measurements=unpack(measurements) if measurements else (),
            )
            for (worker_id, device, _, age, measurements, _), digests, standing in zip(
                workers, served, standings, strict=True
            )
        ]

    async def _learn(self, digests: Iterable[bytes]) -> None:
        new = [digest for digest in dict.fromkeys(digests) if digest not in self._models]
        if new:
            found = await self._calls.values([self._keys.info(digest.decode()) for digest in new])
            self._models |= {
                digest: ModelInfo.from_wire(unpack(data))
                for digest, data in zip(new, found, strict=True)
                if data is not None
            }
