"""What the API asks and a worker answers: jobs, their results, and what a worker serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bundle import Bundle
from model.codecs.config import CodecConfig
from model.config import FlowConfig, NoiseProtocol, SamplingDefaults


class Op(StrEnum):
    """Kinds of work."""

    SAMPLE = "sample"
    DECODE = "decode"
    DENOISE = "denoise"
    SCORE = "score"
    ENCODE = "encode"
    CLASSIFY = "classify"


URGENT = frozenset({Op.SCORE, Op.ENCODE, Op.CLASSIFY})
"""Milliseconds of work: served between two slices of sampling."""

LONG = frozenset(Op) - URGENT
"""Work that runs in slices."""


class Lane(StrEnum):
    """The two queues of every model: workers look into the first between two slices of the second."""

    URGENT = "urgent"
    LONG = "long"


def lane_of(op: Op) -> Lane:
    """The lane that an op's jobs wait in."""
    return Lane.URGENT if op in URGENT else Lane.LONG


class Priority(StrEnum):
    """How large a share of the service a job's caller gets while others wait, too; nobody starves."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


WEIGHTS = {Priority.HIGH: 16, Priority.NORMAL: 4, Priority.LOW: 1}
"""Work done for one caller's jobs of a priority while one unit is done for another's of low priority."""


class JobState(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


FINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELED})

REDONE = (None, "tolerance", "non_finite")
"""Why an image was decoded again, by the number that a worker gives the reason."""

STATISTICS = "statistics."
"""What stands in front of the names of a score job's statistics."""

EXIT_UNUSABLE = 3
"""Exit status of a worker that cannot start: a bad bundle, a missing device, a failed warm-up."""

EXIT_DEVICE_LOST = 5
"""Exit status of a worker whose device failed for good, as after an illegal memory access on a GPU."""

EXIT_STUCK = 4
"""Exit status of a worker that ended itself because its inference loop was not heard any more."""

