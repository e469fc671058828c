"""Headers that keep browsers from doing with answers what nobody meant."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Nothing that is answered is a page, but for /docs, which says itself what it needs.
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    # Results are their caller's, and no cache between knows callers apart.
    b"cache-control": b"no-store",
}


class SecurityHeaders:
    """ASGI middleware; what an answer says itself stays."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", ())
                said = {name for name, _ in own}
                message["headers"] = [*own, *(pair for pair in HEADERS.items() if pair[0] not in said)]
            await send(message)

        await self.app(scope, receive, send_with_headers)
