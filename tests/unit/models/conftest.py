import pytest

from opentau_train.models.flow import FlowPolicy
from tests.unit.models.flow_cases import make_policy


@pytest.fixture
def policy() -> FlowPolicy:
    return make_policy()
