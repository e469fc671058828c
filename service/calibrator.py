"""Calibrations in the making: normal images to statistics to a calibration file, beside the requests.

The images are on disk before anything is answered, so that what was accepted outlives a restart. One calibration is
worked on at a time, as score jobs of one batch each through the broker: requests come in between.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from model.anomaly.calibration import calibrate
from model.anomaly.features import Statistics
from service.broker.base import Broker, Terms
from service.calibrations import CalibrationStore
from service.errors import Conflict, InternalError, Overloaded, ServiceError, Unavailable
from service.jobs import Job, JobResult, ModelInfo, Op, Priority
from service.pending import Pending, PendingStore

log = logging.getLogger(__name__)

PREFIX = "statistics."
"""Of the arrays in a job's result that are statistics."""
PASSES = 5
"""What statistics with a gradient cost, in passes of the model."""
PATIENCE_SECONDS = 86_400.0
"""How long one batch may take, most of it waiting: nobody waits for the answer."""
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0
"""Seconds between two attempts to submit while the queue is full or no worker is ready."""
MOST_VALUES = 2**27
"""Pixel values of all images of a calibration. What is made of them takes 10 to 20 bytes of memory for each."""
MOST_ATTEMPTS = 3
"""How often the service may end, without being asked to, while it makes a calibration; then it makes it no more."""


class _Replaced(Exception):
    """The model is another than the one that statistics were computed with."""


