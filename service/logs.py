"""What every process of the service writes to its log: one JSON object a line, or text where people look on.

Modules log through ``logging.getLogger(__name__)``, and so do uvicorn, redis and all the other libraries; structlog
renders the lines of all of them alike. What is known of the request that is being answered goes into all of its lines,
so that nobody has to hand it on. Importing this imports no torch.

A line never holds a key, an Authorization header, a query string or a Redis URL's password. Tracebacks are written
without the values of variables, for the same reason.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

import structlog
from structlog.processors import format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from service.jobs import Job

LogFormat = Literal["auto", "json", "text"]
LEADING = ("timestamp", "level", "event")
"""What each line begins with, so that people find it."""
COLORS = "color_message"
"""uvicorn's second form of a message, for terminals."""

_request: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)
"""One dictionary a request, which the tasks that work for it share: what one of them learns, all log."""

log = logging.getLogger(__name__)


def begin(request_id: str) -> None:
    """From here on this task, and those that it starts, work for a request."""
    _request.set({"request_id": request_id})


def bind(**fields: Any) -> None:
    """Add to what all lines of the present request say; nothing happens outside of one."""
    present = _request.get()
    if present is not None:
        present.update(fields)


def known() -> Mapping[str, Any]:
    """What is known of the present request; empty outside of one."""
    return _request.get() or {}


def about(first: Job, *others: Job) -> dict[str, Any]:
    """What a line about jobs of one model and op says of them, as ``extra``; of several the ids are lists."""
    fields: dict[str, Any] = {"model": first.model, "op": str(first.op), "job_id": first.id}
    if others:
        fields["job_id"] = [first.id, *(job.id for job in others)]
    # What the service wants itself is of no request.
    requests = [job.request_id for job in (first, *others) if job.request_id]
    if requests:
        fields["request_id"] = requests if others else requests[0]
    return fields


def configure(level: str, log_format: LogFormat, **always: str) -> None:
    """Log to standard error from here on; ``always`` are fields of every line, such as the worker's id."""
    # There is none where it was closed before the process began.
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    as_text = log_format == "text" or (log_format == "auto" and on_terminal)
    handler = logging.StreamHandler()
    handler.setFormatter(text(colors=on_terminal, **always) if as_text else lines(**always))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # No line shows these, and each costs every line a look.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False
    # What ends the process or one of its threads is a line as the others.
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def lines(**always: str) -> ProcessorFormatter:
    """A formatter that writes one JSON object a line."""
    return _formatter(always, [format_exc_info, _leading, structlog.processors.JSONRenderer(_dumped)])


def text(*, colors: bool = False, **always: str) -> ProcessorFormatter:
    """A formatter for people."""
    # Its usual formatter of exceptions shows the values of variables, which may be secrets.
    plain = structlog.dev.plain_traceback
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain, pad_event_to=0, sort_keys=False)
    return _formatter(always, [renderer])


def _formatter(always: Mapping[str, str], last: list[Processor]) -> ProcessorFormatter:
    def add_known(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """What the line says itself wins."""
        return {**always, **known(), **event}

    first: list[Processor] = [ExtraAdder(), _describe, add_known]
    return ProcessorFormatter(
        processors=[*first, ProcessorFormatter.remove_processors_meta, *last], keep_exc_info=False, use_get_message=True
    )


def _describe(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    event.pop(COLORS, None)
    whole, milliseconds = int(record.created), int(record.msecs)
    event["timestamp"] = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"
    event["level"], event["logger"] = record.levelname.lower(), record.name
    return event


def _leading(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {**{name: event.pop(name) for name in LEADING}, **event}


def _dumped(event: EventDict, **_options: Any) -> str:
    return json.dumps(event, ensure_ascii=False, default=str, separators=(",", ":"))


def _uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
        return
    log.critical("an error that nobody handles ends this process", exc_info=(kind, error, where))


def _uncaught_in_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is SystemExit:
        return
    error = ended.exc_value or ended.exc_type()
    log.error("an error that nobody handles ends a thread", exc_info=(ended.exc_type, error, ended.exc_traceback))
