"""Urgent work that nobody wants any more ends in the midst of its passes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from model.bundle import read_bundle
from service.worker.loading import LoadedModel
from service.worker.models import Models
from tests.service.worker.benches import bench_of, score, until

pytestmark = pytest.mark.anyio


async def test_canceled_scores_do_not_hold_up_others(models: Path, tmp_path: Path) -> None:
    model = LoadedModel.load(read_bundle(models / "tiny-vp"), torch.device("cpu"))
    passes: list[float] = []
    model.flow.blocks[0].register_forward_hook(lambda *_: passes.append(time.sleep(0.05) or 0.0))
    async with bench_of(Models(model.device, {"tiny-vp": model}), tmp_path) as bench:
        # Each is 256 passes of 8 rows: 12.8 seconds.
        await bench.submit(score("long", rows=32, draws=64), score("waits", rows=32, draws=64))
        bench.start()
        await until(lambda: passes)
        for job_id in ("long", "waits"):
            await bench.broker.cancel(job_id)
        await bench.submit(score("short"))
        assert (await bench.arrays("short"))["log_likelihood"].shape == (1,)
        assert len(passes) < 128
        assert bench.counted("tarflow_dropped_rows_total", op="score") >= 32
        assert bench.counted("tarflow_failed_batches_total") == 0
