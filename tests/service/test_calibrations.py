"""The store: other weights and damaged files are listed as they are, and break nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.anomaly.calibration import Calibration, calibrate
from model.bundle import read_bundle
from service.calibrations import CalibrationStore
from service.errors import InvalidRequest, NotFound
from service.jobs import ModelInfo

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


def test_what_is_saved_is_found_until_it_is_deleted(info: ModelInfo, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    assert list(store.entries(info)) == []
    store.save(info, make(info, "a", 0))
    first = store.get(info, "a")
    assert store.get(info, "a") is first
    store.save(info, make(info, "a", 1))
    assert (store.get(info, "a").sorted_scores["nll"] != first.sorted_scores["nll"]).any()
    assert store.holds(info, "a")
    store.delete(info, "a")
    assert not store.holds(info, "a")
    with pytest.raises(NotFound):
        store.delete(info, "a")
    with pytest.raises(InvalidRequest, match="there are none"):
        store.get(info, "a")


def test_other_weights_and_damage_are_listed_as_unusable(
    info: ModelInfo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CalibrationStore(tmp_path)
    store.save(info, make(info, "good"))
    other = replace(info, model_id="sha256:" + "0" * 64)
    store.save(info, make(other, "other"))
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
    assert "damaged.safetensors" in caplog.text
    assert [name for name, _ in store.list(info)] == ["good"]
    for name, code in (("damaged", "calibration_damaged"), ("other", "calibration_mismatch")):
        with pytest.raises(InvalidRequest) as caught:
            store.get(info, name)
        assert (caught.value.code, caught.value.param) == (code, "calibration")
        store.delete(info, name)
        assert not store.holds(info, name)
