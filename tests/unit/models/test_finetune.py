"""What of a policy trains, and LoRA adapters: beside the policy's own numbers, in checkpoints, and out again."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from opentau_train import validate
from opentau_train.checkpoints.adapters import write_adapters
from opentau_train.checkpoints.base import base_of, digest, record
from opentau_train.checkpoints.card import read_card
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.checkpoints.weights import plan_weights
from opentau_train.config import drift
from opentau_train.config.finetune import FinetuneSettings
from opentau_train.config.optimizer import OptimizerSettings, ParameterRule
from opentau_train.config.typed import build
from opentau_train.distributed.materialise import materialise
from opentau_train.errors import UserError
from opentau_train.models.act import ActPolicy
from opentau_train.models.finetune import is_adapter, merge, prepare_finetune, set_aside, summary
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.weight_map import WeightMap
from opentau_train.optim import build_optimizer
from opentau_train.tools import export
from tests.nightly import at_night
from tests.program import TOY, metrics, train_here
from tests.unit.models.flow_cases import SPEC, make_policy

pytestmark = pytest.mark.slow  # peft takes 5 s to import

RUN = [*TOY, "scheduler=constant", "validation.every=4", "logger=none", "trainer.ema_decay=0.5", "optimizer.lr=1e-2"]
LORA = ["finetune=lora", "finetune.rank=4", "validation.max_samples_per_group=4"]


def make(settings: FinetuneSettings, policy: FlowPolicy | None = None) -> FlowPolicy:
    policy = make_policy() if policy is None else policy
    prepare_finetune(policy, settings)
    return policy


def trained(policy: nn.Module) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def moved_adapters(policy: FlowPolicy) -> FlowPolicy:
    """As after some training: an adapter does nothing before."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return policy.eval()


def test_patterns_say_what_trains():
    names = set(dict(make_policy().named_parameters()))
    assert trained(make(FinetuneSettings())) == names
    heads = {"velocity_out.weight", "bins_out.weight", "time_out.weight"}
    assert trained(make(FinetuneSettings(trains=("*_out.*",)))) == heads
    policy = make(FinetuneSettings(trains=("*_out.*", "start_embed"), frozen=("time_*",)))
    assert trained(policy) == {"velocity_out.weight", "bins_out.weight", "start_embed"}
    assert summary(policy) == "32,928 train, 40,560 are frozen"
    assert summary(make_policy()) == "all 73,488 train"
    assert "LoRA adapters on 8 layers" in summary(make(FinetuneSettings(rank=2)))


def test_what_the_policy_keeps_from_training_never_trains():
    policy = make_policy()
    policy.layers[1].mlp.down.weight.requires_grad_(False)
    prepare_finetune(policy, FinetuneSettings(rank=2, trains=("*",)))
    assert "layers.1.mlp.down" not in policy.adapters and "layers.0.mlp.down" in policy.adapters
    assert not policy.layers[1].mlp.down.weight.requires_grad
    assert policy.layers[0].mlp.down.base_layer.weight.requires_grad, "trains beside its own adapter, as was asked"
    with pytest.raises(UserError, match=r"no trainable parameter's name fits 'layers\.1\.mlp\.down\.weight'"):
        make(FinetuneSettings(trains=("layers.1.mlp.down.weight",)), copy.deepcopy(policy))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (FinetuneSettings(trains=("*velocity_ot*",)), r"fits '\*velocity_ot\*': did you mean 'velocity_out'"),
        (FinetuneSettings(frozen=("stem2.*",)), r"fits 'stem2\.\*'.*\n.*finetune.frozen"),
        (FinetuneSettings(rank=2, targets=("*.qvk",)), r"no linear layer's name fits '\*\.qvk': did you mean 'qkv'"),
        (FinetuneSettings(frozen=("*",)), "nothing would train"),
        (FinetuneSettings(trains=()), "nothing would train"),
    ],
)
def test_a_pattern_that_fits_nothing_is_named(settings, text):
    with pytest.raises(UserError, match=text):
        make(settings)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"alpha": 8.0}, "finetune.alpha is an option of LoRA adapters"),
        ({"targets": ["*"]}, "choose finetune=lora"),
        ({"rank": 0}, "finetune.rank must be greater than 0"),
        ({"rank": 4, "dropout": 1.0}, r"finetune.dropout must be in \[0, 1\)"),
        ({"rank": 4, "targets": []}, "finetune.targets is empty"),
        ({"rank": 4, "alpha": 0.0}, "finetune.alpha must be greater than 0"),
        ({"rank": 4}, r"finetune.rank=4: adapters are for a policy that keeps its numbers, and all of it trains"),
        ({"rnak": 4}, "did you mean 'rank'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tree, text):
    with pytest.raises(UserError, match=text):
        build(FinetuneSettings, tree, "finetune")


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)  # as where it isn't installed
    with pytest.raises(UserError, match=r'pip install "opentau_train\[vla\]"'):
        build(FinetuneSettings, {"rank": 4}, "finetune")


