"""The command line: every mistake ends with exit code 2 and a few lines that name it; help needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from opentau_train import cli
from opentau_train.sinks import last_word
from tests.program import REPO, environment, run

DROID = "+recipe=droid_policy"
MAX_LINES = 8

MISTAKES = {
    "no_recipe": ([], ["no dataset is configured", "+recipe=droid_policy", "+recipe=lerobot"]),
    "unknown_key_at_the_top": ([DROID, "+stesp=3"], ["'stesp'", "valid keys", "trainer"]),
    "unknown_key_that_stands_elsewhere": ([DROID, "stesp=3"], ["'stesp'", "did you mean 'trainer.steps'?"]),
    "unknown_key": ([DROID, "trainer.stesp=3"], ["'trainer.stesp'", "did you mean 'steps'?", "global_batch_size"]),
    "unknown_key_with_plus": ([DROID, "+trainer.stesp=3"], ["'trainer.stesp'", "did you mean 'steps'?"]),
    "unknown_key_of_a_source": (
        [DROID, "data.sources.droid.rooot=x"],
        ["'data.sources.droid.rooot'", "did you mean 'root'?", "val_split_ratio"],
    ),
    "unknown_option_of_a_source": (
        [DROID, "data.sources.droid.camera=[x]"],
        ["'data.sources.droid.camera'", "did you mean 'cameras'?", "tolerance_s", "val_split_ratio"],
    ),
    "wrong_type_of_a_sources_option": (
        [DROID, "data.sources.droid.state=3"],
        ["data.sources.droid.state must be a list, got 3"],
    ),
    "option_of_another_source": (
        [DROID, "data.sources.x._target_=tests.fake_source.FakeSource", "data.sources.x.length=[3]"],
        ["'data.sources.x.length'", "did you mean 'lengths'?", "bad"],
    ),
    "missing_option_of_a_source": (
        [DROID, "data.sources.x._target_=tests.fake_source.FakeSource"],
        ["data.sources.x.lengths is required", "add data.sources.x.lengths=VALUE"],
    ),
    "sources_option_at_the_top": ([DROID, "tolerance_s=1"], ["did you mean 'data.sources.NAME.tolerance_s'?"]),
    "unknown_key_of_the_model": ([DROID, "model.widht=3"], ["'model.widht'", "did you mean 'width'?", "depth"]),
    "unknown_key_of_a_logger": (
        [DROID, "logger.tensorboard.flush_second=1"],
        ["'logger.tensorboard.flush_second'", "did you mean 'flush_seconds'?"],
    ),
    "unknown_key_of_a_logger_without_keys": ([DROID, "logger.console.colour=1"], ["'logger.console.colour'", "none"]),
    "unknown_key_of_the_scheduler": (
        [DROID, "scheduler.warmup=3"],
        ["'scheduler.warmup'", "did you mean 'warmup_steps'?", "final_ratio"],
    ),
    "setting_of_hydra": ([DROID, "hydra.run.dir=x"], ["'hydra.run.dir'", "paths.run_dir"]),
    "group_of_hydra": ([DROID, "hydra/launcher=basic"], ["'hydra/launcher'", "leave it out"]),
    "wrong_type": ([DROID, "trainer.steps=many"], ["trainer.steps must be an integer, got 'many'"]),
    "wrong_type_of_the_model": ([DROID, "model.width=1.5"], ["model.width must be an integer, got 1.5"]),
    "fraction_for_an_integer": ([DROID, "seed=1.5"], ["seed must be an integer, got 1.5"]),
    "mapping_expected": ([DROID, "data.sources=3"], ["data.sources must be a mapping, got 3"]),
    "bad_value": ([DROID, "optimizer.lr=-1"], ["optimizer.lr must be greater than 0", "set optimizer.lr"]),
    "bad_value_of_a_source": (
        [DROID, "data.sources.droid.weight=-1.5"],
        ["data.sources.droid.weight must be at least 0, got -1.5"],
    ),
    "bad_choice": (
        [DROID, "data.normalization=meanstd"],
        ["data.normalization='meanstd'", "did you mean 'mean_std'?", "mean_std, min_max, quantiles"],
    ),
    "bad_group_choice": (
        [DROID, "model=flow_tinny"],
        ["model=flow_tinny", "did you mean 'flow_tiny'?", "flow_base, flow_small, flow_tiny"],
    ),
    "bad_choice_in_a_list": ([DROID, "logger=[console,wandbb]"], ["logger=wandbb", "did you mean 'wandb'?"]),
    "bad_recipe": (["+recipe=droid_polcy"], ["recipe=droid_polcy", "did you mean 'droid_policy'?", "lerobot"]),
    "recipe_without_plus": (["recipe=droid_policy"], ["recipe has no default", "write +recipe=NAME"]),
    "debug_without_plus": ([DROID, "debug=smoke"], ["debug has no default", "write +debug=NAME"]),
    "plus_where_there_is_a_default": ([DROID, "+logger=wandb"], ["logger has a choice already", "logger=NAME"]),
    "value_for_a_section": ([DROID, "trainer=3"], ["trainer is a section", "trainer=3", "trainer.KEY=VALUE"]),
    "unclosed_bracket": ([DROID, "trainer.steps=[1,2"], ["'trainer.steps=[1,2'", "write KEY=VALUE"]),
    "argument_without_value": ([DROID, "trainer.steps"], ["'trainer.steps'", "write KEY=VALUE"]),
    "argument_without_key": ([DROID, "=3"], ["'=3'", "no key"]),
    "sweep": ([DROID, "trainer.steps=1,2"], ["'trainer.steps=1,2' is a sweep", "KEY=[A,B]"]),
    "path_with_a_comma": (
        [DROID, "data.sources.droid.root=/data/a,b"],
        ["root=/data/a,b' is a sweep", "a value with a comma in two pairs of quotes, 'KEY=\"A,B\"'"],
    ),
    "missing_interpolation": (
        [DROID, "name=${nothing.there}"],
        ["name", "'nothing.there' not found", "set name=VALUE"],
    ),
    "missing_environment": (
        [DROID, "name=${oc.env:NOT_SET_ANYWHERE}"],
        ["name is taken from the environment variable NOT_SET_ANYWHERE", "export NOT_SET_ANYWHERE=VALUE"],
    ),
    "missing_value": ([DROID, "trainer.steps=???"], ["trainer.steps is required", "add trainer.steps=VALUE"]),
    "removed_key": ([DROID, "~trainer.steps"], ["trainer.steps is required"]),
    "another_primary_configuration": ([DROID, "--config-name", "own"], ["--config-name own", "--help"]),
    "another_primary_configuration_is_not_shown": ([DROID, "--cfg", "job", "-cn", "own"], ["-cn own", "--help"]),
    "sweep_that_is_shown": ([DROID, "--cfg=job", "--multirun"], ["a sweep is of several runs", "--multirun"]),
    "unknown_flag": ([DROID, "--nosuchflag"], ["--nosuchflag", "--help"]),
    "flag_without_value": ([DROID, "--cfg"], ["--cfg", "expected one argument"]),
    "config_directory_that_is_not_there": (
        [DROID, "--config-dir", "nowhere"],
        ["'nowhere' is not there", "--config-dir"],
    ),
    "class_that_is_not_there": (
        [DROID, "model._target_=opentau_train.models.flow.FlowPolcy"],
        ["model._target_", "FlowPolcy", "full dotted path"],
    ),
    "what_cfg_shows_is_checked_as_a_run_checks_the_model": (
        [DROID, "--cfg", "job", "model.widht=4"],
        ["'model.widht'", "did you mean 'width'?"],
    ),
    "what_cfg_shows_is_checked_as_a_run_checks_the_scheduler": (
        [DROID, "--cfg", "job", "scheduler.warmup=3"],
        ["'scheduler.warmup'", "did you mean 'warmup_steps'?"],
    ),
    "what_cfg_shows_is_checked_as_a_run_checks_the_optimizer": (
        [DROID, "--cfg", "job", "optimizer.betsa=[0.9,0.95]"],
        ["'optimizer.betsa'", "did you mean 'betas'?"],
    ),
    "what_cfg_shows_is_checked_as_a_run_checks_the_loggers": (
        [DROID, "--cfg", "job", "logger.tensorboard.flush_second=1"],
        ["'logger.tensorboard.flush_second'", "did you mean 'flush_seconds'?"],
    ),
    "what_cfg_shows_is_checked": ([DROID, "--cfg", "job", "trainer.stesp=3"], ["'trainer.stesp'", "'steps'"]),
}


def in_process(monkeypatch, capsys, arguments: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of the entry, run in this process."""
    monkeypatch.setattr(sys, "argv", ["opentau_train", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("DROID_ROOT", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


def assert_clear(code: int, said: str, *texts: str) -> None:
    """A user's mistake: exit code 2, one short message with all `texts` in it and a remedy, no traceback."""
    lines = said.strip().splitlines()
    assert code == 2, said
    assert lines[0].startswith("error: ") and said.count("error: ") == 1, said
    assert len(lines) <= MAX_LINES, said
    assert "Traceback" not in said and "Error executing" not in said
    for text in (*texts, "remedy: "):
        assert text in said, said


def test_every_key_that_cfg_shows_can_be_set_on_the_command_line(monkeypatch, capsys):
    """Each to what it is: the configuration stays the same."""

    def leaves(tree: dict, path: str = ""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{path}{key}.")
            elif value is None or isinstance(value, bool | int | float):
                yield f"{path}{key}={'null' if value is None else str(value).lower()}"
            elif isinstance(value, str):
                yield f"{path}{key}='{value}'"

    def shown(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["opentau_train", DROID, "--cfg", "job", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return printed.out

    monkeypatch.delenv("DROID_ROOT", raising=False)
    before = shown()
    settable = list(leaves(yaml.safe_load(before)))
    assert len(settable) > 100 and "flight_recorder=false" in settable
    assert shown(*(s for s in settable if "${" not in s and "_target_" not in s)) == before


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments, texts = MISTAKES[name]
    assert_clear(*in_process(monkeypatch, capsys, arguments), *texts)
    assert not any(tmp_path.iterdir()), "a run that never began leaves nothing behind"


YAMLS = {
    "good": ("defaults: [lerobot, _self_]\nname: mine\ntrainer: {steps: 7}", []),
    "wrong_key": ("defaults: [lerobot, _self_]\ntrainer: {stesp: 7}", ["'trainer.stesp'", "did you mean 'steps'?"]),
    "wrong_key_of_a_source": (
        "defaults: [lerobot, _self_]\ndata: {sources: {main: {wieght: 2}}}",
        ["'data.sources.main.wieght'", "did you mean 'weight'?"],
    ),
    "wrong_type": (
        "defaults: [lerobot, _self_]\ntrainer: {steps: yes}",
        ["trainer.steps must be an integer, got True"],
    ),
    "wrong_choice": ("defaults:\n  - override /data: lerobto", ["data=lerobto", "did you mean 'lerobot'?"]),
    "wrong_group": ("defaults:\n  - override /dta: lerobot", ["'dta'", "did you mean 'data'?"]),
    "not_yaml": ("trainer: {steps: 7\nname: x", ["not YAML", "not_yaml.yaml, line"]),
    "twice": ("name: a\nname: b", ["duplicate key", "twice.yaml, line"]),
    "missing_interpolation": ("defaults: [lerobot, _self_]\nname: ${nothing.there}", ["'nothing.there' not found"]),
}


@pytest.fixture
def config_dir(tmp_path) -> Path:
    """A user's own configuration directory, in the current directory."""
    folder = tmp_path / "mine"
    (folder / "recipe").mkdir(parents=True)
    for name, (text, _) in YAMLS.items():
        (folder / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return folder


@pytest.mark.parametrize("name", [name for name in YAMLS if name != "good"])
def test_a_mistake_in_a_users_own_yaml_is_named(name, config_dir, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-dir", "mine", f"+recipe={name}"]
    assert_clear(*in_process(monkeypatch, capsys, arguments), *YAMLS[name][1])


@pytest.mark.parametrize("value", ["/data/a,b", "a=b", "x{y}"])
def test_a_value_in_two_pairs_of_quotes_is_taken_as_it_stands(value):
    tree = cli.compose(["+recipe=lerobot", f'data.sources.main.root="{value}"'])
    assert tree["data"]["sources"]["main"]["root"] == value


def test_a_users_directory_may_have_any_name_and_ask_hydra_for_the_choices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Path("a, 'b' \"c\" [d]") / "recipe" / "own.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\ndefaults: [lerobot, _self_]\nname: ${hydra:runtime.choices.model}\n")
    tree = cli.compose([f"--config-dir={recipe.parents[1]}", "+recipe=own", "model=flow_small"])
    assert tree["name"] == "flow_small"
    assert tree.keys() == cli.compose(["+recipe=lerobot"]).keys()


def test_a_users_own_recipe_composes_from_any_directory(config_dir, tmp_path):
    done = run(["--config-dir", "mine", "+recipe=good", "--cfg", "job"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout and "steps: 7" in done.stdout


def test_a_real_process_answers_like_the_function(tmp_path):
    done = run([DROID, "trainer.stesp=3"], cwd=tmp_path)
    assert_clear(done.returncode, done.stderr, "'trainer.stesp'", "did you mean 'steps'?")
    assert not done.stdout


def test_the_traceback_is_there_for_those_who_ask(tmp_path):
    done = run([DROID, "trainer.stesp=3"], cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "unknown key 'trainer.stesp'" in done.stderr


def test_a_fault_of_the_program_shows_its_traceback(monkeypatch, capsys):
    def broken(tree: dict) -> int:
        raise KeyError("of its own")

    monkeypatch.setattr(cli, "_run", broken)
    code, said = in_process(monkeypatch, capsys, [DROID])
    assert code == 1 and "Traceback" in said and "of its own" in said


@pytest.mark.distributed
def test_two_ranks_say_it_once(tmp_path):
    done = run([DROID, "trainer.stesp=3"], ranks=2, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("unknown key 'trainer.stesp'") == 1, done.stderr
    *_, error, remedy, border = done.stderr.strip().splitlines()
    assert error.strip().startswith("error: unknown key") and "remedy:" in remedy and set(border) == {"="}
    screen = [sys.executable, "-I", REPO / "launchers" / "screen.py"]
    ended = subprocess.run(screen, input="step 1\n" + done.stderr, text=True, capture_output=True, check=True)
    first, *_, error, remedy = ended.stdout.strip().splitlines()
    assert first == "step 1" and error.startswith("error: unknown key") and remedy.startswith("  remedy: ")
    assert "Traceback" not in ended.stdout and "elastic" not in ended.stdout, ended.stdout


def test_a_rank_that_fails_alone_says_so_after_a_while(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(last_word, "HEAD_START_S", 0.1)
    assert_clear(*in_process(monkeypatch, capsys, [DROID, "trainer.stesp=3"]), "'trainer.stesp'")


def test_a_mistake_that_rank_0_has_left_to_torchrun_is_not_told_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(last_word, "HEAD_START_S", 0.1)
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert in_process(monkeypatch, capsys, [DROID, "trainer.stesp=3"]) == (2, "")
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "0" / "error.json"))
    assert "error: unknown key 'trainer.stesp'" in ChildFailedError("opentau_train", {0: failure}).format_msg()
    assert not (tmp_path / "1" / "error.json").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], [DROID, "trainer.stesp=3"], [DROID, "--cfg", "job", "trainer.stesp=3"]], ids=str
)
def test_an_answer_without_training_needs_no_torch(arguments, tmp_path):
    code = (
        "import sys; from opentau_train import cli; sys.argv = ['opentau_train', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment(), text=True, capture_output=True
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    assert done.returncode == (2 if "trainer.stesp=3" in arguments else 0)


def test_help_lists_the_groups_and_the_commands_to_copy(tmp_path):
    done = run(["--help"], cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    for group in (REPO / "conf").iterdir():
        if group.is_dir() and group.name != "__pycache__":
            assert group.name in done.stdout
    assert "+recipe=droid_policy" in done.stdout and "torchrun" in done.stdout
