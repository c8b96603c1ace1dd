"""Demonstrations of a simulator's expert, read by LeRobot itself."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from opentau_train.simulation.demonstrations import Wanted, demonstrate, write
from tests.simulators import line

pytestmark = pytest.mark.lerobot
EYE = "observation.images.eye"


def test_demonstrations_are_a_dataset_of_lerobots(lerobot, tmp_path):
    """Every row, picture and text, over two files of each kind; and statistics of state and actions."""
    tree, wanted = line(), Wanted(12)
    write(tmp_path / "set", tree, wanted, 2, 60.0)
    dataset = lerobot.Dataset("own/set", root=tmp_path / "set", video_backend="pyav")
    made = list(demonstrate(tree, wanted, 1, 60.0))
    assert dataset.num_episodes == 12 and dataset.fps == 10 and len(dataset) == sum(len(d.actions) for d in made)
    assert dataset.meta.robot_type == "point" and dataset.meta.camera_keys == [EYE]
    row = 0
    for number, demonstration in enumerate(made):
        for frame in range(len(demonstration.actions)):
            item = dataset[row]
            assert (item["episode_index"], item["frame_index"], item["task"]) == (number, frame, "come here")
            np.testing.assert_array_equal(np.atleast_1d(item["observation.state"]), demonstration.state[frame])
            np.testing.assert_array_equal(np.atleast_1d(item["action"]), demonstration.actions[frame])
            seen = item[EYE].permute(1, 2, 0).numpy() * 255
            assert np.abs(seen - demonstration.images["eye"][frame]).max() < 6  # what the codec loses
            row += 1
    stats = dataset.meta.stats["action"]
    np.testing.assert_allclose(stats["mean"], np.concatenate([d.actions for d in made]).mean(0), atol=1e-6)


def test_statistics_of_pictures_are_lerobots(lerobot, tmp_path):
    """As its own recorder computes them of an episode's pictures, and adds them up; in the shapes that it reads."""
    tree, wanted = line(), Wanted(3)
    write(tmp_path / "set", tree, wanted, 1, 60.0)
    meta = lerobot.Dataset("own/set", root=tmp_path / "set", video_backend="pyav").meta
    made = [d.images["eye"].transpose(0, 3, 1, 2) for d in demonstrate(tree, wanted, 1, 60.0)]
    # As floats: of bytes it takes the squares as bytes, which wrap (0.4.4).
    floats = [frames.astype(np.float64) for frames in made]
    each = [lerobot.stats.get_feature_stats(frames, axis=(0, 2, 3), keepdims=True) for frames in floats]
    each = [{k: v if k == "count" else v[0] / 255 for k, v in stats.items()} for stats in each]
    theirs = lerobot.stats.aggregate_stats([{EYE: stats} for stats in each])
    ours = meta.stats[EYE]
    assert ours.keys() == theirs[EYE].keys()
    for kind in ("min", "max", "mean", "std", "count"):
        assert ours[kind].shape == theirs[EYE][kind].shape
        np.testing.assert_allclose(ours[kind], theirs[EYE][kind], atol=1e-6)
    (table,) = (tmp_path / "set" / "meta" / "episodes").rglob("*.parquet")  # LeRobot reads these only to add them up
    for row, stats in zip(pq.read_table(table).to_pylist(), each, strict=True):
        for kind, value in stats.items():
            told = np.array(row[f"stats/{EYE}/{kind}"])
            bin_width = 1 / 255 if kind.startswith("q") else 1e-6
            np.testing.assert_allclose(told, value, atol=bin_width)


def test_lerobots_training_takes_the_demonstrations_as_they_are(lerobot, tmp_path):
    """Its factory puts ImageNet's statistics into the cameras' place, or leaves the dataset's."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import make_dataset
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.factory import make_policy, make_pre_post_processors

    write(tmp_path / "set", line(), Wanted(2), 1, 60.0)
    sizes = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1}
    for own in (False, True):
        policy = ACTConfig(
            chunk_size=4, n_action_steps=4, pretrained_backbone_weights=None, device="cpu", push_to_hub=False, **sizes
        )
        chosen = DatasetConfig("own/set", root=str(tmp_path / "set"), video_backend="pyav", use_imagenet_stats=not own)
        dataset = make_dataset(TrainPipelineConfig(dataset=chosen, policy=policy))
        make_policy(policy, ds_meta=dataset.meta)  # it notes in `policy` what the dataset has
        seen = make_pre_post_processors(policy, dataset_stats=dataset.meta.stats)[0](dataset[3])
        mean, std = (torch.as_tensor(dataset.meta.stats[EYE][kind], dtype=torch.float32) for kind in ("mean", "std"))
        assert mean.shape == std.shape == (3, 1, 1) and bool(mean[0] == torch.tensor(0.485)) is not own
        torch.testing.assert_close(seen[EYE][0], (dataset[3][EYE] - mean) / std, rtol=1e-4, atol=1e-4)
        assert seen["action"].numel() == 4