def test_adapters_train_beside_the_policy_and_change_none_of_its_numbers():
    plain, settings = make_policy(seed=5), FinetuneSettings(rank=4, alpha=8.0, trains=("bins_out.*",))
    with torch.device("meta"):
        policy = make(settings, make_policy(seed=5))
    torch.manual_seed(5)
    materialise(policy, torch.device("cpu"), policy.init_weights, adapters=policy.adapters)
    built = make(settings, make_policy(seed=5))
    for (name, left), right in zip(policy.named_parameters(), built.parameters(), strict=True):
        assert is_adapter(name) or torch.equal(left, right), name
    adapters = {name for name in trained(policy) if is_adapter(name)}
    assert trained(policy) - adapters == {"bins_out.weight"} and len(adapters) == 2 * len(policy.adapters) == 16
    assert summary(policy).endswith("LoRA adapters on 8 layers, 4,352, and 32,768 beside them")
    with set_aside(policy, policy.adapters):
        for (name, own), (other, value) in zip(policy.named_parameters(), plain.named_parameters(), strict=True):
            assert name == other and torch.equal(own, value)
    layer = policy.layers[0].mlp.up
    assert layer.scaling == {"default": 2.0} and not layer.lora_B.default.weight.any()
    bound = layer.in_features**-0.5  # peft's: uniform, as nn.Linear's
    assert 0.9 * bound < layer.lora_A.default.weight.abs().max() <= bound
    assert export.predict(policy.eval()) == export.predict(plain.eval())
    assert export.predict(moved_adapters(policy)) != export.predict(plain)


def test_merged_adapters_leave_a_plain_policy_that_predicts_the_same():
    policy = moved_adapters(make(FinetuneSettings(rank=4)))
    apart = export.sample(policy)
    merge(policy)
    assert (
        policy.adapters == ()
        and dict(policy.named_parameters()).keys() == dict(make_policy().named_parameters()).keys()
    )
    assert abs(export.sample(policy) - apart).max() <= 1e-6 * max(1.0, abs(apart).max())


def test_torchs_own_attention_takes_no_adapter():
    def act() -> ActPolicy:
        return ActPolicy(SPEC, width=16, heads=2, feedforward=32, vae_depth=1, encoder_depth=1, latent_dim=4)

    policy = act()
    prepare_finetune(policy, FinetuneSettings(rank=2))
    assert len(policy.adapters) == 6 and all(name.endswith(("linear1", "linear2")) for name in policy.adapters)
    for pattern in ("*.self_attn", "*.multihead_attn.out_proj"):
        with pytest.raises(UserError, match="torch's own attention alone"):
            prepare_finetune(act(), FinetuneSettings(rank=2, targets=("*.linear1", pattern)))


def test_bfloat16_parameters_are_the_rounded_float32_ones():
    plain = make_policy(seed=5)
    with torch.device("meta"):
        policy = make_policy(seed=5)
    for parameter in policy.parameters():
        parameter.data = parameter.data.bfloat16()
    torch.manual_seed(5)
    materialise(policy, torch.device("cpu"), policy.init_weights)
    for (name, own), value in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, value.bfloat16()), name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return train_here([*RUN, *LORA, "trainer.steps=4"], tmp_path_factory.mktemp("lora") / "run")


