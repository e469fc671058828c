"""Calibrations that were accepted and are not finished, on disk: a restart goes on with them.

    STATE/calibrations/MODEL/.pending/NAME/images.npy   pixels (N, C, H, W) uint8, fitted to the model
    STATE/calibrations/MODEL/.pending/NAME/job.json     everything else; with an error once it has failed
    STATE/calibrations/MODEL/.pending/NAME/attempts     how often the service ended while it made this

A directory appears and disappears whole, by renaming. Everything here blocks, so it is called in threads.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.bundle import is_name
from service.errors import ServiceError

log = logging.getLogger(__name__)

FOLDER = ".pending"
"""No calibration can have this name."""
IMAGES, JOB, ATTEMPTS = "images.npy", "job.json", "attempts"


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
    source: str = ""
    """Where the images came from, for people."""
    notices: tuple[tuple[str, str], ...] = ()
    """Code and message of what is to be known about the upload."""
    error: tuple[str, str] | None = None
    """Code and message of why it failed."""

    def failed(self, error: ServiceError) -> Pending:
        """The same with the error that ended it."""
        return replace(self, error=(error.code, error.message))


class PendingStore:
    """The directories of unfinished calibrations."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is that of the service's state; it is made when something is first stored."""
        self._directory = directory / "calibrations"

    def save(self, pending: Pending, pixels: NDArray[np.uint8]) -> None:
        """Keep a job and its images (N, C, H, W) in place of whatever has this name."""
        self.place(pending, self.write(pending, pixels))

    def write(self, pending: Pending, pixels: NDArray[np.uint8]) -> Path:
        """Write a job and its images (N, C, H, W) beside what has this name; they count when they are placed."""
        arriving = self._aside(self._path(pending))
        try:
            arriving.mkdir(parents=True)
            np.save(arriving / IMAGES, pixels, allow_pickle=False)
            _write(arriving, pending)
        except OSError:
            shutil.rmtree(arriving, ignore_errors=True)
            raise
        return arriving

    def place(self, pending: Pending, arriving: Path) -> None:
        """Put what was written in place of whatever has this name, which stays if that fails."""
        target = self._path(pending)
        leaving = self._aside(target)
        try:
            if held := target.exists():
                target.rename(leaving)
            try:
                arriving.rename(target)
            except OSError:
                if held:
                    leaving.rename(target)
                raise
        except OSError:
            shutil.rmtree(arriving, ignore_errors=True)
            raise
        shutil.rmtree(leaving, ignore_errors=True)

    def begin(self, pending: Pending) -> int:
        """Note that work on it begins; returns how often it began before and never ended: a process died of it."""
        directory = self._path(pending)
        try:
            before = int((directory / ATTEMPTS).read_text())
        except (FileNotFoundError, ValueError):
            before = 0
        _count(directory, before + 1)
        return before

    def end(self, pending: Pending, before: int) -> None:
        """Note that work on it ended, in whatever way but with the process; ``before`` is what it began with."""
        try:
            _count(self._path(pending), before)
        except FileNotFoundError:
            # It was finished, and is forgotten.
            pass
        except OSError:
            log.exception("that work on calibration %s ended could not be noted", pending.name)

    def images(self, pending: Pending) -> NDArray[np.uint8]:
        """The images (N, C, H, W), read as they are used; ``ValueError`` or ``OSError`` for a damaged file."""
        pixels = np.load(self._path(pending) / IMAGES, mmap_mode="r", allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != pending.num_images:
            raise ValueError(f"{IMAGES}: got {pixels.dtype} {pixels.shape}, expected {pending.num_images} images")
        return np.asarray(pixels)

    def fail(self, pending: Pending, error: ServiceError) -> Pending:
        """Keep why it failed, and the images no longer."""
        failed = pending.failed(error)
        directory = self._path(pending)
        _write(directory, failed)
        (directory / IMAGES).unlink(missing_ok=True)
        return failed

    def remove(self, pending: Pending) -> None:
        """Forget it; nothing happens when it is not there."""
        leaving = self._aside(self._path(pending))
        try:
            self._path(pending).rename(leaving)
        except FileNotFoundError:
            return
        shutil.rmtree(leaving, ignore_errors=True)

    def scan(self) -> Iterator[Pending]:
        """Everything there is; what an earlier process left half done is cleared away."""
        for directory in sorted(self._directory.glob(f"*/{FOLDER}/*")):
            if not is_name(directory.name):
                shutil.rmtree(directory, ignore_errors=True)
                continue
            model, name = directory.parents[1].name, directory.name
            try:
                yield _read(directory, model, name)
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.error("%s: not a calibration's job: %s", directory, error)
                damaged = ("damaged", "its files in the state directory are damaged; send the images again")
                yield Pending(model=model, name=name, seed=0, num_images=0, created=0, error=damaged)

    def _path(self, pending: Pending) -> Path:
        return self._directory / pending.model / FOLDER / pending.name

    @staticmethod
    def _aside(path: Path) -> Path:
        """A path beside another, with a name that no calibration can have."""
        return path.with_name(f".{secrets.token_hex(8)}")


def _count(directory: Path, attempts: int) -> None:
    temporary = directory / f".{ATTEMPTS}"
    temporary.write_text(str(attempts))
    temporary.replace(directory / ATTEMPTS)


def _write(directory: Path, pending: Pending) -> None:
    temporary = directory / f".{JOB}"
    temporary.write_text(json.dumps(asdict(pending)))
    temporary.replace(directory / JOB)


def _read(directory: Path, model: str, name: str) -> Pending:
    content: dict[str, Any] = json.loads((directory / JOB).read_text())
    content["notices"] = tuple((str(code), str(message)) for code, message in content["notices"])
    if content["error"] is not None:
        code, message = content["error"]
        content["error"] = str(code), str(message)
    for number in ("seed", "num_images", "created"):
        content[number] = int(content[number])
    # Where it lies is what counts: a directory may have been copied by hand.
    return Pending(**{**content, "model": model, "name": name})
