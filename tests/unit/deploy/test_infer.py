"""A robot needs numpy, torch, safetensors and Pillow, and nothing of what reads data or configures a training."""

import subprocess
import sys
import tomllib

import numpy as np
import pytest

import opentau_train
from opentau_train.errors import UserError
from opentau_train.tools import export
from tests.program import REPO, environment

NOT_NEEDED = ["av", "cv2", "pyarrow", "hydra", "omegaconf", "accelerate", "scipy", "yaml", "fsspec", "huggingface_hub"]
NOT_NEEDED += ["tensorboard", "tqdm", "xxhash", "transformers", "tokenizers", "peft", "diffusers", "matplotlib", "onnx"]

PROGRAM = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it raises ImportError
import numpy as np
from opentau_train import load_policy
policy = load_policy({path!r})
seen = {{"front": np.full((48, 64, 3), 9, np.uint8), "state": np.arange(4), "task": "go"}}
np.save({out!r}, policy.act(seen, limits="clip"))
policy.stream(horizon=2, realtime=1).step(seen)
policy.benchmark(repeats=1)
"""


@pytest.mark.slow
def test_it_acts_without_what_only_a_training_needs(own_run, policy, tmp_path):
    out, file = tmp_path / "actions.npy", tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={own_run}", f"out={file}"]) == 0
    code = PROGRAM.format(blocked=NOT_NEEDED, path=str(file), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = {"front": np.full((48, 64, 3), 9, np.uint8), "state": np.arange(4), "task": "go"}
    np.testing.assert_array_equal(np.load(out), policy.act(seen, limits="clip"))


def test_the_documents_install_what_the_extra_names():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = project["optional-dependencies"]["infer"]
    names = [name.partition(">")[0] for name in needed]
    assert not {*names} & {*NOT_NEEDED} and {*needed} <= {*project["dependencies"]}
    text = (REPO / "docs" / "deploy.md").read_text()
    assert f"pip install {' '.join(names)}" in text and "pip install --no-deps opentau_train" in text


def test_a_checkpoint_says_what_its_hashes_need(own_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(UserError, match="a checkpoint's hashes need a package") as caught:
        opentau_train.load_policy(own_run)
    assert "tools.export" in caught.value.remedy


def test_a_name_on_the_hub_needs_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="no file or directory is called 'runs/nothing'") as caught:
        opentau_train.load_policy("runs/nothing")
    assert "pip install huggingface_hub" in caught.value.remedy


def test_the_package_gives_load_policy_and_nothing_unknown():
    assert opentau_train.load_policy.__module__ == "opentau_train.deploy.policy"
    with pytest.raises(AttributeError, match="has no attribute 'load_polcy'"):
        _ = opentau_train.load_polcy
