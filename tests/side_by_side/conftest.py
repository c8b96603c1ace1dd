"""LeRobot, imported where a test asks for it: it is only in the environment of `make test-lerobot`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def lerobot(tmp_path_factory) -> SimpleNamespace:
    """LeRobot's dataset class, its statistics and its conversion of older datasets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(Path(__file__).parent / "stubs"))
        # Its policies for transformers are of a release before 5, and all are imported with any of them. Only while
        # they are: `datasets` looks whether somebody has imported it.
        with pytest.MonkeyPatch.context() as hidden:
            hidden.setitem(sys.modules, "transformers", None)
            from lerobot.datasets import compute_stats, lerobot_dataset
            from lerobot.datasets.v30 import convert_dataset_v21_to_v30
            from lerobot.policies.act import modeling_act, processor_act  # noqa: F401
            from lerobot.policies.diffusion import modeling_diffusion, processor_diffusion  # noqa: F401
        assert Path(sys.modules["torchvision"].__file__).is_relative_to(Path(__file__).parent)
        yield SimpleNamespace(
            Dataset=lerobot_dataset.LeRobotDataset, stats=compute_stats, convert=convert_dataset_v21_to_v30
        )
