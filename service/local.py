"""``tarflow import``, ``sample`` and ``score``: the service's own code on one bundle, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.bundle import Bundle, BundleConfig, BundleError, open_bundle
from model.config import NoiseProtocol, SamplingDefaults, SolverOptions
from model.device import resolve_device
from model.images import ImageError, encode_image, fit_image, load_image
from model.official import read_checkpoint, to_flow
from model.weights import write_bundle
from service.api.context import resolve_class
from service.api.options import sampling_options
from service.api.rendering import contact_sheet
from service.api.running import new_job
from service.jobs import Op, is_certified
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel
from service.worker.scoring import Arrays
from service.worker.scoring import score as score_jobs

BATCH_ROWS = 64


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    noise: NoiseProtocol,
    *,
    name: str,
    class_names: Sequence[str] | None,
    replace_existing: bool = False,
) -> Bundle:
    """Turn an official-layout state dict into a bundle at ``out``.

    Raises ``BundleError`` when ``out`` holds something already (a bundle is replaced if asked for),
    ``CheckpointFormatError`` for another file, ``ValueError`` for unfitting class names.
    """
    if out.exists() and not replace_existing and (out.is_file() or any(out.iterdir())):
        raise BundleError(f"{out}: exists already; choose a new directory, or --force to replace a bundle")
    flow = to_flow(read_checkpoint(checkpoint))
    names = class_names if class_names is not None else [str(i) for i in range(flow.config.num_classes)]
    provenance = {"imported_from": checkpoint.name, "layout": "apple/ml-tarflow"}
    config = BundleConfig(name=name, flow=flow.config, noise=noise, class_names=tuple(names), training=provenance)
    sampling = SamplingDefaults(denoise=noise.kind == "gaussian")
    card = (
        f"# {name}\n\nImported from the checkpoint `{checkpoint.name}` in the official layout.\n\n"
        f"- architecture: {flow.config.to_dict()}\n- noise protocol: {noise.to_dict()}\n"
    )
    return write_bundle(out, config, flow, sampling, card)


def _load(name_or_path: str, device: str) -> LoadedModel:
    return LoadedModel.load(open_bundle(name_or_path), resolve_device(device))


@dataclass(frozen=True)
class Drawn:
    """What :func:`sample` gives: a PNG file, the parameters used, and how exact the images are."""

    png: bytes
    options: SamplingDefaults
    plans: tuple[str, ...]
    """Each plan that a batch had, once."""
    backward_error: float | None
    """The largest of those that have a certificate; ``None`` when none has."""
    certified: bool | None
    """Whether all that have one are within the tolerance; ``None`` when none has."""


def sample(
    name_or_path: str,
    device: str,
    *,
    label: str | None,
    seeds: Sequence[int],
    overrides: dict[str, Any],
    solver: SolverOptions,
    trajectory: bool = False,
) -> Drawn:
    """Draw one image per seed, several as a grid; with a trajectory a row each, as the service lays it out.

    Raises ``InvalidRequest`` or ``ValueError`` naming what is wrong.
    """
    model = _load(name_or_path, device)
    index = resolve_class(model.info, label)
    options = sampling_options(model.info, overrides, index)
    if solver.solver == "auto" and model.info.convergence is not None:
        # The choice of a plan needs to know what passes cost here; without a profile there is no choice.
        model.measure(min(BATCH_ROWS, len(seeds)))
    payload = {
        "label": index,
        "options": options.to_dict(),
        "solver": solver.to_dict(),
        "trajectory": trajectory,
    }
    parts: list[Arrays] = []
    plans: list[str] = []
    for start in range(0, len(seeds), BATCH_ROWS):
        part = list(seeds[start : start + BATCH_ROWS])
        cohort = Cohort(model, [new_job(model.info, Op.SAMPLE, {"seeds": part, **payload}, len(part))])
        while not cohort.advance():
            pass
        parts.append(cohort.results()[0][1])
        plans.append(", ".join(cohort.plan.describe()) if cohort.plan else "")
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # nan only where no image has a certificate: batches of different plans may come together here.
    error = float(np.fmax.reduce(arrays["backward_error"]))
    certified = is_certified(error, solver.tolerance)
    return Drawn(
        png=encode_image(contact_sheet(arrays, denoised=options.denoise), "png"),
        options=options,
        plans=tuple(dict.fromkeys(plans)),
        backward_error=None if certified is None else error,
        certified=certified,
    )


def score(
    name_or_path: str, device: str, paths: Sequence[Path], *, label: str | None, draws: int, seed: int
) -> dict[str, Any]:
    """Per file: log-likelihood, bits/dim and what was changed; raises ``ValueError`` naming a bad file."""
    model = _load(name_or_path, device)
    config = model.flow.config
    index = resolve_class(model.info, label)
    fitted = []
    for path in paths:
        try:
            fitted.append(fit_image(load_image(path.read_bytes()), config.image_size, config.channels))
        except (ImageError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
    payload = {"pixels": np.stack([f.pixels for f in fitted]), "label": index, "draws": draws, "seed": seed}
    job = new_job(model.info, Op.SCORE, payload, len(fitted))
    [arrays] = score_jobs(model, [job], BATCH_ROWS)
    return {
        "model": model.info.name,
        "protocol": {**model.noise.to_dict(), "draws": draws, "seed": seed, "meaning": model.noise.meaning},
        "images": [
            {
                "file": str(path),
                "log_likelihood": float(arrays["log_likelihood"][i]),
                "bits_per_dim": float(arrays["bits_per_dim"][i]),
                "warnings": [change.message for change in fitted[i].changes],
            }
            for i, path in enumerate(paths)
        ],
    }
