"""What /v1/models answers with."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ImageShape(BaseModel):
    """The images of a model, which are square."""

    size: int = Field(description="Side in pixels.")
    channels: int = Field(description="1 for grey, 3 for colour.")


class ModelSummary(BaseModel):
    """The fields that clients of model lists expect, and the few that choose a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970 (UTC).")
    owned_by: str = "tarflow"
    default: bool = Field(description="Whether requests that name no model get this one.")
    hash: str = Field(description="Of weights and configuration.")
    num_classes: int = Field(description="0 for a model without classes.")
    image: ImageShape


class ModelList(BaseModel):
    """Every model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelSummary]


class AnomalyFacts(BaseModel):
    """What the bundle's own calibration can be asked."""

    calibrated: bool
    scores: list[str]
    num_calibration: int | None
    smallest_alpha: float | None


class ModelDescription(ModelSummary):
    """Everything that is known of a model."""

    model_config = ConfigDict(protected_namespaces=())
    architecture: dict[str, Any]
    class_names: list[str]
    class_prior: list[float]
    noise: dict[str, Any]
    recommended: dict[str, Any]
    convergence: dict[str, Any]
    anomaly: AnomalyFacts
    codec: dict[str, Any] | None = Field(None, description="Of a model of latents, the autoencoder; null for pixels.")
    training: dict[str, Any]
    card: str
