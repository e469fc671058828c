"""Checkpoints: damaged ones are refused, and so is continuing one as another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.flow import Flow
from tests.full_disk import full_disk
from training import checkpoint
from training.checkpoint import FILE_NAME, CheckpointError, load_checkpoint, save_checkpoint
from training.config import TrainConfig
from training.data import Images
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def out(config: TrainConfig, images: Images, tmp_path: Path) -> Path:
    """A directory with a checkpoint."""
    Trainer(config, images, tmp_path / "run", CPU).save()
    return tmp_path / "run"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_what_was_saved_comes_back(out: Path, config: TrainConfig) -> None:
    state = load_checkpoint(out)
    assert state is not None
    assert (state.config, state.step) == (config, 0)
    assert [path.name for path in out.iterdir()] == [FILE_NAME]


@given(content=st.binary(max_size=200))
@example(content=b"\x80\x00")  # torch warns of the pickle protocol
def test_any_other_file_is_refused(content: bytes) -> None:
    with TemporaryDirectory() as directory:
        (Path(directory) / FILE_NAME).write_bytes(content)
        with pytest.raises(CheckpointError):
            load_checkpoint(Path(directory))


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "pickle of something else"])
def test_a_damaged_checkpoint_is_named(out: Path, damage: str) -> None:
    path = out / FILE_NAME
    if damage == "pickle of something else":
        torch.save([1, 2, 3], path)
    else:
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be continued"):
        load_checkpoint(out)


def test_a_checkpoint_without_a_fingerprint_continues(out: Path, config: TrainConfig, images: Images) -> None:
    content = torch.load(out / FILE_NAME, weights_only=True)
    del content["data_sha256"], content["config"]["data"]["classes_from_data"]
    torch.save(content, out / FILE_NAME)
    assert Trainer(config, images, out, CPU).step == 0


def test_another_configuration_is_named_with_both_values(out: Path, config: TrainConfig, images: Images) -> None:
    with pytest.raises(CheckpointError, match=r"optimization\.batch_size \(8 there, 4 here\)"):
        Trainer(config.with_overrides(batch_size=4), images, out, CPU)
    with pytest.raises(CheckpointError, match=r"flow\.width \(16 there, 32 here\)"):
        Trainer(replace(config, flow=replace(config.flow, width=32)), images, out, CPU)


def test_length_name_and_recommendation_may_change(out: Path, config: TrainConfig, images: Images) -> None:
    changed = config.with_overrides(epochs=9, name="other", guidance_scale=3.0)
    assert Trainer(changed, images, out, CPU).total_steps == 45


def test_other_images_are_refused(out: Path, config: TrainConfig, make_images: Callable[..., Images]) -> None:
    with pytest.raises(CheckpointError, match="other training images"):
        Trainer(config, make_images(seed=5), out, CPU)


def test_a_disk_without_room_is_named_before_the_first_step(
    config: TrainConfig, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ValueError, match=r"out: .*run has 0\.0 MiB free, allowed is at least 0\.\d MiB for checkpoints"
    ):
        Trainer(config, images, tmp_path / "run", CPU)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_fits_is_not_too_large_to_be_continued(
    out: Path, config: TrainConfig, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for ten times the weights, of which the checkpoint that is there has taken four.
    usage = shutil.disk_usage(out)
    weights = sum(value.numel() * value.element_size() for value in Flow(config.flow).state_dict().values())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=6 * weights))
    assert Trainer(config, images, out, CPU).step == 0
    with pytest.raises(ValueError, match="free, allowed is at least"):
        Trainer(config, images, out.with_name("another"), CPU)


@pytest.mark.parametrize("width", [16, 256])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_disk_that_is_full_later_leaves_the_last_checkpoint(
    config: TrainConfig, images: Images, tmp_path: Path, width: int, share: float
) -> None:
    # Weights larger than a file's buffer end PyTorch's archive with an error of its own.
    out, wide = tmp_path / "run", replace(config, flow=replace(config.flow, width=width))
    trainer = Trainer(wide, images, out, CPU)
    trainer.save()
    before = (out / FILE_NAME).read_bytes()
    with (
        full_disk(int(share * len(before))),
        pytest.raises(CheckpointError, match=r"step 0 cannot be written: .*File too large; the last one is kept"),
    ):
        trainer.save()
    assert [path.name for path in out.iterdir()] == [FILE_NAME]
    assert (out / FILE_NAME).read_bytes() == before


class Unwritable:
    """What fails for a reason of its own while it is pickled."""

    def __reduce__(self) -> str:
        raise RuntimeError("the device is gone")


def test_an_error_that_is_not_the_disk_s_is_not_called_one(out: Path) -> None:
    state = load_checkpoint(out)
    assert state is not None
    state.model["broken"] = Unwritable()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="the device is gone"):
        save_checkpoint(out, state)
    assert [path.name for path in out.iterdir()] == [FILE_NAME]
