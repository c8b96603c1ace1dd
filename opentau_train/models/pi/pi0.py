"""pi0: the state is a token, and each action token knows the flow time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.data.batch import Batch
from opentau_train.models.inputs import real_state
from opentau_train.models.pi import names
from opentau_train.models.pi.parts import time_features
from opentau_train.models.pi.policy import PiPolicy
from opentau_train.models.weight_map import WeightMap


class Pi0Policy(PiPolicy):
    form = "pi0"
    adaptive = False
    state_tokens = 1

    def weight_map(self) -> WeightMap:
        return names.for_words(names.whole(), self.prompt.tokenizer)

    def make_suffix(self, width: int) -> None:
        self.state_proj = nn.Linear(self.max_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def suffix(self, batch: Batch, noised: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        state = real_state(batch)
        state = self.state_proj(F.pad(state, (0, self.max_state_dim - state.shape[1])))
        actions = self.action_in_proj(noised)
        features = time_features(time, actions.shape[-1]).to(actions.dtype)[:, None].expand_as(actions)
        mixed = F.silu(self.action_time_mlp_in(torch.cat([actions, features], dim=-1)))
        return torch.cat([state[:, None], self.action_time_mlp_out(mixed)], dim=1), None
