"""Every setting of the service: a flag of the forms that it concerns, and an environment variable each.

``--max-images 16`` and ``TARFLOW_MAX_IMAGES=16`` are the same; a flag wins over the environment.
Nothing is read at import time: the settings of a form are built once, at the entry point.

What answers HTTP takes :class:`Settings`, what starts workers :class:`ComputeSettings`. The forms are made of
these: :class:`ServeSettings` of ``tarflow serve``, :class:`ApiSettings` of ``tarflow api``, :class:`WorkerSettings` of
``tarflow worker``.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.bundle import BUNDLED
from model.images import DEFAULT_MAX_PIXELS
from service.broker.base import Limits


def default_state() -> Path:
    """Where programs keep their state: ``$XDG_STATE_HOME/tarflow``, or ``~/.local/state/tarflow``."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "tarflow"


ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:-]+", re.ASCII)
"""As browsers write one, in lower case."""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in (part.strip() for part in text.split(",")) if part)


class SharedSettings(BaseSettings):
    """What every process of a deployment should be told alike."""

    model_config = SettingsConfigDict(env_prefix="TARFLOW_", extra="ignore")

    batch_rows: int = Field(64, ge=1, description="Most images in one batch of the model.")
    lease_seconds: float = Field(60.0, gt=0, description="Seconds without a heartbeat after which a job is given on.")
    ready_seconds: float = Field(10.0, gt=0, description="Age at which a worker's heartbeat no longer counts as ready.")
    max_attempts: int = Field(3, ge=1, description="Workers a job may lose before it fails.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json, an object a line, or text; auto writes text to a terminal and JSON to all else."
    )


