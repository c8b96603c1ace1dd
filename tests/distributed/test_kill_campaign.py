"""The kill -9 campaign of benchmarks/kill_campaign.py: its assertions are the test."""

import os
from contextlib import ExitStack

import pytest

from benchmarks.kill_campaign import HOSTS, VARIANTS, campaign
from benchmarks.support.hosts import two_hosts
from tests import warm
from tests.program import REPO

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timed]

KILLS = {variant: 40 if variant == HOSTS else 115 for variant in VARIANTS}
"""In a night: 500, of which those of two hosts take longest (a network that is away is waited for)."""


@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_a_run_ends_bit_equal_to_an_uninterrupted_one(variant, tmp_path, monkeypatch):
    """Other moments and victims each night."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    seed = int(os.environ.get("KILLS_SEED", "0")) or int.from_bytes(os.urandom(4))
    print(f"KILLS_SEED={seed}")
    ranks, overrides = VARIANTS[variant]
    with ExitStack() as stack:
        hosts = None
        if variant == HOSTS:
            try:
                hosts = stack.enter_context(two_hosts())
            except OSError as error:
                pytest.skip(f"left out: no network namespaces can be made here: {error}")
        form = {"ranks": ranks, "overrides": overrides, "hosts": hosts, "popen": warm.Popen}
        report = campaign(tmp_path, kills=KILLS[variant], seed=seed, **form)
    print(f"{variant}: {dict(report.kills)} in {report.rounds} runs; slowest end {report.slowest}")
    assert sum(report.kills.values()) >= KILLS[variant]
