"""Runs of pi0 and pi0.5 in this process: what they say, save and take up again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opentau_train.checkpoints import assets
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.errors import UserError
from opentau_train.tools.export import ExportSettings, export, predict
from tests.program import TOY, metrics, train_here
from tests.unit.models.pi_cases import words_file

pytestmark = pytest.mark.slow  # transformers takes 5 s to import

SMALL = ["model.vision.image_size=32", "model.vision.patch_size=8"]
WORDS = [*(word for word in TOY if not word.startswith("model.")), *SMALL, "logger=none"]
PI0 = ["model=pi0_tiny", *WORDS, "trainer.steps=2", "validation.every=0"]
PI05 = ["model=pi05_tiny", *WORDS, "model.action_tokens=binned", "model.insulate=true", "trainer.ema_decay=0.9"]


@pytest.fixture(autouse=True)
def no_cache_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "CACHE", str(tmp_path / "assets"))


def test_prompts_that_are_cut_are_counted_and_told_of(tmp_path, capsys):
    train_here([*PI0, "model.max_prompt_tokens=3"], tmp_path / "run")
    assert metrics(tmp_path / "run")[2]["Training/CutPrompts"] == 8
    told = [line for line in capsys.readouterr().err.splitlines() if "prompts so far have more tokens" in line]
    assert [line.split(" prompts")[0] for line in told] == ["step 1: 4", "step 2: 8"]


def test_a_prompt_that_may_not_be_cut_ends_the_run_before_data_are_read_with_the_limit_that_holds_all(tmp_path):
    words = [*PI05, "model.prompt_overflow=error", "trainer.steps=2", "validation.every=0"]
    with pytest.raises(UserError, match="tokens, the policy takes 3") as refused:
        train_here([*words, "model.max_prompt_tokens=3"], tmp_path / "run")
    kept = {path.name for path in (tmp_path / "cache").iterdir()} if (tmp_path / "cache").exists() else set()
    assert not (tmp_path / "run").exists() and kept <= {"keyframes"}  # the videos' indices, which the plan needs
    limit = refused.value.remedy.split()[1].rstrip(",")
    train_here([*words, limit], tmp_path / "run")
    assert metrics(tmp_path / "run")[2]["Training/CutPrompts"] == 0


def test_a_run_of_two_losses_goes_on_bit_by_bit_and_its_policy_is_exported(tmp_path):
    words = [*PI05, "trainer.steps=4", "checkpoint.every=2", "validation.every=4", "validation.max_samples_per_group=4"]
    whole = train_here(words, tmp_path / "whole")
    resumed = train_here([*words, f"resume={whole}/checkpoints/00000002"], tmp_path / "resumed")
    for step in (3, 4):
        assert metrics(resumed)[step] == metrics(whole)[step]
    assert {"Validation/MSE", "Validation/CE", "Training/main/default/CE"} <= metrics(whole)[4].keys()
    out, _ = export(ExportSettings(str(whole), str(tmp_path / "policy.safetensors"), weights="ema"))
    loaded = load_policy(out)
    (head, *_) = loaded.pipelines
    num = loaded.pipelines[head].transforms["pad"].dims[head][0]
    batch = loaded.observe([{"state": torch.zeros(num).numpy(), "prompt": "open the drawer"}], head)
    assert batch.prompt_tokens.max() > 0 and "action_tokens" in batch.values


def test_a_run_begins_with_the_weights_it_is_given_and_with_their_tokenizer(tmp_path, capsys):
    first = train_here([*PI0, "optimizer.lr=0.1"], tmp_path / "first")
    weights = load_policy(first).policy.state_dict()
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    words = [*PI0, f"model.pretrained_path={folder}", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    begun = load_policy(train_here(words, tmp_path / "bytes"))
    for name, value in begun.policy.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9)
    assert "prompts are read as bytes, which these weights have never seen" in capsys.readouterr().err
    words_file(folder)
    begun = load_policy(train_here(words, tmp_path / "words"))
    assert begun.policy.prompt.tokens("open", np.zeros(0))[0][:3].tolist() == [1, 2, -1]
    assert "as bytes" not in capsys.readouterr().err


def test_a_policy_carries_its_tokenizer(tmp_path):
    """The folder that it was trained with is gone. A stranger's policy writes nowhere but into the cache."""
    folder = tmp_path / "words"
    folder.mkdir()
    words_file(folder)
    run = train_here([*PI0, f"model.tokenizer_path={folder}", "model.vlm.vocab_size=300"], tmp_path / "run")
    before = predict(load_policy(run).policy)
    shutil.rmtree(folder)
    out, _ = export(ExportSettings(str(run), str(tmp_path / "policy.safetensors")))
    for path in (run, out):
        loaded = load_policy(path)
        assert predict(loaded.policy) == before
        (head, *_) = loaded.pipelines
        num = loaded.pipelines[head].transforms["pad"].dims[head][0]
        batch = loaded.observe([{"state": torch.zeros(num).numpy(), "prompt": "open the drawer"}], head)
        assert batch.prompt_tokens[0, :5].tolist() == [1, 2, 3, 4, -1]
    for path in (run, run / "checkpoints" / "last", out):
        words = [*PI0, f"model.pretrained_path={path}", "model.vlm.vocab_size=300"]
        with pytest.raises(UserError, match="the weights come with a tokenizer") as refused:
            train_here(words, tmp_path / "further")
        remedy = refused.value.remedy.removeprefix("set ")
    begun = load_policy(train_here([*words, remedy], tmp_path / "further"))
    assert begun.policy.prompt.tokens("open", np.zeros(0))[0][:3].tolist() == [1, 2, -1]
    with pytest.raises(UserError, match="is no plain name of a file"):
        assets.unpack({}, {"/words": {"../../tokenizer.json": "{}"}})