@dataclass
class Run:
    """A calibration that is being made, or has failed."""

    pending: Pending
    done: int = 0
    """Images whose statistics are known."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    task: asyncio.Task[None] | None = None

    @property
    def progress(self) -> float:
        """Share of the images that are done."""
        return self.done / max(1, self.pending.num_images)

    async def cancel(self) -> None:
        """Give it up; returns when nothing works on it any more."""
        self.scope.cancel()
        if self.task is not None:
            await asyncio.wait([self.task])


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
        self._runs: dict[tuple[str, str], Run] = {}
        self._turn, self._changing = asyncio.Lock(), asyncio.Lock()

    async def start(self) -> None:
        """Go on with what an earlier process accepted."""
        for pending in await asyncio.to_thread(lambda: list(self._pending.scan())):
            self._begin(pending)

    async def stop(self) -> None:
        """Leave the rest for the next process."""
        for run in list(self._runs.values()):
            await run.cancel()

    def run_of(self, model: str, name: str) -> Run | None:
        """The run of this name that is in work or has failed."""
        return self._runs.get((model, name))

    def runs(self, model: str) -> list[Run]:
        """All runs of a model that are in work or have failed, by name."""
        return [self._runs[key] for key in sorted(self._runs) if key[0] == model]

    async def check(self, model: ModelInfo, name: str, *, replace: bool) -> None:
        """Raise :class:`~service.errors.Conflict` when the name is taken, which a failed run does not, or all are."""
        run = self.run_of(model.name, name)
        running = run is not None and run.pending.error is None
        if not replace and (running or await asyncio.to_thread(self._store.holds, model, name)):
            raise Conflict(
                f"name: model {model.name!r} has a calibration {name!r}{' in the making' if running else ''}; delete "
                "it, choose another name, or send replace=true",
                param="name",
                code="calibration_exists",
            )
        # The runs first: one that is finished meanwhile is then counted as a file, or twice under one name.
        names = {other.pending.name for other in self.runs(model.name)}
        names |= await asyncio.to_thread(self._store.names, model)
        if name not in names and len(names) >= self._most:
            raise Conflict(
                f"name: model {model.name!r} has {len(names)} calibrations, allowed are {self._most} "
                "(max_calibrations); delete one, or replace one by its name with replace=true",
                param="name",
                code="too_many_calibrations",
            )

    async def submit(
        self, model: ModelInfo, pending: Pending, pixels: NDArray[np.uint8], *, replace: bool = False
    ) -> Run:
        """Accept normal images (N, C, H, W) that fit the model; raises as :meth:`check` does.

        A run of the same name is given up; a finished calibration of that name is used until the new one is ready.
        """
        async with self._changing:
            await self.check(model, pending.name, replace=replace)
            run = self.run_of(model.name, pending.name)
            with self._writing("the images cannot be kept", run):
                arriving = await asyncio.to_thread(self._pending.write, pending, pixels)
                if run is not None:
                    await run.cancel()
                await asyncio.to_thread(self._pending.place, pending, arriving)
            return self._begin(pending)

    async def delete(self, model: ModelInfo, name: str) -> None:
        """Forget everything of this name, finished or not; raises ``NotFound``, or as the store does."""
        async with self._changing:
            run = self.run_of(model.name, name)
            with self._writing("the calibration cannot be deleted", run):
                if run is not None:
                    await run.cancel()
                    await asyncio.to_thread(self._pending.remove, run.pending)
                    self._runs.pop((model.name, name), None)
                if run is None or await asyncio.to_thread(self._store.holds, model, name):
                    await asyncio.to_thread(self._store.delete, model, name)
            self._changed(model.name, name)

    @contextmanager
    def _writing(self, failure: str, run: Run | None) -> Iterator[None]:
        """Tell that the state cannot be written, and go on with a run that was canceled in vain."""
        try:
            yield
        except BaseException as error:
            # One that was finished before it could be canceled is no longer among the runs.
            if run is not None and run.scope.cancel_called and run is self.run_of(run.pending.model, run.pending.name):
                self._begin(run.pending)
            if isinstance(error, OSError):
                log.exception("the state directory cannot be written")
                raise InternalError(
                    f"{failure} ({error.strerror}); the setting 'state' names their directory", code="state_unwritable"
                ) from error
            raise

    def _begin(self, pending: Pending) -> Run:
        run = self._runs[pending.model, pending.name] = Run(pending)
        if pending.error is None:
            run.task = asyncio.create_task(self._work(run), name=f"calibrate {pending.model}/{pending.name}")
        return run

    async def _work(self, run: Run) -> None:
        with run.scope:
            try:
                while not await self._attempt(run):
                    log.info("the model of calibration %s was replaced: it is begun anew", run.pending.name)
            except ServiceError as error:
                self._interrupt(run, error)
            except (ValueError, np.linalg.LinAlgError) as error:
                # These images will never make a calibration of this model.
                log.warning("calibration %s of %s failed", run.pending.name, run.pending.model, exc_info=error)
                await self._fail(run, InternalError(f"no calibration came of it: {error}", code="calibration_failed"))
            except Exception:
                # A run must end: as a fault that is shown, and not as one that seems to go on for ever.
                log.exception("calibration %s of %s failed", run.pending.name, run.pending.model)
                self._interrupt(run, InternalError("an internal error; the service's log has the details"))

    async def _attempt(self, run: Run) -> bool:
        """Make it when it is its turn; whether it ended, and need not begin anew with the model that is served now."""
        await self._wait_until_served(run.pending.model)
        async with self._turn:
            # In its turn, which may have come hours later.
            model = await self._model(run.pending.model)
            if model is None:
                return False
            crashes = await anyio.to_thread.run_sync(self._pending.begin, run.pending)
            try:
                if crashes >= MOST_ATTEMPTS:
                    message = (
                        f"given up: the service ended {crashes} times while it made this, perhaps for lack of memory; "
                        "send fewer images"
                    )
                    await self._fail(run, InternalError(message, code="calibration_crashed"))
                else:
                    await self._make(run, model)
            except _Replaced:
                return False
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._pending.end, run.pending, crashes)
        return True

    async def _make(self, run: Run, model: ModelInfo) -> None:
        pending = run.pending
        pixels = await anyio.to_thread.run_sync(self._pending.images, pending)
        expected = (model.flow.channels, model.flow.image_size, model.flow.image_size)
        if pixels.shape[1:] != expected:
            raise ValueError(f"the images were fitted to (C, H, W) = {pixels.shape[1:]}, the model now has {expected}")
        run.done = 0
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
            run.done = start + len(batch)
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

        def keep() -> None:
            self._store.save(model, calibration)
            self._pending.remove(pending)

        # This ends, canceled or not, before anybody deletes what it wrote.
        await anyio.to_thread.run_sync(keep)
        self._runs.pop((pending.model, pending.name), None)
        self._changed(model.name, pending.name)
        log.info("calibration %s of %s was made from %d images", pending.name, model.name, len(pixels))

    async def _statistics(self, model: ModelInfo, pixels: NDArray[np.uint8], seed: int) -> Statistics:
        """Statistics with gradients of one batch, as soon as the queue takes it."""
        delay = FIRST_DELAY
        while True:
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
            try:
                result = await self._done(job)
            except (Overloaded, Unavailable):
                await anyio.sleep(delay)
                delay = min(LONGEST_DELAY, 2 * delay)
                continue
            return {
                name.removeprefix(PREFIX): values for name, values in result.arrays.items() if name.startswith(PREFIX)
            }

    async def _done(self, job: Job) -> JobResult:
        # It has time: whoever waits for an answer goes first.
        await self._broker.submit(job, Terms(priority=Priority.LOW, timeout=PATIENCE_SECONDS))
        try:
            return await self._broker.wait(job.id, PATIENCE_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                # An ended job is unknown to the broker, and nothing happens.
                await self._broker.cancel(job.id)

    async def _wait_until_served(self, name: str) -> None:
        """Images of a model that is not served for now are kept."""
        while await self._model(name) is None:  # noqa: ASYNC110 - the broker tells no events
            await anyio.sleep(LONGEST_DELAY)

    async def _model(self, name: str) -> ModelInfo | None:
        """The model as it is served now, if it is; raises ``InternalError`` when workers have different weights."""
        model = next((model for model in await self._broker.models() if model.name == name), None)
        served = {m.model_id for worker in await self._broker.workers() for m in worker.info.models if m.name == name}
        if model is not None and served - {model.model_id}:
            raise InternalError(
                f"workers serve different weights of model {name!r}; restart the service", code="model_replaced"
            )
        return model

    async def _check_unchanged(self, model: ModelInfo) -> None:
        """Raise ``_Replaced`` when other weights may have computed what a job gave."""
        now = await self._model(model.name)
        if now is None or now.model_id != model.model_id:
            raise _Replaced

    @staticmethod
    def _interrupt(run: Run, error: ServiceError) -> None:
        """End a run by a fault that is not the images': a lost worker, a full disk. What is kept of it stays."""
        message = f"{error.message}; its images are kept, and the service goes on with them when it starts again"
        run.pending = run.pending.failed(InternalError(message, code=error.code))

    async def _fail(self, run: Run, error: ServiceError) -> None:
        """End a run whose images are of no use: they are forgotten, and why is kept."""
        try:
            run.pending = await anyio.to_thread.run_sync(self._pending.fail, run.pending, error)
        except OSError:
            log.exception("why calibration %s failed could not be kept", run.pending.name)
            run.pending = run.pending.failed(error)


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
