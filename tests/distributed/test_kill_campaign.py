"""The kill -9 campaign of benchmarks/kill_campaign.py, short: its assertions are the test."""

import os

import pytest

from benchmarks.kill_campaign import VARIANTS, campaign
from tests.program import REPO

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timed]


@pytest.mark.parametrize(("variant", "kills"), [("1 rank, async", 4), ("2 ranks", 3)])
def test_killed_at_random_a_run_ends_bit_equal_to_an_uninterrupted_one(variant, kills, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    ranks, overrides = VARIANTS[variant]
    report = campaign(tmp_path, kills=kills, seed=5, ranks=ranks, overrides=overrides, steps=20)
    assert sum(report.kills.values()) >= kills
