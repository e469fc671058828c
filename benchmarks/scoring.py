"""How fast ``POST /v1/score`` is, plain, with verdicts and with maps, beside the bare model's parallel pass.

Run it with ``python -m benchmarks.scoring [--bundle DIR] [--device cpu] [--images 1,16,64] [--repeats 9] [--json]``. It
starts the service as ``tarflow serve`` does, sends one request after the other with so many PNG files each, and takes
turns with passes of the same network over as many images in this process, so that what else the machine does hits all;
a ratio is the median over the rounds. Requests include decoding, queueing, lossless codes for verdicts, and JSON.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.report import environment, print_json, print_report
from benchmarks.timing import seconds
from model.bundle import Bundle, open_bundle
from model.images import encode_image
from model.likelihood import add_noise, log_likelihood
from model.noise import input_noise
from model.weights import load_flow

READY_SECONDS = 300.0
MODES: dict[str, dict[str, str]] = {
    "plain": {},
    "verdict": {"alpha": "0.05"},
    "maps": {"alpha": "0.05", "maps": "array"},
    "overlay": {"alpha": "0.05", "maps": "overlay"},
}


@contextmanager
def service(bundle: Path, device: str) -> Iterator[httpx.Client]:
    """A ready service of one bundle on a free port, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as state:
        command = [
            str(Path(sys.executable).with_name("tarflow")),
            "serve",
            "--models",
            str(bundle),
            "--port",
            str(port),
        ]
        command += ["--device", device, "--state", state, "--log-level", "warning"]
        process = subprocess.Popen(command, env=os.environ)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                _wait_ready(client, process)
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError("the service did not become ready; its log is above")


def post(client: httpx.Client, files: list[bytes], fields: dict[str, str]) -> None:
    """One request; raises ``RuntimeError`` with the answer when it is refused."""
    sent = [("files", (f"{i}.png", data, "image/png")) for i, data in enumerate(files)]
    response = client.post("/v1/score", files=sent, data=fields)
    if response.status_code != 200:
        raise RuntimeError(response.text)


def measure(bundle: Bundle, device: torch.device, counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds per image of every mode and of the bare pass, for so many images at a time."""
    flow, noise = load_flow(bundle, device), bundle.config.noise
    config = flow.config
    shape = (max(counts), config.channels, config.image_size, config.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    draw = input_noise(noise.kind, 0, 1, shape[1:])[0]
    files = [encode_image(image, "png") for image in pixels]
    modes = {name: fields for name, fields in MODES.items() if name == "plain" or bundle.calibration is not None}
    results = []
    with service(bundle.path, str(device)) as client, torch.inference_mode():
        for count in counts:
            x_BTD = flow.patchify(add_noise(torch.from_numpy(pixels[:count].copy()), noise, draw).to(device))

            def bare(x_BTD: torch.Tensor = x_BTD) -> torch.Tensor:
                return log_likelihood(flow, x_BTD)

            times: dict[str, list[float]] = {name: [] for name in ("bare pass", *modes)}
            for number in range(repeats + 1):
                taken = {"bare pass": seconds(bare, device)[0]}
                for name, fields in modes.items():
                    start = time.perf_counter()
                    post(client, files[:count], fields)
                    taken[name] = time.perf_counter() - start
                # The first round warms everything up.
                if number:
                    for name, value in taken.items():
                        times[name].append(value)
            for name, values in times.items():
                results.append(
                    {
                        "images": count,
                        "mode": name,
                        "milliseconds": 1000 * statistics.median(values),
                        "images_per_second": count / statistics.median(values),
                        "times_bare_pass": statistics.median(
                            a / b for a, b in zip(values, times["bare pass"], strict=True)
                        ),
                    }
                )
    return results


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="fashion-mnist", help="bundle (default: the bundled)")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--images", default="1,16,64", help="images a request (default 1,16,64)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    device = torch.device(options.device)
    counts = [int(count) for count in options.images.split(",")]
    bundle = open_bundle(options.bundle)
    results = measure(bundle, device, counts, options.repeats)
    document: dict[str, Any] = {
        "benchmark": "scoring",
        "environment": environment(device),
        "bundle": bundle.name,
        "results": results,
    }
    if options.json:
        print_json(document)
        return
    rows = [
        [
            str(row["images"]),
            row["mode"],
            f"{row['milliseconds']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['times_bare_pass']:.2f}",
        ]
        for row in results
    ]
    columns = ["images", "mode", "ms a request", "images/s", "of a bare pass"]
    print_report(f"POST /v1/score, {bundle.name}", document, columns, rows)


if __name__ == "__main__":
    main()
