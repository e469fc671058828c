"""Images per second of our sequential decode and of the published loop, side by side in one process.

Run it with ``python -m benchmarks.sampling [--random] [--device cuda] [--json]``. The two take turns,
so that what else the machine does hits both; the ratio is the median over the pairs of runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import add_arguments, pick_flow
from benchmarks.published import sample
from benchmarks.report import environment, print_json, print_report
from model.config import SamplingDefaults
from model.flow import NO_CLASS, Flow
from model.noise import latents
from model.sampling.rows import finish, make_rows
from model.sampling.sequential import decode

GUIDANCE_SCALE = 2.0
UNCONDITIONAL_TEMPERATURE = 0.5


def parse_batches(text: str) -> list[int]:
    """Comma-separated positive numbers."""
    batches = [int(part) for part in text.split(",")]
    if min(batches) < 1:
        raise ValueError("batch sizes are at least 1")
    return batches


def seconds(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Wall-clock time of ``work``, the device's queue included, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def compare(flow: Flow, batch: int, guided: bool, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row of the report."""
    config = flow.config
    latent_BTD = latents(range(batch), config.num_patches, config.patch_dim).to(device)
    labels: list[int | None] = [i % config.num_classes if config.num_classes else None for i in range(batch)]
    y_B = torch.tensor([NO_CLASS if y is None else y for y in labels], device=device)
    options = SamplingDefaults(
        guidance_scale=GUIDANCE_SCALE if guided else 0.0,
        guidance_schedule="linear",
        attention_temperature=1.0 if config.num_classes else UNCONDITIONAL_TEMPERATURE,
    )
    rows = make_rows(latent_BTD, labels, [options] * batch)

    def ours() -> Tensor:
        return finish(decode(flow, rows))

    def published() -> Tensor:
        return sample(flow, latent_BTD, y_B, options.guidance_scale, True, options.attention_temperature)

    difference = (ours() - published()).abs().max().item()
    pairs = [(seconds(ours, device)[0], seconds(published, device)[0]) for _ in range(repeats)]
    return {
        "batch": batch,
        "guided": guided,
        "images_per_second": batch / statistics.median(a for a, _ in pairs),
        "published_images_per_second": batch / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "max_difference": difference,
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--batch", type=parse_batches, default=[1, 16, 64], help="batch sizes (default 1,16,64)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs for each row (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    name, flow = pick_flow(arguments, parser)
    device = torch.device(arguments.device)
    results = [
        compare(flow, batch, guided, arguments.repeats, device) for batch in arguments.batch for guided in (False, True)
    ]
    document = {
        "benchmark": "sampling",
        "environment": environment(device),
        "model": name,
        "architecture": flow.config.to_dict(),
        "guidance_scale": GUIDANCE_SCALE,
        "repeats": arguments.repeats,
        "results": results,
    }
    if arguments.json:
        print_json(document)
        return
    columns = ["batch", "guided", "images/s", "published way, images/s", "ratio", "max difference"]
    rows = [
        [
            str(row["batch"]),
            f"w={GUIDANCE_SCALE:g}" if row["guided"] else "no",
            f"{row['images_per_second']:.2f}",
            f"{row['published_images_per_second']:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['max_difference']:.1e}",
        ]
        for row in results
    ]
    print_report(f"Sampling {name}", document, columns, rows)


if __name__ == "__main__":
    main()
