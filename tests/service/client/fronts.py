"""A small HTTP server before the service, which does to requests what networks and balancers do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from tests.service.processes import PATIENCE

OWN_HEADERS = {"host", "connection", "content-length", "accept-encoding", "transfer-encoding", "date"}
"""What each connection says for itself."""


@dataclass
class Request:
    """One request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    answer: httpx.Response | None = None
    """What the service said, where it was asked."""


Act = Callable[["Front", Request], httpx.Response | None]
"""What is done with a request; no answer breaks the connection."""


@dataclass
class Front:
    """Does the acts of a script, one for each request, then passes everything on."""

    target: str
    script: list[Act] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    behind: list[threading.Thread] = field(default_factory=list)
    url: str = ""

    def keys(self) -> list[str | None]:
        """The idempotency key of each request."""
        return [request.headers.get("idempotency-key") for request in self.requests]

    def serve(self, request: Request) -> httpx.Response | None:
        """What comes of a request."""
        self.requests.append(request)
        act = self.script.pop(0) if self.script else forward
        return act(self, request)


def forward(front: Front, request: Request) -> httpx.Response:
    """Pass it on, and the answer back."""
    headers = {name: value for name, value in request.headers.items() if name not in OWN_HEADERS}
    url = front.target + request.path
    answer = httpx.request(request.method, url, headers=headers, content=request.body, timeout=PATIENCE)
    request.answer = answer
    return answer


def answer(status: int, content: bytes | str = b"", **headers: str) -> Act:
    """Say something without asking the service."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda front, request: httpx.Response(status, headers=named, content=content)


def lose_the_answer(front: Front, request: Request) -> None:
    """Pass it on, and break the connection when the answer is there."""
    forward(front, request)


def break_at_once(front: Front, request: Request) -> None:
    """Break the connection while the service works on it."""
    thread = threading.Thread(target=forward, args=(front, request))
    front.behind.append(thread)
    thread.start()


def swallow(front: Front, request: Request) -> None:
    """Break the connection, and pass nothing on."""


def begin(front: Front, request: Request) -> httpx.Response:
    """Pass it on, and back only the head of the answer, as soon as it is there."""
    headers = {name: value for name, value in request.headers.items() if name not in OWN_HEADERS}
    url = front.target + request.path
    with httpx.stream(request.method, url, headers=headers, content=request.body, timeout=PATIENCE) as answer:
        request.answer = httpx.Response(answer.status_code, headers=answer.headers)
    return request.answer


@dataclass
class Held:
    """Does an act, and then says nothing until it is let go; the connection breaks."""

    act: Act
    is_done: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, front: Front, request: Request) -> None:
        self.act(front, request)
        self.is_done.set()
        self.let_go.wait(PATIENCE)


@contextmanager
def fronting(target: str) -> Iterator[Front]:
    """A front on a port of its own."""
    front = Front(target)

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found = front.serve(Request(self.command, self.path, headers, body))
            if found is None:
                return
            self.send_response_only(found.status_code)
            for name, value in found.headers.items():
                if name not in OWN_HEADERS:
                    self.send_header(name, value)
            self.send_header("content-length", str(len(found.content)))
            self.end_headers()
            self.wfile.write(found.content)

        do_GET = do_POST = do_DELETE = do

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        front.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield front
        finally:
            http.shutdown()
            thread.join()
            for each in front.behind:
                each.join()
