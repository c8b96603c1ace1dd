import pytest
from flow_cases import make_policy

from opentau_train.models.flow import FlowPolicy


@pytest.fixture
def policy() -> FlowPolicy:
    return make_policy()
