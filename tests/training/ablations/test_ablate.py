"""The ablations at toy size: equal budgets, nothing done twice, honest outcomes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from model.codecs.base import Identity
from model.config import NoiseProtocol, SamplingDefaults
from model.flow import Flow
from training.ablations.measure import draw_samples, make_ruler
from training.ablations.plan import BASE, Scale, make_plan, parse_budget
from training.ablations.run import Ablation, AblationOptions, Stopped, run_ablation, snapshot_steps
from training.baselines.channel_coupling import ChannelCouplingFlow
from training.cli import app
from training.config import TrainConfig
from training.data import Images, load_images
from training.features import EXTRACTORS, Extractor
from training.trainer import Trainer

TOY = ["--width", "16", "--head-dim", "8", "--depth", "2", "--batch-size", "8", "--image-size", "8",
       "--num-samples", "40", "--scored-images", "20", "--reference-images", "60", "--components", "8"]  # fmt: skip
BUDGET = ["--budget", "16 steps"]


@pytest.fixture(autouse=True)
def _means_as_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real extractor has tests of its own; here the features of 8x8 images are means of 2x2 pixels."""

    def extract(pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float(), 2).flatten(1)

    means = Extractor(name="means", num_features=16, extract=extract)
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", lambda device: means)


@pytest.fixture
def data(tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]) -> Path:
    write_idx(tmp_path / "squares", make_images(64))
    return write_idx(tmp_path / "squares", make_images(60, seed=1), "t10k")


