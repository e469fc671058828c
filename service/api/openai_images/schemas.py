"""The JSON of /v1/images/generations: OpenAI's fields, and ours beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from model.images import Format
from service.api.schemas import Notice, SamplerFields, Seed, Timing

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class GenerationRequest(SamplerFields):
    """Draw images of the class that a prompt names.

    Fields that are not known are ignored, and named in the answer's warnings. ``extra_body`` of the Python client
    carries ours: seed, and the parameters of /v1/sample.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"prompt": "a sneaker", "seed": 7}]})

    prompt: StrictStr = Field(
        description="The name of a class, as people write names: in any case, singular or plural, with an article; or "
        "'anything' for none."
    )
    model: StrictStr | None = Field(None, description="Name of the model; by default the service's first.")
    n: Annotated[StrictInt, Field(ge=1, le=10)] | None = Field(None, description="How many images; 1 if not given.")
    size: StrictStr | None = Field(None, description="auto, or the model's own size, such as 28x28.")
    response_format: StrictStr | None = Field(None, description="b64_json, and nothing else: no images are kept here.")
    output_format: Format | None = Field(None, description="png (default), jpeg or webp.")
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp; webp of 100, the default, is lossless. png knows only 100."
    )
    background: StrictStr | None = Field(None, description="auto or opaque.")
    stream: StrictBool | None = Field(
        None, description="true: answer with server-sent events; only for one image, as with OpenAI."
    )
    partial_images: Annotated[StrictInt, Field(ge=0, le=3)] | None = Field(
        None, description="Images on the way from the noise that a stream shows before the last."
    )
    seed: Seed | None = Field(None, description="Seed of the first image; drawn and returned when absent.")

    # What changes nothing here: there is one quality and one style, and what can be drawn is harmless.
    quality: Quality | None = Field(None, description="Accepted; there is one quality.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted; there is one style.")
    moderation: Literal["low", "auto"] | None = Field(None, description="Accepted; nothing needs it.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Accepted; there is one complexity.")
    user: StrictStr | None = Field(None, description="Accepted, and not kept.")
    safety_identifier: StrictStr | None = Field(None, description="Accepted, and not kept.")


class InputTokens(BaseModel):
    """What the prompt consists of."""

    text_tokens: int
    image_tokens: int = 0


class OutputTokens(BaseModel):
    """What the images consist of."""

    image_tokens: int
    text_tokens: int = 0


class Usage(BaseModel):
    """The flow's own tokens."""

    input_tokens: int = Field(description="1 for a class, 0 for none.")
    output_tokens: int = Field(description="Patches of all images.")
    total_tokens: int
    input_tokens_details: InputTokens
    output_tokens_details: OutputTokens


class GeneratedImage(BaseModel):
    """One image: ``b64_json`` as OpenAI has it, the rest as /v1/sample answers."""

    model_config = ConfigDict(populate_by_name=True)
    b64_json: str = Field(description="The image file in base64.")
    seed: int = Field(description="Seed that gives this image again.")
    class_: str | None = Field(None, alias="class")
    backward_error: float | None = None
    certified: bool | None = None
    redone: Literal["tolerance", "non_finite"] | None = None
    trajectory: list[str] | None = None
    warnings: list[Notice] = []


class GenerationResponse(BaseModel):
    """Images, in OpenAI's envelope."""

    model_config = ConfigDict(protected_namespaces=())
    created: int = Field(description="Seconds since 1970 (UTC).")
    data: list[GeneratedImage]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    usage: Usage
    id: str = Field(description="Ours from here on, as /v1/sample answers them.")
    model: str
    plan: list[str] | None
    parameters: dict[str, Any]
    timing: Timing
    warnings: list[Notice] = []


class PartialImageEvent(BaseModel):
    """The state after one of the flow's blocks."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Format
    block: int = Field(description="Ours: after how many blocks this is the state,")
    blocks: int = Field(description="and of how many.")


class CompletedEvent(GeneratedImage):
    """The image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Format
    usage: Usage
    id: str
    model: str
    parameters: dict[str, Any]
