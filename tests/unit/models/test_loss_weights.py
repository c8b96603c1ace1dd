"""The weights of the loss terms, of every policy that has them."""

from pathlib import Path

import pytest
import yaml

from opentau_train.errors import UserError
from opentau_train.models.policy import bind_model, build_policy
from tests.unit.models.flow_cases import SPEC


def whole(name: str) -> dict:
    """The settings of `model=NAME`, with those that its file begins from."""
    begun = [whole(other) for other in FILES[name].get("defaults", ()) if other != "_self_"]
    return {**(begun[0] if begun else {}), **{key: v for key, v in FILES[name].items() if key != "defaults"}}


FILES = {f.stem: yaml.safe_load(f.read_text()) for f in sorted(Path("conf/model").glob("*.yaml"))}
WEIGHTS = [(name, key) for name, tree in FILES.items() for key in tree if key.endswith("_weight")]


@pytest.mark.parametrize(("name", "key"), WEIGHTS)
def test_a_loss_weight_is_finite_and_not_negative(name, key):
    for value, must in ((-1.0, "at least 0"), (float("nan"), "a number"), (float("inf"), "a number")):
        with pytest.raises(UserError, match=rf"model\.{key} must be {must}, got {value}"):
            bind_model({**whole(name), key: value})
    bind_model({**whole(name), key: 0.0})


def test_a_policy_without_any_weight_is_refused():
    tree = {**whole("act"), "l1_weight": 0.0, "kl_weight": 0.0}
    with pytest.raises(UserError, match="nothing would train") as refused:
        build_policy(tree, SPEC)
    assert "model.l1_weight or model.kl_weight" in refused.value.remedy
