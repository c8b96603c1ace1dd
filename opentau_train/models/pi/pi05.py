"""pi0.5: the state stands in the prompt, and the flow time conditions the expert's norms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from opentau_train.data.batch import Batch
from opentau_train.models.pi import names
from opentau_train.models.pi.parts import time_features
from opentau_train.models.pi.policy import PiPolicy
from opentau_train.models.weight_map import WeightMap


class Pi05Policy(PiPolicy):
    form = "pi05"
    adaptive = True
    state_tokens = 0

    def weight_map(self) -> WeightMap:
        # Some conversions call the time's layers as pi0's are called.
        return names.for_words(names.whole((r"^action_time_mlp_", "time_mlp_")), self.prompt.tokenizer)

    def make_suffix(self, width: int) -> None:
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def suffix(self, batch: Batch, noised: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        actions = self.action_in_proj(noised)
        features = time_features(time, actions.shape[-1])
        return actions, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(features))))
