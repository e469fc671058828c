"""What sampling, scoring and denoising need, by the shapes of the published models: memory, and time.

Run it with ``python -m benchmarks.resources [--sizes 64,128] [--rows N] [--device cuda] [--json]``. Weights are random:
neither memory nor the time of a pass depends on them. Memory is the peak beyond the weights; on a CPU each
measurement runs in a process of its own. Sampling is sequential and guided, so that an image takes two network rows.

What takes long on a CPU is measured in part, and its time is an estimate (≈):

- Sampling holds all its memory from the start. After the first steps of a run, steps on memory that is touched
  as a whole, at places spread over the sequence and in all blocks, stand for all steps.
- Blocks are scored and denoised one after another, so that a part of them needs the memory of all but for what
  denoising keeps of each, its input, which is added.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import GIB, available_bytes, peak_bytes
from benchmarks.models import random_flow
from benchmarks.report import environment, print_json, print_report
from benchmarks.timing import seconds
from model.config import FlowConfig, SamplingDefaults, SolverOptions
from model.denoise import denoise
from model.flow import Flow
from model.likelihood import log_likelihood
from model.noise import latents
from model.sampling.guided import Guidance
from model.sampling.kernel import BlockKernel, Memory
from model.sampling.rows import finish, make_rows
from model.sampling.sampler import Sampler, Sampling

WORKS = ("sampling", "scoring", "denoising")
GUIDED = SamplingDefaults(guidance_scale=2.0)
FLOAT = 4
"""Bytes of a value."""
MAX_STEPS = 2000
"""Decoding steps up to which sampling runs to its end."""
PLACES, REPEATS, FIRST_STEPS = 24, 3, 4
"""Places in the sequence whose steps are timed, how often, and steps of the real run."""
MAX_FLOPS = 5e11
"""Operations up to which scoring and denoising run through more than one block."""
PASSES = {"scoring": 1, "denoising": 4}
"""Operations of the work in those of a forward pass: denoising runs every block twice, and once back."""
VALUES_PER_LAYER = 16
"""Values of the transformer's width for each patch that a layer holds for its way back, about."""
RESERVE = 1.2
"""How much more than expected must be free."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For the C library: freed memory goes back to the system at once, so that it is not counted as held."""


@dataclass(frozen=True)
class Shape:
    """An architecture, and where it is from."""

    size: str
    config: FlowConfig
    note: str

    @property
    def name(self) -> str:
        """As the papers write it."""
        c = self.config
        return f"{c.patch_size}-{c.width}-{c.num_blocks}-{c.layers_per_block}"


def _shape(image_size: int, patch_size: int, width: int, num_classes: int, note: str) -> Shape:
    config = FlowConfig(
        image_size=image_size,
        channels=3,
        patch_size=patch_size,
        width=width,
        num_blocks=8,
        layers_per_block=8,
        num_classes=num_classes,
    )
    return Shape(str(image_size), config, note)


SHAPES = (
    _shape(64, 2, 768, 1000, "ImageNet 64x64, published"),
    _shape(128, 4, 1024, 1000, "ImageNet 128x128, published"),
    _shape(256, 8, 768, 3, "AFHQ 256x256, published"),
    _shape(256, 4, 768, 3, "256x256 with smaller patches"),
    _shape(512, 8, 1024, 1000, "512x512, as wide as the widest published"),
)
QUICK = FlowConfig(image_size=8, channels=3, patch_size=2, width=64, num_blocks=2, layers_per_block=1, num_classes=3)


def quick(shape: Shape) -> Shape:
    """A tiny stand-in, to see the program work."""
    return replace(
        shape, config=replace(QUICK, image_size=4 * shape.config.patch_size, patch_size=shape.config.patch_size)
    )


def num_parameters(config: FlowConfig) -> int:
    """Weights of a flow, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Flow(config).parameters())


def blocks_to_run(work: str, config: FlowConfig, rows: int, device: torch.device, full: bool) -> int:
    """How many of the blocks scoring or denoising runs through."""
    if full or device.type != "cpu" or work == "sampling":
        return config.num_blocks
    block = PASSES[work] * rows * config.flops_per_image / config.num_blocks
    return max(1, min(config.num_blocks, int(MAX_FLOPS / block)))


def part(config: FlowConfig, blocks: int) -> FlowConfig:
    """The flow's first blocks."""
    return replace(config, num_blocks=blocks, layers_per_block=config.layer_counts[:blocks])


