"""Models come and go while a worker works, within its budget of memory."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import BundleError, read_bundle
from model.config import FlowConfig
from model.flow import Flow
from model.weights import load_flow, write_bundle
from service.broker.base import Command
from service.worker.loading import weight_bytes
from service.worker.models import BudgetError, Models, find_bundle, load_models
from tests.service.worker.benches import PATIENCE, Bench, bench_of, decode, hold, score, until

pytestmark = pytest.mark.anyio
CPU = torch.device("cpu")


@pytest.fixture
def directory(models: Path, tmp_path: Path) -> Path:
    """A directory of bundles that a test may change: tiny-cond and tiny-vp."""
    directory = tmp_path / "models"
    for name in ("tiny-cond", "tiny-vp"):
        shutil.copytree(models / name, directory / name)
    return directory


def one(directory: Path, name: str = "tiny-vp", memory_bytes: int = 0) -> Models:
    """Only one of the models is loaded yet."""
    loaded = load_models(directory / name, CPU, batch_rows=2)
    return Models(CPU, dict(loaded), directory=directory, batch_rows=2, memory_bytes=memory_bytes)


def new_version(directory: Path, name: str = "tiny-vp") -> str:
    """Write other weights under the same name; returns the new model's id."""
    bundle = read_bundle(directory / name)
    flow = load_flow(bundle)
    for block in flow.blocks:
        block.proj_out.weight.mul_(1.5)
    return write_bundle(directory / name, bundle.config, flow, bundle.sampling, bundle.card).model_id


