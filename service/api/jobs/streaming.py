"""What happens to a job as server-sent events.

FastAPI's own support of them is for endpoints that are generators: these begin to answer before anything is known to
be wrong, and cannot answer in another form. Its format and its type are used here.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import anyio.to_thread
from fastapi import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from model.images import encode_image
from service.api.context import Context
from service.api.jobs.documents import error_body, links_of
from service.api.jobs.keeping import drain_of, given_up
from service.api.recipes.stored import stored_answer
from service.api.running import disconnected
from service.broker.base import Event
from service.ending import ended
from service.errors import Canceled, ServiceError
from service.jobs import JobState

KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event a comment is sent, so that nobody on the way takes the connection for dead."""
RETRY_MILLISECONDS = 1000
MOST_RESULT_BYTES = 4 * 2**20
"""A larger result is not sent along; it is where ``links.self`` says."""
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """All events of a job behind one of them, to the last; then the connection ends."""

    media_type = EventSourceResponse.media_type

    def __init__(self, context: Context, job_id: str, *, after: str | None = None, cancels: bool = False) -> None:
        """``cancels`` says whether the job is given up when the client goes away."""
        super().__init__(headers={**HEADERS, "x-tarflow-job": job_id})
        del self.headers["content-length"]
        self._context, self._job_id, self._after, self._cancels = context, job_id, after, cancels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; when this process leaves, the last event says to connect again."""
        leaving = drain_of(self._context).abandoned
        work = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(self._context.request))
        over = asyncio.ensure_future(leaving.wait())
        try:
            await asyncio.wait((work, gone, over), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not leaving.is_set():
                raise
        finally:
            is_done, is_gone = work.done(), gone.done()
            await ended(work, gone, over)
            if self._cancels and not is_done and not leaving.is_set():
                self._context.request.state.error = Canceled("the client went away")
                await given_up(self._context, self._job_id)
        if is_done:
            work.result()
        elif not is_gone:
            await send(_part(self._reconnect("this process is shutting down; connect again")))
        await send(_part(b"", more=False))

    def _reconnect(self, message: str) -> bytes:
        data = {"job": self._job_id, "message": message, "links": links_of(self._job_id).model_dump(by_alias=True)}
        return format_sse_event(event="reconnect", data_str=json.dumps(data), retry=RETRY_MILLISECONDS)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        coming: asyncio.Future[Event | None] | None = None
        async with aclosing(self._context.broker.events(self._job_id, self._after)) as events:
            try:
                while True:
                    coming = coming or asyncio.ensure_future(anext(events, None))
                    await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS)
                    if not coming.done():
                        await send(_part(KEEPALIVE_COMMENT))
                        continue
                    event = coming.result()
                    if event is None:
                        return
                    coming = None
                    await send(_part(await self._written(event)))
                    if event.final:
                        return
            except ServiceError as error:  # the broker has gone away; the job has not
                await send(_part(self._reconnect(error.message)))
            finally:
                if coming is not None:
                    await ended(coming)

    async def _written(self, event: Event) -> bytes:
        data: dict[str, Any] = {"job": self._job_id, "time": event.time}
        if event.kind == JobState.COMPLETED:
            data |= await self._completed()
        elif event.final:
            error = ServiceError.from_wire(event.data)
            self._context.request.state.error = error
            data["error"] = error_body(error).model_dump()
        elif event.kind == "preview":
            data |= await anyio.to_thread.run_sync(_preview, event.data)
        else:
            data |= event.data
        if event.final or event.kind == JobState.QUEUED:
            data["links"] = links_of(self._job_id).model_dump(by_alias=True)
        # A name of ours, then, and no line of data that somebody else has written: nothing can break out of it.
        return format_sse_event(event=event.kind, data_str=json.dumps(data), id=event.id)

    async def _completed(self) -> dict[str, Any]:
        """The answer, as JSON, where it is not too large."""
        broker = self._context.broker
        try:
            result, status = await broker.result(self._job_id), await broker.status(self._job_id)
            if result is None:
                return {"result": None}
            answer = await stored_answer(self._context, status, result, "application/json")
        except ServiceError as error:
            return {"result": None, "error": error_body(error).model_dump()}
        if not isinstance(answer, BaseModel):
            raise AssertionError("JSON was asked for")
        text = answer.model_dump_json(by_alias=True)
        kept = len(text) <= MOST_RESULT_BYTES
        return {"result": json.loads(text) if kept else None, "expires": status.expires}


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _preview(data: Mapping[str, Any]) -> dict[str, Any]:
    """States of images on the way, as PNG files."""
    images = [
        {"index": data["start"] + i, "format": "png", "b64": base64.b64encode(encode_image(state, "png")).decode()}
        for i, state in enumerate(data["pixels"])
    ]
    return {"block": data["block"], "blocks": data["blocks"], "images": images}
