"""The unmodified tritonclient against the running service: what it gets is what /v1 answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.service.conftest import CLASSES
from tests.service.pictures import Pixels, array, b64, file, opened, pixels
from tests.service.processes import PATIENCE, ServerProcess

GREY = [pixels(28, 1, seed) for seed in range(3)]
STACK = np.stack(GREY)[:, None]
FUNCTIONS = ("", ":anomaly", ":anomaly_map", ":encode", ":decode", ":sample")


def address(server: ServerProcess) -> str:
    return server.url.removeprefix("http://")


@pytest.fixture(scope="module")
def service(server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(
        address(server), network_timeout=PATIENCE, connection_timeout=PATIENCE
    ) as service:
        yield service


def tensor(name: str, values: Any, datatype: str, *, binary: bool = True) -> triton.InferInput:
    found = np.asarray(values, object if datatype == "BYTES" else None)
    return triton.InferInput(name, list(found.shape), datatype).set_data_from_numpy(found, binary_data=binary)


def native(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["images"]


def scored(client: httpx.Client, images: list[Pixels], **body: Any) -> list[dict[str, Any]]:
    return native(client, "/v1/score", images=[b64(file(image)) for image in images], **body)


def values(images: list[dict[str, Any]], name: str) -> list[Any]:
    return [np.nan if image[name] is None else image[name] for image in images]


def same(result: triton.InferResult, images: list[dict[str, Any]], *names: str) -> None:
    """To the last bit: both are the same job."""
    for name in names:
        np.testing.assert_array_equal(result.as_numpy(name), values(images, name), err_msg=name)


def refused(call: Any, *arguments: Any, **more: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **more)
    assert caught.value.message()
    return caught.value


def test_the_server_and_its_models_are_ready(service: triton.InferenceServerClient) -> None:
    assert service.is_server_live()
    assert service.is_server_ready()
    about = service.get_server_metadata()
    assert (about["name"], "binary_tensor_data" in about["extensions"]) == ("tarflow", True)
    for function in FUNCTIONS:
        assert service.is_model_ready(f"tiny-cond{function}")
        assert service.is_model_ready(f"tiny-cond{function}", "1")
    for name, version in (("nothing", ""), ("tiny-cond:nothing", ""), ("tiny-cond", "2"), ("tiny-cond:", "")):
        assert not service.is_model_ready(name, version)


def test_whoever_follows_the_metadata_gets_what_it_says(service: triton.InferenceServerClient) -> None:
    """For every function: zeros of the inputs' datatypes and shapes give outputs of those that are told."""
    for model in ("tiny-uncond", "tiny-cond"):
        for function in FUNCTIONS:
            if model == "tiny-cond" and "anomaly" in function:
                continue  # It comes without a calibration.
            name = model + function
            about = service.get_model_metadata(name)
            assert (about["name"], about["versions"], about["platform"]) == (name, ["1"], "tarflow")
            assert ("class" in [spec["name"] for spec in about["inputs"]]) == (model == "tiny-cond")
            kinds = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_}
            inputs = [
                tensor(spec["name"], np.zeros([2, *spec["shape"][1:]], kinds[spec["datatype"]]), spec["datatype"])
                for spec in about["inputs"]
            ]
            for binary in (True, False):
                outputs = [triton.InferRequestedOutput(spec["name"], binary) for spec in about["outputs"]]
                result = service.infer(name, inputs, outputs=outputs)
                for spec in about["outputs"]:
                    found = result.as_numpy(spec["name"])
                    assert found.shape == (2, *spec["shape"][1:]), spec
                    assert found.dtype == kinds.get(spec["datatype"], object)
            everything = service.infer(name, inputs).get_response()["outputs"]
            described = [{key: output[key] for key in ("name", "datatype")} for output in everything]
            assert described == [{key: spec[key] for key in ("name", "datatype")} for spec in about["outputs"]]


