"""mosec with the model behind it: ``MOSEC_PORT=PORT python -m benchmarks.peers.mosec_app``."""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.peers import SAMPLE_BATCH, SCORE_BATCH, WAIT_SECONDS
from benchmarks.peers.model import Plain

os.environ.setdefault("MOSEC_ADDRESS", "127.0.0.1")
os.environ.setdefault("MOSEC_TIMEOUT", "600000")
# It would read the arguments of the program.
del sys.argv[1:]

from mosec import Runtime, Server, Worker  # noqa: E402


class Score(Worker):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """POST /score."""

    def __init__(self) -> None:
        self.plain = Plain()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One batch."""
        return self.plain.score(data)


class Sample(Score):
    """POST /sample."""

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One batch."""
        return self.plain.sample(data)


if __name__ == "__main__":
    wait = round(1000 * WAIT_SECONDS)
    server = Server()
    server.register_runtime(
        {
            "/score": [Runtime(Score, num=1, max_batch_size=SCORE_BATCH, max_wait_time=wait, timeout=600)],
            "/sample": [Runtime(Sample, num=1, max_batch_size=SAMPLE_BATCH, max_wait_time=wait, timeout=600)],
        }
    )
    server.run()
