"""The recipes of pi0 and pi0.5 train, validate, save, go on and export, in a size for a CPU."""

import pytest

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.data.builtin.droid import SampleSpec, ensure_droid_sample
from opentau_train.tools.export import ExportSettings, export
from tests.nightly import by_day
from tests.program import DATA, metrics, train_here

pytestmark = pytest.mark.slow  # transformers takes 5 s to import

SMALL = ["data.image_size=[32,32]", "model.vision.patch_size=8", "data.num_workers=0", "logger=none"]
SMALL += ["trainer.steps=4", "trainer.global_batch_size=4", "trainer.log_every=1", "checkpoint.every=2"]
SMALL += ["trainer.precision=no", "validation.every=4", "validation.max_samples_per_group=4"]
RECIPES = {"droid_pi0": "pi0_tiny", "droid_pi05": "pi05_tiny", "droid_openpi": "pi05_tiny", "lerobot_pi0": "pi0_tiny"}


@pytest.fixture(scope="module")
def droid_root(tmp_path_factory):
    spec = SampleSpec(num_episodes=4, min_frames=60, max_frames=70, episodes_per_data_file=2, episodes_per_video_file=2)
    return ensure_droid_sample(tmp_path_factory.mktemp("cache"), spec)["joint"]


@pytest.mark.parametrize("recipe", by_day(RECIPES, "droid_pi05"))
def test_a_recipe_trains_validates_goes_on_and_exports(recipe, droid_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(droid_root))
    monkeypatch.setenv("DATASET_PATH", str(DATA / "lerobot_v30"))
    words = [f"+recipe={recipe}", f"model={RECIPES[recipe]}", *SMALL]
    whole = train_here(words, tmp_path / "whole")
    rows = metrics(whole)
    group = "droid/joint" if recipe.startswith("droid") else "main/default"
    terms = ("MSE",) if recipe == "droid_openpi" else ("MSE", "CE")
    assert {f"Validation/{group}/{term}" for term in terms} <= rows[4].keys()
    resumed = train_here([*words, f"resume={whole}/checkpoints/00000002"], tmp_path / "resumed")
    assert metrics(resumed)[4] == rows[4]
    out, _ = export(ExportSettings(str(resumed), str(tmp_path / "policy.safetensors"), weights="ema"))
    assert load_policy(out).policy.form == RECIPES[recipe].split("_")[0]
