"""A generation as OpenAI's server-sent events: images on the way from the noise, then the image."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio.to_thread
from fastapi.sse import format_sse_event

from model.images import encode_image
from service.api.context import Context
from service.api.jobs.documents import error_body
from service.api.jobs.streaming import EventStream
from service.api.openai_images.schemas import CompletedEvent, GenerationRequest, PartialImageEvent
from service.broker.base import Event
from service.errors import ServiceError, Unavailable
from service.jobs import JobResult, JobState

Finish = Callable[[JobResult], Awaitable[CompletedEvent]]


class GenerationStream(EventStream):
    """The events of a job of one image; it is given up when the client goes away."""

    def __init__(self, context: Context, job_id: str, body: GenerationRequest, size: str, finish: Finish) -> None:
        """``finish`` makes the last event of the job's result."""
        super().__init__(context, job_id, cancels=True)
        self._body, self._size, self._finish = body, size, finish
        self._shown: set[int] = set()

    async def _written(self, event: Event) -> bytes:
        if event.kind == JobState.COMPLETED:
            result = await self._context.broker.result(self._job_id)
            if result is None:
                return self._failed(Unavailable("the queue lost this image; ask again", code="broker_unreachable"))
            done = await self._finish(result)
            return format_sse_event(event=done.type, data_str=done.model_dump_json(by_alias=True))
        if event.final:
            return self._failed(ServiceError.from_wire(event.data))
        # After a worker was lost they come again.
        if event.kind == "preview" and event.data["block"] not in self._shown:
            partial = await self._partial(event.data)
            self._shown.add(event.data["block"])
            return format_sse_event(event=partial.type, data_str=partial.model_dump_json())
        return b""

    async def _partial(self, data: Mapping[str, Any]) -> PartialImageEvent:
        file_format = self._body.output_format or "png"
        pixels, quality = data["pixels"][0], self._body.output_compression
        image = await anyio.to_thread.run_sync(encode_image, pixels, file_format, quality)
        return PartialImageEvent(
            b64_json=base64.b64encode(image).decode(),
            created_at=int(time.time()),
            output_format=file_format,
            size=self._size,
            partial_image_index=len(self._shown),
            block=data["block"],
            blocks=data["blocks"],
        )

    def _failed(self, error: ServiceError) -> bytes:
        """The status was sent long ago: clients raise what an event of this shape says."""
        self._context.request.state.error = error
        content = {"type": "error", "error": error_body(error).model_dump()}
        return format_sse_event(event="error", data_str=json.dumps(content))

    def _reconnect(self, message: str) -> bytes:
        """There is nothing to come back to: the image is drawn for this connection alone."""
        return self._failed(Unavailable(message))
