"""Bundles on disk: what the service loads and training writes.

A bundle is a directory::

    config.json         architecture, noise protocol, class names and prior, preprocessing, provenance
    model.safetensors   weights (see :mod:`model.weights`)
    codec.safetensors   only of models of latents: weights of the autoencoder (see :mod:`model.codecs.weights`)
    sampler.json        recommended sampling parameters, and how the solvers converge (``tarflow tune``)
    calibration.safetensors  optional: what is normal, for anomaly verdicts (``tarflow calibrate``)
    CARD.md             for people: data, recipe, figures
    samples.png         optional: a picture for the card
    manifest.json       sha256 of every file above, and when the bundle was first written

The model id is the hash of config.json, which has that of the codec, and model.safetensors, so tuning,
calibrating or editing the card never changes it. This module reads and checks everything but the tensors, without
torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.codecs.config import CodecConfig
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults, check
from model.sampling.plan import ConvergenceProfile

FORMAT_VERSION = 1
CONFIG, WEIGHTS, SAMPLER, CARD, MANIFEST = (
    "config.json",
    "model.safetensors",
    "sampler.json",
    "CARD.md",
    "manifest.json",
)
SAMPLES = "samples.png"
CODEC = "codec.safetensors"
CALIBRATION = "calibration.safetensors"
PRIOR_TOLERANCE = 1e-6
"""How far the sum of a class prior may be from 1."""
PREPROCESSING = {"resize": "shorter-side-bicubic", "crop": "center", "range": [-1, 1]}
BUNDLED = Path(__file__).parent / "bundled"
"""Models that come with the package."""


NAMES = "1 to 100 of the characters a-z A-Z 0-9 . _ -, not starting with a dot"
"""What models and calibrations may be called: a name is also that of a file, and a part of an address."""
PATTERN = r"^(?!\.)[A-Za-z0-9._-]{1,100}$"
"""The same as a regular expression."""


def is_name(text: str) -> bool:
    """Whether a text is :data:`NAMES`."""
    return re.fullmatch(PATTERN, text, re.ASCII) is not None


class BundleError(ValueError):
    """A bundle that cannot be used; the message names the file and the reason.

    ├── BundleMissingFile    a required file, or the directory itself, is not there
    ├── BundleDamaged        a file differs from its hash, cannot be parsed, or holds non-finite weights
    ├── BundleTooNew         written by a later version of this format
    └── BundleShapeMismatch  tensors are missing, unknown, or of another shape than the config says
    """


class BundleMissingFile(BundleError):
    """A required file is not there."""


class BundleDamaged(BundleError):
    """A file's content cannot be trusted."""


class BundleTooNew(BundleError):
    """The format version is newer than this program."""


