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
    {"__main__", "validate", "tools/"},
    {"cli"},
    {"api", "sweep"},
    {"composing", "loop", "simulation/"},
    {"job"},
    {"deploy/"},
    {"checkpoints/"},
    {"validation/"},
    {"metrics/"},
    {"step"},
    {"distributed/"},  # above data/, which knows nothing of ranks: who opens or reads it says what they share
    {"data/load/", "data/lint/"},
    {"data/mixture/"},
    {
        "data/conventions/",
        "data/lerobot/",
        "data/order/",
        "data/transforms/augment/",
        "models/",
        "sinks/",
        "optim",
    },
    {"data/source", "data/transforms/"},
    {"config/", "data/batch", "data/builtin/", "data/keep_ranges", "data/remote/", "log"},
    {"data/fields"},
    {"data/chunk", "data/convention", "data/names", "pages/", "rng", "threads", "types"},
    {"data/decode/"},
    {"strangers"},
    {"errors"},
    {"__init__", "data/__init__"},  # they import nothing
)
"""Rooms (a folder of modules, or a module by itself) from the top down. A room imports from itself and from lower
layers, never from its own."""

ONLY_IN = {
    "hydra": ("api.py", "cli.py", "composing.py", "sweep.py", "tools/"),
    "accelerate": ("distributed/world.py", "sinks/trackers.py"),
}
"""Third-party packages that stay at the edge, and the files that may import them."""

FILES = sorted(PACKAGE.rglob("*.py"))


ROOMS = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def room_of(parts: tuple[str, ...]) -> str:
    """The room that a dotted name below the package leads to, or a module's path without its suffix."""
    for end in range(len(parts), 0, -1):
        for room in ("/".join(parts[:end]), "/".join(parts[:end]) + "/", "/".join((*parts[:end], "__init__"))):
            if room in ROOMS:
                return room
    return "__init__"


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
    room = room_of(path.with_suffix("").parts)
    wrong = []
    for name in imports(source, ("opentau_train", *path.parts[:-1])):
        if name[0] == "opentau_train":
            other = room_of(name[1:])
            if other != room and ROOMS[other] <= ROOMS[room]:
                wrong.append(f"{file}: {room} imports {'.'.join(name)}, which is not below it")
        elif name[0] in ONLY_IN and not file.startswith(ONLY_IN[name[0]]):
            wrong.append(f"{file}: {name[0]} may only be imported in {', '.join(ONLY_IN[name[0]])}")
    return wrong


def test_the_table_of_the_architecture_lists_the_layers():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("## Layers\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| (`[^|]*) \|", text, flags=re.M)]
    assert [set(row) for row in rows] == list(LAYERS)
    for name in (name for row in rows for name in row):
        assert (PACKAGE / name).is_dir() if name.endswith("/") else (PACKAGE / f"{name}.py").is_file()


def test_imports_point_down_only():
    relative = [file.relative_to(PACKAGE) for file in FILES]
    nowhere = [f for f in relative if f.name != "__init__.py" and "__init__" in room_of(f.with_suffix("").parts)]
    assert not nowhere, "they stand in no room: give them a place in LAYERS"
    assert not [wrong for f in relative for wrong in violations(f.as_posix(), (PACKAGE / f).read_text())]


