"""KEY=VALUE of a tool: values are YAML's, a group's keys come one by one or as a mapping."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from opentau_train.errors import UserError
from opentau_train.tools.options import TOKEN, parse, read_token


@dataclass(frozen=True)
class Options:
    out: str
    numbers: tuple[int, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)

    def check(self, path: str) -> None:
        """Each value is bounded by itself."""


def test_values_are_yaml_and_groups_are_filled():
    made = parse(["out=a b", "numbers=[1,2]", "source.root=x=y", "source.state=[]"], Options)
    assert made == Options("a b", (1, 2), {"root": "x=y", "state": []})
    assert parse(["out=a", "source={observation/image: front, other: null}"], Options).source == {
        "observation/image": "front",
        "other": None,
    }


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["out"], "'out' is not KEY=VALUE"),
        (["out=a", "numbers=[1"], "can't be read as YAML"),
        (["out=a", "source=3", "source.root=x"], "source is set twice"),
        (["numbers=[1]"], "out is required"),
        (["out=a", "outt=b"], "did you mean 'out'"),
        (["out=a", "numbers=[x]"], "numbers"),
    ],
)
def test_a_mistake_is_told(words, what):
    with pytest.raises(UserError) as caught:
        parse(words, Options)
    assert what in str(caught.value)


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, "a-token-of-the-environment")
    assert read_token(None) == "a-token-of-the-environment"
    (tmp_path / "token").write_text("a-token-of-a-file\n")
    assert read_token(str(tmp_path / "token")) == "a-token-of-a-file"
    (tmp_path / "token").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="can't read"):
        read_token(str(tmp_path / "token"))
