"""The contract of both stores, over files and a real Redis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.bundle import read_bundle
from service.calibrations import CalibrationStore
from service.errors import Conflict, InternalError, InvalidRequest
from service.jobs import ModelInfo
from service.pending import Claim, Pending, PendingStore
from service.state import State
from service.stores import directory, redis
from tests.service.stores.conftest import Connect
from tests.service.test_calibrations import make

MOST = 100


@pytest.fixture(params=["files", "redis"])
def open_state(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], State]:
    """Whatever is opened has all that was kept before: files by the next process, a Redis by any."""
    if request.param == "redis":
        connect: Connect = request.getfixturevalue("connect")
        return connect
    return lambda: directory.state_in(tmp_path)


@pytest.fixture
def state(open_state: Callable[[], State]) -> State:
    """One of each kind."""
    return open_state()


def pending(name: str, model: str = "m", *, created: int = 1, num_images: int = 3) -> Pending:
    """A job with everything that is to be kept."""
    notices = (("duplicates", "two are alike"),)
    return Pending(
        model=model, name=name, seed=5, num_images=num_images, created=created, source="a.zip", notices=notices
    )


def images(count: int = 3, seed: int = 0, size: int = 4) -> NDArray[np.uint8]:
    """Pictures in colour."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def accept(store: PendingStore, job: Pending, *, replace: bool = False, most: int = MOST) -> Pending:
    """Have a job waiting, with the images of its seed."""
    store.write(job, images(job.num_images))
    store.place(job, replace=replace, most=most)
    return job


def claimed(store: PendingStore, *models: str) -> Claim:
    """The next run, which there must be."""
    claim = store.claim(models or ("m",))
    assert claim is not None
    return claim


# Finished calibrations.


def test_what_is_written_is_read_until_it_is_deleted(open_state: Callable[[], State]) -> None:
    files = open_state().calibrations
    assert files.names("m") == set()
    assert files.versions([("m", "a"), ("m", "b")]) == [None, None]
    assert files.read("m", "a") is None
    files.write("m", "a", b"\x00first")
    files.write("m", "b.c-d_1", b"other")
    files.write("m2", "a", b"of another model")
    others = open_state().calibrations
    found = others.read("m", "a")
    assert found is not None
    assert found[1] == b"\x00first"
    first, missing = others.versions([("m", "a"), ("m", "none")])
    assert (first, missing) == (found[0], None)
    assert others.names("m") == {"a", "b.c-d_1"}
    files.write("m", "a", b"second")
    assert others.versions([("m", "a")]) != [first]
    assert others.delete("m", "a")
    assert not files.delete("m", "a")
    assert files.versions([("m", "a")]) == [None]
    assert files.names("m") == {"b.c-d_1"}
    assert files.names("m2") == {"a"}


@pytest.fixture(scope="module")
def info(models: Path) -> ModelInfo:
    return replace(ModelInfo.of(read_bundle(models / "tiny-uncond")), calibration=None)


def test_a_calibration_is_parsed_once_a_version(info: ModelInfo, open_state: Callable[[], State]) -> None:
    files = open_state().calibrations
    store = CalibrationStore(files)
    assert list(store.entries(info)) == []
    files.write(info.name, "a", make(info, "a", 0).to_bytes())
    first = store.get(info, "a")
    assert store.get(info, "a") is first
    assert store.is_current(info, "a", first)
    assert [name for name, _ in store.list(info)] == ["a"]
    # Somebody else's doing is seen at once.
    open_state().calibrations.write(info.name, "a", make(info, "a", 1).to_bytes())
    second = store.get(info, "a")
    assert (second.sorted_scores["nll"] != first.sorted_scores["nll"]).any()
    assert not store.is_current(info, "a", first)
    assert store.forgotten() == []
    open_state().calibrations.delete(info.name, "a")
    with pytest.raises(InvalidRequest, match="there are none"):
        store.get(info, "a")
    assert store.entry(info, "a") is None
    assert not store.is_current(info, "a", second)
    assert store.forgotten() == [(info.name, "a")]
    assert store.forgotten() == []
    # What is deleted here needs no telling.
    files.write(info.name, "a", make(info, "a", 0).to_bytes())
    store.get(info, "a")
    assert store.delete(info, "a")
    assert not store.delete(info, "a")
    assert store.forgotten() == []


# Calibrations in the making.


def test_a_run_from_acceptance_to_its_calibration(state: State) -> None:
    store = state.pending
    assert store.find("m", "a") is None
    assert store.claim(["m"]) is None
    job = accept(store, pending("a"))
    run = store.find("m", "a")
    assert run is not None
    assert (run.pending, run.progress) == (job, 0.0)
    claim = claimed(store)
    assert (claim.pending, claim.crashes) == (job, 0)
    assert np.array_equal(store.images(claim), images())
    assert store.renew(claim, 2)
    [run] = store.runs("m")
    assert run.progress == pytest.approx(2 / 3)
    assert store.finish(claim, b"calibration")
    assert not store.renew(claim, 3)
    assert store.runs("m") == []
    found = state.calibrations.read("m", "a")
    assert found is not None
    assert found[1] == b"calibration"
    assert not store.remove("m", "a")


