"""What verdicts need beside a likelihood: the statistics of score jobs that ask for them.

Where a likelihood is asked without a class and with the noise of the statistics, as it is by default, their pass gives
it.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.anomaly.features import concatenate
from model.anomaly.statistics import likelihood_and_statistics
from service.jobs import STATISTICS, Job
from service.worker.loading import MOST_SLICE_ROWS, LoadedModel


def gives_likelihood(job: Job) -> bool:
    """Whether the pass of a score job's statistics is the very one that its likelihood takes."""
    payload, wanted = job.payload, job.payload.get("statistics")
    is_plain = payload["label"] is None and int(payload["draws"]) == 1 and payload.get("add_noise", True)
    return wanted is not None and is_plain and int(wanted["seed"]) == int(payload["seed"])


def statistics(model: LoadedModel, job: Job, batch_rows: int) -> tuple[Tensor | None, dict[str, NDArray[Any]]]:
    """log p(x) (n,) in nats, float64, and the arrays of :func:`~model.anomaly.statistics.image_statistics` by prefixed
    name; ``None`` and nothing where the job wants none.

    They are those of the images without a class, whatever class the likelihood is asked given: calibrations know none.
    """
    wanted = job.payload.get("statistics")
    if wanted is None:
        return None, {}
    gradient, seed = bool(wanted["gradient"]), int(wanted["seed"])
    # A backward pass keeps a block's activations, so that it has as few rows as a slice of denoising.
    most_rows = min(batch_rows, MOST_SLICE_ROWS[model.device.type]) if gradient else batch_rows
    batches = torch.from_numpy(job.payload["pixels"].copy()).split(model.pass_rows(most_rows))
    parts = [
        likelihood_and_statistics(model.flow, model.noise, pixels, None, seed=seed, gradient=gradient)
        for pixels in batches
    ]
    arrays = concatenate([of_batch for _, of_batch in parts])
    nats = torch.cat([nats_B.double().cpu() for nats_B, _ in parts])
    return nats, {f"{STATISTICS}{name}": values for name, values in arrays.items()}
