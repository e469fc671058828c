"""Score and classify batches: how rows are put together changes nothing, and large models get small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import read_bundle
from model.config import FlowConfig
from model.flow import Flow
from model.sampling.sampler import Sampler
from service.jobs import Job, Op
from service.worker.loading import LoadedModel
from service.worker.scoring import classify, encode_images, score


@pytest.fixture(scope="module")
def tiny(models: Path) -> LoadedModel:
    return LoadedModel.load(read_bundle(models / "tiny-cond"), torch.device("cpu"))


def job(op: Op, rows: int, draws: int, label: int | None) -> Job:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 3, 16, 16), dtype=np.uint8)
    payload = {"pixels": pixels, "label": label, "draws": draws, "seed": 1, "add_noise": True}
    payload = {name: value for name, value in payload.items() if op is not Op.ENCODE or name != "draws"}
    return Job(id=f"{rows}", op=op, model="tiny-cond", payload=payload, rows=rows, cost=1)


def test_scores_do_not_depend_on_the_batches(tiny: LoadedModel) -> None:
    jobs = [job(Op.SCORE, 3, 2, 0), job(Op.SCORE, 1, 4, None), job(Op.SCORE, 5, 1, 4)]
    alone = [score(tiny, [one], 64)[0] for one in jobs]
    for batch_rows in (1, 4, 64):
        for together, expected in zip(score(tiny, jobs, batch_rows), alone, strict=True):
            assert together.keys() == expected.keys()
            for name, values in together.items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-2)


def test_classes_do_not_depend_on_the_batches_and_are_those_of_scores(tiny: LoadedModel) -> None:
    shapes = [(3, 2), (1, 1), (2, 3)]
    jobs = [job(Op.CLASSIFY, rows, draws, None) for rows, draws in shapes]
    alone = [classify(tiny, [one], 64)[0] for one in jobs]
    for batch_rows in (1, 4, 64):
        for together, expected in zip(classify(tiny, jobs, batch_rows), alone, strict=True):
            assert together.keys() == expected.keys()
            for name, values in together.items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-2)
    for (rows, draws), arrays in zip(shapes, alone, strict=True):
        assert {values.dtype for values in arrays.values()} == {np.dtype(np.float64)}
        for y in range(5):
            [scored] = score(tiny, [job(Op.SCORE, rows, draws, y)], 64)
            np.testing.assert_allclose(arrays["log_likelihood"][:, y], scored["log_likelihood"], rtol=1e-5)
        [scored] = score(tiny, [job(Op.SCORE, rows, draws, None)], 64)
        np.testing.assert_allclose(arrays["log_likelihood_no_class"], scored["log_likelihood"], rtol=1e-5)


def test_latents_do_not_depend_on_the_batches(tiny: LoadedModel) -> None:
    jobs = [job(Op.ENCODE, 3, 1, 0), job(Op.ENCODE, 2, 1, None)]
    alone = [encode_images(tiny, [one], 64)[0] for one in jobs]
    for together, expected in zip(encode_images(tiny, jobs, 2), alone, strict=True):
        np.testing.assert_allclose(together["latents"], expected["latents"], atol=1e-4)


def test_passes_of_large_models_have_fewer_rows(tiny: LoadedModel) -> None:
    assert tiny.pass_rows(64) == 64
    large = FlowConfig(image_size=64, channels=3, patch_size=2, width=768, num_blocks=8, layers_per_block=8)
    with torch.device("meta"):
        sampler = Sampler(Flow(large))
    assert LoadedModel(tiny.info, sampler, torch.device("cpu")).pass_rows(64) == 1
