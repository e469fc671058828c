"""The flows that benchmarks run on: a bundle's, or one with random weights of a named size."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from model.bundle import BUNDLED, BundleError, read_bundle
from model.config import FlowConfig
from model.flow import Flow
from model.sampling.plan import ConvergenceProfile
from model.weights import load_flow

DEFAULT_BUNDLE = BUNDLED / "fashion-mnist"
DEFAULT_RANDOM = "4-128-4-4"
IMAGE_SIZE, NUM_CLASSES = 28, 10


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    name: str
    flow: Flow
    convergence: ConvergenceProfile | None = None
    """How its blocks converge, where it was tuned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--bundle or --random, and --device."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle to sample (default: the bundled)")
    source.add_argument(
        "--random",
        nargs="?",
        const=DEFAULT_RANDOM,
        metavar="P-WIDTH-BLOCKS-LAYERS",
        help=f"random weights instead (default size {DEFAULT_RANDOM})",
    )
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="of --random: side in pixels (default 28)")
    parser.add_argument("--channels", type=int, default=1, help="of --random: 1 or 3 (default 1)")
    parser.add_argument("--num-classes", type=int, default=NUM_CLASSES, help="of --random (default 10)")
    parser.add_argument("--device", default="cpu", help="torch device")


def random_flow(config: FlowConfig, seed: int = 0) -> Flow:
    """A flow whose output layers do something, which those of a new flow do not."""
    torch.manual_seed(seed)
    flow = Flow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    return flow.eval().requires_grad_(False)


def pick_subject(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Subject:
    """The model that the arguments name; ends the program when there is none."""
    if arguments.random:
        try:
            patch_size, width, num_blocks, layers = map(int, arguments.random.split("-"))
            config = FlowConfig(
                image_size=arguments.image_size,
                channels=arguments.channels,
                patch_size=patch_size,
                width=width,
                num_blocks=num_blocks,
                layers_per_block=layers,
                num_classes=arguments.num_classes,
            )
        except ValueError as error:
            parser.error(f"--random: {error}")
        return Subject(f"random {arguments.random}", random_flow(config).to(arguments.device))
    try:
        bundle = read_bundle(arguments.bundle)
        return Subject(bundle.name, load_flow(bundle, arguments.device), bundle.convergence)
    except BundleError as error:
        parser.error(f"{error} (for random weights give --random)")
