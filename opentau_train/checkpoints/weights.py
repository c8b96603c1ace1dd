"""First weights of a policy from published files: what fits what, then every rank reads its own parts.

    plan = plan_weights(policy, path, policy.weight_map())      # headers only; the policy may be on the meta device
    fill(policy, plan)                                          # whole or sharded: a rank reads what it holds

`load_pretrained` does both. What was loaded, and what wasn't, is the `Report`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opentau_train.checkpoints.lerobot import published_stats
from opentau_train.checkpoints.weight_files import Entry, locate, open_weights
from opentau_train.config.weights import weight_settings
from opentau_train.distributed.materialise import shard_of
from opentau_train.errors import UserError
from opentau_train.models.policy import WEIGHT_MAPS, Policy, bind_model, not_read
from opentau_train.models.weight_map import WeightMap, fits

COUNTERS = ("*.num_batches_tracked", "*.position_ids", "*.inv_freq")
"""What layers of torch and transformers save, or saved once, without having learnt it."""
STATISTICS = ("normalize_inputs.*", "normalize_targets.*", "unnormalize_outputs.*")
"""Tensors that LeRobot put between the weights before 0.4: its normalisation (`published_stats`)."""


@dataclass(frozen=True)
class Report:
    """Names of tensors: the policy's that the file fills (`loaded`) or lacks (`missing`), the file's that the policy
    has no place for (`unexpected`), and `mismatched`, both shapes with them."""

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        counts = {name: len(getattr(self, name)) for name in ("missing", "unexpected", "mismatched")}
        rows = [f"{name:11} {n}{': ' if n else ''}{_some(getattr(self, name))}" for name, n in counts.items()]
        return "\n".join([f"{'loaded':11} {len(self.loaded)} of {total} tensors, from {self.path}", *rows])


@dataclass(frozen=True)
class Plan:
    """`sources` {the policy's name: (the file's name, its tensor)}; `stats` that lie beside the weights
    (`published_stats`): a run computes those of its own data, as LeRobot does when it trains such weights further;
    `note`: `WeightMap`'s."""

    sources: dict[str, tuple[str, Entry]]
    report: Report
    stats: dict[str, torch.Tensor]
    note: str = ""

    def __str__(self) -> str:
        """The report's four lines, and one more where there are statistics."""
        named = _some([f"{name} {list(value.shape)}" for name, value in self.stats.items()], 8)
        lines = [f"statistics  not used, the data's own are: {named}"] if named else []
        return "\n".join([str(self.report), *lines])


def load_pretrained(policy: nn.Module, path: str | Path, mapping: WeightMap) -> Report:
    """Fill `policy`, which may be sharded, with the weights at `path`, named by `mapping`. Raises `UserError`, with the
    report, where nothing fits, shapes differ, or one is missing that `mapping.new` doesn't name; then nothing is
    changed."""
    plan = plan_weights(policy, path, mapping)
    fill(policy, plan)
    return plan.report


def plan_weights(
    policy: nn.Module, path: str | Path, mapping: WeightMap, where: str = "", *, resize: bool = True
) -> Plan:
    """Which tensor of the weights at `path` goes where. `where`: the setting that names them; `resize`: whether what
    `mapping.resized` names may have other dimensions. Raises as `load_pretrained` does."""
    path = Path(path)
    found = open_weights(path, where)
    if any(".lora_A." in name for name in found):
        raise UserError(
            f"{path} holds LoRA adapters, not the weights of a whole policy",
            where=where or str(path),
            remedy="export the run: python -m opentau_train.tools.export checkpoint=RUN out=policy.safetensors",
        )
    entries = {n: e for n, e in found.items() if not fits(n, (*mapping.ignored, *STATISTICS))}
    own = {name: tensor for name, tensor in policy.state_dict().items() if fits(name, mapping.part)}
    sources, unexpected, wrong = dict[str, tuple[str, Entry]](), list[str](), dict[str, Entry]()
    for published, entry in sorted(entries.items(), key=lambda item: fits(item[0], mapping.fallback)):
        name = mapping.own_name(published)
        if fits(published, mapping.fallback if name in sources else () if name in own else COUNTERS):
            continue
        if name not in own:
            unexpected.append(published)
        elif name in sources:
            raise UserError(
                f"{sources[name][0]} and {published} are both the policy's {name}",
                where=where or str(path),
                remedy="give a file with one of them",
            )
        elif not _matches(entry, own[name], resized=resize and fits(name, mapping.resized)):
            wrong[name] = entry
        else:
            sources[name] = published, entry
    missing = tuple(name for name in own if name not in sources and name not in wrong)
    report = Report(
        path, tuple(sources), missing, tuple(unexpected), tuple(_both(n, e, own[n]) for n, e in wrong.items())
    )
    resizable = not resize and all(_matches(e, own[n], resized=fits(n, mapping.resized)) for n, e in wrong.items())
    _check(report, mapping, where, resizable=resizable)
    return Plan(sources, report, published_stats(found), mapping.note)


