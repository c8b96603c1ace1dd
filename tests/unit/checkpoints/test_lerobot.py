"""Folders of LeRobot, without LeRobot: what is written, and refused. Beside it: tests/side_by_side/test_act.py."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opentau_train.checkpoints.lerobot import published_stats, write_lerobot
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.checkpoints.weight_files import open_weights
from opentau_train.checkpoints.weights import load_pretrained, plan_weights
from opentau_train.data.transforms.augment.pictures import Augment
from opentau_train.data.transforms.drop import DropInputs
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.data.transforms.units import Scale
from opentau_train.errors import UserError
from opentau_train.models.act import ActPolicy
from opentau_train.tools import export
from tests.program import TOY, train_here
from tests.unit.models.flow_cases import make_policy
from tests.unit.models.test_act import make_act
from tests.unit.models.test_diffusion import make_diffusion

pytestmark = pytest.mark.slow  # runs of ACT

SIZES = ["model.width=32", "model.heads=4", "model.feedforward=48", "data.image_size=[32,32]", "logger=none"]
ACT = [
    *[word for word in TOY if not word.startswith(("model.", "data.sources.old"))],
    *["model=act_tiny", "trainer.steps=1", "validation.every=0", *SIZES],
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    words = [*ACT, "model.backbone_norm=frozen_batch"]
    return train_here(words, tmp_path_factory.mktemp("lerobot") / "run")


def refused(capsys, *words) -> str:
    assert export.main(list(words)) == 2
    return capsys.readouterr().err


def test_a_folder_has_weights_architecture_and_the_statistics_of_the_robot(run_dir, tmp_path):
    out = tmp_path / "out"
    assert export.main([f"checkpoint={run_dir}", "format=lerobot", f"out={out}"]) == 0
    config, loaded = json.loads((out / "config.json").read_text()), load_policy(run_dir)
    assert next(iter(config)) == "type" and config["type"] == "act" and config["dim_model"] == 32
    assert config["input_features"]["observation.images.front"] == {"type": "VISUAL", "shape": [3, 32, 32]}
    stats = published_stats(open_weights(out))
    (head,) = loaded.stats
    mean = torch.from_numpy(loaded.stats[head].actions.mean).float()
    torch.testing.assert_close(stats["action.mean"], mean)
    steps = json.loads((out / "policy_preprocessor.json").read_text())["steps"]
    assert [s["registry_name"] for s in steps][-1] == "normalizer_processor" and (
        out / steps[-1]["state_file"]
    ).is_file()
    policy = make_act(loaded.policy.spec, feedforward=48, latent_dim=8, backbone_norm="frozen_batch")
    for folder in ("", "checkpoints/last"):  # as LeRobot's training leaves it
        shutil.copytree(out, tmp_path / "lerobot" / folder / "pretrained_model")
        plan = plan_weights(policy, tmp_path / "lerobot", policy.weight_map())
        assert plan.report.loaded and torch.equal(plan.stats["action.mean"], stats["action.mean"])
        shutil.rmtree(tmp_path / "lerobot")
    report = load_pretrained(policy, out, policy.weight_map())
    assert not report.missing and not report.unexpected
    assert export.predict(policy.eval()) == export.predict(loaded.policy)


def test_what_lerobots_format_cannot_say_is_refused(run_dir, tmp_path, capsys):
    given = [f"checkpoint={run_dir}", "format=lerobot"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is there already" in refused(capsys, *given, f"out={tmp_path / 'full'}")
    assert "did you mean 'toy::default'" in refused(capsys, *given, f"out={tmp_path / 'a'}", "norm_head=toy::defalt")
    loaded = load_policy(run_dir)
    (head,), pipeline = loaded.pipelines, next(iter(loaded.pipelines.values()))
    wide = dataclasses.replace(loaded.spec, action_dim=9)
    blind = dataclasses.replace(loaded.spec, cameras=())
    scaled = Pipeline({"units": Scale(), **pipeline.transforms})
    cropped = Pipeline({"crop": Augment((32, 32), crop=(0.5, 0.5)), **pipeline.transforms})
    normalize = pipeline.transforms["normalize"]
    stepped = {name: (offset, scale) for name, (offset, scale) in normalize.heads[head].items()}
    stepped["actions"] = tuple((vector, vector) for vector in stepped["actions"])
    by_step = Pipeline({**pipeline.transforms, "normalize": dataclasses.replace(normalize, heads={head: stepped})})
    for policy, transforms, words in (
        (loaded.policy, by_step, "each step of the chunk is normalised by its own statistics"),
        (make_policy(), pipeline, "FlowPolicy has no counterpart in LeRobot"),
        (make_act(loaded.spec), pipeline, "LeRobot's ACT has frozen_batch only"),
        (make_act(wide, backbone_norm="frozen_batch"), pipeline, "have 7 dimensions, the policy 9"),
        (make_diffusion(blind), pipeline, "LeRobot's diffusion policy needs a camera and a state"),
        (make_act(blind, backbone_norm="frozen_batch"), pipeline, "LeRobot's ACT needs a camera"),
        (loaded.policy, scaled, "the transform 'units' changes state or actions"),
        (loaded.policy, cropped, "the transform 'crop' changes state or actions, or crops pictures"),
    ):
        with pytest.raises(UserError, match=words):
            write_lerobot(tmp_path / "b", policy, [pipeline, transforms], head)
    with pytest.raises(UserError, match="several norm heads") as caught:
        export._head(None, ["arm::ee", "arm::joint"])
    assert "arm::ee, arm::joint" in caught.value.remedy
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    whole = Augment((32, 32), crop=(0.5, 0.5), centre=1.0)  # what is for training only isn't LeRobot's to know
    write_lerobot(
        tmp_path / "b", loaded.policy, [Pipeline({**pipeline.transforms, "a": whole, "b": DropInputs(state=0.5)})], head
    )
    assert (tmp_path / "b" / "config.json").exists()


def test_statistics_between_the_weights_of_older_folders_are_read(tmp_path):
    policy = make_act(backbone_norm="frozen_batch")
    weights = {f"model.{name}": value for name, value in policy.state_dict().items()}
    old = {
        "normalize_inputs.buffer_observation_state.mean": torch.arange(5.0),
        "normalize_inputs.buffer_observation_images_top.std": torch.ones(3, 1, 1),
        "unnormalize_outputs.buffer_action.mean": torch.zeros(4),
    }
    save_file({**weights, **old}, tmp_path / "model.safetensors")
    plan = plan_weights(policy, tmp_path, policy.weight_map())
    assert torch.equal(plan.stats["observation.state.mean"], torch.arange(5.0))
    assert set(plan.stats) == {"observation.state.mean", "observation.images.top.std", "action.mean"}
    assert not plan.report.unexpected and len(str(plan).splitlines()) == 5


def test_damaged_statistics_beside_the_weights_are_told_by_name(tmp_path):
    policy = make_act(backbone_norm="frozen_batch")
    save_file({f"model.{name}": value for name, value in policy.state_dict().items()}, tmp_path / "model.safetensors")
    stats = tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    stats.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{stats.name} is a git-lfs pointer"):
        plan_weights(policy, tmp_path, policy.weight_map())


def resnet(policy: ActPolicy) -> dict[str, torch.Tensor]:
    """A file of torchvision's names, whose numbers are new."""
    g = torch.Generator().manual_seed(7)
    own = {n.removeprefix("backbone."): v for n, v in policy.state_dict().items() if n.startswith("backbone.")}
    weights = {name: torch.rand(value.shape, generator=g) / 10 + 0.01 for name, value in own.items()}
    return {**weights, "fc.weight": torch.zeros(1000, 512), "bn1.num_batches_tracked": torch.tensor(3)}


