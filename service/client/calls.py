"""Requests as data: what is asked, and how its answer is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from numpy.typing import NDArray

from model.config import GuidanceRule, GuidanceSchedule, GuidanceTarget, Precision, Solver
from service.api.schemas import OutputFormat
from service.api.score_schemas import Maps
from service.client.answers import Classes, Images, Latents, Scores
from service.client.uploads import File, ImageLike, LatentLike, files_of, latents_of
from service.verdicts import Correction, Score

T = TypeVar("T")
TEXTS = frozenset({"model", "class", "calibration", "output_format", "name"})
"""Fields that forms hold as text; the others are written as JSON."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request."""

    method: str
    path: str
    read: Callable[[Any], T]
    """What the JSON of the answer means."""
    json: Any = None
    form: Mapping[str, str] | None = None
    files: Sequence[File] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    """Whether it may come twice, when nobody knows whether it has come. What the operations do leaves no trace, and the
    service gives up what it does for a connection that broke."""


class SamplerFields(TypedDict, total=False):
    """Parameters of the sampler, as in /v1/sample; what is absent is as the bundle recommends."""

    guidance_scale: float | None
    guidance_rule: GuidanceRule | None
    guidance_schedule: GuidanceSchedule | None
    guidance_target: GuidanceTarget | None
    guidance_window: tuple[int, int] | None
    attention_temperature: float | None
    denoise: bool | None
    solver: Solver
    tolerance: float
    precision: Precision
    certify: bool | None
    trajectory: bool
    output_format: OutputFormat | None
    previews: int


class DecodeFields(SamplerFields, total=False):
    """Fields of /v1/decode beside the latents."""

    model: str | None
    class_: str | int | None


class SampleFields(DecodeFields, total=False):
    """Fields of /v1/sample."""

    num_images: int
    seed: int | None


class ImagesFields(TypedDict, total=False):
    """Fields of every operation on images."""

    model: str | None
    seed: int


class GivenClassFields(ImagesFields, total=False):
    """The same given a class, or none."""

    class_: str | int | None


class EncodeFields(GivenClassFields, total=False):
    """Fields of /v1/encode beside the images."""

    add_noise: bool


class DenoiseFields(GivenClassFields, total=False):
    """Fields of /v1/denoise beside the images."""

    add_noise: bool
    output_format: OutputFormat


class ScoreFields(GivenClassFields, total=False):
    """Fields of /v1/score beside the images; any from ``calibration`` on asks for verdicts, None included."""

    draws: int
    calibration: str | None
    alpha: float | None
    threshold: float | None
    score: Score
    correction: Correction
    maps: Maps


class ClassifyFields(ImagesFields, total=False):
    """Fields of /v1/classify beside the images."""

    draws: int


def sample(**fields: Unpack[SampleFields]) -> Call[Images]:
    """Draw images of a class, or of none; image i uses seed + i."""
    return Call(method="POST", path="/v1/sample", read=Images.model_validate, json=_named(fields))


def decode(latents: Sequence[LatentLike] | NDArray[Any], **fields: Unpack[DecodeFields]) -> Call[Images]:
    """Turn latents into images: the exact inverse of ``encode``."""
    body = {**_named(fields), "latents": latents_of(latents)}
    return Call(method="POST", path="/v1/decode", read=Images.model_validate, json=body)


def denoise(images: ImageLike | Sequence[ImageLike], **fields: Unpack[DenoiseFields]) -> Call[Images]:
    """Remove noise of the model's training strength from images."""
    return _of_images("/v1/denoise", Images.model_validate, images, fields)


def score(images: ImageLike | Sequence[ImageLike], **fields: Unpack[ScoreFields]) -> Call[Scores]:
    """How likely are images? And, with any of the fields about verdicts: are they normal?"""
    return _of_images("/v1/score", Scores.model_validate, images, fields)


def encode(images: ImageLike | Sequence[ImageLike], **fields: Unpack[EncodeFields]) -> Call[Latents]:
    """The latent of each image, and its log-likelihood."""
    return _of_images("/v1/encode", Latents.model_validate, images, fields)


def classify(images: ImageLike | Sequence[ImageLike], **fields: Unpack[ClassifyFields]) -> Call[Classes]:
    """The exact posterior over the model's classes of each image."""
    return _of_images("/v1/classify", Classes.model_validate, images, fields)


def form(fields: Mapping[str, Any]) -> dict[str, str]:
    """Fields as forms hold them."""
    return {name: (value or "") if name in TEXTS else json.dumps(value) for name, value in fields.items()}


def path(*parts: str) -> str:
    """A path of names that may hold anything."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _of_images(
    path: str,
    read: Callable[[Any], T],
    images: ImageLike | Sequence[ImageLike],
    fields: Mapping[str, Any],
) -> Call[T]:
    """A form with files. But a number is no text: who gives one as the class means an index and not a name."""
    files, named = files_of(images), _named(fields)
    if not isinstance(named.get("class"), int):
        return Call(method="POST", path=path, read=read, form=form(named), files=files)
    body = {**named, "images": [base64.b64encode(data).decode() for _, data in files]}
    return Call(method="POST", path=path, read=read, json=body)


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"class" if name == "class_" else name: value for name, value in fields.items()}
