"""Everything that ships composes; every recipe trains."""

import dataclasses
import shutil
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf.errors import MissingMandatoryValue

from opentau_train import composing
from opentau_train.config.arguments import settable
from opentau_train.config.settings import Settings, load_settings
from opentau_train.config.typed import bind
from opentau_train.data.builtin.droid import SampleSpec, ensure_droid_sample
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.models.policy import build_policy, check_model
from opentau_train.tools import export
from opentau_train.types import BatchSpec
from opentau_train.validation.passes import open_evaluators
from tests.nightly import at_night
from tests.program import DATA, REPO, TINY_POLICY, TOY, metrics, train_here

CONF = REPO / "conf"
SPEC = BatchSpec(("a", "b"), (48, 80), 0, 8, 8, 16)


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> Settings:
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        return load_settings(composing.plain(hydra.compose("train", [settable(o) for o in overrides])))


GROUPS = ("model", "optimizer", "scheduler", "trainer", "validation", "checkpoint", "parallelism", "logger", "paths")


FINETUNE = {"full": (), "freeze": ("finetune.frozen=[stem.*]",), "lora": ()}


@pytest.mark.slow
@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_choice_composes_and_fits_its_class(choice):
    settings = composed("+recipe=droid_policy", choice, "data.image_size=[224,224]")
    check_model(settings.model, settings.data)
    bind(settings.scheduler, "scheduler", [])
    open_evaluators(settings.validation)
    for name, sink in settings.logger.items():
        bind(sink, f"logger.{name}", ["context"])


@pytest.mark.parametrize("choice", options("finetune"))
def test_every_way_to_fine_tune_composes(choice):
    settings = composed("+recipe=droid_policy", f"finetune={choice}", *FINETUNE[choice])
    assert (settings.finetune.rank is not None) == (choice == "lora") and settings.finetune.alpha is None


def test_freezing_asks_what():
    with pytest.raises(MissingMandatoryValue, match=r"finetune\.frozen"):
        composed("+recipe=droid_policy", "finetune=freeze")


@at_night
@pytest.mark.parametrize("recipe", options("recipe"))
@pytest.mark.parametrize("debug", options("debug"))
def test_every_recipe_composes_with_every_debug_option(recipe, debug):
    assert composed(f"+recipe={recipe}", f"+debug={debug}").trainer.steps >= 2


@pytest.mark.parametrize("source", options("data/source"))
def test_every_source_composes_into_a_mixture(source):
    assert "more" in composed("+recipe=lerobot", f"+data/source@data.sources.more={source}").data.sources


MODELS = [pytest.param(m, marks=pytest.mark.slow) if m.startswith("pi") else m for m in options("model")]


@pytest.mark.parametrize("size", MODELS)
def test_every_model_builds(size):
    settings = composed("+recipe=droid_policy", f"model={size}", "data.image_size=[96,96]")
    tree, spec = settings.model, dataclasses.replace(SPEC, image_size=(96, 96))
    with torch.device("meta"):
        assert sum(p.numel() for p in build_policy(tree, spec).parameters()) > 1e5


@pytest.fixture(scope="module")
def small_sample(tmp_path_factory) -> dict[str, Path]:
    spec = SampleSpec(num_episodes=4, min_frames=60, max_frames=70, episodes_per_data_file=2, episodes_per_video_file=2)
    return ensure_droid_sample(tmp_path_factory.mktemp("cache"), spec)


@pytest.mark.slow
def test_the_droid_recipe_trains_on_droid_root(small_sample, tmp_path, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(small_sample["joint"]))
    run = train_here(["+recipe=droid_policy", "+debug=smoke", *TINY_POLICY], tmp_path / "run")
    rows = metrics(run)
    assert sorted(rows) == [1, 2] and rows[2]["Validation/droid/joint/MSE/N"] == 4
    assert (run / "config.yaml").is_file() and (run / "train.log").is_file() and list(run.glob("tensorboard/*"))


@pytest.mark.slow
def test_the_droid_recipe_without_droid_root_trains_on_the_sample_and_says_so(
    small_sample, tmp_path, monkeypatch, capsys
):
    """The small sample stands at the place of the whole one, which takes longer to make."""
    monkeypatch.delenv("DROID_ROOT", raising=False)
    place = tmp_path / "cache" / f"droid_sample-{SampleSpec().stamp}"
    shutil.copytree(small_sample["joint"].parent, place)
    rows = metrics(train_here(["+recipe=droid_policy", "+debug=smoke", *TINY_POLICY], tmp_path / "run"))
    assert {"Validation/droid/joint/MSE", "Validation/droid_ee/ee/MSE"} <= rows[2].keys()
    said = [line for line in capsys.readouterr().err.splitlines() if "BUILT-IN DROID SAMPLE" in line]
    assert len(said) == 1 and "DROID_ROOT" in said[0]
    arm = "[{kind:joint,dims:7,unit:rad},{kind:gripper,polarity:closed,range:[0,1]}]"
    wanted = "[{kind:joint},{kind:position},{kind:rotation,rotation:rot6d},{kind:gripper}]"
    conventions = [f"data.sources.droid.convention.actions={arm}", f"data.convention.actions={wanted}"]
    settings = composed("+recipe=droid_policy", f"paths.cache_dir={tmp_path / 'cache'}", *conventions)
    plan = open_plan(settings, resolve_sources(settings))
    assert [d.conversions.convention.space for d in plan.datasets] == ["joint", "ee"]
    assert [len(d.action_names) for d in plan.datasets] == [8, 10]