def test_resumed_with_adapters_and_average_equals_uninterrupted_bit_for_bit(run_dir, tmp_path):
    parts = tmp_path / "run"
    train_here([*RUN, *LORA, "trainer.steps=2", "validation.every=0"], parts)
    train_here([*RUN, *LORA, "trainer.steps=4", "resume=auto"], parts)
    assert metrics(parts) == metrics(run_dir)
    for weights in ("model", "ema"):
        files = [tmp_path / f"{weights}-{path.parent.name}.safetensors" for path in (parts, run_dir)]
        for path, out in zip((parts, run_dir), files, strict=True):
            assert export.main([f"checkpoint={path}", f"out={out}", f"weights={weights}"]) == 0
        left, right = map(load_file, files)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_with_adapters_is_validated_to_the_numbers_of_its_run(run_dir, tmp_path):
    assert validate.run([f"checkpoint={run_dir}", f"out={tmp_path / 'v.json'}"]) == 0
    measured, logged = json.loads((tmp_path / "v.json").read_text())["metrics"], metrics(run_dir)[4]
    assert measured["Validation/Loss"] == pytest.approx(logged["Validation/Loss"], rel=1e-6)


def test_the_average_is_of_the_adapters_alone(run_dir):
    keys = FileSystemReader(run_dir / "checkpoints/last/state").read_metadata().state_dict_metadata
    averaged = {key.removeprefix("ema.") for key in keys if key.startswith("ema.")}
    assert averaged and all(map(is_adapter, averaged))
    assert averaged == {k.split(".", 2)[2].rpartition(".")[0] for k in keys if k.startswith("optimizer.state.")}


def test_another_choice_of_what_trains_is_refused_at_a_resume(run_dir):
    saved = read_card(run_dir / "checkpoints/last/pretrained_model").config
    for change in ({"rank": None}, {"alpha": 1.0}, {"frozen": ["stem.*"]}, {"trains": ["*"]}, {"targets": ["*"]}):
        now = {**saved, "finetune": {**saved["finetune"], **change}}
        with pytest.raises(
            UserError, match=rf"checkpoint's: finetune\.{next(iter(change))}: .* \((the optimizer|the ad)"
        ):
            drift.check(drift.compare(saved, now))
    drift.check(drift.compare(saved, {**saved, "finetune": {**saved["finetune"], "dropout": 0.1}}))


def test_a_checkpoint_is_loaded_with_its_adapters_and_exported_merged(run_dir, tmp_path, capsys):
    policy, out = load_policy(run_dir).policy, tmp_path / "policy.safetensors"
    assert len(policy.adapters) == 4 and policy.layers[0].mlp.up.lora_B.default.weight.any()
    assert export.main([f"checkpoint={run_dir}", f"out={out}"]) == 0
    assert "with the adapters merged it predicts the checkpoint's actions within" in capsys.readouterr().out
    plain = load_policy(out)
    assert plain.policy.adapters == () and "finetune" not in plain.meta["config"]
    assert not any("lora" in name or "base_layer" in name for name in load_file(out))
    apart = export.sample(policy)
    assert abs(export.sample(plain.policy) - apart).max() <= 1e-6 * max(1.0, abs(apart).max())


def test_adapters_are_exported_alone_in_the_files_of_peft(run_dir, tmp_path, capsys):
    assert export.main([f"checkpoint={run_dir}", f"out={tmp_path / 'adapters'}", "format=adapter"]) == 0
    names = load_file(tmp_path / "adapters" / "adapter_model.safetensors").keys()
    assert "base_model.model.layers.0.mlp.up.lora_A.weight" in names and len(names) == 8
    assert "bit for bit" in capsys.readouterr().out  # peft itself has read them back


