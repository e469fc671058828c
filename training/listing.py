"""What ``tarflow train --list`` says of a preset, without torch."""

from __future__ import annotations

from model.config import FlowConfig
from training.card import architecture
from training.config import TrainConfig, read_preset


def num_parameters(flow: FlowConfig) -> int:
    """Weights of a flow, counted from its configuration."""
    width, hidden = flow.width, flow.expansion * flow.width
    norms, attention = 2 * 2 * width, 4 * width * (width + 1)
    layer = norms + attention + hidden * (width + 1) + width * (hidden + 1)
    outputs = flow.patch_dim * (1 if flow.volume_preserving else 2)
    block = width * (flow.patch_dim + 1 + flow.num_patches) + outputs * (width + 1)
    conditioned = sum(flow.is_conditioned(number) for number in range(flow.num_blocks))
    classes = conditioned * width * flow.num_classes
    return flow.num_blocks * block + classes + sum(flow.layer_counts) * layer


def preset_lines(config: TrainConfig) -> list[str]:
    """A line with the figures, one about model and data, and one about where the values come from."""
    flow, noise, options = config.flow, config.noise, config.optimization
    colours = {1: "grey", 3: "colour"} if noise.space == "pixels" else {}
    kind = colours.get(flow.channels, f"latents of {flow.channels} channels")
    size = f"{flow.image_size}x{flow.image_size} {kind}"
    level = f" {noise.std:g}" if noise.kind == "gaussian" else ""
    classes = f"{flow.num_classes} classes" if flow.num_classes else "no classes"
    if config.data.classes_from_data:
        classes = "classes from the data"
    return [
        f"{config.name}: {size}, {architecture(flow)}, {num_parameters(flow) / 1e6:.3g} million parameters, "
        f"{noise.kind} noise{level}, {classes}, {options.epochs:g} epochs in batches of {options.batch_size}",
        config.about,
        f"Provenance: {config.provenance}",
    ]


def fine_tuning_lines(name: str) -> list[str]:
    """The same of a preset of the package that leaves the model to a bundle."""
    content = read_preset(name)
    options = content["optimization"]
    return [
        f"{name}: fine-tunes the model of --from BUNDLE, {options['epochs']:g} epochs "
        f"in batches of {options['batch_size']}",
        content["about"],
        f"Provenance: {content['provenance']}",
    ]
