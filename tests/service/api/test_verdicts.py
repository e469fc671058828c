"""POST /v1/score with verdicts, by the calibration of tiny-uncond."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.anomaly.calibration import Calibration
from model.anomaly.conformal import benjamini_hochberg, exceedance_interval, false_positive_interval
from model.bundle import read_bundle
from service.api.overlay import TOP
from tests.service.conftest import calibrated
from tests.service.pictures import Pixels, b64, file, normal, opened, pixels
from tests.service.processes import ServerProcess

MODEL, SIZE = "tiny-uncond", 12
DEFECT = (7, 2, 4, 4)
VERDICT = ("is_anomaly", "p_value", "score", "threshold", "alpha", "expected_false_positive_rate", "direction")
NEW = normal(40, SIZE, seed=9)


def planted(image: Pixels, box: tuple[int, int, int, int] = DEFECT) -> Pixels:
    x, y, width, height = box
    changed = image.copy()
    changed[y : y + height, x : x + width] = 255
    return changed


def post(client: httpx.Client, images: list[Pixels], **body: Any) -> dict[str, Any]:
    sent = {"model": MODEL, "images": [b64(file(image)) for image in images], **body}
    response = client.post("/v1/score", json=sent)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def refused(client: httpx.Client, **body: Any) -> dict[str, Any]:
    # What is no image shows that nothing was done yet: it would be refused too.
    response = client.post("/v1/score", json={"model": MODEL, "images": ["aGk="], **body})
    assert response.status_code == 422, response.text
    return response.json()["error"]


@pytest.fixture(scope="module")
def calibration(models: Path) -> Calibration:
    data = read_bundle(models / MODEL).calibration
    assert data is not None
    return Calibration.from_bytes(data)


def test_without_being_asked_there_are_no_verdicts(client: httpx.Client) -> None:
    plain = post(client, list(NEW[:2]), draws=2)
    assert (plain["calibration"], plain["correction"]) == (None, None)
    for image in plain["images"]:
        assert all(image[name] is None for name in (*VERDICT, "features", "map", "regions"))
    asked = post(client, list(NEW[:2]), draws=2, alpha=0.1)
    for one, other in zip(plain["images"], asked["images"], strict=True):
        assert {name: one[name] for name in ("log_likelihood", "bits_per_dim", "protocol", "warnings")} == {
            name: other[name] for name in ("log_likelihood", "bits_per_dim", "protocol", "warnings")
        }


@pytest.mark.parametrize("asked", [{"alpha": None}, {"maps": "none"}, {"score": "combined"}, {"calibration": None}])
def test_any_field_about_verdicts_asks_for_them(client: httpx.Client, asked: dict[str, Any]) -> None:
    answer = post(client, [NEW[0]], **asked)
    assert answer["calibration"] == {"name": "default", "num_calibration": 100, "score": "combined"}
    assert answer["correction"] == "none"
    [image] = answer["images"]
    assert all(image[name] is not None for name in VERDICT)
    assert image["alpha"] == 0.01
    assert (image["map"], image["regions"]) == (None, None)
    assert "gradient" not in image["features"]


def test_forms_say_the_same(client: httpx.Client) -> None:
    [expected] = post(client, [NEW[3]], alpha=0.2, score="nll", maps="array", calibration="default")["images"]
    data = {"model": MODEL, "alpha": "0.2", "score": "nll", "maps": "array", "calibration": "default"}
    response = client.post("/v1/score", data=data, files={"files": ("a.png", file(NEW[3]))})
    [sent] = response.json()["images"]
    assert {**sent, "filename": None} == expected


def test_normal_images_are_flagged_about_as_often_as_asked(client: httpx.Client) -> None:
    images = post(client, list(NEW), alpha=0.2)["images"]
    assert sum(image["is_anomaly"] for image in images) <= 20
    assert {image["is_anomaly"] == (image["p_value"] <= 0.2) for image in images} == {True}
    assert {image["is_anomaly"] == (image["score"] > image["threshold"]) for image in images} == {True}
    low, high = false_positive_interval(0.2, 100)
    assert images[0]["expected_false_positive_rate"] == pytest.approx({"low": low, "high": high})


@pytest.mark.parametrize("score", ["combined", "nll", "typicality", "complexity", "latent", "gradient", "max_patch"])
def test_every_score_can_decide(client: httpx.Client, calibration: Calibration, score: str) -> None:
    answer = post(client, [*NEW[:4], planted(NEW[4])], score=score, alpha=0.1)
    assert answer["calibration"]["score"] == score
    for image in answer["images"]:
        assert image["score"] == image["features"][score]
        at_least = int((calibration.sorted_scores[score] >= image["score"]).sum())
        assert image["p_value"] == pytest.approx((1 + at_least) / 101)
        assert ("gradient" in image["features"]) == (score == "gradient")


def test_a_threshold_is_a_level_too(client: httpx.Client) -> None:
    by_alpha = post(client, list(NEW[:12]), alpha=0.3)["images"]
    by_threshold = post(client, list(NEW[:12]), threshold=by_alpha[0]["threshold"])["images"]
    assert [image["is_anomaly"] for image in by_threshold] == [image["is_anomaly"] for image in by_alpha]
    # 30/101 is the largest p-value up to 0.3.
    assert by_threshold[0]["alpha"] == pytest.approx(30 / 101)
    # A threshold of the caller's own: 29 of 100 scores above it are a binomial count.
    low, high = exceedance_interval(29, 100)
    assert by_threshold[0]["expected_false_positive_rate"] == pytest.approx({"low": low, "high": high})
    [everything] = post(client, [NEW[0]], threshold=-1e9)["images"]
    assert (everything["is_anomaly"], everything["alpha"]) == (True, 1.0)
    assert 0.9 < everything["expected_false_positive_rate"]["low"] < everything["expected_false_positive_rate"]["high"]
    [nothing] = post(client, [planted(NEW[0])], threshold=1e9)["images"]
    assert nothing["is_anomaly"] is False


def test_benjamini_hochberg_decides_about_the_request(client: httpx.Client) -> None:
    images = [*NEW[:6], *(planted(image) for image in NEW[6:12])]
    answer = post(client, images, alpha=0.1, correction="benjamini_hochberg")
    assert answer["correction"] == "benjamini_hochberg"
    p_values = np.array([image["p_value"] for image in answer["images"]])
    flagged = [image["is_anomaly"] for image in answer["images"]]
    assert flagged == benjamini_hochberg(p_values, 0.1).tolist()
    assert any(flagged)
    assert not all(flagged)
    assert {image["threshold"] for image in answer["images"]} == {None}
    assert {image["expected_false_positive_rate"] for image in answer["images"]} == {None}


def _array(value: dict[str, Any]) -> Pixels:
    return np.frombuffer(base64.b64decode(value["b64"]), "<f4").reshape(value["shape"])


def test_a_defect_is_found_where_it_is(client: httpx.Client, calibration: Calibration) -> None:
    [image] = post(client, [planted(NEW[5])], maps="array")["images"]
    assert (image["is_anomaly"], image["direction"]) == (True, "too_unlikely")
    values = _array(image["map"])
    assert values.shape == (SIZE, SIZE)
    threshold = calibration.maps.threshold
    assert image["map"]["scale"] == pytest.approx({"threshold": threshold, "top": TOP * threshold})
    x, y, width, height = DEFECT
    peak = np.unravel_index(values.argmax(), values.shape)
    assert y - 1 <= peak[0] <= y + height
    assert x - 1 <= peak[1] <= x + width
    first = image["regions"][0]
    assert first["peak"] == pytest.approx(values.max())
    assert first["bbox"] == first["bbox_original"]
    left, top, wide, high = first["bbox"]
    assert min(left + wide, x + width) - max(left, x) >= 2
    assert min(top + high, y + height) - max(top, y) >= 2
    assert sum(region["area"] for region in image["regions"]) == (values > np.float32(threshold)).sum()


def test_boxes_are_also_told_in_pixels_of_the_upload(client: httpx.Client) -> None:
    large = planted(NEW[5]).repeat(5, axis=0).repeat(5, axis=1)
    wide = np.full((60, 100), 90, np.uint8)
    wide[:, 20:80] = large
    [image] = post(client, [wide], maps="array")["images"]
    assert [warning["code"] for warning in image["warnings"]] == ["resized"]
    for region in image["regions"]:
        x, y, width, height = region["bbox"]
        assert region["bbox_original"] == [20 + 5 * x, 5 * y, 5 * width, 5 * height]


@pytest.mark.parametrize("maps", ["png", "overlay"])
def test_pictures_are_enlarged_and_repeatable(client: httpx.Client, maps: str) -> None:
    once, again = (post(client, [planted(NEW[5])], maps=maps)["images"][0] for _ in range(2))
    assert once["map"] == again["map"]
    assert (once["map"]["format"], once["map"]["shape"]) == (maps, None)
    assert opened(once["map"]["b64"]).shape == (228, 228, 3)
    assert once["regions"]
    assert "gradient" in once["features"]


@pytest.mark.parametrize("maps", ["png", "overlay"])
def test_the_picture_itself_can_be_the_answer(client: httpx.Client, maps: str) -> None:
    images = [planted(NEW[5]), NEW[6]]
    sent = {"model": MODEL, "maps": maps, "alpha": 0.05, "images": [b64(file(image)) for image in images]}
    expected = post(client, images, maps=maps, alpha=0.05)["images"]
    for count, shape in ((1, (228, 228, 3)), (2, (228, 457, 3))):
        body = {**sent, "images": sent["images"][:count]}
        response = client.post("/v1/score", json=body, headers={"accept": "image/png"})
        assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
        shown = opened(response.content)
        assert shown.shape == shape
        told = ",".join("anomaly" if image["is_anomaly"] else "normal" for image in expected[:count])
        assert response.headers["x-tarflow-verdicts"] == told
    assert np.abs(shown[:, :228].astype(int) - opened(expected[0]["map"]["b64"])).max() <= 4
    assert "x-tarflow-warnings" not in response.headers
    large = {**sent, "images": [b64(file(pixels(20)))]}
    response = client.post("/v1/score", json=large, headers={"accept": "image/png"})
    assert response.headers["x-tarflow-warnings"] == "resized"
    response = client.post("/v1/score", json=sent, headers={"accept": "text/html"})
    assert (response.status_code, response.json()["error"]["code"]) == (406, "not_acceptable")
    # There is no picture of numbers.
    plain = {**sent, "maps": "array"}
    assert client.post("/v1/score", json=plain, headers={"accept": "image/png"}).json()["images"][0]["map"]["shape"]


def test_calibrations_go_by_name(client: httpx.Client, server: ServerProcess, models: Path) -> None:
    stored = [server.state / "calibrations" / name / "mine.safetensors" for name in (MODEL, "tiny-vp")]
    for path in stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(calibrated(models / MODEL, "mine", seed=5))
    try:
        mine, own = post(client, [NEW[0]], calibration="mine"), post(client, [NEW[0]], calibration="default")
        assert (mine["calibration"]["name"], own["calibration"]["name"]) == ("mine", "default")
        assert mine["images"][0]["threshold"] != own["images"][0]["threshold"]
        error = refused(client, calibration="mine", model="tiny-vp")
        assert (error["param"], error["code"]) == ("calibration", "calibration_mismatch")
    finally:
        for path in stored:
            path.unlink()


DEGENERATE = {
    "black": np.zeros((SIZE, SIZE), np.uint8),
    "white": np.full((SIZE, SIZE), 255, np.uint8),
    "one pixel": np.full((1, 1), 77, np.uint8),
    "noise": pixels(SIZE),
    "thin": np.full((1, 90), 77, np.uint8),
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_odd_images_get_finite_scores(client: httpx.Client, what: str) -> None:
    for maps in ("array", "png", "overlay"):
        [image] = post(client, [DEGENERATE[what]], maps=maps)["images"]
        assert all(value is not None and np.isfinite(value) for value in image["features"].values())
        assert 0 < image["p_value"] <= 1
        assert image["is_anomaly"] is True
    assert len(image["features"]) == 8


def test_the_same_image_gets_the_same_verdict_in_any_company(client: httpx.Client) -> None:
    together = post(client, list(NEW[:5]), alpha=0.1)["images"]
    [alone] = post(client, [NEW[2]], alpha=0.1, seed=77)["images"]
    # The noise of a verdict is the calibration's, whatever the seed of the likelihood.
    assert alone["score"] == pytest.approx(together[2]["score"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"alpha": 0.1, "threshold": 3}, "threshold", "invalid_value", "beside alpha 0.1"),
        ({"alpha": 0.001}, "alpha", "alpha_too_small", "with 100 calibration images"),
        ({"alpha": 0}, "alpha", None, "greater than 0"),
        ({"alpha": 1}, "alpha", None, "less than 1"),
        ({"alpha": "much"}, "alpha", None, "number"),
        ({"threshold": True}, "threshold", None, "number"),
        ({"score": "vibes"}, "score", None, "'max_patch'"),
        ({"maps": "gif"}, "maps", None, "'overlay'"),
        ({"correction": "bonferroni"}, "correction", None, "'benjamini_hochberg'"),
        ({"correction": "benjamini_hochberg", "threshold": 3}, "correction", "invalid_value", "level alpha"),
        ({"calibration": "nobody"}, "calibration", "calibration_not_found", "'default'"),
        ({"calibration": "../x"}, "calibration", "invalid_value", "characters"),
        ({"calibration": 3}, "calibration", None, "string"),
        ({"model": "tiny-vp", "alpha": 0.1}, "calibration", "no_calibration", "comes without one"),
    ],
)
def test_refusals_name_the_field(
    client: httpx.Client, body: dict[str, Any], param: str, code: str | None, words: str
) -> None:
    error = refused(client, **body)
    assert error["param"] == param
    assert words in error["message"], error
    assert code in (None, error["code"])


def test_verdicts_are_watched_for_drift(client: httpx.Client) -> None:
    """What was judged is in the metrics, by the name to call the calibration by."""

    def metrics() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("tarflow_anomaly")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    labels = f'{{calibration="default",model="{MODEL}",score="typicality"}}'
    before = metrics().get(f"tarflow_anomaly_window{labels}", 0)
    post(client, list(NEW[:20]), score="typicality", alpha=0.05)
    after = metrics()
    assert after[f"tarflow_anomaly_window{labels}"] == before + 20
    assert 0 <= after[f"tarflow_anomaly_flag_rate{labels}"] < 0.5
    normal_ks = after[f"tarflow_anomaly_ks{labels}"]
    post(client, [255 - image for image in NEW[:20]], score="typicality", alpha=0.05)
    drifted = metrics()
    assert drifted[f"tarflow_anomaly_ks{labels}"] > normal_ks
    assert drifted[f"tarflow_anomaly_flag_rate{labels}"] > after[f"tarflow_anomaly_flag_rate{labels}"]
    counts = [v for name, v in drifted.items() if name.startswith("tarflow_anomaly_images_total") and MODEL in name]
    assert sum(counts) >= 40