def ablate(data: Path, out: Path, *options: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["ablate", "--data", str(data), "--out", str(out), *TOY, *map(str, options)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def document(out: Path) -> dict[str, Any]:
    content = json.loads((out / "ablation.json").read_text())
    assert isinstance(content, dict)
    return content


def test_all_rows_have_equal_budgets_and_stand_beside_the_papers_order(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ablate(data, out, *BUDGET)
    found = document(out)
    trained = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/training.json")}
    assert {facts["steps"] for facts in trained.values()} == {16}
    assert {study["name"] for study in found["studies"]} == {
        "volume", "coupling", "depth", "denoising", "noise", "size", "starflow", "guidance"
    }  # fmt: skip
    # Every row of every study is measured, on a flow of its own or on a shared one.
    rows = found["rows"]
    assert {name for study in found["studies"] for name in study["rows"]} == rows.keys()
    assert {"depth-1x4", "depth-4x1", "uniform", "channel-coupling", "guidance-linear-2"} < rows.keys()
    assert all(row["samples"] == 40 for row in rows.values())
    same = {BASE, "depth-1x4", "depth-4x1", "volume-preserving", "uniform", "sigma-0.05"}
    layers = {name: rows[name]["parameters"] for name in same}
    assert layers["uniform"] == layers["sigma-0.05"] == layers[BASE] > layers["volume-preserving"]
    assert rows["width-double"]["parameters"] > rows[BASE]["parameters"] > rows["width-half"]["parameters"]
    # Rows that share a flow have the same likelihood, and other samples.
    assert rows["sigma-0.1-raw"]["bits_per_dim"] == rows[BASE]["bits_per_dim"]
    assert rows["sigma-0.1-raw"]["distance"]["value"] != rows[BASE]["distance"]["value"]
    outcomes = {claim["outcome"] for study in found["studies"] for claim in study["claims"]}
    assert outcomes <= {"agrees", "disagrees", "within noise"}
    loss = found["loss"]
    assert len(loss["points"]) >= 8
    # The last snapshot is the finished flow.
    assert loss["points"][-1]["bits_per_dim"] == pytest.approx(rows[BASE]["bits_per_dim"], abs=1e-6)
    bits = [point["bits_per_dim"] for point in loss["points"]]
    assert bits[0] > bits[-1]
    report = (out / "ablation.md").read_text()
    for study in found["studies"]:
        assert f"## {study['title']}" in report
        assert f"| {study['title']} | {study['paper']} | {study['outcome']} |" in report
    assert f"Spearman's ρ {loss['spearman']:.2f}" in report
    picture = ElementTree.fromstring((out / "loss.svg").read_text())  # noqa: S314 - our own
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == len(loss["points"])


def test_what_is_finished_is_not_done_again_and_other_scales_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ablate(data, out, *BUDGET, "--rows", "volume")
    assert "base: step 0 of 16" in first
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/rows/*.json")}
    again = ablate(data, out, *BUDGET, "--rows", "volume, coupling")
    assert "channel-coupling: step 0 of 16" in again
    assert "base: step" not in again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    report = (out / "ablation.md").read_text()
    assert "| uniform | uniform dequantization | | | not measured | | |" in report
    # More samples are measured on the same flow.
    more = ablate(data, out, *BUDGET, "--rows", BASE, "--num-samples", "50")
    assert "base: step" not in more
    assert document(out)["rows"][BASE]["samples"] == 50
    # Points with as many samples as the header says, or none.
    ablate(data, out, *BUDGET, "--rows", "loss")
    assert {point["samples"] for point in document(out)["loss"]["points"]} == {40}
    ablate(data, out, *BUDGET, "--rows", BASE, "--num-samples", "50", "--scored-images", "1000")
    assert document(out)["loss"]["points"] == []
    assert "Bits/dim are of 60 test images" in (out / "ablation.md").read_text()
    error = ablate(data, out, "--budget", "41 steps", status=2)
    assert "another images (128 there, 328 here)" in error.replace("\n", " ")


def test_a_signal_ends_it_after_a_step_and_it_continues_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It speaks after every step, which is how the signal is sent in the middle.
    monkeypatch.setattr("training.ablations.run.SECONDS_PER_LINE", -1.0)
    train, test = (load_images(data, split, 8, 1) for split in ("train", "test"))
    options = AblationOptions(
        scale=Scale(width=16, head_dim=8, depth=2, batch_size=8, images=320),
        rows=("volume-preserving",),
        num_samples=40,
        components=8,
    )

    def run(out: Path, stop_at: str = "") -> Ablation:
        def say(text: str) -> None:
            if stop_at and stop_at in text:
                os.kill(os.getpid(), signal.SIGTERM)

        return run_ablation("squares", train, test, out, options, torch.device("cpu"), say)

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "out", "step 17 of 40,")
    logged = (tmp_path / "out" / "volume-preserving" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [10]
    assert not (tmp_path / "out" / "volume-preserving" / "training.json").exists()
    rows = [found.rows["volume-preserving"].content for found in (whole, run(tmp_path / "out"))]
    for name in ("bits_per_dim", "distance", "samples_not_finite"):
        assert rows[0][name] == rows[1][name]


def test_a_stopped_command_says_so_by_its_status(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._train_step

    def signalled_step(trainer: Trainer) -> Any:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", signalled_step)
    assert "the same command continues" in ablate(data, tmp_path / "out", *BUDGET, "--rows", BASE, status=1)
    monkeypatch.undo()
    assert (tmp_path / "out" / BASE / "checkpoint.pt").is_file()


def test_a_damaged_document_is_named_with_what_to_do(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--budget", "2 steps", "--rows", "volume,loss")
    ablate(data, out, *command)
    row, snapshot = out / BASE / "rows" / f"{BASE}.json", next((out / BASE / "snapshots" / "rows").iterdir())
    for path, damage, advice in (
        (out / "scale.json", "{", "or choose another --out"),
        (out / "scale.json", "[]", "got list, allowed is an object"),
        (row, '{"key": {', "delete it, and the same command measures it again"),
        (row, "{}", "it has no 'key'"),
        (snapshot, "\0", "delete it, and the same command measures it again"),
    ):
        whole = path.read_text()
        path.write_text(damage)
        error = ablate(data, out, *command, status=2).replace("\n", "")
        assert f"{path}: damaged" in error
        assert advice in error
        path.write_text(whole)
    row.unlink()
    assert f"{BASE}: distance" in ablate(data, out, *command)


def test_rows_are_measured_again_on_other_test_images(
    data: Path, tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]
) -> None:
    out, command = tmp_path / "out", ("--budget", "2 steps", "--rows", "volume,loss")
    ablate(data, out, *command)
    before = document(out)
    write_idx(data, make_images(60, seed=2), "t10k")
    again = ablate(data, out, *command)
    # The flows are the same.
    assert ": step" not in again
    after = document(out)
    for name, row in before["rows"].items():
        assert after["rows"][name]["bits_per_dim"] != row["bits_per_dim"]
        assert after["rows"][name]["distance"] != row["distance"]
    assert len(after["loss"]["points"]) == len(before["loss"]["points"]) > 0
    assert after["loss"]["points"][0]["distance"] != before["loss"]["points"][0]["distance"]


def test_only_the_rows_that_are_asked_for_must_fit(data: Path, tmp_path: Path) -> None:
    wide = ("--budget", "1 steps", "--head-dim", "16")
    error = ablate(data, tmp_path / "all", *wide, status=2)
    assert "width: got 16, allowed is a multiple of 32, twice the head_dim, for the row width-half; --rows" in error
    assert not (tmp_path / "all").exists()
    ablate(data, tmp_path / "out", *wide, "--rows", "volume")
    assert (
        "| width-half | 2 blocks × 2 layers, width 8 | | | not measured" in (tmp_path / "out/ablation.md").read_text()
    )


def test_a_training_that_diverges_is_a_result(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ablate(data, out, "--budget", "200 steps", "--rows", BASE, "--learning-rate", "1e30")
    rows = document(out)["rows"]
    assert "diverged" in rows[BASE]
    assert "diverged at step" in (out / "ablation.md").read_text()


def test_images_without_classes_are_ablated_without(tmp_path: Path, make_images: Callable[..., Images]) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        for number, pixels in enumerate(make_images(60, seed=seed).pixels):
            Image.fromarray(pixels[0]).save(folder / f"{number}.png")
    out = tmp_path / "out"
    ablate(tmp_path / "photos", out, "--budget", "2 steps", "--rows", "noise")
    assert document(out)["rows"].keys() == {BASE, "uniform"}
    assert "guidance" not in {study["name"] for study in document(out)["studies"]}


def test_test_images_of_other_classes_are_refused(
    data: Path, tmp_path: Path, make_images: Callable[..., Images], write_idx: Callable[..., Path]
) -> None:
    images = make_images(60, seed=1)
    write_idx(data, replace(images, labels=images.labels + 1), "t10k")
    assert "squares has 2 classes (0, 1), but the data has a label 2" in ablate(data, tmp_path / "out", status=2)


def test_mistakes_are_refused(data: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--rows", "volumes"), "rows: got 'volumes', allowed is volume, coupling"),
        (("--budget", "an hour"), "budget: got 'an hour', allowed is a number of images or steps"),
        (("--budget", "7 images"), "allowed is at least one step, that is 8 images"),
        (("--width", "12"), "width: got 12"),
        (("--budget", "1__0 steps"), "budget: got '1__0 steps'"),
        (("--channels", "2"), "channels: got 2, allowed is 1 or 3"),
        (("--patch-size", "1"), "patch_size: got 1, allowed is a size with at least two values a patch"),
        # Before the first training, and not at its end.
        (("--num-samples", "39"), "num_samples: got 39, allowed is an integer >= 40"),
        (("--num-samples", "200", "--components", "60"), "components: got 60, allowed is 1 to 59 for 60 real images"),
    ):
        assert message in ablate(data, tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out" / BASE).exists()
    assert parse_budget("400 steps", 64) == 25_600
    assert parse_budget("1_000images", 8) == 1000


def test_every_row_differs_from_the_base_in_one_thing() -> None:
    plan = make_plan(Scale(), image_size=28, channels=1, class_names=[str(i) for i in range(10)], num_images=60_000)
    base = plan.trainings[BASE].config
    for training in plan.trainings.values():
        config = training.config
        assert config.optimization == base.optimization
        changed = [key for key, value in config.to_dict().items() if value != base.to_dict()[key] and key != "name"]
        different = {key for key in vars(config.flow) if getattr(config.flow, key) != getattr(base.flow, key)}
        if training.name.startswith("depth"):
            assert different == {"num_blocks", "layers_per_block"}
            assert sum(config.flow.layer_counts) == sum(base.flow.layer_counts)
        elif training.name == "deep-shallow":
            assert different == {"layers_per_block", "conditioned_blocks"}
            assert sum(config.flow.layer_counts) == sum(base.flow.layer_counts)
        elif training.name != BASE:
            assert len(changed) + (training.architecture == "channel") == 1
            assert len(different) <= 1
    stacks = {(t.config.flow.num_blocks, t.config.flow.layers_per_block) for t in plan.trainings.values()}
    assert (4, (1, 1, 1, 13)) in stacks
    stacks.discard((4, (1, 1, 1, 13)))
    assert stacks == {(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)}
    assert len(snapshot_steps(400, 10)) == 10
    assert snapshot_steps(400, 10)[-1] == 400


def test_images_are_measured_where_the_extractor_is(make_images: Callable[..., Images], tmp_path: Path) -> None:
    """On a GPU as well, for which a device without values stands here."""
    elsewhere, seen = torch.device("meta"), []

    def extract(pixels: Tensor) -> Tensor:
        seen.append(pixels.device)
        return torch.randn(len(pixels), 4, generator=torch.Generator().manual_seed(len(seen)))

    extractor = Extractor(name="random", num_features=4, extract=extract)
    ruler = make_ruler(extractor, make_images(60), 2, tmp_path / "cache", elsewhere)
    assert ruler.measure(make_images(50, seed=1).pixels) is not None
    assert set(seen) == {elsewhere}


def test_images_that_are_not_finite_are_left_out_too(config: TrainConfig) -> None:
    class Overflowing(Identity):
        """An autoencoder whose images overflow for some latents."""

        def images(self, values_BCHW: Tensor) -> Tensor:
            return torch.where((values_BCHW[:, :1, :1, :1] > 0), torch.inf, values_BCHW)

    noise, labels = NoiseProtocol(kind="gaussian", std=0.1), [0, 1] * 10
    flow = Flow(config.flow).eval()
    drawn = draw_samples(flow, noise, SamplingDefaults(), range(20), labels, Overflowing())
    assert 0 < drawn.not_finite == 20 - len(drawn.pixels) < 20


def test_samples_that_are_not_finite_are_counted_and_left_out(config: TrainConfig) -> None:
    noise, seeds = NoiseProtocol(kind="gaussian", std=0.1), range(20)
    torch.manual_seed(0)
    for flow in (Flow(config.flow), ChannelCouplingFlow(config.flow)):
        for denoise in (False, True):
            drawn = draw_samples(flow.eval(), noise, SamplingDefaults(denoise=denoise), seeds, [0, 1] * 10)
            assert (len(drawn.pixels), drawn.not_finite) == (20, 0)
    # Scales that depend on the values before them run away for some latents.
    flow = Flow(config.flow)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=4.0)
    drawn = draw_samples(flow.eval(), noise, SamplingDefaults(), seeds, [0, 1] * 10)
    assert drawn.not_finite > 0
    assert len(drawn.pixels) == 20 - drawn.not_finite
