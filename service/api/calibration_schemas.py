"""The JSON of /v1/calibrations: what may be sent, and what comes back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from service.api.schemas import ErrorBody, Notice, Seed


class CalibrationRequest(BaseModel):
    """The fields of the form beside ``files``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: StrictStr = Field(description="Name to call the calibration by; 'default' is the bundle's own.")
    model: StrictStr | None = Field(None, description="Name of the model; by default the service's first.")
    seed: Seed = Field(0, description="Seed of the noise; the same for every image that is judged.")
    replace: StrictBool = Field(False, description="Replace a calibration of this name once the new one is ready.")


class CalibrationSummary(BaseModel):
    """One calibration."""

    model_config = ConfigDict(protected_namespaces=())
    object: Literal["calibration"] = "calibration"
    id: str
    name: str
    model: str
    status: Literal["ready", "running", "failed"] = Field(
        description="Of the latest upload of this name; an older calibration may be usable meanwhile."
    )
    usable: bool = Field(description="Whether requests can name it now.")
    reason: str | None = Field(None, description="Why it cannot be used; null when it can.")
    progress: float = Field(description="Share of the images that are done, 0 to 1.")
    num_images: int | None = Field(description="Normal images; null for a damaged file.")
    created: int | None = Field(description="Seconds since 1970 (UTC); null for a damaged file.")
    error: ErrorBody | None = Field(None, description="Why it failed; null when it did not.")
    warnings: list[Notice] = []


class CalibrationList(BaseModel):
    """All calibrations of a model: the bundle's own, finished ones, then those in the making and failed ones."""

    object: Literal["list"] = "list"
    data: list[CalibrationSummary]


class CalibrationFacts(BaseModel):
    """What a calibration was made of, and what it allows."""

    num_fit: int = Field(description="Images that the densities were fitted to.")
    num_calibration: int = Field(description="Images whose scores make the p-values.")
    smallest_alpha: float = Field(description="The smallest level that so many images allow, 1/(num_calibration + 1).")
    default_alpha: float = Field(description="Level of verdicts that name none.")
    seed: int
    noise: dict[str, Any]
    created: int = Field(description="Seconds since 1970 (UTC).")
    codecs_match: bool = Field(
        description="Whether the codecs here compress as they did; if not, scores that use them do not apply."
    )
    source: str


class ScoreHistogram(BaseModel):
    """Scores of the calibration images; infinite ones are counted in the last bin."""

    edges: list[float] = Field(description="One more than bins.")
    counts: list[int]


class ScoreThreshold(BaseModel):
    """What a level means for a score."""

    alpha: float
    threshold: float | None = Field(description="Scores above it are flagged; null when it is not finite.")
    false_positive_rate: tuple[float, float] = Field(
        description="Where the rate of false alarms on normal images lies with a probability of 99%."
    )


class ScoreFacts(BaseModel):
    """One score of a calibration."""

    histogram: ScoreHistogram
    thresholds: list[ScoreThreshold] = Field(description="Of those levels of 0.1, 0.05 and 0.01 that are allowed.")


class CalibrationDetails(CalibrationSummary):
    """One calibration and what is in it; ``record`` and ``scores`` are null where there is none yet."""

    record: CalibrationFacts | None = None
    scores: dict[str, ScoreFacts] | None = None
