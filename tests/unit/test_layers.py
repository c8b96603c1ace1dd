"""The package's imports point down only. Read from the syntax trees, so that imports inside functions count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "opentau_train"

LAYERS = (
    {"__main__", "validate", "tools"},
    {"cli"},
    {"train", "standalone"},
    {"job"},
    {"report", "meter", "recorder", "explain"},
    {"passes", "best", "saver"},
    {"actions"},
    {"evaluate", "checkpoint", "pretrained"},
    {"step", "commit"},
    {"data", "models", "sinks", "optim", "plots"},
    {"metrics"},
    {"parallel"},
    {"distributed", "drift", "compiling"},
    {"config"},
    {"config_data"},
    {"typed", "bounds", "rng"},
    {"types", "stopping", "preflight", "rollcall", "watchdog"},
    {"errors", "handover"},
    {"__init__"},  # the version only: importing the package imports nothing else
)
"""From the top down. A module or package imports from itself and from lower layers, never from its own."""

ONLY_IN = {
    "hydra": ("cli.py", "tools/"),
    "accelerate": ("distributed.py", "sinks/accelerate.py"),
}
"""Third-party packages that stay at the edge, and the files that may import them."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(part: str) -> int:
    """The layer's number, counted from the top."""
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"opentau_train.{part} stands in no layer: give it a place in LAYERS")


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every imported name of a module as its dotted parts; `package` is the package that the module lies in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def violations(file: str, source: str) -> list[str]:
    """What the module at `file` (relative to the package) imports and may not."""
    path = Path(file)
    part = path.parts[0].removesuffix(".py")
    found = []
    for name in imports(source, ("opentau_train", *path.parts[:-1])):
        if name[0] == "opentau_train":
            other = name[1] if len(name) > 1 and name[1] != "__version__" else "__init__"
            if other != part and layer(other) <= layer(part):
                found.append(f"{file}: {part} imports {'.'.join(name)}, which is not below it")
        elif name[0] in ONLY_IN and not file.startswith(ONLY_IN[name[0]]):
            found.append(f"{file}: {name[0]} may only be imported in {', '.join(ONLY_IN[name[0]])}")
    return found


def test_the_table_of_the_architecture_lists_the_layers():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("## Layers\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| (`[^|]*) \|", text, flags=re.M)]
    assert [{name.removesuffix("/") for name in row} for row in rows] == list(LAYERS)
    for name in (name for row in rows for name in row):
        assert (PACKAGE / name).is_dir() if name.endswith("/") else (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down_only(file):
    relative = file.relative_to(PACKAGE).as_posix()
    layer(relative.split("/")[0].removesuffix(".py"))
    assert not violations(relative, file.read_text())


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/stream.py", "from opentau_train.models.flow import Flow"),
        ("data/stream.py", "from opentau_train import models"),
        ("data/stream.py", "from ..models import flow"),
        ("data/stream.py", "def f():\n    import opentau_train.train"),
        ("evaluate.py", "from opentau_train.saver import Saver"),
        ("step.py", "from opentau_train.evaluate import evaluate"),
        ("step.py", "import opentau_train.train"),
        ("metrics.py", "from opentau_train.sinks.base import Sink"),
        ("rng.py", "from opentau_train.config import Settings"),
        ("errors.py", "from opentau_train.types import Batch"),
        ("train.py", "from opentau_train.tools.check import main"),
        ("train.py", "import hydra"),
        ("step.py", "from accelerate import Accelerator"),
        ("sinks/accelerated.py", "import accelerate.tracking"),
        ("__init__.py", "from opentau_train.errors import UserError"),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "import hydra\nfrom opentau_train import config, train, __version__"),
        ("tools/report.py", "from opentau_train.data.lerobot import LeRobotSource\nfrom hydra import compose"),
        ("data/stream.py", "from opentau_train.data.tape import Tape\nfrom .tape import Tape\nfrom .. import rng"),
        ("sinks/accelerate.py", "from accelerate.tracking import GeneralTracker"),
        ("train.py", "from opentau_train import checkpoint, step\nfrom opentau_train.metrics import GroupSums"),
    ],
)
def test_an_allowed_import_is_not(file, source):
    assert not violations(file, source)


@pytest.mark.parametrize(
    "module", ["opentau_train", "opentau_train.cli", "opentau_train.config", "opentau_train.tools.check"]
)
def test_help_and_checks_start_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
