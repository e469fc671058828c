"""Requests over a connection: with keys and headers, repeated where that is safe, and streams that are put together."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, TypeVar, Unpack

import httpx
from pydantic import ValidationError

from service.client import errors
from service.client.answers import ANSWERS, JobDocument
from service.client.calls import Call, path
from service.client.connection import LAST_WORDS_SECONDS, Connection
from service.client.errors import ConnectionFailed, TarflowError, UnexpectedAnswer
from service.client.events import RECONNECT, Event, Parser, event_of
from service.client.retries import Patience
from service.jobs import JobState

T = TypeVar("T")
_KEY = re.compile(r"[\x21-\x7e]+")
STREAM_READ_SECONDS = 60.0
"""A stream on which nothing comes for so long is dead: the service sends a comment every 15 seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How requests are made."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    max_retries: int = 4
    request_timeout: float | None = None
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            # Whoever notices it later would show it.
            raise ValueError("api_key: allowed are visible ASCII characters, without spaces and line ends")


class Changes(TypedDict, total=False):
    """Options that may be others for some requests."""

    api_key: str | None
    max_retries: int
    request_timeout: float | None
    idempotency_key: str | None


class Caller:
    """What sends calls; every client and handle of one connection shares its kind."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self.connection, self.options = connection, options
        self._streams: set[_Stream] = set()

    def using(self, **changes: Unpack[Changes]) -> Caller:
        """The same with other options."""
        other = Caller(self.connection, replace(self.options, **changes))
        other._streams = self._streams
        return other

    async def end(self) -> None:
        """Leave the streams that are open, and close all connections."""
        try:
            for stream in list(self._streams):
                with self.connection.last_words():
                    await stream.leave()
        finally:
            await self.connection.end()

    async def answer(self, call: Call[T]) -> T:
        """Send a call, and read what comes.

        Without a key, unless the caller gave one: the service would keep the answer for an hour, and work on for who
        has gone away.
        """
        return _read(call.read, await self._opened(self._with_key(call, self.options.idempotency_key)))

    async def document(self, call: Call[Any]) -> dict[str, Any]:
        """Send a call to be worked on later; returns the job's document."""
        later = replace(call, headers={**call.headers, "Prefer": "respond-async"})
        return _read(_dictionary, await self._opened(self._with_key(later, self._key())))

    async def stream(self, call: Call[T]) -> AsyncGenerator[Event[T], None]:
        """Send a call, and tell all that happens to its job, across connections.

        Who leaves before the end cancels the job, unless the key is one of the caller's own: such may come back.
        """
        asked = replace(call, headers={**call.headers, "Accept": "text/event-stream"})
        opening = self._with_key(asked, self._key())
        stream = _Stream(self, opening)
        events = self._told(opening, call.read, stream)
        if self.options.idempotency_key is None:
            self._streams.add(stream)
        try:
            async for event in events:
                stream.is_over = event.final
                yield event
        except TarflowError:
            # What was refused has made no job.
            stream.is_over = not stream.job_id
            raise
        finally:
            with self.connection.last_words():
                await events.aclose()
                if stream in self._streams:
                    await stream.leave()

    def events(self, job_id: str, read: Callable[[Any], T], after: str | None = None) -> AsyncGenerator[Event[T], None]:
        """All that happens to a job behind an event, across connections; leaving it changes nothing."""
        return self._told(_following(job_id, after), read)

    async def begun(self, opening: Call[Any]) -> str:
        """The job of a stream, of whose answer only the head is read."""
        response = await self._opened(opening, read=LAST_WORDS_SECONDS)
        await self.connection.close(response)
        return str(response.headers.get("x-tarflow-job", ""))

    def left(self, stream: _Stream) -> None:
        """Forget a stream."""
        self._streams.discard(stream)

    async def _told(
        self, opening: Call[Any], read: Callable[[Any], T], stream: _Stream | None = None
    ) -> AsyncGenerator[Event[T], None]:
        patience = Patience(self.options.max_retries)
        call, last = opening, opening.headers.get("Last-Event-ID")
        while True:
            response = await self._opened(call, read=STREAM_READ_SECONDS)
            failure, pause = "the stream ended before the job", 0.0
            try:
                job_id = response.headers.get("x-tarflow-job", "")
                if response.status_code == 204:
                    return
                if not job_id:
                    raise UnexpectedAnswer("a stream of events names no job")
                if stream is not None:
                    stream.job_id = job_id
                parser = Parser()
                async with aclosing(self.connection.lines(response)) as lines:
                    async for line in lines:
                        heard = parser.feed(line)
                        if heard is None:
                            continue
                        if heard.kind == RECONNECT:
                            pause = heard.retry or 0.0
                            break
                        patience.reset()
                        event, last = await self._whole(event_of(heard, read)), heard.id
                        yield event
                        if event.final:
                            return
            except httpx.TransportError as error:
                # Whatever it is, the job goes on.
                failure = str(errors.of_transport(error))
            finally:
                await self.connection.close(response)
            await self.connection.sleep(max(pause, patience.after(ConnectionFailed(failure), repeatable=True)))
            call = _following(job_id, last)

    async def _whole(self, event: Event[T]) -> Event[T]:
        """The event, with its result where that was too large to be sent along."""
        if event.kind != JobState.COMPLETED or event.data.get("error") or event.data.get("result") is not None:
            return event
        return replace(event, data={**event.data, "result": (await self.job(event.job))["result"]})

    async def job(self, job_id: str, *, wait: float = 0.0) -> dict[str, Any]:
        """A job's document, when it has ended or after so many seconds."""
        # The answer is to come before httpx gives up.
        longest = self.connection.timeout.read
        params = {"wait": wait if longest is None else min(wait, longest / 2)} if wait else {}
        return await self.answer(Call(method="GET", path=path("jobs", job_id), read=_dictionary, params=params))

    def _key(self) -> str:
        """Of the caller, or a new one."""
        return self.options.idempotency_key or secrets.token_hex(16)

    def _with_key(self, call: Call[T], key: str | None) -> Call[T]:
        """A call whose repetitions the service knows as such."""
        if call.method != "POST" or key is None:
            return call
        return replace(call, headers={**call.headers, "Idempotency-Key": key})

    async def _opened(self, call: Call[Any], *, read: float | None = None) -> httpx.Response:
        """The answer to a call, repeated until it is good or there is no hope; with ``read`` it is a stream, of which
        only the head is there."""
        patience = Patience(self.options.max_retries, self.options.request_timeout)
        request = self._request(call, read)
        while True:
            try:
                return await self._once(request, streams=read is not None)
            except TarflowError as error:
                seconds = patience.after(error, repeatable=call.repeatable)
            await self.connection.sleep(seconds)

    async def _once(self, request: httpx.Request, *, streams: bool) -> httpx.Response:
        try:
            response = await self.connection.open(request)
            try:
                if not (streams and response.is_success):
                    await self.connection.read(response)
            except BaseException:
                await self.connection.close(response)
                raise
        except httpx.TransportError as error:
            raise errors.of_transport(error) from error
        except httpx.DecodingError as error:
            raise UnexpectedAnswer(f"{request.url.path}: the answer cannot be read: {error}") from error
        if not response.is_success:
            raise errors.of_response(response)
        return response

    def _request(self, call: Call[Any], read: float | None) -> httpx.Request:
        options = self.options
        headers: dict[str, str] = {"Accept": "application/json", **call.headers}
        if options.api_key is not None:
            headers["Authorization"] = f"Bearer {options.api_key}"
        if options.request_timeout is not None:
            headers["X-Request-Timeout"] = f"{options.request_timeout:.9f}".rstrip("0").rstrip(".")
        parts: dict[str, Any] = {"headers": headers, "params": _text(call.params)}
        if call.json is not None:
            parts["json"] = call.json
        if call.form is not None:
            parts |= {"data": call.form, "files": [("files", file) for file in call.files]}
        if read is not None:
            usual = self.connection.timeout
            shorter = read if usual.read is None else min(read, usual.read)
            parts["timeout"] = httpx.Timeout(connect=usual.connect, read=shorter, write=usual.write, pool=usual.pool)
        return self.connection.build(call.method, options.url + call.path, **parts)


