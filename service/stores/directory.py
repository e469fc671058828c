"""Calibrations as files, for one service at a time; :mod:`service.state` sees to that.

    STATE/calibrations/MODEL/NAME.safetensors
    STATE/calibrations/MODEL/.pending/NAME/images.npy   pixels (N, C, H, W) uint8, fitted to the model
    STATE/calibrations/MODEL/.pending/NAME/job.json     everything else; with an error once it has failed
    STATE/calibrations/MODEL/.pending/NAME/attempts     how often the service ended while it made this

Files and directories appear and disappear whole, by renaming. Of what is in the making the process knows all; the disk
is for the next one.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.bundle import is_name
from service.calibrations import CalibrationFiles
from service.errors import InternalError, ServiceError
from service.pending import Claim, Pending, PendingStore, Run, check_images, pending_of, taken, too_many
from service.state import State

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
FOLDER = ".pending"
"""No calibration can have this name."""
IMAGES, JOB, ATTEMPTS = "images.npy", "job.json", "attempts"


class CalibrationDirectory(CalibrationFiles):
    """Finished calibrations; files may come and go beside the service."""

    trust_seconds = 0.0

    def __init__(self, state: Path) -> None:
        """The directory is made when something is first stored."""
        self._directory = state / "calibrations"

    def versions(self, keys: Sequence[tuple[str, str]]) -> list[str | None]:
        return [self._version(self._path(*key)) for key in keys]

    @staticmethod
    def _version(path: Path) -> str | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        # A file that replaces another within the clock's resolution is another inode.
        return f"{status.st_mtime_ns}-{status.st_ino}"

    def read(self, model: str, name: str) -> tuple[str, bytes] | None:
        path = self._path(model, name)
        # If it is replaced between the two, the version is older than the content, and it is read once more.
        version = self._version(path)
        try:
            return None if version is None else (version, path.read_bytes())
        except FileNotFoundError:
            return None

    def write(self, model: str, name: str, data: bytes) -> None:
        path = self._path(model, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            # On a full disk what is half written must not stay.
            temporary.unlink(missing_ok=True)
            raise

    def delete(self, model: str, name: str) -> bool:
        try:
            self._path(model, name).unlink()
        except FileNotFoundError:
            return False
        return True

    def names(self, model: str) -> set[str]:
        return {path.name.removesuffix(SUFFIX) for path in (self._directory / model).glob(f"[!.]*{SUFFIX}")}

    def _path(self, model: str, name: str) -> Path:
        return self._directory / model / f"{name}{SUFFIX}"


@dataclass
class _Entry:
    """A run as the process knows it."""

    pending: Pending
    done: int = 0
    claimed: str | None = None
    """The claim that counts."""
    crashes: int = 0
    """Before the claim."""
    interrupted: ServiceError | None = None

    @property
    def run(self) -> Run:
        pending = self.pending if self.interrupted is None else self.pending.failed(self.interrupted)
        return Run(pending, self.done)


class PendingDirectory(PendingStore):
    """The directories of unfinished calibrations."""

    def __init__(self, state: Path, calibrations: CalibrationDirectory) -> None:
        """The directory is made when something is first stored."""
        self._directory, self._calibrations = state / "calibrations", calibrations
        self._lock = threading.RLock()
        self._known: dict[tuple[str, str], _Entry] | None = None

    def open(self) -> None:
        with self._lock:
            self._known = self._scanned()

    def _scanned(self) -> dict[tuple[str, str], _Entry]:
        """What the disk has, by when it was accepted."""
        entries = sorted(self._scan(), key=lambda entry: (entry.pending.created, entry.pending.name))
        return {(entry.pending.model, entry.pending.name): entry for entry in entries}

    @property
    def _entries(self) -> dict[tuple[str, str], _Entry]:
        if self._known is None:
            self._known = self._scanned()
        return self._known

    def _scan(self) -> Iterator[_Entry]:
        for directory in sorted(self._directory.glob(f"*/{FOLDER}/*")):
            if not is_name(directory.name):
                shutil.rmtree(directory, ignore_errors=True)
                continue
            model, name = directory.parents[1].name, directory.name
            try:
                yield _Entry(_read(directory, model, name), crashes=_attempts(directory))
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.error("%s: not a calibration's job: %s", directory, error)
                damaged = ("damaged", "its files in the state directory are damaged; send the images again")
                yield _Entry(Pending(model=model, name=name, seed=0, num_images=0, created=0, error=damaged))

    # Accepting.

    def check(self, model: str, name: str, *, replace: bool, most: int) -> None:
        with self._lock:
            entry = self._entries.get((model, name))
            running = entry is not None and entry.run.pending.error is None
            finished = self._calibrations.names(model)
            if not replace and (running or name in finished):
                raise taken(model, name, running=running)
            names = finished | {name for of, name in self._entries if of == model}
            if name not in names and len(names) >= most:
                raise too_many(model, len(names), most)

    def write(self, pending: Pending, pixels: NDArray[np.uint8]) -> None:
        arriving = self._arriving(pending)
        with self._lock:
            # The first look at the disk clears away what is half done, and must not come later.
            _ = self._entries
        try:
            arriving.mkdir(parents=True)
            np.save(arriving / IMAGES, pixels, allow_pickle=False)
            _write(arriving, pending)
        except OSError:
            shutil.rmtree(arriving, ignore_errors=True)
            raise

    def place(self, pending: Pending, *, replace: bool, most: int) -> None:
        arriving = self._arriving(pending)
        try:
            with self._lock:
                self.check(pending.model, pending.name, replace=replace, most=most)
                leaving = self._swap(self._path(pending), arriving)
                self._entries.pop((pending.model, pending.name), None)
                self._entries[pending.model, pending.name] = _Entry(pending)
        except BaseException:
            shutil.rmtree(arriving, ignore_errors=True)
            raise
        shutil.rmtree(leaving, ignore_errors=True)

    @staticmethod
    def _swap(target: Path, arriving: Path) -> Path:
        """Rename a directory to a place that may be taken; returns where what had the place is now."""
        leaving = _aside(target)
        if held := target.exists():
            target.rename(leaving)
        try:
            arriving.rename(target)
        except OSError:
            if held:
                leaving.rename(target)
            raise
        return leaving

    # Asking.

    def find(self, model: str, name: str) -> Run | None:
        with self._lock:
            entry = self._entries.get((model, name))
            return None if entry is None else entry.run

    def runs(self, model: str) -> list[Run]:
        with self._lock:
            return [entry.run for (of, _), entry in sorted(self._entries.items()) if of == model]

    # Making.

    def claim(self, models: Collection[str]) -> Claim | None:
        with self._lock:
            for (model, _), entry in self._entries.items():
                if model not in models or entry.claimed is not None or entry.run.pending.error is not None:
                    continue
                try:
                    _count(self._path(entry.pending), entry.crashes + 1)
                except OSError as error:
                    log.exception("that work on calibration %s begins could not be noted", entry.pending.name)
                    entry.interrupted = InternalError(
                        f"the state directory cannot be written ({error.strerror}); its images are kept, and the "
                        "service goes on with them when it starts again",
                        code="state_unwritable",
                    )
                    continue
                entry.claimed, entry.done = secrets.token_hex(8), 0
                return Claim(entry.pending, entry.crashes, entry.claimed)
        return None

    def renew(self, claim: Claim, done: int) -> bool:
        with self._lock:
            entry = self._claimed(claim)
            if entry is not None:
                entry.done = done
            return entry is not None

    def images(self, claim: Claim) -> NDArray[np.uint8]:
        """The images, read as they are used."""
        pixels = np.load(self._path(claim.pending) / IMAGES, mmap_mode="r", allow_pickle=False)
        check_images(pixels, claim.pending)
        return np.asarray(pixels)

    def finish(self, claim: Claim, data: bytes) -> bool:
        pending = claim.pending
        with self._lock:
            if self._claimed(claim) is None:
                return False
            self._calibrations.write(pending.model, pending.name, data)
            return self.remove(pending.model, pending.name)

    def fail(self, claim: Claim, error: ServiceError) -> None:
        with self._lock:
            entry = self._claimed(claim)
            if entry is None:
                return
            entry.pending, entry.claimed = claim.pending.failed(error), None
            directory = self._path(claim.pending)
            try:
                _write(directory, entry.pending)
                (directory / IMAGES).unlink(missing_ok=True)
            except OSError:
                log.exception("why calibration %s failed could not be kept", claim.pending.name)

    def interrupt(self, claim: Claim, error: ServiceError) -> None:
        with self._lock:
            entry = self._claimed(claim)
            if entry is not None:
                entry.interrupted = error
                self.release(claim)

    def release(self, claim: Claim) -> None:
        with self._lock:
            entry = self._claimed(claim)
            if entry is None:
                return
            entry.claimed = None
            try:
                _count(self._path(claim.pending), claim.crashes)
            except OSError:
                log.exception("that work on calibration %s ended could not be noted", claim.pending.name)

    def remove(self, model: str, name: str) -> bool:
        with self._lock:
            entry = self._entries.get((model, name))
            if entry is None:
                return False
            path = self._path(entry.pending)
            leaving = _aside(path)
            # Somebody may have deleted the directory by hand.
            with suppress(FileNotFoundError):
                path.rename(leaving)
            del self._entries[model, name]
        shutil.rmtree(leaving, ignore_errors=True)
        return True

    def _claimed(self, claim: Claim) -> _Entry | None:
        """The entry of a claim that counts."""
        entry = self._entries.get((claim.pending.model, claim.pending.name))
        return entry if entry is not None and entry.claimed == claim.token else None

    def _path(self, pending: Pending) -> Path:
        return self._directory / pending.model / FOLDER / pending.name

    def _arriving(self, pending: Pending) -> Path:
        return self._path(pending).with_name(f".{pending.id}")


def state_in(directory: Path) -> State:
    """The state of one service; the directory is made when something is first stored."""
    calibrations = CalibrationDirectory(directory)
    return State(calibrations, PendingDirectory(directory, calibrations), directory)


def _aside(path: Path) -> Path:
    """A path beside another, with a name that no calibration can have."""
    return path.with_name(f".{secrets.token_hex(8)}")


def _attempts(directory: Path) -> int:
    try:
        return int((directory / ATTEMPTS).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _count(directory: Path, attempts: int) -> None:
    temporary = directory / f".{ATTEMPTS}"
    temporary.write_text(str(attempts))
    temporary.replace(directory / ATTEMPTS)


def _write(directory: Path, pending: Pending) -> None:
    temporary = directory / f".{JOB}"
    temporary.write_text(json.dumps(asdict(pending)))
    temporary.replace(directory / JOB)


def _read(directory: Path, model: str, name: str) -> Pending:
    # Where it lies is what counts: a directory may have been copied by hand.
    return replace(pending_of(json.loads((directory / JOB).read_text())), model=model, name=name)
