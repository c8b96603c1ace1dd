"""First weights from published files: every layout is read, and what does not fit is told, never passed over."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opentau_train import cli
from opentau_train.checkpoints.weight_files import locate, open_weights
from opentau_train.checkpoints.weights import load_pretrained, plan_weights
from opentau_train.distributed.materialise import materialise
from opentau_train.errors import UserError
from opentau_train.models.weight_map import WeightMap
from opentau_train.tools import export
from tests.program import TOY, metrics, train_here
from tests.unit.models.flow_cases import make_policy

SHORT = [*TOY, "trainer.steps=1", "validation.every=0", "logger=none"]


@pytest.fixture
def source():
    return make_policy(seed=1)


@pytest.fixture
def file(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def same(policy, weights) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        plan_weights(*args, **options)
    return str(caught.value)


def sharded(weights, folder):
    """A directory as the Hub has large weights: two files and an index."""
    folder.mkdir()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_file_its_directory_and_a_sharded_directory_are_the_same_weights(source, file, tmp_path):
    folder = sharded(source.state_dict(), tmp_path / "shards")
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(file, odd / "open_model.safetensors")
    shutil.copy(file, odd / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    for path in (file, file.parent, folder, folder / "model.safetensors.index.json", odd):
        policy = make_policy(seed=2)
        report = load_pretrained(policy, path, WeightMap())
        assert same(policy, source.state_dict()), path
        assert len(report.loaded) == len(source.state_dict())
        assert not (report.missing or report.unexpected or report.mismatched)
        assert len(str(report).splitlines()) == 4 and str(path) in str(report)


def test_names_are_mapped_and_the_report_counts_all_that_the_file_and_the_policy_have(source, tmp_path):
    weights = {f"model.inner.{name}": value for name, value in source.state_dict().items()}
    extra = {"model.inner.other": torch.zeros(2), "head.weight": torch.zeros(3)}
    extra["model.inner.bins_out.num_batches_tracked"] = torch.tensor(3)  # a counter of torch's, learnt by nobody
    del weights["model.inner.velocity_out.weight"]
    save_file({**weights, **extra}, tmp_path / "w.safetensors")
    mapping = WeightMap((("^model[.]", ""), ("^inner[.]", "")), new=("velocity_*",), ignored=("head.*",))
    policy = make_policy(seed=2)
    before = policy.velocity_out.weight.clone()
    report = load_pretrained(policy, tmp_path / "w.safetensors", mapping)
    assert report.missing == ("velocity_out.weight",) and report.unexpected == ("model.inner.other",)
    assert torch.equal(policy.velocity_out.weight, before)
    assert torch.equal(policy.bins_out.weight, source.bins_out.weight)
    assert re.search(r"missing +1: velocity_out.weight\nunexpected +1: model.inner.other\nmismatched +0$", str(report))


def test_other_float_types_are_converted_and_numbers_of_another_kind_refused(source, tmp_path):
    save_file({name: value.bfloat16() for name, value in source.state_dict().items()}, tmp_path / "half.safetensors")
    policy = make_policy(seed=2)
    load_pretrained(policy, tmp_path / "half.safetensors", WeightMap())
    assert same(policy, {name: value.bfloat16().float() for name, value in source.state_dict().items()})
    save_file({name: value.to(torch.int8) for name, value in source.state_dict().items()}, tmp_path / "i.safetensors")
    text = refused(policy, tmp_path / "i.safetensors", WeightMap())
    assert "no tensor of the file fits" in text and "I8" in text and "torch.float32" in text


def test_what_does_not_fit_is_told_with_the_report_and_changes_nothing(source, tmp_path):
    weights = source.state_dict()
    cases = {
        "no tensor of the file fits the model": {f"other.{name}": value for name, value in weights.items()},
        "lacks 1 tensors of the model: action_in.weight": {n: v for n, v in weights.items() if n != "action_in.weight"},
        "more layers than the model, or more of some: layers.2.norm_mlp.weight": {
            **weights,
            "layers.2.norm_mlp.weight": weights["layers.1.norm_mlp.weight"].clone(),
        },
        "1 tensors of the file have other shapes": {**weights, "action_in.weight": torch.zeros(32, 9)},
    }
    policy = make_policy(seed=2)
    kept = {name: value.clone() for name, value in policy.state_dict().items()}
    for number, (words, content) in enumerate(cases.items()):
        save_file(content, path := tmp_path / f"{number}.safetensors")
        with pytest.raises(UserError) as caught:
            load_pretrained(policy, path, WeightMap(new=("velocity_*",)))
        text = str(caught.value)
        assert words in text and "remedy" in text and all(row in text for row in ("loaded", "missing", "mismatched"))
        assert same(policy, kept)
    assert "action_in.weight [32, 9] there, [32, 4] here" in text


def test_two_tensors_of_one_name_are_refused(source, tmp_path):
    weights = source.state_dict()
    save_file({**weights, "model.start_embed": weights["start_embed"] + 1}, tmp_path / "w.safetensors")
    text = refused(source, tmp_path / "w.safetensors", WeightMap((("^model[.]", ""),)))
    assert "both the policy's start_embed" in text


def test_projections_are_cut_or_filled_with_zeros_where_that_is_wanted(source, tmp_path):
    weights = source.state_dict()
    wide = torch.arange(32.0 * 6).view(32, 6) + 1
    narrow = torch.arange(3.0 * 32).view(3, 32) + 1
    save_file({**weights, "action_in.weight": wide, "velocity_out.weight": narrow}, path := tmp_path / "w.safetensors")
    mapping, policy = WeightMap(resized=("action_in.weight", "velocity_out.weight")), make_policy(seed=2)
    report = load_pretrained(policy, path, mapping)
    assert not report.mismatched and torch.equal(policy.action_in.weight, wide[:, :4])
    assert torch.equal(policy.velocity_out.weight[:3], narrow) and not policy.velocity_out.weight[3].any()
    assert "model.resize_dims=true" in refused(policy, path, mapping, resize=False)
    save_file({**weights, "action_in.weight": torch.zeros(16, 8, 1)}, tmp_path / "deep.safetensors")
    for resize in (True, False):
        text = refused(policy, tmp_path / "deep.safetensors", mapping, resize=resize)
        assert "other shapes" in text and "resize_dims" not in text


def test_damaged_files_pointers_and_pickles_are_refused_by_name(source, file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-64])
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    torch.save(source.state_dict(), pickles / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    cases = {
        cut: "no whole safetensors file",
        pointer: "git-lfs pointer",
        pickles: "is a pickle",
        pickles / "pytorch_model.bin": "is a pickle",
        tmp_path / "empty": "has no model.safetensors",
        tmp_path / "absent": "is not there",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            open_weights(path, "model.pretrained_path")
        assert caught.value.where == "model.pretrained_path" and str(path) in str(caught.value)


def test_an_index_names_files_beside_it_that_have_what_it_lists(source, file, tmp_path):
    folder = sharded(source.state_dict(), tmp_path / "shards")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for changes, words in (
        ({"x": "../model.safetensors"}, "outside of its directory"),
        ({"x": next(iter(listed["weight_map"].values()))}, "names 1 tensors that its files don't have: x"),
        ({"x": "absent.safetensors"}, "absent.safetensors is no whole safetensors file"),
        ({"x": 3}, "can't be read"),
    ):
        index.write_text(json.dumps({"weight_map": {**listed["weight_map"], **changes}}))
        with pytest.raises(UserError, match=re.escape(words)):
            open_weights(folder)


def test_names_of_the_hub_are_read_from_its_cache_and_others_must_be_there(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--robots--arm"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        shutil.copy(file, repo / "snapshots" / commit / "model.safetensors")
    assert locate("robots/arm", "model.pretrained_path").name == "a" * 40
    assert locate("robots/arm@v2", "model.pretrained_path").name == "b" * 40
    assert len(open_weights(locate("robots/arm", ""))) > 10
    for given in ("robots/leg", "/no/such/dir", "robots/arm/deep", "~/nowhere"):
        with pytest.raises(UserError, match=r"not there|can.t be downloaded") as caught:
            locate(given, "model.pretrained_path")
        assert caught.value.where == "model.pretrained_path"


def test_nothing_is_drawn_for_what_a_file_gives(source, file):
    """And what is drawn is no other for it: the generator stands where the tensors that are drawn leave it."""
    names = [name for name in source.state_dict() if not name.startswith("layers.")]
    torch.manual_seed(5)
    with torch.device("meta"):
        policy = make_policy()
    torch.manual_seed(5)
    materialise(policy, torch.device("cpu"), policy.init_weights, given=source.state_dict())
    untouched = torch.Generator().manual_seed(5).get_state()
    assert torch.equal(torch.get_rng_state(), untouched)
    assert all(policy.state_dict()[name].isnan().all() for name in names if "norm" not in name)
    load_pretrained(policy, file, WeightMap())
    assert same(policy, source.state_dict())
    with torch.device("meta"):
        rest = make_policy()
    materialise(rest, torch.device("cpu"), rest.init_weights, given=[n for n in names])
    assert not rest.layers[0].mlp.up.weight.isnan().any() and rest.action_in.weight.isnan().all()


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return train_here([*SHORT, "trainer.steps=2"], tmp_path_factory.mktemp("weights") / "run")


@pytest.mark.slow
def test_a_run_begins_from_a_run_a_checkpoint_its_folder_or_an_exported_file(run_dir, tmp_path, capsys):
    out = tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={run_dir}", f"out={out}"]) == 0
    last = run_dir / "checkpoints" / "last"
    trained = load_file(last / "pretrained_model" / "model.safetensors")
    rows = []
    for number, path in enumerate((run_dir, last, last / "pretrained_model", out)):
        words = [*SHORT, f"model.pretrained_path={path}", "optimizer.lr=1e-30", "optimizer.weight_decay=0"]
        begun = train_here(words, tmp_path / f"run{number}")
        weights = load_file(begun / "checkpoints/last/pretrained_model/model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in trained.items())
        rows.append(metrics(begun))
    assert all(row == rows[0] for row in rows)
    assert f"loaded      {len(trained)} of {len(trained)} tensors" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resume_takes_the_checkpoints_weights_and_does_without_the_first_ones(run_dir, tmp_path):
    weights = tmp_path / "first"
    shutil.copytree(run_dir / "checkpoints" / "last" / "pretrained_model", weights)
    words = [*SHORT, "trainer.steps=4", "scheduler=constant", f"model.pretrained_path={weights}"]
    whole = metrics(train_here(words, tmp_path / "whole"))
    parted = tmp_path / "parted"
    with pytest.raises(AssertionError):  # stopped: exit code 75
        train_here([*words, "trainer.stop_after=2"], parted)
    shutil.rmtree(weights)
    assert metrics(train_here([*words, "resume=auto"], parted)) == whole
    moved = [w for w in words if "pretrained_path" not in w] + ["trainer.steps=5", "resume=auto"]
    assert sorted(metrics(train_here(moved, parted))) == [1, 2, 3, 4, 5]


def test_an_exported_policy_is_built_without_the_first_weights(run_dir, tmp_path):
    weights = tmp_path / "first.safetensors"
    shutil.copy(run_dir / "checkpoints" / "last" / "pretrained_model" / "model.safetensors", weights)
    begun = train_here([*SHORT, f"model.pretrained_path={weights}"], tmp_path / "run")
    weights.unlink()
    assert export.main([f"checkpoint={begun}", f"out={tmp_path / 'policy.safetensors'}"]) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["model.pretrained_path=/no/such/place"], "'/no/such/place' is not there"),
        (["model.vlm_path=x.safetensors"], "FlowPolicy reads no model.vlm_path"),
        (["model.backbone_path=x.safetensors"], "FlowPolicy reads no model.backbone_path"),
        (["model.pretrained_path=a", "model.vlm_path=b"], "2 are named"),
        (["model.pretrained_path=3"], "model.pretrained_path must be a string"),
        (["model.pretrained_path=''"], "model.pretrained_path is empty"),
        (["model.pretrained_pth=x"], "did you mean 'pretrained_path'"),
        (["model.heads=0"], "model.heads must be greater than 0"),
        (["model.num_flow_steps=0"], "model.num_flow_steps must be greater than 0"),
    ],
)
def test_mistakes_are_told_before_data_are_opened(words, problem, tmp_path):
    with pytest.raises(UserError, match=re.escape(problem)):
        train_here([*SHORT, *words, "data.sources.main.root=/no/data"], tmp_path / "run")


def test_weights_that_the_environment_names_must_be_read(monkeypatch):
    monkeypatch.setenv("VLM_SAFETENSORS_PATH", "/weights/vlm")
    with pytest.raises(UserError, match="unset VLM_SAFETENSORS_PATH"):
        cli.checked(cli.compose(SHORT))
    cli.checked(cli.compose([*SHORT, "model.vlm_path=null"]))
    assert cli.compose(SHORT)["model"]["vlm_path"] == "/weights/vlm"
    assert cli.compose([*SHORT, "model.vlm_path=mine"])["model"]["vlm_path"] == "mine"
