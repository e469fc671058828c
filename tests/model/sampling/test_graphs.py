"""Captured steps decode what :class:`BlockKernel` does, one batch at a time, and give way when they do not."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from model.config import SolverOptions
from model.sampling.graphs import MOST_ROWS, Capture, DecodeGraphs, Step, padded_rows
from model.sampling.kernel import FlowKernel, Memory
from model.sampling.plan import BlockPlan, Plan
from model.sampling.rows import finish
from model.sampling.sampler import Decoded, Redone, Sampler, Sampling
from model.sampling.solver import BlockSolver
from model.sampling.static_step import StepBuffers, Variant, cache_lengths, decode_step
from tests.model.sampling.captures import FLOW, LENGTHS, CountingCapture, graphed, mixed, record
from tests.model.sampling.cases import (
    PLAIN,
    ROUNDING,
    SEQUENTIAL,
    Case,
    case_of,
    cases,
    distance,
    mixed_options,
    run_dropping,
    tough_flow,
)


def decode(sampler: Sampler, case: Case, options: SolverOptions = SEQUENTIAL, plan: Plan | None = None) -> Decoded:
    return finish(sampler.decode(case.rows(), options, plan=plan, trajectory=True))


def assert_same(got: Decoded, expected: Decoded, rounding: float = ROUNDING) -> None:
    assert len(got.trajectory) == len(expected.trajectory)
    for ours, theirs in zip((*got.trajectory, got.x_BTD), (*expected.trajectory, expected.x_BTD), strict=True):
        assert distance(ours, theirs) < rounding
    assert got.passes_B.tolist() == expected.passes_B.tolist()
    assert got.redone_B.tolist() == expected.redone_B.tolist()


def assert_in_use(sampler: Sampler) -> None:
    """Nothing has gone wrong unnoticed."""
    assert sampler.graphs is not None
    assert sampler.graphs.reason is None


def test_padded_rows_are_few_sizes_and_never_too_small() -> None:
    sizes = [padded_rows(count) for count in range(1, MOST_ROWS + 1)]
    assert all(size >= count for count, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [2, 4, 8, 16, *range(32, MOST_ROWS + 1, 32)]


# Decoding by repeated steps.


@settings(deadline=None, max_examples=20)
@given(case=cases(tolerances=[1e-3]))
def test_repeated_steps_decode_what_the_kernels_do(case: Case) -> None:
    sampler = graphed(case.flow)
    assert_same(decode(sampler, case), decode(Sampler(case.flow), case))
    assert_in_use(sampler)


def test_every_step_is_repeated_and_nothing_else_is_needed() -> None:
    capture = CountingCapture()
    sampler = graphed(FLOW, capture)
    assert cache_lengths(FLOW.config.num_patches) == LENGTHS
    assert_same(decode(sampler, mixed()), decode(Sampler(FLOW), mixed()))
    checked = capture.repeated - 3 * 35
    assert capture.captured == 3 * len(LENGTHS)
    # Three of each length, and as many of the last as there are.
    assert checked == 3 * (3 * len(LENGTHS))
    decode(sampler, mixed())
    assert capture.captured == 3 * len(LENGTHS)
    assert capture.repeated == checked + 2 * 3 * 35


def test_the_memory_of_kernels_is_not_made_when_steps_are_repeated() -> None:
    case = mixed()
    kernel, rows = FlowKernel(FLOW).blocks[0], case.rows()
    z_TBD = case.latent_BTD.transpose(0, 1).contiguous()

    def refuse() -> list[Tensor]:
        raise AssertionError("nobody needs it")

    memory = Memory(FLOW.config, len(rows) + len(rows.guided(0, kernel.block)), kernel.dtype, refuse)
    graphs = DecodeGraphs(FLOW.config, lambda: record)
    solver = BlockSolver(kernel, rows, 0, z_TBD, memory, segment=1, graphs=graphs)
    assert finish(solver.run()).shape == z_TBD.shape


def test_a_later_batch_finds_nothing_of_an_earlier_one() -> None:
    """Other labels, rules, temperatures and latents in the same buffers, also after values that were not finite."""
    capture = CountingCapture()
    sampler = graphed(FLOW, capture)
    first = mixed()
    spoilt = replace(first, latent_BTD=first.latent_BTD.clone())
    spoilt.latent_BTD[::2, 3] = float("nan")
    spoilt.latent_BTD[1::2, 0] = 1e300
    options = SolverOptions(solver="sequential", certify=False)
    decode(sampler, spoilt, options)
    captured = capture.captured
    turned = replace(mixed(8, 100), labels=first.labels[::-1], options=first.options[::-1])
    for case in (turned, first):
        assert_same(decode(sampler, case, options), decode(Sampler(FLOW), case, options))
    assert capture.captured == captured
    assert_in_use(sampler)


def test_only_segments_of_one_patch_are_repeated() -> None:
    plan = Plan(blocks=(BlockPlan(segment=1), BlockPlan(segment=35), BlockPlan(segment=1)))
    capture = CountingCapture()
    got = decode(graphed(FLOW, capture), mixed(), SolverOptions(), plan)
    assert_same(got, decode(Sampler(FLOW), mixed(), SolverOptions(), plan))
    assert capture.captured == 2 * len(LENGTHS)


def test_rows_that_are_done_again_have_their_turn() -> None:
    plan = Plan(blocks=(BlockPlan(segment=35),) * 3, gain=1e-4)
    case = replace(mixed(), tolerances=[1e-6, 1.0] * 4)
    got = decode(graphed(FLOW), case, SolverOptions(), plan)
    assert got.redone_B[::2].tolist() == [Redone.TOLERANCE] * 4
    assert_same(got, decode(Sampler(FLOW), case, SolverOptions(), plan))


def test_low_precision() -> None:
    """Both precisions of one sampler, each with its own buffers."""
    flow = tough_flow(1.0, dtype=torch.float32, image_size=12)
    case = case_of(flow, mixed_options(3), 1e-3, dtype=torch.float32)
    sampler, eager = graphed(flow), Sampler(flow)
    draft = SolverOptions(solver="sequential", precision="bf16", certify=False)
    got, expected = decode(sampler, case, draft), decode(eager, case, draft)
    assert distance(got.x_BTD, decode(eager, case).x_BTD) > 1e-4
    assert distance(got.x_BTD, expected.x_BTD) < 0.1
    assert distance(decode(sampler, case).x_BTD, decode(eager, case).x_BTD) < 1e-4
    polished = decode(sampler, case, SolverOptions(precision="bf16"))
    assert (polished.backward_error_B <= 1e-3).all()
    assert_in_use(sampler)


# Rows that leave.


@pytest.mark.parametrize("kept", [[6, 1, 0, 3], [2], list(range(8))[::-1], []])
def test_rows_may_leave_after_every_step(kept: list[int]) -> None:
    sampler = graphed(FLOW)
    whole = decode(Sampler(FLOW), mixed())
    for number in [1, 2, 7, 8, 9, 34, 35, 36, 50, 70, 71, 104, 105]:
        slices = sampler.decode(mixed().rows(), SEQUENTIAL, trajectory=True)
        got, _ = run_dropping(slices, 8, {number: kept})
        assert distance(got.x_BTD, whole.x_BTD[kept]) < ROUNDING
        assert got.passes_B.tolist() == [105] * len(kept) or not kept
    assert_in_use(sampler)


def test_rows_may_leave_several_times_in_a_block() -> None:
    slices = graphed(FLOW).decode(mixed().rows(), SEQUENTIAL, trajectory=True)
    got, kept = run_dropping(slices, 8, {5: [7, 5, 4, 2, 1], 6: [4, 0, 1], 30: [1, 0], 60: [1]})
    assert kept == [1]
    assert distance(got.x_BTD, decode(Sampler(FLOW), mixed()).x_BTD[kept]) < ROUNDING


def test_a_set_is_free_again_as_soon_as_rows_leave() -> None:
    capture = CountingCapture()
    sampler = graphed(FLOW, capture, most_sets=1)
    slices = started(sampler, mixed(), 3)
    slices.send(torch.tensor([0, 1]))
    captured = capture.captured
    repeated = capture.repeated
    started(sampler, mixed(8, 50), 2)
    assert (capture.captured, capture.repeated) == (captured, repeated + 2)


# Who has which buffers.


def started(sampler: Sampler, case: Case, steps: int) -> Sampling:
    """A sampling in flight."""
    slices = sampler.decode(case.rows(), SEQUENTIAL, trajectory=True)
    for _ in range(steps):
        next(slices)
    return slices


def test_batches_in_flight_do_not_share_buffers() -> None:
    """Five at once and sets for three: the others go on without."""
    sampler = graphed(FLOW, most_sets=3)
    batches = [mixed(8, 10 * i) for i in range(5)]
    flights: list[Sampling | None] = [started(sampler, case, i) for i, case in enumerate(batches)]
    results: dict[int, Decoded] = {}
    while any(flights):
        for i, slices in enumerate(flights):
            if slices is None:
                continue
            try:
                next(slices)
            except StopIteration as stop:
                results[i], flights[i] = stop.value, None
    for i, case in enumerate(batches):
        assert_same(results[i], decode(Sampler(FLOW), case))
    assert_in_use(sampler)


@pytest.mark.parametrize("end", ["finished", "closed", "forgotten", "failed"])
def test_a_set_comes_back_however_a_batch_ends(end: str) -> None:
    capture = CountingCapture()
    sampler = graphed(FLOW, capture, most_sets=1)
    slices = started(sampler, mixed(), 5)
    captured = capture.captured
    if end == "finished":
        finish(slices)
        captured = capture.captured
    elif end == "closed":
        slices.close()
    elif end == "failed":
        with pytest.raises(KeyError):
            slices.throw(KeyError("no fault of ours"))
    del slices
    repeated = capture.repeated
    started(sampler, mixed(), 4)
    assert (capture.captured, capture.repeated) == (captured, repeated + 4)


def test_the_set_unused_longest_makes_room() -> None:
    sampler = graphed(FLOW, most_sets=2)
    graphs = sampler.graphs
    assert graphs is not None
    plain = [case_of(FLOW, [PLAIN] * count) for count in (2, 4, 8)]
    for case in (*plain[:2], plain[0]):
        decode(sampler, case)
    seldom = weakref.ref(graphs._idle[0])
    often = graphs._idle[1]
    gc.disable()  # What a graph holds must be free at once, without a search for cycles.
    try:
        decode(sampler, plain[2])
        assert seldom() is None
    finally:
        gc.enable()
    assert graphs._idle[0] is often
    assert len(graphs._idle) == 2


def test_what_captured_for_a_set_that_is_gone_captures_for_the_next() -> None:
    """So that no two sets in use ever have a stream in common."""
    made: list[CountingCapture] = []

    def make() -> CountingCapture:
        made.append(CountingCapture())
        return made[-1]

    sampler = Sampler(FLOW)
    sampler.graphs = DecodeGraphs(FLOW.config, make, most_sets=2)
    for count in (2, 4, 8, 16, 2, 4):
        decode(sampler, case_of(FLOW, [PLAIN] * count))
    assert len(made) == 2
    assert sum(capture.captured for capture in made) == 6 * 3 * len(LENGTHS)


def test_batches_beyond_the_largest_size_go_without() -> None:
    flow = tough_flow(1.0, num_blocks=1, layers_per_block=1, image_size=4)
    case = case_of(flow, [PLAIN] * (MOST_ROWS + 1))
    capture = CountingCapture()
    assert_same(decode(graphed(flow, capture), case), decode(Sampler(flow), case))
    assert capture.captured == 0


def test_a_sampler_on_the_cpu_has_no_graphs() -> None:
    assert Sampler(FLOW).graphs is None


# What goes wrong.


def forgetful(step: Step) -> Step:
    """Does not do what it noted."""
    return lambda: None


def hasty(step: Step) -> Step:
    """Does it twice."""
    return lambda: (step(), step())[0]


def refusing(step: Step) -> Step:
    raise RuntimeError("operation not permitted when stream is capturing")


def refusing_later() -> Capture:
    """Captures two lengths of the first block, not the third."""
    left = [2]

    def capture(step: Step) -> Step:
        if not left[0]:
            refusing(step)
        left[0] -= 1
        return record(step)

    return capture


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (forgetful, "differ by"),
        (hasty, "differ by"),
        (refusing, "not permitted"),
        (refusing_later(), "not permitted"),
    ],
    ids=["forgetful", "hasty", "refusing", "refusing later"],
)
def test_what_goes_wrong_is_said_once_and_decoding_goes_on(
    capture: Capture, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = graphed(FLOW, capture)
    with caplog.at_level(logging.WARNING):
        assert_same(decode(sampler, mixed()), decode(Sampler(FLOW), mixed()))
        assert_same(decode(sampler, mixed(3)), decode(Sampler(FLOW), mixed(3)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text
    assert sampler.graphs is not None
    assert reason in str(sampler.graphs.reason)
    assert not sampler.graphs._idle


def test_a_step_that_does_not_write_its_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check looks at more than the first step."""
    import model.sampling.graphs as module

    def amnesiac(kernel: Any, buffers: StepBuffers, length: int, variant: Variant) -> None:
        held = [qkv.clone() for qkv in buffers.memory.qkv]
        decode_step(kernel, buffers, length, variant)
        for qkv, before in zip(buffers.memory.qkv, held, strict=True):
            qkv.copy_(before)

    monkeypatch.setattr(module, "decode_step", amnesiac)
    sampler = graphed(FLOW, lambda step: step)
    assert_same(decode(sampler, mixed()), decode(Sampler(FLOW), mixed()))
    assert sampler.graphs is not None
    assert "differ by" in str(sampler.graphs.reason)


