"""Peak memory of block-wise denoising against one plain backward pass, and how equal their gradients are.

Run it with ``python -m benchmarks.denoising [--device cuda] [--json]``. Each variant runs in a process
of its own. On a CPU its peak is the largest resident size after the work less the resident size
before it; on a GPU it is what torch allocated at most, less what it held before. All rows fit in
one slice of ours, so that rows taken one group after another do not count as a saving.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import random_flow
from benchmarks.report import environment, print_json, print_report
from model.config import FlowConfig
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import log_likelihood
from model.noise import latents
from model.sampling.rows import finish

VARIANTS = ("plain", "blockwise")
LIMIT = 1 / 3


def plain_gradient(flow: Flow, x_BTD: Tensor) -> Tensor:
    """∇ log p by one backward pass through all blocks."""
    leaf = x_BTD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(flow, leaf).sum(), leaf)
    return gradient


def blockwise_gradient(flow: Flow, x_BTD: Tensor) -> Tensor:
    """∇ log p as our denoising computes it: x + 1²·∇ log p, less x."""
    return finish(denoise(flow, x_BTD, None, 1.0, rows_per_slice=len(x_BTD))) - x_BTD


def _resident_bytes() -> int:
    """Resident size now; where the system does not tell, the largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return _largest_resident_bytes()


def _largest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(variant: str, arguments: argparse.Namespace, gradient_file: Path) -> dict[str, Any]:
    """Run one variant here; the gradient goes to a file, the peak is returned in bytes."""
    device = torch.device(arguments.device)
    config = FlowConfig(
        image_size=arguments.image_size,
        channels=1,
        patch_size=4,
        width=arguments.width,
        num_blocks=arguments.blocks,
        layers_per_block=arguments.layers,
    )
    flow = random_flow(config).to(device)
    x_BTD = latents(range(arguments.rows), config.num_patches, config.patch_dim).to(device)
    work = {"plain": plain_gradient, "blockwise": blockwise_gradient}[variant]
    # What torch sets up once (threads, libraries) is not the work's memory.
    work(flow, x_BTD[:1, :])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradient = work(flow, x_BTD)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        before = _resident_bytes()
        gradient = work(flow, x_BTD)
        peak = _largest_resident_bytes() - before
    torch.save(gradient.cpu(), gradient_file)
    return {"peak_bytes": peak}


def measure_apart(variant: str, given: list[str], gradient_file: Path) -> dict[str, Any]:
    """:func:`measure` in a process of its own, whose peak nothing else has touched."""
    command = [sys.executable, "-m", "benchmarks.denoising", *given]
    command += ["--measure", variant, "--gradient-file", str(gradient_file)]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def main() -> None:
    """Parse the command line, measure both variants, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoising", description=__doc__)
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--blocks", type=int, default=8, help="flow blocks (default 8)")
    parser.add_argument("--layers", type=int, default=4, help="layers in a block (default 4)")
    parser.add_argument("--width", type=int, default=128, help="transformer width (default 128)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images, patches of 4 (default 64)")
    parser.add_argument("--rows", type=int, default=8, help="images denoised at once (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--gradient-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print_json(measure(arguments.measure, arguments, arguments.gradient_file))
        return
    given = [argument for argument in sys.argv[1:] if argument != "--json"]
    with tempfile.TemporaryDirectory() as directory:
        files = {variant: Path(directory) / f"{variant}.pt" for variant in VARIANTS}
        peaks = {variant: measure_apart(variant, given, file)["peak_bytes"] for variant, file in files.items()}
        plain, blockwise = (torch.load(file, weights_only=True) for file in files.values())
    ratio = peaks["blockwise"] / peaks["plain"] if peaks["plain"] > 0 else None
    document = {
        "benchmark": "denoising",
        "environment": environment(torch.device(arguments.device)),
        "size": {name: getattr(arguments, name) for name in ("blocks", "layers", "width", "image_size", "rows")},
        "plain_peak_bytes": peaks["plain"],
        "blockwise_peak_bytes": peaks["blockwise"],
        "ratio": ratio,
        "limit": LIMIT,
        "within_limit": ratio is not None and ratio <= LIMIT,
        "max_gradient_difference": (plain - blockwise).abs().max().item(),
        "max_gradient": plain.abs().max().item(),
    }
    if arguments.json:
        print_json(document)
        return
    rows = [
        ["plain backward", f"{peaks['plain'] / 2**20:.1f}", ""],
        ["block by block", f"{peaks['blockwise'] / 2**20:.1f}", "-" if ratio is None else f"{ratio:.3f}"],
    ]
    title = f"Gradient of log p, {arguments.rows} images, {arguments.blocks} blocks of {arguments.layers} layers"
    print_report(title, document, ["", "peak MiB", "ratio"], rows)
    print(
        f"largest gradient difference {document['max_gradient_difference']:.2e} "
        f"(largest gradient {document['max_gradient']:.2e}); limit for the ratio is {LIMIT:.3f}"
    )


if __name__ == "__main__":
    main()
