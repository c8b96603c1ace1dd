"""Diffusion Policy (Chi et al. 2023): action chunks by denoising, with a U-Net over the steps of the chunk.

    condition = [state, keypoints of each camera's picture by a ResNet-18 and a spatial softmax]
    noised    = sqrt(a_k) actions + sqrt(1 - a_k) noise, for a drawn diffusion step k of the noise schedule a
    predicted = U-Net(noised, k, condition): the noise, or the actions themselves

The term `mse` is the squared error of what is predicted. A chunk is sampled from noise by the schedule's steps
backwards. Parameters have the names of LeRobot's diffusion policy below its `diffusion.`, the ResNet's torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.config.bounds import Count, positive
from opentau_train.config.data import DataSettings
from opentau_train.data.batch import Batch
from opentau_train.errors import UserError
from opentau_train.models import prompts
from opentau_train.models.draws import Draws
from opentau_train.models.inputs import real_actions, real_state
from opentau_train.models.lerobot import LerobotExport, check_inputs
from opentau_train.models.resnet import CHANNELS, MEAN, STD, STRIDE, ResNet18
from opentau_train.models.sampling import SteppedPolicy
from opentau_train.models.unet import Unet, UnetSizes
from opentau_train.models.weight_map import WeightMap
from opentau_train.types import BatchSpec, LossTerms

_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""{LeRobot's name of a part of the ResNet: torchvision's}."""
_MIN_CLIP = 3.0
"""Standard deviations that sampled actions must be let have, at least."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How actions are noised in training and sampled, of `diffusers`. `sampler`: ddpm (Ho et al. 2020) adds noise in
    each step, ddim (Song et al. 2020) doesn't; `inference_steps` of the `train_steps`, evenly spaced, None: all;
    `beta_start` and `beta_end` are those of the linear schedule; `predicts`: epsilon, the noise, or sample, the
    actions; sampled actions lie within +-`clip_range`, normalised, None: anywhere."""

    sampler: Literal["ddpm", "ddim"]
    train_steps: int
    inference_steps: int | None
    beta_schedule: Literal["squaredcos_cap_v2", "linear"]
    beta_start: float
    beta_end: float
    predicts: Literal["epsilon", "sample"]
    clip_range: float | None

    def check(self, path: str) -> None:
        """Raises `UserError` for what is no schedule."""
        for name in ("train_steps", "inference_steps", "clip_range"):
            positive(f"{path}.{name}", getattr(self, name))
        if self.inference_steps is not None and self.inference_steps > self.train_steps:
            raise UserError(
                f"{path}.inference_steps={self.inference_steps} are more than {path}.train_steps={self.train_steps}",
                remedy=f"set {path}.inference_steps=null, which takes all of them",
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"{path}.beta_start={self.beta_start} and beta_end={self.beta_end} must rise between 0 and 1",
                remedy=f"set {path}.beta_start=0.0001 and {path}.beta_end=0.02",
            )

    def scheduler(self) -> Any:
        """A new scheduler, its sampling steps set: DDIM's, whose `eta` of 1 is DDPM (Song et al. 2020, section 4.1),
        because it takes noise that is drawn elsewhere. Raises `UserError` without `diffusers`."""
        try:  # imported here: it takes seconds
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        except ImportError as error:
            raise prompts.missing_extra("diffusers", error, "diffusion") from error
        made = DDIMScheduler(
            self.train_steps,
            self.beta_start,
            self.beta_end,
            self.beta_schedule,
            clip_sample=self.clip_range is not None,
            clip_sample_range=self.clip_range or 0.0,
            prediction_type=self.predicts,
        )
        made.set_timesteps(self.inference_steps or self.train_steps)
        return made


