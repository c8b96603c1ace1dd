"""Messages are openpi's own, byte for byte, and reading one that is none does no more than refuse it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpi_client import msgpack_numpy

from opentau_train.deploy.serving.wire import pack, unpack
from opentau_train.errors import UserError

TYPES = ["|b1", "|i1", "|u1", "<i2", ">i2", "<u4", "<i8", "<u8", "<f2", "<f4", ">f4", "<f8", ">f8"]


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    data = draw(st.binary(min_size=dtype.itemsize * int(np.prod(shape)), max_size=dtype.itemsize * int(np.prod(shape))))
    return np.frombuffer(data, dtype).reshape(shape) if dtype.kind != "b" else np.ones(shape, bool)


plain = st.one_of(st.text(max_size=9), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), arrays())
messages = st.dictionaries(st.text(max_size=5), st.one_of(plain, st.dictionaries(st.text(max_size=5), plain)))


@given(messages)
@settings(deadline=None, max_examples=40)
def test_what_openpi_writes_is_read_and_what_is_written_openpi_reads(message):
    written = pack(message)
    assert written == msgpack_numpy.packb(message)
    same(unpack(written), message)
    same(msgpack_numpy.unpackb(written), message)


def same(read, message):
    assert type(read) is type(message)
    if isinstance(message, dict):
        assert read.keys() == message.keys()
        for name in message:
            same(read[name], message[name])
    else:
        np.testing.assert_array_equal(read, message)


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True), np.uint8(7)])
def test_single_numbers_keep_their_type(value):
    read = unpack(msgpack_numpy.packb({"x": value}))["x"]
    assert read == value and read.dtype == value.dtype
    assert pack({"x": value}) == msgpack_numpy.packb({"x": value})


@pytest.mark.parametrize("text", ["open the drawer", "größer ≤ 🦾", "x"])
def test_an_array_of_one_text_is_the_text(text):
    for value in (np.array(text), np.array([text]), np.array(text, ">U20")):
        assert unpack(msgpack_numpy.packb({"prompt": value})) == {"prompt": text}


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_bytes_of_any_kind_are_read_or_refused(data):
    refused_or_read(data)


@given(messages, st.integers(0, 10**6), st.binary(min_size=1, max_size=3))
@settings(deadline=None, max_examples=120)
def test_a_message_with_some_bytes_changed_is_read_or_refused(message, place, change):
    written = bytearray(pack(message))
    place %= len(written)
    written[place : place + len(change)] = change
    refused_or_read(bytes(written))


def refused_or_read(data):
    try:
        made = unpack(data)
    except UserError as error:
        assert len(str(error).splitlines()) == 3
    else:
        assert all(isinstance(name, str) for name in made)


@pytest.mark.parametrize("value", [np.array([None]), np.zeros(2, "c8"), np.zeros(2, "i4,f4"), object(), {1, 2}])
def test_objects_are_not_written(value):
    with pytest.raises(TypeError):
        pack({"x": value})


def test_arrays_that_are_read_may_be_written_to_and_are_of_this_machine():
    read = unpack(msgpack_numpy.packb({"x": np.arange(3, dtype=">f4")}))["x"]
    read[0] = 5.0
    assert read.tolist() == [5.0, 1.0, 2.0] and read.dtype.isnative


@pytest.mark.slow
@pytest.mark.parametrize("nest", [b"\xdc\x3f\xff" * 500, b"\xdd\x00\x40\x00\x00" * 5], ids=["many", "long"])
def test_lists_that_claim_more_items_than_come_get_no_room_for_them(nest):
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            unpack(b"\x81\xa1a" + nest)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