def test_many_images_come_back_as_they_were(state: State) -> None:
    """They are more than one chunk, and the last one is not full."""
    many = images(700, size=32)
    assert many.nbytes > 2 * redis.CHUNK_BYTES
    assert many.nbytes % redis.CHUNK_BYTES
    job = pending("a", num_images=700)
    state.pending.write(job, many)
    state.pending.place(job, replace=False, most=MOST)
    assert np.array_equal(state.pending.images(claimed(state.pending)), many)


def test_the_oldest_of_the_models_that_are_served_comes_first(state: State) -> None:
    store = state.pending
    for name, model in (("c", "n"), ("b", "m"), ("a", "m")):
        accept(store, pending(name, model))
    assert [run.pending.name for run in store.runs("m")] == ["a", "b"]
    assert store.claim([]) is None
    first = claimed(store, "m")
    assert first.pending.name == "b"
    store.release(first)
    assert claimed(store, "n", "m").pending.name == "c"


def test_what_is_released_is_begun_anew(state: State) -> None:
    store = state.pending
    accept(store, pending("a"))
    claim = claimed(store)
    assert store.renew(claim, 2)
    store.release(claim)
    again = claimed(store)
    assert (again.pending, again.crashes) == (claim.pending, 0)
    [run] = store.runs("m")
    assert run.done == 0
    assert store.finish(again, b"x")
    assert store.claim(["m"]) is None


@pytest.mark.parametrize("how", ["delete", "replace"])
def test_what_was_deleted_or_replaced_comes_to_nothing(state: State, how: str) -> None:
    store = state.pending
    accept(store, pending("a"))
    claim = claimed(store)
    if how == "delete":
        assert store.remove("m", "a")
        assert not store.remove("m", "a")
    else:
        other = accept(store, pending("a", created=2), replace=True)
    assert not store.renew(claim, 1)
    store.fail(claim, InternalError("late"))
    store.interrupt(claim, InternalError("late"))
    store.release(claim)
    assert not store.finish(claim, b"late")
    assert state.calibrations.names("m") == set()
    if how == "delete":
        assert store.runs("m") == []
    else:
        [run] = store.runs("m")
        assert run.pending == other
        assert claimed(store).pending == other


def test_a_name_is_taken_by_what_is_made_and_by_what_is_finished(state: State) -> None:
    store = state.pending
    store.check("m", "a", replace=False, most=MOST)
    accept(store, pending("a"))
    with pytest.raises(Conflict, match="in the making") as caught:
        store.check("m", "a", replace=False, most=MOST)
    assert caught.value.code == "calibration_exists"
    late = pending("a", created=2)
    store.write(late, images())
    with pytest.raises(Conflict, match="in the making"):
        store.place(late, replace=False, most=MOST)
    store.check("m", "a", replace=True, most=MOST)
    store.check("n", "a", replace=False, most=MOST)
    assert store.finish(claimed(store), b"x")
    with pytest.raises(Conflict, match="has a calibration 'a'; delete"):
        store.check("m", "a", replace=False, most=MOST)
    assert store.runs("m") == []


def test_there_is_a_most_of_names(state: State) -> None:
    store = state.pending
    state.calibrations.write("m", "finished", b"x")
    state.calibrations.write("n", "of another model", b"x")
    accept(store, pending("finished"), replace=True, most=1)
    accept(store, pending("a"), most=2)
    for replaced in (False, True):
        with pytest.raises(Conflict, match="allowed are 2") as caught:
            store.check("m", "b", replace=replaced, most=2)
        assert caught.value.code == "too_many_calibrations"
    store.check("m", "a", replace=True, most=2)
    store.check("n", "b", replace=False, most=2)


def test_a_failure_stays_and_frees_the_name(open_state: Callable[[], State]) -> None:
    state = open_state()
    store = state.pending
    job = accept(store, pending("a"))
    store.fail(claimed(store), InternalError("no calibration of these", code="calibration_failed"))
    for each in (store, open_state().pending):
        each.open()
        [run] = each.runs("m")
        assert run.pending == replace(job, error=("calibration_failed", "no calibration of these"))
        assert each.claim(["m"]) is None
    again = accept(store, pending("a", created=2))
    assert claimed(store).pending == again


def test_what_was_interrupted_goes_on_when_a_process_starts(open_state: Callable[[], State]) -> None:
    store = open_state().pending
    job = accept(store, pending("a"))
    store.interrupt(claimed(store), InternalError("a worker was lost", code="worker_lost"))
    run = store.find("m", "a")
    assert run is not None
    assert run.pending.error == ("worker_lost", "a worker was lost")
    assert store.claim(["m"]) is None
    later = open_state().pending
    later.open()
    claim = claimed(later)
    assert (claim.pending, claim.crashes) == (job, 0)
    assert np.array_equal(later.images(claim), images())