@pytest.mark.parametrize(("place", "value"), [(-1, -torch.inf), (1, 0.0)])
def test_a_step_that_sees_a_patch_more_or_less_is_found(
    monkeypatch: pytest.MonkeyPatch, place: int, value: float
) -> None:
    import model.sampling.graphs as module

    def shifted(kernel: Any, buffers: StepBuffers, length: int, variant: Variant) -> None:
        buffers.hidden_L[max(0, int(buffers.position_1) + place)] = value
        decode_step(kernel, buffers, length, variant)

    monkeypatch.setattr(module, "decode_step", shifted)
    sampler = graphed(FLOW, lambda step: step)
    decode(sampler, mixed())
    assert sampler.graphs is not None
    assert "differ by" in str(sampler.graphs.reason)


def test_batches_in_flight_go_on_when_another_switches_graphs_off() -> None:
    count = [0]

    def capture(step: Step) -> Step:
        count[0] += 1
        return refusing(step) if count[0] > 3 * len(LENGTHS) else record(step)

    sampler = graphed(FLOW, capture)
    decode(sampler, mixed())
    first = started(sampler, mixed(), 5)
    assert_same(decode(sampler, mixed(2)), decode(Sampler(FLOW), mixed(2)))
    assert sampler.graphs is not None
    assert sampler.graphs.reason is not None
    assert_same(finish(first), decode(Sampler(FLOW), mixed()))


def test_a_fault_of_ours_is_not_taken_for_one_of_the_device() -> None:
    def faulty(step: Step) -> Step:
        raise TypeError("a fault of ours")

    sampler = graphed(FLOW, faulty)
    with pytest.raises(TypeError, match="a fault of ours"):
        decode(sampler, mixed())


def test_a_lack_of_memory_does_not_switch_graphs_off(caplog: pytest.LogCaptureFixture) -> None:
    """The next batch may be smaller, or the memory be there again."""
    lacks = [True]

    def lacking(step: Step) -> Step:
        if lacks:
            lacks.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(step)

    sampler = graphed(FLOW, lacking)
    with caplog.at_level(logging.WARNING):
        assert_same(decode(sampler, mixed()), decode(Sampler(FLOW), mixed()))
    assert "out of memory" in caplog.text
    assert sampler.graphs is not None
    assert sampler.graphs.reason is None
    assert len(sampler.graphs._idle) == 1
