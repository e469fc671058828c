"""Messages: what goes in comes out, and nothing else is taken for a message."""

from __future__ import annotations

import struct

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service import messages
from service.messages import MessageError, pack, unpack

patient = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
DTYPES = st.sampled_from([np.dtype(name) for name in ("u1", "<i8", "<f4", "<f8")])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | INTEGERS, inner, max_size=4),
    max_leaves=12,
)


@patient
@given(PLAIN)
def test_plain_data_comes_back(content: object) -> None:
    assert unpack(pack(content)) == content


@patient
@given(ARRAYS)
def test_arrays_come_back(array: np.ndarray) -> None:
    back = unpack(pack({"array": [array]}))["array"][0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    assert not back.flags.writeable or back.size == 0


def test_an_array_that_is_not_contiguous_comes_back() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    np.testing.assert_array_equal(unpack(pack(array)), array)


@patient
@given(st.binary(max_size=200))
def test_garbage_is_refused_or_data(data: bytes) -> None:
    try:
        unpack(data)
    except MessageError:
        return
    assert msgpack.unpackb(data, strict_map_key=False)[0] == messages.VERSION


@patient
@given(PLAIN, st.data())
def test_a_truncated_message_is_refused(content: object, data: st.DataObject) -> None:
    packed = pack(content)
    with pytest.raises(MessageError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_named(version: object) -> None:
    with pytest.raises(MessageError, match=r"this program speaks 1"):
        unpack(msgpack.packb((version, {})))


@pytest.mark.parametrize("dtype", ["|O", "<c8", ">f4", "<U3"])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    content = msgpack.packb((dtype, (1,), b"\0" * 12))
    with pytest.raises(MessageError, match="unknown array type"):
        unpack(msgpack.packb((messages.VERSION, msgpack.ExtType(1, content))))


@pytest.mark.parametrize("shape", [(3,), (2**63,), (-1, -1), ("x",), 3])
def test_an_array_of_an_impossible_shape_is_refused(shape: object) -> None:
    content = msgpack.packb(("<f4", shape, b"\0" * 8))
    with pytest.raises(MessageError):
        unpack(msgpack.packb((messages.VERSION, msgpack.ExtType(1, content))))


def test_another_extension_is_refused() -> None:
    with pytest.raises(MessageError, match="unknown extension"):
        unpack(msgpack.packb((messages.VERSION, msgpack.ExtType(7, b""))))


@pytest.mark.parametrize("value", [object(), np.zeros(2, np.complex64), np.array(["a"]), {1, 2}])
def test_what_cannot_be_sent_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        pack(value)


def test_frames_say_their_length() -> None:
    framed = messages.frame([1, 2])
    size = messages.FRAME_HEADER.size
    assert messages.frame_length(framed[:size]) == len(framed) - size
    with pytest.raises(MessageError, match="allowed are"):
        messages.frame_length(struct.pack(">I", 2**31))
