"""Every tool tells how it is used: an example, what it takes, and its exit codes."""

from __future__ import annotations

import importlib
import re

import pytest

from opentau_train.tools.command import tools


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("tool", tools())
def test_every_tool_tells_how_it_is_used(tool, flag, capsys):
    try:
        code = importlib.import_module(f"opentau_train.tools.{tool}").main([flag])
    except SystemExit as end:  # argparse's own way
        code = end.code
    shown = capsys.readouterr()
    text = " ".join(shown.out.split())
    assert code == 0 and not shown.err
    example = f"opentau-train {tool} " if tool == "launcher" else f"python -m opentau_train.tools.{tool} "
    assert example in text
    assert re.search(r"--[a-z]+|[A-Z_a-z]+=", text.partition(example)[2]), "what it takes stands beside the example"
    codes = re.search(r"[Ee]xit codes?:? (.*?)(?: options:| positional arguments:|$)", text)
    assert codes and re.search(r"\b0\b.*\b2\b", codes[1]), text
