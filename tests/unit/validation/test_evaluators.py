"""What a validation measures is a list in the configuration, with older runs' names for it still understood."""

import json

import pytest

from opentau_train import cli, validate
from opentau_train.checkpoints.commit import seal
from opentau_train.config import drift
from opentau_train.config.settings import current, load_settings
from opentau_train.errors import UserError
from opentau_train.validation.evaluator import Evaluation, Evaluator
from opentau_train.validation.passes import open_evaluators
from tests.program import TOY, metrics, train_here

HERE = "opentau_train.validation"
OLD = {"metrics": ["action"], "max_action_samples": 5, "num_action_plots": 2}
NEW = ["validation.evaluators=[loss,action]", "validation.evaluator.action.max_samples_per_group=5"]
NEW.append("validation.evaluator.action.num_plots=2")


def as_older(tree):
    """The tree as a version without evaluators would have written it."""
    kept = {k: v for k, v in tree["validation"].items() if not k.startswith("evaluator")}
    return {**tree, "validation": {**kept, **OLD}}


class Twice(Evaluator):
    """Gives a tag that the loss pass gives too."""

    def run(self, context):
        return Evaluation({"Validation/Loss": 0.0})


def test_bare_names_choose_and_options_stand_under_the_name():
    settings = load_settings(cli.compose([*TOY, *NEW])).validation
    loss, action = open_evaluators(settings).values()
    assert type(loss).__name__ == "LossEvaluator" and (action.max_samples_per_group, action.num_plots) == (5, 2)
    assert list(open_evaluators(load_settings(cli.compose(TOY)).validation)) == ["loss"]


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            "validation.evaluators=[loss,acton]",
            ["no evaluator is called 'acton': did you mean 'action'?"],
        ),
        ("validation.evaluators=[loss,loss]", ["names one twice", "validation.evaluators=[loss]"]),
        ("validation.evaluators=[]", ["validation.evaluators is empty", "validation.every=0"]),
        ("validation.evaluators=loss", ["validation.evaluators must be a list, got 'loss'"]),
        ("validation.metrics=action", ["validation.metrics must be a list"]),
        (
            "validation.evaluator.action.num_plotz=1",
            ["unknown key", "action.num_plotz'", "did you mean 'num_plots'?"],
        ),
        ("validation.evaluator.action.num_plots=x", ["validation.evaluator.action.num_plots must be an integer"]),
        ("validation.evaluator.mine={}", ["validation.evaluator.mine has no _target_"]),
        (
            "validation.evaluators=[action] validation.evaluator.action.max_samples_per_group=0",
            ["validation.evaluator.action.max_samples_per_group must be greater than 0"],
        ),
    ],
)
def test_a_mistake_is_answered_with_its_key(change, texts):
    with pytest.raises(UserError) as error:
        open_evaluators(load_settings(cli.compose([*TOY, *change.split()])).validation)
    assert all(text in str(error.value) for text in texts), error.value


def test_the_older_keys_mean_what_they_meant():
    tree = cli.compose([*TOY, *NEW])
    older = as_older(tree)
    assert load_settings(older) == load_settings(tree)
    assert drift.compare(current(older), tree) == []
    on_the_command_line = [f"validation.{k}={json.dumps(v)}" for k, v in OLD.items()]
    assert load_settings(cli.compose([*TOY, *on_the_command_line])) == load_settings(tree)
    assert current(tree) is tree
    unset = {"metrics": [], "max_action_samples": 32, "num_action_plots": 4}
    changed = {**older, "validation": {**older["validation"], **unset}}
    assert load_settings(changed) == load_settings(cli.compose(TOY))


def test_another_list_of_evaluators_is_a_warning_of_a_resume():
    (change,) = drift.compare(cli.compose(TOY), cli.compose([*TOY, "validation.evaluators=[loss,action]"]))
    assert (change.key, change.kind) == ("validation.evaluators", "warned")


@pytest.mark.slow
def test_a_run_of_an_older_version_is_validated_and_goes_on_by_its_old_command(tmp_path):
    run = [*TOY, "trainer.steps=2", "validation.every=2"]
    train_here([*run, *NEW], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "00000002"
    config = checkpoint / "pretrained_model" / "config.json"
    config.write_text(json.dumps(as_older(json.loads(config.read_text()))))
    seal(checkpoint)
    logged = {k: v for k, v in metrics(tmp_path / "run")[2].items() if k.startswith("Validation")}
    arguments = [f"checkpoint={checkpoint}", f"paths.cache_dir={tmp_path / 'cache'}", f"out={tmp_path / 'v.json'}"]
    validate.run(arguments)
    assert json.loads((tmp_path / "v.json").read_text())["metrics"] == logged
    validate.run([*arguments, "validation.evaluators=[loss]"])
    only_losses = {k: v for k, v in logged.items() if not k.startswith("Validation-Action")}
    assert json.loads((tmp_path / "v.json").read_text())["metrics"] == only_losses != logged
    command = [*run, *(f"validation.{k}={json.dumps(v)}" for k, v in OLD.items())]
    train_here([*command, "trainer.steps=4", "resume=auto"], tmp_path / "run")
    assert metrics(tmp_path / "run")[4].keys() >= logged.keys()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "resumed from" in log and "validation." not in log.partition("settings that differ")[2]


@pytest.mark.slow
def test_actions_alone_keep_no_best_checkpoint(tmp_path):
    run = [*TOY, "trainer.steps=2", "validation.every=1", "validation.evaluators=[action]"]
    train_here(run, tmp_path / "run")
    row = metrics(tmp_path / "run")[1]
    assert {tag.split("/")[0] for tag in row if tag.startswith("Validation")} == {"Validation-Action"}
    assert not (tmp_path / "run" / "checkpoints" / "best").exists() and not (tmp_path / "run" / "passes").exists()


def test_two_evaluators_with_one_tag_are_refused(tmp_path):
    twice = [f"validation.evaluator.twice._target_={__name__}.Twice", "validation.evaluators=[loss,twice]"]
    with pytest.raises(UserError, match="the evaluator 'twice' gives Validation/Loss, and so does one before it"):
        train_here([*TOY, "trainer.steps=1", "validation.every=1", *twice], tmp_path / "run")


def test_a_run_from_before_an_evaluator_was_there_goes_on_without_a_word():
    tree = cli.compose(TOY)
    kept = {name: options for name, options in tree["validation"]["evaluator"].items() if name != "rollout"}
    older = {**tree, "validation": {k: v for k, v in tree["validation"].items() if k != "best"} | {"evaluator": kept}}
    assert drift.compare(current(older), current(tree)) == [] and load_settings(older) == load_settings(tree)
