"""pi0 and pi0.5 keep the contract of a policy; their numbers are those of transformers' and LeRobot's own code."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F

from opentau_train.data.batch import blank_batch
from opentau_train.data.transforms.pipeline import meet
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from tests.golden import pi
from tests.unit.models.flow_cases import with_garbage
from tests.unit.models.pi_cases import (
    SPEC,
    TOKENS,
    VLM,
    Given,
    fast_files,
    golden_batch,
    golden_pi,
    lerobot_name,
    library_inputs,
    library_name,
    library_pi0,
    make_batch,
    make_pi0,
    make_pi05,
    words_file,
)

pytestmark = pytest.mark.slow  # transformers takes 5 s to import


@pytest.fixture(scope="module")
def same_weights():
    """(ours, transformers') with the same weights."""
    policy, library = make_pi0(), library_pi0()
    theirs = library.state_dict()
    policy.load_state_dict({name: theirs[library_name(name)] for name in policy.state_dict()})
    return policy, library


def library_errors(library, policy, batch, given) -> torch.Tensor:
    actions = F.pad(batch.actions, (0, policy.max_action_dim - SPEC.action_dim))
    out = library(**library_inputs(batch, policy), noise=given.noise, timestep=given.time, actions=actions)
    return out.loss[..., : SPEC.action_dim]


def test_pi0_loses_what_transformers_pi0_loses_and_its_gradients_are_the_same(same_weights):
    policy, library = same_weights
    batch = make_batch(policy, whole=True)
    given = Given(policy, len(batch))
    sums, counts = policy(batch, given)["mse"]
    errors = library_errors(library, policy, batch, given)
    assert torch.equal(sums, errors.flatten(1).sum(1))  # to the last bit
    assert counts.tolist() == [SPEC.chunk_length * SPEC.action_dim] * 4
    sums.sum().backward()
    errors.sum().backward()
    theirs = {name: p.grad for name, p in library.named_parameters()}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            size = theirs[library_name(name)].abs().max()
            assert (parameter.grad - theirs[library_name(name)]).abs().max() <= 2e-6 * max(1, size), name
        else:
            assert theirs[library_name(name)] is None or not theirs[library_name(name)].any(), name
    policy.zero_grad()


def test_pi0_samples_what_transformers_pi0_samples(same_weights):
    policy, library = same_weights
    batch = make_batch(policy, whole=True)
    given = Given(policy, len(batch))
    chunk = policy.sample_actions(batch, given)
    theirs = library.sample_actions(**library_inputs(batch, policy), noise=given.noise)
    torch.testing.assert_close(chunk, theirs[..., : SPEC.action_dim], rtol=0, atol=1e-6)


def test_an_absent_camera_and_a_short_prompt_are_masked_as_transformers_masks_them(same_weights):
    policy, library = same_weights
    batch = make_batch(policy)
    batch = batch.replace(action_is_pad=torch.zeros_like(batch.action_is_pad))
    given = Given(policy, len(batch))
    errors = library_errors(library, policy, batch, given).sum(1)
    real = torch.where(batch.action_dim_mask, errors, 0.0).sum(1)
    torch.testing.assert_close(policy(batch, given)["mse"][0], real, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_losses_gradients_and_chunks_are_those_of_lerobots_own_code(kind):
    policy, want = golden_pi(kind), json.loads(pi.FILE.read_text())[kind]
    batch, draws = golden_batch(policy)
    sums, counts = policy(batch, draws)["mse"]
    torch.testing.assert_close(sums, torch.tensor(want["errors"]).sum((1, 2)), rtol=2e-6, atol=0)
    assert (counts == pi.STEPS * pi.DIMS).all()
    sums.sum().backward()
    for name, parameter in policy.named_parameters():
        expected = want["gradients"].get(lerobot_name(name), 0.0)
        got = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    chunk = policy.sample_actions(batch, draws)
    torch.testing.assert_close(chunk, torch.tensor(want["chunk"]), rtol=0, atol=3e-5)


BOTH = pytest.mark.parametrize("make", [make_pi0, make_pi05], ids=["pi0", "pi05"])


def losses(policy, batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return policy(batch, Draws(batch.key))


def assert_same(got, want) -> None:
    for term, (sums, counts) in want.items():
        torch.testing.assert_close(got[term][0], sums, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[term][1], counts)


@BOTH
def test_terms_count_the_real_elements_and_tokens(make):
    policy = make(**TOKENS)
    batch = make_batch(policy)
    terms, counts = losses(policy, batch), policy.term_counts(batch)
    assert all(torch.equal(counts[term], terms[term][1]) for term in policy.loss_weights)
    assert counts["mse"].tolist() == counts["ce"].tolist() == [24.0, 24.0, 12.0, 24.0], "a token an element"
    assert all((sums > 0).all() for sums, _ in terms.values())


@BOTH
def test_garbage_in_padded_entries_changes_nothing(make):
    policy = make(**TOKENS)
    batch = make_batch(policy)
    dirty = with_garbage(batch)
    assert_same(losses(policy, dirty), losses(policy, batch))
    chunks = [policy.sample_actions(b, Draws(b.key)) for b in (dirty, batch)]
    torch.testing.assert_close(*chunks, rtol=0, atol=1e-6)
    assert not chunks[0][2, :, -1].any(), "a dimension that the sample lacks"


@BOTH
def test_a_sample_loses_the_same_alone_and_in_any_batch(make):
    policy = make(**TOKENS)
    batch = make_batch(policy, num=5)
    together = losses(policy, batch)
    for i, alone in enumerate(batch.split(1)):
        assert_same(losses(policy, alone), {t: (s[i : i + 1], c[i : i + 1]) for t, (s, c) in together.items()})


@BOTH
def test_a_filler_and_a_sample_without_supervision_are_exactly_zero_and_give_no_gradient(make):
    policy = make(**TOKENS)
    spec = meet(policy.spec, policy.wants())
    batch = make_batch(policy)
    unsupervised = batch.replace(weight=torch.zeros(4))
    for given in (blank_batch(spec), unsupervised):
        policy.zero_grad()
        terms = losses(policy, given)
        assert not any(sums.any() or counts.any() for sums, counts in terms.values())
        sum(sums.sum() for sums, _ in terms.values()).backward()
        trained = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
        assert not any(grad is None or grad.any() for grad in trained.values())


@BOTH
@pytest.mark.parametrize("options", [{}, TOKENS, {**TOKENS, "insulate": True}], ids=["mse", "tokens", "insulated"])
def test_every_trained_parameter_gets_a_gradient_and_no_other(make, options):
    policy = make(**options)
    batch = make_batch(policy)
    sum(sums.sum() for sums, _ in losses(policy, batch).values()).backward()
    trained = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in trained.values())
    unused = {n for n, p in policy.named_parameters() if not p.requires_grad}
    last = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
    want = {n for n, _ in policy.named_parameters() if n.startswith(tuple(f"layers.1.vlm.{part}." for part in last))}
    assert unused == (set() if options else want | {"vlm_norm.weight"})


@BOTH
def test_insulation_keeps_the_flows_gradient_from_the_language_model_and_the_tokens_change_no_flow_loss(make):
    policy, plain = make(**TOKENS, insulate=True), make()
    plain.load_state_dict({n: v for n, v in policy.state_dict().items() if not n.startswith("action_token")})
    batch = make_batch(policy)
    terms = losses(policy, batch)
    assert torch.equal(terms["mse"][0], losses(plain, batch)["mse"][0])
    reached = {}
    for term, (sums, _) in terms.items():
        policy.zero_grad()
        sums.sum().backward(retain_graph=True)
        reached[term] = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    expert = {n for n, _ in policy.named_parameters() if ".expert." in n or n.startswith(("expert_norm", "action_in"))}
    assert reached["mse"] >= expert and not reached["mse"] & reached["ce"]
    assert reached["mse"] | reached["ce"] == {n for n, _ in policy.named_parameters()}
    assert not any(".vlm." in n or n.startswith(("vision", "token_embed", "vlm_norm")) for n in reached["mse"])


@BOTH
def test_every_input_matters_and_the_noise_is_the_samples_own(make):
    policy = make()
    batch = make_batch(policy, whole=True)
    chunk = policy.sample_actions(batch, Draws(batch.key))
    tokens = batch.prompt_tokens.clone()
    tokens[:, 3] = 99
    moved = {
        "images": {**batch.images, "left": 255 - batch.images["left"]},
        "prompt_tokens": tokens,
        **({"state": batch.state + 1} if policy.form == "pi0" else {}),
    }
    for name, value in moved.items():
        other = policy.sample_actions(batch.replace(**{name: value}), Draws(batch.key))
        assert (other - chunk).abs().max() > 1e-5, name
    assert torch.equal(policy.sample_actions(batch, Draws(batch.key)), chunk)
    assert not torch.equal(policy.sample_actions(batch, Draws(batch.key, index=1)), chunk)


def test_absent_cameras_cost_nothing(monkeypatch):
    policy = make_pi0()
    batch = make_batch(policy)
    present = sum(int(mask.sum()) for mask in batch.camera_mask.values())
    seen, inner = [], policy.vision.forward
    monkeypatch.setattr(policy.vision, "forward", lambda frames: seen.append(len(frames)) or inner(frames))
    losses(policy, batch)
    assert seen == [present] and present < 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer_path": "/nowhere"}, "there is no tokenizer"),
        ({"vlm": dataclasses.replace(VLM, vocab_size=100)}, "259 tokens, the language model's table 100"),
        ({"max_state_dim": 4}, "5 state dimensions, the policy holds 4"),
        ({"max_action_dim": 3}, "4 action dimensions, the policy holds 3"),
        ({"max_chunk_length": 5}, "6 steps in a chunk, the policy holds 5"),
        ({"action_tokens": "fast"}, "without FAST's files"),
        ({"insulate": True}, "nothing would train the language model"),
        ({"action_tokens": "fast", "action_tokenizer_path": "/nowhere"}, "no FAST tokenizer can be read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_policy_cannot_hold_is_refused(options, words):
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        make_pi0(**options)
    assert refused.value.where and refused.value.remedy


def test_a_tokenizer_whose_numbers_skip_some_needs_a_table_for_the_highest(tmp_path):
    words_file(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"drawer":4', '"drawer":400').replace('"drawer": 4', '"drawer": 400'))
    with pytest.raises(UserError, match="401 tokens, the language model's table 384"):
        make_pi0(tokenizer_path=str(tmp_path))


def test_the_policy_tokenizes_with_the_files_it_is_given(tmp_path):
    words_file(tmp_path)
    assert make_pi0(tokenizer_path=str(tmp_path)).wants().transforms["tokenize"].tokenizer == str(tmp_path)
    fast_files(tmp_path)
    policy = make_pi0(action_tokens="fast", action_tokenizer_path=str(tmp_path), max_action_tokens=20)
    batch = make_batch(policy)
    assert torch.equal(policy.term_counts(batch)["ce"], (batch.action_tokens >= 0).sum(1))
    assert (losses(policy, batch)["ce"][0] > 0).all()
