"""Strangers make room, clients don't."""

import pytest

from opentau_train.deploy.serving.gate import Gate, check_token
from opentau_train.errors import UserError

TOKEN = "a-token-of-some-length"


class Connection:
    def __init__(self):
        self.transport, self.aborted = self, 0

    def abort(self):
        self.aborted += 1


def test_the_oldest_stranger_makes_room_and_no_client_does():
    gate, (client, first, second, third, fourth) = Gate(3, None), [Connection() for _ in range(5)]
    for one in (client, first, second):
        gate.enter(one)
    gate.know(client)
    gate.enter(third)
    assert [c.aborted for c in (client, first, second, third)] == [0, 1, 0, 0]
    gate.leave(first)  # its end comes later, and makes no room again
    gate.know(second)
    gate.know(third)
    gate.enter(fourth)
    assert fourth.aborted == 1 and gate.num_dropped == 2
    gate.leave(client)
    gate.enter(fourth)
    assert fourth.aborted == 1 and gate.num_dropped == 2


@pytest.mark.parametrize(
    ("shown", "admitted"),
    [
        (f"Api-Key {TOKEN}", True),
        (f"Bearer {TOKEN}", True),
        (TOKEN, False),
        (f"Basic {TOKEN}", False),
        (f"Api-Key {TOKEN}x", False),
        (f"Api-Key {TOKEN[:-1]}", False),
        ("Api-Key ", False),
        ("Api-Key größer", False),
        ("Api-Key \udcff", False),
        ("", False),
        (None, False),
    ],
)
def test_only_the_token_opens(shown, admitted):
    gate = Gate(1, TOKEN)
    assert gate.admits(shown) == admitted and gate.num_refused == (not admitted)
    assert Gate(1, None).admits(shown)


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "größer-als-sechzehn", "tab\tbetween-its-words"])
def test_a_token_that_is_easily_guessed_or_is_no_header_is_refused(token):
    with pytest.raises(UserError, match="16 or more ASCII"):
        check_token(token, "token_file")
    assert check_token(f" {TOKEN}\n", "token_file") == TOKEN
