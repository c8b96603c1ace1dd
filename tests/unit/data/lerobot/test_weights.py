"""Samples that weigh differently in the training loss, by a column of the dataset."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import UserError
from opentau_train.types import Address
from tests.lerobot_writer import Dataset, vector, write
from tests.program import TINY_POLICY, metrics, train_here

COLUMN = "data.sources.main.weight_column=advantage"
NUMBER = {"dtype": "float32", "shape": [1], "names": None}


def run(tmp_path, name: str, weight, *words: str):
    columns = {"observation.state": vector(4), "action": vector(3, 0.5), "advantage": (NUMBER, weight)}
    root = write(tmp_path / name / "set", Dataset(cameras={}, columns=columns))
    given = ["+recipe=lerobot", f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0.4"]
    given += [
        "data.num_workers=0",
        "trainer.steps=3",
        "trainer.global_batch_size=4",
        "trainer.log_every=1",
        *TINY_POLICY,
    ]
    given += ["scheduler.warmup_steps=1", "validation.every=3", "logger=none", "data.chunk_length=4", *words]
    return train_here(given, tmp_path / name / "run")


def losses(run_dir, part: str) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k.startswith(part)} for row in metrics(run_dir).values()]


def test_a_sample_has_its_weight_in_training_and_1_in_a_validation(tmp_path):
    columns = {"observation.state": vector(4), "action": vector(3), "advantage": (NUMBER, lambda e, f: 3.0 + f)}
    root = write(tmp_path / "set", Dataset(cameras={}, columns=columns))
    words = ["+recipe=lerobot", f"data.sources.main.root={root}", COLUMN, f"paths.cache_dir={tmp_path / 'cache'}"]
    mixture = open_mixture(load_settings(cli.compose(words)))
    weights = {}
    for training in (True, False):
        with closing(SampleBuilder(mixture, training=training)) as builder:
            weights[training] = [builder.build(0, Address(0, 1, frame, 0))["weight"] for frame in range(3)]
    assert weights == {True: [3.0, 4.0, 5.0], False: [1.0, 1.0, 1.0]}


@pytest.mark.slow
def test_equal_weights_train_as_none_do_and_others_change_training_only(tmp_path):
    plain = run(tmp_path, "plain", lambda e, f: 1.0)
    same = run(tmp_path, "same", lambda e, f: 4.0, COLUMN)
    other = run(tmp_path, "other", lambda e, f: 1.0 + f, COLUMN)
    for tag in ("Training/Loss", "Training/GradNorm", "Validation/MSE"):
        for a, b in zip(losses(plain, tag), losses(same, tag), strict=True):
            assert a == pytest.approx(b, rel=1e-5), tag
    assert losses(other, "Training/Loss")[0] != pytest.approx(losses(plain, "Training/Loss")[0], rel=1e-3)
    zero = run(tmp_path, "zero", lambda e, f: 0.0, COLUMN, "optimizer.weight_decay=0")
    assert {row["Training/Loss"] for row in losses(zero, "Training/Loss")} == {0.0}
    untrained = run(tmp_path, "untrained", lambda e, f: 1.0, "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    assert losses(zero, "Validation/")[-1] == pytest.approx(losses(untrained, "Validation/")[-1])


@pytest.mark.slow
def test_a_weight_that_is_none_costs_its_episode_and_is_named(tmp_path):
    run_dir = run(tmp_path, "bad", lambda e, f: -1.0 if (e, f) == (2, 3) else 1.0, COLUMN)
    rows = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert rows and all(row["episode"] == 2 and "advantage is -1.0 in row 3" in row["cause"] for row in rows)


@pytest.mark.parametrize(("name", "words"), [("advantag", "advantag"), ("action", "3 values a row")])
def test_a_column_that_is_no_weight_is_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, "set", lambda e, f: 1.0, f"data.sources.main.weight_column={name}")
