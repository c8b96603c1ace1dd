"""Checkpoints go from one release of Python to another: what pickle writes and zipfile accepts changes between them."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from opentau_train.checkpoints import shards
from tests.program import REPO, TOY, environment, run

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
def test_a_run_goes_on_in_another_release_of_python_whose_checkpoint_is_read_here(tmp_path):
    if version(SYSTEM) == version(Path(sys.executable)):
        pytest.skip(f"{SYSTEM} is this Python")
    words = [*TOY, "logger=none", "checkpoint.every=1", "resume=auto", f"paths.run_dir={tmp_path / 'run'}"]
    words += [f"paths.cache_dir={tmp_path / 'cache'}"]
    assert run([*words, "trainer.steps=1"]).returncode == 0
    there = [SYSTEM, "-c", RUNS, sysconfig.get_path("purelib"), *words, "trainer.steps=2"]
    done = subprocess.run(there, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (shards.kinds(tmp_path / f"run/checkpoints/0000000{step}") for step in (1, 2))
    assert first == second and first
