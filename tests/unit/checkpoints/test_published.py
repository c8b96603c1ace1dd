"""Runs that normalise by statistics which others computed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.errors import UserError
from tests.program import DATA, TINY_POLICY, metrics, train_here

ONE = ["+recipe=lerobot", f"data.sources.main.root={DATA / 'lerobot_v30'}", "data.num_workers=0", "trainer.steps=2"]
ONE += ["trainer.global_batch_size=4", "trainer.log_every=1", "validation.every=0", "logger=none", *TINY_POLICY]
FEW = "data.sources.main.episodes=[0,1]"


def head_of(run):
    ((head, stats),) = load_policy(run).stats.items()
    return head, stats


def openpi_file(tmp_path, stats, dims: int = 32):
    """norm_stats.json with vectors filled up to `dims`."""
    tree = {
        vector: {n: [*getattr(getattr(stats, vector), n), *[0.0] * dims][:dims] for n in ("mean", "std", "q01", "q99")}
        for vector in ("state", "actions")
    }
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": tree}))
    return tmp_path / "norm_stats.json"


@pytest.mark.slow
def test_a_run_normalises_by_another_runs_statistics_and_keeps_them(tmp_path):
    whole = train_here(ONE, tmp_path / "whole")
    alone = train_here([*ONE, FEW], tmp_path / "alone")
    words = [*ONE, FEW, f"data.statistics_path={whole}", "checkpoint.every=1"]
    reused = train_here(words, tmp_path / "reused")
    assert head_of(reused)[1].to_json() == head_of(whole)[1].to_json() != head_of(alone)[1].to_json()
    assert metrics(reused)[1]["Training/BatchId"] == metrics(alone)[1]["Training/BatchId"]
    assert metrics(reused)[1]["Training/MSE"] != metrics(alone)[1]["Training/MSE"]
    again = [w for w in words if "statistics_path" not in w]  # the checkpoint has them
    resumed = train_here([*again, f"resume={reused}/checkpoints/00000001"], tmp_path / "resumed")
    assert metrics(resumed)[2] == metrics(reused)[2]


@pytest.mark.parametrize("method", [pytest.param("mean_std", marks=pytest.mark.slow), "quantiles"])
def test_openpis_statistics_normalise_as_the_same_numbers_computed(method, tmp_path):
    words = [*ONE, f"data.normalization={method}"]
    computed = train_here(words, tmp_path / "computed")
    file = openpi_file(tmp_path, head_of(computed)[1])
    for place in (file, file.parent):
        run = train_here([*words, f"data.statistics_path={place}"], tmp_path / f"of_{place.name}")
        assert metrics(run)[2]["Training/MSE"] == pytest.approx(metrics(computed)[2]["Training/MSE"], rel=1e-6)
    np.testing.assert_array_equal(head_of(run)[1].state.q99, head_of(computed)[1].state.q99)


@pytest.mark.slow
def test_statistics_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    computed = train_here(ONE, tmp_path / "computed")
    head, stats = head_of(computed)
    narrow = openpi_file(tmp_path, stats, dims=3)
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"norm_stats": {"state": {}}}')
    old = ["data.sources.old.root=" + str(DATA / "lerobot_v21"), "data.sources.old.robot_type=toy6"]
    for words, why in (
        ([f"data.statistics_path={narrow}"], "fewer dimensions of state than the data's 7"),
        ([f"data.statistics_path={damaged}"], "can't be read as openpi's"),
        ([f"data.statistics_path={narrow}", "data.normalization=min_max"], "no smallest and largest values"),
        ([f"data.statistics_path={narrow}", *old], "they are of one robot"),
        ([f"data.statistics_path={computed}", *old], "there are none of toy6"),
        ([f"data.statistics_path={computed}", 'data.sources.main.drop_dims=["*6"]'], f"those of {head} are of other"),
    ):
        with pytest.raises(UserError, match=why) as refused:
            train_here([*ONE, *words], tmp_path / "run")
        assert refused.value.remedy == "set data.statistics_path=null to compute them"
    assert not (tmp_path / "run").exists()
