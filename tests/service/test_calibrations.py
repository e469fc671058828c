"""The store: other weights and damaged files are listed as they are, and break nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.anomaly.calibration import Calibration, calibrate
from model.bundle import read_bundle
from service.calibrations import OWN, CalibrationStore
from service.errors import InvalidRequest
from service.jobs import ModelInfo
from service.stores.directory import CalibrationDirectory

K, T, SIZE, COUNT = 2, 16, 8, 30


@pytest.fixture(scope="module")
def info(models: Path) -> ModelInfo:
    return replace(ModelInfo.of(read_bundle(models / "tiny-uncond")), calibration=None)


def statistics_shapes(pixels_CHW: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every statistic of an image of this shape."""
    return {
        "bits": (),
        "patch_nll": (T,),
        "log_scale": (K, T),
        "energy": (K, T),
        "latent": (8,),
        "hidden": (12,),
        "gradient": (),
        "residual": pixels_CHW,
    }


def make(info: ModelInfo, name: str, seed: int = 0) -> Calibration:
    """A calibration of random statistics."""
    random = np.random.default_rng(seed)
    shapes = statistics_shapes((1, SIZE, SIZE))
    statistics = {key: random.normal(size=(COUNT, *shape)).astype(np.float32) for key, shape in shapes.items()}
    record = {
        "name": name,
        "model": info.name,
        "model_id": info.model_id,
        "noise": info.noise.to_dict(),
        "seed": 0,
        "created": 1,
    }
    return calibrate(statistics, random.integers(0, 256, (COUNT, 1, SIZE, SIZE), dtype=np.uint8), record)


def test_other_weights_and_damage_are_listed_as_unusable(
    info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = CalibrationDirectory(tmp_path)
    store = CalibrationStore(files)
    files.write(info.name, "good", make(info, "good").to_bytes())
    other = replace(info, model_id="sha256:" + "0" * 64)
    files.write(info.name, "other", make(other, "other").to_bytes())
    folder = tmp_path / "calibrations" / info.name
    (folder / "damaged.safetensors").write_bytes(b"no calibration")
    (folder / "empty.safetensors").touch()
    (folder / "folder.safetensors").mkdir()
    (folder / ".a.safetensors.1.2").write_bytes(b"half written")
    with caplog.at_level(logging.ERROR):
        found = {stored.name: stored for stored in store.entries(info)}
    assert [name for name, stored in found.items() if stored.reason is None] == ["good"]
    assert found.keys() == {"good", "other", "damaged", "empty", "folder"}
    assert found["other"].calibration is not None
    assert "calibrate this model anew" in str(found["other"].reason)
    assert found["damaged"].calibration is None
    assert f"damaged of {info.name}" in caplog.text
    assert [name for name, _ in store.list(info)] == ["good"]
    for name, code in (("damaged", "calibration_damaged"), ("other", "calibration_mismatch")):
        with pytest.raises(InvalidRequest) as caught:
            store.get(info, name)
        assert (caught.value.code, caught.value.param) == (code, "calibration")
        assert store.delete(info, name)
        assert store.entry(info, name) is None


def test_the_bundles_own_is_not_deleted(info: ModelInfo, tmp_path: Path) -> None:
    store = CalibrationStore(CalibrationDirectory(tmp_path))
    with pytest.raises(InvalidRequest, match="cannot be deleted"):
        store.delete(replace(info, calibration=make(info, "own").to_bytes()), OWN)
