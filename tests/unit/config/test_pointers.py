"""Keys of neighbouring programs lead to keys that exist here, wherever they are typed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from opentau_train import cli
from opentau_train.config.explain import refused_flags
from opentau_train.config.pointers import POINTERS, pointer
from opentau_train.config.settings import load_settings
from opentau_train.errors import UserError

RECIPE = "+recipe=lerobot"


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return cli.compose([RECIPE, "model.pretrained_path=x", "model.vlm_path=null"])


def value_of(tree: dict[str, Any], key: str) -> Any:
    """The configured value of a key; KeyError where there is no such key."""
    for part in key.split("."):
        tree = tree[part]
    return tree


def test_every_pointer_leads_to_a_key_that_can_be_set(tree):
    """What they say to write, with the key's own value where they say VALUE, composes."""
    written = {}
    for key in POINTERS:
        text = pointer(key)
        assert text is not None
        target, value = re.fullmatch(r"write ([\w.]+)=(\S+)( \(.+\))?", text).groups()[:2]
        target = target.replace("NAME", "main")
        written[target] = json.dumps(value_of(tree, target)) if value == "VALUE" else value
    load_settings(cli.compose([RECIPE, *(f"{target}={value}" for target, value in written.items())]))


def test_no_key_of_another_program_is_one_of_this_one(tree):
    for key in (key for key in POINTERS if not key.startswith("--")):
        with pytest.raises(KeyError):
            value_of(tree, key)


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("data.use_filter_dict=true", "write data.sources.NAME.use_filter_dict=true (NAME is droid with data=droid"),
        ("dataset.repo_id=lerobot/droid_1.0.1", "write data.sources.NAME.repo_id=lerobot/droid_1.0.1"),
        ("policy.type=act", "write model=flow_base"),
        ("model.config.parallelism.data_parallel_shard_degree=8", "write parallelism.data_parallel_shard_degree=8"),
        ("+model.config.parallelism.data_parallel_replicate_degree=2", "parallelism.data_parallel_replicate_degree=2"),
        (
            "dataloader_train.dataloader.datasets.droid.dataset.filter_dict_path=/keep.json",
            "write data.sources.NAME.filter_dict_path=/keep.json",
        ),
        ("model.config.parallelism.enable_inference_mode=true", "write parallelism=hsdp (or ddp or fsdp"),
        ("max_num_tokens_after_packing=-1", "write data.max_num_tokens_after_packing=VALUE (with model.packing=true)"),
        ("VLM_SAFETENSORS_PATH=/weights", "write model.vlm_path=VALUE"),
        ("policy.path=lerobot/act", "write model.pretrained_path=lerobot/act (a safetensors file"),
        ("steps=100", "write trainer.steps=VALUE"),
        ("trainer.max_iter=10000", "write trainer.steps=10000"),
        ("+batch_size=8", "write trainer.global_batch_size=8"),
        ("--steps=100", "write trainer.steps=100"),
        ("--batch_size=8", "write trainer.global_batch_size=8"),
        ("--policy.type=act", "write model=flow_base"),
        ("--exp-name=first", "write name=first"),
        ("--resume", "write resume=auto"),
        ("--trainer.steps=5", "write trainer.steps=5, without dashes"),
    ],
)
def test_what_is_typed_is_answered_with_the_key_to_write(typed, remedy):
    with pytest.raises(Exception) as refused:  # Hydra's own errors too: `explain` is what users see
        cli.checked(cli.compose([RECIPE, typed]))
    error = cli.explain(refused.value)
    assert isinstance(error, UserError) and remedy in error.remedy


def test_several_options_get_one_answer():
    error = refused_flags(["--steps=100", "--batch_size", "8", "--dataset.repo_id=a/b", "--nobodys=1"])
    assert error.what == "unrecognized arguments: --steps=100 --batch_size 8 --dataset.repo_id=a/b --nobodys=1"
    for text in ("write trainer.steps=100;", "trainer.global_batch_size=8", "data.sources.NAME.repo_id=a/b"):
        assert text in error.remedy
    assert refused_flags(["--nobodys=1"]).remedy == "see python -m opentau_train --help"


def test_a_wrong_key_of_nobody_keeps_its_own_answer():
    with pytest.raises(UserError, match="did you mean 'steps'"):
        load_settings(cli.compose([RECIPE, "trainer.step=5"]))


def test_the_program_itself_answers_options(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["opentau_train", "--steps=5", RECIPE, "--batch_size", "8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "remedy: write trainer.steps=5; write trainer.global_batch_size=8" in capsys.readouterr().err
