"""Calibrations by model and name: a bundle's own, and those that users made.

What is kept is bytes with a version (:class:`CalibrationFiles`); here they are calibrations, read once a version.
Everything here blocks, so the API calls it in threads. Imports no torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.anomaly.calibration import Calibration, CalibrationError, CalibrationMismatch
from model.bundle import NAMES, is_name
from service.errors import InvalidRequest, NotFound, Unavailable
from service.jobs import ModelInfo

log = logging.getLogger(__name__)
OWN = "default"
"""Name by which a bundle's own calibration is listed; no other may have it."""


class CalibrationFiles(Protocol):
    """Where finished calibrations are kept, without expiry; a key is a model's name and a calibration's.

    Every method may raise ``OSError`` where a disk fails, ``Unavailable`` where Redis does.
    """

    trust_seconds: float
    """How long a version that was seen may stand for the current one where nothing depends on it but a figure."""

    def versions(self, keys: Sequence[tuple[str, str]]) -> list[str | None]:
        """What changes whenever the content does, cheaply; ``None`` where there is nothing."""

    def read(self, model: str, name: str) -> tuple[str, bytes] | None:
        """Version and content."""

    def write(self, model: str, name: str, data: bytes) -> None:
        """Keep a content; whole or not at all, whatever happens meanwhile."""

    def delete(self, model: str, name: str) -> bool:
        """Forget it; whether there was one."""

    def names(self, model: str) -> set[str]:
        """Of everything that is kept for a model of this name."""


@dataclass(frozen=True)
class Stored:
    """A calibration that is kept, or a bundle's own."""

    name: str
    """Name to call it by."""
    calibration: Calibration | None
    """``None`` for a damaged file."""
    reason: str | None = None
    """Why it cannot be used with the model as it is served now; ``None`` when it can."""


@dataclass(frozen=True)
class _Known:
    """What was read."""

    version: str
    calibration: Calibration | CalibrationError
    checked: float
    """When this version was last seen to be the current one, by the monotonic clock."""


