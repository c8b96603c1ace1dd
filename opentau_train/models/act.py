"""ACT, the action chunking transformer (Zhao et al. 2023): a CVAE whose decoder reads cameras, state and a latent.

    latent  = posterior of [cls, state, actions] by a transformer encoder; 0 on a robot
    memory  = [latent, state, feature maps of all cameras] through a transformer encoder
    actions = one learned query a chunk step, through a transformer decoder that looks at the memory

The terms are `l1`, the absolute error of the actions, and `kl`, the divergence of the posterior from the standard
normal distribution, summed over the latent's dimensions. Parameters have the names of LeRobot's ACT below its `model.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.config.bounds import Count, Fraction, LossWeight
from opentau_train.data.batch import Batch
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws
from opentau_train.models.inputs import real_actions, real_state
from opentau_train.models.layers import sinusoids, sinusoids_2d
from opentau_train.models.lerobot import LerobotExport, check_inputs
from opentau_train.models.policy import Policy
from opentau_train.models.resnet import CHANNELS, MEAN, NORMS, STD, STRIDE, ResNet18
from opentau_train.models.weight_map import WeightMap
from opentau_train.types import BatchSpec, LossTerms


class ActPolicy(Policy):
    """The policy that the module's docstring describes; `Policy` has the contract.

    `width`, `heads`, `feedforward` and `dropout` of every layer; `vae_depth`, `encoder_depth` and `decoder_depth`
    layers; `latent_dim` of the CVAE; `l1_weight` and `kl_weight` weigh the terms in the total loss; `backbone_norm`:
    group, for training from scratch, or frozen_batch, for pretrained weights. Prompts and earlier frames aren't looked
    at. Dropout is drawn anew for each micro-batch, so that only at 0.0 the losses are the same on any number of ranks.
    """

    vae_encoder_pos_enc: Tensor
    _places: Tensor

    def __init__(
        self,
        spec: BatchSpec,
        *,
        width: Count = 512,
        heads: Count = 8,
        feedforward: Count = 3200,
        vae_depth: Count = 4,
        encoder_depth: Count = 4,
        decoder_depth: Count = 1,
        latent_dim: Count = 32,
        dropout: Fraction = 0.1,
        l1_weight: LossWeight = 1.0,
        kl_weight: LossWeight = 10.0,
        backbone_norm: Literal["group", "frozen_batch"] = "group",
    ):
        super().__init__()
        _check(spec, width, heads)
        self.spec, self.latent_dim, self.backbone_norm = spec, latent_dim, backbone_norm
        self.loss_weights = {"l1": l1_weight, "kl": kl_weight}
        num_states = 1 if spec.state_dim else 0

        self.vae_encoder = Stack(EncoderLayer(width, heads, feedforward, dropout) for _ in range(vae_depth))
        self.vae_encoder_cls_embed = nn.Embedding(1, width)
        self.vae_encoder_action_input_proj = nn.Linear(spec.action_dim, width)
        self.vae_encoder_latent_output_proj = nn.Linear(width, 2 * latent_dim)
        self.register_buffer("vae_encoder_pos_enc", sinusoids(1 + num_states + spec.chunk_length, width)[None])
        if num_states:
            self.vae_encoder_robot_state_input_proj = nn.Linear(spec.state_dim, width)
            self.encoder_robot_state_input_proj = nn.Linear(spec.state_dim, width)

        self.encoder = Stack(EncoderLayer(width, heads, feedforward, dropout) for _ in range(encoder_depth))
        self.encoder_latent_input_proj = nn.Linear(latent_dim, width)
        self.encoder_1d_feature_pos_embed = nn.Embedding(1 + num_states, width)
        if spec.cameras:
            self.backbone = ResNet18(NORMS[backbone_norm])
            self.encoder_img_feat_input_proj = nn.Conv2d(CHANNELS, width, 1)
            grid = [math.ceil(side / STRIDE) for side in spec.image_size]
            self.register_buffer("_places", sinusoids_2d(grid[0], grid[1], width), persistent=False)

        self.decoder = Stack((DecoderLayer(width, heads, feedforward, dropout) for _ in range(decoder_depth)), width)
        self.decoder_pos_embed = nn.Embedding(spec.chunk_length, width)
        self.action_head = nn.Linear(width, spec.action_dim)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    def weight_map(self) -> WeightMap:
        """Of LeRobot's files."""
        dims = ("action_head.*", "vae_encoder_action_input_proj.weight", "*encoder_robot_state_input_proj.weight")
        return WeightMap((("^model[.]", ""),), resized=dims)

    def backbone_weight_map(self) -> WeightMap | None:
        """Of torchvision's and timm's ResNet-18."""
        if not self.spec.cameras:
            return None
        if self.backbone_norm != "frozen_batch":
            raise UserError(
                f"model.backbone_norm={self.backbone_norm} has no place for the statistics of a pretrained ResNet",
                where="model.backbone_path",
                remedy="set model.backbone_norm=frozen_batch",
            )
        names = ((r"^(conv1|bn1|layer\d)[.]", r"backbone.\1."),)
        return WeightMap(names, ignored=("fc.*",), part=("backbone.*",))

    def lerobot_export(self) -> LerobotExport:
        if self.backbone_norm != "frozen_batch":
            raise UserError(
                f"model.backbone_norm={self.backbone_norm}: LeRobot's ACT has frozen_batch only",
                where="format",
                remedy="set format=safetensors, or train with model.backbone_norm=frozen_batch",
            )
        check_inputs("ACT", self.spec, needs_state=False)
        layer, chunk = self.encoder.layers[0], self.spec.chunk_length
        assert isinstance(layer, EncoderLayer)
        config = {
            "type": "act",
            "n_obs_steps": 1,
            "chunk_size": chunk,
            "n_action_steps": chunk,
            "vision_backbone": "resnet18",
            "pretrained_backbone_weights": None,
            "dim_model": layer.linear1.in_features,
            "n_heads": layer.self_attn.num_heads,
            "dim_feedforward": layer.linear1.out_features,
            "n_encoder_layers": len(self.encoder.layers),
            "n_decoder_layers": len(self.decoder.layers),
            "n_vae_encoder_layers": len(self.vae_encoder.layers),
            "latent_dim": self.latent_dim,
            "dropout": layer.dropout.p,
            "kl_weight": self.loss_weights["kl"],
        }
        return LerobotExport(config, {f"model.{name}": value for name, value in self.state_dict().items()}, (MEAN, STD))

    def blocks(self) -> list[nn.Module]:
        return [*self.vae_encoder.layers, *self.encoder.layers, *self.decoder.layers]

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        real = real_actions(batch)
        return {"l1": real.sum((1, 2), dtype=torch.float32), "kl": real.any(2).any(1).float()}

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        real, counts = real_actions(batch), self.term_counts(batch)
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: select, never multiply.
        actions, state = torch.where(real, batch.actions, 0.0), real_state(batch)
        mean, log_variance = self._posterior(actions, state, ~batch.action_is_pad)
        latent = mean + (log_variance / 2).exp() * draws.normal("latent", (self.latent_dim,))
        errors = (self._decode(batch, state, latent) - actions).abs()
        divergence = (log_variance.exp() + mean.square() - 1.0 - log_variance).sum(1) / 2
        sums = {
            "l1": torch.where(real, errors, 0.0).sum((1, 2)),
            "kl": torch.where(counts["kl"] > 0, divergence, 0.0),
        }
        return {term: (sums[term], counts[term]) for term in self.loss_weights}

    @torch.no_grad()
    def sample_actions(self, batch: Batch, draws: Draws) -> Tensor:
        """The chunk of the prior's mean, the latent 0: nothing is drawn. Padded dims are 0."""
        latent = torch.zeros(len(batch), self.latent_dim, device=batch.state.device)
        return torch.where(batch.action_dim_mask[:, None, :], self._decode(batch, real_state(batch), latent), 0.0)

    def _posterior(self, actions: Tensor, state: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latent, each [B, latent_dim] f32; `exists` [B, T] steps."""
        tokens = [self.vae_encoder_cls_embed.weight.expand(len(actions), 1, -1)]
        if self.spec.state_dim:
            tokens.append(self.vae_encoder_robot_state_input_proj(state)[:, None])
        valid = torch.cat([torch.ones_like(exists[:, :1]).expand(-1, len(tokens)), exists], dim=1)
        tokens.append(self.vae_encoder_action_input_proj(actions))
        x = self.vae_encoder(torch.cat(tokens, dim=1), self.vae_encoder_pos_enc, valid)
        mean, log_variance = self.vae_encoder_latent_output_proj(x[:, 0]).float().chunk(2, dim=1)
        return mean, log_variance

    def _decode(self, batch: Batch, state: Tensor, latent: Tensor) -> Tensor:
        """The chunk [B, T, A] f32."""
        tokens = [self.encoder_latent_input_proj(latent)[:, None]]
        if self.spec.state_dim:
            tokens.append(self.encoder_robot_state_input_proj(state)[:, None])
        places = [self.encoder_1d_feature_pos_embed.weight]
        valid = [torch.ones(len(batch), len(places[0]), dtype=torch.bool, device=latent.device)]
        if self.spec.cameras:
            frames = torch.stack([batch.images[camera][:, -1] for camera in self.spec.cameras], dim=1)
            features = self.encoder_img_feat_input_proj(self.backbone(frames.flatten(0, 1)))
            features = features.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])  # [B, C, places, D]
            present = torch.stack([batch.camera_mask[camera] for camera in self.spec.cameras], dim=1)
            tokens.append(features.flatten(1, 2))
            places += [self._places] * len(self.spec.cameras)
            valid.append(present[:, :, None].expand(-1, -1, features.shape[2]).flatten(1))
        place, seen = torch.cat(places)[None], torch.cat(valid, dim=1)
        memory = self.encoder(torch.cat(tokens, dim=1), place, seen)
        queries = torch.zeros_like(memory[:, :1]).expand(-1, self.spec.chunk_length, -1)
        return self.action_head(self.decoder(queries, self.decoder_pos_embed.weight, memory, place, seen)).float()


class Stack(nn.Module):
    """Layers one after the other, and a norm of `width` behind the last one where it is given."""

    def __init__(self, layers: Iterable[nn.Module], width: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if width is None else nn.LayerNorm(width)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *others)
        return self.norm(x)


class EncoderLayer(nn.Module):
    """A post-norm transformer layer (Vaswani et al. 2017) that adds positions to queries and keys, as DETR does."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))

    def forward(self, x: Tensor, place: Tensor, valid: Tensor) -> Tensor:
        """`x` [B, N, D], positions `place` [1, N, D], tokens that exist `valid` [B, N] bool."""
        q = x + place
        y, _ = self.self_attn(q, q, x, key_padding_mask=~valid, need_weights=False)
        x = self.norm1(x + self.dropout1(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout2(y))


class DecoderLayer(EncoderLayer):
    """The same with attention to a memory in the middle."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float):
        super().__init__(width, heads, feedforward, dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norm3, self.dropout3 = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, memory_place: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """`x` [B, T, D] with positions `place` [T, D]; `memory` [B, N, D] with its own, and which of it exists."""
        q = x + place
        y, _ = self.self_attn(q, q, x, need_weights=False)
        x = self.norm1(x + self.dropout1(y))
        mask = ~valid
        y, _ = self.multihead_attn(x + place, memory + memory_place, memory, key_padding_mask=mask, need_weights=False)
        x = self.norm2(x + self.dropout2(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout3(y))


class TemporalEnsemble:
    """Averages what successive chunks say of the same moment (Zhao et al. 2023, algorithm 2): the i-th chunk that spoke
    of it, the oldest being 0, has the weight exp(-`coefficient` i). A robot asks for a chunk at every step."""

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient
        self._chunks: list[Tensor] = []

    def reset(self) -> None:
        """Forget the episode."""
        self._chunks = []

    def update(self, chunk: Tensor) -> Tensor:
        """Take this step's chunk [B, T, A] and give its action [B, A]."""
        self._chunks = [c[:, 1:] for c in self._chunks if c.shape[1] > 1] + [chunk]
        weights = torch.exp(-self.coefficient * torch.arange(len(self._chunks), device=chunk.device))
        now = torch.stack([c[:, 0] for c in self._chunks], dim=-1)
        return (now * (weights / weights.sum())).sum(-1)


def _check(spec: BatchSpec, width: int, heads: int) -> None:
    if width % heads or width % 4:
        raise UserError(
            f"model.width={width} must be a multiple of 4 and of model.heads={heads}", remedy="change one of them"
        )
    if not spec.cameras and not spec.state_dim:
        raise UserError(
            "ACT needs a camera or a state",
            where="model",
            remedy="give a source cameras or state, or choose another model",
        )
