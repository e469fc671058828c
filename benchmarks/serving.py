"""What the service costs and keeps: latency of scores under sampling, batching, overload, memory, and its peers.

Run it with ``python -m benchmarks.serving [--only latency,batching,overload,soak,peers] [--seconds 20] [--minutes 10]
[--json]``. Everything is a real process: a redis-server, two ``tarflow api``, two ``tarflow worker``; and ``tarflow
serve``; the load comes from a process of its own (``benchmarks.load``). CPU time is what the kernel's clocks say of all
processes of the service together. Without ``--only`` everything but soak and peers is measured. Peers need the extra
``bench``. A quiet machine is needed: what is compared shares it; how quiet it was is told after each measurement.
"""

from __future__ import annotations

import argparse
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.deployment import Deployment, distributed, embedded
from benchmarks.load import OK, Answers, Load, answers, apply, loading, percentile
from benchmarks.quietness import Quietness, lateness
from benchmarks.report import environment, print_json, print_report
from model.bundle import BUNDLED, open_bundle
from model.config import SolverOptions
from model.likelihood import add_noise, log_likelihood
from model.noise import input_noise
from model.weights import load_flow
from service.api.options import passes
from service.api.running import cost_of
from service.jobs import ModelInfo

SAMPLES, SCORES_A_SECOND, CONCURRENT_SCORES, CONCURRENT_SAMPLES = 32, 10.0, 64, 64
BATCH = 64
OVERLOAD, OVERLOAD_ROUNDS = 10.0, 3
REFUSED = (429, 503)
"""Answers that say when to come again."""
SETTLING_SECONDS = 2.5
WARM_SECONDS = 3.0
"""The beginning of a load, which is not counted."""
EMBEDDED, DISTRIBUTED = "serve", "2 api + 2 worker"
DEFAULT = ("latency", "batching", "overload")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measurement: str
    deployment: str
    figure: str
    value: float
    unit: str
    target: str = ""

    def cells(self) -> list[str]:
        """For people."""
        return [self.measurement, self.deployment, self.figure, f"{self.value:.4g} {self.unit}", self.target]


Rows = Iterator[Row]
Start = Callable[[], AbstractContextManager[Deployment]]


def _warmed_up(deployment: Deployment, *kinds: str) -> None:
    for kind in kinds:
        apply(Load(urls=deployment.urls, kind=kind, seconds=WARM_SECONDS, concurrency=8))


# Latency of scores under sampling


def latency(models: Path, seconds: float) -> Rows:
    """An open loop of scores, alone and while 32 samples are always on their way; and sampling, with and without."""
    one = partial(distributed, models, apis=1, workers=1)
    for name, start in (
        (EMBEDDED, partial(embedded, models)),
        ("api + worker", one),
        ("api + worker, not preempting", partial(one, preempting=False)),
    ):
        with start() as deployment:
            _warmed_up(deployment, "score", "sample")
            scores = Load(urls=deployment.urls, kind="score", seconds=seconds, rate=SCORES_A_SECOND)
            samples = Load(urls=deployment.urls, kind="sample", seconds=seconds, concurrency=SAMPLES)
            idle = apply(scores)
            alone = [apply(samples).throughput]
            # The scores begin when sampling is in full swing, and end before it does.
            with loading(Load(**{**vars(samples), "seconds": seconds + 2 * WARM_SECONDS})) as sampling:
                time.sleep(WARM_SECONDS)
                busy = apply(scores)
                both = answers(sampling)
            # Again: a machine that others share is not equally fast for two minutes.
            alone.append(apply(samples).throughput)
        yield from _latencies(name, idle, busy)
        kept = both.throughput / mean(alone) if any(alone) else float("nan")
        yield Row("latency", name, "samples/s alone", mean(alone), "images/s")
        yield Row("latency", name, "samples/s beside scores", both.throughput, "images/s")
        yield Row("latency", name, "sampling kept", 100 * kept, "%", "at least 85" if "not" not in name else "")


