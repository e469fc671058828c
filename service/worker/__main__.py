"""Entry point of a worker process: ``python -m service.worker``, started by a pool."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import get_args

import torch
from prometheus_client import disable_created_metrics

from model.device import resolve_device, visible_devices
from service import logs
from service.broker.base import BrokerGone, Limits, WorkerBroker
from service.jobs import EXIT_UNUSABLE, REDIS_VARIABLE
from service.worker.engine import Engine
from service.worker.metrics import WorkerMetrics
from service.worker.models import LOAD_FAULTS, load_models
from service.worker.operations import answer_operations
from service.worker.watchdog import Watchdog


class _ListDevices(argparse.Action):
    """Prints what ``--device auto`` means on this machine, and ends: the pool has no torch to ask."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(",".join(visible_devices()))
        parser.exit()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m service.worker", description=__doc__)
    parser.add_argument("--list-devices", action=_ListDevices, nargs=0, help="print the devices, comma-separated")
    broker = parser.add_mutually_exclusive_group(required=True)
    broker.add_argument("--socket", type=Path, help="Unix socket of the embedded broker")
    broker.add_argument("--redis", action="store_true", help=f"the broker is the Redis of {REDIS_VARIABLE}")
    parser.add_argument("--redis-prefix", default="tarflow")
    parser.add_argument("--limits", type=json.loads, help="JSON of the broker's limits; with --redis")
    parser.add_argument("--id", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model-memory", type=int, default=0, help="most bytes of weights, 0 for no limit")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, required=True)
    parser.add_argument("--batch-wait-ms", type=float, default=0.0)
    parser.add_argument("--cohorts", type=int, required=True)
    parser.add_argument("--slice-limit-seconds", type=float, default=60.0)
    parser.add_argument("--grace-seconds", type=float, default=0.0)
    parser.add_argument("--metrics-port", type=int, default=0, help="0 for none")
    parser.add_argument("--supervised", action="store_true", help="leave when standard input ends")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="auto", choices=get_args(logs.LogFormat))
    return parser.parse_args()


def _leave_with_the_supervisor() -> None:
    """A worker that nobody looks after must not keep its device from the next."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _connect(options: argparse.Namespace, watchdog: Watchdog) -> WorkerBroker:
    if options.redis:
        from service.broker.redis.worker import RedisWorkerBroker

        url, limits = os.environ[REDIS_VARIABLE], Limits(**options.limits)
        # Who waits for Redis is not stuck.
        return RedisWorkerBroker(url, options.id, limits, prefix=options.redis_prefix, waiting=watchdog.alive)
    from service.broker.socket import SocketWorkerBroker

    return SocketWorkerBroker(options.socket)


def main() -> int:
    """Load, warm up, register, work; returns the exit status."""
    options = _options()
    logs.configure(options.log_level, options.log_format, worker=options.id)
    log = logging.getLogger("service.worker")
    # Ctrl-C reaches the whole process group; the supervisor decides when workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if options.supervised:
        threading.Thread(target=_leave_with_the_supervisor, name="supervisor", daemon=True).start()
    torch.set_num_threads(options.threads)
    # When a counter was first counted is nobody's question, and would be a series for each.
    disable_created_metrics()
    metrics, watchdog = WorkerMetrics(options.id), Watchdog(options.slice_limit_seconds)
    try:
        if options.metrics_port:
            ready_seconds = Limits(**options.limits).ready_seconds
            answer_operations(options.metrics_port, metrics.apart(), lambda: watchdog.heard_within(ready_seconds))
        device = resolve_device(options.device)
        metrics.introduce(str(device), torch.__version__)
        models = load_models(options.models, device, options.batch_rows, options.model_memory)
    except LOAD_FAULTS as error:
        log.error("cannot start: %s", error)
        return EXIT_UNUSABLE
    try:
        broker = _connect(options, watchdog)
        engine = Engine(
            broker,
            models,
            metrics,
            batch_rows=options.batch_rows,
            max_cohorts=options.cohorts,
            batch_wait_ms=options.batch_wait_ms,
            grace_seconds=options.grace_seconds,
            alive=watchdog.alive,
        )

        def stop(_signal: int, _frame: FrameType | None) -> None:
            engine.stopping = True

        broker.register(engine.info)
        # Until here there is nothing to finish.
        signal.signal(signal.SIGTERM, stop)
        log.info("ready on %s with %s", models.device, ", ".join(models))
        watchdog.start()
        engine.run()
        watchdog.stop()
        broker.close()
    except BrokerGone as error:
        log.info("stopping: %s", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
