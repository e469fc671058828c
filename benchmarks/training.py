"""Training: images a second and peak memory, ours beside the published loop, and one process beside two.

Every figure is of processes of its own, on images of noise. The loops take turns, and the fastest step of each turn
counts: what others do on the machine only ever makes a step slower. Ours clips gradients and averages weights within
its steps, the published loop does not; both have AdamW, whatever the preset has. On a CPU two processes have half of
the cores each, and stand beside one that has no more than that.

    python -m benchmarks.training --preset fashion-mnist
    python -m benchmarks.training --preset imagenet64-conditional-p4 --device cuda --set compile=true --batch-size 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.memory import peak_bytes
from benchmarks.published.training import PublishedTraining
from benchmarks.report import environment, print_json, print_report
from benchmarks.timing import seconds
from model.device import resolve_device
from training.classes import resolve_classes
from training.config import TrainConfig, load_preset, with_settings
from training.data import Images
from training.optimizer import bf16_is_faster
from training.processes import joined, local_device
from training.trainer import StepReport, Trainer

GIB = 2**30
PUBLISHED, OURS, HALF, TWO = "published", "ours", "ours, half of the cores", "ours, 2 processes"
TARGETS = {"cpu": 1.1, "cuda": 1.5}
"""How many times the published loop's images a second ours are to be."""


def configuration(arguments: argparse.Namespace) -> tuple[TrainConfig, Images]:
    """The preset with its settings, and one epoch of images of noise for it."""
    # The loops are compared, and not what they do with a gradient.
    config = with_settings(load_preset(arguments.preset).with_overrides(optimizer="adamw"), arguments.settings)
    config = config.with_overrides(batch_size=arguments.batch_size, holdout=0, warmup_epochs=0.0)
    flow, classes = config.flow, max(1, config.flow.num_classes)
    count = max(classes, config.optimization.batch_size * (arguments.steps + arguments.warmup))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, flow.channels, flow.image_size, flow.image_size), dtype=np.uint8)
    return resolve_classes(config, Images(pixels, np.arange(count, dtype=np.int64) % classes))


def ours(config: TrainConfig, images: Images, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step of the trainer, in all processes that were started."""
    times: list[float] = []
    with joined(device) as processes, tempfile.TemporaryDirectory() as out:
        trainer = Trainer(config, images, Path(out), device, processes=processes)

        def observe(report: StepReport) -> None:
            times.append(config.optimization.batch_size / report.images_per_second)
            trainer.stop_requested = report.step >= steps

        trainer.run(observe)
    return times


def published(config: TrainConfig, images: Images, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step of the published loop."""
    precision = config.optimization.precision
    bf16 = bf16_is_faster(device) if precision == "auto" else precision == "bf16"
    step, size = PublishedTraining(config, device, bf16=bf16), config.optimization.batch_size
    times: list[float] = []
    for number in range(steps):
        rows = slice(number * size, (number + 1) * size)
        pixels, labels = torch.from_numpy(images.pixels[rows]), torch.from_numpy(images.labels[rows])
        times.append(seconds(lambda pixels=pixels, labels=labels: step(pixels, labels), device)[0])  # type: ignore[misc]
    return times


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """One loop's images a second in its fastest step and peak memory, in this process."""
    config, images = configuration(arguments)
    steps = arguments.warmup + arguments.steps
    loop = ours if arguments.loop == "ours" else published
    peak, times = peak_bytes(lambda: loop(config, images, steps, device), device)
    rate = config.optimization.batch_size / min(times[arguments.warmup :])
    return {"images_per_second": rate, "peak_bytes": float(peak)}


def child(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """:func:`measure` of what has this name in new processes; the first one's answer."""
    loop, processes = "published" if name == PUBLISHED else "ours", 2 if name == TWO else 1
    variables = dict(os.environ)
    if name in (HALF, TWO):
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // 2))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.training", "--loop", loop]
    command += ["--preset", arguments.preset, "--batch-size", str(arguments.batch_size), "--device", arguments.device]
    command += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    for setting in arguments.settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[0])
    return answer


def compare(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The document of a run: all in turns."""
    names = [PUBLISHED, OURS]
    if device.type == "cpu":
        names += [HALF, TWO]
    elif torch.cuda.device_count() > 1:
        names += [TWO]
    rounds = [{name: child(arguments, name) for name in names} for _ in range(arguments.rounds)]
    figures = {
        name: {key: median(one[name][key] for one in rounds) for key in ("images_per_second", "peak_bytes")}
        for name in names
    }
    one_process = HALF if device.type == "cpu" else OURS
    return {
        "benchmark": "training",
        "environment": environment(device),
        "preset": arguments.preset,
        "batch_size": arguments.batch_size,
        "settings": arguments.settings,
        "figures": figures,
        "ratio": median(_ratios(rounds, OURS, PUBLISHED)),
        "ratios": _ratios(rounds, OURS, PUBLISHED),
        "scaling": median(_ratios(rounds, TWO, one_process)) if TWO in names else None,
        "target": TARGETS[device.type],
    }


def _ratios(rounds: list[dict[str, dict[str, float]]], one: str, other: str) -> list[float]:
    return [turn[one]["images_per_second"] / turn[other]["images_per_second"] for turn in rounds]


def rows(document: dict[str, Any]) -> list[list[str]]:
    """The table: each loop, and how many times the published one it is."""
    base = document["figures"]["published"]
    return [
        [
            name,
            f"{figures['images_per_second']:.1f}",
            f"{figures['images_per_second'] / base['images_per_second']:.2f}",
            f"{figures['peak_bytes'] / GIB:.2f}",
        ]
        for name, figures in document["figures"].items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each process")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both loops")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--loop", choices=("ours", "published"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        device = local_device(resolve_device(arguments.device))
        configuration(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.loop:
        figures = measure(arguments, device)
        # Of several processes only one answers.
        if local_rank() == 0:
            print(json.dumps(figures))
        return
    document = compare(arguments, device)
    if arguments.json:
        print_json(document)
        return
    columns = ["loop", "images/s", "× published", "peak GiB a process"]
    print_report(f"Training {arguments.preset}, batch {arguments.batch_size}", document, columns, rows(document))
    print(f"ratio {document['ratio']:.2f} (target {document['target']}), in turns {_listed(document['ratios'])}")
    if document["scaling"] is not None:
        print(f"two processes: {document['scaling']:.2f} times one")


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def local_rank() -> int:
    """Number of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


if __name__ == "__main__":
    main()
