"""openpi's own client talks to the server, and others can't keep it from doing so."""

import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed

from opentau_train.tools import options, serve
from tests.served import connect, observed, serving

pytestmark = pytest.mark.filterwarnings("ignore:connect")  # as openpi-client calls it


def test_actions_are_those_of_act_bit_for_bit(served, policy):
    client = WebsocketClientPolicy("127.0.0.1", served.port)
    for number in range(3):
        reply = client.infer(observed(number))
        assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (8, 3)
        np.testing.assert_array_equal(reply["actions"], policy.act(observed(number)))
        assert reply["server_timing"]["batch_size"] == 1 and reply["policy_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in reply["server_timing"]) == (number > 0)
    seeded = client.infer({**observed(0), "seed": 5, "steps": 2})["actions"]
    np.testing.assert_array_equal(seeded, policy.act(observed(0), seed=5, steps=2))
    assert np.abs(seeded - policy.act(observed(0))).max() > 0


def test_the_metadata_tell_what_the_policy_reads_and_gives(served, policy):
    told = WebsocketClientPolicy("127.0.0.1", served.port).get_server_metadata()
    assert told["cameras"] == ["front", "side"] and told["state_names"] == list(policy.state_names)
    assert told["action_names"] == list(policy.action_names) and told["action_horizon"] == 8
    assert told["fps"] == 30.0 and told["history"] == 1 and told["convention"] == {} and told["steps"] == 4
    assert told["norm_head"] == "arm::default" and told["norm_heads"] == ["arm::default"]
    assert told["robots"]["arm::default"]["cameras"] == ["front", "side"] and told["max_batch"] == 4


def test_names_of_openpi_are_those_that_are_declared(served, policy):
    client, seen = WebsocketClientPolicy("127.0.0.1", served.port), observed(1)
    named = {"observation/image": seen["front"], "observation/state": seen["state"], "prompt": np.array(seen["task"])}
    named |= {"observation/extra": np.zeros(3), "images": {"side": np.moveaxis(seen["side"], -1, 0)}}
    np.testing.assert_array_equal(client.infer(named)["actions"], policy.act(seen))
    columns = {"observation.images.front": seen["front"], "observation.images.side": seen["side"] / 255}
    columns |= {"observation.state": seen["state"].tolist(), "task": seen["task"], "frame_index": 3}
    np.testing.assert_array_equal(client.infer(columns)["actions"], policy.act(seen))


def test_a_broker_gives_a_chunks_actions_one_by_one(served, policy):
    broker = ActionChunkBroker(WebsocketClientPolicy("127.0.0.1", served.port), action_horizon=5)
    first, second = policy.act(observed(1)), policy.act(observed(2))
    actions = [broker.infer(observed(1 if step < 5 else 2))["actions"] for step in range(7)]
    np.testing.assert_array_equal(actions, [*first[:5], *second[:2]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stat": 1.0}, "the policy doesn't read 'stat': did you mean 'state'?"),
        ({"state": np.zeros(3)}, "'state' has the shape [3], the policy reads 4 numbers"),
        ({"state": [[1.0], [1.0, 2.0]]}, "'state' is a list of other things than numbers"),
        ({"state": None}, "'state' is NoneType"),
        ({"front": np.zeros((70_000, 1, 1, 3), np.uint8)}, "camera 'front' gives 70000 frames, the policy takes 2"),
        ({"front": np.zeros((1, 200_000, 3), np.float16)}, None),
        ({"seed": "one"}, "seed is str, not a whole number"),
        ({"steps": 10**9}, "steps=1000000000 is over the server's 4"),
        ({"norm_head": "legs"}, "the policy wasn't trained on 'legs'"),
        ({"images": 3}, "the policy doesn't read 'images'"),
        ({"observation/image": np.zeros((8, 8, 3), np.uint8)}, "'front' is there twice"),
    ],
)
def test_an_error_is_a_text_of_three_lines_and_the_end(change, words, served):
    client = WebsocketClientPolicy("127.0.0.1", served.port)
    if words is None:  # as thin a picture as there is
        assert client.infer({**observed(), **change})["actions"].shape == (8, 3)
        return
    with pytest.raises(RuntimeError, match="Error in inference server") as caught:
        client.infer({**observed(), **change})
    _, told, *rest = str(caught.value).splitlines()
    assert words in told and len(rest) == 2 and "Traceback" not in str(caught.value)
    with pytest.raises(ConnectionClosed) as closed:
        client.infer(observed())
    assert closed.value.rcvd.code == 1011


def test_clients_at_once_get_their_own_chunks_and_none_is_lost(served, policy):
    clients = [WebsocketClientPolicy("127.0.0.1", served.port) for _ in range(6)]

    def ask(number):
        return [clients[number].infer({**observed(number), "seed": turn}) for turn in range(5)]

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, range(6)))
    sizes = {reply["server_timing"]["batch_size"] for of_client in replies for reply in of_client}
    assert sizes - {1} and max(sizes) <= 4, "some were computed together"
    for number, of_client in enumerate(replies):
        for turn, reply in enumerate(of_client):
            expected = policy.act(observed(number), seed=turn)
            atol = 0 if reply["server_timing"]["batch_size"] == 1 else 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(reply["actions"], expected, rtol=0, atol=atol)
    for client in clients:
        client._ws.close()