def _latencies(name: str, idle: Answers, busy: Answers) -> Rows:
    figures = {}
    for when, found in (("idle", idle), ("under sampling", busy)):
        took = found.of(after=WARM_SECONDS)
        for share in (0.5, 0.99):
            figures[when, share] = 1000 * percentile(took, share)
            yield Row("latency", name, f"score p{100 * share:.0f} {when}", figures[when, share], "ms")
        yield Row("latency", name, f"scores refused {when}", len(found.of(None)), "")
    added = figures["under sampling", 0.99] - figures["idle", 0.99]
    yield Row("latency", name, "score p99 added by sampling", added, "ms", "at most 40" if "not" not in name else "")


# What batching costs


def bare_model() -> tuple[float, float]:
    """CPU seconds and wall seconds per image of the bare model's batch of 64, in this process."""
    bundle = open_bundle("fashion-mnist")
    flow, noise, config = load_flow(bundle), bundle.config.noise, bundle.config.flow
    shape = (BATCH, config.channels, config.image_size, config.image_size)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    x_BTD = flow.patchify(add_noise(pixels, noise, input_noise(noise.kind, 0, 1, shape[1:])[0]))
    taken = []
    with torch.inference_mode():
        log_likelihood(flow, x_BTD)
        for _ in range(20):
            cpu, wall = time.process_time(), time.perf_counter()
            log_likelihood(flow, x_BTD)
            taken.append(((time.process_time() - cpu) / BATCH, (time.perf_counter() - wall) / BATCH))
    return min(each[0] for each in taken), min(each[1] for each in taken)


def _bare_elsewhere(threads: int) -> tuple[float, float]:
    """The same in a fresh process, with so many threads."""
    program = f"import torch; torch.set_num_threads({threads}); from benchmarks.serving import bare_model; "
    program += "print(*bare_model())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    cpu, wall = map(float, done.stdout.split())
    return cpu, wall


def batching(models: Path, seconds: float) -> Rows:
    """64 concurrent one-image scores: what the whole service computes for an image beyond the model itself."""
    threads = torch.get_num_threads()
    bare_cpu, bare_wall = _bare_elsewhere(threads)
    alone = 1 / bare_wall
    yield Row("batching", "bare model", f"images/s in batches of {BATCH}", alone, "images/s")
    yield Row("batching", "bare model", "CPU time an image", 1000 * bare_cpu, "ms")
    for name, start in _forms(models):
        with start() as deployment:
            _warmed_up(deployment, "score")
            load = Load(urls=deployment.urls, kind="score", seconds=seconds, concurrency=CONCURRENT_SCORES)
            before, own_before = deployment.cpu_seconds(), _model_seconds(deployment)
            found = apply(load)
            used, own = deployment.cpu_seconds() - before, _model_seconds(deployment) - own_before
        images = len(found.of())
        if not images:
            raise RuntimeError("no score was answered")
        yield Row("batching", name, "images/s", found.throughput, "images/s")
        yield Row("batching", name, "of the bare model's", 100 * found.throughput / alone, "%")
        yield Row("batching", name, "CPU time an image", 1000 * used / images, "ms")
        yield Row("batching", name, "of it in the model", 1000 * own / images, "ms")
        yield Row("batching", name, "beyond the model's own", 1000 * (used - own) / images, "ms", "at most 1.5")


def _model_seconds(deployment: Deployment) -> float:
    """CPU time of score batches so far, by the workers' own clocks, which they tell once a second."""
    time.sleep(SETTLING_SECONDS)
    return deployment.metric("tarflow_model_cpu_seconds_total", op="score")


def _forms(models: Path) -> list[tuple[str, Start]]:
    return [
        (EMBEDDED, partial(embedded, models)),
        (DISTRIBUTED, partial(distributed, models, apis=2, workers=2)),
    ]


# Overload


