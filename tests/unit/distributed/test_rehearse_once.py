"""What tests remember of rehearsals is what a rehearsal says."""

from dataclasses import replace
from functools import partial

import pytest

from opentau_train.config.optimizer import OptimizerSettings
from opentau_train.data.fields import FIELDS
from opentau_train.distributed.rehearsal import Rehearsal
from opentau_train.models.flow import FlowPolicy
from tests import rehearse_once
from tests.unit.models.flow_cases import SPEC, make_batch

SPEC = replace(SPEC, fields=make_batch().fields[len(FIELDS) :])
SMALL = partial(FlowPolicy, SPEC, width=32, depth=1, heads=2, patch_size=8, stem_channels=8, max_prompt_bytes=32)
OTHERS = [{"depth": 2}, {"mlp_ratio": 2.0}, {"heads": 4}, {"num_bins": 64}, {"ce_weight": 0.0}]


def said(policy, samples=2):
    rehearsal = Rehearsal(policy, SPEC, "cpu")
    found = rehearsal.activations(samples, False, False), rehearsal.optimizer_states(OptimizerSettings(lr=1e-3))
    assert not rehearsal.notes, rehearsal.notes
    return found


def test_alike_policies_are_rehearsed_once_and_others_anew():
    said(SMALL())
    known = len(rehearse_once._known)
    remembered = said(SMALL())
    assert len(rehearse_once._known) == known, "another policy of the same form"
    rehearse_once.forget()
    try:
        assert said(SMALL()) == remembered
    finally:
        rehearse_once.remember()


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_what_differs_is_rehearsed_anew(other):
    said(SMALL())
    assert said(SMALL(**other)) == said_anew(SMALL(**other))
    assert said(SMALL(), samples=3) == said_anew(SMALL(), samples=3)


def said_anew(policy, samples=2):
    rehearse_once.forget()
    try:
        return said(policy, samples)
    finally:
        rehearse_once.remember()
