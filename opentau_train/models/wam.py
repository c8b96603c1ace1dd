"""The flow transformer with future frames: it learns to act, to foresee, or both, by the mode of each sample.

    prefix  = as in `flow`                                       sees itself
    future  = the future frames with their flow time             sees prefix, itself, actions    -> term `vision_mse`
    actions = the action chunk with its flow time                sees prefix, itself, future     -> term `mse`
    bins    = one learned query a chunk step                     sees prefix and itself          -> term `ce`

    mode                future               actions
    policy              hidden               noised, predicted    nothing sees the future's tokens
    wam                 noised, predicted    noised, predicted    they see each other noised: denoised together
    forward_dynamics    noised, predicted    shown: flow time 0
    inverse_dynamics    shown: flow time 0   noised, predicted

So a mode sees of what it predicts the noised form alone, and the bins never see actions or future.

A future frame is noised and predicted as patches of pixels, or as the features of a frozen encoder, each beside the
present frame's in the same place. The network's output, added to the present frame, is the clean one, from which the
velocity (x_t - clean) / t follows (Li and He 2025, "Back to Basics: Let Denoising Generative Models Denoise"): a patch
has more values than a token is wide, and noise, of which a token can't hold all, needn't pass through it. `vision_mse`
is the error of the clean frame, that is the velocity's times t^2: of the velocity itself, nearly clean frames would
have the most, which the network can tell from what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from opentau_train.config.bounds import Count, LossWeight, positive
from opentau_train.config.data import DataSettings
from opentau_train.config.modes import MODES
from opentau_train.data.batch import Batch
from opentau_train.data.transforms.base import Transform, Wants
from opentau_train.errors import UserError
from opentau_train.models.draws import Draws, FlowTime, flow_time
from opentau_train.models.encoders import ENCODERS, STRIDE
from opentau_train.models.flow import FlowPolicy
from opentau_train.models.future import EncodeMode, Future, exist
from opentau_train.models.inputs import real_actions
from opentau_train.models.layers import check_patch_size
from opentau_train.models.packing.attention import lengths_of, see
from opentau_train.models.sampling import Velocity
from opentau_train.models.weight_map import WeightMap
from opentau_train.types import BatchSpec, LossTerms

POLICY, WAM, FORWARD, INVERSE = range(len(MODES))
"""The codes of the modes (`EncodeMode`)."""
SEES = {0: (0,), 1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 3)}
"""{part: those that its tokens see}, of prefix, future, actions, bins."""


class WamPolicy(FlowPolicy):
    """The policy that the module's docstring describes; `FlowPolicy` has its other options. Without future frames in
    the data it is a `FlowPolicy`.

    `future_patch_size` (a power of 2) pixels a side make one token of a future frame, by convolutions over it and the
    present one; `future_encoder`: a file of MobileNetV2's
    weights, whose features, normalised at each place, are predicted in place of pixels. `future_time`: how the future's
    flow times are drawn, moved towards the noise by `future_time_shift` s, t -> s t / (1 + (s - 1) t) (Esser et al.
    2024); `shared_time`: the actions of `wam` samples have the same. `vision_mse_weight` weighs the term.
    """

    modes = MODES
    samplers = ("sample_actions", "sample_future", "future_form")
    encoders = ENCODERS | {
        "future_encoder": WeightMap(
            ((r"^features[.]", "future.encoder.features."),),
            ignored=ENCODERS["vision_encoder"].ignored,
            part=("future.encoder.features.*",),
        )
    }

    def __init__(
        self,
        spec: BatchSpec,
        *,
        future_patch_size: Count = 16,
        future_encoder: str | None = None,
        future_time: FlowTime = "uniform",
        future_time_shift: Annotated[float, positive] = 1.0,
        shared_time: bool = True,
        vision_mse_weight: LossWeight = 1.0,
        stem_channels: Count = 32,
        **flow: Annotated[Any, FlowPolicy],
    ):
        super().__init__(spec, stem_channels=stem_channels, **flow)
        self.future_time: FlowTime = future_time
        self.future_time_shift, self.shared_time = future_time_shift, shared_time
        if spec.future:
            self.loss_weights["vision_mse"] = vision_mse_weight
            size = None if future_encoder else future_patch_size
            self.future = Future(spec, self.start_embed.numel(), size, stem_channels)
            self.padded_tokens += len(spec.future_cameras) * spec.future * self.future.places
            self.init_weights()

    def init_weights(self) -> None:
        """As `FlowPolicy`; and at the beginning, nothing moves."""
        super().init_weights()
        for name, parameter in self.named_parameters():
            if name == "future.out.weight":
                nn.init.zeros_(parameter)

    def wants(self) -> Wants:
        transforms: dict[str, Transform] = {**super().wants().transforms}
        if self.spec.future:
            seen = self.spec.modes
            transforms["mode"] = EncodeMode("wam" if "wam" in seen and "policy" not in seen else "policy")
        return Wants(transforms)

    @classmethod
    def check(cls, options: Mapping[str, Any], data: DataSettings) -> None:
        super().check(options, data)
        size, (height, width) = options.get("future_patch_size", STRIDE), data.image_size
        if options.get("future_encoder") is not None and size != STRIDE:
            raise UserError(
                f"model.future_patch_size={size}, and model.future_encoder has features of {STRIDE} pixels",
                remedy=f"set model.future_patch_size={STRIDE}",
            )
        check_patch_size("future_patch_size", size)
        if data.future.num_frames and options.get("future_encoder") is None and (height % size or width % size):
            fits = [size * max(1, round(side / size)) for side in data.image_size]
            raise UserError(
                f"pictures of {height}x{width} (H x W) aren't made of whole patches of {size}x{size}",
                where="model.future_patch_size",
                remedy=f"set data.image_size=[{fits[0]},{fits[1]}], or another model.future_patch_size",
            )

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = super().term_counts(batch)
        if self.spec.future:
            num = self._predicted(batch).sum((1, 2), dtype=torch.float32)
            counts["vision_mse"] = num * (self.future.places * self.future.values)
        return counts

    def num_tokens(self, batch: Batch) -> Tensor:
        """[B, 5]: as `FlowPolicy`, with the tokens of the future frames behind those of the prefix."""
        counts = super().num_tokens(batch)
        if not self.spec.future:
            return counts
        frames = (exist(batch) & Roles.of(batch).has_future[:, None, None]).sum((1, 2))
        return torch.cat([counts[:, :2], self.future.places * frames[:, None], counts[:, 2:]], dim=1)

    def _predicted(self, batch: Batch) -> Tensor:
        """[B, C, F] bool: the future frames that count."""
        return exist(batch) & (batch.supervised[:, 2] & (batch.weight != 0))[:, None, None]

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        if not self.spec.future:
            return super().forward(batch, draws)
        roles = Roles.of(batch)
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: select, never multiply.
        real = real_actions(batch)
        drawn = torch.where(real, draws.normal("actions", batch.actions.shape[1:]), 0.0)
        actions, (present, future) = torch.where(real, batch.actions, 0.0), self.future.read(batch)
        noise, there = draws.normal("future", future.shape[1:]), exist(batch) & roles.has_future[:, None, None]
        of_future, of_actions = self._times(batch, draws, roles)

        steps_valid, lengths = ~batch.action_is_pad, lengths_of(batch)
        num = None if lengths is None else int(lengths[:, 1].sum()) // self.future.places
        futures = self.future.tokens(_noised(future, noise, of_future), present, there, num)
        parts = [
            self._prefix(batch),
            (futures + self._time_embed(of_future), self.future.of_tokens(there)),
            (self._action_tokens(_noised(actions, drawn, of_actions), of_actions), steps_valid),
            (self.bin_embed.expand(len(batch), -1, -1), steps_valid),
        ]
        _, futures, velocities, bins = see(self.layers, parts, SEES, lengths)
        errors = {
            "mse": (self._velocity(velocities) - (drawn - actions)).square(),
            "ce": self._bin_errors(bins, actions),
            "vision_mse": (self.future.clean(futures, present) - future).square(),
        }
        masks = {**self._supervised(batch), "vision_mse": self._predicted(batch)[..., None, None]}
        counts = self.term_counts(batch)
        return {k: (torch.where(mask, errors[k], 0.0).flatten(1).sum(1), counts[k]) for k, mask in masks.items()}

    def _times(self, batch: Batch, draws: Draws, roles: Roles) -> tuple[Tensor, Tensor]:
        """The flow times [B] f32 of the future and of the actions: 0 of what is shown."""
        actions, future = flow_time(draws, self.time), flow_time(draws, self.future_time, "future_time")
        future = self.future_time_shift * future / (1.0 + (self.future_time_shift - 1.0) * future)
        if self.shared_time:
            actions = torch.where(batch.mode_code == WAM, future, actions)
        return torch.where(roles.noised_future, future, 0.0), torch.where(roles.noised_actions, actions, 0.0)

    def denoise(
        self, batch: Batch, context: Any, draws: Draws, steps: int, lead: Callable[[Velocity], Velocity] | None = None
    ) -> Tensor:
        """As `FlowPolicy`, and the future with the actions: of `wam` samples it is sampled too, of `inverse_dynamics`
        it is the batch's own. A robot's batch is of the first mode among policy and wam that the policy was trained on.
        Raises `UserError` where a chunk whose future is sampled with it is to be led."""
        if not self.spec.future or not (batch.mode_code != POLICY).any():
            return super().denoise(batch, context, draws, steps, lead)  # nothing sees the future
        if lead is not None:
            raise UserError(
                "actions that are sampled together with the future can't be led on from a chunk before",
                where="realtime",
                remedy="stream without it, or train the policy with samples of the mode `policy`, too",
            )
        return self._sample(batch, context, draws, steps)[0]

    def sample_future(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{camera: [B, F, ...]} in the form of `future_form`, of the samples whose mode predicts it: in
        `forward_dynamics` from the batch's actions, in `wam` together with sampled ones."""
        frames = self.future.shown(self._sample(batch, self.context(batch), draws, self.num_steps)[1])
        return dict(zip(self.spec.future_cameras, frames.unbind(1), strict=True))

    @property
    def future_is_pixels(self) -> bool:
        """Whether `future_form` is a picture."""
        return self.future.patch_size is not None

    @torch.no_grad()
    def future_form(self, frames: Tensor) -> Tensor:
        """`frames` [..., 3, H, W] uint8 RGB as the policy foresees them: [..., 3, H, W] f32 in [0, 1], or an encoder's
        features [..., P, V] f32."""
        return self.future.shown(self.future.encode(frames.flatten(0, -4)).unflatten(0, frames.shape[:-3]))

    @torch.no_grad()
    def _sample(self, batch: Batch, context: Any, draws: Draws, steps: int) -> tuple[Tensor, Tensor]:
        """The chunk [B, T, A] and the future [B, C, F, P, V], integrated together in `steps` Euler steps; what the
        sample's mode shows stays as it is."""
        (past, valid), roles = context, Roles.of(batch)
        acts, foresees = roles.noised_actions[:, None, None], roles.noised_future.view(-1, 1, 1, 1, 1)
        dims, (present, future) = acts & batch.action_dim_mask[:, None, :], self.future.read(batch)
        chunk = torch.where(real_actions(batch), batch.actions, 0.0) * ~acts
        chunk = torch.where(dims, draws.normal("actions", chunk.shape[1:]), chunk)
        future = torch.where(foresees, draws.normal("future", future.shape[1:]), future)
        seen = torch.stack([batch.camera_mask[c] for c in self.spec.future_cameras], dim=1)[..., None]
        there = torch.where(foresees[..., 0, 0], seen, exist(batch)) & roles.has_future[:, None, None]
        taken = acts[..., 0] | ~batch.action_is_pad
        mask = torch.cat([valid, self.future.of_tokens(there), taken], dim=1)[:, None, None, :]
        for step in range(steps):
            time = 1.0 - step / steps
            both = (
                self.future.tokens(future, present, there) + self._time_embed(time * roles.noised_future),
                self._action_tokens(chunk, time * roles.noised_actions),
            )
            tokens = torch.cat(both, dim=1)
            for layer, keys_values in zip(self.layers, past, strict=True):
                tokens, _ = layer(tokens, mask, keys_values)
            futures, velocities = tokens.split([both[0].shape[1], chunk.shape[1]], dim=1)
            way = (future - self.future.clean(futures, present)) / (time * steps)
            future = torch.where(foresees, future - way, future)
            chunk = torch.where(dims, chunk - self._velocity(velocities) / steps, chunk)
        return chunk, future


class Roles(NamedTuple):
    """What the samples' modes make of their parts, each [B] bool."""

    has_future: Tensor
    noised_future: Tensor
    noised_actions: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Roles:
        code = batch.mode_code
        return cls(code != POLICY, (code == WAM) | (code == FORWARD), code != FORWARD)


def _noised(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    time = time.view(-1, *[1] * (clean.ndim - 1))
    return time * noise + (1.0 - time) * clean
