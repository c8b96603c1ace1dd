"""What pi0 (Black et al. 2024, `pi0`) and pi0.5 (Physical Intelligence 2025, `pi05`) have in common.

    prefix  = patches of the cameras, prompt             sees itself                     by the language model
    suffix  = [state,] noised action chunk, flow time    sees prefix and itself          by the action expert
    tokens  = the chunk as tokens (`action_tokens`)      see prefix and earlier tokens   by the language model

Flow matching: x_t = t noise + (1 - t) actions, velocity noise - actions, t = 0.999 u^(2/3) + 0.001, which is
Beta(1.5, 1) for a uniform u; sampled by Euler steps from t = 1 to 0. pi0 has the state as a token and the time in each
action token; pi0.5 has the state as numbers in the prompt and the time in the expert's adaptive norms.

The term `ce` of next tokens is there with `action_tokens` only. The expert never sees the tokens, so `mse` is the same
with and without them; with `insulate` no gradient of `mse` reaches the language model (Driess et al. 2025).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.config.bounds import Count, LossWeight
from opentau_train.config.data import DataSettings
from opentau_train.data.batch import Batch
from opentau_train.data.transforms.base import Transform, Wants
from opentau_train.models import prompts
from opentau_train.models.draws import Draws, FlowTime, flow_time
from opentau_train.models.inputs import SUPERVISES, Supervise, real_actions
from opentau_train.models.layers import KeysValues
from opentau_train.models.lerobot import LerobotExport
from opentau_train.models.packing.attention import Packing, lengths_of, num_pictures, present_only
from opentau_train.models.pi import action_tokens as chunks
from opentau_train.models.pi import lerobot, names
from opentau_train.models.pi.limits import LIMITS, check_insulation, check_limits, check_options
from opentau_train.models.pi.parts import Tokens, behind, context, normed, packed
from opentau_train.models.pi.sizes import ExpertSizes, GemmaSizes, VisionSizes
from opentau_train.models.prompts import NO_TOKEN, Overflow, TokenizePrompt
from opentau_train.models.sampling import FlowSampler
from opentau_train.models.weight_map import WeightMap
from opentau_train.types import BatchSpec, LossTerms

ActionTokens = Literal["none", "binned", "fast"]


class PiPolicy(FlowSampler):
    """What pi0 and pi0.5 have in common; `Policy` has the contract.

    `vlm`, `expert` and `vision` are the sizes of the parts; state and actions are filled up to `max_state_dim` and
    `max_action_dim`, which the weights' projections have, chunks have up to `max_chunk_length` steps; None: the data's.
    `tokenizer_path`, `max_prompt_tokens` and `prompt_overflow`: see `prompts.TokenizePrompt`. `action_tokens`: none,
    binned (`num_bins` between the two of `bin_range`) or fast, by the files in `action_tokenizer_path`; of up to
    `max_action_tokens`, None: as many as a chunk has elements. `insulate`: no gradient of the flow reaches the language
    model. `time`: how the flow's times are drawn (`draws.flow_time`). `num_flow_steps` Euler steps when sampling;
    `mse_weight` and `ce_weight` weigh the terms; `packing`: see `Policy`.
    """

    meta_init = True
    form: ClassVar[str]
    """The form of the prompt, one of `prompts.FORMS`."""
    adaptive: ClassVar[bool]
    """Whether the expert's norms are conditioned on the flow time."""
    state_tokens: ClassVar[int]
    """How many of `suffix`' tokens stand before the chunk."""

    def __init__(
        self,
        spec: BatchSpec,
        *,
        vlm: GemmaSizes,
        expert: ExpertSizes,
        vision: VisionSizes,
        max_state_dim: Count | None = 32,
        max_action_dim: Count | None = 32,
        max_chunk_length: Count | None = 50,
        tokenizer_path: str | None = None,
        max_prompt_tokens: Count = 48,
        prompt_overflow: Overflow = "cut",
        action_tokens: ActionTokens = "none",
        action_tokenizer_path: str | None = None,
        max_action_tokens: Count | None = None,
        num_bins: Count = 256,
        bin_range: tuple[float, float] = (-3.0, 3.0),
        insulate: bool = False,
        time: FlowTime = "beta",
        num_flow_steps: Count = 10,
        mse_weight: LossWeight = 1.0,
        ce_weight: LossWeight = 1.0,
        packing: bool = False,
    ):
        super().__init__()
        limits = dict(zip(LIMITS, (max_state_dim, max_action_dim, max_chunk_length), strict=True))
        check_limits((spec.state_dim, spec.action_dim, spec.chunk_length), limits)
        check_insulation(insulate, action_tokens)
        try:
            from opentau_train.models.pi import network
        except ImportError as error:
            raise prompts.missing_extra("transformers", error) from error
        self.time: FlowTime = time
        self.spec, self.vlm_sizes, self.num_flow_steps, self.packing = spec, vlm, num_flow_steps, packing
        self.max_state_dim, self.max_action_dim = max_state_dim or spec.state_dim, max_action_dim or spec.action_dim
        self.sizes, self.image_size, self._patches = (vlm, expert, vision), vision.image_size, vision.num_tokens
        self.loss_weights = {"mse": mse_weight}
        self.prompt = TokenizePrompt(self.form, max_prompt_tokens, tokenizer_path, prompt_overflow)
        self._transforms: dict[str, Transform] = {"tokenize": self.prompt}
        prompts.check_vocabulary(tokenizer_path, vlm.vocab_size)
        self._paths = tokenizer_path, action_tokenizer_path if action_tokens == "fast" else None
        vocabulary = num = 0
        if action_tokens != "none":
            num, bins = max_action_tokens or spec.chunk_length * spec.action_dim, (num_bins, *bin_range)
            made = chunks.make_bins(num, bins) if action_tokens == "binned" else chunks.make_fast(num, self._paths[1])
            self._transforms["tokenize_actions"], vocabulary = made
            self.loss_weights["ce"], self.classes = ce_weight, {"ce": vocabulary}
        num += len(spec.cameras) * self._patches + max_prompt_tokens
        self.padded_tokens = num + self.state_tokens + spec.chunk_length
        self._make(network, expert, vision, vocabulary, insulate)
        self.init_weights()

    def _make(self, network: Any, expert: ExpertSizes, vision: VisionSizes, vocabulary: int, insulate: bool) -> None:
        """The modules, with heads for `vocabulary` action tokens, 0 for none."""
        vlm = self.vlm_sizes
        if vocabulary:
            self.action_token_embed = nn.Embedding(vocabulary + 1, vlm.width)  # the last one begins the sequence
            self.action_token_out = nn.Linear(vlm.width, vocabulary, bias=False)
        if self.spec.cameras:
            self.vision = network.Vision(vision, vlm.width)
        self.token_embed = nn.Embedding(vlm.vocab_size, vlm.width)
        self.layers = nn.ModuleList(
            network.Pair(pair, insulate=insulate, keys_only=i == vlm.depth - 1 and not vocabulary)
            for i, pair in enumerate(network.make_layers(vlm, expert, adaptive=self.adaptive))
        )
        self.vlm_norm = network.final_norm(vlm.width, adaptive=False).requires_grad_(bool(vocabulary))
        self.expert_norm = network.final_norm(expert.width, adaptive=self.adaptive)
        self.action_in_proj = nn.Linear(self.max_action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, self.max_action_dim)
        self.make_suffix(expert.width)

    @classmethod
    def check(cls, options: Mapping[str, Any], data: DataSettings) -> None:
        check_options(options, data)

    def init_weights(self) -> None:
        from opentau_train.models.pi import network

        network.init_weights(self)

    def wants(self) -> Wants:
        made = {"supervise": Supervise(tuple(self.loss_weights), SUPERVISES), **self._transforms}
        return Wants(made, image_size=(self.image_size, self.image_size))

    def vlm_weight_map(self) -> WeightMap | None:
        return names.for_words(names.vlm_only(), self.prompt.tokenizer)

    def lerobot_export(self) -> LerobotExport:
        return lerobot.export(self)

    def blocks(self) -> list[nn.Module]:
        return [*(self.vision.layers if self.spec.cameras else ()), *self.layers]

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        return {term: mask.flatten(1).sum(1, dtype=torch.float32) for term, mask in self._supervised(batch).items()}

    def num_tokens(self, batch: Batch) -> Tensor:
        """[B, 5]: patches, words, action tokens, the state's token, action steps."""
        words, steps = (batch.prompt_tokens != NO_TOKEN).sum(1).clamp(min=1), (~batch.action_is_pad).sum(1)
        pictures = 0 * words + self._patches * sum(batch.camera_mask.values())
        tokens = (batch.action_tokens != NO_TOKEN).sum(1) if "ce" in self.loss_weights else 0 * words
        return torch.stack([pictures, words, tokens, 0 * words + self.state_tokens, steps], dim=1)

    def assets(self) -> dict[str, tuple[str, ...]]:
        return {path: (prompts.FILE, chunks.PROCESSOR) for path in self._paths if path is not None}

    def num_cut(self, batch: Batch) -> int:
        return int(batch.prompt_is_cut.sum())

    # -- the parts in which the two differ ----------------------------------------------------------------------------

    @abstractmethod
    def make_suffix(self, width: int) -> None:
        """Make the layers that `suffix` uses, of the expert's `width`."""

    @abstractmethod
    def suffix(self, batch: Batch, noised: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert's tokens [B, N, D], the last T of them the chunk `noised` [B, T, max_action_dim] at the flow times
        `time` [B], and the condition of its norms."""

    # -- training and sampling ----------------------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        real, supervised = real_actions(batch), self._supervised(batch)
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: select, never multiply.
        actions = F.pad(torch.where(real, batch.actions, 0.0), (0, self.max_action_dim - self.spec.action_dim))
        noise = draws.normal("actions", (self.spec.chunk_length, self.max_action_dim))
        time = flow_time(draws, self.time)
        noised = time[:, None, None] * noise + (1.0 - time[:, None, None]) * actions

        x, valid = self._prefix(batch)
        num = x.shape[1]
        labels = batch.action_tokens if "ce" in supervised else None
        prefix = self._context(x, valid, labels)
        suffix = self._suffix(batch, noised, time, valid, ~batch.action_is_pad)
        packing = None
        if (lengths := lengths_of(batch)) is not None:
            tokens = valid[:, :0] if labels is None else labels != NO_TOKEN
            state = torch.ones_like(valid[:, : self.state_tokens])
            packing = Packing((valid, tokens, state, ~batch.action_is_pad), lengths)
            prefix, suffix, num = packed(prefix, suffix, packing)
        for pair in self.layers:
            x_prefix, x_suffix, _ = pair(prefix, suffix, num)
            prefix, suffix = prefix._replace(x=x_prefix), suffix._replace(x=x_suffix)
        if packing is not None:
            suffix = suffix._replace(x=packing.unpack(suffix.x, (2, 3), 3), samples=None)
        dims = self.spec.action_dim
        errors = {"mse": (self._velocity(suffix)[..., :dims] - (noise - actions)[..., :dims]).square()}
        if labels is not None:
            shown = labels if packing is None else packing.pack({1: labels})
            errors["ce"] = self._token_errors(prefix.x[:, num:], shown)
            if packing is not None:
                errors["ce"] = packing.unpack(errors["ce"], (1,), 1)
        terms = {}
        for term, mask in supervised.items():
            kept = torch.where(mask, errors[term], 0.0)
            terms[term] = kept.flatten(1).sum(1), mask.flatten(1).sum(1, dtype=torch.float32)
        return terms

    def context(self, batch: Batch) -> tuple[list[KeysValues], Tensor]:
        """Keys and values of the prefix, and which of its tokens exist [B, P]."""
        x, valid = self._prefix(batch)
        prefix, past = self._context(x, valid, None), list[KeysValues]()
        for pair in self.layers:
            made, _, keys_values = pair(prefix, None, valid.shape[1])
            prefix = prefix._replace(x=made)
            past.append(keys_values)
        return past, valid

    def noise(self, batch: Batch, draws: Draws) -> Tensor:
        return draws.normal("actions", (self.spec.chunk_length, self.max_action_dim))

    def velocity(self, batch: Batch, context: tuple[list[KeysValues], Tensor], x: Tensor, time: Tensor) -> Tensor:
        past, valid = context
        suffix = self._suffix(batch, x, time, valid, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        for pair, keys_values in zip(self.layers, past, strict=True):
            suffix = suffix._replace(x=pair(None, suffix, valid.shape[1], keys_values)[1])
        return self._velocity(suffix)

    def actions(self, batch: Batch, x: Tensor) -> Tensor:
        return torch.where(batch.action_dim_mask[:, None], x[..., : self.spec.action_dim], 0.0)

    def _prefix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The tokens of cameras and prompt [B, P, D], and which of them exist [B, P] bool."""
        tokens = batch.prompt_tokens
        words = F.embedding(tokens.clamp(min=0), self.token_embed.weight, padding_idx=0)
        x, valid = [words * math.sqrt(self.vlm_sizes.width)], [tokens != NO_TOKEN]
        # Of a filler nothing exists, and softmax of nothing is NaN: its first token stands for something.
        valid[0] = torch.cat([torch.ones_like(valid[0][:, :1]), valid[0][:, 1:]], dim=1)
        if self.spec.cameras:
            frames = torch.stack([batch.images[camera][:, -1] for camera in self.spec.cameras], dim=1)
            present = torch.stack([batch.camera_mask[camera] for camera in self.spec.cameras], dim=1)
            num = num_pictures(batch, self._patches)
            patches = present_only(self.vision, frames.flatten(0, 1), present.flatten(), num)
            x.insert(0, patches.unflatten(0, present.shape).flatten(1, 2))
            valid.insert(0, present[:, :, None].expand(-1, -1, self._patches).flatten(1))
        return torch.cat(x, dim=1), torch.cat(valid, dim=1)

    def _context(self, x: Tensor, valid: Tensor, labels: Tensor | None) -> Tokens:
        """The prefix, with the action tokens `labels` [B, N] behind it: each input the one before its label."""
        num = x.shape[1]
        if labels is not None:
            start = torch.full_like(labels[:, :1], self.action_token_out.out_features)
            ids = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
            x = torch.cat([x, self.action_token_embed(ids).to(x.dtype)], dim=1)
            valid = torch.cat([valid, labels != NO_TOKEN], dim=1)
        return context(x, valid, num, self.vlm_sizes.head_dim)

    def _suffix(self, batch: Batch, noised: Tensor, time: Tensor, valid: Tensor, exist: Tensor) -> Tokens:
        """The expert's tokens behind a prefix of which `valid` [B, P] exist; `exist` [B, T] steps of the chunk."""
        return behind(*self.suffix(batch, noised, time), valid, exist, self.vlm_sizes.head_dim)

    def _velocity(self, suffix: Tokens) -> Tensor:
        """[B, T, max_action_dim] f32."""
        x, _ = normed(self.expert_norm, suffix)
        return self.action_out_proj(x[:, -self.spec.chunk_length :]).float()

    def _token_errors(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats [B, N] of each of `labels` [B, N]."""
        logits = self.action_token_out(self.vlm_norm(x)).float()
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_TOKEN, reduction="none")

    def _supervised(self, batch: Batch) -> dict[str, Tensor]:
        """{term: bool}, the elements that count: [B, T, A] of the actions, [B, N] of their tokens."""
        elements = {"mse": real_actions(batch)}
        if "ce" in self.loss_weights:
            elements["ce"] = (batch.action_tokens != NO_TOKEN) & (batch.weight != 0)[:, None]
        return {
            term: mask & batch.supervised[:, k].view(-1, *[1] * (mask.ndim - 1))
            for k, (term, mask) in enumerate(elements.items())
        }
