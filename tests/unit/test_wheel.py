"""The wheel is whole: code, configuration, licence; it runs from any directory without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools writes beside the sources, and an old build/ would leak into it."""
    source, out = tmp_path_factory.mktemp("source") / "repo", tmp_path_factory.mktemp("wheel")
    kept = ("opentau_train", "conf", "launchers", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:
        path = REPO / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


def pip(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_configuration_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    parts = [p for kind in ("*.py", "*.css", "*.js") for p in (REPO / "opentau_train").rglob(kind)]
    modules = {p.relative_to(REPO).as_posix() for p in parts}
    conf = [*(REPO / "conf").rglob("*.yaml"), *(REPO / "conf").rglob("*.py")]
    assert conf
    for folder in ("launchers", "docs"):
        conf += [path for path in (REPO / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == modules | {f"opentau_train/{p.relative_to(REPO).as_posix()}" for p in conf}
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_installed_wheel_composes_a_recipe_from_an_empty_directory(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(site)},
            cwd=empty,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import opentau_train, opentau_train.conf as c; print(opentau_train.__file__, *c.__path__)"
    assert all(path.startswith(str(site)) for path in python("-c", where).split())
    assert "name: droid_policy" in python("-m", "opentau_train", "--cfg", "job", "+recipe=droid_policy")
    assert not list(empty.iterdir())
    assert "launchers: " in python("-m", "opentau_train.tools.launcher", "--copy", str(empty), "--docs")
    for file in ("launchers/slurm/train.sbatch", "launchers/kubernetes/jobset.yaml", "docs/quickstart.md"):
        assert (empty / file).read_bytes() == (REPO / file).read_bytes()
    assert os.access(empty / "launchers" / "train_droid_policy.sh", os.X_OK)