def test_a_bad_observation_in_a_batch_costs_the_others_nothing(served, policy):
    clients = [WebsocketClientPolicy("127.0.0.1", served.port) for _ in range(4)]

    def ask(number):
        try:
            state = np.full(4, np.nan if number == 0 else 1.0)
            return clients[number].infer({**observed(number), "state": state})["actions"].shape
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        bad, *good = pool.map(ask, range(4))
    assert "there is no finite number" in bad and good == [(8, 3)] * 3


def test_health_is_asked_for_over_http(served):
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz") as reply:
        assert reply.status == 200 and reply.read() == b"OK\n"


def test_a_signal_lets_clients_have_their_answers_and_ends_with_0(own_run):
    with serving(own_run, "idle=1000") as served:
        idle = connect(served)
        idle.recv()
        clients = [WebsocketClientPolicy("127.0.0.1", served.port) for _ in range(4)]
        told, begun = [], threading.Barrier(5)

        def ask(client):
            begun.wait()
            try:
                while True:
                    told.append(client.infer(observed())["actions"].shape)
            except ConnectionClosed as error:
                told.append(error.rcvd.code)

        threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        begun.wait()
        assert served.end() == 0
        for thread in threads:
            thread.join(20)
        assert [code for code in told if isinstance(code, int)] == [1001] * 4
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv()
        assert closed.value.rcvd.code == 1001 and " chunks in " in served.lines[-1]


def test_a_second_signal_ends_it_at_once(own_run):
    """A client that never takes leave would be waited for."""
    with serving(own_run) as served, socket.create_connection(("127.0.0.1", served.port)) as raw:
        asked = "GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"
        raw.sendall("\r\n".join([*asked, f"Sec-WebSocket-Key: {'A' * 22}==", "", ""]).encode())
        assert b"101" in raw.recv(1000)
        served.process.send_signal(signal.SIGTERM)
        while refuses(served.port) is False:
            time.sleep(0.02)
        assert served.end() == 130


def refuses(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_one_that_says_nothing_is_told_so(own_run):
    with serving(own_run, "idle=0.2") as served, connect(served) as connection:
        connection.recv()
        assert connection.recv().startswith("nothing came for 0.2 s")


def test_one_whose_answer_takes_too_long_is_told_so(own_run):
    with serving(own_run, "timeout=0.0001") as served, connect(served) as connection:
        connection.recv()
        connection.send(msgpack_numpy.packb(observed()))
        assert connection.recv().startswith("there was no answer in 0.0001 s")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["port=70000"], "port"),
        (["rename={image: frnt}"], "the policy doesn't read 'frnt': did you mean 'front'?"),
        (["host=192.0.2.1", "port=0"], "can't listen at 192.0.2.1:0"),
        (["prot=8000"], "did you mean 'port'?"),
        (["token_file=nowhere"], "can't read nowhere"),
        (["steps=0"], "steps"),
    ],
)
def test_a_mistake_is_told_in_three_lines(words, what, own_run, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert serve.main([f"checkpoint={own_run}", *words]) == 2
    told = capsys.readouterr().err
    assert what in told and len(told.strip().splitlines()) <= 3


def test_a_port_that_is_taken_and_a_short_token_are_mistakes(own_run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([f"checkpoint={own_run}", f"port={port}"]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err
    monkeypatch.setenv(options.TOKEN, "secret")
    assert serve.main([f"checkpoint={own_run}", "port=0"]) == 2
    assert "the token is not 16 or more" in capsys.readouterr().err


def test_it_says_what_to_install(own_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets", None)
    assert serve.main([f"checkpoint={own_run}", "port=0"]) == 2
    assert 'pip install "opentau_train[serve]"' in capsys.readouterr().err
