"""Which settings a resumed run may change, and what it says of each."""

import copy
import dataclasses
import typing

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train import composing
from opentau_train.config import drift
from opentau_train.config.settings import Settings
from opentau_train.config.weights import completed
from opentau_train.errors import UserError


@pytest.fixture(scope="module")
def tree():
    with initialize_config_module("opentau_train.conf", version_base="1.3"):
        return composing.plain(compose("train", ["+recipe=lerobot", "++data.sources.main.root=/data"]))


def changed(tree, **values):
    out = copy.deepcopy(tree)
    for key, value in values.items():
        *path, name = key.split("__")
        at = out
        for part in path:
            at = at.setdefault(part, {})
        at[name] = value
    return out


def kinds(old, new):
    return {c.key: c.kind for c in drift.compare(old, new)}


def test_an_option_of_a_source_that_one_tree_lacks_counts_with_its_default(tree):
    import tests.fake_source  # noqa: F401  a run has imported its own classes; what only a checkpoint names isn't

    fewer = copy.deepcopy(tree)
    del fewer["data"]["sources"]["main"]["cameras"]
    assert kinds(fewer, tree) == kinds(tree, fewer) == {}
    fake = changed(tree, data__sources__fake={"_target_": "tests.fake_source.FakeSource", "lengths": [3]})
    slow = changed(fake, data__sources__fake__slow=False, data__sources__fake__bad=0.5)
    assert kinds(fake, slow) == {"data.sources.fake.bad": "refused"}


def test_what_a_source_declares_may_not_change_under_a_wanted_convention(tree):
    wanted = changed(tree, data__convention__actions=[{"kind": "joint", "unit": "rad"}])
    degrees = changed(wanted, data__sources__main__convention__actions=[{"kind": "joint", "unit": "deg"}])
    assert kinds(wanted, degrees) == {"data.sources.main.convention.actions": "refused"}
    assert kinds(tree, wanted) == kinds(wanted, tree) == {"data.convention.actions": "refused"}


EXPECTED = {
    "safe": {
        "paths__run_dir": "x",
        "logger__console": None,
        "checkpoint__async": False,
        "validation__every": 7,
        "data__num_workers": 9,
        "parallelism__data_parallel_shard_degree": 2,
        "trainer__log_every": 3,
        "data__max_samples_per_batch": 2,
        "data__sources__main__convention__actions": [{"kind": "joint"}],  # with nothing wanted it converts nothing
        "data__sources__main__root": "/elsewhere",
        "resume__checkpoint": "auto",
    },
    "warned": {
        "optimizer__lr": 1.0,
        "optimizer__weight_decay": 0.5,
        "scheduler___target_": "opentau_train.optim.Linear",
        "trainer__steps": 99999,
        "trainer__grad_clip": None,
        "trainer__precision": "bf16",
        "data__dropout__prompt": 0.5,
        "data__sources__main__val_split_ratio": 0.4,  # what is held out is compared by itself
        "model__ce_weight": 0.3,
    },
    "refused": {
        "seed": 1,
        "trainer__global_batch_size": 64,
        "trainer__ema_decay": 0.9,
        "data__lanes_per_sample": 2,
        "data__normalization": "quantiles",
        "data__normalization_per_timestep": True,
        "data__sources__main__weight": 2.0,
        "data__sources__second__root": "/more",
        "data__image_size": [32, 32],
        "data__scaling": "bilinear",
        "model__width": 64,
        "model___target_": "a.b",
    },
}


OF_PLAN = (
    "seed",
    "trainer__global_batch_size",
    "data__lanes_per_sample",
    "data__sources__main__weight",
    "data__sources__second__root",
)


@pytest.mark.parametrize(("kind", "key"), [(k, key) for k, keys in EXPECTED.items() for key in keys])
def test_each_change_has_its_kind_and_refused_ones_name_what_forces_them(kind, key, tree):
    value = EXPECTED[kind][key]
    if isinstance(value, str | None) and key == "logger__console":
        new = changed(tree, logger={})
    else:
        new = changed(tree, **{key: value})
    changes = drift.compare(tree, new)
    assert changes and {c.kind for c in changes} == {kind}, changes
    if kind != "refused":
        return drift.check(changes)
    with pytest.raises(UserError) as caught:
        drift.check(changes)
    names = [c.key for c in changes]
    if key in OF_PLAN:
        assert "resume.data=restart" in caught.value.remedy and "resume.force" not in caught.value.remedy
        drift.check(changes, restart=True)
        with pytest.raises(UserError):
            drift.check(changes, names)
        return
    assert f"resume.force=[{','.join(names)}]" in caught.value.remedy
    drift.check(changes, names)
    drift.check(changes, [names[0].rsplit(".", 1)[0]])  # the start of the key, up to a dot
    for force, restart in (([names[0] + "x", names[0][:-1]], False), ([], True)):
        with pytest.raises(UserError):
            drift.check(changes, force, restart=restart)


CAMERAS = ("root", "mode", "tolerance_s", "filter_dict_path", "prompt_columns")