FORMATS = (
    "checkpoints/adapters",
    "checkpoints/lerobot",
    "checkpoints/published",
    "data/builtin/",
    "data/decode/images",
    "data/decode/parquet",
    "data/keep_ranges",
    "data/lerobot/",
    "data/remote/",
    "models/lerobot",
)
POLICIES = (
    *("models/act", "models/diffusion", "models/encoders", "models/flow", "models/future", "models/inputs"),
    "models/packing/",
    *("models/layers", "models/pi/", "models/prompts", "models/resnet", "models/sampling", "models/unet", "models/wam"),
)
MEASURES = ("validation/changes", "validation/plots", "validation/video")
CONVERSIONS = ("data/convention", "data/lint/", "data/transforms/augment/", "data/transforms/units")
FORECASTS = ("checkpoints/room", "data/order/quality", "distributed/memory", "distributed/rehearsal")
ENDS = (
    "api",
    "config/pointers",
    "config/reference",
    "deploy/",
    "pages/",
    "simulation/",
    "sinks/",
    "sweep",
    "tools/",
    "validate",
)
SHORTCUTS = ("data/load/together", "data/mixture/ends", "data/mixture/stored", "data/mixture/team")
EDGES = (*FORECASTS, *SHORTCUTS, *FORMATS, *POLICIES, *CONVERSIONS, *MEASURES, *ENDS)
"""Rooms that could be taken away; what is left is the core, whose size has a limit (docs/decisions/0014-size.md)."""


def lines_of_code(source: str) -> int:
    """Lines that are no docstring, no comment and not blank."""
    without = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            without |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and n not in without for n, line in lines)


def test_the_core_stays_small():
    core = [file for file in FILES if not file.relative_to(PACKAGE).as_posix().startswith(EDGES)]
    assert lines_of_code('"""Doc."""\n\n# why\nx = """a\nb"""\n"""Of x,\ntwo lines."""\n') == 2
    assert 0 < sum(lines_of_code(file.read_text()) for file in core) < 10_000


def test_every_room_says_what_it_is_for():
    for room in (file.parent for file in FILES):
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/load/stream.py", "from opentau_train.step import train_step"),
        ("data/order/tape.py", "from opentau_train.data import lerobot"),
        ("data/mixture/open.py", "from opentau_train.distributed.world import World"),
        ("data/order/tape.py", "from ..load import stream"),
        ("data/load/stream.py", "def f():\n    import opentau_train.loop"),
        ("validation/losses.py", "from opentau_train.checkpoints.saver import Saver"),
        ("step.py", "from opentau_train.validation.losses import evaluate"),
        ("step.py", "import opentau_train.loop"),
        ("step.py", "from opentau_train import metrics"),
        ("optim.py", "from opentau_train.sinks.base import Sink"),
        ("rng.py", "from opentau_train.config.settings import Settings"),
        ("errors.py", "from opentau_train.types import Address"),
        ("loop.py", "from opentau_train.tools.check import main"),
        ("loop.py", "import hydra"),
        ("step.py", "from accelerate import Accelerator"),
        ("sinks/tracker.py", "import accelerate.tracking"),
        ("__init__.py", "from opentau_train.errors import UserError"),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert violations(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "import hydra\nfrom opentau_train import config, loop, __version__"),
        ("tools/report.py", "from opentau_train.data.lerobot.source import LeRobotSource\nfrom hydra import compose"),
        (
            "data/load/stream.py",
            "from opentau_train.data.order.tape import Tape\nfrom .samples import place\nfrom ... import rng",
        ),
        ("sinks/trackers.py", "from accelerate.tracking import GeneralTracker"),
        ("loop.py", "from opentau_train import checkpoints, step\nfrom opentau_train.metrics.sums import Sums"),
    ],
)
def test_an_allowed_import_is_not(file, source):
    assert not violations(file, source)


@pytest.mark.parametrize(
    "module",
    [
        "opentau_train",
        "opentau_train.cli",
        "opentau_train.config.settings",
        "opentau_train.simulation.process",
        "opentau_train.simulation.reach",
        "opentau_train.tools.check",
        "opentau_train.tools.demos",
        "opentau_train.tools.reporting.page",
    ],
)
def test_help_and_checks_start_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


@pytest.mark.slow
def test_a_check_of_the_settings_does_without_the_half_of_torch_that_only_a_run_needs():
    recipe = ["+recipe=droid_policy", "trainer.steps=4"]
    code = (
        f"import sys; from opentau_train import cli; cli.checked(cli.compose({recipe}));"
        "sys.exit(sum(m in sys.modules for m in ('torch._dynamo', 'torch.distributed.fsdp', 'sympy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
