"""What a user of KServe's inference client does; run where only that is installed. Prints what it got as JSON."""

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

URL = sys.argv[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), np.uint8)


def tensor(name, values, datatype, *, binary):
    found = InferInput(name, list(values.shape), datatype)
    found.set_data_from_numpy(values, binary_data=binary)
    return found


async def likelihoods(client, *, binary_in, binary_out):
    inputs = [
        tensor("images", IMAGES, "UINT8", binary=binary_in),
        tensor("class", np.array([b"Bag"], object), "BYTES", binary=binary_in),
    ]
    wanted = [RequestedOutput(name, {"binary_data": binary_out}) for name in ("log_likelihood", "bits_per_dim")]
    request = InferRequest("fashion-mnist", inputs, "mine", parameters={"draws": 2, "seed": 3}, request_outputs=wanted)
    answer = await client.infer(URL, request, model_name="fashion-mnist")
    values = {output.name: output.as_numpy().tolist() for output in answer.outputs}
    return {"id": answer.id, "model": answer.model_name, **values}


async def sampled(client):
    inputs = [tensor("seed", np.array([7, 8], np.int64), "INT64", binary=True)]
    request = InferRequest("fashion-mnist:sample", inputs, parameters={"binary_data_output": True})
    answer = await client.infer(URL, request, model_name="fashion-mnist:sample")
    [images] = [output.as_numpy() for output in answer.outputs if output.name == "images"]
    return images.tolist()


async def refused(client, model, inputs):
    try:
        await client.infer(URL, InferRequest(model, inputs), model_name=model)
    except httpx.HTTPStatusError as error:
        return [error.response.status_code, str(error)]
    raise AssertionError("it was not refused")


async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=180))
    images = [tensor("images", IMAGES, "UINT8", binary=True)]
    dictionary = {"inputs": [{"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]}]}
    return {
        "images": IMAGES.tolist(),
        "live": await client.is_server_live(URL),
        "ready": await client.is_server_ready(URL),
        "models": [await client.is_model_ready(URL, name) for name in ("fashion-mnist", "tiny-cond:sample", "nothing")],
        "likelihoods": [
            await likelihoods(client, binary_in=one, binary_out=other)
            for one in (True, False)
            for other in (True, False)
        ],
        "sampled": await sampled(client),
        "dictionary": (await client.infer(URL, dictionary, "fashion-mnist:sample")).model_name,
        "unknown": await refused(client, "nothing", images),
        "wrong": await refused(client, "fashion-mnist", images[:0]),
    }


print(json.dumps(asyncio.run(main())))