def test_the_configuration_says_more(service: triton.InferenceServerClient) -> None:
    about = service.get_model_config("tiny-cond:sample", "1")
    assert about["max_batch_size"] == 0
    assert about["input"] == [
        {"name": "seed", "data_type": "TYPE_INT64", "dims": [-1], "optional": False},
        {"name": "class", "data_type": "TYPE_INT64", "dims": [-1], "optional": True},
    ]
    texts = {name: value["string_value"] for name, value in about["parameters"].items()}
    assert (texts["class_names"], texts["max_images"]) == (",".join(CLASSES), "64")
    assert {"guidance_scale", "solver"} <= set(texts["parameters"].split(","))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_likelihoods(
    service: triton.InferenceServerClient, client: httpx.Client, binary: bool, compression: str | None
) -> None:
    result = service.infer(
        "fashion-mnist",
        [tensor("images", STACK, "UINT8", binary=binary), tensor("class", ["Bag"], "BYTES", binary=binary)],
        outputs=[triton.InferRequestedOutput(name, binary) for name in ("bits_per_dim", "log_likelihood")],
        request_id="mine",
        parameters={"draws": 2, "seed": 3},
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    same(result, scored(client, GREY, draws=2, seed=3, **{"class": "Bag"}), "bits_per_dim", "log_likelihood")
    answer = result.get_response()
    assert [output["name"] for output in answer["outputs"]] == ["bits_per_dim", "log_likelihood"]
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "fashion-mnist", "1")
    assert "parameters" not in answer


@pytest.mark.parametrize("draws", [1, 2])
def test_all_outputs_without_naming_any(
    service: triton.InferenceServerClient, client: httpx.Client, draws: int
) -> None:
    result = service.infer("fashion-mnist", [tensor("images", STACK, "UINT8")], parameters={"draws": draws})
    images = scored(client, GREY, draws=draws)
    same(result, images, "log_likelihood", "log_likelihood_std", "bits_per_dim")
    assert np.isnan(result.as_numpy("log_likelihood_std")).all() == (draws == 1)


def test_files_are_decoded_and_fitted_as_uploads_are(
    service: triton.InferenceServerClient, client: httpx.Client
) -> None:
    files = [file(GREY[0]), file(pixels(16, 3)), file(GREY[1], "JPEG")]
    result = service.infer("fashion-mnist", [tensor("images", files, "BYTES")])
    images = native(client, "/v1/score", images=[b64(data) for data in files])
    same(result, images, "log_likelihood", "bits_per_dim")
    told = result.get_response()["parameters"]["warnings"]
    assert told == "; ".join(f"images.1: {notice['message']}" for notice in images[1]["warnings"])
    assert "16x16" in told


def test_every_row_may_have_a_class_of_its_own(service: triton.InferenceServerClient, client: httpx.Client) -> None:
    images = [pixels(16, 3, seed) for seed in range(6)]
    stack = np.stack([image.transpose(2, 0, 1) for image in images])
    labels = ["cat", None, "0", "cat", "owl", None]
    expected = [
        scored(client, [image], model="tiny-cond", **{"class": label})[0]
        for image, label in zip(images, labels, strict=True)
    ]
    indices = [-1 if label is None else CLASSES.index(label) for label in labels]
    for classes in (tensor("class", [label or "" for label in labels], "BYTES"), tensor("class", indices, "INT64")):
        result = service.infer("tiny-cond", [tensor("images", stack, "UINT8"), classes])
        found = result.as_numpy("log_likelihood")
        # Other batches round otherwise.
        np.testing.assert_allclose(found, values(expected, "log_likelihood"), rtol=1e-5)
    assert len(set(found.round())) == 6


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("asked", [{}, {"alpha": 0.2}, {"score": "nll", "correction": "benjamini_hochberg"}])
def test_verdicts(
    service: triton.InferenceServerClient, client: httpx.Client, maps: bool, asked: dict[str, Any]
) -> None:
    name = "fashion-mnist:anomaly_map" if maps else "fashion-mnist:anomaly"
    result = service.infer(name, [tensor("images", STACK, "UINT8")], parameters=asked)
    images = scored(client, GREY, maps="array" if maps else "none", **asked)
    same(result, images, "is_anomaly", "p_value", "score", "threshold", "log_likelihood", "bits_per_dim")
    assert result.as_numpy("direction").tolist() == [image["direction"].encode() for image in images]
    assert result.as_numpy("is_anomaly").dtype == np.bool_
    if maps:
        for found, image in zip(result.as_numpy("map"), images, strict=True):
            assert b64(found.astype("<f4").tobytes()) == image["map"]["b64"]


