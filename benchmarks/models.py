"""The flows that benchmarks run on: a bundle's, or one with random weights of a named size."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from model.bundle import BUNDLED, BundleError, read_bundle
from model.config import FlowConfig
from model.flow import Flow
from model.weights import load_flow

DEFAULT_BUNDLE = BUNDLED / "fashion-mnist"
DEFAULT_RANDOM = "4-128-4-4"
IMAGE_SIZE, NUM_CLASSES = 28, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--bundle or --random, and --device."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle to sample (default: the bundled)")
    source.add_argument(
        "--random",
        nargs="?",
        const=DEFAULT_RANDOM,
        metavar="P-WIDTH-BLOCKS-LAYERS",
        help=f"random weights on {IMAGE_SIZE}x{IMAGE_SIZE} images instead (default size {DEFAULT_RANDOM})",
    )
    parser.add_argument("--device", default="cpu", help="torch device")


def random_flow(config: FlowConfig, seed: int = 0) -> Flow:
    """A flow whose output layers do something, which those of a new flow do not."""
    torch.manual_seed(seed)
    flow = Flow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    return flow.eval().requires_grad_(False)


def pick_flow(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, Flow]:
    """The flow that the arguments name, and what to call it; ends the program when there is none."""
    if arguments.random:
        try:
            patch_size, width, num_blocks, layers = map(int, arguments.random.split("-"))
            config = FlowConfig(
                image_size=IMAGE_SIZE,
                channels=1,
                patch_size=patch_size,
                width=width,
                num_blocks=num_blocks,
                layers_per_block=layers,
                num_classes=NUM_CLASSES,
            )
        except ValueError as error:
            parser.error(f"--random: {error}")
        return f"random {arguments.random}", random_flow(config).to(arguments.device)
    try:
        bundle = read_bundle(arguments.bundle)
        return bundle.name, load_flow(bundle, arguments.device)
    except BundleError as error:
        parser.error(f"{error} (for random weights give --random)")
