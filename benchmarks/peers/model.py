"""What runs behind the peers: plain batches, drawn with the published loop, denoised with a plain backward pass."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.published.loop import sample
from model.bundle import open_bundle
from model.images import encode_image, fit_image, load_image
from model.likelihood import add_noise, log_likelihood
from model.noise import input_noise, latents
from model.weights import load_flow


class Plain:
    """The bundled model without any of the service."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        bundle = open_bundle("fashion-mnist")
        self._flow, self._noise = load_flow(bundle), bundle.config.noise

    def score(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The log-likelihood of one image each."""
        config = self._flow.config
        files = [base64.b64decode(request["images"][0]) for request in requests]
        images = [fit_image(load_image(data), config.image_size, config.channels).pixels for data in files]
        pixels = torch.from_numpy(np.stack(images))
        draw = input_noise(self._noise.kind, 0, 1, tuple(pixels.shape[1:]))
        with torch.inference_mode():
            values = log_likelihood(self._flow, self._flow.patchify(add_noise(pixels, self._noise, draw)))
        return [{"log_likelihood": float(value)} for value in values]

    def sample(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One image each, guided alike."""
        config = self._flow.config
        seeds = [int(request["seed"]) for request in requests]
        label_B = torch.tensor([int(request["class"]) for request in requests])
        scale = float(requests[0]["guidance_scale"])
        x_BTD = sample(self._flow, latents(seeds, config.num_patches, config.patch_dim), label_B, guidance_scale=scale)
        x_BTD = x_BTD.detach().requires_grad_()
        [gradient_BTD] = torch.autograd.grad(log_likelihood(self._flow, x_BTD, label_B).sum(), x_BTD)
        images = self._flow.unpatchify((x_BTD + self._noise.std**2 * gradient_BTD).detach())
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        return [{"b64": base64.b64encode(encode_image(image, "png")).decode()} for image in pixels]
