"""/v1/calibrations over a real server: normal images in, a calibration out, and every way to get it wrong."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from model.anomaly.calibration import FEWEST_NORMALS
from tests.service.pictures import bomb, file, pixels
from tests.service.processes import wait_until

COUNT = 24
PATH = "/v1/calibrations"
MODEL = {"model": "tiny-uncond"}

Files = list[tuple[str, tuple[str, bytes]]]


def normal(seed: int) -> bytes:
    """A picture of a family: a random 8 × 8 one around a common brightness."""
    return file((pixels(8, 1, seed) // 4 + 60).astype(np.uint8))


def files(count: int = COUNT) -> Files:
    return [("files", (f"{i}.png", normal(i))) for i in range(count)]


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


def normals(count: int = COUNT) -> dict[str, bytes]:
    return {f"folder/{i}.png": normal(i) for i in range(count)}


def zipped(members: dict[str, bytes], name: str = "normal.zip") -> Files:
    return [("files", (name, archive(members)))]


def post(client: httpx.Client, name: str, sent: Files, **fields: Any) -> httpx.Response:
    return client.post(PATH, files=sent, data={"name": name, **MODEL, **fields})


def refused(response: httpx.Response, status: int = 422) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()["error"]
    return error


def finished(client: httpx.Client, name: str) -> dict[str, Any]:
    """The calibration, once nothing works on it any more."""
    wait_until(
        lambda: client.get(f"{PATH}/{name}", params=MODEL).json()["status"] != "running", f"{name} is calibrated"
    )
    answer: dict[str, Any] = client.get(f"{PATH}/{name}", params=MODEL).json()
    return answer


def made(client: httpx.Client) -> list[dict[str, Any]]:
    """What is listed beside the bundle's own, which comes first."""
    own, *others = client.get(PATH, params=MODEL).json()["data"]
    assert (own["name"], own["status"], own["usable"]) == ("default", "ready", True)
    return others


@pytest.fixture
def clean(client: httpx.Client) -> Iterator[httpx.Client]:
    """The session's server, with no calibration left behind."""
    yield client
    for item in made(client):
        assert client.delete(f"{PATH}/{item['name']}", params=MODEL).status_code == 204


def test_normal_images_become_a_calibration(clean: httpx.Client) -> None:
    response = post(clean, "mine", files(), seed=5)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"{PATH}/mine?model=tiny-uncond"
    accepted = response.json()
    assert (accepted["object"], accepted["id"], accepted["num_images"]) == ("calibration", "mine", COUNT)
    assert accepted["status"] == "running"
    assert not accepted["usable"]
    assert accepted["reason"]
    clean.get(response.headers["location"]).raise_for_status()
    found = finished(clean, "mine")
    assert (found["status"], found["usable"], found["reason"], found["progress"]) == ("ready", True, None, 1.0)
    record = found["record"]
    assert (record["num_fit"], record["num_calibration"], record["seed"]) == (COUNT // 2, COUNT // 2, 5)
    assert record["smallest_alpha"] == pytest.approx(1 / (COUNT // 2 + 1))
    assert record["default_alpha"] == record["smallest_alpha"]
    assert record["codecs_match"]
    assert record["noise"]["kind"] == "gaussian"
    assert record["source"] == f"{COUNT} uploaded files"
    for score in found["scores"].values():
        assert sum(score["histogram"]["counts"]) == COUNT // 2
        assert len(score["histogram"]["edges"]) == len(score["histogram"]["counts"]) + 1
        [at] = score["thresholds"]
        assert at["alpha"] == 0.1
        low, high = at["false_positive_rate"]
        assert 0 < low < 0.1 < high < 1
    assert {"combined", "nll", "gradient"} <= found["scores"].keys()
    [listed] = made(clean)
    assert (listed["name"], listed["status"]) == ("mine", "ready")


def test_an_archive_gives_what_its_files_give(clean: httpx.Client) -> None:
    members = normals()
    junk = {
        "__MACOSX/folder/._0.png": b"attributes",
        "folder/.hidden.png": b"no image",
        "folder/notes.txt": b"text",
        "inner.zip": archive(normals()),
    }
    response = post(clean, "zipped", zipped({**junk, **members}))
    assert response.status_code == 202, response.text
    codes = {notice["code"]: notice["message"] for notice in response.json()["warnings"]}
    assert codes.keys() == {"nested_archive", "ignored_files"}
    assert "inner.zip" in codes["nested_archive"]
    assert post(clean, "single", files()).status_code == 202
    first, second = finished(clean, "zipped"), finished(clean, "single")
    assert first["num_images"] == COUNT
    assert first["scores"] == second["scores"]
    assert first["record"]["source"] == "normal.zip"
    # The bytes tell that it is an archive, whatever its name is; both kinds may come together.
    mixed = [*zipped(normals(12), "upload.bin"), *files()[12:]]
    assert post(clean, "mixed", mixed).json()["num_images"] == 24
    assert finished(clean, "mixed")["record"]["source"] == "12 uploaded files; upload.bin"


def test_a_name_that_is_taken_is_409(clean: httpx.Client) -> None:
    post(clean, "taken", files())
    before = finished(clean, "taken")
    for _ in range(2):
        error = refused(post(clean, "taken", files(), seed=1), 409)
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error",
            "calibration_exists",
            "name",
        )
        assert "replace=true" in error["message"]
    assert post(clean, "taken", files(), seed=1, replace="true").status_code == 202
    after = finished(clean, "taken")
    assert after["record"]["seed"] == 1
    assert after["scores"] != before["scores"]


def test_deleting(clean: httpx.Client) -> None:
    post(clean, "brief", files())
    finished(clean, "brief")
    assert clean.delete(f"{PATH}/brief", params=MODEL).status_code == 204
    for method in ("GET", "DELETE"):
        error = refused(clean.request(method, f"{PATH}/brief", params=MODEL), 404)
        assert error["code"] == "calibration_not_found"
    assert made(clean) == []
    assert refused(clean.delete(f"{PATH}/default", params=MODEL))["param"] == "calibration"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "a b", "ä", "x" * 101, "default", ".pending", "\0"])
