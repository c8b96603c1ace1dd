"""The weights of the loss terms, of every policy that has them."""

from pathlib import Path

import pytest
import yaml

from opentau_train.errors import UserError
from opentau_train.models.policy import bind_model, build_policy
from tests.unit.models.flow_cases import SPEC

MODELS = {
    f.stem: tree for f in Path("conf/model").glob("*.yaml") if "_target_" in (tree := yaml.safe_load(f.read_text()))
}
WEIGHTS = [(name, key) for name, tree in sorted(MODELS.items()) for key in tree if key.endswith("_weight")]


@pytest.mark.parametrize(("name", "key"), WEIGHTS)
def test_a_loss_weight_is_finite_and_not_negative(name, key):
    for value, must in ((-1.0, "at least 0"), (float("nan"), "a number"), (float("inf"), "a number")):
        with pytest.raises(UserError, match=rf"model\.{key} must be {must}, got {value}"):
            bind_model({**MODELS[name], key: value})
    bind_model({**MODELS[name], key: 0.0})


def test_a_policy_without_any_weight_is_refused():
    tree = {**MODELS["act"], "l1_weight": 0.0, "kl_weight": 0.0}
    with pytest.raises(UserError, match="nothing would train") as refused:
        build_policy(tree, SPEC)
    assert "model.l1_weight or model.kl_weight" in refused.value.remedy
