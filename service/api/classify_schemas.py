"""The JSON of /v1/classify: what may be sent, and what comes back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas import Draws, ImagesRequest, Notice, Protocol, Timing


class ClassifyRequest(ImagesRequest):
    """Which class are these images of?"""

    draws: Draws = 1


class ClassProbability(BaseModel):
    """One class of an image's posterior."""

    model_config = ConfigDict(populate_by_name=True)
    class_: str = Field(alias="class")
    index: int = Field(description="Index of the class.")
    probability: float | None = Field(description="p(y | x), the posterior under the model's class_prior.")
    log_likelihood: float | None = Field(description="log p(x | y) in nats, as /v1/score gives it for this class.")


class ClassifyResult(BaseModel):
    """Which class one image is of."""

    model_config = ConfigDict(populate_by_name=True)
    index: int
    filename: str | None = None
    class_: str | None = Field(
        alias="class", description="The most probable class; null when the model gave values that are not finite."
    )
    probabilities: list[ClassProbability] = Field(description="Every class, the most probable first.")
    log_likelihood_no_class: float | None = Field(
        description="log p(x | ∅) in nats, as /v1/score gives it without a class: the model's density given the mean "
        "class embedding, which is not the marginal."
    )
    log_marginal: float | None = Field(description="log Σ p(y) p(x | y) in nats, over all classes.")
    protocol: Protocol
    warnings: list[Notice] = []


class ClassifyResponse(BaseModel):
    """Classes of images."""

    model_config = ConfigDict(protected_namespaces=())
    id: str
    model: str
    images: list[ClassifyResult]
    timing: Timing