def test_a_bad_name(client: httpx.Client, name: str) -> None:
    assert refused(post(client, name, files(1)))["param"] == "name"


def test_fields_are_checked(client: httpx.Client) -> None:
    sent = files(1)
    assert refused(client.post(PATH, files=sent))["code"] == "missing_field"
    assert refused(post(client, "n", sent, seed="-1"))["param"] == "seed"
    assert refused(post(client, "n", sent, replace="1"))["param"] == "replace"
    assert refused(post(client, "n", sent, sed="1"))["code"] == "unknown_field"
    assert refused(post(client, "n", sent, model="nobody"), 404)["param"] == "model"
    assert refused(client.get(PATH, params={"model": "nobody"}), 404)["param"] == "model"
    assert refused(post(client, "n", [("pictures", ("a.png", normal(0)))]))["param"] == "pictures"
    assert refused(post(client, "n", [], files="@a.png"), 400)["code"] == "unsupported_content_type"
    assert refused(client.post(PATH, json={"name": "n"}), 400)["code"] == "unsupported_content_type"
    text_only = [("name", (None, b"n")), ("files", (None, b"@a.png"))]
    assert refused(client.post(PATH, files=text_only))["param"] == "files"
    assert refused(client.post(PATH, files=[("name", (None, b"n"))]))["code"] == "missing_field"
    twice = [("name", (None, b"n")), ("name", (None, b"m")), *sent]
    assert refused(client.post(PATH, files=twice))["param"] == "name"