def overload(models: Path, seconds: float) -> Rows:
    """Ten times as many samples as can be drawn, with a queue of about two seconds: what is drawn nevertheless.

    A machine that others share is not equally fast for two minutes, so the peak is measured in turns with the overload.
    """
    for name, _ in _forms(models):
        with _bounded(name, models, None) as free:
            _warmed_up(free, "sample")
            most = Load(urls=free.urls, kind="sample", seconds=seconds, concurrency=CONCURRENT_SAMPLES)
            peaks = [apply(most).throughput]
            if not peaks[0]:
                raise RuntimeError("no sample was drawn")
            with _bounded(name, models, peaks[0]) as deployment:
                _warmed_up(deployment, "sample")
                load = Load(urls=deployment.urls, kind="sample", seconds=seconds, rate=OVERLOAD * peaks[0])
                found, sizes = [], []
                for _ in range(OVERLOAD_ROUNDS):
                    found.append(apply(load))
                    sizes.append(deployment.resident_bytes())
                    peaks.append(apply(most).throughput)
        refused = sorted(took for each in found for took in each.of(429))
        lost = sum(len(each.statuses) - len(each.of()) - len(each.of(429)) for each in found)
        # Each beside the peaks before and after it.
        kept = [2 * each.throughput / (peaks[i] + peaks[i + 1]) for i, each in enumerate(found)]
        yield Row("overload", name, "peak", median(peaks), "images/s")
        yield Row("overload", name, f"goodput at {OVERLOAD:g}x", median(each.throughput for each in found), "images/s")
        yield Row("overload", name, "of the peak", 100 * median(kept), "%", "at least 85")
        yield Row("overload", name, "refusals", len(refused), "")
        yield Row("overload", name, "refusal p99", 1000 * percentile(refused, 0.99), "ms", "at most 100")
        yield Row("overload", name, "neither drawn nor refused", lost, "", "0")
        for process, size in sizes[-1].items():
            grown = 100 * (size / sizes[0][process] - 1)
            yield Row("overload", name, f"memory of {process}", size / 2**20, "MiB")
            yield Row("overload", name, f"memory of {process}, grown after the first round", grown, "%")


@contextmanager
def _bounded(name: str, models: Path, peak: float | None) -> Iterator[Deployment]:
    """A form whose queue holds about two seconds of samples, or the usual one."""
    info = ModelInfo.of(open_bundle("fashion-mnist"))
    # As benchmarks.load asks for them.
    drawn = replace(info.sampling, guidance_scale=1.0, denoise=True)
    cost = 0 if peak is None else max(1, int(2 * peak * cost_of(info, 1, passes(info, drawn, SolverOptions()))))
    flags = ["--max-queue-cost", str(cost)] if cost else []
    if name == EMBEDDED:
        with embedded(models, *flags) as deployment:
            yield deployment
    else:
        with distributed(models, apis=2, workers=2, api_flags=flags) as deployment:
            yield deployment


# Soak


def soak(models: Path, minutes: float, forms: list[str]) -> Rows:
    """Moderate load for long, a third of the samples that can be drawn: memory of each process after the first minute
    and in the end. What the queue has no room for, on a machine that has got slower since, is refused and counted."""
    for name, start in _forms(models):
        if name not in forms:
            continue
        with start() as deployment:
            _warmed_up(deployment, "score", "sample")
            burst = Load(urls=deployment.urls, kind="sample", seconds=2 * WARM_SECONDS, concurrency=SAMPLES)
            rates = {"score": SCORES_A_SECOND, "sample": min(2.0, apply(burst).throughput / 3)}
            loads = [
                Load(urls=deployment.urls, kind=kind, seconds=60 * minutes, rate=rate) for kind, rate in rates.items()
            ]
            with loading(loads[0]) as scoring, loading(loads[1]) as sampling:
                time.sleep(min(60.0, 30 * minutes))
                first = deployment.resident_bytes()
                statuses = Counter([*answers(scoring).statuses, *answers(sampling).statuses])
                last = deployment.resident_bytes()
        answered, refused = statuses.pop(OK, 0), sum(statuses.pop(status, 0) for status in REFUSED)
        yield Row("soak", name, "minutes", minutes, "")
        yield Row("soak", name, "answered", answered, "")
        yield Row("soak", name, "refused", refused, "")
        for status, count in statuses.items():
            yield Row("soak", name, f"status {status}" if status else "broken connections", count, "", "0")
        yield Row("soak", name, "not answered well", sum(statuses.values()), "", "0")
        for process, size in last.items():
            yield Row("soak", name, f"memory of {process}", size / 2**20, "MiB")
            grown = 100 * (size / first[process] - 1)
            yield Row("soak", name, f"memory of {process}, grown after the first minute", grown, "%", "below 5")


# Peers


