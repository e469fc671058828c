"""Where a service without keys may listen."""

from __future__ import annotations

import ipaddress
import socket

from service.settings import Settings


def is_loopback(host: str) -> bool:
    """Whether only this host can reach what listens there; a name when all its addresses are such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        found = []
    return bool(found) and all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def check_binding(settings: Settings) -> None:
    """Raise ``ValueError`` for a service that others reach and that would answer anyone without having been told to."""
    if settings.has_keys or settings.anonymous or is_loopback(settings.host):
        return
    raise ValueError(
        f"host: got {settings.host!r}, which others reach, and no keys are configured; make a key with 'tarflow keys "
        "new NAME --scope infer --keys keys.toml' and give --keys keys.toml, or say --anonymous true to answer whoever "
        "reaches the port (allowed without either: 127.0.0.1, ::1, localhost)"
    )
