"""An exported file is the policy: alone, with all that is needed to use it, and bit for bit the checkpoint's."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.errors import UserError
from opentau_train.tools import export
from tests import warm
from tests.program import TOY, environment, train_here
from tests.unit.models.flow_cases import SPEC, make_policy


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    arguments = [*TOY, "trainer.steps=4", "checkpoint.every=2", "trainer.ema_decay=0.5", "validation.every=0"]
    return train_here(arguments, tmp_path_factory.mktemp("export") / "run")


def exported(run_dir, out, *more):
    assert export.main([f"checkpoint={run_dir}", f"out={out}", *more]) == 0
    return load_policy(out)


def test_a_file_holds_policy_statistics_and_settings(run_dir, tmp_path, capsys):
    loaded = exported(run_dir, tmp_path / "deep" / "policy.safetensors", "format=safetensors")
    assert "bit for bit" in capsys.readouterr().out
    assert not loaded.policy.training and loaded.meta["config"]["trainer"]["steps"] == 4
    assert set(loaded.stats) == set(loaded.meta["norm_heads"]) == set(loaded.pipelines) and len(loaded.stats) == 2


def test_file_folder_checkpoint_and_run_are_the_same_policy(run_dir, tmp_path):
    out = tmp_path / "policy.safetensors"
    expected = export.predict(exported(run_dir, out).policy)
    last = run_dir / "checkpoints" / "last"
    for path in (run_dir, last, last.resolve(), last / "pretrained_model", str(out)):
        assert export.predict(load_policy(path).policy) == expected, path
    assert export.predict(load_policy(run_dir / "checkpoints" / "00000002").policy) != expected


def test_the_average_is_another_policy(run_dir, tmp_path):
    trained = exported(run_dir, tmp_path / "a.safetensors").policy
    average = exported(run_dir, tmp_path / "b.safetensors", "weights=ema").policy
    assert export.predict(trained) != export.predict(average)


def test_loading_a_policy_leaves_the_random_state_alone(run_dir):
    before = torch.get_rng_state()
    load_policy(run_dir)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_every_bit_of_the_weights_shows_in_the_golden_batch_or_is_no_weight():
    """The verification would see one changed parameter, whichever it is."""
    policy = make_policy().eval()
    reference = export.predict(policy)
    unseen = []
    for name, parameter in policy.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 0.5
        if export.predict(policy) == reference:
            unseen.append(name)
        with torch.no_grad():
            parameter.copy_(kept)
    assert all(name.startswith(("bin_embed", "norm_bins", "bins_out", "byte_embed")) for name in unseen), unseen


def test_the_golden_batch_has_the_shapes_of_any_spec():
    batch = export.golden_batch(make_policy())
    assert batch.actions.shape == (4, SPEC.chunk_length, SPEC.action_dim)
    assert batch.images["left"].shape == (4, 2, 3, 16, 24) and batch.images["left"].float().std() > 30
    assert batch.camera_mask["left"].tolist() == [True, False, True, True] and not batch.state[1].any()
    again = export.golden_batch(make_policy())
    assert torch.equal(again.state, batch.state)


def test_a_file_that_predicts_otherwise_is_removed(run_dir, tmp_path, monkeypatch, capsys):
    from opentau_train.checkpoints import card as cards

    whole = cards.write_file

    def damaged(path, weights, card):
        whole(path, {k: v + (k == "action_embed") for k, v in weights.items()}, card)

    monkeypatch.setattr(cards, "write_file", damaged)  # a fault of the disk, as if
    out = tmp_path / "policy.safetensors"
    assert export.main([f"checkpoint={run_dir}", f"out={out}"]) == 1
    assert not out.exists() and "other actions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out=x.safetensors"], "checkpoint is required"),
        (["checkpoint=/nowhere", "out=x.safetensors"], "no complete checkpoint there"),
        (["checkpoint=RUN", "out=x.pt"], "doesn't end in .safetensors"),
        (["checkpoint=RUN", "out=x.safetensors", "format=gguf"], "not a choice"),
        (["checkpoint=RUN", "out=x.safetensors", "format=onnx"], "doesn't end in .onnx"),
        (["checkpoint=RUN", "outt=x.safetensors"], "did you mean 'out'"),
        (["checkpoint"], "write checkpoint=VALUE"),
        (["checkpont=RUN", "out=x.safetensors"], "unknown key 'checkpont': did you mean 'checkpoint'"),
        (["RUN", "out=x.safetensors"], "write checkpoint=RUN"),
        (["nowhere", "out=x.safetensors"], "write KEY=VALUE"),
        (["checkpoint=RUN", "out=/no_such_folder/deep/x.safetensors"], "there is no directory /no_such_folder"),
        (["checkpoint=RUN", "out=x.safetensors", "force=perhaps"], "force"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(arguments, words, run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main([a.replace("RUN", str(run_dir)) for a in arguments]) == 2
    found = capsys.readouterr().err
    assert words.replace("RUN", str(run_dir)) in found and "remedy" in found and "Traceback" not in found
    assert not Path("/no_such_folder").exists()


def test_a_directory_of_other_files_is_not_replaced_by_force_either(run_dir, tmp_path, capsys):
    mine = tmp_path / "work" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    words = [f"checkpoint={run_dir}", f"out={mine.parent}", "format=lerobot", "force=true"]
    assert export.main(words) == 2 and "holds no policy, but other files" in capsys.readouterr().err
    assert mine.read_text() == "mine"


@pytest.mark.slow
def test_a_run_without_average_and_files_of_others_are_refused(run_dir, tmp_path):
    out = tmp_path / "policy.safetensors"
    exported(run_dir, out)
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(out)
    save_file(weights, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(out.read_bytes()[:1000])
    weights.pop("action_embed")
    save_file(weights, tmp_path / "less.safetensors", metadata=metadata)
    for name in ("other", "torn", "less"):
        with pytest.raises(UserError, match="no policy can be read"):
            load_policy(tmp_path / f"{name}.safetensors")
    plain = train_here([*TOY, "trainer.steps=1", "validation.every=0"], tmp_path / "plain")
    assert export.main([f"checkpoint={plain}", f"out={tmp_path / 'p.safetensors'}", "weights=ema"]) == 2


@pytest.mark.slow
def test_it_runs_as_a_command(run_dir, tmp_path):
    command = [sys.executable, "-m", "opentau_train.tools.export", f"checkpoint={run_dir}", "out=policy.safetensors"]
    done = warm.run(command, cwd=tmp_path, env=environment(), timeout=120)
    assert done.returncode == 0 and (tmp_path / "policy.safetensors").is_file(), done.stderr
    assert not done.stderr


def test_a_place_that_cannot_be_written_is_told_by_name(run_dir, tmp_path, capsys):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.safetensors", "file/policy.safetensors"):
        assert export.main([f"checkpoint={run_dir}", f"out={tmp_path / name}"]) == 2
        assert "can't be written: " in (said := capsys.readouterr().err) and str(tmp_path / name) in said


def test_what_is_there_stays_unless_its_replacement_is_asked_for_and_verified(run_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "policy.safetensors"
    out.write_text("mine")
    arguments = [f"checkpoint={run_dir}", f"out={out}"]
    assert export.main(arguments) == 2
    assert "is there already" in (said := capsys.readouterr().err) and "force=true" in said
    from opentau_train.checkpoints import card as cards

    with monkeypatch.context() as patch:
        patch.setattr(cards, "write_tensors", lambda path, *_: Path(path).write_text("torn"))
        assert export.main([*arguments, "force=true"]) != 0
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    capsys.readouterr()
    assert export.main([*arguments, "force=true"]) == 0
    assert capsys.readouterr().out.startswith(f"written to {out}: ")
    assert load_policy(out) and list(tmp_path.iterdir()) == [out]


def test_it_says_where_a_relative_place_is(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([f"checkpoint={run_dir}", "out=deep/policy.safetensors"]) == 0
    assert f"written to {tmp_path}/deep/policy.safetensors: " in capsys.readouterr().out
