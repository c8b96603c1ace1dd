"""Checkpoints go from one release of Python to another: what pickle writes and zipfile accepts changes between them."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.program import REPO, TOY, command, environment

SYSTEM = Path("/usr/bin") / f"python{sys.version_info.major}.{sys.version_info.minor}"
"""Of the same minor version, so that the installed packages are its own, too."""
RUNS = """
import runpy, site, sys
site.addsitedir(sys.argv.pop(1))
sys.argv[0] = "opentau_train"
runpy.run_module("opentau_train", run_name="__main__")
"""


def version(python: Path) -> str:
    return subprocess.run([python, "-c", "import sys; print(sys.version)"], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not SYSTEM.exists(), reason=f"there is no {SYSTEM}")
def test_a_run_goes_on_in_another_release_of_python_and_back(tmp_path):
    if version(SYSTEM) == version(Path(sys.executable)):
        pytest.skip(f"{SYSTEM} is this Python")
    words = [*TOY, "logger=none", "checkpoint.every=1", "resume=auto", f"paths.run_dir={tmp_path / 'run'}"]
    words += [f"paths.cache_dir={tmp_path / 'cache'}"]
    here, there = command(words), [str(SYSTEM), "-c", RUNS, sysconfig.get_path("purelib"), *words]
    for step, python in enumerate((there, here, there), start=1):
        done = subprocess.run(
            [*python, f"trainer.steps={step}"], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / f"run/checkpoints/{step:08d}/run.json").is_file()
        assert step == 1 or f"{step - 1:08d}" in done.stdout + done.stderr  # what it went on from
    assert os.readlink(tmp_path / "run/checkpoints/last").endswith("3")