def _matches(entry: Entry, own: torch.Tensor, *, resized: bool) -> bool:
    shape = tuple(own.shape)
    same = entry.shape == shape
    if resized and len(shape) == len(entry.shape) > 0:
        same = entry.shape[1:-1] == shape[1:-1]
    return same and entry.is_floating_point == own.is_floating_point()


def _both(name: str, entry: Entry, own: torch.Tensor) -> str:
    kinds = [f"{entry.dtype} ", f"{own.dtype} "] if entry.shape == tuple(own.shape) else ["", ""]
    return f"{name} {kinds[0]}{list(entry.shape)} there, {kinds[1]}{list(own.shape)} here"


def _check(report: Report, mapping: WeightMap, where: str, *, resizable: bool) -> None:
    unnamed = [name for name in report.missing if not fits(name, mapping.new)]
    layers, stacks = {_layer(name) for name in report.loaded} - {""}, {_stack(name) for name in report.loaded}
    if not report.loaded:
        what = "no tensor of the file fits the model"
        remedy = "choose the model that these weights are of, or weights of this one"
    elif report.mismatched:
        what = f"{len(report.mismatched)} tensors of the file have other shapes than the model's"
        remedy = "set the model's sizes, data.chunk_length and the data's dimensions to those of the weights"
        remedy += mapping.shapes
        if resizable:
            remedy = "set model.resize_dims=true: projections are cut to the data's dimensions, or filled up with 0"
    elif more := [n for n in report.unexpected if _layer(o := mapping.own_name(n)) in layers or _stack(o) in stacks]:
        what = f"the file has more layers than the model, or more of some: {_some(more)}"
        remedy = "set the model's depths and options (norms, biases) to the weights', or choose the model they are of"
    elif unnamed:
        what = f"the file lacks {len(unnamed)} tensors of the model: {_some(unnamed)}"
        remedy = (
            "choose the model that these weights are of, or weights of this one; a run of frozen weights has them only "
            "in what tools.export makes of it"
        )
    else:
        return
    raise UserError(what, details=_indented(report), where=where or str(report.path), remedy=remedy)


def _layer(name: str) -> str:
    """The module that a tensor belongs to; "" is the policy itself."""
    return name.rpartition(".")[0]


def _stack(name: str) -> str:
    """The same for all layers of a stack."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def fill(policy: nn.Module, plan: Plan) -> None:
    """Copy the plan's tensors into `policy`, in its dtypes; of a sharded tensor its shard alone is read. A resized axis
    is cut, or filled up with zeros."""
    own = policy.state_dict()
    with torch.no_grad():
        for name, (published, entry) in plan.sources.items():
            local, offsets = shard_of(own[name])
            ends = [min(o + n, size) for o, n, size in zip(offsets, local.shape, entry.shape, strict=True)]
            part = tuple(slice(start, end) for start, end in zip(offsets, ends, strict=True))
            inside = tuple(slice(0, max(0, end - start)) for start, end in zip(offsets, ends, strict=True))
            if entry.shape != tuple(own[name].shape):
                local.zero_()
            if all(s.stop > 0 for s in inside):
                local[inside].copy_(entry.read(published, part))


@dataclass(frozen=True)
class FirstWeights:
    """What `model.{key}` names as `given`, at `path` on this machine's disk; `resize`: projections of other dimensions
    are cut or filled."""

    key: str
    given: str
    path: Path
    resize: bool

    def plan(self, policy: Policy) -> Plan:
        """Raises `UserError` where they don't fit the policy, or where it doesn't read them."""
        method = WEIGHT_MAPS.get(self.key)
        mapping = policy.encoders[self.key] if method is None else getattr(policy, method)()
        if mapping is None:
            raise not_read(self.key, type(policy))
        return plan_weights(policy, self.path, mapping, f"model.{self.key}", resize=self.resize)


def locate_weights(model: Mapping[str, Any]) -> FirstWeights | None:
    """What the settings `model` name, downloaded where it is on the Hub; None where they name nothing. Its files can be
    read. Called before anything costs time. Raises `UserError`."""
    settings = weight_settings(model)
    for key, given in settings.paths.items():
        return _located(key, given, settings.resize_dims)
    return None


def locate_encoders(model: Mapping[str, Any]) -> tuple[FirstWeights, ...]:
    """The same for each encoder inside that the settings name (`Policy.encoders`)."""
    target, options = bind_model(model)
    encoders = target.encoders if isinstance(target, type) and issubclass(target, Policy) else ()
    return tuple(_located(key, options[key], resize=False) for key in encoders if options.get(key) is not None)


def _located(key: str, given: str, resize: bool) -> FirstWeights:
    path = locate(given, f"model.{key}")
    open_weights(path, f"model.{key}")
    return FirstWeights(key, given, path, resize)


def _some(names: Iterable[str], num: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:num]) + (", ..." if len(names) > num else "")


def _indented(report: Report) -> str:
    return "\n".join(f"  {line}" for line in str(report).splitlines())
