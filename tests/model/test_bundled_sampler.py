"""The bundled model's samplers: whatever the plan, the same seeds give the same images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.bundle import BUNDLED, read_bundle
from model.config import SolverOptions
from model.noise import latents
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Decoded, Sampler
from model.weights import load_flow

BUNDLE = read_bundle(BUNDLED / "fashion-mnist")
TOLERANCE = 1e-4
LARGEST_DIFFERENCE = 1e-3
"""Of values on the [-1, 1] scale: an eighth of a grey level."""


def make_sampler() -> Sampler:
    return Sampler(load_flow(BUNDLE), BUNDLE.convergence, rows_per_pass=32)


def rows_of(seeds: range) -> Rows:
    config = BUNDLE.config.flow
    # Stronger than is recommended. With w = 2 rounding alone takes one image in twenty beyond this tolerance.
    guidance = replace(BUNDLE.sampling, guidance_scale=1.0, attention_temperature=2.0, denoise=False)
    labels: list[int | None] = [None if seed % 11 == 10 else seed % 10 for seed in seeds]
    u_BTD = latents(seeds, config.num_patches, config.patch_dim)
    return make_rows(u_BTD, labels, [guidance] * len(seeds), TOLERANCE)


def plans() -> dict[str, Plan]:
    profile = BUNDLE.convergence
    assert profile is not None, "the bundled model is tuned"
    whole = Plan.jacobi(BUNDLE.config.flow, profile)
    mixed = (BlockPlan(segment=1), *whole.blocks[1:])
    halves = tuple(replace(block, segment=24) for block in whole.blocks)
    return {"jacobi": whole, "mixed": replace(whole, blocks=mixed), "segments": replace(whole, blocks=halves)}


def check(sequential: Tensor, decoded: Decoded) -> None:
    assert (decoded.x_BTD - sequential).abs().max() < LARGEST_DIFFERENCE
    assert (decoded.backward_error_B <= TOLERANCE).all()
    # Done again are a few rows at most: the plan's own accuracy is what is tested.
    assert (decoded.redone_B != 0).sum() <= len(sequential) / 32
    assert (decoded.x_BTD - sequential).abs().max() > 0


@pytest.mark.parametrize("name", ["jacobi", "mixed", "segments"])
def test_every_plan_gives_the_sequential_images(name: str) -> None:
    sampler, rows = make_sampler(), rows_of(range(8))
    sequential = finish(sampler.decode(rows, SolverOptions(solver="sequential"))).x_BTD
    check(sequential, finish(sampler.decode(rows, SolverOptions(tolerance=TOLERANCE), plan=plans()[name])))


@pytest.mark.long
def test_256_seeds_agree_under_the_plan_for_single_images() -> None:
    sampler = make_sampler()
    for first in range(0, 256, 32):
        rows = rows_of(range(first, first + 32))
        sequential = finish(sampler.decode(rows, SolverOptions(solver="sequential"))).x_BTD
        check(sequential, finish(sampler.decode(rows, SolverOptions(tolerance=TOLERANCE), plan=plans()["mixed"])))


def test_a_corrupted_iterate_is_seen_and_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is wrong about one image, in its iterations alone."""
    sampler, rows = make_sampler(), rows_of(range(4))
    plan = plans()["mixed"]
    sequential = finish(sampler.decode(rows, SolverOptions(solver="sequential"))).x_BTD
    kernel = sampler.kernel.blocks[2]
    run, second = kernel.run, kernel.offset(rows.label_B[1:2])

    def corrupted(x_NRD: Tensor, start: int, offset_RW: Tensor, *arguments: Any) -> Tensor:
        out = run(x_NRD, start, offset_RW, *arguments)
        if len(out) > 1:
            # The shifts of the last patches, as the second image's own pass has them: in every iteration.
            out[-17:, (offset_RW == second).all(dim=1), 1] += 0.05
        return out

    monkeypatch.setattr(kernel, "run", corrupted)
    reported = finish(sampler.decode(rows, SolverOptions(tolerance=TOLERANCE, certify=False), plan=plan))
    assert (reported.backward_error_B > TOLERANCE).tolist() == [False, True, False, False]
    assert (reported.x_BTD - sequential)[1].abs().max() > LARGEST_DIFFERENCE
    mended = finish(sampler.decode(rows, SolverOptions(tolerance=TOLERANCE), plan=plan))
    assert mended.redone_B.tolist() == [0, 1, 0, 0]
    assert (mended.x_BTD - sequential).abs().max() < LARGEST_DIFFERENCE
    assert (mended.backward_error_B <= TOLERANCE).all()
    assert torch.isfinite(mended.x_BTD).all()
