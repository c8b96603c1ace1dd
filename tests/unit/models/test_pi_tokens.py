"""The prompts' and actions' tokens of pi0 and pi0.5, as published."""

from __future__ import annotations

import numpy as np
import pytest

from opentau_train.errors import UserError
from opentau_train.models.pi.action_tokens import BinActions, FastActions
from opentau_train.models.prompts import TokenizePrompt, pi0_prompt, pi05_prompt
from tests.unit.models.pi_cases import fast_files, words_file


def test_the_state_stands_in_the_prompt_as_published():
    state = np.array([-1.5, -1.0, 0.0, 0.999, 1.0, 3.0], np.float32)
    text = "Task: open the drawer, State: -1 0 128 255 255 255;\nAction: "
    assert pi05_prompt(" open_the\ndrawer ", state) == text
    assert pi0_prompt("open_the drawer", state) == "open the drawer\n"


def test_a_tokenizer_file_gives_the_tokens_that_its_library_gives(tmp_path):
    words_file(tmp_path)
    transform = TokenizePrompt("pi0", 6, str(tmp_path))
    tokens, cut = transform.tokens("open the_drawer", np.zeros(0))
    assert tokens.tolist() == [1, 2, 3, 4, -1, -1] and not cut
    assert TokenizePrompt("pi0", 6).tokens("é", np.zeros(0))[0].tolist() == [2, 0xC3 + 3, 0xA9 + 3, 13, -1, -1], "bytes"


def test_a_long_prompt_is_cut_or_refused():
    tokens, cut = TokenizePrompt("pi0", 4).tokens("open the drawer", np.zeros(0))
    assert tokens.tolist() == [2, *(b + 3 for b in b"ope")] and cut
    with pytest.raises(UserError, match="a prompt has 17 tokens, the policy takes 4") as refused:
        TokenizePrompt("pi0", 4, overflow="error").tokens("open the drawer", np.zeros(0))
    assert "model.max_prompt_tokens=17" in refused.value.remedy


def test_the_longest_prompt_of_all_is_known_before_any_is_read():
    """With the state that takes the most tokens: no sample is refused once training has begun."""
    strict, asked = TokenizePrompt("pi05", 40, overflow="error"), []

    def prompts():
        asked.append(True)
        return [("open", 2), ("close the drawer", 2), ("open", 3)]

    length = len(b"Task: close the drawer, State: 255 255;\nAction: ") + 1
    with pytest.raises(UserError, match=f"{length} tokens, the policy takes 40: 'close the drawer'") as refused:
        strict.check_prompts(prompts)
    assert f"model.max_prompt_tokens={length}," in refused.value.remedy
    TokenizePrompt("pi05", length, overflow="error").check_prompts(prompts)
    TokenizePrompt("pi05", 3, overflow="cut").check_prompts(prompts)
    assert len(asked) == 2, "what refuses none doesn't read them"


def record(actions: np.ndarray, num_real: int) -> dict:
    steps = np.arange(len(actions)) >= num_real
    return {"actions": actions, "action_is_pad": steps, "action_dim_mask": np.array([True, True, False])}


def test_binned_tokens_are_the_bins_of_the_real_elements():
    actions = np.array([[-9.0, -1.0, 7], [0.99, 9.0, 7], [0, 0, 7]], np.float32)
    made = BinActions(6, 4, -1.0, 1.0)(record(actions, 2), None)["action_tokens"]
    assert made.tolist() == [0, 0, 3, 3, -1, -1]
    assert "action_tokens" not in BinActions(6, 4, -1.0, 1.0)({}, None), "a robot has no actions"


def test_fast_is_the_rounded_cosine_transform_in_a_byte_pair_code(tmp_path):
    """The transform against its definition, the code against its library. Steps past the end repeat the last one."""
    library = fast_files(tmp_path)
    chunk = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    made = FastActions(64, str(tmp_path))(record(chunk, 5), None)["action_tokens"]
    whole = np.concatenate([chunk[:5], np.repeat(chunk[4:5], 3, 0)])[:, :2].astype(float)
    text = ""
    for k in range(8):
        for a in range(2):
            by_definition = sum(whole[n, a] * np.cos(np.pi / 8 * (n + 0.5) * k) for n in range(8))
            text += chr(int(np.rint(10 * by_definition * np.sqrt((1 if k == 0 else 2) / 8))) + 200)
    want = library.encode(text).ids
    assert made.tolist() == want + [-1] * (64 - len(want)) and len(set(want)) > 3
    none = FastActions(64, str(tmp_path))(record(chunk, 0), None)["action_tokens"]
    assert (none == -1).all(), "nothing is real"
    with pytest.raises(UserError, match=rf"a chunk has {len(want)} action tokens, the policy takes 2"):
        FastActions(2, str(tmp_path))(record(chunk, 5), None)
