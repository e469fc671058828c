"""Our samplers beside the published ones: speed at the same images, in one process.

Run it with ``python -m benchmarks.sampling [--bundle DIR | --random SIZE] [--device cuda] [--json]``. All methods
draw the same seeds, guided, and take turns, so that what else the machine does hits all; a ratio is the median over
the rounds. Approximate methods are set, on other seeds, as loose as one grey level allows; on a CPU
every method has the number of threads that suits it best. Our plan's time includes its certificate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import (
    GS_JACOBI,
    LEVEL_PLAN,
    PLAN,
    PUBLISHED,
    SELECTIVE,
    SEQUENTIAL,
    Method,
    make_batch,
    make_methods,
)
from benchmarks.models import Subject, add_arguments, pick_subject
from benchmarks.published.guidance import Guidance
from benchmarks.report import environment, print_json, print_report
from benchmarks.roofline import sequential_seconds
from model.config import SolverOptions
from model.sampling.certificate import backward_error
from model.sampling.rows import Rows, finish
from model.sampling.sampler import Sampler

NAMES = [PUBLISHED, SEQUENTIAL, SELECTIVE, GS_JACOBI, PLAN, LEVEL_PLAN]
UNCONDITIONAL_TEMPERATURE = 0.5
GREY_LEVELS = 127.5
"""Grey levels in one unit of the [-1, 1] scale."""


def parse_batches(text: str) -> list[int]:
    """Comma-separated positive numbers."""
    batches = [int(part) for part in text.split(",")]
    if min(batches) < 1:
        raise ValueError("batch sizes are at least 1")
    return batches


@torch.no_grad()
def certificate(subject: Subject, rows: Rows, x_BTD: Tensor) -> float:
    """Largest backward error of a batch."""
    return float(finish(backward_error(subject.flow, rows, x_BTD, 8)).max())


def compare(subject: Subject, rows: Rows, methods: list[Method], repeats: int, device: torch.device) -> dict[str, Any]:
    """Time the methods in turns; one result each, with its distance from sequential float32 decoding."""
    exact = finish(Sampler(subject.flow).decode(rows, SolverOptions(solver="sequential"))).x_BTD
    images: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peaks = {}
    for _ in range(repeats):
        for method in methods:
            taken, images[method.name] = method.timed(device)
            times[method.name].append(taken)
            if device.type == "cuda":
                peaks[method.name] = torch.cuda.max_memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
    results = []
    for method in methods:
        taken_all = times[method.name]
        base = times.get(PUBLISHED, taken_all)
        results.append(
            {
                "method": method.name,
                "setting": method.note,
                "threads": method.threads,
                "seconds_per_image": statistics.median(taken_all) / len(rows),
                "images_per_second": len(rows) / statistics.median(taken_all),
                "ratio_to_published": statistics.median(b / a for a, b in zip(taken_all, base, strict=True)),
                "max_difference_levels": GREY_LEVELS * float((images[method.name] - exact).abs().max()),
                "backward_error": certificate(subject, rows, images[method.name]),
                "peak_memory_bytes": peaks.get(method.name),
            }
        )
    ratio = None
    others = [name for name in times if name not in (PLAN, LEVEL_PLAN)]
    if PLAN in times and others:
        # The plan's time in a round over that of the method that is fastest by its median.
        fastest = min(others, key=lambda name: statistics.median(times[name]))
        ratio = statistics.median(a / b for a, b in zip(times[PLAN], times[fastest], strict=True))
    return {"batch": len(rows), "methods": results, "plan_over_fastest_other": ratio}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--batch", type=parse_batches, default=[1, 16, 64], help="batch sizes (default 1,16,64)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale, linear schedule (default 2)")
    parser.add_argument("--methods", default=",".join(NAMES), help=f"of {', '.join(NAMES)} (default all)")
    parser.add_argument("--bf16", action="store_true", help="also our draft with bfloat16 weights")
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth in TB/s, to print the share of the roofline")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    names = [name.strip() for name in arguments.methods.split(",")]
    if unknown := set(names) - set(NAMES):
        parser.error(f"--methods: got {', '.join(sorted(unknown))}, allowed is some of {', '.join(NAMES)}")
    device = torch.device(arguments.device)
    subject = pick_subject(arguments, parser)
    temperature = 1.0 if subject.flow.config.num_classes else UNCONDITIONAL_TEMPERATURE
    guidance = Guidance(arguments.guidance, True, temperature)
    results = []
    for size in arguments.batch:
        print(f"batch {size}: calibrating", file=sys.stderr)
        batch = make_batch(subject, size, guidance, device)
        methods = make_methods(subject, batch, names, device, arguments.bf16)
        print(f"batch {size}: measuring", file=sys.stderr)
        result = compare(subject, batch.rows, methods, arguments.repeats, device)
        if arguments.bandwidth:
            passes = size * (1 + (guidance.scale != 0))
            for row in result["methods"]:
                bytes_per_value = 2 if "bf16" in row["method"] else 4
                bound = sequential_seconds(subject.flow.config, passes, bytes_per_value, arguments.bandwidth)
                row["share_of_roofline"] = bound * row["images_per_second"] / size
        results.append(result)
    document = {
        "benchmark": "sampling",
        "environment": environment(device),
        "model": subject.name,
        "architecture": subject.flow.config.to_dict(),
        "guidance_scale": guidance.scale,
        "repeats": arguments.repeats,
        "results": results,
    }
    if arguments.json:
        print_json(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    columns = ["batch", "method", "s/image", "images/s", "ratio", "levels off", "z error", "threads"]
    columns += ["peak MiB"] if document["environment"]["device"].startswith("cuda") else []
    columns += ["of roofline"] if "share_of_roofline" in document["results"][0]["methods"][0] else []
    rows = []
    for result in document["results"]:
        for row in result["methods"]:
            cells = [
                str(result["batch"]),
                row["method"],
                f"{row['seconds_per_image']:.4f}",
                f"{row['images_per_second']:.1f}",
                f"{row['ratio_to_published']:.2f}x",
                f"{row['max_difference_levels']:.3f}",
                f"{row['backward_error']:.1e}",
                str(row["threads"] or "auto"),
            ]
            if row["peak_memory_bytes"] is not None:
                cells.append(f"{row['peak_memory_bytes'] / 2**20:.0f}")
            if "share_of_roofline" in row:
                cells.append(f"{row['share_of_roofline']:.0%}")
            rows.append(cells)
    print_report(f"Sampling {document['model']}, guidance {document['guidance_scale']:g}", document, columns, rows)
    print("ratio: to the published loop; levels off: largest distance from sequential float32, in grey levels;")
    print("z error: largest backward error")
    for result in document["results"]:
        for row in result["methods"]:
            if row["setting"]:
                print(f"batch {result['batch']}, {row['method']}: {row['setting']}")
        if result["plan_over_fastest_other"] is not None:
            print(
                f"batch {result['batch']}: our plan takes {result['plan_over_fastest_other']:.2f} of the time of the "
                "fastest other method"
            )


if __name__ == "__main__":
    main()
