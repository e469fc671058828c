"""``tarflow worker`` whose workers finish all sampling before they look for scores: preemption's alternative."""

from __future__ import annotations

import sys

FOREVER = 1e9


def main() -> None:
    """The console script, or with the first argument ``--worker-process`` one of its workers."""
    if sys.argv[1:2] == ["--worker-process"]:
        del sys.argv[1]
        from service.worker import __main__ as worker
        from service.worker import engine

        engine.POLL_SECONDS = FOREVER
        sys.exit(worker.main())
    from service import pool
    from service.cli import main as console

    pool.WORKER = ("benchmarks.unpreempted", "--worker-process")
    console()


if __name__ == "__main__":
    main()
