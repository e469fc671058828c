"""Run where the package diffusers is: toy autoencoders with random weights, and what the package computes with them.

``python diffusers_reference.py OUT`` writes a directory for each architecture, as the package saves it, with
``expected.safetensors`` beside: images on [-1, 1], their scaled latents, latents and what they decode to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

ARCHITECTURES = {
    "grey": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 2,
        "norm_num_groups": 4,
        "scaling_factor": 1.3,
        "sample_size": 16,
    },
    "colour": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [4, 8, 12],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "sample_size": 16,
    },
    "without-attention": {
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [8],
        "norm_num_groups": 1,
        "mid_block_add_attention": False,
        "sample_size": 8,
    },
}
"""What differs between published autoencoders: depth, widths, quantization layers, shift, attention."""


def write(directory: Path, architecture: dict[str, object]) -> None:
    """One toy, and what it gives."""
    torch.manual_seed(0)
    network = AutoencoderKL(**architecture).eval().requires_grad_(False)
    for parameter in network.parameters():
        # New normalizations do nothing; these do.
        parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(directory, safe_serialization=True)
    config = network.config
    images = torch.rand(2, config.in_channels, 16, 16) * 2 - 1
    shift, scale = config.shift_factor or 0.0, config.scaling_factor
    latents = (network.encode(images).latent_dist.mode() - shift) * scale
    given = torch.randn_like(latents)
    decoded = network.decode(given / scale + shift).sample
    found = {"images": images, "latents": latents, "given": given, "decoded": decoded}
    tensors = {name: value.contiguous() for name, value in found.items()}
    save_file(tensors, directory / "expected.safetensors")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name, architecture in ARCHITECTURES.items():
        write(out / name, architecture)
    print(json.dumps(sorted(ARCHITECTURES)))