class _Stream:
    """A stream that is open, by which its job is given up when nobody hears of it any more."""

    def __init__(self, caller: Caller, opening: Call[Any]) -> None:
        self._caller, self._opening = caller, opening
        self.job_id = ""
        """Known as soon as the answer begins."""
        self.is_over = False
        """Whether there is nothing to give up."""

    async def leave(self) -> None:
        """Give the job up, unless it has ended; done once."""
        self._caller.left(self)
        if self.is_over:
            return
        once = self._caller.using(max_retries=0)
        # Without an answer the job ends by itself, too.
        with suppress(TarflowError):
            # Nobody knows whether the request arrived. By its key the same request has the same job.
            job_id = self.job_id or await once.begun(self._opening)
            if job_id:
                await once.answer(canceling(job_id))


def canceling(job_id: str) -> Call[dict[str, Any]]:
    """The request that gives a job up."""
    return Call(method="DELETE", path=path("jobs", job_id), read=_dictionary)


def document_of(data: Mapping[str, Any]) -> JobDocument:
    """A job's document without its result, which is read as what it is where it is asked for."""
    return JobDocument.model_validate({**data, "result": None})


def reader_of(op: str) -> Callable[[Any], Any]:
    """How the result of a kind of work is read."""
    return ANSWERS[op].model_validate


def _following(job_id: str, after: str | None) -> Call[Any]:
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": after})
    return Call(method="GET", path=path("jobs", job_id, "events"), read=_dictionary, headers=headers)


def _dictionary(data: Any) -> dict[str, Any]:
    return dict(data)


def _text(params: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def _read(read: Callable[[Any], T], response: httpx.Response) -> T:
    if response.status_code == 204:
        return read(None)
    try:
        return read(response.json())
    except (ValidationError, ValueError, TypeError) as error:
        raise UnexpectedAnswer(f"{response.url.path}: the answer cannot be read: {error}") from error
