"""Whatever a client's message holds, it is an observation of the policy's, or an error that says why not."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train import load_policy
from opentau_train.deploy.serving.requests import Terms
from opentau_train.errors import UserError

NAMES = ["front", "side", "state", "task", "prompt", "images", "seed", "steps", "norm_head", "observation.state", "x"]
NAMES += ["observation.images.front", "timestamp", "action"]
SHAPES = [(), (1,), (4,), (0,), (5, 5, 3), (3, 5, 5), (2, 5, 5, 3), (7, 2, 2, 3), (1, 9000, 3), (0, 4, 3), (2, 2)]


@st.composite
def values(draw):
    kind = draw(st.sampled_from(["array", "text", "number", "list", "none"]))
    if kind == "array":
        dtype = draw(st.sampled_from(["u1", "i8", "f2", "f4", "f8", "?"]))
        fill = draw(st.sampled_from([0, 1, 255, -7, np.inf, np.nan]))
        with np.errstate(invalid="ignore"):
            return np.full(draw(st.sampled_from(SHAPES)), fill).astype(dtype)
    if kind == "number":
        return draw(st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats()))
    if kind == "list":
        item = st.one_of(st.floats(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=3), st.none())
        return draw(st.lists(st.one_of(item, st.lists(item, max_size=4)), max_size=5))
    return draw(st.text(max_size=5)) if kind == "text" else None


names = st.sampled_from(NAMES)
messages = st.dictionaries(names, st.one_of(values(), st.dictionaries(names, values(), max_size=3)), max_size=5)


@given(message=messages, whole=st.booleans())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_message_is_an_observation_or_a_mistake(policy, message, whole):
    """No other error, which would count as the server's own."""
    if whole:
        message = {"state": np.zeros(4), "front": np.zeros((4, 4, 3), np.uint8), **message}
    try:
        request = Terms(policy).request(message)
        read = policy.readers[request.norm_head].read(request.observation)
    except UserError:
        return
    assert np.isfinite(read["state"]).all() and isinstance(read["prompt"], str)
    assert all(frames.dtype == np.uint8 and len(frames) == 2 for frames in read["images"].values())
    assert isinstance(request.seed, int) and request.steps in (None, 1, 2, 3, 4)


def test_what_the_policy_does_not_have_is_a_mistake_at_the_start(policy):
    with pytest.raises(UserError, match="the policy doesn't read 'stat': did you mean 'state'"):
        Terms(policy, {"observation/state": "stat"})
    with pytest.raises(UserError, match="steps=0 is no number of steps"):
        Terms(policy, steps=0)
    for name in ("front", "observation.images.side", "observation.state", "task", "state"):
        Terms(policy, {"theirs": name})


def test_more_steps_than_the_servers_own_are_refused(policy):
    message = {"state": np.zeros(4), "steps": 6}
    with pytest.raises(UserError, match="steps=6 is over the server's 4"):
        Terms(policy).request(message)
    assert Terms(policy, steps=6).request(message).steps == 6
    assert Terms(policy, steps=2).request({"state": np.zeros(4)}).steps == 2


@pytest.mark.slow
def test_of_several_robots_a_message_says_which_or_the_server_does(scaled_run):
    policy = load_policy(scaled_run)
    told, heads = Terms(policy).metadata(), ["toy6::default", "toy::default"]
    assert told["norm_head"] is None and sorted(told["norm_heads"]) == heads and "cameras" not in told
    assert told["robots"]["toy6::default"]["cameras"] == ["front"] and told["robots"]["toy::default"]["fps"] == 15.0
    with pytest.raises(UserError, match="the policy knows several robots"):
        Terms(policy).request({"state": np.zeros(6)})
    kinds = {Terms(policy).request({"state": np.zeros(6), "norm_head": head}).kind for head in heads}
    assert kinds == {("toy6::default", None), ("toy::default", None)}, "they share no batch"
    one = Terms(policy.for_robot("toy::default"))
    assert one.metadata()["cameras"] == ["front", "wrist"] and one.metadata()["norm_head"] == "toy::default"
    assert one.request({"state": np.zeros(6)}).norm_head == "toy::default"
