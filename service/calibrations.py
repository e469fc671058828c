"""Calibrations by model and name: a bundle's own, and those that users made, kept under the state directory.

    STATE/calibrations/MODEL/NAME.safetensors

Files are read once and kept; everything here blocks, so the API calls it in threads. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.anomaly.calibration import Calibration, CalibrationError, CalibrationMismatch
from model.bundle import NAMES, is_name
from service.errors import InvalidRequest, NotFound
from service.jobs import ModelInfo

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
OWN = "default"
"""Name by which a bundle's own calibration is listed; no other may have it."""


@dataclass(frozen=True)
class Stored:
    """A calibration file of the state directory, or a bundle's own."""

    name: str
    """Name to call it by."""
    calibration: Calibration | None
    """``None`` for a damaged file."""
    reason: str | None = None
    """Why it cannot be used with the model as it is served now; ``None`` when it can."""


class CalibrationStore:
    """The calibrations that requests may name."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is made when something is first stored."""
        self._directory = directory / "calibrations"
        self._lock = threading.Lock()
        self._known: dict[Path | str, tuple[tuple[int, int], Calibration]] = {}

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
        path = self._path(model.name, name)
        try:
            calibration = self._read(path)
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

    def save(self, model: ModelInfo, calibration: Calibration) -> None:
        """Keep a calibration under its own name; whole or not at all, whatever happens meanwhile."""
        path = self._path(model.name, calibration.record.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(calibration.to_bytes())
            temporary.replace(path)
        except OSError:
            # On a full disk what is half written must not stay.
            temporary.unlink(missing_ok=True)
            raise
        self._forget(path)

    def delete(self, model: ModelInfo, name: str) -> None:
        """Forget a calibration; raises ``NotFound`` for one that is not there and for the bundle's own."""
        if name == OWN:
            raise InvalidRequest(
                f"calibration: {OWN!r} belongs to the bundle and cannot be deleted", param="calibration"
            )
        path = self._path(model.name, name)
        self._forget(path)
        try:
            path.unlink()
        except FileNotFoundError:
            raise self.missing(model, name) from None

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
        for path in sorted(self._paths(model.name)):
            name = path.name.removesuffix(SUFFIX)
            try:
                calibration = self._read(path)
                if calibration is not None:
                    calibration.check_model(model.name, model.model_id)
                    yield Stored(name, calibration)
            except CalibrationMismatch as error:
                yield Stored(name, calibration, str(error))
            except (CalibrationError, OSError) as error:
                log.error("a calibration that cannot be read: %s", error)
                yield Stored(name, None, f"the file is damaged: {error}")

    def missing(self, model: ModelInfo, name: str) -> NotFound:
        """The error for a name that is not there."""
        return NotFound(
            f"calibration: got {name[:100]!r}, of model {model.name!r} there are {self._listed(model)}",
            param="calibration",
            code="calibration_not_found",
        )

    def names(self, model: ModelInfo) -> set[str]:
        """Of every file that is kept for a model of this name, usable or not; the bundle's own has none."""
        return {path.name.removesuffix(SUFFIX) for path in self._paths(model.name)}

    def is_current(self, model: ModelInfo, name: str, calibration: Calibration) -> bool:
        """Whether this very calibration is what the name stands for now: it was not deleted or replaced meanwhile."""
        try:
            return (self._own(model) if name == OWN else self._read(self._path(model.name, name))) is calibration
        except (CalibrationError, OSError):
            return False

    def holds(self, model: ModelInfo, name: str) -> bool:
        """Whether there is a file of this name, usable or not."""
        return self._path(model.name, name).exists()

    def _listed(self, model: ModelInfo) -> str:
        names = [name for name, _ in self.list(model)]
        return ", ".join(map(repr, names)) if names else "none"

    def _own(self, model: ModelInfo) -> Calibration | None:
        if model.calibration is None:
            return None
        # The bundle was checked when it was loaded; its calibration changes only with its bytes.
        key = f"{model.model_id} {hash(model.calibration)}"
        with self._lock:
            if key not in self._known:
                self._known[key] = (0, 0), Calibration.from_bytes(model.calibration, f"calibration of {model.name}")
            return self._known[key][1]

    def _paths(self, model: str) -> Iterator[Path]:
        return (self._directory / model).glob(f"[!.]*{SUFFIX}")

    def _path(self, model: str, name: str) -> Path:
        if not is_name(name):
            raise InvalidRequest(f"calibration: got {name[:100]!r}, allowed is {NAMES}", param="calibration")
        return self._directory / model / f"{name}{SUFFIX}"

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._known.pop(path, None)

    def _read(self, path: Path) -> Calibration | None:
        """A stored calibration, or ``None``; raises ``CalibrationError`` for a damaged file."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        # A file that replaces another within the clock's resolution is another inode.
        changed = status.st_mtime_ns, status.st_ino
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == changed:
            return known[1]
        calibration = Calibration.from_bytes(path.read_bytes(), str(path))
        with self._lock:
            self._known[path] = changed, calibration
        return calibration
