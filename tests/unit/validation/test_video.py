"""What the evaluator of futures says, against the same numbers taken frame by frame, and its picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opentau_train import cli, validate
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config.settings import load_settings
from opentau_train.data.batch import stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.types import Address
from opentau_train.validation.actions import ACTION_DRAW
from opentau_train.validation.video import PREDICT_FUTURE, PREFIX, VideoEvaluator, draw_strips
from tests.pretrained import drawn_features
from tests.program import TOY, metrics, train_here

WAM = ["model=wam_tiny", "model.num_flow_steps=2", "data.future.num_frames=2", "data.future.stride=2"]
MAIN = "data.sources.main"
JOINT = [f"{MAIN}.mode=joint", f"{MAIN}.mode_probabilities={{policy:1,wam:1,forward_dynamics:1,inverse_dynamics:1}}"]
SHORT = ["trainer.steps=2", "validation.every=2", "validation.evaluators=[loss,action,video]", "logger=none"]
RUN = [*TOY, *WAM, *JOINT, *SHORT, "validation.max_samples_per_group=3", "validation.evaluator.video.num_strips=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_here(RUN, tmp_path_factory.mktemp("video") / "run")


@pytest.mark.slow
def test_the_numbers_are_those_of_each_window_sampled_alone(run):
    """One window a batch, its frames compared by numpy."""
    row = metrics(run)[2]
    settings = load_settings(cli.compose([*RUN, f"paths.cache_dir={run.parent / 'cache'}"]))
    policy = load_policy(run / "checkpoints" / "00000002" / "pretrained_model").policy.eval()
    mixture = open_mixture(settings).for_policy(policy.wants())
    plan = VideoEvaluator().plan(mixture, settings.validation, 2, 1)
    builder, sums = SampleBuilder(mixture, training=False), {}
    w = plan.windows
    for d, e, f, mode in zip(w.dataset, w.episode, w.frame, w.mode, strict=True):
        batch = stack([builder.build(0, Address(int(d), int(e), int(f), 0, int(mode)))], mixture.spec)
        assert batch.mode[0] in PREDICT_FUTURE
        sampled = policy.sample_future(batch, Draws(batch.key, ACTION_DRAW))
        for camera, frames in sampled.items():
            true, now = batch.future[camera][0].numpy() / 255, batch.images[camera][0, -1].numpy() / 255
            for number in np.flatnonzero(batch.future_mask[camera][0] & ~batch.future_is_pad[0]):
                error = (frames[0, number].numpy() - true[number]) ** 2
                copied = (now - true[number]) ** 2
                of = sums.setdefault(mixture.groups[int(batch.group[0])].tag, [0.0, 0.0, 0])
                of[0], of[1], of[2] = of[0] + error.sum(), of[1] + copied.sum(), of[2] + error.size
    builder.close()
    tags = {tag for tag in row if tag.startswith(PREFIX)}
    assert sums.keys() == {"main/default/wam", "main/default/forward_dynamics"} and len(tags) == 8
    for tag, (error, copied, count) in sums.items():
        for place, total in ((tag, error), (f"{tag}/Copy", copied)):
            assert row[f"{PREFIX}/{place}/MSE"] == pytest.approx(total / count, rel=1e-4)
            assert row[f"{PREFIX}/{place}/PSNR"] == pytest.approx(-10 * np.log10(total / count), rel=1e-4)


@pytest.mark.slow
def test_actions_are_measured_in_the_modes_that_predict_them(run):
    tags = {tag.split("/")[3] for tag in metrics(run)[2] if tag.startswith("Validation-Action/main")}
    assert tags == {"policy", "wam", "inverse_dynamics"}


@pytest.mark.slow
def test_a_strip_shows_the_true_frames_above_the_predicted_ones(run):
    """Of three windows: two rows a camera of the present frame and two later ones, under a text each."""
    picture = np.asarray(Image.open(run / "plots" / "video_00000002.png"))
    cameras = 2  # of the mixture
    assert picture.shape == (3 * (14 + cameras * 2 * 32), 3 * 32, 3)
    block = picture[14 : 14 + cameras * 2 * 32]
    true, predicted = block[:32], block[32:64]
    assert np.array_equal(true[:, :32], predicted[:, :32]) and not np.array_equal(true[:, 32:], predicted[:, 32:])


def test_strips_are_laid_out_window_by_window():
    strips = np.zeros((2, 1, 2, 3, 3, 4, 5))
    strips[1, 0, 1, 2, 0] = 1.0  # the last predicted frame of the second window: red
    picture = draw_strips(strips, ["", ""])
    assert picture.shape == (2 * (14 + 8), 15, 3)
    assert (picture[-4:, 10:] == [255, 0, 0]).all() and not picture[14:22].any() and not picture[-8:-4].any()


def test_the_command_gives_what_training_logged(run, tmp_path):
    validate.run([f"checkpoint={run}", f"paths.cache_dir={run.parent / 'cache'}", f"out={tmp_path / 'v.json'}"])
    logged = {k: v for k, v in metrics(run)[2].items() if k.startswith("Validation")}
    assert json.loads((tmp_path / "v.json").read_text())["metrics"] == logged
    assert (tmp_path / "v_video.png").read_bytes() == (run / "plots" / "video_00000002.png").read_bytes()


@pytest.mark.slow
def test_an_encoder_s_features_have_no_psnr_and_no_picture(tmp_path):
    file = drawn_features(tmp_path)
    words = [*TOY, *WAM, f"model.future_encoder={file}", f"{MAIN}.mode=wam", "data.sources.old.mode=forward_dynamics"]
    run = train_here([*words, *SHORT, "validation.max_samples_per_group=2"], tmp_path / "run")
    tags = {tag for tag in metrics(run)[2] if tag.startswith(PREFIX)}
    assert {tag.removeprefix(f"{PREFIX}/") for tag in tags} == {
        f"{group}/{mode}{name}/MSE"
        for group, mode in (("main/default", "wam"), ("old/default", "forward_dynamics"))
        for name in ("", "/Copy")
    }
    assert not (run / "plots" / "video_00000002.png").exists()
    policy = load_policy(run / "checkpoints" / "00000002" / "pretrained_model").policy
    assert torch.equal(policy.future.encoder.features[0][0].weight, load_file(file)["features.0.0.weight"])


def test_without_a_future_to_look_at_it_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match="no source has a mode that predicts one"):
        train_here([*TOY, "validation.evaluators=[video]"], tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_a_policy_that_samples_no_future_is_named(tmp_path):
    words = [*TOY, "model._target_=tests.modal.ModalPolicy", "data.future.num_frames=2", f"{MAIN}.mode=wam"]
    with pytest.raises(UserError, match="ModalPolicy has no sample_future"):
        train_here([*words, *SHORT], tmp_path / "run")


@pytest.mark.parametrize("option", ["max_samples_per_group=0", "num_strips=-1"])
def test_impossible_options_are_refused(option):
    with pytest.raises(UserError, match=rf"validation\.evaluator\.video\.{option.split('=')[0]}"):
        VideoEvaluator(**{option.split("=")[0]: int(option.split("=")[1])})
