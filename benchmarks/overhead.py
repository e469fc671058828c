"""What HTTP costs: the latency of /v1/score against the same call in this process, at several concurrencies.

Run it with ``python -m benchmarks.overhead [--concurrency 1,8,64] [--seconds 5] [--rounds 3] [--json]``. The call in
the process is what a worker does with as many one-image requests at once: decode the files, add the noise, one
batch of the model. The requests come from a process of its own over kept connections. Both take turns, round by round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.deployment import embedded
from benchmarks.load import Load, apply, image_file, percentile
from benchmarks.report import environment, print_json, print_report
from model.bundle import BUNDLED, open_bundle
from model.device import resolve_device
from model.images import fit_image, load_image
from service.api.running import new_job
from service.jobs import Op
from service.worker.loading import LoadedModel
from service.worker.scoring import score

WARM_SECONDS = 2.0


def _call(model: LoadedModel, files: list[bytes]) -> None:
    """Score files as so many requests would have them scored, in one batch."""
    jobs = []
    for file in files:
        fitted = fit_image(load_image(file), model.info.flow.image_size, model.info.flow.channels)
        payload = {"pixels": fitted.pixels[np.newaxis], "label": None, "draws": 1, "seed": 0, "statistics": None}
        jobs.append(new_job(model.info, Op.SCORE, payload, 1))
    score(model, jobs, len(jobs))


def in_process(model: LoadedModel, concurrency: int, seconds: float) -> list[float]:
    """Seconds that calls of a batch take."""
    files = [image_file(number % 16) for number in range(concurrency)]
    _call(model, files)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not taken:
        start = time.perf_counter()
        _call(model, files)
        taken.append(time.perf_counter() - start)
    return taken


def measure(models: Path, concurrencies: list[int], seconds: float, rounds: int) -> list[dict[str, float]]:
    """Per concurrency the percentiles of both in milliseconds, and how many requests and calls there were."""
    bundle = open_bundle("fashion-mnist")
    model = LoadedModel.load(bundle, resolve_device("cpu"))
    results = []
    with embedded(models) as deployment:
        load = partial(Load, urls=deployment.urls, kind="score")
        apply(load(seconds=WARM_SECONDS, concurrency=8))
        for concurrency in concurrencies:
            calls: list[float] = []
            requests: list[float] = []
            for _ in range(rounds):
                calls += in_process(model, concurrency, seconds)
                found = apply(load(seconds=seconds, concurrency=concurrency))
                if refused := found.of(None):
                    raise RuntimeError(f"{len(refused)} of {len(found.statuses)} requests were not answered well")
                requests += found.of()
            row: dict[str, float] = {"concurrency": concurrency, "calls": len(calls), "requests": len(requests)}
            for name, took in (("in_process", sorted(calls)), ("http", sorted(requests))):
                for share in (50, 99):
                    row[f"{name}_p{share}_ms"] = 1000 * percentile(took, share / 100)
            results.append(row)
    return results


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", default="1,8,64", help="requests on their way at all times")
    parser.add_argument("--models", type=Path, default=BUNDLED, help="bundles to serve (default: the bundled)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each part (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both take turns (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    concurrencies = [int(part) for part in options.concurrency.split(",")]
    document: dict[str, Any] = {
        "benchmark": "overhead",
        "environment": environment(torch.device("cpu")),
        "results": measure(options.models, concurrencies, options.seconds, options.rounds),
    }
    if options.json:
        print_json(document)
        return
    rows = [
        [
            f"{row['concurrency']:.0f}",
            *(f"{row[f'{name}_p50_ms']:.1f} / {row[f'{name}_p99_ms']:.1f}" for name in ("in_process", "http")),
            *(f"{row[f'http_p{share}_ms'] / row[f'in_process_p{share}_ms']:.2f}" for share in (50, 99)),
        ]
        for row in document["results"]
    ]
    columns = ["concurrency", "in the process, p50 / p99 ms", "by HTTP, p50 / p99 ms", "ratio of p50", "ratio of p99"]
    print_report("Scores of one image each", document, columns, rows)


if __name__ == "__main__":
    main()