class Settings(SharedSettings):
    """Settings of a process that answers requests."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all of the host's.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    keys: Path | None = Field(
        None,
        description="File with the API keys, which 'tarflow keys new' makes; what is edited is in force some seconds "
        "later. Without keys the service answers anyone, and listens to its own host only.",
    )
    keys_inline: str | None = Field(
        None, repr=False, description="The text of such a file, for environments without files (TARFLOW_KEYS_INLINE)."
    )
    anonymous: bool = Field(
        False, description="Without keys, listen to others too: whoever reaches the port may do anything with it."
    )
    cors: str = Field(
        "",
        description="Origins whose web pages may call the service, several with commas (https://a.example), or *. "
        "By default none.",
    )
    default_model: str | None = Field(None, description="Model of requests that name none; by default the first.")

    max_images: int = Field(64, ge=1, description="Most images in one request.")
    max_draws: int = Field(64, ge=1, description="Most noise draws for one scored image.")
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS, ge=1, description="Most pixels of an uploaded image; a request may have four times as many."
    )
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Largest request body in bytes.")
    max_calibrations: int = Field(
        100, ge=1, description="Most calibrations of a model, those in the making and failed ones included."
    )
    max_calibration_images: int = Field(
        20_000,
        ge=20,
        description="Most normal images of one calibration; while it is made, 20000 take 0.3 GB of memory at 28x28 "
        "grey, and 0.7 to 1.3 GB at 32x32 in colour, the more the wider the model. In a Redis "
        "the images also wait until it is made: 16 and 61 MB of its memory.",
    )
    max_calibration_bytes: int = Field(
        512 * 2**20, ge=1024, description="Largest body of POST /v1/calibrations in bytes; it goes to disk, not memory."
    )
    drift_window: int = Field(1000, ge=1, description="Judged images, the last ones, that drift is measured over.")
    max_queue_cost: int = Field(
        2_000_000, ge=1, description="Most waiting work, in images x patches x passes, before 429 is answered."
    )
    caller_share: float = Field(0.5, gt=0, le=1, description="Share of it that one named caller may have waiting.")
    request_timeout: float = Field(
        600.0, gt=0, description="Seconds until a request is given up with 504, its body included."
    )
    job_timeout: float = Field(
        3600.0, gt=0, description="Seconds until an asynchronous job that has not ended is given up."
    )
    result_seconds: float = Field(
        3600.0, gt=0, description="Seconds that a job that outlives its connection is kept after it has ended."
    )
    admin: bool = Field(
        False,
        description="Without keys, answer /v1/admin too, where whoever reaches the port can load and unload models; "
        "with keys it is always there, for those of scope admin.",
    )
    page: bool = Field(True, description="Show browsers a page at /; it is open to anyone, and holds no secret.")
    drain_seconds: int = Field(30, ge=0, description="Seconds that running requests get to finish on shutdown.")

    @field_validator("cors")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        """Refuse what no browser would send."""
        for origin in _listed(text):
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise PydanticCustomError(
                    "origin", "an origin is a scheme, a host and perhaps a port, without a path: https://a.example"
                )
        return text

    @field_validator("keys_inline")
    @classmethod
    def _are_given_once(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and info.data.get("keys") is not None:
            raise PydanticCustomError("keys", "give the keys as a file (--keys) or as text, not both")
        return text

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return self.keys is not None or self.keys_inline is not None

    @property
    def administers(self) -> bool:
        """Whether models can be loaded and unloaded over HTTP."""
        return self.admin or self.has_keys

    @property
    def origins(self) -> tuple[str, ...]:
        """Whose web pages may call the service."""
        return _listed(self.cors)

    @property
    def limits(self) -> Limits:
        """What the broker holds to."""
        return Limits(
            max_queue_cost=self.max_queue_cost,
            caller_share=self.caller_share,
            lease_seconds=self.lease_seconds,
            ready_seconds=self.ready_seconds,
            max_attempts=self.max_attempts,
        )


class ComputeSettings(SharedSettings):
    """Settings of a process that starts workers."""

    models: Path = Field(BUNDLED, description="Directory whose bundle directories are served; by default the bundled.")
    device: str = Field(
        "auto",
        description="cpu, cuda:N, several with commas, or auto or all: every GPU, or else the CPU. A worker each.",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 divides the cores among the workers.")
    model_memory: int = Field(
        0, ge=0, description="Most bytes of weights that a worker holds; what is beyond is not served. 0 for no limit."
    )
    cohorts: int = Field(4, ge=1, description="Most sampling batches in flight at once.")
    batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Milliseconds that a batch that is not full waits for more; 0 takes what is there.",
    )
    slice_limit_seconds: float = Field(
        60.0,
        gt=0,
        description="Seconds without a sign of the inference loop after which a worker is ended and replaced.",
    )


class RedisSettings(SharedSettings):
    """Settings of a process that meets the others in a Redis."""

    redis: str = Field(
        pattern=r"^(redis|rediss|unix)://",
        repr=False,
        description="URL of the Redis that all share: redis://HOST:6379/0, rediss:// or unix://; "
        "with a password, better in TARFLOW_REDIS, where no list of processes shows it.",
    )
    redis_prefix: str = Field(
        "tarflow",
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="First part of every key, for several services in one Redis.",
    )

    @field_validator("redis")
    @classmethod
    def _has_a_host(cls, url: str) -> str:
        """Refuse what would be cut in the wrong place, in words without the password that would be shown else."""
        try:
            parts = urlsplit(url)
            cut = parts.port == 0 or any("@" in rest for rest in (parts.path, parts.query, parts.fragment))
        except ValueError:
            cut = True
        if cut and not url.startswith("unix://"):
            raise PydanticCustomError(
                "redis_url", "not a URL: in a password, / ? # @ and % are written as %2F %3F %23 %40 and %25"
            )
        return url

    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the metrics; of several workers, each has the next. 0 opens none."
    )


class ServeSettings(Settings, ComputeSettings):
    """``tarflow serve``: all in one process and the workers it starts."""

    state: Path = Field(
        default_factory=default_state,
        description="Directory of what must outlive the service, such as calibrations; "
        "by default tarflow in the user's state directory (XDG_STATE_HOME).",
    )
    max_kept_bytes: int = Field(
        2**30,
        ge=1024,
        description="Bytes of kept results and their jobs, about, from which on new requests for jobs that outlive "
        "their connection are answered with 429 until some have expired.",
    )

    @property
    def limits(self) -> Limits:
        """What the broker holds to, which is in this process."""
        return replace(super().limits, max_kept_bytes=self.max_kept_bytes)


class ApiSettings(RedisSettings, Settings):
    """``tarflow api``: one of any number of processes that answer HTTP."""


class WorkerSettings(RedisSettings, ComputeSettings):
    """``tarflow worker``: the workers of one of any number of hosts."""

    grace_seconds: float = Field(
        30.0,
        ge=0,
        description="Seconds that running jobs get to finish on shutdown; the rest is handed to other workers.",
    )
