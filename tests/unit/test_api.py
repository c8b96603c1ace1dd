"""The program from Python: what docs/python.md shows runs, and mistakes are raised in the program's form."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest

import opentau_train
from opentau_train.errors import UserError
from tests.program import DATA, REPO, TINY_POLICY, environment

ARGUMENTS = ["+recipe=lerobot", f"data.sources.main.root={DATA / 'lerobot_v30'}"]


def test_the_example_of_the_document_trains_and_reads_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENTAU_CACHE", str(tmp_path / "cache"))
    text = (REPO / "docs" / "python.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    quick = [
        *TINY_POLICY,
        "trainer.log_every=1",
        "logger=none",
        "trainer.global_batch_size=4",
        "data.num_workers=0",
        "trainer.steps=3",
    ]
    example = example.replace("/data/my_dataset", str(DATA / "lerobot_v30"))
    example = example.replace('"trainer.steps=1000",\n', ", ".join(map(repr, quick)) + ",\n")
    known: dict = {}
    exec(example, known)
    trained, policy = known["trained"], known["policy"]
    assert trained.finished and trained.run_dir.parent == tmp_path / "runs"
    assert trained.run_dir.name.startswith("lerobot-lerobot_v30-")
    assert list(trained.metrics()) == [1, 2, 3] and trained.metrics()[3]["Training/LearningRate"] <= 3e-4
    assert (trained.run_dir / "checkpoints" / "last").exists()
    assert policy.action_names and "3 " in capsys.readouterr().out


def test_what_compose_gives_is_what_the_command_line_has():
    from opentau_train import cli

    words = [*ARGUMENTS, "trainer.steps=7"]
    assert opentau_train.compose(words) == cli.compose(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*ARGUMENTS, "trainer.stps=3"], "did you mean 'steps'"),
        ([*ARGUMENTS, "model=nothing"], "nothing"),
        ([], "no dataset is configured"),
        (["+recipe=lerobot", "trainer.steps"], "can't read the argument 'trainer.steps'"),
    ],
)
def test_a_mistake_is_raised_in_the_program_s_form(words, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        opentau_train.compose(words)
    assert raised.value.remedy


def test_a_changed_tree_is_checked_before_anything_is_made(tmp_path):
    config = opentau_train.compose([*ARGUMENTS, f"paths.run_dir={tmp_path / 'run'}"])
    config["trainer"]["steps"] = -1
    with pytest.raises(UserError, match=r"trainer\.steps"):
        opentau_train.train(config)
    assert not (tmp_path / "run").exists()


def test_a_training_in_a_thread_is_refused(tmp_path):
    config, errors = opentau_train.compose([*ARGUMENTS, f"paths.run_dir={tmp_path / 'run'}"]), []

    def call():
        try:
            opentau_train.train(config)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0]) and not (tmp_path / "run").exists()


def test_several_processes_need_a_directory_in_common(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no run directory in common"):
        opentau_train.train(opentau_train.compose(ARGUMENTS))


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        opentau_train.trane  # noqa: B018


def test_compose_does_without_torch():
    code = "import sys, opentau_train; opentau_train.__getattr__('compose'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment()).returncode == 0