@pytest.fixture
async def bench(directory: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_of(one(directory), tmp_path) as bench:
        yield bench


async def states(bench: Bench) -> dict[str, str]:
    """As the broker has heard it."""
    [worker] = await bench.broker.workers()
    return dict(worker.info.states)


async def reach(bench: Bench, wanted: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """Wait until the broker has heard of states as wanted."""
    for _ in range(PATIENCE * 100):
        if wanted(await states(bench)):
            return await states(bench)
        await asyncio.sleep(0.01)
    raise TimeoutError


async def test_a_model_is_loaded_while_others_serve(bench: Bench) -> None:
    assert await states(bench) == {"tiny-vp": "ready"}
    bench.start()
    await bench.broker.command(Command(action="load", model="tiny-cond"))
    number = 0
    while (await states(bench)).get("tiny-cond") != "ready":
        await bench.submit(score(f"meanwhile-{number}"))
        await bench.arrays(f"meanwhile-{number}")
        number += 1
    assert number > 1
    [worker] = await bench.broker.workers()
    assert [info.name for info in worker.info.models] == ["tiny-cond", "tiny-vp"]
    job = score("new", size=16, model="tiny-cond")
    job.payload["pixels"].resize((1, 3, 16, 16), refcheck=False)
    await bench.submit(job)
    assert np.isfinite((await bench.arrays("new"))["log_likelihood"]).all()
    assert bench.counted("tarflow_loaded_models") == 2
    assert bench.counted("tarflow_model_load_seconds", model="tiny-cond") > 0


async def test_running_jobs_end_with_the_version_they_began_with(bench: Bench, directory: Path) -> None:
    await bench.submit(decode("before"))
    bench.start()
    before = (await bench.arrays("before"))["images"]
    go_on = hold(bench)
    await bench.submit(decode("during"))
    await until(lambda: bench.engine._long.jobs)
    old, wanted = bench.engine._models["tiny-vp"], new_version(directory)
    await bench.broker.command(Command(action="load", model="tiny-vp"))
    await until(lambda: bench.engine._models["tiny-vp"] is not old)
    assert [job.id for job in bench.engine._long.jobs] == ["during"]
    go_on()
    await bench.submit(decode("after"))
    during, after = (await bench.arrays("during"))["images"], (await bench.arrays("after"))["images"]
    np.testing.assert_allclose(during, before, atol=1e-5)
    assert np.abs(after - before).max() > 1e-2
    [worker] = await bench.broker.workers()
    assert worker.info.models[0].model_id == wanted
    await until(lambda: not bench.engine._models.changing)


async def test_a_failed_load_leaves_the_old_version_serving(bench: Bench, directory: Path) -> None:
    weights = directory / "tiny-vp" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    bench.start()
    await bench.broker.command(Command(action="load", model="tiny-vp"))
    told = await reach(bench, lambda states: states["tiny-vp"].startswith("failed"))
    assert "model.safetensors" in told["tiny-vp"]
    assert "still serves" in told["tiny-vp"]
    await bench.submit(score("a"))
    assert (await bench.arrays("a"))["log_likelihood"].size


async def test_a_model_that_is_not_there_fails_with_the_reason(bench: Bench) -> None:
    bench.start()
    await bench.broker.command(Command(action="load", model="unheard-of"))
    told = await reach(bench, lambda states: states.get("unheard-of", "").startswith("failed"))
    assert "no bundle named 'unheard-of'" in told["unheard-of"]


async def test_weights_that_give_no_finite_values_do_not_serve(bench: Bench, directory: Path) -> None:
    bundle = read_bundle(directory / "tiny-cond")
    flow = load_flow(bundle)
    flow.blocks[0].proj_out.weight.fill_(3e38)
    write_bundle(directory / "tiny-cond", bundle.config, flow, bundle.sampling, bundle.card)
    bench.start()
    await bench.broker.command(Command(action="load", model="tiny-cond"))
    told = await reach(bench, lambda states: states.get("tiny-cond", "").startswith("failed"))
    assert "not finite" in told["tiny-cond"]
    assert "tiny-cond" not in bench.engine._models


async def test_unloading_waits_for_running_jobs_and_then_frees_the_model(bench: Bench) -> None:
    go_on = hold(bench)
    await bench.submit(decode("running"))
    bench.start()
    await until(lambda: bench.engine._long.jobs)
    await bench.broker.command(Command(action="unload", model="tiny-vp"))
    assert await reach(bench, lambda states: states.get("tiny-vp") != "ready") == {"tiny-vp": "unloading"}
    go_on()
    assert (await bench.arrays("running"))["finite"].tolist() == [1]
    assert await reach(bench, lambda states: not states) == {}
    assert bench.counted("tarflow_loaded_models") == 0
    # And it may come back.
    await bench.broker.command(Command(action="load", model="tiny-vp"))
    await reach(bench, lambda states: states.get("tiny-vp") == "ready")
    await bench.submit(score("a"))
    assert (await bench.arrays("a"))["log_likelihood"].size


async def test_what_does_not_fit_the_budget_is_refused(directory: Path, tmp_path: Path) -> None:
    small, large = (weight_bytes(read_bundle(directory / name).config.flow) for name in ("tiny-vp", "tiny-cond"))
    assert small < large
    async with bench_of(one(directory, memory_bytes=small + large - 1), tmp_path) as bench:
        bench.start()
        await bench.broker.command(Command(action="load", model="tiny-cond"))
        told = await reach(bench, lambda states: states.get("tiny-cond", "").startswith("failed"))
        assert "does not fit" in told["tiny-cond"]
        assert told["tiny-vp"] == "ready"
        await bench.broker.command(Command(action="unload", model="tiny-vp"))
        await bench.broker.command(Command(action="load", model="tiny-cond"))
        assert await reach(bench, lambda states: states.get("tiny-cond") == "ready") == {"tiny-cond": "ready"}


def test_at_the_start_models_are_loaded_by_name_as_long_as_they_fit(directory: Path) -> None:
    small, large = (weight_bytes(read_bundle(directory / name).config.flow) for name in ("tiny-vp", "tiny-cond"))
    assert list(load_models(directory, CPU, 2)) == ["tiny-cond", "tiny-vp"]
    loaded = load_models(directory, CPU, 2, memory_bytes=large)
    assert list(loaded) == ["tiny-cond"]
    assert loaded.states["tiny-cond"] == "ready"
    assert "does not fit" in loaded.states["tiny-vp"]
    # One that is too large keeps none out that comes after it.
    assert list(load_models(directory, CPU, 2, memory_bytes=small)) == ["tiny-vp"]
    with pytest.raises(BudgetError, match="does not fit"):
        load_models(directory, CPU, 2, memory_bytes=small - 1)


def test_the_memory_of_weights_is_known_before_they_are_there(directory: Path) -> None:
    config: FlowConfig = read_bundle(directory / "tiny-vp").config.flow
    flow = Flow(config)
    assert weight_bytes(config) == sum(t.numel() * t.element_size() for t in [*flow.parameters(), *flow.buffers()])


def test_a_bundle_is_found_beside_damaged_ones(directory: Path) -> None:
    (directory / "tiny-cond" / "config.json").write_text("{")
    assert find_bundle(directory, "tiny-vp").name == "tiny-vp"
    assert find_bundle(directory / "tiny-vp", "tiny-vp").name == "tiny-vp"
    with pytest.raises(BundleError, match=r"no bundle named 'tiny-cond'.*config\.json"):
        find_bundle(directory, "tiny-cond")
    shutil.copytree(directory / "tiny-vp", directory / "copy")
    with pytest.raises(BundleError, match="both are named"):
        find_bundle(directory, "tiny-vp")