def expected_bytes(work: str, config: FlowConfig, rows: int) -> int:
    """About what a work needs, its weights included: to see beforehand whether it fits."""
    patch_rows = rows * config.num_patches * config.width * FLOAT
    layers = max(config.layer_counts)
    beyond = {
        # Queries, keys and values of two network rows for each image.
        "sampling": 2 * 3 * layers * patch_rows,
        "scoring": VALUES_PER_LAYER * patch_rows,
        "denoising": VALUES_PER_LAYER * layers * patch_rows,
    }
    return FLOAT * num_parameters(config) + beyond[work]


def measure(work: str, config: FlowConfig, rows: int, device: torch.device, full: bool) -> dict[str, Any]:
    """One work of one shape, here: its peak in bytes and its time in seconds."""
    blocks = blocks_to_run(work, config, rows, device, full)
    runs = {"sampling": _sample, "scoring": _score, "denoising": _denoise}
    # What torch sets up once (threads, libraries) is not the work's memory.
    runs[work](random_flow(QUICK).to(device), 1, True)
    flow = random_flow(part(config, blocks)).to(device)
    peak, (taken, measured) = peak_bytes(lambda: runs[work](flow, rows, full), device)
    kept = (config.num_blocks - blocks) * rows * config.num_dims * FLOAT if work == "denoising" else 0
    return {
        "peak_bytes": peak + kept,
        "seconds": taken * config.num_blocks / blocks,
        "is_estimate": blocks < config.num_blocks or not measured["all"],
        "blocks_run": blocks,
        "steps_timed": measured.get("steps"),
    }


Timed = tuple[float, dict[str, Any]]
"""Seconds of the whole work of the flow that is there, and what of it was run."""


def _labels(config: FlowConfig, rows: int) -> list[int | None]:
    return [i % config.num_classes if config.num_classes else None for i in range(rows)]


@torch.no_grad()
def _sample(flow: Flow, rows: int, full: bool) -> Timed:
    config, device = flow.config, flow.prior_variance.device
    latent_BTD = latents(range(rows), config.num_patches, config.patch_dim).to(device)
    batch = make_rows(latent_BTD, _labels(config, rows), [GUIDED] * rows)
    steps = (config.num_patches - 1) * config.num_blocks
    sampler = Sampler(flow)

    def run() -> Sampling:
        return sampler.decode(batch, SolverOptions(solver="sequential"))

    if full or device.type != "cpu" or steps <= MAX_STEPS:
        if device.type != "cpu":
            # The first batch of a size captures graphs.
            finish(run())
        return seconds(lambda: finish(run()), device)[0], {"all": True, "steps": steps}
    # It stays in flight: of its memory almost nothing is resident yet, and all else that it holds counts.
    first_steps = run()
    for _ in range(FIRST_STEPS):
        next(first_steps)
    guidance = Guidance(batch, 0, sampler.kernel.blocks[0].block)
    memory = Memory.allocate(config, guidance.num_passes, sampler.kernel.dtype, device)
    for held in memory.qkv:
        held.zero_()
    z_TBD = latent_BTD.transpose(0, 1).contiguous()
    taken = []
    for place in range(PLACES):
        start = (2 * place + 1) * (config.num_patches - 1) // (2 * PLACES)
        # The blocks take turns, so that weights come from where they come from in a real run.
        kernel = sampler.kernel.blocks[place % config.num_blocks]
        step = partial(_step, kernel, guidance, memory, kernel.offset(guidance.label_R), z_TBD, start)
        taken.append(statistics.median(seconds(step, device)[0] for _ in range(REPEATS)))
    return statistics.mean(taken) * steps, {"all": False, "steps": PLACES * REPEATS}


def _step(
    kernel: BlockKernel, guidance: Guidance, memory: Memory, offset_RW: Tensor, z_TBD: Tensor, start: int
) -> Tensor:
    """The patch after that at ``start``, as sequential decoding makes it."""
    out = kernel.run(guidance.spread(z_TBD[start : start + 1]), start, offset_RW, None, memory)
    alpha, mu = guidance.combine(out, start + 1)
    return torch.addcmul(mu[0], z_TBD[start + 1], alpha[0].exp())


def _images(flow: Flow, rows: int) -> tuple[Tensor, Tensor | None]:
    """Patches (B, T, D) and labels to score or denoise."""
    config, device = flow.config, flow.prior_variance.device
    x_BTD = latents(range(rows), config.num_patches, config.patch_dim).to(device)
    return x_BTD, torch.arange(rows, device=device) % config.num_classes if config.num_classes else None


@torch.no_grad()
def _score(flow: Flow, rows: int, full: bool) -> Timed:
    x_BTD, y_B = _images(flow, rows)
    return seconds(lambda: log_likelihood(flow, x_BTD, y_B), x_BTD.device)[0], {"all": True}


