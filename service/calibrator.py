"""Calibrations in the making: normal images to statistics to a calibration, beside the requests.

The images are kept before anything is answered, so that what was accepted outlives a restart. A process works on one
calibration at a time, as score jobs of one batch each through the broker: requests come in between. Where several
processes share a store, any of them makes what any has accepted.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from model.anomaly.calibration import calibrate
from model.anomaly.features import Statistics
from service.broker.base import Broker, Terms
from service.calibrations import CalibrationStore
from service.errors import InternalError, Overloaded, ServiceError, Unavailable
from service.jobs import Job, JobResult, ModelInfo, Op, Priority
from service.pending import Claim, Pending, PendingStore, Run

log = logging.getLogger(__name__)
T = TypeVar("T")

PREFIX = "statistics."
"""Of the arrays in a job's result that are statistics."""
PASSES = 5
"""What statistics with a gradient cost, in passes of the model."""
PATIENCE_SECONDS = 86_400.0
"""How long one batch may take, most of it waiting: nobody waits for the answer."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0
"""Seconds between two attempts to submit while the queue is full or no worker is ready."""
POLL_SECONDS = 1.0
"""How often it is asked whether there is something to make, and whether what is made is still wanted."""
FORGET_SECONDS = 5.0
"""How often it is asked what others have deleted."""
MOST_VALUES = 2**27
"""Pixel values of all images of a calibration. What is made of them takes 10 to 20 bytes of memory for each."""
MOST_ATTEMPTS = 3
"""How often the service may end, without being asked to, while it makes a calibration; then it makes it no more."""
GOES_ON = "its images are kept, and the service goes on with them when it starts again"


class _Replaced(Exception):
    """The model is another than the one that statistics were computed with."""


class _Lost(Exception):
    """The run was deleted or replaced, or another process has it."""


@dataclass
class _Work:
    """What this process makes now."""

    claim: Claim
    done: int = 0
    """Images whose statistics are known."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Calibrator:
    """Makes calibrations in the background; its methods run on the event loop."""

    def __init__(
        self,
        broker: Broker,
        store: CalibrationStore,
        pending: PendingStore,
        *,
        batch_rows: int,
        most: int,
        changed: Callable[[str, str], None],
    ) -> None:
        """``most`` is that of one model; ``changed`` is told model and name when a calibration is another, or gone."""
        self._broker, self._store, self._pending = broker, store, pending
        self._batch_rows, self._most, self._changed = batch_rows, most, changed
        self._work: _Work | None = None
        self._wake = asyncio.Event()
        self._scope: anyio.CancelScope | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._reachable = True

    async def start(self) -> None:
        """Go on with what was accepted before."""
        opened = False
        # A Redis that is not there yet is waited for.
        with suppress(Unavailable):
            await asyncio.to_thread(self._pending.open)
            opened = True
        self._scope = anyio.CancelScope()
        self._tasks = [
            asyncio.create_task(self._make_all(self._scope, opened=opened), name="calibrate"),
            asyncio.create_task(self._forget(), name="forget calibrations"),
        ]

    async def stop(self) -> None:
        """Leave the rest to others, or to the next process."""
        if self._scope is not None:
            self._scope.cancel()
            making, forgetting = self._tasks
            forgetting.cancel()
            await asyncio.wait([making, forgetting])

    async def find(self, model: str, name: str) -> Run | None:
        """The run of this name that is in work or has failed."""
        return await asyncio.to_thread(self._pending.find, model, name)

    async def runs(self, model: str) -> Sequence[Run]:
        """All runs of a model that are in work or have failed, by name."""
        return await asyncio.to_thread(self._pending.runs, model)

    async def check(self, model: ModelInfo, name: str, *, replace: bool) -> None:
        """Raise :class:`~service.errors.Conflict` when the name is taken, which a failed run does not, or all are."""
        await asyncio.to_thread(self._pending.check, model.name, name, replace=replace, most=self._most)

    async def submit(
        self, model: ModelInfo, pending: Pending, pixels: NDArray[np.uint8], *, replace: bool = False
    ) -> Run:
        """Accept normal images (N, C, H, W) that fit the model; raises as :meth:`check` does.

        A run of the same name is given up; a finished calibration of that name is used until the new one is ready.
        """
        with _writing("the images cannot be kept"):
            await self.check(model, pending.name, replace=replace)
            await asyncio.to_thread(self._pending.write, pending, pixels)
            await asyncio.to_thread(self._pending.place, pending, replace=replace, most=self._most)
        await self._give_up(model.name, pending.name, but=pending.id)
        self._wake.set()
        return Run(pending)

    async def delete(self, model: ModelInfo, name: str) -> None:
        """Forget everything of this name, finished or not; raises ``NotFound``, or as the store does."""
        with _writing("the calibration cannot be deleted"):
            # The run first: what is finished meanwhile is then deleted, too.
            was_made = await asyncio.to_thread(self._pending.remove, model.name, name)
            await self._give_up(model.name, name)
            was_kept = await asyncio.to_thread(self._store.delete, model, name)
        if not (was_made or was_kept):
            raise await asyncio.to_thread(self._store.missing, model, name)
        self._changed(model.name, name)

    async def _give_up(self, model: str, name: str, but: str | None = None) -> None:
        """Stop working on a run of this name, but for that of an upload; another process notices by itself."""
        work = self._work
        if work is None:
            return
        pending = work.claim.pending
        if (pending.model, pending.name) == (model, name) and pending.id != but:
            work.scope.cancel()
            await work.ended.wait()

    # In the background.

    async def _make_all(self, scope: anyio.CancelScope, *, opened: bool) -> None:
        with scope:
            while True:
                try:
                    if not opened:
                        await anyio.to_thread.run_sync(self._pending.open)
                        opened = True
                    worked = await self._make_next()
                    self._reachable = True
                except Unavailable as error:
                    if self._reachable:
                        log.error("calibrations wait: %s", error.message)
                    self._reachable = worked = False
                except Exception:
                    log.exception("no calibration can be made")
                    worked = False
                if not worked:
                    with anyio.move_on_after(POLL_SECONDS):
                        await self._wake.wait()
                    self._wake.clear()

    async def _forget(self) -> None:
        """Tell what others have deleted."""
        while True:
            await asyncio.sleep(FORGET_SECONDS)
            with suppress(Unavailable, OSError):
                for model, name in await asyncio.to_thread(self._store.forgotten):
                    self._changed(model, name)

    async def _make_next(self) -> bool:
        """Make what has waited longest; whether there was something."""
        # Images of a model that is not served for now are kept.
        served = [model.name for model in await self._broker.models()]
        # A claim that nobody hears of would be taken for a crash.
        with anyio.CancelScope(shield=True):
            claim = await anyio.to_thread.run_sync(self._pending.claim, served)
        if claim is None:
            return False
        work = self._work = _Work(claim)
        keeper = asyncio.create_task(self._keep(work))
        try:
            with work.scope:
                await self._make_or_fail(work)
        finally:
            keeper.cancel()
            with anyio.CancelScope(shield=True):
                # Of one that has ended in whatever way, nothing is left to be released.
                await self._told(self._pending.release, claim)
            self._work = None
            work.ended.set()
        return True

    async def _keep(self, work: _Work) -> None:
        """Keep the claim, and give up when it counts no more: somebody has deleted or replaced the run."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            with suppress(Unavailable, OSError):
                if not await asyncio.to_thread(self._pending.renew, work.claim, work.done):
                    work.scope.cancel()

    async def _make_or_fail(self, work: _Work) -> None:
        pending = work.claim.pending
        log.info("calibration %s of %s is being made", pending.name, pending.model)
        try:
            if work.claim.crashes >= MOST_ATTEMPTS:
                message = (
                    f"given up: the service ended {work.claim.crashes} times while it made this, perhaps for lack of "
                    "memory; send fewer images"
                )
                return await self._fail(work, InternalError(message, code="calibration_crashed"))
            await self._make(work)
        except _Lost:
            log.info("calibration %s of %s is not wanted any more", pending.name, pending.model)
        except _Replaced:
            log.info("the model of calibration %s was replaced: it is begun anew", pending.name)
        except ServiceError as error:
            await self._interrupt(work, error)
        except (ValueError, np.linalg.LinAlgError) as error:
            # These images will never make a calibration of this model.
            log.warning("calibration %s of %s failed", pending.name, pending.model, exc_info=error)
            await self._fail(work, InternalError(f"no calibration came of it: {error}", code="calibration_failed"))
        except Exception:
            # A run must end: as a fault that is shown, and not as one that seems to go on for ever.
            log.exception("calibration %s of %s failed", pending.name, pending.model)
            await self._interrupt(work, InternalError("an internal error; the service's log has the details"))

    async def _make(self, work: _Work) -> None:
        claim, pending = work.claim, work.claim.pending
        # In its turn, which may have come hours later.
        model = await _patiently(lambda: self._model(pending.model))
        if model is None:
            raise _Replaced
        pixels = await _patiently(lambda: anyio.to_thread.run_sync(self._pending.images, claim))
        expected = (model.image_channels, model.image_size, model.image_size)
        if pixels.shape[1:] != expected:
            raise ValueError(f"the images were fitted to (C, H, W) = {pixels.shape[1:]}, the model now has {expected}")
        # In place: parts that are put together in the end would need twice the memory.
        statistics: Statistics = {}
        for start in range(0, len(pixels), self._batch_rows):
            batch = np.array(pixels[start : start + self._batch_rows])
            part = await self._statistics(model, batch, pending.seed)
            await self._check_unchanged(model)
            if not statistics:
                statistics = {name: np.empty((len(pixels), *a.shape[1:]), a.dtype) for name, a in part.items()}
            for name, values in statistics.items():
                values[start : start + len(batch)] = part[name]
            work.done = start + len(batch)
            if not await _patiently(lambda: anyio.to_thread.run_sync(self._pending.renew, claim, work.done)):
                raise _Lost
        record = {
            "name": pending.name,
            "model": model.name,
            "model_id": model.model_id,
            "noise": model.noise.to_dict(),
            "seed": pending.seed,
            "created": pending.created,
            "source": pending.source,
        }
        # Abandoned when it is canceled: only its result would be kept.
        calibration = await anyio.to_thread.run_sync(
            lambda: calibrate(statistics, pixels, record), abandon_on_cancel=True
        )
        await self._check_unchanged(model)
        data = calibration.to_bytes()
        if not await _patiently(lambda: anyio.to_thread.run_sync(self._pending.finish, claim, data)):
            raise _Lost
        self._changed(model.name, pending.name)
        log.info("calibration %s of %s was made from %d images", pending.name, model.name, len(pixels))

    async def _statistics(self, model: ModelInfo, pixels: NDArray[np.uint8], seed: int) -> Statistics:
        """Statistics with gradients of one batch, as soon as the queue takes it."""

        async def computed() -> JobResult:
            job = Job(
                id=f"calibrate_{secrets.token_hex(12)}",
                op=Op.SCORE,
                model=model.name,
                payload={
                    "pixels": pixels,
                    "label": None,
                    "draws": 1,
                    "seed": seed,
                    "statistics": {"seed": seed, "gradient": True},
                },
                rows=len(pixels),
                cost=len(pixels) * model.flow.num_patches * PASSES,
            )
            # It has time: whoever waits for an answer goes first.
            await self._broker.submit(job, Terms(priority=Priority.LOW, timeout=PATIENCE_SECONDS))
            try:
                return await self._broker.wait(job.id, PATIENCE_SECONDS)
            finally:
                # An ended job is unknown to the broker, and nothing happens.
                with anyio.CancelScope(shield=True), suppress(Unavailable):
                    await self._broker.cancel(job.id)

        result = await _patiently(computed)
        return {name.removeprefix(PREFIX): values for name, values in result.arrays.items() if name.startswith(PREFIX)}

    async def _model(self, name: str) -> ModelInfo | None:
        """The model as it is served now, if it is; raises ``InternalError`` when workers have different weights."""
        workers = await self._broker.workers()
        served = {m.model_id: m for worker in workers for m in worker.info.models if m.name == name}
        if len(served) > 1:
            raise InternalError(
                f"workers serve different weights of model {name!r}; restart the service", code="model_replaced"
            )
        # Without a live worker, what was served last. The list of models may be a little behind, and workers are not.
        known = served.values() or [model for model in await self._broker.models() if model.name == name]
        return next(iter(known), None)

    async def _check_unchanged(self, model: ModelInfo) -> None:
        """Raise ``_Replaced`` when other weights may have computed what a job gave."""
        now = await _patiently(lambda: self._model(model.name))
        if now is None or now.model_id != model.model_id:
            raise _Replaced

    async def _interrupt(self, work: _Work, error: ServiceError) -> None:
        """End a run by a fault that is not the images': a lost worker, a full disk. What is kept of it stays."""
        await self._told(
            self._pending.interrupt, work.claim, InternalError(f"{error.message}; {GOES_ON}", code=error.code)
        )

    async def _fail(self, work: _Work, error: ServiceError) -> None:
        """End a run whose images are of no use: they are forgotten, and why is kept."""
        await _patiently(lambda: anyio.to_thread.run_sync(self._pending.fail, work.claim, error))

    @staticmethod
    async def _told(say: Callable[..., None], *what: object) -> None:
        """Tell the store that a run has ended; where it cannot be told, the claim runs out."""
        try:
            await anyio.to_thread.run_sync(say, *what)
        except Unavailable as error:
            log.warning("that work on a calibration ended could not be noted: %s", error.message)


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call that is tried again while Redis is away, the queue is full or no worker is ready."""
    delay = FIRST_DELAY
    while True:
        try:
            return await call()
        except (Overloaded, Unavailable):
            await anyio.sleep(delay)
            delay = min(LONGEST_DELAY, 2 * delay)


@contextmanager
def _writing(failure: str) -> Iterator[None]:
    """Tell that the state directory cannot be written."""
    try:
        yield
    except OSError as error:
        log.exception("the state directory cannot be written")
        raise InternalError(
            f"{failure} ({error.strerror}); the setting 'state' names their directory", code="state_unwritable"
        ) from error


def new_pending(
    model: ModelInfo, name: str, seed: int, pixels: NDArray[np.uint8], source: str, notices: list[tuple[str, str]]
) -> Pending:
    """A job for :meth:`Calibrator.submit` from now."""
    return Pending(
        model=model.name,
        name=name,
        seed=seed,
        num_images=len(pixels),
        created=int(time.time()),
        source=source,
        notices=tuple(notices),
    )
