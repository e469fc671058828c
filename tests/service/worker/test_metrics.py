"""What a worker counts of sampled images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.worker.metrics import WorkerMetrics, plan_kind


def counted(metrics: WorkerMetrics, name: str) -> dict[tuple[str, ...], float]:
    """Values of a sample by all labels but the worker's and the model's."""
    samples = [sample for family in metrics.snapshot() for sample in family["samples"] if sample[0] == name]
    assert all(labels["worker"] == "w" for _, labels, _ in samples)
    return {
        tuple(v for k, v in labels.items() if k not in ("worker", "model")): value
        for _, labels, value in samples
        if value
    }


def test_certificates_are_counted_by_outcome() -> None:
    metrics = WorkerMetrics("w")
    errors = np.array([1e-4, 1e-3, 2e-3, np.inf, np.nan], "<f4")
    arrays: dict[str, Any] = {
        "backward_error": errors,
        "redone": np.array([0, 1, 1, 2, 0], np.uint8),
        "passes": np.array([10, 100, 100, 100, 10]),
    }
    metrics.observe_sampling("m", ["jacobi/24", "sequential"], 1e-3, arrays)
    assert counted(metrics, "tarflow_certificates_total") == {("certified",): 2, ("missed",): 2}
    assert counted(metrics, "tarflow_redone_images_total") == {("tolerance",): 2, ("non_finite",): 1}
    assert counted(metrics, "tarflow_sampled_images_total") == {("mixed",): 5}
    assert counted(metrics, "tarflow_solver_passes_sum") == {(): 320}
    assert counted(metrics, "tarflow_backward_error_count") == {(): 3}
    [total] = counted(metrics, "tarflow_backward_error_sum").values()
    assert total == pytest.approx(3.1e-3)


def test_plans_are_of_three_kinds() -> None:
    assert plan_kind(["sequential"] * 3) == "sequential"
    assert plan_kind(["jacobi/48", "jacobi/12"]) == "jacobi"
    assert plan_kind(["jacobi/48", "sequential"]) == "mixed"
