"""Numbers for a module that was built without memory: those of its constructor, or an error."""

import pytest
import torch
from torch import nn

from opentau_train.distributed.materialise import materialise
from opentau_train.errors import UserError
from tests.unit.models.flow_cases import make_policy


class Unset(nn.Module):
    """`scale` and `steps` are set by the constructor alone."""

    def __init__(self, buffer: bool):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        if buffer:
            self.register_buffer("steps", torch.linspace(0, 1, 4))
        else:
            self.scale = nn.Parameter(torch.ones(2))


def test_the_built_in_policy_is_the_one_that_its_constructor_makes():
    plain = make_policy(seed=5)
    after = torch.get_rng_state()
    with torch.device("meta"):
        policy = make_policy(seed=5)
    assert all(p.is_meta for p in policy.parameters())
    torch.manual_seed(5)
    materialise(policy, torch.device("cpu"), policy.init_weights)
    for (name, own), other in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other), name
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(("buffer", "name"), [(True, "steps"), (False, "scale")])
def test_what_no_initialisation_sets_is_named_instead_of_trained(buffer, name):
    with torch.device("meta"):
        module = Unset(buffer)
    with pytest.raises(UserError, match=f"leaves {name} unset"):
        materialise(module, torch.device("cpu"), lambda: None)
