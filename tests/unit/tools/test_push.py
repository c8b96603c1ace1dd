"""A policy is published by the Hub's own client and loaded by its name: the same actions, a truthful card."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from opentau_train import load_policy
from opentau_train.checkpoints.card import read_card
from opentau_train.deploy.model_card import SHOWN, escaped, model_card, table
from tests.hub_server import TOKEN, hub
from tests.nightly import AT_NIGHT, at_night
from tests.program import REPO, TOY, metrics, train_here

REPOSITORY = "me/toy_policy"
OBSERVATION = {"front": np.full((32, 32, 3), 90, np.uint8), "state": np.linspace(-1, 1, 6), "task": "push"}
ACT = """
import sys, numpy as np
from opentau_train import load_policy
policy = load_policy(sys.argv[1], norm_head="toy6::default")
seen = {"front": np.full((32, 32, 3), 90, np.uint8), "state": np.linspace(-1, 1, 6), "task": "push"}
np.save(sys.argv[2], policy.act(seen, seed=3))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "r"
    train_here([*TOY, "trainer.steps=2", "trainer.ema_decay=0.5"], run)
    return run


def python(environment, *arguments):
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, **environment, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def pushed(environment, *arguments):
    return python(environment, "-m", "opentau_train.tools.push", *arguments)


def test_what_is_published_is_loaded_by_its_name_and_acts_as_the_checkpoint(run, tmp_path):
    with hub() as there:
        environment = there.environment(tmp_path / "home")
        done = pushed(environment, f"checkpoint={run}", f"repo={REPOSITORY}", "licence=apache-2.0", "state=true")
        assert done.returncode == 0, done.stderr
        assert f"{there.url}/{REPOSITORY}/commit/" in done.stdout and f"load_policy('{REPOSITORY}')" in done.stdout
        assert there.messages == ["Policy of step 2, model weights"] and there.private == {REPOSITORY: False}
        files = there.repos[REPOSITORY]
        whole = run / "checkpoints" / "00000002"
        state = {p.relative_to(whole).as_posix(): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
        assert files.keys() == {"README.md", "policy.safetensors", *(f"training_state/{name}" for name in state)}
        assert all(files[f"training_state/{name}"] == content for name, content in state.items())
        there.asked.clear()
        acted = python(environment, "-c", ACT, REPOSITORY, tmp_path / "actions.npy")
        assert acted.returncode == 0, acted.stderr
        assert not [path for path in there.asked if "training_state" in path and "resolve" in path]
    expected = load_policy(run, norm_head="toy6::default").act(OBSERVATION, seed=3)
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), expected)


@at_night
def test_the_average_is_another_policy_and_a_second_push_goes_to_the_same_repository(run, tmp_path):
    with hub() as there:
        environment = there.environment(tmp_path / "home")
        for weights in ("model", "ema"):
            done = pushed(environment, f"checkpoint={run}", f"repo={REPOSITORY}", f"weights={weights}", "private=true")
            assert done.returncode == 0, done.stderr
        assert there.private == {REPOSITORY: True} and len(set(there.large.values())) == 2
        assert b"the moving average of the weights" in there.repos[REPOSITORY]["README.md"]


@pytest.mark.parametrize(
    ("words", "token", "texts"),
    [
        (
            [f"repo={REPOSITORY}"],
            "hf_wrong",
            ["the Hugging Face Hub didn't take the policy: ", "remedy: check the name"],
        ),
        (["repo=a/b/c"], TOKEN, ["'a/b/c' names no repository", "remedy: give repo=OWNER/NAME"]),
        (["repo=me/x", "checkpont=1"], TOKEN, ["unknown key", "did you mean 'checkpoint'?"]),
        pytest.param(["repo=-bad-/x y"], TOKEN, ["didn't take the policy"], marks=AT_NIGHT),
        (["me/x"], TOKEN, ["'me/x' is not KEY=VALUE"]),
    ],
)
def test_what_is_refused_is_told_in_three_lines(words, token, texts, run, tmp_path):
    with hub() as there:
        done = pushed(there.environment(tmp_path / "home", token), f"checkpoint={run}", *words)
        assert not there.repos
    assert done.returncode == 2 and all(text in done.stderr for text in texts), done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_the_card_has_the_shares_the_robots_and_the_last_held_out_losses(run):
    checkpoint = run / "checkpoints" / "00000002"
    card = read_card(checkpoint / "pretrained_model")
    text = model_card(REPOSITORY, checkpoint, "model", card, load_policy(run), "mit")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "mit" and head["library_name"] == "opentau_train"
    draws = {n: s["draws"] for n, s in json.loads((checkpoint / "run.json").read_text())["stream"]["sources"].items()}
    for name, num in draws.items():
        assert f"| {name} | one of its owner's | {num / sum(draws.values()):.1%} |" in text
    assert f"| main/default | MSE | {metrics(run)[2]['Validation/main/default/MSE']:.5g} |" in text
    assert (
        "toy6::default | front | 6 | 6 | 30 | not declared" in text
        and 'load_policy("me/toy_policy", norm_head=' in text
    )


def test_a_name_is_no_markup_and_a_long_table_is_counted():
    assert escaped("a|b\n<script>[x](y)") == r"a\|b \<script\>\[x\](y)"
    rows = [(number, "x") for number in range(SHOWN + 3)]
    assert table(("a", "b"), rows).endswith("and 3 more.") and table(("a", "b"), rows).count("\n| ") == SHOWN + 1
