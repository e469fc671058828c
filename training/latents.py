"""Models of latents: the autoencoder that a run is given, and the images of a data set, encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from model.bundle import Bundle, check_codec
from model.codecs.base import Codec, Latents
from model.codecs.config import CodecConfig
from model.codecs.weights import load_codec, pack, read_autoencoder
from training.checkpoint import check_room, data_fingerprint
from training.data import Images, load_images
from training.tensors import write_tensors

if TYPE_CHECKING:
    from model.codecs.autoencoder_kl import AutoencoderKL
    from training.config import TrainConfig

CACHE = "latents.safetensors"
BATCH = 64


def open_codec(config: TrainConfig, directory: Path | None) -> AutoencoderKL | None:
    """The autoencoder of a run of latents, from a directory that diffusers has saved; None for a run of pixels.

    Raises ``ValueError`` where the configuration and the directory do not go together.
    """
    if config.noise.space == "latents" and directory is None:
        raise ValueError("codec: got none, but the preset is of latents; give the autoencoder's directory with --codec")
    autoencoder = None if directory is None else read_autoencoder(directory)
    check_codec(config.flow, config.noise, None if autoencoder is None else autoencoder.config)
    if autoencoder is not None and config.data.flip:
        raise ValueError("data.flip: got True, allowed is false with a codec: latents of mirrored images are others")
    return autoencoder


def load_training_images(
    data: Path,
    config: TrainConfig,
    autoencoder: AutoencoderKL | None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Images:
    """The training split in the size and colours of the images, which with an autoencoder are not the flow's.

    ``cache`` and ``say`` are those of :func:`training.data.load_images`.
    """
    size, channels = config.flow.image_size, config.flow.channels
    if autoencoder is not None:
        size, channels = size * autoencoder.config.factor, autoencoder.config.in_channels
    return load_images(data, "train", size, channels, cache, say)


def load_known_images(bundle: Bundle, data: Path, split: str, cache: Path | None = None) -> Images:
    """A split as 8-bit images that a bundle's record knows again; ``cache`` as in :func:`training.data.load_images`.

    Of a model of latents :func:`modelled` makes the latents of those that are wanted.
    """
    config = bundle.config
    images = load_images(data, split, config.image_size, config.image_channels, cache)
    return images if config.codec is None else with_digests(images, config.codec)


def modelled(bundle: Bundle, images: Images, device: torch.device) -> Images:
    """8-bit images as a bundle's flow models them: as they are, or the latents that its codec makes of them."""
    return images if bundle.config.codec is None else encode(images, load_codec(bundle, device))


def load_bundle_images(
    bundle: Bundle, data: Path, split: str, device: torch.device, cache: Path | None = None
) -> Images:
    """A whole split as a bundle's flow models it."""
    return modelled(bundle, load_known_images(bundle, data, split, cache), device)


def with_digests(images: Images, codec: CodecConfig) -> Images:
    """Images that are known again as latents of this codec, wherever these are made."""
    found = [hashlib.sha256(codec.sha256.encode() + image.tobytes()).digest() for image in images.pixels]
    return replace(images, digests=np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32))


def encode(images: Images, codec: Codec) -> Images:
    """Images with the latents of theirs, float32, in place of the pixels."""
    batches = (images.pixels[start : start + BATCH] for start in range(0, len(images), BATCH))
    latents = [codec.modelled(torch.from_numpy(batch.copy())).numpy() for batch in batches]
    return replace(images, pixels=np.concatenate(latents))


def encode_once(images: Images, autoencoder: AutoencoderKL, out: Path, device: torch.device) -> Images:
    """:func:`encode`, kept in the run's directory: a run that is continued has the very same latents on any device.

    Raises ``ValueError`` before the first image where the disk has no room for them, and ``OSError`` where it is full
    later.
    """
    path = out / CACHE
    described, _ = pack(autoencoder)
    made_of = {"images": data_fingerprint(images), "codec": described.sha256}
    images = with_digests(images, described)
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() == made_of:
                return replace(images, pixels=file.get_tensor("latents"))
    except (OSError, SafetensorError):
        pass  # There is none, or one that was cut off: it is made anew.
    out.mkdir(parents=True, exist_ok=True)
    config, side = autoencoder.config, images.pixels.shape[-1] // autoencoder.config.factor
    check_room(out, 4 * len(images) * config.latent_channels * side**2, "the latents")
    encoded = encode(images, Latents(autoencoder.to(device)))
    write_tensors(path, {"latents": torch.from_numpy(encoded.pixels)}, made_of)
    return encoded
