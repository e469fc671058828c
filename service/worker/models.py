"""The models of a worker: loaded at the start and while it works, within a budget of memory.

A model that an operator wants is read from disk in a thread; warming it up and measuring it are slices of the
inference loop, which has the device to itself then, so that nothing disturbs what is measured and no other work waits
for long. Only when it is warm does it take the place of one of the same name. Cohorts hold the model they began with,
so an old one serves to the end of what it has begun, and is then forgotten.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.bundle import MANIFEST, Bundle, BundleError, BundleMissingFile, find_bundles, read_bundle
from service.broker.base import Command
from service.jobs import ModelInfo
from service.worker.faults import check_device, make_room
from service.worker.loading import LoadedModel, describe, weight_bytes

log = logging.getLogger(__name__)

LOAD_FAULTS = (BundleError, OSError, ValueError, RuntimeError, MemoryError)
"""What a bundle, the device or the host may have against a model."""
READY, LOADING, UNLOADING = "ready", "loading", "unloading"
MEBIBYTE = 2**20


class BudgetError(ValueError):
    """A model's weights are more than the memory that models may have."""


class _Load(threading.Thread):
    """A model on its way; the thread reads it, all else is the inference loop's."""

    def __init__(self, model_name: str, read: Callable[[str], LoadedModel]) -> None:
        super().__init__(name=f"load {model_name}", daemon=True)
        self.model_name, self._read = model_name, read
        self.began = time.monotonic()
        self.model: LoadedModel | None = None
        self.error: BaseException | None = None
        self.steps: Generator[None, None, None] | None = None

    def run(self) -> None:
        """Read it, or keep why that cannot be."""
        try:
            self.model = self._read(self.model_name)
        except LOAD_FAULTS as error:
            self.error = error


@dataclass(frozen=True)
class _Leaving:
    name: str
    model: LoadedModel = field(repr=False)


