"""Sampling on a device gives what float64 gives on the CPU: ``pytest tests/model/test_cuda.py --device cuda``.

Without the option the device is the CPU too, and a step is "captured" as it is; on a GPU it is captured by CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from model.bundle import BUNDLED, find_bundles
from model.config import SamplingDefaults, SolverOptions
from model.device import resolve_device
from model.flow import Flow
from model.noise import latents
from model.sampling.graphs import Capture, DecodeGraphs, Step, cuda_captures
from model.sampling.kernel import FlowKernel, Memory
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import Rows, finish, make_rows
from model.sampling.sampler import Decoded, Redone, Sampler, Sampling
from model.weights import load_flow
from tests.model.sampling.cases import (
    PLAIN,
    SEQUENTIAL,
    Case,
    case_of,
    direct_backward_error,
    distance,
    mixed_options,
    run_dropping,
    sequential,
    tough_flow,
    whole_plan,
)

SHAPE: dict[str, Any] = {"image_size": 12, "width": 128, "head_dim": 64}
"""36 patches, and heads of the size that published models have."""
TOUGHNESS = 0.03
"""At this width it changes latents by 0.2, and multiplies rounding by not much."""
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Rounding of the device against float64, after three blocks."""
PRECISIONS = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where these tests run; raises ``ValueError`` when it is not there."""
    return resolve_device(request.config.getoption("--device"))


@pytest.fixture(scope="module")
def make_capture(device: torch.device) -> Callable[[], Capture]:
    """What captures steps there."""
    return cuda_captures(device) if device.type == "cuda" else lambda: lambda step: step


@pytest.fixture
def make_sampler(device: torch.device, make_capture: Callable[[], Capture]) -> Callable[..., Sampler]:
    """A sampler on the device for a flow, with captured steps."""

    def make(flow: Flow, **options: Any) -> Sampler:
        sampler = Sampler(flow)
        sampler.graphs = DecodeGraphs(flow.config, make_capture, **options)
        return sampler

    return make


def flow_on(device: torch.device, dtype: torch.dtype, **shape: Any) -> Flow:
    """The same weights wherever they are, of float32 values, so that both precisions are of one model."""
    return tough_flow(TOUGHNESS, dtype=torch.float32, **(SHAPE | shape)).to(device, dtype)


def mixed_case(count: int = 8, first_seed: int = 0, **shape: Any) -> Case:
    """Rows that differ in everything, in float64 on the CPU."""
    flow = flow_on(torch.device("cpu"), torch.float64, **shape)
    return case_of(flow, (mixed_options(3) * (1 + count // 8))[:count], 1e-3, first_seed)


def rows_on(device: torch.device, dtype: torch.dtype, case: Case) -> Rows:
    rows = case.rows()
    columns = {f.name: getattr(rows, f.name).to(device) for f in fields(rows)}
    return Rows(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in columns.items()})


def decode(sampler: Sampler, case: Case, options: SolverOptions = SEQUENTIAL, plan: Plan | None = None) -> Decoded:
    weight = sampler.flow.blocks[0].proj_in.weight
    return finish(sampler.decode(rows_on(weight.device, weight.dtype, case), options, plan=plan, trajectory=True))


def off(got: Tensor, expected: Tensor) -> float:
    """max|got − expected|, where the latter is on the CPU."""
    return distance(got.cpu().to(expected.dtype), expected)


def assert_in_use(sampler: Sampler, sets: int = 1) -> None:
    """Steps were captured, agreed with the kernels, and are ready for the next batch."""
    assert sampler.graphs is not None
    assert sampler.graphs.reason is None
    assert len(sampler.graphs._idle) == sets


@PRECISIONS
@pytest.mark.parametrize("shape", [{}, {"num_classes": 0}, {"volume_preserving": True}], ids=str)
def test_captured_steps_and_kernels_give_what_the_cpu_gives(
    device: torch.device, make_sampler: Callable[..., Sampler], dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    case = mixed_case(**shape)
    expected = sequential(case)
    sampler = make_sampler(flow_on(device, dtype, **shape))
    assert off(decode(sampler, case).x_BTD, expected) < CLOSE[dtype]
    assert_in_use(sampler)
    sampler.graphs = None
    assert off(decode(sampler, case).x_BTD, expected) < CLOSE[dtype]


@PRECISIONS
def test_jacobi_is_sequential(device: torch.device, make_sampler: Callable[..., Sampler], dtype: torch.dtype) -> None:
    """Whole sequences, and segments with a prefix in the memory."""
    case = mixed_case()
    expected = sequential(case)
    sampler = make_sampler(flow_on(device, dtype))
    segments = Plan(blocks=(BlockPlan(segment=16), BlockPlan(segment=5, guess="zeros"), BlockPlan(segment=1)))
    for plan in (whole_plan(case.flow), segments):
        got = decode(sampler, case, SolverOptions(), plan)
        assert off(got.x_BTD, expected) < 30e-3
        assert (got.backward_error_B <= 1e-3).all()
        assert direct_error(case, got) <= 1e-3 + CLOSE[dtype]
        assert not got.redone_B.any()


def direct_error(case: Case, got: Decoded) -> float:
    """Largest backward error of some images, by the formulas, on the CPU."""
    return float(direct_backward_error(case, got.x_BTD.cpu().double()).max())


def test_a_draft_in_bfloat16_is_polished_until_it_is_certified(
    device: torch.device, make_sampler: Callable[..., Sampler]
) -> None:
    case = mixed_case()
    sampler = make_sampler(flow_on(device, torch.float32))
    draft = decode(sampler, case, SolverOptions(solver="sequential", precision="bf16", certify=False))
    assert 1e-4 < off(draft.x_BTD, sequential(case)) < 0.5
    polished = decode(sampler, case, SolverOptions(precision="bf16"))
    assert (polished.backward_error_B <= 1e-3).all()
    assert direct_error(case, polished) <= 1e-3 + CLOSE[torch.float32]
    assert off(polished.x_BTD, sequential(case)) < 30e-3
    assert_in_use(sampler)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_passes_in_pieces_are_the_whole_pass(device: torch.device, dtype: torch.dtype) -> None:
    """Whatever attention makes of the mask of a piece."""
    flow = flow_on(device, torch.float64)
    config, kernel = flow.config, FlowKernel(flow, dtype).blocks[0]
    x_TRD = latents(range(3), config.num_patches, config.patch_dim).to(device, dtype).transpose(0, 1)
    offset_RW = kernel.offset(torch.tensor([0, 1, 2], device=device))
    temperature = torch.tensor([1.0, 0.5, 2.0], device=device)
    whole = kernel.run(x_TRD, 0, offset_RW, temperature, Memory.allocate(config, 3, dtype, device))
    memory = Memory.allocate(config, 3, dtype, device)
    pieces, start = [], 0
    for length in (7, 1, 2, 10, 16):
        pieces.append(kernel.run(x_TRD[start : start + length], start, offset_RW, temperature, memory))
        start += length
    assert start == config.num_patches
    allowed = CLOSE.get(dtype, 0.1)
    assert distance(torch.cat(pieces), whole) < allowed
    reference = FlowKernel(flow_on(torch.device("cpu"), torch.float64)).blocks[0]
    cpu = kernel_pass(reference, x_TRD, temperature)
    assert off(whole, cpu) < allowed


def kernel_pass(kernel: Any, x_TRD: Tensor, temperature: Tensor) -> Tensor:
    """A whole pass in float64 on the CPU."""
    offset_RW = kernel.offset(torch.tensor([0, 1, 2]))
    memory = Memory.allocate(mixed_case().flow.config, 3, torch.float64, torch.device("cpu"))
    return kernel.run(x_TRD.cpu().double(), 0, offset_RW, temperature.cpu().double(), memory)


@PRECISIONS
def test_rows_may_leave(device: torch.device, make_sampler: Callable[..., Sampler], dtype: torch.dtype) -> None:
    case = mixed_case()
    expected = sequential(case)
    sampler = make_sampler(flow_on(device, dtype))
    for number in (1, 9, 34, 35, 36, 105):
        slices = sampler.decode(rows_on(device, dtype, case), SEQUENTIAL)
        got, _ = run_dropping(on_device(slices, device), 8, {number: [6, 1, 0]})
        assert off(got.x_BTD, expected[[6, 1, 0]]) < CLOSE[dtype]


def on_device(slices: Sampling, device: torch.device) -> Sampling:
    """A sampling that is told which rows stay by indices on the CPU."""
    keep = None
    while True:
        try:
            keep = yield slices.send(None if keep is None else keep.to(device))
        except StopIteration as stop:
            return stop.value


def test_batches_in_flight_do_not_share_buffers(device: torch.device, make_sampler: Callable[..., Sampler]) -> None:
    """Three in turns, and sets for two; then the same again on buffers that were used."""
    sampler = make_sampler(flow_on(device, torch.float32), most_sets=2)
    batches = [mixed_case(8, 10 * i) for i in range(3)]
    for _ in range(2):
        flights = [sampler.decode(rows_on(device, torch.float32, case), SEQUENTIAL) for case in batches]
        results: list[Decoded | None] = [None] * 3
        while None in results:
            for i, slices in enumerate(flights):
                try:
                    next(slices)
                except StopIteration as stop:
                    results[i] = stop.value or results[i]
        for case, result in zip(batches, results, strict=True):
            assert result is not None
            assert off(result.x_BTD, sequential(case)) < CLOSE[torch.float32]
    assert_in_use(sampler, 2)


def test_graphs_outlive_those_that_made_room(device: torch.device, make_sampler: Callable[..., Sampler]) -> None:
    """Sizes come and go, and those that stay are still right: nothing they point to has gone with the others."""
    sampler = make_sampler(flow_on(device, torch.float32), most_sets=2)
    cases = {count: case_of(mixed_case().flow, [PLAIN] * count) for count in (1, 3, 6, 20)}
    expected = {count: sequential(case) for count, case in cases.items()}
    for count in (1, 3, 1, 6, 1, 20, 1, 3, 1):
        assert off(decode(sampler, cases[count]).x_BTD, expected[count]) < CLOSE[torch.float32]
        # What was freed is taken by others.
        _ = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(8)]
    assert_in_use(sampler, 2)


def test_values_that_are_not_finite_do_not_stay_in_buffers(
    device: torch.device, make_sampler: Callable[..., Sampler]
) -> None:
    case = mixed_case()
    sampler = make_sampler(flow_on(device, torch.float32))
    spoilt = mixed_case()
    spoilt.latent_BTD[::2] = float("nan")
    decode(sampler, spoilt, SolverOptions(solver="sequential", certify=False))
    assert off(decode(sampler, case).x_BTD, sequential(case)) < CLOSE[torch.float32]


def test_a_capture_that_fails_leaves_decoding_as_it_was(
    device: torch.device, make_capture: Callable[[], Capture], caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU it really fails, half-way through."""
    flow = flow_on(device, torch.float32)
    capture = make_capture()

    def failing(step: Step) -> Step:
        calls = []

        def asking() -> None:
            step()
            calls.append(float(torch.zeros(1, device=device)))
            if device.type == "cpu":
                raise RuntimeError("a graph cannot ask the device")

        repeat = capture(asking)
        asking()
        return repeat

    sampler = Sampler(flow)
    sampler.graphs = DecodeGraphs(flow.config, lambda: failing)
    case = mixed_case()
    with caplog.at_level(logging.WARNING):
        assert off(decode(sampler, case).x_BTD, sequential(case)) < CLOSE[torch.float32]
        assert off(decode(sampler, case).x_BTD, sequential(case)) < CLOSE[torch.float32]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert sampler.graphs.reason
    # Others capture as before.
    other = Sampler(flow)
    other.graphs = DecodeGraphs(flow.config, make_capture)
    assert off(decode(other, case).x_BTD, sequential(case)) < CLOSE[torch.float32]
    assert_in_use(other)


def test_the_bundled_model(device: torch.device, make_sampler: Callable[..., Sampler]) -> None:
    """Trained weights, guided: the same images as in float32 on the CPU."""
    bundle = find_bundles(BUNDLED)[0]
    options = [SamplingDefaults(guidance_scale=2.0, guidance_schedule="linear")] * 3
    flow = load_flow(bundle, torch.device("cpu"))
    latent_BTD = latents(range(3), flow.config.num_patches, flow.config.patch_dim)
    expected = finish(Sampler(flow).decode(make_rows(latent_BTD, [0, 5, 9], options), SEQUENTIAL)).x_BTD
    sampler = make_sampler(load_flow(bundle, device))
    got = finish(sampler.decode(make_rows(latent_BTD.to(device), [0, 5, 9], options), SolverOptions(certify=True)))
    assert off(got.x_BTD, expected) < 1 / 255
    assert (got.redone_B == int(Redone.NO)).all()
    assert_in_use(sampler)
