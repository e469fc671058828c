"""Forms: whole ones are read however their bytes arrive, and one that was cut off is never taken for whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.types import Message

from service.api.forms import Form, read_form, spooled_form
from service.errors import MalformedRequest

pytestmark = pytest.mark.anyio
CONTENT = b"\r\n--a\r\n--ab--\r\n-- \r\n--a-\x00"
"""Bytes of a file that look like the boundary 'a b', almost."""
BODY = (
    b'--a b\r\nContent-Disposition: form-data; name="name"\r\n\r\nmine\r\n'
    b'--a b\r\nContent-Disposition: form-data; name="files"; filename="1.png"\r\n\r\n' + CONTENT + b"\r\n--a b--"
)
TYPE = 'multipart/form-data; boundary="a b"'

Contents = tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]
WHOLE: Contents = ([("name", "mine")], [("files", "1.png", CONTENT)])


async def read(chunks: Sequence[bytes], directory: Path, content_type: str = TYPE) -> Contents:
    """Fields, and files with their bytes, of a body that arrives in pieces; the same in memory and on disk."""

    def request() -> Request:
        waiting = list(chunks)

        async def receive() -> Message:
            chunk = waiting.pop(0) if waiting else b""
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

        headers = [(b"content-type", content_type.encode("latin-1"))]
        return Request({"type": "http", "method": "POST", "headers": headers}, receive)

    def contents(form: Form) -> Contents:
        return form.fields, [(file.field, file.filename, file.content.read()) for file in form.files]

    try:
        in_memory = contents(await read_form(request(), 10))
    except MalformedRequest as error:
        with pytest.raises(MalformedRequest, match=re.escape(str(error))):
            async with spooled_form(request(), directory, 10):
                pass
        raise
    async with spooled_form(request(), directory, 10) as form:
        assert contents(form) == in_memory
    return in_memory


async def test_a_whole_form_in_any_two_pieces(tmp_path: Path) -> None:
    for place in range(len(BODY) + 1):
        assert await read([BODY[:place], BODY[place:]], tmp_path) == WHOLE
    assert await read([bytes([byte]) for byte in BODY], tmp_path) == WHOLE


async def test_a_form_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    for place in range(len(BODY)):
        with pytest.raises(MalformedRequest, match="the body ends before its closing boundary, --a b--") as caught:
            await read([BODY[:place]], tmp_path)
        assert caught.value.code == "malformed_body"


async def test_what_comes_before_and_after(tmp_path: Path) -> None:
    assert await read([b"\r\n" + BODY], tmp_path) == WHOLE
    for epilogue in (b"\r\n", b"\r\nepilogue", b"\r\n--a b\r\nno part"):
        assert await read([BODY + epilogue], tmp_path) == WHOLE
        assert await read([BODY, epilogue], tmp_path) == WHOLE
    # A form without a part is a form, and a closing boundary of another one closes nothing.
    assert await read([b"--a b--\r\n"], tmp_path) == ([], [])
    with pytest.raises(MalformedRequest, match="closing boundary"):
        await read([BODY[:-5] + b"c d--"], tmp_path)


async def test_boundaries(tmp_path: Path) -> None:
    for plain in ("x", "-", "--", "x--", "a" * 70, "'()+_,-./:=?"):
        body = BODY.replace(b"--a b", b"--" + plain.encode())
        assert (await read([body], tmp_path, f'multipart/form-data; boundary="{plain}"'))[0] == WHOLE[0]
        with pytest.raises(MalformedRequest):
            await read([body[:-2]], tmp_path, f'multipart/form-data; boundary="{plain}"')
    with pytest.raises(MalformedRequest, match="Boundary length 300"):
        await read([BODY], tmp_path, "multipart/form-data; boundary=" + "a" * 300)
