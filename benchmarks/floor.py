"""The floor of float32: the backward error of images that are exact but for rounding.

Run it with ``python -m benchmarks.floor [--bundle DIR] [--json]``. Images are decoded sequentially in float32 and get
their certificate; the largest one is the floor, below which no tolerance can be kept by any solver. It is measured on a
trained model (T = 49 for the bundled one), and for longer sequences and more blocks on random weights with its
figures: mean and spread of log-scales, spread of shifts, difference between classes. The random model of the
trained one's own size says how well such a model stands for a trained one. More blocks than the trained model has are
either each like one of its blocks, so that they scale more in all, or share its scales out among them.

For comparison: the same images judged in float64, which is their true backward error, and a decode in float64.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lifelike import Spread, lifelike_flow, measure_spreads, share_out
from benchmarks.models import DEFAULT_BUNDLE
from benchmarks.report import environment, print_json, print_report
from model.bundle import BundleError, read_bundle
from model.config import FlowConfig, SamplingDefaults, SolverOptions
from model.flow import Flow
from model.noise import latents
from model.sampling.certificate import backward_error
from model.sampling.plan import FLOOR_DISTANCE
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Sampler
from model.weights import load_flow

SEQUENTIAL = SolverOptions(solver="sequential")
DEFAULT_TOLERANCE = SolverOptions.tolerance
TOLERANCES = tuple(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5))
"""Tolerances that are proposed: 1e-6, 2e-6, 5e-6 … 5."""
LENGTHS = "49,256,1024"
ROWS_PER_PASS = 4
FLOAT64_SEEDS = 1
"""Seeds decoded in float64 too: more would say the same and take long."""
SPREAD_SEEDS = 64
"""Images, at most, on which the trained model's figures are taken."""


@dataclass(frozen=True)
class Case:
    """A model, and how many seeds of it are drawn."""

    name: str
    flow: Flow
    seeds: int


def make_image_rows(config: FlowConfig, seeds: int, guidance: SamplingDefaults, dtype: torch.dtype) -> Rows:
    """Seeds 0, 1, …, classes in turn."""
    latent_BTD = latents(range(seeds), config.num_patches, config.patch_dim).to(dtype)
    labels: list[int | None] = [i % config.num_classes if config.num_classes else None for i in range(seeds)]
    return make_rows(latent_BTD, labels, [guidance] * seeds)


@torch.no_grad()
def errors(flow: Flow, rows: Rows, x_BTD: Tensor) -> Tensor:
    """Backward errors (B,), infinite for what is not finite."""
    return finish(backward_error(flow, rows, x_BTD, ROWS_PER_PASS))


def measure(case: Case, exact: Flow, guidance: SamplingDefaults) -> tuple[dict[str, Any], list[Spread]]:
    """The floor of one model with one guidance, and its figures on these images; ``exact`` is the flow in float64.

    Raises ``ValueError`` when no image is finite.
    """
    config = case.flow.config
    rows = make_image_rows(config, case.seeds, guidance, torch.float32)
    x_BTD = finish(Sampler(case.flow).decode(rows, SEQUENTIAL)).x_BTD
    error_B = errors(case.flow, rows, x_BTD)
    finite_B = torch.isfinite(error_B)
    if not bool(finite_B.any()):
        raise ValueError(f"{case.name}: no image is finite at guidance {guidance.guidance_scale:g}")
    rows_64 = make_image_rows(config, case.seeds, guidance, torch.float64)
    true_B = errors(exact, rows_64, x_BTD.double())
    few = rows_64.select(torch.arange(min(case.seeds, FLOAT64_SEEDS)))
    error_64_B = errors(exact, few, finish(Sampler(exact).decode(few, SEQUENTIAL)).x_BTD)
    result = {
        "guidance_scale": guidance.guidance_scale,
        "largest": float(error_B[finite_B].max()),
        "median": float(error_B[finite_B].median()),
        "not_finite": int((~finite_B).sum()),
        "largest_judged_in_float64": float(true_B[finite_B].max()),
        "largest_of_float64": float(error_64_B.max()),
    }
    return result, spreads_on(case.flow, rows.select(finite_B), x_BTD[finite_B])


def describe(flow: Flow, spreads: list[Spread]) -> dict[str, Any]:
    """Architecture and figures of a model."""
    return {
        "num_patches": flow.config.num_patches,
        "num_blocks": flow.config.num_blocks,
        "architecture": flow.config.to_dict(),
        "alpha_sum": sum(spread.alpha_mean for spread in spreads),
        "spreads": [spread.to_dict() for spread in spreads],
    }


def spreads_on(flow: Flow, rows: Rows, x_BTD: Tensor) -> list[Spread]:
    """Figures of each block on images, without guidance."""
    return measure_spreads(flow, x_BTD, rows.label_B if flow.config.num_classes else None)


def spreads_on_samples(flow: Flow, seeds: int) -> list[Spread]:
    """Figures of each block on the flow's own unguided images."""
    rows = make_image_rows(flow.config, seeds, SamplingDefaults(), torch.float32)
    return spreads_on(flow, rows, finish(Sampler(flow).decode(rows, SEQUENTIAL)).x_BTD)


def safe_tolerance(floor: float) -> float:
    """The least tolerance for which the plan still iterates: a few times the floor."""
    return next((t for t in TOLERANCES if t >= FLOOR_DISTANCE * floor), TOLERANCES[-1])


