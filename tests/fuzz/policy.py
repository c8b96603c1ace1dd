"""A small exported policy, made by the program itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from opentau_train.tools.export import ExportSettings, export
from tests.program import TOY, train_here


def exported(folder: Path) -> Path:
    """The file of a policy that was trained for a step in `folder`."""
    out = folder / "policy.safetensors"
    if not out.is_file():
        quiet = ["trainer.steps=1", "validation.every=0", f"paths.cache_dir={folder / 'cache'}"]
        run = train_here([*TOY, *quiet], folder / "run")
        export(ExportSettings(str(run), str(out)))
        shutil.rmtree(run)
    return out