@pytest.mark.parametrize(
    "content", [b"", b"--x", b"no form", b"--x\r\n\r\ntext\r\n--x--\r\n", b"--x\r\n" + b"a" * 9999]
)
def test_a_broken_form(client: httpx.Client, content: bytes) -> None:
    response = client.post(PATH, content=content, headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("count", [1, FEWEST_NORMALS - 1])
def test_too_few_images(client: httpx.Client, count: int) -> None:
    for sent in (files(count), zipped(normals(count))):
        error = refused(post(client, "few", sent))
        assert (error["param"], error["code"]) == ("files", "invalid_count")
        assert f"got {count} images" in error["message"]
        assert str(FEWEST_NORMALS) in error["message"]


def test_exact_copies_count_once_and_their_number_is_told(clean: httpx.Client) -> None:
    # Among the files, and between them and an archive.
    sent = [*files(), *files(3), *zipped(normals(5))]
    accepted = post(clean, "copied", sent)
    assert accepted.status_code == 202, accepted.text
    assert accepted.json()["num_images"] == COUNT
    [warning] = accepted.json()["warnings"]
    assert warning["code"] == "duplicates"
    assert warning["message"] == "8 of 32 images are exact copies of others and were left out"
    found = finished(clean, "copied")
    assert (found["status"], found["num_images"]) == ("ready", COUNT)
    assert found["record"]["source"] == f"{COUNT + 3} uploaded files; normal.zip; without 8 copies"
    assert post(clean, "plain", files()).json()["warnings"] == []
    assert finished(clean, "plain")["scores"].keys() == found["scores"].keys()
    error = refused(post(clean, "few", [*files(FEWEST_NORMALS - 1), *files(3)]))
    assert (error["param"], error["code"]) == ("files", "invalid_count")
    assert "got 19 different images, allowed are 20 and more: 3 of 22 images are exact copies" in error["message"]


def test_every_bad_image_is_named(client: httpx.Client) -> None:
    sent = files()
    for index in (3, 7):
        sent[index] = ("files", (f"bad-{index}.png", b"no image"))
    sent[9] = ("files", ("empty.png", b""))
    error = refused(post(client, "bad", sent))
    assert (error["param"], error["code"]) == ("files.3", "invalid_image")
    assert all(name in error["message"] for name in ("bad-3.png", "bad-7.png", "empty.png", "files.9", "3 images"))
    members = normals() | {"deep/er/bad.png": b"no image", "bomb.png": bomb(7072)}
    error = refused(post(client, "bad", zipped(members)))
    assert (error["param"], error["code"]) == ("deep/er/bad.png", "invalid_image")
    assert "normal.zip" in error["message"]
    assert "bomb.png" in error["message"]


def test_a_folder_of_bad_images_is_a_short_error(client: httpx.Client) -> None:
    error = refused(post(client, "bad", zipped({f"{i:03}.png": b"no image" for i in range(200)})))
    assert "20 images (and perhaps more)" in error["message"]
    assert "019.png" in error["message"]
    assert "020.png" not in error["message"]


def test_an_archive_that_expands_too_far(client: httpx.Client) -> None:
    zeros = bytes(40 * 2**20)
    error = refused(post(client, "bomb", zipped(normals() | {"bomb.png": zeros})))
    assert (error["param"], error["code"]) == ("bomb.png", "image_too_large")


def test_a_body_that_was_cut_off(client: httpx.Client) -> None:
    request = client.build_request("POST", PATH, files=files(), data={"name": "cut", **MODEL})
    whole = request.read()
    for size in (len(whole) - 4, len(whole) // 2):
        headers = {"content-type": request.headers["content-type"]}
        error = refused(client.post(PATH, content=whole[:size], headers=headers), 400)
        assert error["code"] == "malformed_body"
        assert "ends before its closing boundary" in error["message"]
    assert made(client) == []


def test_damaged_and_encrypted_archives(client: httpx.Client) -> None:
    good = archive(normals(), zipfile.ZIP_STORED)
    for damaged in (good[: len(good) // 2], b"PK\x03\x04" + bytes(100), b"text"):
        error = refused(post(client, "bad", [("files", ("a.zip", damaged))]))
        assert (error["param"], error["code"]) == ("files.0", "invalid_archive")
        assert "a.zip" in error["message"]
    # A byte within the first member's data: its checksum does not fit.
    place = good.index(b"IDAT") + 8
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    error = refused(post(client, "bad", [("files", ("a.zip", flipped))]))
    assert (error["param"], error["code"]) == ("folder/0.png", "invalid_archive")
    marked = bytearray(good)
    marked[marked.index(b"PK\x01\x02") + 8] |= 1
    error = refused(post(client, "bad", [("files", ("a.zip", bytes(marked)))]))
    assert (error["param"], error["code"]) == ("folder/0.png", "encrypted_archive")
    error = refused(post(client, "bad", [("files", ("a.zip", archive(normals(), zipfile.ZIP_BZIP2)))]))
    assert (error["param"], error["code"]) == ("folder/0.png", "unsupported_archive")
    assert made(client) == []