class DiffusionPolicy(SteppedPolicy):
    """The policy that the module's docstring describes; `Policy` has the contract.

    `unet` and `noise` are the sizes of the U-Net and the noise schedule; `num_keypoints` of each picture; with
    `shared_encoder` all cameras have the same image encoder. Prompts and earlier frames aren't looked at.
    """

    alphas: Tensor

    def __init__(
        self,
        spec: BatchSpec,
        *,
        unet: UnetSizes,
        noise: NoiseSchedule,
        num_keypoints: Count = 32,
        shared_encoder: bool = True,
    ):
        super().__init__()
        _check_chunk(spec.chunk_length, unet)
        if not spec.cameras and not spec.state_dim:
            raise UserError(
                "a diffusion policy needs a camera or a state",
                where="model",
                remedy="give a source cameras or state, or choose another model",
            )
        self.spec, self.sizes, self.noise, self.num_keypoints = spec, unet, noise, num_keypoints
        self.loss_weights = {"mse": 1.0}
        if spec.cameras:
            num = 1 if shared_encoder else len(spec.cameras)
            encoders = [ImageEncoder(spec.image_size, num_keypoints) for _ in range(num)]
            self.rgb_encoder = encoders[0] if shared_encoder else nn.ModuleList(encoders)
        self.unet = Unet(spec.action_dim, spec.state_dim + 2 * num_keypoints * len(spec.cameras), unet)
        self.register_buffer("alphas", noise.scheduler().alphas_cumprod, persistent=False)

    @classmethod
    def check(cls, options: Mapping[str, Any], data: DataSettings) -> None:
        prompts.check_installed("diffusers", "diffusion")
        for source in data.sources.values():
            _check_chunk(source.chunk_length or data.chunk_length, options["unet"])
        clip = options["noise"].clip_range
        if clip is not None and clip < _MIN_CLIP and data.normalization == "mean_std":
            raise UserError(
                f"sampled actions are cut at {clip} standard deviations (data.normalization=mean_std)",
                where="model.noise.clip_range",
                remedy="set data.normalization=min_max, or model.noise.clip_range=5.0",
            )

    def weight_map(self) -> WeightMap:
        """Of LeRobot's files."""
        parts = ((rf"^diffusion[.](rgb_encoder[.].*backbone)[.]{n}[.]", rf"\1.{name}.") for n, name in _RESNET.items())
        shapes = ", which must be of one observation step (LeRobot's n_obs_steps=1)"
        return WeightMap((*parts, ("^diffusion[.]", "")), ignored=("*.pos_grid",), shapes=shapes)

    def lerobot_export(self) -> LerobotExport:
        spec, sizes, noise = self.spec, self.sizes, self.noise
        check_inputs("diffusion policy", spec)
        config = {
            "type": "diffusion",
            "n_obs_steps": 1,
            "horizon": spec.chunk_length,
            "n_action_steps": spec.chunk_length,
            "vision_backbone": "resnet18",
            "pretrained_backbone_weights": None,
            "crop_shape": None,
            "use_group_norm": True,
            "spatial_softmax_num_keypoints": self.num_keypoints,
            "use_separate_rgb_encoder_per_camera": isinstance(self.rgb_encoder, nn.ModuleList),
            "down_dims": list(sizes.down_dims),
            "kernel_size": sizes.kernel_size,
            "n_groups": sizes.groups,
            "diffusion_step_embed_dim": sizes.step_dim,
            "use_film_scale_modulation": sizes.film_scale,
            "noise_scheduler_type": noise.sampler.upper(),
            "num_train_timesteps": noise.train_steps,
            "num_inference_steps": noise.inference_steps,
            "beta_schedule": noise.beta_schedule,
            "beta_start": noise.beta_start,
            "beta_end": noise.beta_end,
            "prediction_type": noise.predicts,
            "clip_sample": noise.clip_range is not None,
            "clip_sample_range": noise.clip_range or 1.0,
        }
        numbers = {f"backbone.{name}.": f"backbone.{number}." for number, name in _RESNET.items()}
        grids = {name: buffer for name, buffer in self.named_buffers() if name.endswith("pos_grid")}
        weights = {}
        for name, value in {**self.state_dict(), **grids}.items():
            part = next((part for part in numbers if part in name), "")
            weights[f"diffusion.{name.replace(part, numbers.get(part, ''), 1)}"] = value
        return LerobotExport(config, weights, (MEAN, STD))

    def blocks(self) -> list[nn.Module]:
        return self.unet.blocks()

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"mse": real_actions(batch).sum((1, 2), dtype=torch.float32)}

    def forward(self, batch: Batch, draws: Draws) -> LossTerms:
        real, dims = real_actions(batch), batch.action_dim_mask[:, None, :]
        # Padding may hold anything, NaN too, and 0 * NaN is NaN: select, never multiply.
        actions = _held(torch.where(real, batch.actions, 0.0), batch.action_is_pad)
        noise = torch.where(dims, draws.normal("actions", actions.shape[1:]), 0.0)
        step = draws.choice("step", self.noise.train_steps)
        alpha = self.alphas[step][:, None, None]
        noised = alpha.sqrt() * actions + (1.0 - alpha).sqrt() * noise
        predicted = self.unet(noised, step, self._condition(batch)).float()
        error = (predicted - (noise if self.noise.predicts == "epsilon" else actions)).square()
        return {"mse": (torch.where(real, error, 0.0).sum((1, 2)), self.term_counts(batch)["mse"])}

    @property
    def num_steps(self) -> int:
        return self.noise.inference_steps or self.noise.train_steps

    def context(self, batch: Batch) -> Tensor:
        return self._condition(batch)

    def denoise(self, batch: Batch, context: Tensor, draws: Draws, steps: int) -> Tensor:
        dims, shape = batch.action_dim_mask[:, None, :], (self.spec.chunk_length, self.spec.action_dim)
        (scheduler, times), stochastic = _sampling(self.noise, steps), self.noise.sampler == "ddpm"
        x = torch.where(dims, draws.normal("actions", shape), 0.0)
        for step in times:
            predicted = self.unet(x, torch.full_like(batch.key, step), context).float()
            made = scheduler.step(
                predicted,
                step,
                x,
                eta=float(stochastic),
                use_clipped_model_output=stochastic,  # the mean of DDPM's step lies between x and the cut actions
                variance_noise=draws.normal(f"step {step}", shape) if stochastic else None,
            )
            x = torch.where(dims, made.prev_sample, 0.0)
        return x

    def _condition(self, batch: Batch) -> Tensor:
        """[B, D] f32: state and keypoints, 0 where a sample has none."""
        parts = [real_state(batch)] if self.spec.state_dim else []
        if self.spec.cameras:
            frames = torch.stack([batch.images[camera][:, -1] for camera in self.spec.cameras], dim=1)
            if isinstance(self.rgb_encoder, ImageEncoder):
                features = self.rgb_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            else:
                features = torch.stack([encode(frames[:, i]) for i, encode in enumerate(self.rgb_encoder)], dim=1)
            present = torch.stack([batch.camera_mask[camera] for camera in self.spec.cameras], dim=1)
            parts.append(torch.where(present[..., None], features, 0.0).flatten(1))
        return torch.cat(parts, dim=-1)


