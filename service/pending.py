"""Calibrations that were accepted and are not finished: what is kept of them, and who works on which.

A run is one upload under a name. Whoever makes it has claimed it; everything that is done about it then counts only
while the claim is the last one and the run was neither deleted nor replaced. All of it blocks, so it is called in
threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import Conflict, ServiceError


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What is to be calibrated, or why it could not be."""

    model: str
    name: str
    seed: int
    """Seed of the noise."""
    num_images: int
    created: int
    """Seconds since 1970 (UTC)."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Of this upload; another one of the same name has another."""
    source: str = ""
    """Where the images came from, for people."""
    notices: tuple[tuple[str, str], ...] = ()
    """Code and message of what is to be known about the upload."""
    error: tuple[str, str] | None = None
    """Code and message of why it failed."""

    def failed(self, error: ServiceError) -> Pending:
        """The same with the error that ended it."""
        return replace(self, error=(error.code, error.message))


@dataclass(frozen=True)
class Run:
    """A calibration that waits, is being made, or has failed."""

    pending: Pending
    done: int = 0
    """Images whose statistics are known."""

    @property
    def progress(self) -> float:
        """Share of the images that are done."""
        return self.done / max(1, self.pending.num_images)


@dataclass(frozen=True)
class Claim:
    """A run that one process makes."""

    pending: Pending
    crashes: int
    """How often it was begun before and never ended: a process died of it."""
    token: str = field(repr=False, default="")
    """Tells this claim from others of the same run."""


class PendingStore(Protocol):
    """Every method may raise ``OSError`` where a disk fails, ``Unavailable`` where Redis does."""

    def open(self) -> None:
        """When a process starts: clear away what is half done, and let go on what was interrupted."""

    def check(self, model: str, name: str, *, replace: bool, most: int) -> None:
        """Raise :func:`taken` or :func:`too_many` where an upload would be refused."""

    def write(self, pending: Pending, pixels: NDArray[np.uint8]) -> None:
        """Keep a job and its images (N, C, H, W) beside what has this name; they count when they are placed."""

    def place(self, pending: Pending, *, replace: bool, most: int) -> None:
        """Put what was written in place of whatever has this name.

        Raises as :meth:`check` does. Where it fails, what was there stays, and what was written goes.
        """

    def find(self, model: str, name: str) -> Run | None:
        """The run of this name."""

    def runs(self, model: str) -> Sequence[Run]:
        """All runs of a model, by name."""

    def claim(self, models: Collection[str]) -> Claim | None:
        """The oldest run of these models that nobody makes and that has not failed; it is this process's now.

        One that is claimed and never ended counts as a crash.
        """

    def renew(self, claim: Claim, done: int) -> bool:
        """Note how many images are done and keep the claim; false when it counts no more: give up."""

    def images(self, claim: Claim) -> NDArray[np.uint8]:
        """The images (N, C, H, W); ``ValueError`` or ``OSError`` where they are damaged or gone."""

    def finish(self, claim: Claim, data: bytes) -> bool:
        """Keep the calibration under its name and forget the run; false when the claim counts no more."""

    def fail(self, claim: Claim, error: ServiceError) -> None:
        """Keep why it failed, and the images no longer."""

    def interrupt(self, claim: Claim, error: ServiceError) -> None:
        """Keep the images, and until the next :meth:`open` the error, which is not theirs."""

    def release(self, claim: Claim) -> None:
        """Leave it to others; it was no crash."""

    def remove(self, model: str, name: str) -> bool:
        """Forget the run of this name, whoever makes it; whether there was one."""


def taken(model: str, name: str, *, running: bool) -> Conflict:
    """The error for a name that is in use."""
    return Conflict(
        f"name: model {model!r} has a calibration {name!r}{' in the making' if running else ''}; delete it, choose "
        "another name, or send replace=true",
        param="name",
        code="calibration_exists",
    )


def too_many(model: str, count: int, most: int) -> Conflict:
    """The error for a model that has as many as it may."""
    return Conflict(
        f"name: model {model!r} has {count} calibrations, allowed are {most} (max_calibrations); delete one, or "
        "replace one by its name with replace=true",
        param="name",
        code="too_many_calibrations",
    )


def check_images(pixels: NDArray[np.uint8], pending: Pending) -> None:
    """Raise ``ValueError`` for what are not a run's images."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != pending.num_images:
        raise ValueError(f"images: got {pixels.dtype} {pixels.shape}, expected {pending.num_images} images")


def pending_of(content: dict[str, Any]) -> Pending:
    """Inverse of ``asdict`` after JSON; raises ``ValueError``, ``TypeError`` or ``KeyError`` for what is not.

    What another version of the service has added is left out.
    """
    content["notices"] = tuple((str(code), str(message)) for code, message in content["notices"])
    if content["error"] is not None:
        code, message = content["error"]
        content["error"] = str(code), str(message)
    for number in ("seed", "num_images", "created"):
        content[number] = int(content[number])
    known = {known.name for known in fields(Pending)}
    return Pending(**{name: value for name, value in content.items() if name in known})