def test_latents_and_back(service: triton.InferenceServerClient, client: httpx.Client) -> None:
    encoded = service.infer("fashion-mnist:encode", [tensor("images", STACK, "UINT8")])
    images = native(client, "/v1/encode", images=[b64(file(image)) for image in GREY])
    same(encoded, images, "log_likelihood")
    latents = encoded.as_numpy("latents")
    for latent, image in zip(latents, images, strict=True):
        assert b64(latent.tobytes()) == image["latent"]["b64"]
    decoded = service.infer("fashion-mnist:decode", [tensor("latents", latents, "FP32")])
    assert np.array_equal(decoded.as_numpy("images"), STACK)
    compact = [{"shape": list(latent.shape), "b64": b64(latent.tobytes())} for latent in latents]
    floats = native(client, "/v1/decode", latents=compact, output_format="npy")
    assert np.array_equal(decoded.as_numpy("samples"), [array(image["b64"]) for image in floats])


def test_samples(service: triton.InferenceServerClient, client: httpx.Client) -> None:
    asked: dict[str, Any] = {"guidance_scale": 1.5, "solver": "jacobi", "denoise": False}
    result = service.infer(
        "fashion-mnist:sample",
        [tensor("seed", [7, 8], "INT64"), tensor("class", ["Ankle boot"], "BYTES")],
        parameters=asked,
    )
    body = {"class": "Ankle boot", "seed": 7, "num_images": 2, **asked}
    pictures = native(client, "/v1/sample", **body)
    assert np.array_equal(result.as_numpy("images")[:, 0], [opened(image["b64"]) for image in pictures])
    same(result, pictures, "backward_error")
    floats = native(client, "/v1/sample", output_format="npy", **body)
    assert np.array_equal(result.as_numpy("samples"), [array(image["b64"]) for image in floats])


def test_seeds_and_classes_in_any_order(service: triton.InferenceServerClient) -> None:
    """A batch is its rows: each is the image of its own seed and class."""

    def drawn(seeds: list[int], classes: list[str]) -> Pixels:
        inputs = [tensor("seed", seeds, "INT64"), tensor("class", classes, "BYTES")]
        result = service.infer("fashion-mnist:sample", inputs, outputs=[triton.InferRequestedOutput("images")])
        assert [output["name"] for output in result.get_response()["outputs"]] == ["images"]
        return result.as_numpy("images").astype(int)

    together = drawn([5, 1, 5, 9], ["Bag", "Dress", "Dress", "Bag"])
    apart = np.concatenate([drawn([s], [c]) for s, c in ((5, "Bag"), (1, "Dress"), (5, "Dress"), (9, "Bag"))])
    # Batches round otherwise; a pixel next to a half may go up or down.
    assert np.abs(together - apart).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 50


def test_many_at_once(service: triton.InferenceServerClient, server: ServerProcess, client: httpx.Client) -> None:
    """Its asynchronous call, and its asyncio client."""
    expected = [scored(client, [image])[0]["log_likelihood"] for image in GREY]
    inputs = [[tensor("images", STACK[i : i + 1], "UINT8")] for i in range(3)]
    with triton.InferenceServerClient(address(server), concurrency=3, network_timeout=PATIENCE) as several:
        running = [several.async_infer("fashion-mnist", each) for each in inputs]
        found = [float(each.get_result().as_numpy("log_likelihood")[0]) for each in running]
    assert found == pytest.approx(expected, rel=1e-5)

    async def at_once() -> list[float]:
        async with triton_aio.InferenceServerClient(address(server), conn_timeout=PATIENCE) as several:
            results = await asyncio.gather(*(several.infer("fashion-mnist", each) for each in inputs))
            with pytest.raises(InferenceServerException, match="served are"):
                await several.infer("nothing", inputs[0])
        return [float(result.as_numpy("log_likelihood")[0]) for result in results]

    assert asyncio.run(at_once()) == pytest.approx(expected, rel=1e-5)


IMAGES = [tensor("images", STACK, "UINT8")]