def test_a_pretrained_backbone_is_where_a_run_begins(tmp_path):
    weights = resnet(make_act(backbone_norm="frozen_batch"))
    save_file(weights, file := tmp_path / "resnet18.safetensors")
    words = [*ACT, f"model.backbone_path={file}", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
    begun = train_here([*words, "model.backbone_norm=frozen_batch"], tmp_path / "run")
    trained = load_file(begun / "checkpoints" / "last" / "pretrained_model" / "model.safetensors")
    assert torch.equal(trained["backbone.layer4.1.bn2.running_var"], weights["layer4.1.bn2.running_var"])
    assert torch.equal(trained["backbone.conv1.weight"], weights["conv1.weight"])
    with pytest.raises(UserError, match="no place for the statistics") as caught:
        train_here(words, tmp_path / "group")
    assert "model.backbone_norm=frozen_batch" in caught.value.remedy


def test_half_a_layer_is_no_layer(tmp_path):
    """A batch norm's scale fits into a group norm, and would do something else there."""
    weights = make_act(backbone_norm="frozen_batch").state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    policy = make_act()
    with pytest.raises(UserError, match=r"more of some: backbone\.bn1\.running_mean"):
        load_pretrained(policy, tmp_path / "w.safetensors", policy.weight_map())


def test_other_dimensions_are_cut_or_filled_where_the_user_says_so(run_dir, tmp_path):
    words = [*ACT, "model.backbone_norm=frozen_batch", f"model.pretrained_path={run_dir}"]
    words += ["data.action_dim=9", "data.state_dim=8", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
    with pytest.raises(UserError, match="5 tensors of the file have other shapes") as caught:
        train_here(words, tmp_path / "exact")
    assert "set model.resize_dims=true" in caught.value.remedy
    wide = load_policy(train_here([*words, "model.resize_dims=true"], tmp_path / "wide")).policy
    narrow = load_policy(run_dir).policy
    assert torch.equal(wide.action_head.weight[:7], narrow.action_head.weight) and not wide.action_head.weight[7:].any()
    assert torch.equal(wide.encoder_robot_state_input_proj.weight[:, :7], narrow.encoder_robot_state_input_proj.weight)
