"""``tarflow import``, ``sample`` and ``score``: the service's own code on one bundle, without a server."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from model.anomaly.calibration import Calibration, CalibrationError
from model.bundle import Bundle, BundleConfig, BundleError, open_bundle
from model.config import NoiseProtocol, SamplingDefaults, SolverOptions
from model.device import resolve_device
from model.images import ImageError, encode_image, fit_image, load_image
from model.official import read_checkpoint, to_flow
from model.weights import write_bundle
from service.api.context import resolve_class
from service.api.judging import calibration_used, fields, notices
from service.api.options import sampling_options
from service.api.rendering import contact_sheet
from service.api.running import new_job
from service.api.uploads import Inputs
from service.calibrations import OWN
from service.command_results import Drawn, picture_paths
from service.jobs import ModelInfo, Op, is_certified
from service.verdicts import Question, ask, judge, statistics_of
from service.worker.cohort import Cohort
from service.worker.loading import LoadedModel
from service.worker.parts import Part
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
        job = new_job(model.info, Op.SAMPLE, {"seeds": part, **payload}, len(part))
        cohort = Cohort(model, [Part.whole(job)])
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
    name_or_path: str,
    device: str,
    paths: Sequence[Path],
    *,
    label: str | None,
    draws: int,
    seed: int,
    alpha: float | None = None,
    calibration: Path | None = None,
    overlays: Path | None = None,
) -> dict[str, Any]:
    """Per file: log-likelihood, bits/dim and what was changed; with a calibration, from a file or the bundle, verdicts.

    The verdicts' fields are those of /v1/score. ``overlays`` is a directory for a picture of each file, which shows
    where it is unusual. Raises ``ValueError`` naming a bad file, ``InvalidRequest`` or ``CalibrationError``.
    """
    model = _load(name_or_path, device)
    index = resolve_class(model.info, label)
    question = _question(model.info, calibration, alpha, maps=overlays is not None)
    inputs = _fitted(paths, model.info)
    wanted = None if question is None else question.wanted
    payload = {"pixels": inputs.pixels, "label": index, "draws": draws, "seed": seed, "statistics": wanted}
    [arrays] = score_jobs(model, [new_job(model.info, Op.SCORE, payload, len(paths))], BATCH_ROWS)
    images: list[dict[str, Any]] = [
        {
            "file": str(path),
            "log_likelihood": float(arrays["log_likelihood"][i]),
            "bits_per_dim": float(arrays["bits_per_dim"][i]),
            "warnings": [change.message for change in inputs.changes[i]]
            + [notice.message for notice in notices(question)],
        }
        for i, path in enumerate(paths)
    ]
    result = {
        "model": model.info.name,
        "protocol": {**model.noise.to_dict(), "draws": draws, "seed": seed, "meaning": model.noise.meaning},
        "images": images,
    }
    if question is None:
        return result
    verdicts = judge(question, statistics_of(arrays), inputs.pixels)
    described = fields(question, verdicts, inputs, "none" if overlays is None else "overlay")
    pictures = [None] * len(paths) if overlays is None else picture_paths(overlays, paths)
    for image, verdict, path in zip(images, described, pictures, strict=True):
        drawn = verdict.pop("map")
        image |= to_jsonable_python(verdict)
        if path is not None:
            path.write_bytes(base64.b64decode(drawn.b64))
            image["overlay"] = str(path)
    return {**result, "calibration": to_jsonable_python(calibration_used(question))}


def _fitted(paths: Sequence[Path], model: ModelInfo) -> Inputs:
    fitted = []
    for path in paths:
        try:
            fitted.append(fit_image(load_image(path.read_bytes()), model.image_size, model.image_channels))
        except (ImageError, OSError) as error:
            raise ValueError(f"{path}: {error}") from error
    return Inputs(
        np.stack([image.pixels for image in fitted]),
        [image.changes for image in fitted],
        [path.name for path in paths],
        [image.original_size for image in fitted],
    )


def _question(model: ModelInfo, path: Path | None, alpha: float | None, *, maps: bool) -> Question | None:
    """What is asked of the calibration in a file or of the bundle's own; ``None`` where there is none."""
    if path is not None:
        try:
            found = Calibration.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise CalibrationError(f"{path}: {error.strerror}") from error
        found.check_model(model.name, model.model_id)
        return ask(found, found.record.name, alpha=alpha, maps=maps)
    if model.calibration is not None:
        return ask(Calibration.from_bytes(model.calibration), OWN, alpha=alpha, maps=maps)
    if alpha is not None or maps:
        raise ValueError(f"calibration: model {model.name!r} comes without one; give a file with --calibration")
    return None
