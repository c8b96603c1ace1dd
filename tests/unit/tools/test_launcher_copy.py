"""`opentau-train launcher --copy DIR`, and `opentau-train TOOL`."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from opentau_train import cli
from opentau_train.tools import command, launcher
from tests.program import REPO


def test_the_copy_is_whole_and_runs(tmp_path, capsys):
    assert launcher.main(["--copy", str(tmp_path)]) == 0
    whole = {
        p.relative_to(REPO) for p in (REPO / "launchers").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()} == whole
    assert os.access(tmp_path / "launchers" / "slurm" / "node.sh", os.X_OK)
    assert launcher.main(["--copy", str(tmp_path)]) == 0, "what is there already and the same isn't in the way"


def test_a_file_that_was_changed_is_kept_unless_it_may_be_replaced(tmp_path, capsys):
    assert launcher.main(["--copy", str(tmp_path)]) == 0
    changed = tmp_path / "launchers" / "skypilot" / "train.yaml"
    changed.write_text("mine")
    assert launcher.main(["--copy", str(tmp_path)]) == 2
    assert str(changed) in capsys.readouterr().err and changed.read_text() == "mine"
    assert launcher.main(["--copy", str(tmp_path), "--force"]) == 0 and changed.read_text() != "mine"


def test_a_place_that_cant_be_written_is_a_mistake(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launcher.main(["--copy", str(tmp_path / "file")]) == 2
    assert "can't write" in capsys.readouterr().err


def test_every_tool_has_a_main_and_the_command_finds_it():
    assert {"check", "plan", "launcher", "export", "verify_resume"} <= set(command.tools())
    assert "command" not in command.tools()
    for name in command.tools():
        assert callable(importlib.import_module(f"opentau_train.tools.{name}").main)


@pytest.mark.parametrize(
    ("words", "reached"), [(["launcher", "--copy"], "tool"), (["+recipe=lerobot"], "program"), ([], "program")]
)
def test_the_command_starts_a_tool_by_its_name_and_else_the_program(words, reached, monkeypatch):
    went = []
    monkeypatch.setattr(sys, "argv", ["opentau-train", *words])
    monkeypatch.setattr(launcher, "main", lambda arguments: went.append(("tool", arguments)) or 7)
    monkeypatch.setattr(cli, "main", lambda: went.append(("program", words)) or cli.end(7))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 7 and went == [(reached, words[1:] if reached == "tool" else words)]
