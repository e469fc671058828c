"""The JSON of the native API: what may be sent, and what comes back."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag
from pydantic.config import JsonDict

from model.config import (
    MAX_SEED,
    GuidanceRule,
    GuidanceSchedule,
    GuidanceTarget,
    Precision,
    Solver,
    SolverOptions,
)

OutputFormat = Literal["png", "jpeg", "webp", "npy"]


# Strict, because JSON's true is no number, whatever Python thinks.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
LONGEST_AXIS = 65_536
MOST_ITEMS = 4096
"""Length at which a list is refused unread; the settings allow fewer. Lists stop at their first error: a
body of millions of wrong values must not become millions of error records."""
BlockNumber = Annotated[StrictInt, Field(ge=0, le=LONGEST_AXIS)]
Seed = Annotated[StrictInt, Field(ge=0, le=MAX_SEED)]
Draws = Annotated[StrictInt, Field(ge=1, description="Noise draws per image; more give a steadier (or tighter) value.")]
ClassField = Annotated[
    StrictStr | StrictInt | None,
    Field(
        alias="class",
        description="Class by exact name, or else by decimal index; null or absent for no class.",
        examples=["Sneaker"],
    ),
]


class _Strict(BaseModel):
    """Unknown fields are refused: a misspelt parameter must not be ignored."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class SamplerFields(_Strict):
    """Parameters of the sampler; what is absent comes from the bundle's recommendation."""

    guidance_scale: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="Guidance weight w; 0 turns guidance off."
    )
    guidance_rule: GuidanceRule | None = Field(
        None, description="linear (TarFlow: v + w(v − v_u)), or closed_form (STARFlow: as for a product of Gaussians)."
    )
    guidance_schedule: GuidanceSchedule | None = Field(
        None,
        description="How the weight grows along the patches: constant, linear (the paper's annealing) or cosine.",
    )
    guidance_target: GuidanceTarget | None = Field(
        None, description="What the linear rule guides: both, scale (α) or shift (μ); the closed form guides both."
    )
    guidance_window: Annotated[list[BlockNumber], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Guided blocks, [start, stop) in the order of sampling, where block 0 is next to the noise; "
        "null for all.",
    )
    attention_temperature: Annotated[Number, Field(ge=0.01, le=100)] | None = Field(
        None, description="τ of the pass that guidance compares with; below 1 it guides without classes too."
    )
    denoise: StrictBool | None = Field(None, description="Denoise with Tweedie's formula (Gaussian-noise models).")
    solver: Solver = Field(
        SolverOptions.solver,
        description="How the blocks are inverted: sequential (patch by patch), jacobi (fixed-point iterations), or "
        "auto: what is fastest here. Each gives the same image within the tolerance.",
    )
    tolerance: Annotated[Number, Field(ge=1e-6, le=1)] = Field(
        SolverOptions.tolerance,
        description="Largest backward error of a certified image; one above it is done again sequentially in float32.",
    )
    precision: Precision = Field(
        SolverOptions.precision,
        description="float32, or bf16: drafts with bfloat16 weights, polished in float32 unless certify is false. "
        "On a CPU bf16 works but is slow.",
    )
    certify: StrictBool | None = Field(
        SolverOptions.certify,
        description="true: a certificate for every image; false: nothing is polished or done again for missing the "
        "tolerance; null: certificates where an iteration or low precision needs them, none for sequential float32 "
        "decoding, which is exact but for rounding.",
    )
    trajectory: StrictBool = Field(False, description="Also return the images after each block.")
    output_format: OutputFormat | None = Field(
        None, description="png (default), jpeg, webp (lossless), or npy: the float image before rounding."
    )
    previews: Annotated[StrictInt, Field(ge=0, le=100)] = Field(
        0,
        description="Up to how many events of a stream or an asynchronous job show the images on the way, evenly "
        "spread over the blocks.",
    )


class SampleRequest(SamplerFields):
    """Draw images."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"class": "Sneaker", "num_images": 2, "seed": 7}]})

    model: StrictStr | None = Field(None, description="Name of the model; by default the service's first.")
    class_: ClassField = None
    num_images: StrictInt = Field(
        1, description="How many images; image i uses seed + i.", json_schema_extra={"minimum": 1}
    )
    seed: Seed | None = Field(None, description="Seed of the first image; drawn and returned when absent.")


class TensorValue(_Strict):
    """A tensor in compact form."""

    shape: list[Annotated[StrictInt, Field(ge=0)]] = Field(max_length=8, description="Lengths of the axes.")
    b64: StrictStr = Field(description="Base64 of the values as little-endian float32 in row-major order.")


Row = Annotated[list[Number], Field(fail_fast=True, max_length=LONGEST_AXIS)]
Rows = Annotated[list[Row], Field(fail_fast=True, max_length=LONGEST_AXIS)]


def _latent_form(value: Any) -> str:
    return "nested" if isinstance(value, list) else "compact"


# The form is told before the value is looked at, so that an error is about the form that was sent.
Latent = Annotated[Annotated[TensorValue, Tag("compact")] | Annotated[Rows, Tag("nested")], Discriminator(_latent_form)]

# The latent of all zeros of the bundled model, (T, D) = (49, 16): the most likely noise.
_ZEROS: JsonDict = {"shape": [49, 16], "b64": base64.b64encode(bytes(4 * 49 * 16)).decode()}


class DecodeRequest(SamplerFields):
    """Turn latents into images."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"class": "Sneaker", "latents": [_ZEROS]}]})

    model: StrictStr | None = Field(None, description="Name of the model; by default the service's first.")
    class_: ClassField = None
    latents: list[Latent] = Field(
        min_length=1,
        max_length=MOST_ITEMS,
        fail_fast=True,
        description="One latent (T, D) per image: nested lists, or {shape, b64}.",
    )