class CalibrationStore:
    """The calibrations that requests may name."""

    def __init__(self, files: CalibrationFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], _Known] = {}
        self._own_ones: dict[str, Calibration] = {}
        self._gone: set[tuple[str, str]] = set()
        """What was known and was found to be deleted, by whomever."""

    def get(self, model: ModelInfo, name: str | None) -> Calibration:
        """A calibration by name, or the bundle's own for ``None``; fits the model's very weights.

        Raises ``InvalidRequest`` naming what is allowed.
        """
        if name is None or name == OWN:
            own = self._own(model)
            if own is None:
                raise InvalidRequest(
                    f"calibration: model {model.name!r} comes without one; name one of yours"
                    f" ({self._listed(model)}) or make one from normal images with POST /v1/calibrations",
                    param="calibration",
                    code="no_calibration",
                )
            return own
        key = self._key(model, name)
        try:
            calibration = self._read(key)
        except (CalibrationError, OSError) as error:
            raise InvalidRequest(
                f"calibration: {name!r} is damaged and cannot be used ({error}); delete it and make it anew",
                param="calibration",
                code="calibration_damaged",
            ) from error
        if calibration is None:
            raise InvalidRequest(
                f"calibration: got {name[:100]!r}, of model {model.name!r} there are {self._listed(model)}",
                param="calibration",
                code="calibration_not_found",
            )
        try:
            calibration.check_model(model.name, model.model_id)
        except CalibrationError as error:
            raise InvalidRequest(f"calibration: {error}", param="calibration", code="calibration_mismatch") from error
        return calibration

    def delete(self, model: ModelInfo, name: str) -> bool:
        """Forget a calibration; whether there was one. Raises ``InvalidRequest`` for the bundle's own."""
        if name == OWN:
            raise InvalidRequest(
                f"calibration: {OWN!r} belongs to the bundle and cannot be deleted", param="calibration"
            )
        key = self._key(model, name)
        with self._lock:
            self._known.pop(key, None)
        return self._files.delete(*key)

    def list(self, model: ModelInfo) -> Iterator[tuple[str, Calibration]]:
        """Every calibration of a model's very weights with the name to call it by, the bundle's own first."""
        for stored in self.entries(model):
            if stored.calibration is not None and stored.reason is None:
                yield stored.name, stored.calibration

    def entries(self, model: ModelInfo) -> Iterator[Stored]:
        """Everything that is kept for a model of this name, usable or not, the bundle's own first."""
        own = self._own(model)
        if own is not None:
            yield Stored(OWN, own)
        names = sorted(self._files.names(model.name))
        versions = self._files.versions([(model.name, name) for name in names])
        for name, version in zip(names, versions, strict=True):
            stored = self._stored(model, name, version)
            if stored is not None:
                yield stored

    def entry(self, model: ModelInfo, name: str) -> Stored | None:
        """What is kept under a name, usable or not."""
        if name == OWN:
            own = self._own(model)
            return None if own is None else Stored(OWN, own)
        if not is_name(name):
            return None
        [version] = self._files.versions([(model.name, name)])
        return self._stored(model, name, version)

    def _stored(self, model: ModelInfo, name: str, version: str | None) -> Stored | None:
        calibration = None
        try:
            calibration = self._read_version((model.name, name), version)
            if calibration is None:
                return None
            calibration.check_model(model.name, model.model_id)
            return Stored(name, calibration)
        except CalibrationMismatch as error:
            return Stored(name, calibration, str(error))
        except (CalibrationError, OSError) as error:
            log.error("a calibration that cannot be read: %s", error)
            return Stored(name, None, f"the file is damaged: {error}")

    def missing(self, model: ModelInfo, name: str) -> NotFound:
        """The error for a name that is not there."""
        return NotFound(
            f"calibration: got {name[:100]!r}, of model {model.name!r} there are {self._listed(model)}",
            param="calibration",
            code="calibration_not_found",
        )

    def is_current(self, model: ModelInfo, name: str, calibration: Calibration) -> bool:
        """Whether this very calibration is what the name stands for now: it was not deleted or replaced meanwhile.

        What others did in the last :attr:`CalibrationFiles.trust_seconds` may be missed.
        """
        if name == OWN:
            return self._own(model) is calibration
        with self._lock:
            known = self._known.get((model.name, name))
        if known is not None and time.monotonic() - known.checked < self._files.trust_seconds:
            return known.calibration is calibration
        try:
            return self._read((model.name, name)) is calibration
        except (CalibrationError, OSError, Unavailable):
            return False

    def forgotten(self) -> Sequence[tuple[str, str]]:
        """Model and name of what this process has read and somebody else has deleted since the last call."""
        with self._lock:
            asked = [*self._known, *self._gone]
        if not asked:
            return []
        versions = self._files.versions(asked)
        gone = {key for key, version in zip(asked, versions, strict=True) if version is None}
        with self._lock:
            self._gone.clear()
            for key in gone:
                self._known.pop(key, None)
        return sorted(gone)

    def _listed(self, model: ModelInfo) -> str:
        names = [name for name, _ in self.list(model)]
        return ", ".join(map(repr, names)) if names else "none"

    def _own(self, model: ModelInfo) -> Calibration | None:
        if model.calibration is None:
            return None
        # The bundle was checked when it was loaded; its calibration changes only with its bytes.
        key = f"{model.model_id} {hash(model.calibration)}"
        with self._lock:
            if key not in self._own_ones:
                self._own_ones[key] = Calibration.from_bytes(model.calibration, f"calibration of {model.name}")
            return self._own_ones[key]

    @staticmethod
    def _key(model: ModelInfo, name: str) -> tuple[str, str]:
        if not is_name(name):
            raise InvalidRequest(f"calibration: got {name[:100]!r}, allowed is {NAMES}", param="calibration")
        return model.name, name

    def _read(self, key: tuple[str, str]) -> Calibration | None:
        """What is kept, or ``None``; raises ``CalibrationError`` for what is damaged."""
        [version] = self._files.versions([key])
        return self._read_version(key, version)

    def _read_version(self, key: tuple[str, str], version: str | None) -> Calibration | None:
        """The same when the current version is known."""
        now = time.monotonic()
        with self._lock:
            known = self._known.get(key)
        if version is None or known is None or known.version != version:
            found = None if version is None else self._files.read(*key)
            if found is None:
                with self._lock:
                    if self._known.pop(key, None) is not None:
                        self._gone.add(key)
                return None
            version, data = found
            try:
                known = _Known(version, Calibration.from_bytes(data, f"{key[1]} of {key[0]}"), now)
            except CalibrationError as error:
                known = _Known(version, error, now)
        else:
            known = _Known(known.version, known.calibration, now)
        with self._lock:
            self._known[key] = known
        if isinstance(known.calibration, CalibrationError):
            raise known.calibration.with_traceback(None)
        return known.calibration
