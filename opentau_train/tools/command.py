"""The command `opentau-train`: a tool by its name, or the training program.

opentau-train +recipe=lerobot data.sources.main.root=/data/my_dataset
opentau-train check /data/my_dataset          as python -m opentau_train.tools.check
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import opentau_train.tools
from opentau_train import cli


def tools() -> list[str]:
    """The names of the tools: modules of tools/ that run as `python -m`."""
    (folder,) = map(Path, opentau_train.tools.__path__)
    runs = (path.stem for path in folder.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text())
    return sorted(runs)


def main() -> None:
    """Run what the command line names, and end the process with its exit code."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name not in tools():
        cli.main()
    cli.end(importlib.import_module(f"opentau_train.tools.{name}").main(sys.argv[2:]))
