"""What verdicts need beside a likelihood: the statistics of score jobs that ask for them."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from model.anomaly.features import concatenate
from model.anomaly.statistics import image_statistics
from service.jobs import STATISTICS, Job
from service.worker.loading import MOST_SLICE_ROWS, LoadedModel


def statistics(model: LoadedModel, job: Job, batch_rows: int) -> dict[str, NDArray[Any]]:
    """The arrays of :func:`~model.anomaly.statistics.image_statistics` by prefixed name, if the job wants them.

    They are those of the images without a class, whatever class the likelihood is asked given: calibrations know none.
    """
    wanted = job.payload.get("statistics")
    if wanted is None:
        return {}
    gradient, seed = bool(wanted["gradient"]), int(wanted["seed"])
    # A backward pass keeps a block's activations, so that it has as few rows as a slice of denoising.
    most_rows = min(batch_rows, MOST_SLICE_ROWS[model.device.type]) if gradient else batch_rows
    batches = torch.from_numpy(job.payload["pixels"].copy()).split(model.pass_rows(most_rows))
    parts = [
        image_statistics(model.flow, model.noise, pixels, None, seed=seed, gradient=gradient) for pixels in batches
    ]
    return {f"{STATISTICS}{name}": values for name, values in concatenate(parts).items()}
