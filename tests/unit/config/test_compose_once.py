"""What tests remember of Hydra's compositions is what Hydra makes."""

import hydra
import pytest
from omegaconf import OmegaConf

from opentau_train.config.arguments import settable
from tests import compose_once
from tests.program import TOY


def composed(words, hidden=True):
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        tree = hydra.compose("train", [settable(word) for word in words], return_hydra_config=hidden)
    return OmegaConf.to_container(tree, resolve=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [*TOY, "trainer.steps=3"],
        [*TOY, "model=act_tiny", "~data.sources.old"],
        ["+recipe=droid_policy", "+debug=smoke", "optimizer.lr=3"],
        ["optimizer.lr=3", "+debug=smoke", "+recipe=droid_policy"],
    ],
)
def test_a_remembered_composition_is_hydras_own(words):
    other = [*words, "trainer.seed=5"]
    composed(other)
    known = len(compose_once._composed)
    remembered = composed(words)
    assert len(compose_once._composed) == known, "made once for all values"
    compose_once.forget()
    try:
        assert composed(words) == remembered and composed(other) != remembered
    finally:
        compose_once.remember()


def test_what_a_test_does_to_a_composition_is_not_remembered():
    tree = composed(TOY, hidden=False)
    tree["trainer"].clear()
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        mine = hydra.compose("train", [settable(word) for word in TOY])
    mine.trainer.steps = 12345
    del mine.model
    again = composed(TOY, hidden=False)
    assert "model" in again and again["trainer"]["steps"] != 12345