def peers(models: Path, seconds: float) -> Rows:
    """The same model behind other servers, drawn with the published loop, beside ``tarflow serve``; in one run."""
    from benchmarks.peers import PEERS, serving

    found: dict[str, dict[str, float]] = {}
    starts: dict[str, Start] = {"tarflow serve": partial(embedded, models)}
    starts |= {name: partial(serving, name) for name in PEERS}
    for name, start in starts.items():
        with start() as deployment:
            paths = {kind: f"/{kind}" if name in PEERS else "" for kind in ("score", "sample")}
            usual = Load(urls=deployment.urls, kind="", seconds=seconds, as_json=True)
            loads = {
                kind: Load(**{**vars(usual), "kind": kind, "concurrency": number, "path": paths[kind]})
                for kind, number in (("score", CONCURRENT_SCORES), ("sample", SAMPLES))
            }
            for load in loads.values():
                apply(Load(**{**vars(load), "seconds": WARM_SECONDS}))
            figures = {f"{kind} images/s": apply(load).throughput for kind, load in loads.items()}
            steady = Load(**{**vars(loads["score"]), "concurrency": 0, "rate": SCORES_A_SECOND})
            idle = apply(steady)
            with loading(Load(**{**vars(loads["sample"]), "seconds": seconds + 2 * WARM_SECONDS})) as sampling:
                time.sleep(WARM_SECONDS)
                busy = apply(steady)
                answers(sampling)
            for when, took in (("idle", idle.of(after=WARM_SECONDS)), ("sampling", busy.of(after=WARM_SECONDS))):
                for share in (0.5, 0.99):
                    figures[f"score p{100 * share:.0f} {when}"] = 1000 * percentile(took, share)
        found[name] = figures
        for figure, value in figures.items():
            yield Row("peers", name, figure, value, "images/s" if "images/s" in figure else "ms")
    for figure, target in (("score images/s", "at least 1.3"), ("sample images/s", "at least 2")):
        best = max((found[name][figure] for name in PEERS), default=float("nan"))
        yield Row(
            "peers",
            "tarflow serve",
            f"{figure}, times the best peer",
            found["tarflow serve"][figure] / best,
            "x",
            target,
        )


def _with_machine(name: str, measure: Callable[[], Rows]) -> Rows:
    """A measurement, and how quiet the machine was: no service answers sooner than timers and processors let it."""
    late, quietness = lateness(), Quietness()
    yield from measure()
    yield Row(name, "the machine", "a sleep ends late, p99", 1000 * max(late, lateness()), "ms")
    yield Row(name, "the machine", "CPU time taken by other guests", quietness.stolen(), "%")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(DEFAULT), help="latency, batching, overload, soak, peers")
    parser.add_argument("--models", type=Path, default=BUNDLED, help="bundles to serve (default: the bundled)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a load (default 20)")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the soak (default 10)")
    parser.add_argument("--soaked", default=f"{EMBEDDED},{DISTRIBUTED}", help="what is soaked, one after the other")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    measurements: dict[str, Callable[[], Rows]] = {
        "latency": partial(latency, options.models, options.seconds),
        "batching": partial(batching, options.models, options.seconds),
        "overload": partial(overload, options.models, options.seconds),
        "soak": partial(soak, options.models, options.minutes, options.soaked.split(",")),
        "peers": partial(peers, options.models, options.seconds),
    }
    wanted = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in wanted if name not in measurements]:
        parser.error(f"--only: got {unknown[0]!r}, allowed are {', '.join(measurements)}")
    # Whoever ends the program ends its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Many connections at once are many open files.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft < hard else soft, hard))
    rows = []
    for name in wanted:
        for row in _with_machine(name, measurements[name]):
            # It takes long: whoever watches sees how far it is.
            print("  ".join(row.cells()), file=sys.stderr, flush=True)
            rows.append(row)
    document: dict[str, Any] = {
        "benchmark": "serving",
        "environment": environment(torch.device("cpu")),
        "results": [vars(row) for row in rows],
    }
    if options.json:
        print_json(document)
        return
    columns = ["measurement", "service", "figure", "value", "target"]
    print_report("The service as processes", document, columns, [row.cells() for row in rows])


if __name__ == "__main__":
    main()
