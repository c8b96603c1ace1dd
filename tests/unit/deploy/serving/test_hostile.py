"""Clients that are slow, broken or hostile leave the others served."""

import signal
import socket
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.served import connect, observed, serving

pytestmark = pytest.mark.filterwarnings("ignore:connect")  # as openpi-client calls it

TOKEN = "a-token-of-some-length"


def still_served(served, policy):
    """A client that comes now gets what it should."""
    client = WebsocketClientPolicy("127.0.0.1", served.port)
    np.testing.assert_array_equal(client.infer(observed(7))["actions"], policy.act(observed(7)))
    client._ws.close()


def test_pages_of_browsers_are_refused(served):
    with pytest.raises(InvalidStatus) as caught:
        connect(served, origin="https://somewhere.example")
    assert caught.value.response.status_code == 403


def no_array(**changes):
    array = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [3]}
    array |= {name.encode(): value for name, value in changes.items()}
    return msgpack.packb({"task": "go", "state": array})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "it is no msgpack"),
        (b"\xff" * 100, "it is no msgpack"),
        (b"\x81\xa1a", "it is no msgpack"),
        (msgpack.packb([1, 2]), "it is no map"),
        (msgpack.packb({b"state": 1}), "it is no map"),
        (msgpack.packb({1: 1}), "it is no msgpack"),
        ("a text", "it is text"),
        (b"\x81\xa1a" + b"\x91" * 100_000 + b"\x01", "it is no msgpack"),
        (msgpack.packb({"a": [[] for _ in range(20_000)]}), "it is no msgpack"),
        (msgpack.packb({"a": [[[]] * 100] * 150}), "over 16,384 items"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "it is no msgpack"),
        (msgpack.packb({"a": msgpack.Timestamp(1)}), "it is no msgpack"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "it is no msgpack"),
        (no_array(dtype="|O"), "an array's type is '|O'"),
        (no_array(dtype="f4,O"), "an array's type is 'f4,O'"),
        (no_array(dtype="<c8"), "an array's type is '<c8'"),
        (no_array(dtype=[["a", "O"]]), "an array's type is"),
        (no_array(shape=[4]), "an array of <f4 [4] comes with 12 bytes"),
        (no_array(shape=[2**31 - 1] * 8), "comes with 12 bytes"),
        (no_array(shape=[-3]), "an array's shape"),
        (no_array(shape=[3.0]), "an array's shape"),
        (no_array(shape=[1] * 9), "an array's shape"),
        (no_array(shape=[0, *[2**31 - 1] * 7], data=b""), "an array has the shape"),
        (no_array(data="text"), "an array's data"),
        (no_array(dtype="<U1", shape=[1], data=b"\xff" * 4), "a text has no characters"),
        (msgpack.packb({"seed": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "isn't of its type"),
        (msgpack.packb({"seed": {b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}}), "a NumPy number is none"),
    ],
)
def test_a_message_that_is_none_is_refused_and_the_others_are_served(message, words, served, policy):
    with connect(served) as connection:
        connection.recv()
        connection.send(message)
        told = connection.recv()
        assert isinstance(told, str) and words in told and len(told.splitlines()) == 3
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1011


def test_a_message_over_the_limit_ends_its_connection_alone(served, policy):
    with connect(served) as connection:
        connection.recv()
        connection.send(bytes(3 * 2**20))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1009
    still_served(served, policy)


def test_slow_and_broken_clients_leave_the_others_served(served, policy):
    """One sends half of a message and waits, one vanishes while it is answered, one reads nothing, one speaks HTTP."""
    other = WebsocketClientPolicy("127.0.0.1", served.port)
    other.infer(observed())
    message = msgpack_numpy.packb(observed())
    with ExitStack() as stack:
        slow = stack.enter_context(connect(served, close_timeout=0.1))
        slow.socket.sendall(bytes([0x82, 0xFF]) + len(message).to_bytes(8, "big") + bytes(4) + message[:50])
        vanishes = connect(served)
        vanishes.send(message)
        vanishes.socket.shutdown(socket.SHUT_RDWR)
        deaf = stack.enter_context(connect(served, close_timeout=0.1))
        for _ in range(20):
            deaf.send(message)
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        raw.sendall(b"\x00" * 100)
        np.testing.assert_array_equal(other.infer(observed(3))["actions"].shape, (8, 3))
        still_served(served, policy)


def test_a_thousand_connections_leave_the_others_served(served, policy):
    other = WebsocketClientPolicy("127.0.0.1", served.port)
    other.infer(observed())
    with ExitStack() as stack:
        for number in range(1000):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            if number % 2:
                raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
            if number % 100 == 0:
                assert other.infer(observed(number))["actions"].shape == (8, 3)
        assert other.infer(observed())["actions"].shape == (8, 3)
        still_served(served, policy)
        held = len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))
        assert held < 24 + 60, "connections beyond the limit are let go"


def test_a_token_is_asked_for_before_anything_is_told(own_run, policy, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with serving(own_run, f"token_file={tmp_path / 'token'}") as served:
        for key in (None, "another-token-of-that-length", TOKEN[:-1]):
            with pytest.raises(InvalidStatus) as caught:
                WebsocketClientPolicy("127.0.0.1", served.port, api_key=key)
            assert caught.value.response.status_code == 401
        assert urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz").status == 200
        client = WebsocketClientPolicy("127.0.0.1", served.port, api_key=TOKEN)
        np.testing.assert_array_equal(client.infer(observed())["actions"], policy.act(observed()))
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert isinstance(connect(served, additional_headers=bearer).recv(), bytes)
        assert served.end(signal.SIGINT) == 0
        assert served.lines[-1] == "1 chunks in 1 batches; 0 connections dropped, 3 without the token"
