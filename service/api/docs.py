"""/docs and /openapi.json: open to anyone, as they say nothing of what is served or for whom."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

router = APIRouter(include_in_schema=False)

_PAGE = get_swagger_ui_html(openapi_url="openapi.json", title="TarFlow")
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def _policy(page: bytes) -> str:
    """What the page loads and runs, and nothing else: its own script is known by its hash."""
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(page)]
    inline = " ".join(f"'sha256-{text}'" for text in digests)
    return (
        f"default-src 'none'; script-src https://cdn.jsdelivr.net {inline}; connect-src 'self'; "
        "style-src https://cdn.jsdelivr.net 'unsafe-inline'; img-src data: https://fastapi.tiangolo.com; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


_POLICY = _policy(bytes(_PAGE.body))


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The page; it asks for what it describes itself."""
    return HTMLResponse(_PAGE.body, headers={"content-security-policy": _POLICY})


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """What is described."""
    return JSONResponse(request.app.openapi())
