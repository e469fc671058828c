"""What ``tarflow train --list`` says of a preset, without torch."""

from __future__ import annotations

from model.config import FlowConfig
from training.card import architecture
from training.config import TrainConfig


def num_parameters(flow: FlowConfig) -> int:
    """Weights of a flow, counted from its configuration."""
    width, hidden = flow.width, flow.expansion * flow.width
    norms, attention = 2 * 2 * width, 4 * width * (width + 1)
    layer = norms + attention + hidden * (width + 1) + width * (hidden + 1)
    outputs = flow.patch_dim * (1 if flow.volume_preserving else 2)
    block = width * (flow.patch_dim + 1 + flow.num_patches + flow.num_classes) + outputs * (width + 1)
    return flow.num_blocks * block + sum(flow.layer_counts) * layer


def preset_lines(config: TrainConfig) -> list[str]:
    """A line with the figures, one about model and data, and one about where the values come from."""
    flow, noise, options = config.flow, config.noise, config.optimization
    size = f"{flow.image_size}x{flow.image_size} {'grey' if flow.channels == 1 else 'colour'}"
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