def plan_cases(arguments: argparse.Namespace, flow: Flow, spreads: list[Spread]) -> Iterator[Case]:
    """The random models, each when its turn comes; every one draws about as many patches."""
    trained = flow.config
    for length in arguments.lengths:
        seeds = max(1, round(arguments.seeds * trained.num_patches / length))
        for num_blocks in arguments.blocks:
            config = replace(
                trained,
                image_size=math.isqrt(length) * trained.patch_size,
                width=arguments.width or trained.width,
                num_blocks=num_blocks,
                layers_per_block=arguments.layers or trained.layer_counts[0],
            )
            yield Case("random", lifelike_flow(config, spreads), seeds)
            if num_blocks > trained.num_blocks:
                yield Case("random, shared", lifelike_flow(config, share_out(spreads, num_blocks)), seeds)


def measure_all(arguments: argparse.Namespace, name: str, flow: Flow) -> list[dict[str, Any]]:
    """Every model in turn, guided and not."""
    spreads = spreads_on_samples(flow, min(SPREAD_SEEDS, arguments.seeds))
    settings = [SamplingDefaults()]
    if flow.config.num_classes:
        settings.append(SamplingDefaults(guidance_scale=arguments.guidance))
    results = []
    for case in chain([Case(name, flow, arguments.seeds)], plan_cases(arguments, flow, spreads)):
        exact = copy.deepcopy(case.flow).double()
        measured = [measure(case, exact, guidance) for guidance in settings]
        floor = max(row["largest"] for row, _ in measured)
        result = {
            "model": case.name,
            "seeds": case.seeds,
            **describe(case.flow, measured[0][1]),
            "guidance": [row for row, _ in measured],
            "floor": floor,
            "safe_tolerance": safe_tolerance(floor),
        }
        print(f"{case.name}, T = {result['num_patches']}, {result['num_blocks']} blocks: {floor:.1e}", file=sys.stderr)
        results.append(result)
    return results


def parse_numbers(text: str) -> list[int]:
    """Comma-separated positive numbers; nothing for an empty text."""
    numbers = [int(part) for part in text.split(",") if part]
    if numbers and min(numbers) < 1:
        raise ValueError("numbers are at least 1")
    return numbers


def parse_lengths(text: str) -> list[int]:
    """Comma-separated squares of 2, 3, …"""
    lengths = parse_numbers(text)
    if any(length < 4 or math.isqrt(length) ** 2 != length for length in lengths):
        raise ValueError("lengths are squares from 4 on")
    return lengths


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="trained model (default: the bundled)")
    parser.add_argument(
        "--lengths", type=parse_lengths, default=LENGTHS, help=f"T of random models (default {LENGTHS})"
    )
    parser.add_argument("--blocks", type=parse_numbers, default="4,8", help="blocks of random models (default 4,8)")
    parser.add_argument("--seeds", type=int, default=64, help="seeds at the bundle's T; fewer for longer (default 64)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale, constant schedule (default 2)")
    parser.add_argument("--width", type=int, help="of random models (default: the bundle's)")
    parser.add_argument("--layers", type=int, help="in a block of random models (default: the bundle's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds: at least 1")
    try:
        bundle = read_bundle(arguments.bundle)
        results = measure_all(arguments, bundle.name, load_flow(bundle))
    except (BundleError, ValueError) as error:
        parser.error(str(error))
    document = {
        "benchmark": "floor",
        "environment": environment(torch.device("cpu")),
        "default_tolerance": DEFAULT_TOLERANCE,
        "floor_distance": FLOOR_DISTANCE,
        "results": results,
    }
    if arguments.json:
        print_json(document)
        return
    _print(document)


def _print(document: dict[str, Any]) -> None:
    columns = ["model", "T", "blocks", "sum α", "w", "largest", "in f64", "of f64"]
    rows = []
    for result in document["results"]:
        size = [str(result["num_patches"]), str(result["num_blocks"]), f"{result['alpha_sum']:.1f}"]
        for row in result["guidance"]:
            names = ("largest", "largest_judged_in_float64", "largest_of_float64")
            errors_shown = [f"{row[name]:.1e}" for name in names]
            rows.append([result["model"], *size, f"{row['guidance_scale']:g}", *errors_shown])
    print_report("Backward error of sequential float32 decoding", document, columns, rows)
    print("sum α: mean log-scales added up over the blocks; w: guidance scale, constant; in f64: the same images")
    print("judged in float64; of f64: images decoded and judged in float64; shared: the trained model's sum α")
    for result in document["results"]:
        stds = [spread["alpha_std"] for spread in result["spreads"]]
        lost = sum(row["not_finite"] for row in result["guidance"])
        wide = "wide" if result["safe_tolerance"] <= document["default_tolerance"] else "NOT wide"
        lost_text = f" without {lost} images that are not finite" if lost else ""
        print(
            f"{result['model']}, T = {result['num_patches']}, {result['num_blocks']} blocks, {result['seeds']} seeds, "
            f"std of α {min(stds):.2f} to {max(stds):.2f}: floor {result['floor']:.1e}{lost_text}; plans iterate from "
            f"tolerance {result['safe_tolerance']:g} on; the default {document['default_tolerance']:g} is {wide} enough"
        )


if __name__ == "__main__":
    main()