def test_what_pefts_files_have_no_place_for_is_refused(tmp_path):
    for settings, text in (
        (FinetuneSettings(rank=2, trains=("start_embed",)), "start_embed trained alone"),
        (FinetuneSettings(rank=2, trains=("stem.convs.0.weight", "*time_out*"), targets=("*.qkv",)), None),
        (FinetuneSettings(trains=("*_out.*",)), "has no LoRA adapters"),
    ):
        expected = nullcontext() if text is None else pytest.raises(UserError, match=text)
        with expected:
            write_adapters(tmp_path, make(settings), settings)
        assert (tmp_path / "adapter_config.json").exists() == (text != "start_embed trained alone")


@pytest.fixture(scope="module")
def based(tmp_path_factory):
    """(a run of adapters over weights in a file, the file)."""
    folder = tmp_path_factory.mktemp("based")
    plain = train_here([*RUN, "trainer.steps=1", "validation.every=0", "checkpoint.every=0"], folder / "plain")
    file = shutil.copy(plain / "checkpoints/last/pretrained_model/model.safetensors", folder / "base.safetensors")
    words = [*RUN, *LORA, "finetune.trains=[bins_out.*]", "trainer.steps=4", f"model.pretrained_path={file}"]
    return train_here(words, folder / "run"), Path(file), words


def saved(run_dir: Path) -> set[str]:
    """The names of the model's tensors in a checkpoint's shards."""
    metadata = FileSystemReader(run_dir / "checkpoints/last/state").read_metadata().state_dict_metadata
    return {key.removeprefix("model.") for key in metadata if key.startswith("model.")}


def test_frozen_weights_of_a_file_are_left_out_of_checkpoints(based, run_dir):
    names, beside = saved(based[0]), {"bins_out.weight"}
    assert all(map(is_adapter, names - beside)) and beside < names
    folder = based[0] / "checkpoints/last/pretrained_model"
    assert load_file(folder / "model.safetensors").keys() == names
    assert read_card(folder).policy["base"]["path"] == str(based[1])
    assert "layers.0.mlp.up.base_layer.weight" in saved(run_dir), "without a file, all is saved"
    told = "are frozen: LoRA adapters on 4 layers, 2,176, and 57,344 beside them"
    assert told in " ".join((based[0] / "train.log").read_text().split())


def test_a_run_of_adapters_is_no_base_before_it_is_exported(based, tmp_path):
    whole = tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={based[0]}", f"out={whole}"]) == 0
    policy = load_policy(whole).policy
    assert not plan_weights(policy, whole, WeightMap()).report.missing
    with pytest.raises(UserError, match=r"holds LoRA adapters, not the weights of a whole policy(.|\n)*tools.export"):
        plan_weights(policy, based[0], WeightMap())


def test_a_run_of_frozen_weights_is_no_base_before_it_is_exported(based, tmp_path):
    words = [*RUN, "finetune=freeze", "finetune.frozen=[stem.*]", f"model.pretrained_path={based[1]}"]
    run, whole = (
        train_here([*words, "trainer.steps=1", "validation.every=0"], tmp_path / "run"),
        tmp_path / "p.safetensors",
    )
    with pytest.raises(
        UserError, match=r"lacks .* stem(.|\n)*a run of frozen weights has them only in what tools.export"
    ):
        plan_weights(load_policy(run).policy, run, WeightMap())
    assert export.main([f"checkpoint={run}", f"out={whole}"]) == 0
    assert not plan_weights(load_policy(run).policy, whole, WeightMap()).report.missing


def test_adapters_may_have_a_learning_rate_of_their_own():
    rules = {"b": ParameterRule("*.lora_B.*", lr_scale=16.0)}  # as LoRA+ (Hayou et al. 2024)
    groups = build_optimizer(
        make(FinetuneSettings(rank=2, trains=())), OptimizerSettings(lr=1e-3, groups=rules)
    ).param_groups
    assert {(g["lr_scale"], len(g["params"])) for g in groups} == {(1.0, 8), (16.0, 8)}


