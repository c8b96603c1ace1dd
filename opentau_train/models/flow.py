"""The built-in policy: one transformer, trained from scratch, with a flow-matching head and a binned action head.

    prefix  = start token, camera patches, prompt tokens, state     sees itself
    actions = the noised action chunk with its flow time            sees prefix and itself  -> velocity,  term `mse`
    bins    = one learned query a chunk step                        sees prefix and itself  -> 256 bins,  term `ce`

Flow matching as in pi0 (Black et al. 2024): x_t = t noise + (1 - t) actions, velocity u = noise - actions, sampled by
Euler steps from t = 1 to 0. The prefix never sees the noised actions, so sampling computes it once.

The prompt's tokens are groups of bytes, the pictures' patches those of strided convolutions, trained from scratch; or
either is a pretrained encoder's (`encoders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.config.bounds import Count, LossWeight, positive
from opentau_train.config.data import DataSettings
from opentau_train.data.batch import Batch
from opentau_train.data.transforms.base import Transform, Wants
from opentau_train.errors import UserError
from opentau_train.models import prompts
from opentau_train.models.draws import Draws, FlowTime, flow_time
from opentau_train.models.encoders import ENCODERS, STRIDE, TextEncoder, VisionEncoder, check_text
from opentau_train.models.inputs import PAD_BYTE, SUPERVISES, Supervise, TokenizeBytes, real_actions, real_state
from opentau_train.models.layers import Block, ImageStem, KeysValues, RMSNorm, check_sizes, init_weights, time_features
from opentau_train.models.packing.attention import lengths_of, num_pictures, present_only, see
from opentau_train.models.prompts import NO_TOKEN, TokenizePrompt
from opentau_train.models.sampling import FlowSampler
from opentau_train.types import BatchSpec, LossTerms

BYTES_PER_TOKEN = 4
SEES = {0: (0,), 1: (0, 1), 2: (0, 2)}
"""{part of the tokens: parts that it sees}: prefix, actions, bins."""


class FlowPolicy(FlowSampler):
    """The policy that the module's docstring describes; `Policy` has the contract.

    `patch_size` (a power of 2) pixels a side make one image token; `stem_channels` the width of the stem's first
    convolution; prompts are cut after `max_prompt_bytes` of UTF-8; `time`: how the flow's times are drawn
    (`draws.flow_time`); `num_flow_steps` Euler steps when sampling; `bin_range` the normalised values between which an
    action is binned, what lies outside falling in the outermost bins; `mse_weight` and `ce_weight` weigh the terms in
    the total loss.

    `text_encoder`: the Hugging Face folder of a BERT, and `text_config` what its config.json says, which is filled in
    where it isn't given, so that a checkpoint needs the folder for its tokenizer alone; `vision_encoder`: a file of
    MobileNetV2's weights; `freeze_encoders`: they aren't trained. `packing`: see `Policy`.
    """

    meta_init = True
    encoders = ENCODERS

    def __init__(
        self,
        spec: BatchSpec,
        *,
        width: Count,
        depth: Count,
        heads: Count,
        mlp_ratio: Annotated[float, positive] = 4.0,
        patch_size: int = 16,
        stem_channels: Count = 32,
        max_prompt_bytes: int = 64,
        time: FlowTime = "uniform",
        num_flow_steps: Count = 10,
        num_bins: Count = 256,
        bin_range: tuple[float, float] = (-3.0, 3.0),
        mse_weight: LossWeight = 1.0,
        ce_weight: LossWeight = 0.1,
        text_encoder: str | None = None,
        text_config: dict[str, Any] | None = None,
        vision_encoder: str | None = None,
        freeze_encoders: bool = True,
        packing: bool = False,
    ):
        super().__init__()
        check_sizes(width, heads, patch_size, stem_channels)
        _check(max_prompt_bytes, bin_range)
        self.time: FlowTime = time
        self.spec, self.num_flow_steps, self.num_bins, self.bin_range = spec, num_flow_steps, num_bins, bin_range
        self.max_prompt_bytes, self.text_encoder, self.packing = max_prompt_bytes, text_encoder, packing
        self.loss_weights, self.classes = {"mse": mse_weight, "ce": ce_weight}, {"ce": num_bins}

        # Inputs. What the mixture doesn't have gets no parameters: each one must take part in every forward pass.
        self.start_embed = nn.Parameter(torch.empty(width))
        if spec.cameras:
            stem: ImageStem | VisionEncoder
            if vision_encoder is None:
                stem = ImageStem(spec.image_size, patch_size.bit_length() - 1, stem_channels, width)
            else:
                stem = VisionEncoder(spec.image_size, width, frozen=freeze_encoders)
            self._make_pictures(stem, width)
        self.num_prompt_tokens = max_prompt_bytes // BYTES_PER_TOKEN
        if self.num_prompt_tokens:
            self._make_prompt(width, text_config, freeze_encoders)
        if spec.state_dim:
            self.state_in = nn.Linear(2 * spec.state_dim, width, bias=False)
            self.state_embed = nn.Parameter(torch.empty(width))
        self._tokens_a_camera = (spec.history + 1) * len(self.patch_embed) if spec.cameras else 0
        self._num_others = 1 + bool(spec.state_dim)
        steps, context = 2 * spec.chunk_length, self._num_others + self.num_prompt_tokens
        self.padded_tokens = steps + context + len(spec.cameras) * self._tokens_a_camera
        self._make_actions(width)
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm_actions, self.norm_bins = RMSNorm(width), RMSNorm(width)
        self.velocity_out = nn.Linear(width, spec.action_dim, bias=False)
        self.bins_out = nn.Linear(width, spec.action_dim * num_bins, bias=False)
        self.init_weights()

    def _make_actions(self, width: int) -> None:
        """The layers that turn noised actions, their flow time and the places of their bins into tokens."""
        self.action_in = nn.Linear(self.spec.action_dim, width, bias=False)
        self.time_in = nn.Linear(width, width, bias=False)
        self.time_out = nn.Linear(width, width, bias=False)
        self.action_embed = nn.Parameter(torch.empty(self.spec.chunk_length, width))
        self.bin_embed = nn.Parameter(torch.empty(self.spec.chunk_length, width))

    def _make_pictures(self, stem: ImageStem | VisionEncoder, width: int) -> None:
        """The layers that turn pictures into tokens."""
        self.stem, places = stem, stem.grid[0] * stem.grid[1]
        self.camera_embed = nn.Parameter(torch.empty(len(self.spec.cameras), 1, 1, width))
        self.frame_embed = nn.Parameter(torch.empty(self.spec.history + 1, 1, width))
        self.patch_embed = nn.Parameter(torch.empty(places, width))

    def _make_prompt(self, width: int, text_config: Mapping[str, Any] | None, frozen: bool) -> None:
        """The layers that turn prompts into tokens: groups of bytes, or the outputs of a text encoder."""
        if self.text_encoder is None:
            self.byte_embed = nn.Embedding(PAD_BYTE + 1, width // BYTES_PER_TOKEN)
            self.prompt_in = nn.Linear(width // BYTES_PER_TOKEN * BYTES_PER_TOKEN, width, bias=False)
        else:
            assert text_config is not None, "`check` refuses a folder without config.json"
            self.text = TextEncoder(text_config, width, frozen=frozen)
        self.prompt_embed = nn.Parameter(torch.empty(self.num_prompt_tokens, width))

    def init_weights(self) -> None:
        init_weights(self, len(self.layers))

    def wants(self) -> Wants:
        transforms: dict[str, Transform] = {"supervise": Supervise(tuple(self.loss_weights), SUPERVISES)}
        if self.num_prompt_tokens and self.text_encoder is None:
            transforms["tokenize"] = TokenizeBytes(self.max_prompt_bytes)
        elif self.num_prompt_tokens:
            transforms["tokenize"] = TokenizePrompt("plain", self.num_prompt_tokens, self.text_encoder)
        return Wants(transforms)

    @classmethod
    def check(cls, options: Mapping[str, Any], data: DataSettings) -> None:
        num_tokens = options.get("max_prompt_bytes", 64) // BYTES_PER_TOKEN
        check_text(options.get("text_encoder"), options.get("text_config"), num_tokens)
        if options.get("vision_encoder") is not None and options.get("patch_size", STRIDE) != STRIDE:
            raise UserError(
                f"model.patch_size={options['patch_size']}, and model.vision_encoder makes tokens of {STRIDE} pixels",
                remedy=f"set model.patch_size={STRIDE}",
            )

    def blocks(self) -> list[nn.Module]:
        text = self.text.layers if self.num_prompt_tokens and self.text_encoder is not None else ()
        return [*text, *self.layers]

    def assets(self) -> dict[str, tuple[str, ...]]:
        return {} if self.text_encoder is None else {self.text_encoder: (prompts.FILE,)}

    def num_cut(self, batch: Batch) -> int:
        return int(batch.prompt_is_cut.sum()) if self.num_prompt_tokens and self.text_encoder is not None else 0

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        return {term: mask.sum((1, 2), dtype=torch.float32) for term, mask in self._supervised(batch).items()}

    def num_tokens(self, batch: Batch) -> Tensor:
        """[B, 4]: patches of pictures, other tokens of the prefix, action steps, their bins."""
        steps = (~batch.action_is_pad).sum(1)
        pictures = 0 * steps + self._tokens_a_camera * sum(batch.camera_mask.values())
        prompt = self._prompt_valid(batch).sum(1) if self.num_prompt_tokens else 0
        return torch.stack([pictures, 0 * steps + self._num_others + prompt, steps, steps], dim=1)

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        prefix, prefix_valid = self._prefix(batch)
        real = real_actions(batch)
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: select, never multiply.
        noise = draws.normal("actions", batch.actions.shape[1:])
        actions, drawn = torch.where(real, batch.actions, 0.0), torch.where(real, noise, 0.0)
        share = flow_time(draws, self.time)
        time = share[:, None, None]
        noised = time * drawn + (1.0 - time) * actions

        steps_valid = ~batch.action_is_pad
        bins = self.bin_embed.expand(len(batch), -1, -1)
        parts = [(prefix, prefix_valid), (self._action_tokens(noised, share), steps_valid), (bins, steps_valid)]
        _, of_actions, of_bins = see(self.layers, parts, SEES, lengths_of(batch))

        errors = {
            "mse": (self._velocity(of_actions) - (drawn - actions)).square(),
            "ce": self._bin_errors(of_bins, actions),
        }
        return {
            term: (torch.where(mask, errors[term], 0.0).sum((1, 2)), mask.sum((1, 2), dtype=torch.float32))
            for term, mask in self._supervised(batch).items()
        }

    def context(self, batch: Batch) -> tuple[list[KeysValues], Tensor]:
        """Keys and values of the prefix, and which of its tokens exist [B, P]."""
        prefix, valid = self._prefix(batch)
        return self._cache(prefix, valid), valid

    def noise(self, batch: Batch, draws: Draws) -> Tensor:
        shape = self.spec.chunk_length, self.spec.action_dim
        return torch.where(batch.action_dim_mask[:, None, :], draws.normal("actions", shape), 0.0)

    def velocity(self, batch: Batch, context: tuple[list[KeysValues], Tensor], x: Tensor, time: Tensor) -> Tensor:
        past, valid = context
        exist = torch.ones(x.shape[:2], dtype=torch.bool, device=valid.device)
        mask = torch.cat([valid, exist], dim=1)[:, None, None, :]
        tokens = self._action_tokens(x, time)
        for layer, keys_values in zip(self.layers, past, strict=True):
            tokens, _ = layer(tokens, mask, keys_values)
        return torch.where(batch.action_dim_mask[:, None, :], self._velocity(tokens), 0.0)

    def _prefix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The context's tokens `[B, P, D]` and which of them exist `[B, P]` bool. The first one always does, so that
        no row of the attention is empty when camera, prompt and state are all missing."""
        num = len(batch)
        tokens = [self.start_embed.expand(num, 1, -1)]
        valid = [torch.ones(num, 1, dtype=torch.bool, device=batch.state.device)]
        if self.spec.cameras:
            frames = torch.stack([batch.images[camera] for camera in self.spec.cameras], dim=1)  # [B, C, h+1, 3, H, W]
            present = torch.stack([batch.camera_mask[camera] for camera in self.spec.cameras], dim=1)
            num_frames = num_pictures(batch, len(self.patch_embed))
            if num_frames is None:
                patches = self.stem(frames.flatten(0, 2))
            else:
                there = present[:, :, None].expand(frames.shape[:3]).flatten()
                patches = present_only(self.stem, frames.flatten(0, 2), there, num_frames)
            patches = patches.unflatten(0, frames.shape[:3]) + self.camera_embed + self.frame_embed + self.patch_embed
            tokens.append(patches.flatten(1, 3))
            valid.append(present[:, :, None].expand(-1, -1, patches.shape[2] * patches.shape[3]).flatten(1))
        if self.num_prompt_tokens:
            prompt = batch.prompt_tokens
            if self.text_encoder is None:
                bytes_in = self.byte_embed(prompt).unflatten(1, (-1, BYTES_PER_TOKEN)).flatten(2)
                tokens.append(self.prompt_in(bytes_in) + self.prompt_embed)
            else:
                tokens.append(self.text(prompt) + self.prompt_embed)
            valid.append(self._prompt_valid(batch))
        if self.spec.state_dim:
            both = torch.cat([real_state(batch), batch.state_dim_mask.float()], dim=-1)
            tokens.append((self.state_in(both) + self.state_embed)[:, None])
            valid.append(torch.ones_like(valid[0]))
        return torch.cat(tokens, dim=1), torch.cat(valid, dim=1)

    def _prompt_valid(self, batch: Batch) -> Tensor:
        """[B, N] bool: which of the prompt's tokens exist."""
        prompt = batch.prompt_tokens
        return prompt[:, ::BYTES_PER_TOKEN] != PAD_BYTE if self.text_encoder is None else prompt != NO_TOKEN

    def _cache(self, prefix: Tensor, valid: Tensor) -> list[KeysValues]:
        cache = []
        for layer in self.layers:
            prefix, keys_values = layer(prefix, valid[:, None, None, :])
            cache.append(keys_values)
        return cache

    def _action_tokens(self, noised: Tensor, time: Tensor) -> Tensor:
        return self.action_in(noised) + self._time_embed(time) + self.action_embed

    def _time_embed(self, time: Tensor) -> Tensor:
        """[B, 1, D] of flow times [B]."""
        return self.time_out(F.silu(self.time_in(time_features(time, self.time_in.in_features))))[:, None]

    def _velocity(self, tokens: Tensor) -> Tensor:
        return self.velocity_out(self.norm_actions(tokens)).float()

    def _bin_errors(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """Cross-entropy in nats `[B, T, A]` of the bin of each of `actions`."""
        logits = self.bins_out(self.norm_bins(tokens)).float().unflatten(-1, (self.spec.action_dim, self.num_bins))
        low, high = self.bin_range
        bins = ((actions - low) / (high - low) * self.num_bins).long().clamp(0, self.num_bins - 1)
        return F.cross_entropy(logits.flatten(0, 2), bins.flatten(), reduction="none").view(actions.shape)

    def _supervised(self, batch: Batch) -> dict[str, Tensor]:
        """{term: [B, T, A] bool}, the elements that count."""
        real = real_actions(batch)
        return {term: real & batch.supervised[:, k, None, None] for k, term in enumerate(("mse", "ce"))}


def _check(max_prompt_bytes: int, bin_range: tuple[float, float]) -> None:
    if max_prompt_bytes < 0 or max_prompt_bytes % BYTES_PER_TOKEN:
        raise UserError(
            f"model.max_prompt_bytes={max_prompt_bytes} must be a multiple of {BYTES_PER_TOKEN}, 0 for no prompts",
            remedy="set model.max_prompt_bytes=64",
        )
    if not bin_range[0] < bin_range[1]:
        raise UserError(f"model.bin_range={list(bin_range)} must rise", remedy="set model.bin_range=[-3.0,3.0]")