class Models(Mapping[str, LoadedModel]):
    """Those that serve, by name; and those that come and go."""

    def __init__(
        self,
        device: torch.device,
        serving: Mapping[str, LoadedModel] | None = None,
        *,
        directory: Path | None = None,
        batch_rows: int = 1,
        memory_bytes: int = 0,
    ) -> None:
        """``directory`` is where bundles are looked for, ``memory_bytes`` the most for weights, 0 for no limit."""
        self.device = device
        self._directory, self._batch_rows, self._memory_bytes = directory, batch_rows, memory_bytes
        self._serving = dict(sorted((serving or {}).items()))
        self._leaving: list[_Leaving] = []
        self._commands: deque[Command] = deque()
        self._load: _Load | None = None
        self.states: dict[str, str] = dict.fromkeys(self._serving, READY)
        """Where every model stands, and why one cannot be used."""
        self.loads: Counter[str] = Counter()
        """Orders to load a model that came to an end."""
        self.seconds: dict[str, float] = {}
        """From the order to load a model until it served."""

    def __getitem__(self, name: str) -> LoadedModel:
        return self._serving[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._serving)

    def __len__(self) -> int:
        return len(self._serving)

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        """What the service is to know of those that serve."""
        return tuple(model.info for model in self.values())

    @property
    def changing(self) -> bool:
        """Whether there is something to do for :meth:`step`."""
        return bool(self._load or self._commands or self._leaving)

    @property
    def reading(self) -> bool:
        """Whether a model is being read, so that the inference loop has nothing to do for it yet."""
        return self._load is not None and self._load.is_alive()

    # At the start.

    def load_all(self) -> None:
        """Load every bundle of the directory in the order of names, refusing those that do not fit the budget.

        Raises a ``BundleError``, ``OSError`` or ``RuntimeError`` when one is unusable, ``BudgetError`` when none fits.
        """
        refused: BudgetError | None = None
        for bundle in find_bundles(self._bundles()):
            began = time.monotonic()
            try:
                self._check_budget(bundle)
            except BudgetError as error:
                log.error("%s", error)
                self.states[bundle.name] = f"failed: {error}"
                refused = error
                continue
            model = LoadedModel.load(bundle, self.device)
            for _ in model.prepare(self._batch_rows):
                pass
            self._serve(model, began)
        if refused is not None and not self._serving:
            raise refused

    def _bundles(self) -> Path:
        if self._directory is None:
            raise BundleMissingFile("this worker has no directory of bundles")
        return self._directory

    def _check_budget(self, bundle: Bundle) -> None:
        """Models that leave still have their memory, and so has the old version of one that is loaded again."""
        if not self._memory_bytes:
            return
        there = [*self._serving.values(), *(leaving.model for leaving in self._leaving)]
        taken = sum(weight_bytes(model.flow.config, model.info.codec) for model in there)
        wanted = weight_bytes(bundle.config.flow, bundle.config.codec)
        if taken + wanted > self._memory_bytes:
            raise BudgetError(
                f"model {bundle.name!r} does not fit: it takes {wanted / MEBIBYTE:.1f} MiB, and of the "
                f"{self._memory_bytes / MEBIBYTE:.1f} MiB for models {taken / MEBIBYTE:.1f} are taken"
            )

    def _serve(self, model: LoadedModel, began: float) -> None:
        name = model.info.name
        old = self._serving.get(name)
        if old is not None:
            self._leaving.append(_Leaving(name, old))
        self._serving[name] = model
        self._serving = dict(sorted(self._serving.items()))
        self.states[name], self.seconds[name] = READY, time.monotonic() - began
        log.info(
            "model %s is warm on %s after %.1f s; %s; %s",
            name,
            self.device,
            self.seconds[name],
            "tuned" if model.sampler.profile else "not tuned, so that solver auto is sequential",
            describe(model.sampler.costs),
        )

    # While the worker works.

    def order(self, command: Command) -> None:
        """Remember what an operator wants; :meth:`step` does it, one after another."""
        if command not in self._commands:
            self._commands.append(command)

    def step(self, uses: Callable[[LoadedModel], bool]) -> bool:
        """A bounded piece of what is to be done; ``True`` when :attr:`infos` or :attr:`states` have changed.

        ``uses`` says whether work for a model is in flight.
        """
        forgotten = self._forget(uses)
        if self._load is not None:
            return self._go_on(self._load) or forgotten
        if not self._commands:
            return forgotten
        command = self._commands.popleft()
        if command.action == "load":
            self._begin(command.model)
        elif command.action == "unload" and command.model in self._serving:
            self._leaving.append(_Leaving(command.model, self._serving.pop(command.model)))
            self.states[command.model] = UNLOADING
        else:
            log.warning("cannot %s model %r: it is not here", command.action, command.model)
        return True

    def _forget(self, uses: Callable[[LoadedModel], bool]) -> bool:
        """Free the models that nobody uses any more."""
        gone = [leaving for leaving in self._leaving if not uses(leaving.model)]
        if not gone:
            return False
        self._leaving = [leaving for leaving in self._leaving if leaving not in gone]
        for name in {leaving.name for leaving in gone}:
            log.info("an old version of model %s is gone" if name in self._serving else "model %s is gone", name)
            if name not in self._serving and self.states.get(name) == UNLOADING:
                del self.states[name]
        del gone
        make_room(self.device)
        return True

    def _begin(self, name: str) -> None:
        self.states[name] = LOADING
        self._load = _Load(name, self._read)
        self._load.start()

    def _read(self, name: str) -> LoadedModel:
        bundle = find_bundle(self._bundles(), name)
        self._check_budget(bundle)
        return LoadedModel.load(bundle, self.device)

    def _go_on(self, load: _Load) -> bool:
        if load.is_alive():
            return False
        try:
            if load.error is not None:
                raise load.error
            if load.model is None:
                raise RuntimeError("the thread that reads it has died")
            if load.steps is None:
                load.steps = load.model.prepare(self._batch_rows)
            next(load.steps)
        except StopIteration:
            self._load = None
            self.loads[load.model_name] += 1
            if load.model is not None:
                self._serve(load.model, load.began)
            return True
        except LOAD_FAULTS as error:
            log.error("model %s cannot be loaded: %s", load.model_name, error)
            there = "; the one before it still serves" if load.model_name in self._serving else ""
            self.states[load.model_name] = f"failed: {error}{there}"
            self.loads[load.model_name] += 1
            self._load = None
        else:
            return False
        check_device(self.device)
        return True


def find_bundle(directory: Path, name: str) -> Bundle:
    """The bundle with a name; others may be damaged. Raises a ``BundleError``."""
    found, damaged = [], []
    paths = [directory] if (directory / MANIFEST).is_file() else sorted(directory.glob(f"[!.]*/{MANIFEST}"))
    for path in (path.parent if path.name == MANIFEST else path for path in paths):
        try:
            bundle = read_bundle(path)
        except BundleError as error:
            damaged.append(str(error))
            continue
        if bundle.name == name:
            found.append(bundle)
    if len(found) > 1:
        raise BundleError(f"{found[0].path} and {found[1].path}: both are named {name!r}")
    if not found:
        others = f"; unusable: {'; '.join(damaged)}" if damaged else ""
        raise BundleMissingFile(f"{directory}: no bundle named {name!r} in it{others}")
    return found[0]


def load_models(directory: Path, device: torch.device, batch_rows: int, memory_bytes: int = 0) -> Models:
    """Every bundle in a directory, loaded, measured and warm; see :meth:`Models.load_all`."""
    models = Models(device, directory=directory, batch_rows=batch_rows, memory_bytes=memory_bytes)
    models.load_all()
    return models
