"""ACT keeps the contract of a policy; its numbers beside LeRobot's: tests/side_by_side/test_act.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opentau_train.errors import UserError
from opentau_train.models.act import ActPolicy, TemporalEnsemble
from opentau_train.models.draws import Draws
from opentau_train.models.policy import bind_model
from tests.program import DATA, metrics, train_here
from tests.unit.models.flow_cases import SPEC, make_batch, total, with_garbage

SIZES = {
    "width": 32,
    "heads": 4,
    "feedforward": 48,
    "vae_depth": 1,
    "encoder_depth": 1,
    "latent_dim": 4,
    "dropout": 0.0,
}


def make_act(spec=SPEC, **changes) -> ActPolicy:
    torch.manual_seed(0)
    return ActPolicy(spec, **{**SIZES, **changes})


@pytest.fixture(scope="module")
def policy() -> ActPolicy:
    return make_act()


def losses(policy: ActPolicy, batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return policy(batch, Draws(batch.key))


def assert_same(got, want) -> None:
    for term, (sums, counts) in want.items():
        torch.testing.assert_close(got[term][0], sums, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[term][1], counts)


def test_terms_are_sums_over_the_real_entries_and_counts_those_of_the_masks(policy):
    batch = make_batch()
    terms, real = losses(policy, batch), ~batch.action_is_pad[:, :, None] & batch.action_dim_mask[:, None, :]
    assert torch.equal(terms["l1"][1], real.sum((1, 2)).float()) and torch.equal(terms["kl"][1], torch.ones(4))
    counts = policy.term_counts(batch)
    assert all(torch.equal(counts[term], terms[term][1]) for term in policy.loss_weights)
    assert (terms["kl"][0] > 0).all()


def test_garbage_in_padded_entries_changes_nothing(policy):
    batch = make_batch()
    dirty = with_garbage(batch)
    assert_same(losses(policy, dirty), losses(policy, batch))
    chunks = [policy.sample_actions(b, Draws(b.key)) for b in (dirty, batch)]
    torch.testing.assert_close(*chunks, rtol=0, atol=1e-6)
    assert not chunks[0][2, :, -1].any(), "a dimension that the sample lacks"


def test_a_sample_loses_the_same_alone_and_in_any_batch(policy):
    batch = make_batch(num=5)
    together = losses(policy, batch)
    for i, alone in enumerate(batch.split(1)):
        assert_same(losses(policy, alone), {t: (s[i : i + 1], c[i : i + 1]) for t, (s, c) in together.items()})


@pytest.mark.parametrize(
    "changes",
    [{"weight": torch.zeros(4)}, {"action_is_pad": torch.ones(4, 6, dtype=torch.bool)}],
    ids=str,
)
def test_what_is_not_supervised_is_exactly_zero_and_gives_no_gradient(changes):
    policy, batch = make_act(), make_batch(**changes)
    terms = losses(policy, batch)
    assert not any(sums.any() or counts.any() for sums, counts in terms.values())
    total(policy, terms).backward()
    assert not any(parameter.grad.any() for parameter in policy.parameters())


@pytest.mark.parametrize("lacks", [{}, {"cameras": ()}, {"state_dim": 0}], ids=str)
def test_every_parameter_gets_a_finite_gradient_and_every_input_matters(lacks):
    spec = dataclasses.replace(SPEC, **lacks)
    policy, batch = make_act(spec), make_batch(spec)
    total(policy, losses(policy, batch)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.parameters())
    chunk = policy.sample_actions(batch, Draws(batch.key))
    if spec.state_dim:
        other = batch.replace(state=batch.state + 1)
        assert (policy.sample_actions(other, Draws(batch.key)) - chunk).abs().max() > 1e-4
    if spec.cameras:
        other = batch.replace(images={c: 255 - frames for c, frames in batch.images.items()})
        assert (policy.sample_actions(other, Draws(batch.key)) - chunk).abs().max() > 1e-4


def test_the_latent_is_drawn_by_the_samples_key_and_tells_of_the_actions(policy):
    batch = make_batch()
    again = policy(batch, Draws(batch.key, index=1))
    first = losses(policy, batch)
    assert torch.equal(first["kl"][0], again["kl"][0]) and not torch.equal(first["l1"][0], again["l1"][0])


def test_the_ensemble_weighs_older_chunks_more():
    ensemble = TemporalEnsemble(coefficient=0.5)
    ensemble.update(torch.tensor([[[0.0], [1.0]]]))
    weights = torch.exp(-0.5 * torch.arange(2))
    assert ensemble.update(torch.tensor([[[3.0], [9.0]]])) == pytest.approx(
        float((weights @ torch.tensor([1.0, 3.0])) / weights.sum())
    )
    assert ensemble.update(torch.tensor([[[5.0], [7.0]]])) == pytest.approx(
        float((weights @ torch.tensor([9.0, 5.0])) / weights.sum())
    )
    ensemble.reset()
    assert ensemble.update(torch.tensor([[[2.0], [0.0]]])) == 2.0


@pytest.mark.parametrize(
    ("spec", "changes", "text"),
    [
        (SPEC, {"width": 30}, "model.width=30 must be a multiple of 4"),
        (dataclasses.replace(SPEC, cameras=(), state_dim=0), {}, "needs a camera or a state"),
    ],
)
def test_what_can_not_be_built_is_the_users_to_mend(spec, changes, text):
    with pytest.raises(UserError, match=text):
        make_act(spec, **changes)


@pytest.mark.parametrize("option", [{"heads": 0}, {"latent_dim": 0}, {"encoder_depth": 0}, {"dropout": 2.0}])
def test_sizes_that_make_no_policy_are_refused_before_data_are_opened(option):
    with pytest.raises(UserError, match=rf"model\.{next(iter(option))} must be"):
        bind_model({"_target_": "opentau_train.models.act.ActPolicy", **option})


@pytest.mark.slow
def test_any_dataset_trains_it_by_one_word(tmp_path):
    words = ["+recipe=lerobot", f"data.sources.main.root={DATA / 'lerobot_v30'}", "model=act_tiny", "+debug=smoke"]
    small = ["data.image_size=[32,32]", "trainer.global_batch_size=4", "data.num_workers=0", "logger=none"]
    rows = metrics(train_here([*words, *small], tmp_path / "run"))
    last = rows[max(rows)]
    assert last["Training/L1"] > 0 and last["Training/KL"] > 0, last
    assert any(tag.startswith("Validation/main/") and tag.endswith("/L1") for tag in last), last