def test_a_run_without_its_frozen_weights_is_resumed_bit_for_bit(based, tmp_path):
    whole, _, words = based
    train_here([*words, "trainer.steps=2", "validation.every=0"], tmp_path / "run")
    without = [word for word in words if not word.startswith("model.pretrained_path")]  # the checkpoint knows the path
    train_here([*without, "resume=auto"], tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole) and saved(tmp_path / "run") == saved(whole)
    assert export.predict(load_policy(tmp_path / "run").policy) == export.predict(load_policy(whole).policy)


def test_frozen_weights_that_moved_or_changed_are_told_and_found_where_the_remedy_says(based, tmp_path, capsys):
    run, file, words = based
    expected, moved = export.predict(load_policy(run).policy), tmp_path / "moved.safetensors"
    at = f"checkpoint={run}"

    def exported(*base):
        assert export.main([at, f"out={tmp_path / 'p.safetensors'}", "force=true", *(f"base={b}" for b in base)]) in (
            0,
            2,
        )
        if refusal := capsys.readouterr().err:
            raise UserError(refusal)

    calls = {
        "load": lambda *base: load_policy(run, "cpu", *base),
        "export": exported,
        "validate": lambda *base: validate.run([at, f"out={tmp_path / 'v'}", *(f"base={b}" for b in base)]),
        "resume": lambda *base: train_here(
            [*words, f"resume={run}", *(f"model.pretrained_path={b}" for b in base)], run
        ),
    }
    file.rename(moved)
    try:
        for name, call in calls.items():
            setting = "model.pretrained_path" if name == "resume" else "base"
            with pytest.raises(UserError, match=rf"'{file}' is not there(.|\n)*or set {setting} to the place"):
                call()
            call(moved)
        assert export.predict(load_policy(run, base=moved).policy) == expected
        assert load_policy(tmp_path / "p.safetensors").meta.keys() == load_policy(run, base=moved).meta.keys() - {
            "base"
        }
        others = load_file(moved)
        others["layers.0.mlp.up.weight"] = others["layers.0.mlp.up.weight"] * 1.01
        save_file(others, file)
        for call in calls.values():
            with pytest.raises(UserError, match="the file has other weights than those that the checkpoint leaves out"):
                call()
    finally:
        moved.replace(file)


def test_a_resume_may_name_other_first_weights_beside_the_frozen_ones(based):
    """It takes neither: `config.weights.ON_RESUME`."""
    entry = {"key": "vlm_path", "path": str(based[1]), "digest": digest(based[1])}
    first = base_of(entry, {"pretrained_path": "elsewhere"}, "model.vlm_path")
    assert (first.key, first.path) == ("vlm_path", based[1]) and record(first) == entry


@pytest.fixture
def other_precision():
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@at_night
def test_reduced_precision_stays_within_its_bounds_of_float32(other_precision, tmp_path):
    """The bounds that docs/models.md states, of the loss over 4 steps."""
    sizes = [word for word in TOY if not word.startswith("model.")]
    words = [*sizes, "model=flow_tiny", "trainer.steps=4", "validation.every=0", "logger=none", "trainer.ema_decay=0.5"]
    rows = {}
    for precision in ("no", "bf16", "bf16_params"):
        AcceleratorState._reset_state(True)
        rows[precision] = metrics(train_here([*words, f"trainer.precision='{precision}'"], tmp_path / precision))
    for precision, bound in (("bf16", 1e-3), ("bf16_params", 3e-3)):
        pairs = [(row["Training/Loss"], rows[precision][n]["Training/Loss"]) for n, row in rows["no"].items()]
        errors = [abs(loss / exact - 1) for exact, loss in pairs]
        assert 1e-6 < max(errors) < bound, (precision, errors)
    weights = load_file(tmp_path / "bf16_params/checkpoints/last/pretrained_model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    kinds = torch.distributed.checkpoint.FileSystemReader(
        tmp_path / "bf16_params/checkpoints/last/state"
    ).read_metadata()
    types = {
        key.split(".")[0]: kind.properties.dtype
        for key, kind in kinds.state_dict_metadata.items()
        if "layers.0.mlp" in key and "step" not in key
    }
    assert types == {"model": torch.bfloat16, "optimizer": torch.bfloat16, "ema": torch.float32}
