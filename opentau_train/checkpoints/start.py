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
from opentau_train.checkpoints.weights import FirstWeights
from opentau_train.config.finetune import ALL_TRAINS, FinetuneSettings
from opentau_train.data.transforms.pipeline import meet
from opentau_train.distributed.materialise import materialise
from opentau_train.distributed.parallel import Execution, Replicas, spread
from opentau_train.distributed.rehearsal import sketch
from opentau_train.distributed.world import World
from opentau_train.models.finetune import prepare_finetune
from opentau_train.models.policy import Policy, bind_model, build_policy
from opentau_train.types import BatchSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a policy begins: its `first` weights, None: untrained, and what of it trains."""

    first: FirstWeights | None = None
    finetune: FinetuneSettings = ALL_TRAINS


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
    if start.first is not None:
        base.plan_base(policy, start.first)
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
    first = start.first
    plan = None if first is None else world.agree(lambda: base.plan_base(policy, first))
    given, adapters = () if plan is None else plan.sources, policy.adapters
    allocate = partial(materialise, policy, init_weights=policy.init_weights, given=given, adapters=adapters)
    replicas = spread(policy, policy.blocks(), world, mesh, execution, allocate if on_meta else None)
    if plan is not None:
        world.agree(lambda: base.fill_base(policy, plan))
        log.info("first weights of the policy:\n%s", plan)
    return policy, replicas
