"""A TCP proxy between processes and Redis that cuts connections, or swallows what goes through them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Proxy:
    """Forwards a free port to another; its loop runs in a thread of its own."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self.cuts = 0
        self.port = 0

    async def _serve(self, started: threading.Event) -> None:
        self._flowing.set()
        self._ended = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._ended.wait()
        server.close()
        self._abort()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, other_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._forward(reader, other_writer), self._forward(other_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= pair
            for each in pair:
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def _abort(self) -> None:
        self.cuts += len(self._writers) // 2
        for writer in list(self._writers):
            writer.transport.abort()

    def cut(self) -> None:
        """Cut every connection there is; new ones are welcome."""
        self._loop.call_soon_threadsafe(self._abort)

    def freeze(self) -> None:
        """Accept everything and pass nothing on."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def thaw(self) -> None:
        """Pass on again."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def run(self, started: threading.Event) -> None:
        """Serve until :meth:`stop`."""
        self._loop.run_until_complete(self._serve(started))
        self._loop.close()

    def stop(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._ended.set)


@contextmanager
def proxied(target: int) -> Iterator[Proxy]:
    """A proxy to a port of this host."""
    proxy, started = Proxy(target), threading.Event()
    thread = threading.Thread(target=proxy.run, args=(started,), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(20)
