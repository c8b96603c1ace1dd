"""Pretrained encoders of a policy's prompts and pictures: a sentence encoder (BERT) and MobileNetV2.

Both run in eval mode always: what is random in a policy comes from its `Draws`, and a sample's numbers mustn't depend
on its batch, so that there is no dropout and batch normalisation keeps the statistics that it came with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opentau_train.errors import UserError
from opentau_train.models.prompts import NO_TOKEN, load, missing_extra
from opentau_train.models.resnet import MEAN, STD, FrozenBatchNorm
from opentau_train.models.weight_map import WeightMap

ENCODERS = {
    "text_encoder": WeightMap(
        ((r"^(bert[.])?encoder[.]layer[.]", "text.layers."), (r"^(bert[.])?embeddings[.]", "text.embeddings.")),
        ignored=("*pooler.*", "cls.*", "*embeddings.position_ids"),
        part=("text.embeddings.*", "text.layers.*"),
    ),
    "vision_encoder": WeightMap(
        ((r"^features[.]", "stem.features."),),
        ignored=("*.num_batches_tracked", "features.1[4-8].*", "classifier.*"),
        part=("stem.features.*",),
    ),
}
"""{option that names weights: how they fill a policy that has the encoder as `text` or `stem`}."""
STRIDE = 16
"""Pixels a side of one of MobileNet's tokens."""


class Encoder(nn.Module, ABC):
    """`encode` of a subclass, in eval mode; without gradient where it is `frozen`. `project`, to tokens, is trained."""

    project: nn.Linear

    def __init__(self, parts: Mapping[str, nn.Module], widths: tuple[int, int], *, frozen: bool):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part.requires_grad_(not frozen))
        self.project = nn.Linear(*widths, bias=False)
        self.frozen = frozen
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """[M, N, features] of the encoder's own inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As `encode` takes them, to tokens [M, N, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encode(inputs)
        return self.project(features)


class TextEncoder(Encoder):
    """BERT up to its last layer, of a Hugging Face config.json."""

    embeddings: nn.Module
    layers: nn.ModuleList

    def __init__(self, config: Mapping[str, Any], width: int, *, frozen: bool):
        try:  # imported here: it takes 5 s
            from transformers.models.bert.configuration_bert import BertConfig
            from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer
        except ImportError as error:
            raise missing_extra("transformers", error) from error
        from huggingface_hub.errors import StrictDataclassError

        try:
            made = BertConfig(**config)
            made._attn_implementation = "sdpa"
            layers = nn.ModuleList(BertLayer(made) for _ in range(made.num_hidden_layers))
            parts = {"embeddings": BertEmbeddings(made), "layers": layers}
        except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"transformers makes no BERT of the encoder's config.json: {error!r}",
                where="model.text_encoder",
                remedy="download the folder again, or name another",
            ) from error
        super().__init__(parts, (made.hidden_size, width), frozen=frozen)

    def encode(self, inputs: Tensor) -> Tensor:
        """`inputs` [B, N] int64, filled up with `NO_TOKEN` -> [B, N, hidden]."""
        place = torch.arange(inputs.shape[1], device=inputs.device)[None]
        seen = ((inputs != NO_TOKEN) | (place == 0))[:, None, None]  # a row without any token would be NaN
        tokens = inputs.clamp(min=0)
        # Given, not its buffers: those have no numbers where the policy was built on the meta device.
        x = self.embeddings(tokens, token_type_ids=torch.zeros_like(tokens), position_ids=place)
        for layer in self.layers:
            x = layer(x, seen.expand(-1, 1, inputs.shape[1], -1))
        return x


class VisionEncoder(Encoder):
    """MobileNetV2 (Sandler et al. 2018) up to its last feature map of stride 16, instead of an `ImageStem`. Parameters
    have torchvision's names."""

    features: nn.Sequential
    mean: Tensor
    std: Tensor

    def __init__(self, image_size: tuple[int, int], width: int, *, frozen: bool):
        layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
        channels = 32
        for expand, out, num, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)):
            for i in range(num):
                layers.append(InvertedResidual((channels, out), stride if i == 0 else 1, expand))
                channels = out
        super().__init__({"features": nn.Sequential(*layers)}, (channels, width), frozen=frozen)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(3, 1, 1), persistent=False)
        self.reset_parameters()
        self.grid = tuple(math.ceil(side / STRIDE) for side in image_size)

    def reset_parameters(self) -> None:
        for buffer, values in ((self.mean, MEAN), (self.std, STD)):
            buffer.copy_(torch.tensor(values, device="cpu")[:, None, None])

    def encode(self, inputs: Tensor) -> Tensor:
        """`inputs` [M, 3, H, W] uint8 RGB -> [M, P, C], P grid places row by row."""
        x = ((inputs.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.features(x).flatten(2).transpose(1, 2)


class InvertedResidual(nn.Module):
    """Wider by `expand`, a convolution of each channel by itself, narrower again, beside a shortcut."""

    def __init__(self, channels: tuple[int, int], stride: int, expand: int):
        super().__init__()
        into, out = channels
        wide = into * expand
        widen = [] if expand == 1 else [_conv(into, wide, 1, 1)]
        narrow = [nn.Conv2d(wide, out, 1, bias=False), FrozenBatchNorm(out)]
        self.conv = nn.Sequential(*widen, _conv(wide, wide, 3, stride, groups=wide), *narrow)
        self.shortcut = into == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _conv(into: int, out: int, size: int, stride: int, *, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, FrozenBatchNorm(out), nn.ReLU6())


def check_text(folder: str | None, config: Mapping[str, Any] | None, num_tokens: int) -> None:
    """Raises `UserError` where the folder `model.text_encoder` isn't that of a BERT that reads `num_tokens`."""
    where = "model.text_encoder"
    if folder is None:
        return
    if config is None:
        what, remedy = f"{folder} has no config.json", f"set {where} to a Hugging Face folder on this disk"
    elif config.get("model_type") != "bert":
        what, remedy = f"{folder} holds a model of type {config.get('model_type')}", "name one of type bert"
    elif not 0 < num_tokens <= config.get("max_position_embeddings", 512):
        what = f"prompts of {num_tokens} tokens, and {folder} reads 1 to {config.get('max_position_embeddings', 512)}"
        remedy = "set model.max_prompt_bytes=64: 4 bytes make a token"
    elif (num := load(folder, where).vocab_size) > config.get("vocab_size", 30522):
        what = f"the tokenizer of {folder} has {num} tokens, more than its config.json"
        remedy = "download the folder again"
    else:
        return
    raise UserError(what, where=where, remedy=remedy)
