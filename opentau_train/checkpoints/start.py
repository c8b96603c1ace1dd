"""How a policy begins: built, spread over the ranks, with adapters and first weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from opentau_train.checkpoints import base
from opentau_train.checkpoints.pretrained import carried_tokenizer
from opentau_train.checkpoints.weights import FirstWeights, Plan, locate_encoders, locate_weights
from opentau_train.config.finetune import ALL_TRAINS, FinetuneSettings
from opentau_train.data.transforms.pipeline import meet
from opentau_train.distributed.materialise import materialise
from opentau_train.distributed.parallel import Execution, Replicas, spread
from opentau_train.distributed.rehearsal import sketch
from opentau_train.distributed.world import World
from opentau_train.errors import UserError
from opentau_train.models.finetune import prepare_finetune
from opentau_train.models.policy import Policy, bind_model, build_policy
from opentau_train.types import BatchSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a policy begins: its `first` weights, None: untrained; what of it trains; before both, the weights of
    `encoders` inside, which its checkpoints hold."""

    first: FirstWeights | None = None
    finetune: FinetuneSettings = ALL_TRAINS
    encoders: tuple[FirstWeights, ...] = ()

    def plans(self, policy: Policy) -> list[Plan]:
        """What fills what of `policy`, the first weights last. Raises `UserError` where they don't fit."""
        parts = (*self.encoders, *([] if self.first is None else [self.first]))
        return [base.plan_base(policy, part) for part in parts]

    def record(self) -> dict[str, str]:
        """The card's entry of the first weights."""
        assert self.first is not None, "what is borrowed is theirs"
        return base.record(self.first)

    def fill(self, policy: Policy, plan: Plan) -> None:
        """Fill `policy` by one of its plans."""
        is_first = self.first is not None and plan.report.path == self.first.path
        (base.fill_base if is_first else base.fill_part)(policy, plan)


def begin(model: Mapping[str, Any], finetune: FinetuneSettings) -> Start:
    """How a new run's policy begins, by the settings: the files that they name can be read. Raises `UserError`."""
    first = locate_weights(model)
    if first is not None and model.get("tokenizer_path", "") is None:
        carried = carried_tokenizer(first.path)
        if carried is not None:  # to read prompts as bytes would be to train on words that they have never seen
            raise UserError(
                f"the weights come with a tokenizer, and the policy has none: {first.given}",
                where="model.tokenizer_path",
                remedy=f"set model.tokenizer_path={carried}",
            )
    return Start(first, finetune, locate_encoders(model))


def new_policy(
    model: Mapping[str, Any], spec: BatchSpec, finetune: FinetuneSettings = ALL_TRAINS, precision: str = "no"
) -> Policy:
    """The policy that the settings `model` name, untrained and whole, with its adapters, in the numbers that
    `trainer.precision` says. Raises `UserError`."""
    policy = build_policy(model, spec)
    prepare_finetune(policy, finetune)
    if precision == "bf16_params":
        for parameter in policy.parameters():
            parameter.data = parameter.data.bfloat16()
    return policy


def sketch_policy(model: Mapping[str, Any], spec: BatchSpec, start: Start, precision: str) -> Policy:
    """The policy as it will begin, without memory, for what its shapes tell. Raises `UserError` for what
    `spread_policy` would refuse, and for a mixture of another form than the policy wants: before a file is read but
    for metadata and headers."""
    policy = sketch(partial(new_policy, model, spec, start.finetune, precision))
    meet(spec, policy.wants())
    start.plans(policy)
    return policy


def spread_policy(
    model: Mapping[str, Any],
    spec: BatchSpec,
    world: World,
    mesh: DeviceMesh | None,
    execution: Execution,
    start: Start = Start(),
) -> tuple[Policy, Replicas]:
    """The policy that the settings `model` name, spread over the ranks, as `start` says. Where its class allows
    (`Policy.meta_init`), it has no memory until it is sharded, and nothing is drawn for what its first weights fill.
    Draws from torch's global generator. Collective; raises `UserError` on all ranks alike."""
    target, _ = bind_model(model)
    on_meta = isinstance(target, type) and issubclass(target, Policy) and target.meta_init

    def build() -> Policy:
        with torch.device("meta") if on_meta else nullcontext():
            return new_policy(model, spec, start.finetune, execution.precision)

    policy = world.agree(build)
    plans = world.agree(lambda: start.plans(policy))
    given, adapters = {name for plan in plans for name in plan.sources}, policy.adapters
    allocate = partial(materialise, policy, init_weights=policy.init_weights, given=given, adapters=adapters)
    replicas = spread(policy, policy.blocks(), world, mesh, execution, allocate if on_meta else None)
    for plan in plans:
        world.agree(partial(start.fill, policy, plan))
        log.info("first weights of the policy:\n%s", plan)
        if plan.note:
            log.warning("%s", plan.note)
    return policy, replicas
