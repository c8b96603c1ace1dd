"""Transforms that give all datasets' windows the mixture's common shape: wide vectors, long chunks, one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.transforms.base import Record, SampleDraws, Transform


@dataclass(frozen=True)
class ChoosePrompt(Transform):
    """Chooses one of the window's texts, each as likely, anew in each pass; "" where it has none."""

    reads: ClassVar = ("prompts",)
    writes: ClassVar = ("prompt",)

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        prompts = record["prompts"]
        place = int(draws.uniform("choice") * len(prompts)) if len(prompts) > 1 else 0
        record["prompt"] = prompts[place] if prompts else ""
        return record

    def many(self, record: Record, num: int) -> Record | None:
        if max(map(len, record["prompts"])) > 1:
            return None
        return record | {"prompt": [prompts[0] if prompts else "" for prompts in record["prompts"]]}


@dataclass(frozen=True)
class Pad(Transform):
    """Fills state [S'] and actions [T', A'] up with zeros to `state_dim` S and `chunk_length` T x `action_dim` A, and
    adds the masks that say what is real. `dims` {norm head: (S', A')} are what the inverse cuts back to."""

    state_dim: int
    action_dim: int
    chunk_length: int
    dims: dict[str, tuple[int, int]]

    reads: ClassVar = ("state", "actions", "action_is_pad", "norm_head")
    writes: ClassVar = ("state", "state_dim_mask", "actions", "action_is_pad", "action_dim_mask")

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        state_dim, action_dim = self.dims[record["norm_head"]]
        lead = record["state"].shape[:-1]
        state = np.zeros((*lead, self.state_dim), np.float32)
        state[..., :state_dim] = record["state"]
        record["state"] = state
        record["state_dim_mask"] = _first(self.state_dim, state_dim)
        record["action_dim_mask"] = _first(self.action_dim, action_dim)
        if "actions" in record:
            steps = record["actions"].shape[-2]
            actions = np.zeros((*lead, self.chunk_length, self.action_dim), np.float32)
            actions[..., :steps, :action_dim] = record["actions"]
            record["actions"] = actions
            if steps < self.chunk_length:
                missing = np.ones((*lead, self.chunk_length - steps), bool)
                record["action_is_pad"] = np.append(record["action_is_pad"], missing, axis=-1)
        return record

    def many(self, record: Record, num: int) -> Record:
        state_dim, action_dim = self.dims[record["norm_head"]]
        return self(record, SampleDraws(0, "")) | {
            "state_dim_mask": _first(self.state_dim, state_dim, num),
            "action_dim_mask": _first(self.action_dim, action_dim, num),
        }

    def inverse(self, record: Record) -> Record:
        """Takes away the dimensions that the norm head's robot hasn't, not the steps: a policy fills the chunk."""
        for name, num in zip(("state", "actions"), self.dims[record["norm_head"]], strict=True):
            if name in record:
                record[name] = record[name][..., :num]
        return record


@cache
def _first(size: int, real: int, num: int | None = None) -> NDArray[np.bool_]:
    """[size] bool: the first `real`; of `num` samples [num, size]. The same array each time: nobody writes to a
    record's arrays."""
    one = np.arange(size) < real
    return one if num is None else np.broadcast_to(one, (num, size))
