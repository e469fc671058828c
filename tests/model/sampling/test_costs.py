"""What passes cost: interpolation between what was measured, and the measurement."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.sampling.costs as costs_module
from model.config import FlowConfig
from model.sampling.costs import measure_costs
from model.sampling.kernel import BlockKernel, FlowKernel, Memory
from model.sampling.plan import CostProfile, PassCost, segment_lengths
from tests.model.conftest import tiny_flow
from tests.model.sampling.profiles import costs_of

LAW = settings(deadline=None, max_examples=50)


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[PassCost], CostProfile]:
    """Costs that grow with the rows and with the patches."""
    rows = sorted(draw(st.sets(st.integers(1, 100), min_size=1, max_size=5)))
    patches = sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=5)))
    size = len(rows) * len(patches)
    steps = draw(st.lists(st.floats(0.001, 10), min_size=size, max_size=size))
    grid = torch.tensor(steps, dtype=torch.float64).view(len(patches), len(rows)).cumsum(0).cumsum(1)
    measured = [
        PassCost(rows=r, patches=p, seconds=float(grid[i, j]), threads=1 + (i + j) % 3)
        for i, p in enumerate(patches)
        for j, r in enumerate(rows)
    ]
    return measured, CostProfile(draw(st.permutations(measured)))


@LAW
@given(grid=grids())
def test_what_was_measured_is_exact(grid: tuple[list[PassCost], CostProfile]) -> None:
    measured, profile = grid
    for cost in measured:
        assert profile.seconds(cost.rows, cost.patches) == cost.seconds
        assert profile.threads(cost.rows, cost.patches) in (1, 2, 3)


@LAW
@given(
    grid=grids(),
    rows=st.floats(1, 200),
    more_rows=st.floats(0, 50),
    patches=st.integers(1, 80),
    more_patches=st.integers(0, 20),
)
def test_more_work_never_costs_less(
    grid: tuple[list[PassCost], CostProfile], rows: float, more_rows: float, patches: int, more_patches: int
) -> None:
    _, profile = grid
    less = profile.seconds(rows, patches)
    assert 0 < less <= profile.seconds(rows + more_rows, patches) * (1 + 1e-9)
    assert less <= profile.seconds(rows, patches + more_patches) * (1 + 1e-9)


@LAW
@given(grid=grids(), rows=st.floats(1, 200), patches=st.integers(1, 80))
def test_it_has_no_jumps(grid: tuple[list[PassCost], CostProfile], rows: float, patches: int) -> None:
    measured, profile = grid
    here, near = profile.seconds(rows, patches), profile.seconds(rows + 1e-7, patches)
    steepest = max(cost.seconds for cost in measured) * 80
    assert abs(near - here) <= 1e-7 * steepest + 1e-9


def test_between_it_is_linear_and_beyond_it_grows_with_the_work() -> None:
    profile = CostProfile([PassCost(r, p, s, 1) for r, p, s in ((2, 1, 1.0), (4, 1, 3.0), (2, 5, 5.0), (4, 5, 9.0))])
    assert profile.seconds(3, 1) == 2
    assert profile.seconds(2, 3) == 3
    assert profile.seconds(3, 3) == 4.5
    assert profile.seconds(1, 1) == 1, "a pass of fewer rows than measured costs what it costs"
    assert profile.seconds(8, 1) == 6
    assert profile.seconds(2, 10) == 10
    assert profile.seconds(8, 10) == 36


def test_lengths_may_be_measured_with_different_rows() -> None:
    """Long passes of many rows are not measured: they grow with the rows."""
    costs = [PassCost(1, 1, 1.0, 1), PassCost(2, 1, 1.5, 1), PassCost(4, 1, 2.0, 1), PassCost(1, 16, 10.0, 1)]
    assert CostProfile(costs).seconds(4, 16) == 40


def test_threads_are_those_of_the_nearest_size() -> None:
    profile = costs_of(lambda r, p: 1.0, rows=(1, 16), patches=(1, 64), threads=lambda r, p: 1 if r * p < 100 else 2)
    sizes = [(1, 1), (3, 1), (16, 1), (1, 64), (16, 64), (128, 64)]
    assert [profile.threads(*size) for size in sizes] == [1, 1, 1, 1, 2, 2]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variant", [{"image_size": 4}, {"layers_per_block": (1, 2, 1), "channels": 3}], ids=str)
def test_measured_sizes_cover_what_plans_ask_for(monkeypatch: pytest.MonkeyPatch, variant: dict[str, object]) -> None:
    # However busy the machine is, no pass counts as long.
    monkeypatch.setattr(costs_module, "LONG_SECONDS", 1e9)
    monkeypatch.setattr(costs_module, "REPEATS", 1)
    flow = tiny_flow(dtype=torch.float32, **variant)
    config: FlowConfig = flow.config
    profile = measure_costs(FlowKernel(flow), most_rows=3)
    lengths = {1, *segment_lengths(config.num_patches), config.num_patches}
    assert {(c.rows, c.patches) for c in profile.costs} == {(r, p) for r in (1, 2, 3) for p in lengths}
    assert all(c.seconds > 0 and c.threads in (1, 2) for c in profile.costs)
    assert torch.get_num_threads() == 2
    for segment in (1, *segment_lengths(config.num_patches)):
        for patches in range(1, segment + 1):
            assert profile.seconds(20, patches) > 0


@pytest.mark.usefixtures("two_threads")
def test_threads_are_restored_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BlockKernel, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_costs(FlowKernel(tiny_flow()), most_rows=2)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_long_passes_are_not_repeated_with_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs_module, "_seconds", lambda kernel, config, rows, patches, threads: 0.009 * rows * patches)
    profile = measure_costs(FlowKernel(tiny_flow()), most_rows=34)
    measured = {p: [c.rows for c in profile.costs if c.patches == p] for p in (1, 4, 8, 15, 16)}
    assert measured == {1: [1, 2, 4], 4: [1], 8: [1], 15: [1], 16: [1]}


@pytest.mark.usefixtures("two_threads")
def test_the_faster_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(kernel: BlockKernel, config: FlowConfig, rows: int, patches: int, threads: int) -> float:
        return 1e-4 * (threads if rows * patches < 16 else 1 / threads)

    monkeypatch.setattr(costs_module, "_seconds", seconds)
    for cost in measure_costs(FlowKernel(tiny_flow()), most_rows=4).costs:
        assert cost.threads == (1 if cost.rows * cost.patches < 16 else 2)


def test_what_is_timed_is_the_deepest_block_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step sees half of the sequence, which is what steps see on average."""
    flow = tiny_flow(layers_per_block=(1, 3, 2))
    calls = []
    run = BlockKernel.run

    def recording(kernel: BlockKernel, x: torch.Tensor, start: int, *rest: object) -> torch.Tensor:
        calls.append((len(kernel.layers), tuple(x.shape), start))
        assert isinstance(rest[-1], Memory)
        return run(kernel, x, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockKernel, "run", recording)
    measure_costs(FlowKernel(flow), most_rows=1)
    assert {layers for layers, _, _ in calls} == {3}
    assert {(shape[0], start) for _, shape, start in calls} == {(1, 7), (4, 6), (8, 4), (15, 0), (16, 0)}


def test_without_segments_only_steps_and_whole_sequences_are_measured() -> None:
    profile = measure_costs(FlowKernel(tiny_flow()), most_rows=2, segments=False)
    assert {cost.patches for cost in profile.costs} == {1, 16}


def test_most_rows_keep_a_pass_within_its_time() -> None:
    costs = CostProfile([PassCost(rows=r, patches=16, seconds=0.01 * r, threads=1) for r in (1, 2, 4)])
    assert costs.most_rows(0.085, 16, passes=2, most=64) == 4
    assert costs.most_rows(0.085, 16, passes=2, most=3) == 3
    assert costs.most_rows(0.001, 16, passes=2, most=64) == 1
