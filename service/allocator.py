"""The C library's memory: what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys

LARGE = 2**20
"""Bytes from which on a block is mapped by itself, and unmapped when it is freed."""
HEAPS = 1
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def give_back_memory() -> None:
    """Let no freed image stay in memory; for processes that decode images in several threads.

    glibc takes every large block that is freed as a sign that more of its size will be wanted: it raises the size from
    which on blocks are mapped by themselves, up to 32 MiB, and then keeps such blocks in a heap for each thread. Ten
    thousand uploads, some of them large, left a gigabyte behind in that way, and a few megabytes with a fixed size.

    And each thread that comes gets a heap of its own, with holes of its own: what a service of 100 MB takes grew by
    some percent in ten minutes, though nothing was kept. All threads share one; they seldom ask at the same time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such thing, and no need
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE)
            mallopt(_M_ARENA_MAX, HEAPS)
