"""`data.scaling` on its way: from the settings to what a worker reads, to a checkpoint, and to a robot."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from opentau_train import cli, load_policy
from opentau_train.types import BatchSpec
from tests.fake_source import mixture_of
from tests.program import TOY, train_here


@pytest.mark.parametrize(
    ("recipe", "scaling"),
    [("lerobot", "area"), ("droid_policy", "area"), ("droid_pi0", "bilinear"), ("droid_openpi", "bilinear")],
)
def test_recipes_of_policies_that_openpi_published_scale_as_openpi_does(recipe, scaling):
    assert cli.compose([f"+recipe={recipe}"])["data"]["scaling"] == scaling


def test_a_spec_from_before_the_filters_is_of_triangles_also_for_the_data_of_another_command(tmp_path):
    mixture = mixture_of({"main": "5,7"}, tmp_path, scaling="area")
    older = BatchSpec.from_json({name: value for name, value in mixture.spec.to_json().items() if name != "scaling"})
    assert older == dataclasses.replace(mixture.spec, scaling="bilinear")
    (dataset,) = mixture.datasets
    assert dataset.window(mixture.spec).scaling == "area"
    assert dataset.window(mixture.in_shape(older).spec).scaling == "bilinear"


@pytest.mark.slow
def test_a_robot_sees_as_the_policy_was_trained(tmp_path):
    sizes = ["data.image_size=[16,16]", "trainer.steps=1", "validation.max_samples_per_group=2"]
    lines = np.where(np.mgrid[:60, :80].sum(0)[..., None] % 7 < 2, 40, 220).repeat(3, axis=2).astype(np.uint8)
    seen = []
    for scaling in ("area", "bilinear"):
        run = train_here([*TOY, *sizes, f"data.scaling={scaling}"], tmp_path / scaling)
        policy = load_policy(run, norm_head="toy::default")
        camera, state = policy.cameras[0], np.zeros(len(policy.state_names))
        read = policy.readers["toy::default"].read({camera: lines, "state": state})
        seen.append(read["images"][camera].astype(int))
    assert seen[0].shape == seen[1].shape == (1, 12, 16, 3) and np.abs(seen[0] - seen[1]).max() > 10
