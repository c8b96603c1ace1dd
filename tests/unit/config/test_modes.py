"""The modes of sources: what is said of them before anything is opened, and that each remedy works."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import hydra
import pytest
import yaml

from opentau_train import cli, composing
from opentau_train.config.arguments import settable
from opentau_train.config.drift import compare
from opentau_train.config.modes import MODES, ModeSettings
from opentau_train.config.settings import load_settings
from opentau_train.errors import UserError
from tests.modal import MODAL
from tests.program import REPO, TOY

MAIN = "data.sources.main"
JOINT = [f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities={{policy:3,forward_dynamics:1}}"]


def tree(words):
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        return composing.plain(hydra.compose("train", [settable(word) for word in words]))


def checked(*words, base=TOY):
    return cli.checked(tree([*base, *words]))


def refused(*words, base=TOY):
    with pytest.raises(UserError, match=r".") as caught:
        checked(*words, base=base)
    return caught.value


def test_the_shares_of_a_joint_source_follow_from_what_it_sets():
    assert load_settings(tree([*TOY, *MODAL, *JOINT])).data.sources["main"].modes == {
        "policy": 0.75,
        "forward_dynamics": 0.25,
    }
    assert load_settings(tree(TOY)).data.sources["main"].modes == {"policy": 1.0}
    assert [f.name for f in dataclasses.fields(ModeSettings)] == list(MODES)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([f"{MAIN}.mode=flow"], f"there is no {MAIN}.mode=flow"),
        ([f"{MAIN}.mode=tokens"], f"there is no {MAIN}.mode=tokens"),
        ([f"{MAIN}.mode=polcy"], "did you mean 'policy'"),
        ([f"{MAIN}.mode=joint"], f"{MAIN}.mode_probabilities are not set"),
        ([f"{MAIN}.mode_probabilities.wam=0.5"], f"{MAIN}.mode=policy, and {MAIN}.mode_probabilities are set"),
        ([f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities.policy=-1"], "from 0 to 1e+09, got -1"),
        ([f"{MAIN}.mode=joint", f"+{MAIN}.mode_probabilities.wan=1"], "did you mean 'wam'"),
        (["data.future.num_frames=-1"], "must be at least 0, got -1"),
        (["data.future.stride=0"], "must be greater than 0, got 0"),
        ([*MODAL, f"{MAIN}.mode=wam", "data.future.num_frames=0"], "data.future.num_frames is 0"),
        ([*MODAL, *JOINT, "data.future.num_frames=0"], "data.future.num_frames is 0"),
    ],
)
def test_what_is_wrong_with_a_mode_is_said_before_anything_is_opened(words, expected):
    error = refused(*words, f"{MAIN}.root=/nowhere")
    assert expected in str(error) and error.remedy


@pytest.mark.parametrize(
    ("words", "then"),
    [
        ([f"{MAIN}.mode=flow"], [f"{MAIN}.mode=policy", "model.ce_weight=0"]),
        ([f"{MAIN}.mode=tokens"], [f"{MAIN}.mode=policy", "model.mse_weight=0"]),
        ([*MODAL, f"{MAIN}.mode=joint"], [f"{MAIN}.mode_probabilities={{policy:0.5,wam:0.5}}"]),
        ([f"{MAIN}.mode_probabilities.policy=0.5"], [f"{MAIN}.mode=joint"]),
        ([*MODAL, f"{MAIN}.mode=wam", "data.future.num_frames=0"], ["data.future.num_frames=4"]),
        (["data.future.num_frames=2", f"{MAIN}.mode=wam"], [f"{MAIN}.mode=policy"]),
        (
            ["data.future.num_frames=2", f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities={{policy:1,wam:1}}"],
            [f"{MAIN}.mode_probabilities.wam=0"],
        ),
    ],
)
def test_the_remedy_works(words, then):
    remedy = refused(*words).remedy
    assert all(word in remedy for word in then), remedy
    checked(*words, *then)


@pytest.mark.parametrize("model", ["flow_tiny", "act_tiny", "diffusion_tiny", "pi0_tiny"])
def test_a_policy_without_the_mode_refuses_it_before_data_are_opened(model):
    base = ["+recipe=lerobot", f"model={model}", f"{MAIN}.root=/nowhere", "data.image_size=[64,64]"]
    if model == "pi0_tiny":
        pytest.importorskip("transformers")
        base[-1] = "data.image_size=[32,32]"
    error = refused("data.future.num_frames=2", f"{MAIN}.mode=inverse_dynamics", base=base)
    assert "has no mode 'inverse_dynamics', it knows policy" in error.what and error.where == f"{MAIN}.mode"


def test_a_resume_may_change_modes_with_a_warning_and_no_future():
    before = tree([*TOY, *MODAL])
    for words, kind in (
        ([f"{MAIN}.mode=wam"], {f"{MAIN}.mode": "warned"}),
        (["data.future.num_frames=3"], {"data.future.num_frames": "refused"}),
        (["data.future.stride=2"], {"data.future.stride": "refused"}),
        (["data.future.cameras=[wrist]"], {"data.future.cameras": "refused"}),
        (["data.expect_mode=policy"], {"data.expect_mode": "safe"}),
    ):
        assert {change.key: change.kind for change in compare(before, tree([*TOY, *MODAL, *words]))} == kind
    joint = [f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities.wam=1"]
    changes = compare(before, tree([*TOY, *MODAL, *joint]))
    assert [c.kind for c in changes] == ["warned", "warned"]
    old = copy.deepcopy(before)  # of a version that had neither
    for source in old["data"]["sources"].values():
        source.pop("mode_probabilities", None)
    del old["data"]["future"]
    assert compare(old, tree([*TOY, *MODAL, "data.future.num_frames=0"])) == []


def test_a_recipe_that_is_named_for_the_policy_trains_it_alone():
    """Every recipe of such a name says so, with its own data or another's."""
    recipes = sorted((REPO / "conf/recipe").glob("*_policy.yaml"))
    assert Path("droid_policy.yaml") in [Path(recipe.name) for recipe in recipes]
    for recipe in recipes:
        assert yaml.safe_load(recipe.read_text())["data"]["expect_mode"] == "policy", recipe
        base = [f"+recipe={recipe.stem}", *MODAL]
        assert {s.mode for s in checked(base=base).data.sources.values()} == {"policy"}
        name = next(iter(checked(base=base).data.sources))
        for words in ([f"data.sources.{name}.mode=wam"], [word.replace("main", name) for word in JOINT]):
            error = refused(*words, base=base)
            assert re.search("named for the mode policy.* dilute its losses", error.what)
            assert f"set data.sources.{name}.mode=policy" in error.remedy
            if len(words) == 1:
                checked(*words, f"data.sources.{name}.mode=policy", base=base)
            checked(*words, "data.expect_mode=null", base=base)