class ImageEncoder(nn.Module):
    """Frames [M, 3, H, W] uint8 RGB -> features [M, 2 * num_keypoints] f32."""

    def __init__(self, image_size: tuple[int, int], num_keypoints: int):
        super().__init__()
        self.backbone = ResNet18(lambda channels: nn.GroupNorm(channels // 16, channels))
        self.pool = SpatialSoftmax(
            (math.ceil(image_size[0] / STRIDE), math.ceil(image_size[1] / STRIDE)), num_keypoints
        )
        self.out = nn.Linear(2 * num_keypoints, 2 * num_keypoints)

    def forward(self, frames: Tensor) -> Tensor:
        return F.relu(self.out(self.pool(self.backbone(frames)).flatten(1)))


class SpatialSoftmax(nn.Module):
    """Feature maps [M, C, h, w] -> the mean place (x, y) of each of K keypoints, [M, K, 2] f32 in [-1, 1] (Finn et al.
    2016)."""

    pos_grid: Tensor

    def __init__(self, grid: tuple[int, int], num_keypoints: int):
        super().__init__()
        self.nets = nn.Conv2d(CHANNELS, num_keypoints, 1)
        rows, columns = (torch.linspace(-1, 1, num, dtype=torch.float64).float() for num in grid)
        places = torch.stack([columns.expand(grid), rows[:, None].expand(grid)], dim=-1)
        self.register_buffer("pos_grid", places.flatten(0, 1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        attention = self.nets(features).flatten(2).float().softmax(dim=-1)
        # Not a matrix product: under autocast its places would have 8 bits.
        return (attention[..., None] * self.pos_grid).sum(dim=2)


@lru_cache(16)
def _sampling(noise: NoiseSchedule, num: int) -> tuple[Any, list[int]]:
    """A scheduler, whose numbers are constants in a traced graph, and its `num` steps. Raises `UserError`."""
    (chosen := replace(noise, inference_steps=num)).check("steps")
    scheduler = chosen.scheduler()
    return scheduler, scheduler.timesteps.tolist()


def _held(actions: Tensor, is_pad: Tensor) -> Tensor:
    """The chunk [B, T, A] with each padded step as the last one before it that isn't: what a dataset's end looks like
    to LeRobot. A convolution sees the padding, and a robot's chunk has none, so that it must look like actions."""
    place = torch.arange(actions.shape[1], device=actions.device).expand_as(is_pad)
    last = torch.where(is_pad, 0, place).cummax(dim=1).values
    return actions.gather(1, last[..., None].expand_as(actions))


def _check_chunk(chunk_length: int, unet: UnetSizes) -> None:
    below, rest = divmod(chunk_length, unet.multiple)
    if rest:
        near = " or ".join(str(num * unet.multiple) for num in (below, below + 1) if num)
        raise UserError(
            f"chunks of {chunk_length} steps are no multiple of {unet.multiple} (model.unet.down_dims)",
            where="data.chunk_length",
            remedy=f"set data.chunk_length={near}",
        )
