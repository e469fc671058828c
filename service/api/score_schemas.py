"""The JSON of /v1/score: what may be sent, and what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.api.schemas import Draws, GivenClassRequest, Notice, Number, Protocol, Timing
from service.verdicts import Correction, Direction, Score

Maps = Literal["none", "array", "png", "overlay"]

VERDICT_FIELDS = frozenset({"alpha", "threshold", "score", "maps", "calibration", "correction"})
"""Any of these asks for verdicts."""


class ScoreRequest(GivenClassRequest):
    """How likely are these images? And, with any of the fields from ``calibration`` on: are they normal?"""

    draws: Draws = 1
    calibration: StrictStr | None = Field(
        None, description="What is normal: a calibration's name; null for the bundle's own."
    )
    alpha: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Level: the expected share of normal images that are flagged; by default 0.01, or the smallest "
        "that the calibration allows.",
    )
    threshold: Number | None = Field(
        None, description="Score above which an image is flagged; only one of alpha and threshold may be given."
    )
    score: Score = Field("combined", description="What decides; larger is more anomalous.")
    correction: Correction = Field(
        "none",
        description="benjamini_hochberg: alpha is the expected share of false alarms among the flagged images of this "
        "request, rather than among the normal ones.",
    )
    maps: Maps = Field(
        "none",
        description="Where images are unusual: values (array), a picture of them (png), or the image with them laid on "
        "it and boxes around the regions (overlay).",
    )

    @property
    def asks_verdicts(self) -> bool:
        """Whether any field about verdicts was sent."""
        return not VERDICT_FIELDS.isdisjoint(self.model_fields_set)


class Rate(BaseModel):
    """An interval of a share."""

    low: float
    high: float


class MapColours(BaseModel):
    """What the colours of a map mean, the same for every image of a calibration."""

    threshold: float | None = Field(
        description="Value above which regions begin, in orange; 95% of normal images exceed it nowhere. From two "
        "thirds of it on there is colour."
    )
    top: float | None = Field(description="Value from which on there is only the last colour, magenta.")


class MapResult(BaseModel):
    """Where an image is unusual."""

    format: Literal["array", "png", "overlay"]
    shape: list[int] | None = Field(
        None, description="Height and width of an array, in the model's pixels; null for pictures."
    )
    b64: str = Field(
        description="Base64: little-endian float32 in row-major order, or a PNG enlarged by a whole factor to 224 or "
        "more pixels."
    )
    scale: MapColours


class RegionResult(BaseModel):
    """A connected part of an image where the map exceeds its threshold."""

    bbox: tuple[int, int, int, int] = Field(description="Box around it in the model's pixels: x, y, width, height.")
    bbox_original: tuple[int, int, int, int] = Field(
        description="The same in pixels of the uploaded image, upright (as its EXIF orientation says)."
    )
    area: int = Field(description="Number of the model's pixels.")
    peak: float | None = Field(description="Largest value of the map in it; null when it is not finite.")


class CalibrationUsed(BaseModel):
    """What verdicts were made with."""

    name: str
    num_calibration: int = Field(description="Normal images whose scores make the p-values.")
    score: Score


class ScoreResult(BaseModel):
    """How likely one image is, and whether it is normal where that was asked."""

    index: int
    filename: str | None = None
    log_likelihood: float | None = Field(description="Nats, summed over the image, on the [-1, 1] pixel scale.")
    log_likelihood_std: float | None = Field(description="Standard deviation over the draws; null for one draw.")
    bits_per_dim: float | None
    protocol: Protocol
    is_anomaly: bool | None = Field(
        None, description="The verdict; null, as all that follows, when none was asked for."
    )
    p_value: float | None = Field(
        None,
        description="Conformal: a normal image has one at most this small with at most this probability.",
    )
    score: float | None = Field(None, description="The score that was asked for; null when it is not finite.")
    threshold: float | None = Field(
        None,
        description="Score above which images are flagged; null with a correction, which decides about all images of a "
        "request together, and when no score is.",
    )
    alpha: float | None = Field(None, description="Level at which images are flagged.")
    expected_false_positive_rate: Rate | None = Field(
        None,
        description="Share of normal images that this calibration flags, an interval with 99% confidence; null with a "
        "correction.",
    )
    direction: Direction | None = Field(
        None, description="Whether bits/dim are above (too_unlikely) or below the median of normal images."
    )
    features: dict[str, float | None] | None = Field(
        None, description="Every score that was computed; null for one that is not finite, as anomalous as can be."
    )
    map: MapResult | None = None
    regions: list[RegionResult] | None = Field(
        None, description="By falling peak, at most 100; null without maps. The box is of the calibrated threshold."
    )
    warnings: list[Notice] = []


class ScoreResponse(BaseModel):
    """Scores of images."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)
    id: str
    model: str
    class_: str | None = Field(None, alias="class")
    calibration: CalibrationUsed | None = Field(None, description="null when no verdict was asked for.")
    correction: Correction | None = Field(None, description="How several images were allowed for; null as above.")
    images: list[ScoreResult]
    timing: Timing
