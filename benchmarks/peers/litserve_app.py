"""LitServe with the model behind it: ``python -m benchmarks.peers.litserve_app PORT``."""

from __future__ import annotations

import sys
from typing import Any

import litserve

from benchmarks.peers import SAMPLE_BATCH, SCORE_BATCH, WAIT_SECONDS
from benchmarks.peers.model import Plain


class Score(litserve.LitAPI):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """POST /score."""

    def setup(self, device: str) -> None:
        """See LitServe, here and below."""
        self.plain = Plain()

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.plain.score(inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output


class Sample(Score):
    """POST /sample."""

    def predict(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.plain.sample(inputs)


if __name__ == "__main__":
    apis = [
        Score(max_batch_size=SCORE_BATCH, batch_timeout=WAIT_SECONDS, api_path="/score"),
        Sample(max_batch_size=SAMPLE_BATCH, batch_timeout=WAIT_SECONDS, api_path="/sample"),
    ]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