@pytest.mark.parametrize(
    ("model", "inputs", "more", "status", "said"),
    [
        ("nothing", IMAGES, {}, "404", "model: got 'nothing', served are 'fashion-mnist'"),
        ("fashion-mnist:nothing", IMAGES, {}, "404", "allowed are 'fashion-mnist', 'fashion-mnist:anomaly'"),
        ("fashion-mnist", IMAGES, {"model_version": "3"}, "404", "version: got '3', allowed is '1'"),
        (
            "fashion-mnist",
            [tensor("image", STACK, "UINT8")],
            {},
            "400",
            "inputs: got 'image', allowed are images, class",
        ),
        ("tiny-uncond", [*IMAGES, tensor("class", [1], "INT64")], {}, "400", "inputs: got 'class', allowed are images"),
        ("fashion-mnist", [tensor("class", [1], "INT64")], {}, "400", "images: this input is missing"),
        (
            "fashion-mnist",
            [tensor("images", STACK[:0], "UINT8")],
            {},
            "400",
            "images: got 0 images, allowed are 1 to 64",
        ),
        ("fashion-mnist", [tensor("images", STACK[0], "UINT8")], {}, "400", "got UINT8 of shape [1, 28, 28]"),
        (
            "fashion-mnist",
            [tensor("images", STACK.astype("f4"), "FP32")],
            {},
            "400",
            "got FP32 of shape [3, 1, 28, 28]",
        ),
        ("fashion-mnist", [tensor("images", [b"x"], "BYTES")], {}, "400", "images.0: the file is not a readable image"),
        ("fashion-mnist", [*IMAGES, tensor("class", [1, 2], "INT64")], {}, "400", "shape [1] or [3]"),
        (
            "fashion-mnist",
            [*IMAGES, tensor("class", [10], "INT64")],
            {},
            "400",
            "class: got index 10, allowed is 0 to 9",
        ),
        (
            "fashion-mnist",
            [*IMAGES, tensor("class", [-2], "INT64")],
            {},
            "400",
            "class: got index -2, allowed is 0 to 9",
        ),
        ("fashion-mnist", [*IMAGES, tensor("class", ["Bog"], "BYTES")], {}, "400", "did you mean 'Bag'?"),
        ("fashion-mnist", [*IMAGES, tensor("class", [b"\xff"], "BYTES")], {}, "400", "allowed are names in UTF-8"),
        ("fashion-mnist", IMAGES, {"parameters": {"drows": 2}}, "400", "got 'drows', allowed are draws, seed"),
        ("fashion-mnist", IMAGES, {"parameters": {"draws": "2"}}, "400", "draws: Input should be a valid integer"),
        ("fashion-mnist", IMAGES, {"parameters": {"draws": 65}}, "400", "draws: got 65, allowed are 1 to 64"),
        ("fashion-mnist", IMAGES, {"sequence_id": 7}, "400", "got 'sequence_id', allowed are draws, seed"),
        (
            "fashion-mnist",
            IMAGES,
            {"outputs": [triton.InferRequestedOutput("x")]},
            "400",
            "outputs: got 'x', allowed are",
        ),
        (
            "fashion-mnist",
            IMAGES,
            {"outputs": [triton.InferRequestedOutput("log_likelihood", class_count=3)]},
            "400",
            "got the parameter 'classification'",
        ),
        ("tiny-cond:anomaly", [tensor("images", [file(GREY[0])], "BYTES")], {}, "400", "comes without one; name one"),
        ("fashion-mnist:anomaly", IMAGES, {"parameters": {"alpha": 2}}, "400", "alpha: Input should be less than 1"),
        ("fashion-mnist:sample", [tensor("seed", [-1], "INT64")], {}, "400", "seed: got -1, allowed are 0 to"),
        ("fashion-mnist:sample", [tensor("seed", [[1]], "INT64")], {}, "400", "seed: got INT64 of shape [1, 1]"),
        ("fashion-mnist:sample", [tensor("seed", list(range(65)), "INT64")], {}, "400", "allowed are 1 to 64"),
        ("fashion-mnist:decode", [tensor("latents", np.full((1, 49, 16), np.nan, "f4"), "FP32")], {}, "400", "finite"),
        (
            "fashion-mnist:decode",
            [tensor("latents", np.zeros((1, 49, 16)), "FP64")],
            {},
            "400",
            "allowed is FP32 [n, 49",
        ),
        (
            "fashion-mnist:sample",
            [tensor("seed", [1], "INT64")],
            {"timeout": 1},
            "504",
            "not finished in 1e-06 seconds",
        ),
    ],
)
def test_what_is_wrong_is_an_exception_that_says_it(
    service: triton.InferenceServerClient, model: str, inputs: list[Any], more: dict[str, Any], status: str, said: str
) -> None:
    error = refused(service.infer, model, inputs, **more)
    assert error.status() == status
    assert said in error.message()


def test_models_cannot_be_changed_without_the_setting(service: triton.InferenceServerClient) -> None:
    for change in (service.load_model, service.unload_model):
        error = refused(change, "tiny-vp")
        assert error.status() == "403"
        assert "the service's setting 'admin' allows it" in error.message()
    index = service.get_model_repository_index()
    assert {entry["state"] for entry in index} == {"READY"}
    assert {entry["name"] for entry in index} >= {"tiny-vp" + function for function in FUNCTIONS}
    assert service.is_model_ready("tiny-vp")