REDIS_VARIABLE = "TARFLOW_REDIS"
"""Environment variable in which a worker finds its Redis: a URL may hold a password, and every user of a host sees the
arguments of its processes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One accepted request; ``payload`` holds plain data and arrays as its op wants them.

    sample: seeds [int], label, options, solver, trajectory — decode: latents (n, T, D) float32, label, options,
    solver, trajectory — denoise: pixels (n, C, H, W) uint8, label, add_noise, seed — score: pixels, label, draws,
    seed, statistics — classify: pixels, draws, seed — encode: pixels, label, add_noise, seed. ``label`` is a class
    index or None for no class, ``statistics`` is absent or None for none, or their {seed, gradient}: whether gradients
    are wanted, ``options`` are :class:`~model.config.SamplingDefaults`, ``solver`` is
    :class:`~model.config.SolverOptions`, ``trajectory`` says whether the states after each block are wanted. Where
    ``floats`` is true, images come as floats too. ``previews`` is absent, or how many states sample and decode publish
    on the way.
    """

    id: str
    op: Op
    model: str
    payload: Mapping[str, Any]
    rows: int
    """Images in the job."""
    cost: int
    """Images × patches × passes: what admission and claiming count."""
    attempt: int = 1
    """Which worker in a row has it; results of earlier attempts are refused."""
    request_id: str = field(default="", compare=False)
    """Of the request that asked for it, for logs alone."""
    waited: float | None = field(default=None, compare=False)
    """Seconds from acceptance until its first worker took it, by the broker's clock; told to that worker alone."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for a message."""
        return {**vars(self), "op": str(self.op)}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Job:
        """Inverse of :meth:`to_wire`."""
        return cls(**{**data, "op": Op(data["op"])})


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a worker made of a job: named arrays, and how long it took."""

    arrays: Mapping[str, NDArray[Any]]
    inference_seconds: float
    queue_seconds: float = 0.0
    plan: Sequence[str] = ()
    """How sample and decode inverted each block, in the order of sampling."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for a message."""
        return dict(vars(self))

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> JobResult:
        """Inverse of :meth:`to_wire`."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the API knows of a served model: its bundle's metadata."""

    name: str
    model_id: str
    flow: FlowConfig
    noise: NoiseProtocol
    sampling: SamplingDefaults
    class_names: tuple[str, ...] = ()
    class_prior: tuple[float, ...] = ()
    """p(y) of each class in numbers; empty only without classes."""
    card: str = ""
    created: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    convergence: Mapping[str, float] | None = None
    """How its solvers converge, in short: gain, floor, tolerance; None for a model that was not tuned."""
    calibration: bytes | None = None
    """The bundle's own calibration, as its file; None for a bundle without one."""
    codec: CodecConfig | None = None
    """What makes latents of images for a model of latents; None for a model of pixels."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels, which is that of what the flow models only without a codec."""
        return self.flow.image_size * (1 if self.codec is None else self.codec.factor)

    @property
    def image_channels(self) -> int:
        """Colour channels of the images: 1 (grey) or 3 (RGB)."""
        return self.flow.channels if self.codec is None else self.codec.in_channels

    @classmethod
    def of(cls, bundle: Bundle) -> ModelInfo:
        """The metadata of a bundle."""
        config, profile = bundle.config, bundle.convergence
        return cls(
            name=config.name,
            model_id=bundle.model_id,
            flow=config.flow,
            noise=config.noise,
            sampling=bundle.sampling,
            class_names=config.class_names,
            class_prior=config.prior,
            card=bundle.card,
            created=bundle.created,
            training=config.training,
            calibration=bundle.calibration,
            codec=config.codec,
            convergence=None
            if profile is None
            else {"gain": profile.gain, "floor": profile.floor, "tolerance": profile.tolerance},
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain data for a message."""
        nested = {"flow": self.flow.to_dict(), "noise": self.noise.to_dict(), "sampling": self.sampling.to_dict()}
        classes = {"class_names": list(self.class_names), "class_prior": list(self.class_prior)}
        codec = None if self.codec is None else self.codec.to_dict()
        return {**asdict(self), **nested, **classes, "training": dict(self.training), "codec": codec}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ModelInfo:
        """Inverse of :meth:`to_wire`."""
        nested = {
            "flow": FlowConfig.from_dict(data["flow"]),
            "noise": NoiseProtocol.from_dict(data["noise"]),
            "sampling": SamplingDefaults.from_dict(data["sampling"]),
        }
        classes = {name: tuple(data[name]) for name in ("class_names", "class_prior")}
        codec = None if data.get("codec") is None else CodecConfig.from_dict(data["codec"])
        return cls(**{**data, **nested, **classes, "codec": codec})


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """A worker as it registers, warmed up and ready to claim."""

    id: str
    device: str
    models: tuple[ModelInfo, ...]
    states: Mapping[str, str] = field(default_factory=dict)
    """Where every model stands by name: loading, ready, unloading, or failed and why."""
    loads: Mapping[str, int] = field(default_factory=dict)
    """Orders to load a model that came to an end, well or not; tells whether a state is from before an order."""

    def to_wire(self) -> dict[str, Any]:
        """Plain data for a message."""
        return {
            **vars(self),
            "models": [m.to_wire() for m in self.models],
            "states": dict(self.states),
            "loads": dict(self.loads),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> WorkerInfo:
        """Inverse of :meth:`to_wire`."""
        models = tuple(ModelInfo.from_wire(m) for m in data["models"])
        return cls(**{**data, "models": models})


def as_floats(values: Any) -> NDArray[np.float32]:
    """Anything array-like as little-endian float32, the form in which tensors travel."""
    return np.ascontiguousarray(values, dtype="<f4")


def is_certified(backward_error: float, tolerance: float) -> bool | None:
    """Whether a certificate holds, compared in float32 as the sampler does; ``None`` where there is none (nan)."""
    return None if np.isnan(backward_error) else bool(np.float32(backward_error) <= np.float32(tolerance))
