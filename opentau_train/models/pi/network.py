"""pi0's and pi0.5's network, of transformers' own layers. The import takes 5 s: `policy` does it when one is built.

Layer i of the language model and layer i of the action expert are one unit, a `Pair`, which is sharded, compiled and
recomputed as a whole. The keys and values that the expert reads are passed in the open: through transformers' cache
object they would leave a unit unseen by FSDP, and a recomputed layer would add its own to the cache twice.

Shape suffixes: B samples, N tokens, K keys, n heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm, apply_rotary_pos_emb
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from opentau_train.models.layers import KeysValues
from opentau_train.models.packing.attention import Mask, attend
from opentau_train.models.pi.parts import AdaptiveNorm, Rope, Tokens, normed
from opentau_train.models.pi.sizes import ExpertSizes, GemmaSizes, VisionSizes


class Vision(nn.Module):
    """SigLIP, and the projection of its patches to tokens of the language model."""

    def __init__(self, sizes: VisionSizes, out_width: int):
        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
        )
        config._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(config)
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=config.layer_norm_eps)
        self.projector = nn.Linear(sizes.width, out_width)

    def forward(self, frames: Tensor) -> Tensor:
        """`frames` [M, 3, H, W] uint8 -> [M, P, D], P patches row by row."""
        x = self.embeddings(frames.float() / 255.0 * 2.0 - 1.0)
        for layer in self.layers:
            x = layer(x, None)
        return self.projector(self.norm(x))


class Pair(nn.Module):
    """One layer of the language model (`vlm`) and of the action expert (`expert`).

    The prefix's tokens look at the prefix, the suffix's at the first `visible` of the prefix and at the suffix. With
    `insulate` no gradient goes from the suffix to the prefix. `keys_only`: nothing reads the prefix behind this layer,
    so that only its keys and values are computed and the rest of `vlm` isn't trained.
    """

    def __init__(self, layers: tuple[GemmaDecoderLayer, GemmaDecoderLayer], *, insulate: bool, keys_only: bool):
        super().__init__()
        self.vlm, self.expert = layers
        self.insulate, self.keys_only = insulate, keys_only
        if keys_only:
            attention = self.vlm.self_attn
            for part in (attention.q_proj, attention.o_proj, self.vlm.post_attention_layernorm, self.vlm.mlp):
                part.requires_grad_(False)

    def forward(
        self, prefix: Tokens | None, suffix: Tokens | None, visible: int, past: KeysValues | None = None
    ) -> tuple[Tensor | None, Tensor | None, KeysValues | None]:
        """The prefix's and the suffix's tokens behind the layer; without a suffix also the prefix's keys and values,
        which are given as `past` where there is no prefix."""
        x_prefix = x_suffix = None
        if prefix is not None:
            x_prefix, past = self._prefix(prefix)
        if suffix is None:
            return x_prefix, None, past
        assert past is not None, "the suffix looks at a prefix"
        seen = [t[:, :, :visible].detach() if self.insulate else t[:, :, :visible] for t in past]
        h, gate = normed(self.expert.input_layernorm, suffix)
        q, k, v = _project(self.expert, h, suffix.rope)
        y = _attend(self.expert, q, torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2), suffix.mask)
        x_suffix = _finish(self.expert, suffix._replace(x=_add(suffix.x, y, gate)))
        return x_prefix, x_suffix, None

    def _prefix(self, prefix: Tokens) -> tuple[Tensor | None, KeysValues]:
        h = self.vlm.input_layernorm(prefix.x)
        if self.keys_only:
            k, v = (_heads(self.vlm.self_attn, name, h) for name in ("k_proj", "v_proj"))
            return None, (_rotate(k, k, prefix.rope)[1].to(v.dtype), v)
        q, k, v = _project(self.vlm, h, prefix.rope)
        return _finish(self.vlm, prefix._replace(x=prefix.x + _attend(self.vlm, q, k, v, prefix.mask))), (k, v)


def make_layers(
    vlm: GemmaSizes, expert: ExpertSizes, *, adaptive: bool
) -> list[tuple[GemmaDecoderLayer, GemmaDecoderLayer]]:
    """Each layer of the language model with the expert's beside it, whose norms are `adaptive` or not."""
    layers = []
    for _ in range(vlm.depth):
        beside = GemmaDecoderLayer(_gemma(vlm, expert.width, expert.mlp), 0)
        if adaptive:
            beside.input_layernorm = AdaptiveNorm(expert.width)  # type: ignore[assignment]
            beside.post_attention_layernorm = AdaptiveNorm(expert.width)  # type: ignore[assignment]
        layers.append((GemmaDecoderLayer(_gemma(vlm, vlm.width, vlm.mlp), 0), beside))
    return layers


def final_norm(width: int, *, adaptive: bool) -> nn.Module:
    return AdaptiveNorm(width) if adaptive else GemmaRMSNorm(width, eps=1e-6)


def init_weights(module: nn.Module) -> None:
    """As openpi does it where no weights are loaded: matrices and SigLIP's convolution normal with a variance of one
    over their inputs, tables normal(0, 0.02), norms and biases that change nothing, adaptive norms that shut their
    layers."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and "embed" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for part in module.modules():
        if isinstance(part, AdaptiveNorm):
            nn.init.zeros_(part.dense.weight)
            nn.init.zeros_(part.dense.bias)
        elif isinstance(part, GemmaRMSNorm):
            nn.init.zeros_(part.weight)
        elif isinstance(part, SiglipVisionEmbeddings):
            part.position_ids.copy_(torch.arange(part.num_positions)[None])


def _gemma(sizes: GemmaSizes, width: int, mlp: int) -> GemmaConfig:
    return GemmaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
    )


def _project(layer: GemmaDecoderLayer, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, n, N, d] of the normed tokens `x`."""
    attention = layer.self_attn
    q, k, v = (_heads(attention, name, x) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = _rotate(q, k, rope)
    return q.to(v.dtype), k.to(v.dtype), v  # under autocast the rotation is float32, and SDPA wants one dtype


def _heads(attention: nn.Module, projection: str, x: Tensor) -> Tensor:
    """[B, n, N, d]"""
    return getattr(attention, projection)(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rotate(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(q, k, *rope)


def _attend(layer: GemmaDecoderLayer, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    y = attend(q, k, v, mask, scale=layer.self_attn.scaling)
    return layer.self_attn.o_proj(y.transpose(1, 2).flatten(2))


def _add(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate


def _finish(layer: GemmaDecoderLayer, tokens: Tokens) -> Tensor:
    h, gate = normed(layer.post_attention_layernorm, tokens)
    return _add(tokens.x, layer.mlp(h), gate)
