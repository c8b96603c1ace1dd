"""Each stack of transforms gives the policy the numbers that it gave before."""

import json
from pathlib import Path

import pytest
import torch

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.batch import stack as stacked
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.open import open_mixture
from opentau_train.models.draws import Draws
from opentau_train.models.policy import build_policy
from opentau_train.types import Address
from tests.golden import losses
from tests.program import metrics, train_here

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())


SLOW = ("joint", "pose_deltas", "openpi", "lerobot", "dropout", "policy", "wam", "forward_dynamics", "inverse_dynamics")
PARAMETERS = [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in losses.STACKS]


@pytest.mark.parametrize("stack", PARAMETERS)
def test_a_stack_of_transforms_gives_its_golden_losses(stack, tmp_path):
    rows = metrics(train_here([*losses.RUN, *losses.STACKS[stack]], tmp_path / "run"))
    given = [rows[2]["Training/Loss"], rows[4]["Training/Loss"], rows[4]["Validation/Loss"]]
    assert given == pytest.approx(
        GOLDEN[stack], rel=2e-3
    )  # another processor, another OpenCV: a large learning rate tells all apart


def test_no_two_stacks_have_the_same_losses():
    last = [round(values[2], 2) for values in GOLDEN.values()]
    assert len(set(last)) == len(last) == len(losses.STACKS)


BF16 = 2e-3
"""Of a loss in float32: bfloat16 keeps 8 bits of each number, and the errors of many mostly cancel."""


@pytest.mark.slow
@pytest.mark.parametrize("stack", losses.STACKS)
def test_a_stacks_loss_in_bf16_is_that_in_float32_to_the_stated_bound(stack, tmp_path):
    settings = load_settings(cli.compose([*losses.RUN, *losses.STACKS[stack], f"paths.cache_dir={tmp_path}"]))
    mixture = open_mixture(settings)
    torch.manual_seed(0)
    policy = build_policy(settings.model, mixture.spec)
    mixture = mixture.for_policy(policy.wants())
    builder = SampleBuilder(mixture, training=True)
    places = [(e, f) for e in range(3) for f in (0, 2, 4)]
    batch = stacked([builder.build(0, Address(0, e, f, 0)) for e, f in places], mixture.spec)
    builder.close()

    def loss() -> float:
        terms = policy(batch, Draws(batch.key))
        assert all(sums.dtype == torch.float32 for sums, _ in terms.values())
        supervised = [(w, *(x.sum() for x in terms[t])) for t, w in policy.loss_weights.items()]
        return sum(w * float(total / count) for w, total, count in supervised if count)

    with torch.no_grad():
        for parameter in policy.parameters():  # a new policy's output is nothing, and its loss that of the noise
            parameter += 0.05 * torch.randn_like(parameter)
        exact = loss()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss()
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=BF16)
