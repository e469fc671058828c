"""``tarflow sample`` and ``score`` with ``--url``: as :mod:`service.local`, but a service does the work.

Imports no torch, so that the commands begin at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from model.config import SamplingDefaults, SolverOptions
from model.images import encode_image
from service.api.rendering import contact_sheet
from service.client import Client, TarflowError
from service.client.answers import Image, ModelDescription, Scores
from service.client.calls import ScoreFields
from service.command_results import Drawn, picture_paths

BATCH = 64
"""Images of a request; what a service allows if it is not told otherwise."""
BATCH_BYTES = 8 * 2**20
"""Files of a request, so that neither they nor their pixels are too many for it."""
VERDICT = (
    *("is_anomaly", "p_value", "score", "threshold", "alpha", "expected_false_positive_rate", "direction"),
    *("features", "regions"),
)


@contextmanager
def connected(url: str, key: str | None) -> Iterator[Client]:
    """A client; what it raises comes as ``ValueError``, as all that commands are refused with."""
    with Client(url, api_key=key) as client:
        try:
            yield client
        except TarflowError as error:
            raise ValueError(str(error)) from error


def sample(
    client: Client,
    model: str | None,
    *,
    label: str | None,
    seeds: Sequence[int],
    overrides: dict[str, Any],
    solver: SolverOptions,
    trajectory: bool = False,
) -> Drawn:
    """See :func:`service.local.sample`; ``model`` is the service's first where there is none."""
    images: list[Image] = []
    plans: list[str] = []
    parameters: dict[str, Any] = {}
    for start in range(0, len(seeds), BATCH):
        part = seeds[start : start + BATCH]
        wanted: dict[str, Any] = {**overrides, **solver.to_dict(), "class_": label, "model": model}
        answer = client.sample(**wanted, trajectory=trajectory, seed=part[0], num_images=len(part))
        images += answer.images
        plans.append(", ".join(answer.plan or ()))
        parameters = answer.parameters
    options = SamplingDefaults.from_dict({f.name: parameters[f.name] for f in fields(SamplingDefaults)})
    arrays = {"pixels": np.stack([image.array() for image in images])}
    if trajectory:
        arrays["trajectory"] = np.stack([np.stack(image.states()) for image in images])
    judged = [image for image in images if image.certified is not None]
    # One that is not finite has no error that JSON could tell.
    errors = [math.inf if image.backward_error is None else image.backward_error for image in judged]
    return Drawn(
        png=encode_image(contact_sheet(arrays, denoised=options.denoise), "png"),
        options=options,
        plans=tuple(dict.fromkeys(plans)),
        backward_error=max(errors, default=None),
        certified=all(image.certified for image in judged) if judged else None,
    )


def score(
    client: Client,
    model: str | None,
    paths: Sequence[Path],
    *,
    label: str | None,
    draws: int,
    seed: int,
    alpha: float | None = None,
    calibration: str | None = None,
    overlays: Path | None = None,
) -> dict[str, Any]:
    """See :func:`service.local.score`; ``calibration`` is the name of one that the service has."""
    served = _model(client, model)
    asked: ScoreFields = {"model": served.id, "class_": label, "draws": draws, "seed": seed}
    if alpha is not None:
        asked["alpha"] = alpha
    if overlays is not None:
        asked["maps"] = "overlay"
    if calibration is not None or served.anomaly.calibrated:
        asked["calibration"] = calibration
    answers = [client.score(part, **asked) for part in _parts(paths)]
    pictures = [None] * len(paths) if overlays is None else picture_paths(overlays, paths)
    scored = [image for answer in answers for image in answer.images]
    images: list[dict[str, Any]] = []
    for path, image, picture in zip(paths, scored, pictures, strict=True):
        told = image.model_dump(mode="json")
        images.append(
            {
                "file": str(path),
                # One that is not finite is null in JSON.
                "log_likelihood": math.nan if image.log_likelihood is None else image.log_likelihood,
                "bits_per_dim": math.nan if image.bits_per_dim is None else image.bits_per_dim,
                "warnings": [warning.message for warning in image.warnings],
                **({name: told[name] for name in VERDICT} if image.is_anomaly is not None else {}),
            }
        )
        if picture is not None and image.map is not None:
            picture.write_bytes(image.map.data)
            images[-1]["overlay"] = str(picture)
    return {
        "model": served.id,
        "protocol": {**served.noise, "draws": draws, "seed": seed, "meaning": served.noise["meaning"]},
        "images": images,
        **_calibration(answers[0]),
    }


def _model(client: Client, name: str | None) -> ModelDescription:
    if name is None:
        name = next((model.id for model in client.models.list() if model.default), None)
    if name is None:
        raise ValueError("model: the service has none; start it with one, or name one that it has with --model")
    return client.models.get(name)


def _calibration(answer: Scores) -> dict[str, Any]:
    return {} if answer.calibration is None else {"calibration": answer.calibration.model_dump(mode="json")}


def _parts(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths, as many together as one request may have."""
    part: list[Path] = []
    size = 0
    for path in paths:
        length = path.stat().st_size
        if part and (len(part) == BATCH or size + length > BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(path)
        size += length
    yield part
