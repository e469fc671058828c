"""Multipart forms: small ones in memory; of large ones all files in one temporary file, however many they are.

Unlike Starlette's parser this one never takes a body that was cut off for a whole one.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.archives import Section
from service.errors import InternalError, InvalidRequest, MalformedRequest

FIELD_BYTES = 64 * 1024
MOST_FIELDS = 100


@dataclass
class FormFile:
    """One file of a form."""

    field: str
    filename: str
    content: Section


@dataclass
class Form:
    """Text fields in their order, and files."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[FormFile] = field(default_factory=list)


class _Collector:
    """What the parser calls: keeps short fields and writes the bytes of files one after the other."""

    def __init__(self, file: IO[bytes], max_files: int) -> None:
        self.form = Form()
        self.closed = False
        """Whether the boundary after the last part was there."""
        self._file, self._max_files, self._written = file, max_files, 0
        self._header, self._value = b"", b""
        self._options: dict[bytes, bytes] = {}
        self._text: bytearray | None = None
        self._start = 0

    def begin(self) -> None:
        self._options, self._header, self._value = {}, b"", b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._options = parse_options_header(self._value)[1]
        self._header, self._value = b"", b""

    def headers_finished(self) -> None:
        if b"name" not in self._options:
            raise MalformedRequest("a part of the form has no name")
        self._start = self._written
        self._text = None if b"filename" in self._options else bytearray()
        if self._text is None and len(self.form.files) >= self._max_files:
            raise InvalidRequest(f"files: got more than {self._max_files}, the most that are allowed", param="files")
        if self._text is not None and len(self.form.fields) >= MOST_FIELDS:
            raise MalformedRequest(f"the form has more than {MOST_FIELDS} fields")

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self._file.write(data[start:end])
            self._written += end - start
        else:
            self._text += data[start:end]
            if len(self._text) > FIELD_BYTES:
                raise MalformedRequest(f"a field of the form is longer than {FIELD_BYTES} bytes")

    def end(self) -> None:
        name = self._options[b"name"].decode(errors="replace")
        if self._text is None:
            filename = self._options[b"filename"].decode(errors="replace")
            section = Section(self._file, self._start, self._written - self._start)
            self.form.files.append(FormFile(name, filename, section))
        else:
            self.form.fields.append((name, self._text.decode(errors="replace")))

    def close(self) -> None:
        self.closed = True


async def read_form(request: Request, max_files: int) -> Form:
    """The form of a multipart request, in memory: for bodies that the app's limit of the body keeps small.

    Raises as :func:`spooled_form`.
    """
    boundary, collector = _boundary(request), _Collector(io.BytesIO(), max_files)

    async def write(parser: MultipartParser, chunk: bytes) -> None:
        parser.write(chunk)

    return await _parsed(request, boundary, collector, write)


@asynccontextmanager
async def spooled_form(request: Request, directory: Path, max_files: int) -> AsyncIterator[Form]:
    """The form of a multipart request; its files can be read until the context ends.

    The temporary file is in ``directory``, which is made; it has no name there and is gone with the process. Raises
    ``MalformedRequest`` for what is no form or ends too early, ``InvalidRequest`` for too many files.
    """
    boundary = _boundary(request)

    def opened() -> IO[bytes]:
        directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=directory)

    async def write(parser: MultipartParser, chunk: bytes) -> None:
        # Writes to disk.
        await anyio.to_thread.run_sync(parser.write, chunk)

    try:
        file = await anyio.to_thread.run_sync(opened)
        with file:
            yield await _parsed(request, boundary, _Collector(file, max_files), write)
    except OSError as error:
        raise InternalError(
            f"the upload cannot be kept ({error.strerror}); the setting 'state', or TMPDIR of tarflow api, names "
            "its directory",
            code="state_unwritable",
        ) from error


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedRequest(
            f"Content-Type: got {kind.decode(errors='replace')[:100] or 'none'!r}, allowed is multipart/form-data with "
            "a boundary (curl: -F files=@images.zip)",
            code="unsupported_content_type",
        )
    return options[b"boundary"]


async def _parsed(
    request: Request,
    boundary: bytes,
    collector: _Collector,
    write: Callable[[MultipartParser, bytes], Awaitable[None]],
) -> Form:
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collector.begin,
                "on_header_field": collector.header_field,
                "on_header_value": collector.header_value,
                "on_header_end": collector.header_end,
                "on_headers_finished": collector.headers_finished,
                "on_part_data": collector.data,
                "on_part_end": collector.end,
                "on_end": collector.close,
            },
        )
        async for chunk in request.stream():
            if chunk:
                await write(parser, chunk)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"the body is not a multipart form: {error}") from error
    # The parser takes a body that is cut off anywhere for a whole one, less the part that it was cut in.
    if not collector.closed:
        end = boundary.decode(errors="replace")
        raise MalformedRequest(
            f"the body ends before its closing boundary, --{end}--; it was cut off on its way: send it again"
        )
    return collector.form