@pytest.mark.slow
def test_the_wam_recipe_trains_validates_resumes_and_is_exported(small_sample, tmp_path, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(small_sample["joint"]))
    words = ["+recipe=droid_wam", "+debug=smoke", *TINY_POLICY, "model.num_flow_steps=2"]
    run = train_here(words, tmp_path / "run")
    train_here([*words, "trainer.steps=3", "resume=auto"], run)
    rows = metrics(run)
    measured = {"Validation/droid/joint/VISION_MSE", "Validation-Action/droid/joint/MAE_rad"}
    measured |= {"Validation-Video/droid/joint/PSNR", "Validation-Video/droid/joint/Copy/PSNR"}
    assert measured <= rows[2].keys() and 3 in rows and (run / "plots" / "video_00000002.png").is_file()
    assert export.main([f"checkpoint={run}", f"out={tmp_path / 'policy.safetensors'}"]) == 0


def test_the_wam_recipe_has_the_published_weights_and_times_at_every_scale():
    for words in ([], ["scale=node", "model=wam_small"], ["scale=cluster", "model=wam_base"]):
        settings = composed("+recipe=droid_wam", *words)
        check_model(settings.model, settings.data)
        given = {key: settings.model[key] for key in ("mse_weight", "vision_mse_weight", "future_time_shift")}
        assert given == {"mse_weight": 10.0, "vision_mse_weight": 10.0, "future_time_shift": 3.0}
        assert (settings.model["future_time"], settings.model["shared_time"]) == ("heavy_tailed", True)
        assert settings.data.sources["droid"].mode == "wam" and settings.data.future.num_frames == 4


@pytest.mark.slow
def test_both_control_modes_of_the_sample_train_as_two_sources(small_sample, tmp_path):
    sources = ["data=droid", f"data.sources.droid.root={small_sample['joint']}"]
    sources += ["+data/source@data.sources.droid_ee=droid_ee", f"data.sources.droid_ee.root={small_sample['ee']}"]
    rows = metrics(train_here([*sources, "+debug=smoke", *TINY_POLICY], tmp_path / "run"))
    assert {"Validation/droid/joint/MSE", "Validation/droid_ee/ee/MSE"} <= rows[2].keys()


@pytest.mark.slow
def test_the_act_recipe_trains_validates_resumes_and_is_exported_to_lerobot(tmp_path):
    settings = composed("+recipe=lerobot_act")
    assert (settings.optimizer.lr, settings.trainer.global_batch_size, settings.data.chunk_length) == (1e-5, 8, 100)
    assert settings.trainer.grad_clip == 10.0 and settings.optimizer.options["betas"] == [0.9, 0.999]
    words = [
        "+recipe=lerobot_act",
        "+debug=smoke",
        "model=act_tiny",
        "model.width=32",
        "model.backbone_norm=frozen_batch",
    ]
    words += [f"data.sources.main.root={DATA / 'lerobot_v30'}", "data.image_size=[32,32]", "data.chunk_length=8"]
    run = train_here(words, tmp_path / "run")
    train_here([*words, "trainer.steps=3", "resume=auto"], run)
    assert {"Validation/main/default/L1", "Validation/main/default/KL"} <= metrics(run)[2].keys() and 3 in metrics(run)
    assert export.main([f"checkpoint={run}", "format=lerobot", f"out={tmp_path / 'out'}"]) == 0


@pytest.mark.slow
def test_the_diffusion_recipe_trains_validates_resumes_and_is_exported_to_lerobot(tmp_path):
    settings = composed("+recipe=lerobot_diffusion")
    assert (settings.optimizer.lr, settings.trainer.global_batch_size, settings.data.chunk_length) == (1e-4, 8, 16)
    assert settings.optimizer.options == {"betas": [0.95, 0.999], "eps": 1e-8} and settings.trainer.grad_clip == 10.0
    words = ["+recipe=lerobot_diffusion", "+debug=smoke", "model=diffusion_tiny", "data.image_size=[32,32]"]
    words += [f"data.sources.main.root={DATA / 'lerobot_v30'}", "validation.evaluators=[loss,action]"]
    run = train_here(words, tmp_path / "run")
    train_here([*words, "trainer.steps=3", "resume=auto"], run)
    rows = metrics(run)
    assert {"Validation/main/default/MSE", "Validation-Action/main/default/MAE"} <= rows[2].keys() and 3 in rows
    whole = train_here([*words, "trainer.steps=3"], tmp_path / "whole")
    assert rows[3]["Training/Loss"] == metrics(whole)[3]["Training/Loss"]
    assert export.main([f"checkpoint={run}", "format=lerobot", f"out={tmp_path / 'out'}"]) == 0


@pytest.mark.slow
def test_overfitting_a_handful_of_windows_drives_the_loss_down(tmp_path):
    few = ["data.sources.main.episodes=[0,1]", "data.sources.old.episodes=[0,1]", "+debug=overfit"]
    few += [
        "trainer.steps=60",
        "trainer.log_every=1",
        "optimizer.lr=3e-3",
        "trainer.global_batch_size=8",
        "validation.every=0",
    ]
    rows = metrics(train_here([*TOY, *few], tmp_path / "run"))
    losses = [rows[step]["Training/Loss"] for step in range(1, 61)]
    assert sum(losses[-15:]) < 0.75 * sum(losses[:15])
