"""``Client``: the asynchronous client's own code over a connection that blocks, so that nothing is written twice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import update_wrapper, wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

import httpx

from service.client import calls
from service.client.answers import Answer, JobDocument
from service.client.asynchronous import TIMEOUT, AsyncOperation, checked
from service.client.caller import Caller, Changes
from service.client.calls import Call
from service.client.connection import BlockingConnection, run, run_each
from service.client.events import Event
from service.client.jobs import AsyncJob, AsyncJobs
from service.client.resources import AsyncCalibrations, AsyncModels

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


class _Over(Generic[A]):
    """Something whose work is done by its asynchronous twin."""

    def __init__(self, twin: A) -> None:
        self._twin = twin


def _blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[_Over[A], P], T]:
    @wraps(method)
    def call(self: _Over[A], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(method(self._twin, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[A, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[_Over[A], P], Generator[T, None, None]]:
    @wraps(method)
    def call(self: _Over[A], /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return run_each(method(self._twin, *args, **kwargs))

    return call


class Job(_Over[AsyncJob[T]], Generic[T]):
    """A job, and where it stood when it was last asked about: see :class:`~service.client.jobs.AsyncJob`."""

    @property
    def id(self) -> str:
        """By which any client with the same key finds it again."""
        return self._twin.id

    @property
    def document(self) -> JobDocument:
        """Where it stood when it was last asked about."""
        return self._twin.document

    def refresh(self) -> JobDocument:
        """Ask where it stands."""
        return run(self._twin.refresh())

    def wait(self, timeout: float | None = None) -> JobDocument:
        """Return when it has ended, however it did, or after so many seconds: where it stands then."""
        return run(self._twin.wait(timeout))

    def result(self, timeout: float | None = None) -> T:
        """Its answer, when it is there; raises its error, or ``Unfinished`` after so many seconds."""
        return run(self._twin.result(timeout))

    def cancel(self) -> JobDocument:
        """Give it up, unless it has ended; returns where it stands."""
        return run(self._twin.cancel())

    def events(self, after: str | None = None) -> Generator[Event[T], None, None]:
        """All that happened and happens to it, from the beginning or behind the event with this id, to its end."""
        return run_each(self._twin.events(after))


class Jobs(_Over[AsyncJobs]):
    """The caller's jobs."""

    def get(self, job_id: str) -> Job[Answer]:
        """A job by its id; raises ``NotFound`` when it is not the caller's, or was forgotten."""
        return Job(run(self._twin.get(job_id)))

    list = _blocking(AsyncJobs.list)
    wait = _blocking(AsyncJobs.wait)
    result = _blocking(AsyncJobs.result)
    cancel = _blocking(AsyncJobs.cancel)
    events = _iterating(AsyncJobs.events)


class Models(_Over[AsyncModels]):
    """Models that are served."""

    list = _blocking(AsyncModels.list)
    get = _blocking(AsyncModels.get)


class Calibrations(_Over[AsyncCalibrations]):
    """What is normal, by name."""

    create = _blocking(AsyncCalibrations.create)
    list = _blocking(AsyncCalibrations.list)
    get = _blocking(AsyncCalibrations.get)
    wait = _blocking(AsyncCalibrations.wait)
    delete = _blocking(AsyncCalibrations.delete)


class Operation(Generic[P, T]):
    """An operation of one client: answered at once, later, or as a stream."""

    def __init__(self, build: Callable[P, Call[T]], caller: Caller) -> None:
        self._twin = AsyncOperation(build, caller)
        update_wrapper(self, build)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer."""
        return run(self._twin(*args, **kwargs))

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """A job that is worked on whatever becomes of this program."""
        return Job(run(self._twin.submit(*args, **kwargs)))

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Generator[Event[T], None, None]:
        """All that happens until the answer is there; leaving it early cancels the work."""
        return run_each(self._twin.stream(*args, **kwargs))


class _Of(Generic[P, T]):
    """Declares an operation."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build

    def __get__(self, client: Client, kind: type[Client]) -> Operation[P, T]:
        return Operation(self._build, client._caller)


class Client:
    """A client of the service.

    Every operation is a method, ``client.sample(…)``, and has two more: ``client.sample.submit(…)`` for a job,
    ``client.sample.stream(…)`` for its events. Close it, or use ``with``. Threads may share it.
    """

    sample = _Of(calls.sample)
    decode = _Of(calls.decode)
    denoise = _Of(calls.denoise)
    score = _Of(calls.score)
    encode = _Of(calls.encode)
    classify = _Of(calls.classify)

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float | None = TIMEOUT,
        request_timeout: float | None = None,
        max_retries: int = 4,
        http: httpx.Client | None = None,
    ) -> None:
        """As of :class:`~service.client.asynchronous.AsyncClient`."""
        options = checked(url, api_key=api_key, request_timeout=request_timeout, max_retries=max_retries)
        connection = BlockingConnection(httpx.Client(timeout=timeout) if http is None else http)
        self._bind(Caller(connection, options))

    def _bind(self, caller: Caller) -> None:
        self._caller = caller
        self.jobs, self.models = Jobs(AsyncJobs(caller)), Models(AsyncModels(caller))
        self.calibrations = Calibrations(AsyncCalibrations(caller))

    def with_options(self, **changes: Unpack[Changes]) -> Self:
        """This client with another ``api_key``, ``request_timeout``, ``max_retries``, or with an ``idempotency_key``,
        which is for one request and its repetitions. It has the same connections."""
        other = object.__new__(type(self))
        other._bind(self._caller.using(**changes))
        return other

    def close(self) -> None:
        """Leave the streams that are open, and close all connections."""
        run(self._caller.end())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