@pytest.mark.parametrize("name", CAMERAS)
def test_a_camera_is_not_judged_by_the_setting_of_its_name(name, tree):
    before = changed(tree, data__sources__main__cameras={name: "observation.images.left"})
    after = changed(tree, data__sources__main__cameras={name: "observation.images.right"})
    assert kinds(before, after) == {f"data.sources.main.cameras.{name}": "refused"}


def test_a_key_inside_an_option_is_not_judged_by_the_option_of_its_name(tree):
    before = changed(tree, model__vision={"ce_weight": 1.0, "num_flow_steps": 3})
    after = changed(tree, model__vision={"ce_weight": 2.0, "num_flow_steps": 4})
    assert set(kinds(before, after).values()) == {"refused"}


def test_a_setting_of_a_section_means_what_the_section_does_unless_it_says_so_itself(tree):
    assert kinds(tree, changed(tree, checkpoint__every=7, validation__num_noise_draws=7, data__history=1)) == {
        "checkpoint.every": "safe",
        "validation.num_noise_draws": "warned",
        "data.history": "refused",
    }
    assert kinds(tree, changed(tree, trainer__of_a_later_version=1)) == {"trainer.of_a_later_version": "warned"}


def test_the_same_configuration_has_no_difference(tree):
    assert drift.compare(tree, copy.deepcopy(tree)) == []


def test_a_setting_that_an_older_program_had_not_counts_with_its_default(tree):
    older = copy.deepcopy(tree)
    del older["checkpoint"]["async"], older["trainer"]["ema_decay"], older["resume"], older["data"]["dropout"]
    older["data"]["sources"]["main"]["mode"] = "policy"  # the default, said
    assert drift.compare(older, tree) == []
    assert kinds(older, changed(tree, trainer__ema_decay=0.9)) == {"trainer.ema_decay": "refused"}


def test_pictures_of_a_run_from_before_the_filters_were_scaled_by_triangles(tree):
    older = copy.deepcopy(tree)
    del older["data"]["scaling"]
    (change,) = drift.compare(older, tree)
    assert str(change).startswith("data.scaling: bilinear -> area (the policy was trained on pictures")
    with pytest.raises(UserError) as caught:
        drift.check([change])
    assert caught.value.remedy.startswith(
        "restore them (data.scaling=bilinear), or go on regardless with resume.force="
    )
    assert drift.compare(older, changed(tree, data__scaling="bilinear")) == []


def test_longer_training_is_safe_where_the_rate_does_not_depend_on_it(tree):
    constant = changed(tree, scheduler={"_target_": "opentau_train.optim.Constant", "warmup_steps": 2})
    steps = constant["trainer"]["steps"]
    assert kinds({**constant, "trainer": {}}, constant)["trainer.steps"] == "warned"  # an older version's
    assert kinds(constant, changed(constant, trainer__steps=steps + 1)) == {"trainer.steps": "safe"}
    assert kinds(constant, changed(constant, trainer__steps=steps - 1)) == {"trainer.steps": "warned"}


def test_the_report_shows_old_and_new(tree):
    changes = drift.compare(tree, changed(tree, optimizer__lr=1.0, seed=3, model__width=8, paths__root="r"))
    text = "\n".join(drift.report(changes, ["model"], restart=True))
    assert "forced  model.width: 128 -> 8" in text
    assert (
        "forced  seed: 0 -> 3" in text
        and "warned  optimizer.lr: 0.0005 -> 1.0" in text
        and "safe    paths.root" in text
    )
    text = "\n".join(drift.report(changes))
    assert "refused seed" in text and "refused model.width" in text
    with pytest.raises(UserError, match=r"resume\.data=restart resume\.force=\[model\.width\]"):
        drift.check(changes)


def leaves(cls, path=""):
    for field in dataclasses.fields(cls):
        key, hint = field.metadata.get("key", field.name), typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@given(key=st.sampled_from(sorted(leaves(Settings))), value=st.sampled_from([None, 0, 1, "x", [1, 2], {"a": 1}]))
@settings(deadline=None)
def test_any_two_values_of_any_key_compare(key, value):
    """A checkpoint of another version may hold anything."""
    *path, name = key.split(".")
    old: dict = {}
    at = old
    for part in path:
        at = at.setdefault(part, {})
    at[name] = value
    drift.report(drift.compare(old, {}))
    drift.report(drift.compare({}, old))


def test_an_encoder_may_lie_elsewhere_but_not_come_or_go(tree):
    here, there, none = (changed(tree, model__text_encoder=place) for place in ("/a/minilm", "/b/minilm", None))
    assert kinds(here, there) == {"model.text_encoder": "safe"}
    assert kinds(none, here) == kinds(here, none) == {"model.text_encoder": "refused"}


def test_an_encoders_config_is_read_once(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    unset = {"text_encoder": str(tmp_path), "text_config": None}
    filled = completed(unset, {})
    assert filled["text_config"] == {"model_type": "bert"}
    (tmp_path / "config.json").write_text("[1")
    assert completed(filled, {}) == filled
    with pytest.raises(UserError, match="can't be read"):
        completed(unset, {})