class BundleShapeMismatch(BundleError):
    """The weights do not fit the architecture."""


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The content of config.json: what the model is."""

    name: str
    """Name that requests use."""
    flow: FlowConfig
    """Architecture."""
    noise: NoiseProtocol
    """Noise protocol of training and scoring."""
    class_names: tuple[str, ...] = ()
    """Names in label order; as many as the flow has classes."""
    class_prior: tuple[float, ...] = ()
    """p(y) of each class in label order, as frequent as in training; empty for uniform. See :attr:`prior`."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: free-form record of how the weights were made."""
    codec: CodecConfig | None = None
    """What makes latents of images, where these are modelled; None for a model of pixels."""

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and is_name(self.name)):
            raise ValueError(f"name: got {self.name!r}, allowed is {NAMES}")
        names = self.class_names
        if len(names) != self.flow.num_classes or not all(isinstance(n, str) and n for n in names):
            raise ValueError(
                f"class_names: got {len(names)}, allowed is {self.flow.num_classes} names that are not empty"
            )
        self._check_prior()
        check_codec(self.flow, self.noise, self.codec)
        if not isinstance(self.training, Mapping):
            raise ValueError(f"training: got {self.training!r}, allowed is an object")
        if len(set(names)) != len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"class_names: got {', '.join(map(repr, repeated))} more than once, allowed is each name once"
            )

    def _check_prior(self) -> None:
        """Raises ``ValueError`` for what is no distribution over the classes."""
        prior = self.class_prior
        if not prior:
            return
        if len(prior) != len(self.class_names):
            raise ValueError(
                f"class_prior: got {len(prior)} values, allowed is {len(self.class_names)}, one for each class, or none"
            )
        for i, value in enumerate(prior):
            # JSON's true is no number, whatever Python thinks; nan and infinity are not between 0 and 1.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"class_prior[{i}]: got {value!r}, allowed is a number above 0 and up to 1")
        if abs(math.fsum(prior) - 1) > PRIOR_TOLERANCE:
            raise ValueError(
                f"class_prior: got values with sum {math.fsum(prior):.9g}, allowed is a sum of 1 within "
                f"{PRIOR_TOLERANCE:g}"
            )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.flow.image_size * (1 if self.codec is None else self.codec.factor)

    @property
    def image_channels(self) -> int:
        """Colour channels of the images: 1 (grey) or 3 (RGB)."""
        return self.flow.channels if self.codec is None else self.codec.in_channels

    @property
    def prior(self) -> tuple[float, ...]:
        """p(y) of each class in numbers, uniform where :attr:`class_prior` is empty; empty without classes."""
        count = len(self.class_names)
        return self.class_prior or tuple(1 / count for _ in range(count))

    def to_json(self) -> bytes:
        """The bytes of config.json."""
        content = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "flow": self.flow.to_dict(),
            "noise": self.noise.to_dict(),
            "class_names": list(self.class_names),
            # Left out when empty: bundles from before there were priors keep their bytes, and so their id.
            **({"class_prior": list(self.class_prior)} if self.class_prior else {}),
            "preprocessing": PREPROCESSING,
            **({} if self.codec is None else {"codec": self.codec.to_dict()}),
            "training": dict(self.training),
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> BundleConfig:
        """Parse config.json; raises :class:`BundleDamaged` or :class:`BundleTooNew`."""
        content = parse_json(data, path)
        version = content.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise BundleDamaged(f"{path}: format_version: got {version!r}, allowed is 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise BundleTooNew(
                f"{path}: written in bundle format {version}, this program reads up to {FORMAT_VERSION}; upgrade it"
            )
        try:
            if content["preprocessing"] != PREPROCESSING:
                raise ValueError(f"preprocessing: got {content['preprocessing']!r}, allowed is {PREPROCESSING!r}")
            return cls(
                name=content["name"],
                flow=FlowConfig.from_dict(content["flow"]),
                noise=NoiseProtocol.from_dict(content["noise"]),
                class_names=tuple(content["class_names"]),
                class_prior=tuple(content.get("class_prior", ())),
                training=content.get("training", {}),
                codec=CodecConfig.from_dict(content["codec"]) if "codec" in content else None,
            )
        except KeyError as error:
            raise BundleDamaged(f"{path}: field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise BundleDamaged(f"{path}: {error}") from error


def check_codec(flow: FlowConfig, noise: NoiseProtocol, codec: CodecConfig | None) -> None:
    """Raise ``ValueError`` unless the flow models what its codec makes, or images without one, and says which."""
    if codec is None:
        check(flow.channels in (1, 3), "channels", flow.channels, "1 or 3, for a model of pixels")
    else:
        channels = codec.latent_channels
        check(flow.channels == channels, "channels", flow.channels, f"{channels}, as many as the codec's latents have")
    space = "pixels" if codec is None else "latents"
    check(
        noise.space == space,
        "noise.space",
        noise.space,
        f"{space!r} for a model {'without' if codec is None else 'with'} a codec",
    )


@dataclass(frozen=True)
class Bundle:
    """A bundle's checked metadata. The weights stay on disk; see :func:`model.weights.load_flow`."""

    path: Path
    model_id: str
    config: BundleConfig
    sampling: SamplingDefaults
    card: str
    weights_sha256: str
    files: tuple[str, ...]
    """Names of the files that the manifest lists."""
    created: int
    """When the bundle was first written, in seconds since 1970 (UTC)."""
    convergence: ConvergenceProfile | None = None
    """How the solvers converge; None for a bundle that was not tuned."""
    calibration: bytes | None = None
    """The content of calibration.safetensors (:class:`model.anomaly.calibration.Calibration`); None without one."""

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.config.name


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from a bundle's file; raises :class:`BundleDamaged`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleDamaged(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleDamaged(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def model_id(config_sha256: str, weights_sha256: str) -> str:
    """Identity of a model: the hash of its two defining hashes."""
    return "sha256:" + sha256(f"{config_sha256}\n{weights_sha256}\n".encode())


def read_file(directory: Path, name: str) -> bytes:
    """A file of a bundle; raises :class:`BundleMissingFile`."""
    try:
        return (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleMissingFile(f"{directory}: {name} is missing; is this a bundle?") from error
    except (OSError, ValueError) as error:
        raise BundleDamaged(f"{directory / name}: cannot be read: {error}") from error


def read_bundle(directory: Path) -> Bundle:
    """Read and check a bundle's metadata; raises a :class:`BundleError`.

    Every file but weights is checked against the manifest here; weights when they are loaded.
    """
    if not directory.is_dir():
        raise BundleMissingFile(f"{directory}: no such directory")
    # The version is looked at first: a newer format may well hash, and have, other files.
    content = {CONFIG: read_file(directory, CONFIG)}
    config = BundleConfig.from_json(content[CONFIG], directory / CONFIG)
    manifest = parse_json(read_file(directory, MANIFEST), directory / MANIFEST)
    hashes, created = manifest.get("sha256"), manifest.get("created", 0)
    if not isinstance(hashes, dict):
        raise BundleDamaged(f"{directory / MANIFEST}: field 'sha256' is missing")
    if not isinstance(created, int):
        raise BundleDamaged(f"{directory / MANIFEST}: created: got {created!r}, allowed is a time in seconds")
    if unsafe := [name for name in hashes if Path(name).name != name]:
        raise BundleDamaged(f"{directory / MANIFEST}: {unsafe[0]!r} is not the name of a file in the bundle")
    others = {SAMPLER, CARD, *hashes} - {CONFIG, WEIGHTS, CODEC}
    content |= {name: read_file(directory, name) for name in sorted(others)}
    for name, data in content.items():
        if hashes.get(name) != sha256(data):
            raise BundleDamaged(f"{directory / name}: content does not match its sha256 in {MANIFEST}")
    for name in (WEIGHTS, *([] if config.codec is None else [CODEC])):
        if not (directory / name).is_file():
            raise BundleMissingFile(f"{directory}: {name} is missing")
    if config.codec is not None and hashes.get(CODEC) != config.codec.sha256:
        raise BundleDamaged(f"{directory / MANIFEST}: the sha256 of {CODEC} is not that in {CONFIG}")
    weights_sha256 = str(hashes.get(WEIGHTS))
    sampler = parse_json(content[SAMPLER], directory / SAMPLER)
    try:
        sampling = SamplingDefaults.from_dict(sampler.get("defaults", {}))
        sampling.check_fits(config.flow, config.noise)
        stored = sampler.get("convergence")
        convergence = None if stored is None else ConvergenceProfile.from_dict(stored)
        if convergence is not None:
            convergence.check_fits(config.flow)
    except ValueError as error:
        raise BundleDamaged(f"{directory / SAMPLER}: {error}") from error
    return Bundle(
        path=directory,
        model_id=model_id(str(hashes.get(CONFIG)), weights_sha256),
        config=config,
        sampling=sampling,
        card=content[CARD].decode(errors="replace"),
        weights_sha256=weights_sha256,
        files=tuple(sorted(hashes)),
        created=created,
        convergence=convergence,
        calibration=content.get(CALIBRATION),
    )


def open_bundle(name_or_path: str) -> Bundle:
    """A bundle directory, or else a model that comes with the package, by name; as :func:`read_bundle`."""
    inside = BUNDLED / name_or_path
    return read_bundle(inside if inside.is_dir() and not Path(name_or_path).is_dir() else Path(name_or_path))


def find_bundles(directory: Path) -> list[Bundle]:
    """All bundles inside ``directory`` (or the directory itself, when it is one), by name.

    Raises :class:`BundleError` when there is none, when one is unusable, or when two share a name.
    """
    if not directory.is_dir():
        raise BundleMissingFile(f"{directory}: no such directory")
    if (directory / MANIFEST).is_file():
        return [read_bundle(directory)]
    paths = sorted(path.parent for path in directory.glob(f"[!.]*/{MANIFEST}"))
    if not paths:
        raise BundleMissingFile(f"{directory}: no bundle in it (a directory with {MANIFEST})")
    bundles: dict[str, Bundle] = {}
    for path in paths:
        bundle = read_bundle(path)
        if bundle.name in bundles:
            raise BundleError(f"{path} and {bundles[bundle.name].path}: both are named {bundle.name!r}")
        bundles[bundle.name] = bundle
    return [bundles[name] for name in sorted(bundles)]
