"""GET /: the page for browsers, a few lines of text for whoever asks otherwise; and the files of the page.

All of it is open to anyone: it holds no secret and says nothing of what is served. What the page shows it asks of the
API, with the key that its reader gives it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from service.api.rendering import qualities
from service.page.files import PageFile, PageFiles, page_files

PATH = "/page/{version}"
"""Of the files, above their names."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: nothing that is written in it, and nothing with any other origin."""
REVALIDATED = "no-cache"
FOREVER = "public, max-age=31536000, immutable"
TEXT = """TarFlow: images from normalizing flows, and exactly how likely an image is.

This address is a page to try it on, in a browser.
  /docs           every endpoint, with examples
  /openapi.json   the same for programs
  /readyz         whether requests can be served

An image:
  curl -s http://HOST/v1/sample -H 'Accept: image/png' -H 'Content-Type: application/json' -d '{"seed": 7}' -o image.png
"""


def _wants_page(accept: str) -> bool:
    """Whether HTML is named, as browsers do: what takes anything, such as curl, prints what it gets."""
    found = qualities(accept)
    return max(found.get("text/html", 0.0), found.get("application/xhtml+xml", 0.0)) > found.get("text/plain", 0.0)


def _answer(request: Request, file: PageFile, cache_control: str, **more: str) -> Response:
    headers = {"cache-control": cache_control, "etag": file.etag, "vary": "Accept-Encoding", **more}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    content = file.content
    if file.packed and qualities(request.headers.get("accept-encoding", "")).get("gzip", 0.0) > 0:
        content, headers["content-encoding"] = file.packed, "gzip"
    return Response(content, media_type=file.media_type, headers=headers)


def _serving(page: PageFiles, name: str) -> Callable[[str, Request], Awaitable[Response]]:
    async def answer(version: str, request: Request) -> Response:
        # While replicas of two versions run, one may be asked for a file of the other's page.
        return _answer(request, page.others[name], FOREVER if version == page.version else REVALIDATED)

    return answer


def page_router() -> APIRouter:
    """The routes of the page, one for each file."""
    router, page = APIRouter(include_in_schema=False), page_files()

    async def index(request: Request) -> Response:
        if not _wants_page(request.headers.get("accept", "")):
            return Response(TEXT, media_type="text/plain; charset=utf-8", headers={"vary": "Accept"})
        more = {"content-security-policy": POLICY, "vary": "Accept, Accept-Encoding"}
        return _answer(request, page.index, REVALIDATED, **more)

    router.add_api_route("/", index, methods=["GET", "HEAD"])
    for name in page.others:
        router.add_api_route(f"{PATH}/{name}", _serving(page, name), methods=["GET", "HEAD"])
    return router