def _denoise(flow: Flow, rows: int, full: bool) -> Timed:
    x_BTD, y_B = _images(flow, rows)
    run = denoise(flow, x_BTD, y_B, 1.0, rows_per_slice=rows)
    return seconds(lambda: finish(run), x_BTD.device)[0], {"all": True}


def measure_apart(work: str, place: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own; where it would not fit, only what it needs."""
    config = pick(place, arguments.quick).config
    device = torch.device(arguments.device)
    blocks = blocks_to_run(work, config, arguments.rows, device, arguments.full)
    needed = RESERVE * expected_bytes(work, part(config, blocks), arguments.rows)
    available = available_bytes(device)
    if available is not None and needed > available:
        return {"not_measured": f"needs {needed / GIB:.0f} GiB", "needed_bytes": round(needed)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.resources",
        "--device",
        arguments.device,
        "--rows",
        str(arguments.rows),
    ]
    command += [f"--{name}" for name in ("quick", "full") if getattr(arguments, name)]
    command += ["--measure", work, "--place", str(place)]
    root, variables = Path(__file__).parents[1], os.environ | ALLOCATOR
    result = subprocess.run(command, cwd=root, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return {"not_measured": f"ended with status {result.returncode}; about {needed / GIB:.0f} GiB were needed"}
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def pick(place: int, is_quick: bool) -> Shape:
    """A shape by its place in the table."""
    return quick(SHAPES[place]) if is_quick else SHAPES[place]


def parse_sizes(text: str) -> list[str]:
    """Comma-separated sizes of images that there is a shape for."""
    sizes = [size.strip() for size in text.split(",")]
    known = dict.fromkeys(shape.size for shape in SHAPES)
    if unknown := [size for size in sizes if size not in known]:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, allowed is some of {', '.join(known)}")
    return sizes


def main() -> None:
    """Parse the command line, measure every shape, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--sizes", type=parse_sizes, default="64,128,256,512", help="image sizes (default all)")
    parser.add_argument("--rows", type=int, default=1, help="images at once (default 1)")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--full", action="store_true", help="run everything to its end: hours on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny stand-ins, to see the program work")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--measure", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < 1:
        parser.error("--rows: at least 1")
    device = torch.device(arguments.device)
    if arguments.measure:
        config = pick(arguments.place, arguments.quick).config
        print_json(measure(arguments.measure, config, arguments.rows, device, arguments.full))
        return
    results = []
    for place in range(len(SHAPES)):
        shape = pick(place, arguments.quick)
        if shape.size not in arguments.sizes:
            continue
        works = {}
        for work in WORKS:
            print(f"{shape.size}x{shape.size} {shape.name}: {work}", file=sys.stderr)
            works[work] = measure_apart(work, place, arguments)
        parameters = num_parameters(shape.config)
        results.append(
            {
                "size": int(shape.size),
                "model": shape.name,
                "note": shape.note,
                "architecture": shape.config.to_dict(),
                "num_patches": shape.config.num_patches,
                "parameters": parameters,
                "weights_bytes": FLOAT * parameters,
                "works": works,
            }
        )
    document = {
        "benchmark": "resources",
        "environment": environment(device),
        "rows": arguments.rows,
        "guidance_scale": GUIDED.guidance_scale,
        "results": results,
    }
    if arguments.json:
        print_json(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    columns = ["model", "T", "weights", "GiB", "", "peak MiB", "s"]
    rows = []
    for result in document["results"]:
        shown = [
            f"{result['size']}² {result['model']}",
            str(result["num_patches"]),
            f"{result['parameters'] / 1e6:,.0f} M",
            f"{result['weights_bytes'] / GIB:.1f}",
        ]
        for work, found in result["works"].items():
            if "not_measured" in found:
                figures = [f"not measured: {found['not_measured']}", ""]
            else:
                digits = 0 if found["seconds"] >= 10 else 2
                taken = f"{'≈ ' if found['is_estimate'] else ''}{found['seconds']:,.{digits}f}"
                figures = [f"{found['peak_bytes'] / 2**20:,.0f}", taken]
            rows.append([*shown, work, *figures])
            shown = [""] * len(shown)
    images = "image" if document["rows"] == 1 else "images"
    print_report(f"Memory beyond the weights and time, {document['rows']} {images}", document, columns, rows)
    print("float32; sampling is sequential and guided; ≈: from a part of the run (see --help)")
    for result in document["results"]:
        print(f"{result['size']}² {result['model']}: {result['note']}")


if __name__ == "__main__":
    main()
