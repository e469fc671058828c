"""How fast sequential decoding could be: every step reads a block's weights and the keys and values so far."""

from __future__ import annotations

from model.config import FlowConfig


def sequential_seconds(
    config: FlowConfig, network_rows: int, bytes_per_value: int, terabytes_per_second: float
) -> float:
    """Least time of sequential decoding of ``network_rows`` rows at a memory bandwidth, in seconds."""
    steps, width = config.num_patches - 1, config.width
    weights = (4 + 2 * config.expansion) * width**2
    # The step at patch t reads t keys and values of every row; t is T/2 on average.
    cache = network_rows * (config.num_patches / 2) * 2 * width
    values = sum(config.layer_counts) * steps * (weights + cache)
    return values * bytes_per_value / (terabytes_per_second * 1e12)
