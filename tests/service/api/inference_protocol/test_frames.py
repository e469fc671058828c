"""The frame parser: what is written is read again, and no bytes whatever raise anything but its own errors."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.api.inference_protocol.compression import decompress
from service.api.inference_protocol.frames import (
    MOST_JSON_BYTES,
    MOST_LISTS,
    InferenceRequest,
    read_request,
    write_answer,
)
from service.api.inference_protocol.tensors import BYTES, DATATYPES, Datatype, Tensor
from service.errors import BodyTooLarge, InvalidRequest, MalformedRequest

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def tensors(draw: st.DrawFn, *, text: bool = False) -> Tensor:
    """Any tensor; ``text`` for one that JSON can hold: of finite numbers and Unicode."""
    name, datatype, shape = draw(NAMES), draw(st.sampled_from(sorted(DATATYPES))), draw(SHAPES)
    if datatype == BYTES:
        elements = st.text(st.characters(exclude_categories=("Cs",))).map(str.encode) if text else st.binary()
        values = np.empty(math.prod(shape), np.object_)
        values[:] = draw(st.lists(elements, min_size=len(values), max_size=len(values)))
        return Tensor(name, datatype, values.reshape(shape))
    kind = DATATYPES[datatype]
    finite = {"allow_nan": False, "allow_infinity": False} if text and kind.kind == "f" else {}
    return Tensor(name, datatype, draw(hnp.arrays(kind, shape, elements=hnp.from_dtype(kind, **finite))))


def frame(tensors: list[tuple[Tensor, bool]], **more: Any) -> tuple[bytes, str | None]:
    """A request with these tensors, each binary or not; built of what answers are built of."""
    body, length = write_answer({}, tensors)
    size = len(body) if length is None else length
    document = json.loads(body[:size])
    document["inputs"] = document.pop("outputs")
    document |= more
    head = json.dumps(document).encode()
    return head + body[size:], None if length is None else str(len(head))


def same(one: Tensor, other: Tensor) -> bool:
    equal_nan = one.values.dtype.kind == "f"
    named_alike = (one.name, one.datatype, one.shape) == (other.name, other.datatype, other.shape)
    return named_alike and np.array_equal(one.values, other.values, equal_nan=equal_nan)


@given(st.lists(tensors(), max_size=4, unique_by=lambda tensor: tensor.name), st.text(st.characters(codec="utf-8")))
def test_what_is_written_as_binary_is_read_again(sent: list[Tensor], text: str) -> None:
    body, length = frame([(tensor, True) for tensor in sent], id=text)
    request = read_request(body, length)
    assert request.id == text
    assert list(request.inputs) == [tensor.name for tensor in sent]
    assert all(same(tensor, request.inputs[tensor.name]) for tensor in sent)


@given(st.lists(tensors(text=True), max_size=4, unique_by=lambda tensor: tensor.name), st.data())
def test_json_and_binary_tensors_go_together(sent: list[Tensor], data: st.DataObject) -> None:
    body, length = frame([(tensor, data.draw(st.booleans())) for tensor in sent])
    request = read_request(body, length)
    assert all(same(tensor, request.inputs[tensor.name]) for tensor in sent)


@given(tensors(text=True))
def test_nested_lists_are_as_good_as_flat_ones(tensor: Tensor) -> None:
    values = tensor.values
    nested = np.vectorize(bytes.decode, [object])(values) if tensor.datatype == BYTES and values.size else values
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    # A tensor of no axes has one value, which is a list in JSON all the same.
    data = nested.tolist() if tensor.shape else [nested.item()]
    request = read_request(json.dumps({"inputs": [{**entry, "data": data}]}).encode(), None)
    assert same(tensor, request.inputs[tensor.name])


def read(body: bytes, length: str | None) -> InferenceRequest | None:
    """What any bytes may come to: a request that holds together, or one of the typed errors."""
    try:
        request = read_request(body, length)
    except InvalidRequest as error:
        refusal = error.message
    else:
        refusal = ""
    if refusal:
        # Short, whatever was sent, and something that can be sent back.
        assert len(refusal.encode()) < 2000
        return None
    assert sum(tensor.values.nbytes for tensor in request.inputs.values()) <= 8 * len(body)
    for tensor in request.inputs.values():
        assert tensor.values.dtype == DATATYPES[tensor.datatype]
    return request


@given(st.binary(), st.none() | st.text() | st.integers(0, 50).map(str))
def test_arbitrary_bytes_raise_only_typed_errors(body: bytes, length: str | None) -> None:
    read(body, length)


@given(JSON)
def test_arbitrary_json_raises_only_typed_errors(value: Any) -> None:
    read(json.dumps(value).encode(), None)


FIELDS = ("id", "model_name", "model_version", "parameters", "inputs", "outputs", "name", "datatype", "shape", "data")
GARBAGE = JSON | st.sampled_from([-1, 0, 2**31, 2**63, 10**400, 1e999, "UINT8", "BYTES", [2], [-1], [[1]], [{}]])


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def paths(value: Any) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [()] + [(key, *path) for key, inner in items for path in paths(inner)]


@given(tensors(text=True), st.booleans(), st.data())
def test_a_request_with_any_one_field_replaced_raises_only_typed_errors(
    tensor: Tensor, binary: bool, data: st.DataObject
) -> None:
    body, length = frame(
        [(tensor, binary)], outputs=[{"name": "o", "parameters": {"binary_data": True}}], parameters={}
    )
    size = len(body) if length is None else int(length)
    document = json.loads(body[:size])
    path = data.draw(st.sampled_from(paths(document)))
    head = json.dumps(replaced(document, path, data.draw(GARBAGE))).encode()
    read(head + body[size:], str(len(head)))


@given(st.lists(tensors(text=True), max_size=3, unique_by=lambda tensor: tensor.name), st.data())
def test_mutated_frames_raise_only_typed_errors(sent: list[Tensor], data: st.DataObject) -> None:
    body, length = frame([(tensor, data.draw(st.booleans())) for tensor in sent])
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(mutated)))
        end = data.draw(st.integers(start, min(len(mutated), start + 8)))
        mutated[start:end] = data.draw(st.binary(max_size=8))
    if length is not None and data.draw(st.booleans()):
        length = str(int(length) + data.draw(st.integers(-8, 8)))
    read(bytes(mutated), length)


def entry(**changes: Any) -> bytes:
    """A request of one input, with changes; ``None`` leaves a field out."""
    fields = {"name": "x", "datatype": "INT32", "shape": [2], "data": [1, 2], **changes}
    given_fields = {name: value for name, value in fields.items() if value is not None}
    return json.dumps({"inputs": [given_fields]}).encode()


BINARY = {"data": None, "parameters": {"binary_data_size": 8}}


@pytest.mark.parametrize(
    ("body", "behind", "said"),
    [
        (entry(shape=[-1]), b"", "got shape [-1], allowed are at most 8 integers from 0 to"),
        (entry(shape=[1] * 9), b"", "allowed are at most 8 integers"),
        (entry(shape=[True, 2]), b"", "got shape [True, 2]"),
        (entry(shape="2"), b"", "got shape '2'"),
        (entry(shape=[2**31]), b"", "got shape [2147483648]"),
        (entry(shape=[2**31 - 1] * 8), b"", "allowed are at most 1099511627776 values"),
        (entry(shape=[0, 2**31 - 1, 2**31 - 1]), b"", "allowed are at most 1099511627776 values"),
        (entry(shape=[3]), b"", "got 2 values, allowed are 3 by shape [3]"),
        (entry(data=[[1], [2]]), b"", "got [1], allowed are integers"),
        (entry(shape=[2, 2], data=[[1, 2], [3]]), b"", "nested lists that are not of shape [2, 2]"),
        (entry(data={"a": 1}), b"", "got data {'a': 1}, allowed is a list"),
        (entry(data=[1, 2.5]), b"", "got 2.5, allowed are integers from -2147483648 to 2147483647 for INT32"),
        (entry(data=[1, True]), b"", "got True, allowed are integers"),
        (entry(data=[1, 2**31]), b"", "got 2147483648, allowed are INT32 integers"),
        (entry(datatype="UINT8", data=[1, -1]), b"", "got -1, allowed are UINT8 integers from 0 to 255"),
        (entry(datatype="BOOL", data=[1, 0]), b"", "got 1, allowed are true and false for BOOL"),
        (entry(datatype="FP16", data=[1, 65536]), b"", "got 65536, allowed are numbers that are finite in FP16"),
        (entry(datatype="BYTES", data=["a", 1]), b"", "got 1, allowed are strings of Unicode"),
        (entry(datatype="BYTES", data=["a", "\ud800"]), b"", r"got '\ud800', allowed are strings of Unicode"),
        (entry(datatype="BF16"), b"", "got datatype 'BF16', allowed are BOOL, UINT8,"),
        (entry(datatype=None), b"", "got datatype None"),
        (entry(name=None), b"", "inputs.0: got no name"),
        (entry(name=""), b"", "inputs.0: got no name"),
        (entry(data=None), b"", "got no data; give data, or binary_data_size"),
        (entry(parameters={"binary_data_size": 8}), bytes(8), "got data and binary_data_size, allowed is one of them"),
        (entry(parameters={"shared_memory_region": "r"}), b"", "got the parameter 'shared_memory_region'"),
        (entry(dtype="x"), b"", "got the field 'dtype'"),
        (entry(**BINARY), bytes(7), "got binary_data_size 8, allowed are 0 to 7"),
        (entry(**BINARY), bytes(9), "the body has 1 bytes behind its last tensor"),
        (entry(**BINARY, shape=[3]), bytes(8), "got 8 bytes, allowed are 12 for INT32 of shape [3]"),
        (entry(**BINARY, datatype="BYTES"), bytes(8), ""),
        (entry(**BINARY, datatype="BYTES", shape=[1]), bytes(8), "got bytes behind the last of 1 elements"),
        (entry(**BINARY, datatype="BYTES", shape=[3]), bytes(8), "got 2 elements, allowed are 3"),
        (entry(**BINARY, datatype="BYTES"), struct.pack("<II", 0, 1), "got length 1 of element 1, allowed are at most"),
        (entry(**BINARY, datatype="BYTES"), struct.pack("<I4s", 3, b"abcd"), "got 1 bytes where an element's length"),
        (entry(**BINARY, datatype="BYTES"), struct.pack("<I4s", 2**32 - 1, b"abcd"), "got length 4294967295"),
        (entry(**BINARY, datatype="BOOL", shape=[8]), b"\0\1\2\0\0\0\0\0", "got a byte above 1"),
        (b'{"inputs": [], "inputs": []}', b"", "a name is there more than once"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', b"", "NaN is no JSON"),
        (
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1e999]}]}',
            b"",
            "got inf, allowed are",
        ),
        (b'{"inputs": [{"name": "x"}, {"name": "x"}]}', b"", "inputs: got 'x' more than once"),
        (b'{"input": []}', b"", "got the field 'input', allowed are id, model_name"),
        (b'{"id": "a"}', b"", "inputs: got none"),
        (b'{"id": 7, "inputs": []}', b"", "id: got 7, allowed is a string of at most 1000 characters"),
        (b'{"id": "\\ud800", "inputs": []}', b"", "id: got '\\ud800'"),
        (b'{"inputs": [], "parameters": []}', b"", "parameters: got [], allowed is a JSON object"),
        (b'{"inputs": [], "parameters": {"binary_data_output": 1}}', b"", "binary_data_output: got 1"),
        (b'{"inputs": [], "outputs": [{"name": "o", "parameters": {"classification": 3}}]}', b"", "'classification'"),
        (b'{"inputs": [], "outputs": [{"name": "o"}, {"name": "o"}]}', b"", "outputs: got 'o' more than once"),
        (b"[]", b"", "the body: got [], allowed is a JSON object"),
        (b"", b"", "the body is not valid JSON"),
        (b"[" * 100_000, b"", "the body is not valid JSON"),
        (b"1" * 5000, b"", "the body is not valid JSON"),
        (b'{"inputs": [\xff]}', b"", "the body is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, behind: bytes, said: str) -> None:
    if not said:
        assert read_request(body + behind, str(len(body))).inputs["x"].values.tolist() == [b"", b""]
        return
    with pytest.raises(InvalidRequest) as caught:
        read_request(body + behind, str(len(body)))
    assert said in caught.value.message


@pytest.mark.parametrize("length", ["", "-1", "+1", "1.0", "0x1", "²", "9" * 400, "3", " 2", "two"])
def test_a_length_that_is_none_of_the_body_is_refused(length: str) -> None:
    with pytest.raises(MalformedRequest) as caught:
        read_request(b"{}", length)
    assert caught.value.param == "Inference-Header-Content-Length"


def test_a_missing_header_is_what_is_said_of() -> None:
    head = entry(**BINARY)
    for body in (head + bytes(8), head):
        with pytest.raises(InvalidRequest) as caught:
            read_request(body, None)
        assert "header Inference-Header-Content-Length" in caught.value.message


@pytest.mark.parametrize("datatype", ["FP64", "BYTES", "BOOL"])
@pytest.mark.parametrize("shape", [[2**31 - 1], [2**20, 2**20], [0, 2**40]])
def test_a_shape_takes_no_memory(datatype: Datatype, shape: list[int]) -> None:
    """However much a request says that it has, only what came with it is ever taken."""
    tracemalloc.start()
    try:
        for fields in (BINARY, {"data": [0] * 2}):
            head = entry(datatype=datatype, shape=shape, **fields)
            read(head + bytes(8 if fields is BINARY else 0), str(len(head)))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(tensors())
def test_what_is_not_finite_is_null_in_json(tensor: Tensor) -> None:
    if tensor.datatype == BYTES:
        return
    body, length = write_answer({}, [(tensor, False)])
    assert length is None
    [output] = json.loads(body, parse_constant=pytest.fail)["outputs"]
    got = np.array(output["data"], DATATYPES[tensor.datatype]).reshape(output["shape"])
    expected = tensor.values
    if expected.dtype.kind == "f":
        expected = np.where(np.isfinite(expected), expected, np.nan)
    assert np.array_equal(got, expected, equal_nan=expected.dtype.kind == "f")


@pytest.mark.parametrize("inner", [b"[]", b"{}", b"[{}]", b'"["'])
def test_so_many_lists_are_not_even_parsed(inner: bytes) -> None:
    """Thousands of them fit into a few bytes of gzip, and all else waits while they are made."""
    head, tail = b'{"inputs": [], "parameters": {"x": [', b"]}}"
    room = MOST_LISTS - head.count(b"[") - head.count(b"{")
    most = room // (inner.count(b"[") + inner.count(b"{"))
    assert len(read_request(head + b",".join([inner] * most) + tail, None).parameters["x"]) == most
    with pytest.raises(MalformedRequest, match=r"100\d\d\d times, allowed are 100000") as caught:
        read_request(head + b",".join([inner] * (most + 1)) + tail, None)
    assert "as binary data" in caught.value.message
    # Before the parser: it is no JSON either.
    with pytest.raises(MalformedRequest, match="allowed are 100000"):
        read_request(b"[" * (MOST_LISTS + 1), None)


def test_the_json_has_a_limit_that_binary_tensors_do_not_have() -> None:
    head = b'{"inputs": []}'
    assert not read_request(head.ljust(MOST_JSON_BYTES), None).inputs
    for length in (None, str(MOST_JSON_BYTES + 1)):
        with pytest.raises(BodyTooLarge, match=r"8388609 bytes of JSON, allowed are 8388608; .* as binary data"):
            read_request(head.ljust(MOST_JSON_BYTES + 1), length)
    size = MOST_JSON_BYTES + 1
    head = entry(datatype="UINT8", shape=[size], data=None, parameters={"binary_data_size": size})
    assert read_request(head + b"[" * size, str(len(head))).inputs["x"].shape == (size,)


# Compression.


def packed(data: bytes, encoding: str) -> bytes:
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    return packer.compress(data) + packer.flush()


@given(st.binary(), st.sampled_from(["gzip", "deflate"]))
def test_a_packed_body_is_unpacked(data: bytes, encoding: str) -> None:
    assert decompress(packed(data, encoding), encoding, len(data)) == data
    assert decompress(data, None, 0) == data


@given(st.binary(), st.sampled_from(["gzip", "deflate"]))
@example(b"", "gzip")
def test_what_is_not_packed_is_refused(data: bytes, encoding: str) -> None:
    with pytest.raises(MalformedRequest):
        decompress(data, encoding, 2**20)
    for wrong in (packed(data, encoding) + b"x", packed(data, encoding)[:-1]):
        with pytest.raises(MalformedRequest):
            decompress(wrong, encoding, 2**20)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(MalformedRequest, match="allowed are gzip, deflate and none"):
        decompress(b"", encoding, 2**20)


@pytest.mark.parametrize("encoding", [None, "", " ", ",", " , ,", "identity", "Identity,"])
def test_no_encoding_may_be_said_in_many_ways(encoding: str | None) -> None:
    assert decompress(b"[]", encoding, 2) == b"[]"
    assert decompress(packed(b"[]", "gzip"), f" GZip{encoding if encoding == ',' else ''}", 2) == b"[]"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_not_unpacked(encoding: str) -> None:
    bomb, most = packed(bytes(2**28), encoding), 2**20
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge, match="more than 1048576 bytes"):
            decompress(bomb, encoding, most)
        assert tracemalloc.get_traced_memory()[1] < 4 * most
    finally:
        tracemalloc.stop()
    assert len(decompress(packed(bytes(most), encoding), encoding, most)) == most
