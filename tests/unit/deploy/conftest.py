"""A policy of one step on a real dataset of videos and stills, whose pictures the training doesn't scale."""

import pytest

from opentau_train import load_policy
from tests.lerobot_writer import Camera, Dataset, write
from tests.program import TINY_POLICY, TOY, train_here

CAMERAS = {"observation.images.front": Camera(), "observation.images.side": Camera(codec=None)}


@pytest.fixture(scope="package")
def own_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    root = write(folder / "set", Dataset(cameras=CAMERAS))
    words = ["+recipe=lerobot", f"data.sources.main.root={root}", *TINY_POLICY, "data.image_size=[64,96]"]
    words += ["data.history=1", "data.chunk_length=8", "data.num_workers=0", "trainer.global_batch_size=4"]
    words += ["data.sources.main.val_split_ratio=0.4", "data.sources.main.prompt_separator=' | '", "trainer.steps=1"]
    words += ["scheduler.warmup_steps=0", "optimizer.lr=0.01", "model.num_flow_steps=4"]
    words += ["validation.every=1", "validation.evaluators=[loss,action]"]
    return train_here(words, folder / "run")


@pytest.fixture(scope="package")
def policy(own_run):
    return load_policy(own_run)


@pytest.fixture(scope="package")
def scaled_run(tmp_path_factory):
    """Two robots, pictures that are read smaller than they are stored and then cropped, a dim that is left out."""
    words = [*TOY, "data/augment=droid_cosmos", "data.transforms.augment.centre=0.8", "trainer.steps=1"]
    words += ["data.sources.main.drop_dims=[observation.state.state_2]", "data.sources.old.chunk_length=12"]
    words += ["validation.every=1", "validation.evaluators=[action]", "checkpoint.every=1"]
    return train_here(words, tmp_path_factory.mktemp("scaled") / "run")
