"""Entry point of a worker process: ``python -m service.worker --socket PATH …``, started by the pool."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from model.bundle import BundleError
from model.device import resolve_device, visible_devices
from service.broker.base import BrokerGone
from service.broker.socket import SocketWorkerBroker
from service.jobs import EXIT_UNUSABLE
from service.worker.engine import Engine
from service.worker.metrics import WorkerMetrics
from service.worker.models import load_models


class _ListDevices(argparse.Action):
    """Prints what ``--device auto`` means on this machine, and ends: the pool has no torch to ask."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(",".join(visible_devices()))
        parser.exit()


def main() -> int:
    """Load, warm up, register, work; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m service.worker", description=__doc__)
    parser.add_argument("--list-devices", action=_ListDevices, nargs=0, help="print the devices, comma-separated")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, required=True)
    parser.add_argument("--cohorts", type=int, required=True)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    logging.basicConfig(
        level=options.log_level.upper(), format=f"%(asctime)s %(levelname)s {options.id} %(name)s: %(message)s"
    )
    log = logging.getLogger("service.worker")
    # Ctrl-C reaches the whole process group; the API process decides when workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(options.threads)
    try:
        models = load_models(options.models, resolve_device(options.device), options.batch_rows)
    except (BundleError, OSError, ValueError, RuntimeError) as error:
        log.error("cannot start: %s", error)
        return EXIT_UNUSABLE
    metrics = WorkerMetrics(options.id)
    try:
        broker = SocketWorkerBroker(options.socket)
        engine = Engine(broker, models, metrics, batch_rows=options.batch_rows, max_cohorts=options.cohorts)

        def stop(_signal: int, _frame: FrameType | None) -> None:
            engine.stopping = True

        signal.signal(signal.SIGTERM, stop)
        broker.register(engine.info)
        log.info("ready on %s with %s", models.device, ", ".join(models))
        engine.run()
        broker.close()
    except BrokerGone as error:
        log.info("stopping: %s", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