class ImagesRequest(_Strict):
    """Images to look at, as JSON; the same can be sent as multipart/form-data with ``files``."""

    images: list[StrictStr] = Field(
        min_length=1,
        max_length=MOST_ITEMS,
        fail_fast=True,
        description="Image files in base64 (data: URLs are fine too).",
    )
    model: StrictStr | None = Field(None, description="Name of the model; by default the service's first.")
    seed: Seed = Field(0, description="Seed of the noise; the same for all images, so scores don't depend on order.")


class GivenClassRequest(ImagesRequest):
    """Images to look at given a class, or none."""

    class_: ClassField = None


class EncodeRequest(GivenClassRequest):
    """Images to latents."""

    add_noise: StrictBool = Field(False, description="Add the model's training noise before encoding.")


class DenoiseRequest(GivenClassRequest):
    """Noisy images to clean ones."""

    add_noise: StrictBool = Field(False, description="Add the model's training noise before denoising.")
    output_format: OutputFormat = Field("png", description="png, jpeg, webp (lossless), or npy.")


class Notice(BaseModel):
    """A change that was made to an input, or something to know about an output."""

    code: str
    message: str


class Timing(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float
    inference_ms: float
    total_ms: float


class ImageResult(BaseModel):
    """One image."""

    index: int
    seed: int | None = Field(None, description="Seed that gives this image again.")
    class_: str | None = Field(None, alias="class")
    format: OutputFormat
    b64: str = Field(description="The image file (or .npy array, float32 (C, H, W) in [-1, 1]) in base64.")
    backward_error: float | None = Field(
        None,
        description="The certificate: max|z' − z| between the noise z the image was to be drawn from and the noise z' "
        "that it is the exact image of, in standard deviations. It is about the float sample before denoising and "
        "rounding. null without a certificate, and for a sample that is not finite.",
    )
    certified: bool | None = Field(
        None,
        description="Whether backward_error is at most the tolerance; null where no certificate was asked for, because "
        "sequential float32 decoding is exact but for rounding.",
    )
    redone: Literal["tolerance", "non_finite"] | None = Field(
        None, description="Why the image was done again, sequentially in float32; null when it was not."
    )
    trajectory: list[str] | None = Field(
        None,
        description="Where asked for, one image in base64 after each block in the order of sampling, in the same "
        "format as b64; the last is the sample before denoising. States are not confined to [-1, 1]: pictures clip "
        "them as they clip the image, npy holds the values.",
    )
    warnings: list[Notice] = []


class ImagesResponse(BaseModel):
    """Images that were sampled, decoded or denoised."""

    model_config = ConfigDict(protected_namespaces=())
    id: str
    model: str
    images: list[ImageResult]
    plan: list[str] | None = Field(
        None,
        description="How each block was inverted, in the order of sampling: sequential, or jacobi/N with N patches "
        "solved together (with bf16, that of the draft); null for /v1/denoise.",
    )
    parameters: dict[str, Any] = Field(description="Every parameter as it was used.")
    timing: Timing


class Protocol(BaseModel):
    """What a likelihood of this model means."""

    noise: Literal["gaussian", "uniform"]
    space: Literal["pixels", "latents"] = Field(
        "pixels", description="What the likelihood is of: the pixels, or an autoencoder's latents of them."
    )
    sigma: float = Field(
        description="Standard deviation of Gaussian noise on the [-1, 1] pixel scale, or on that of the latents."
    )
    draws: int = Field(description="Noise draws; 0 when no noise was added.")
    seed: int | None
    meaning: str


class EncodeResult(BaseModel):
    """One image's latent."""

    index: int
    filename: str | None = None
    latent: TensorValue = Field(description="u (T, D), standard normal under the model; /v1/decode inverts it.")
    log_likelihood: float | None = Field(description="Nats, of exactly the point that was encoded; see protocol.")
    protocol: Protocol
    warnings: list[Notice] = []


class EncodeResponse(BaseModel):
    """Latents of images."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)
    id: str
    model: str
    class_: str | None = Field(None, alias="class")
    images: list[EncodeResult]
    timing: Timing


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The envelope of every error."""

    error: ErrorBody
