"""What one upload of normal images may hold altogether: images, members of its archives, and pixels."""

from __future__ import annotations

import io
from pathlib import Path

import anyio
import pytest
from starlette.requests import Request
from starlette.types import Message

from model.bundle import find_bundles
from service.api import normals as normals_module
from service.api.forms import FormFile
from service.api.normals import Normals, read_normals
from service.archives import Section
from service.errors import InvalidRequest
from service.jobs import ModelInfo
from service.settings import Settings
from tests.service.api.test_calibrations import COUNT, Files, archive, files, normals

pytestmark = pytest.mark.anyio
SIZE = 64
"""Pixels of an image."""


async def read(models: Path, sent: Files, **changes: int) -> Normals:
    [bundle] = [bundle for bundle in find_bundles(models) if bundle.name == "tiny-uncond"]

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError("it sleeps forever")

    request = Request({"type": "http", "headers": []}, receive)
    spooled = [FormFile(field, name, Section(io.BytesIO(data), 0, len(data))) for field, (name, data) in sent]
    settings = Settings.model_validate(changes)
    return await read_normals(request, spooled, ModelInfo.of(bundle), settings, anyio.CapacityLimiter(1))


async def refused(models: Path, sent: Files, **changes: int) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await read(models, sent, **changes)
    return caught.value


async def test_the_pixels_of_all_images_have_a_limit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is blamed for what the others used up; one that is too large by itself still is."""
    monkeypatch.setattr(normals_module, "PIXELS_OF_A_CALIBRATION", COUNT)
    assert len((await read(models, files(), max_pixels=SIZE)).pixels) == COUNT
    for sent, place in (
        ([*files(), *files(1)], f"files.{COUNT} (0.png)"),
        ([("files", ("a.zip", archive(normals()))), *files(1)], "files.1 (0.png)"),
    ):
        error = await refused(models, sent, max_pixels=SIZE)
        assert (error.code, error.param) == ("too_many_pixels", "files")
        assert f"may have together, {COUNT * SIZE:,}, are used up: {COUNT} of {COUNT + 1} images" in error.message
        assert f"{place} has 64; send fewer images, or reduce them first: the model sees 12x12" in error.message
    # Images that cannot be used are not among those that went in.
    bad = [("files", ("text.png", b"no image"))]
    error = await refused(models, [*bad, *files(), *files(1)], max_pixels=SIZE)
    assert f"{COUNT} of {COUNT + 2} images" in error.message
    error = await refused(models, [*files(), *bad], max_pixels=SIZE)
    assert (error.code, error.param) == ("invalid_image", f"files.{COUNT}")
    error = await refused(models, files(), max_pixels=SIZE - 1)
    assert (error.code, error.param) == ("image_too_large", "files.0")
    assert "at most 63 pixels" in error.message


async def test_all_archives_of_a_request_are_bounded_together(models: Path) -> None:
    """Also what is no image in them, and an archive of nothing else."""
    limits = {"max_calibration_images": COUNT, "max_calibration_bytes": 8192}
    junk = archive(dict.fromkeys(map(str, range(COUNT)), b""))
    three: Files = [("files", (f"{i}.zip", junk)) for i in range(3)]
    images = ("files", ("images.zip", archive(normals())))
    assert len((await read(models, [*three, images], **limits)).pixels) == COUNT
    error = await refused(models, [*three, images, ("files", ("last.zip", archive({"a": b""})))], **limits)
    assert (error.code, error.param) == ("archive_too_large", "files.4")
    assert error.message == (
        f"files.4 (last.zip): got 1 members after {4 * COUNT} in the archives before it, "
        f"allowed are {4 * COUNT} in all archives together"
    )
    error = await refused(models, [images, ("files", ("more.zip", archive(normals(1))))], **limits)
    assert (error.code, error.param) == ("archive_too_large", "files.1")
    assert f"got 1 images after {COUNT}" in error.message
    large = ("files", ("large.zip", archive({"video.mp4": bytes(40_000)})))
    error = await refused(models, [large, large, images], **limits)
    assert (error.code, error.param) == ("archive_too_large", "files.1")
    assert "got 40000 uncompressed bytes after 40000 in the archives before it, allowed are 65536" in error.message


async def test_many_archives_make_few_notices(models: Path) -> None:
    junk = archive({"a.txt": b"text", "b": b"text", "inner.zip": b"none"})
    sent = [*files(), *(("files", (f"{i}.zip", junk)) for i in range(9))]
    found = await read(models, sent)
    notices = dict(found.notices)
    assert len(found.notices) == len(notices) == 2
    assert notices["ignored_files"] == "18 files that are no images, in 0.zip, 1.zip, 2.zip, 3.zip, 4.zip, …"
    assert notices["nested_archive"].startswith(
        "archives inside are not opened: inner.zip in 0.zip, inner.zip in 1.zip"
    )
    assert notices["nested_archive"].endswith("inner.zip in 4.zip, …")
