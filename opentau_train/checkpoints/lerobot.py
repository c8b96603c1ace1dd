"""Folders of policies as LeRobot 0.4 has them: the statistics in a published one, and writing one.

config.json, model.safetensors                      the policy
policy_preprocessor.json, policy_postprocessor.json what is done to observations and actions, with
policy_..._normalizer_processor.safetensors         the statistics of both
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opentau_train.checkpoints.weight_files import SINGLE, Entry, open_weights, write_tensors
from opentau_train.data.transforms.normalize import Affine, Normalize
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.data.transforms.shape import Pad
from opentau_train.errors import UserError
from opentau_train.models.lerobot import NORMALIZER, LerobotExport, Step
from opentau_train.models.policy import Policy
from opentau_train.types import BatchSpec

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
_MODES = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
_BUFFER = re.compile(r"(?:un)?normalize_\w+\.buffer_(\w+)\.(\w+)")
_CONSTANT = 1e12
"""The deviation of a constant dimension of the state: whatever comes is 0, as here."""


def published_stats(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """{feature.statistic: values} that a LeRobot policy was trained with: of its preprocessor's file beside the weights
    `entries` or, before 0.4, between them. Empty where there are none. Raises `UserError` for a damaged file."""
    for folder in {entry.file.parent for entry in entries.values()}:
        for file in folder.glob(f"policy_preprocessor*{NORMALIZER}.safetensors"):
            return {name: entry.read_whole(name) for name, entry in open_weights(file).items()}
    stats = {}
    for name, entry in entries.items():
        if buffer := _BUFFER.fullmatch(name):
            feature = re.sub(r"^observation_(images_)?", lambda m: m[0].replace("_", "."), buffer[1])
            stats[f"{feature}.{buffer[2]}"] = entry.read_whole(name)
    return stats


def write_lerobot(folder: Path, policy: Policy, pipelines: Iterable[Pipeline], norm_head: str) -> None:
    """Write `policy` for the robots of `norm_head`, whose datasets' `pipelines` say how it normalises. Raises
    `UserError` for what LeRobot's format can't say."""
    made, spec = policy.lerobot_export(), policy.spec
    if made is None:
        raise UserError(
            f"{type(policy).__name__} has no counterpart in LeRobot", where="format", remedy="set format=safetensors"
        )
    norms, *_ = [_norms(pipeline, norm_head, spec) for pipeline in pipelines]
    stats = _stats(norms, made, spec)
    inputs = {f"{IMAGES}{camera}": _feature("VISUAL", 3, *spec.image_size) for camera in spec.cameras}
    inputs |= {STATE: _feature("STATE", spec.state_dim)} if spec.state_dim else {}
    outputs = {ACTION: _feature("ACTION", spec.action_dim)}
    modes = {**_MODES, **({} if made.image else {"VISUAL": "IDENTITY"})}
    features = {"input_features": inputs, "output_features": outputs, "normalization_mapping": modes}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", {**made.config, **features})
    write_tensors(folder / SINGLE, made.weights)
    options = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": modes}
    before: list[Step] = [(name, options if name == NORMALIZER else given) for name, given in made.steps]
    after: list[Step] = [
        ("unnormalizer_processor", {**options, "features": outputs}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    for kind, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        entries: list[dict[str, Any]] = []
        for number, (name, given) in enumerate(steps):
            entries.append({"registry_name": name, "config": given})
            if "norm_map" in given:
                entries[-1]["state_file"] = file = f"{kind}_step_{number}_{name}.safetensors"
                write_tensors(folder / file, stats)
        _write(folder / f"{kind}.json", {"name": kind, "steps": entries})


def _norms(pipeline: Pipeline, norm_head: str, spec: BatchSpec) -> dict[str, Affine]:
    """How state and actions of the head are normalised. Raises `UserError` where more is done to them."""

    from opentau_train.data.transforms.augment.pictures import Augment  # with OpenCV, which a robot may lack

    norms: dict[str, Affine] = {}
    for name, transform in pipeline.transforms.items():
        if isinstance(transform, Normalize):
            norms = transform.affine[norm_head]
        elif transform.training_only or isinstance(transform, Pad):
            continue
        elif {"state", "actions"} & set(transform.writes) or (isinstance(transform, Augment) and transform.crops):
            raise UserError(
                f"the transform '{name}' changes state or actions, or crops pictures, which LeRobot's folder can't say",
                where="format",
                remedy="set format=safetensors",
            )
    if any(affine.offset.ndim > 1 for affine in norms.values()):
        raise UserError(
            "each step of the chunk is normalised by its own statistics, which LeRobot's folder can't say",
            where="format",
            remedy="set format=safetensors",
        )
    for name, dim in (("state", spec.state_dim), ("actions", spec.action_dim)):
        if len(norms[name].offset) != dim:
            raise UserError(
                f"the {name} of {norm_head} have {len(norms[name].offset)} dimensions, the policy {dim}",
                where="norm_head",
                remedy="LeRobot pads nothing: export another norm_head, or train a policy on this robot alone",
            )
    return norms


def _stats(norms: Mapping[str, Affine], made: LerobotExport, spec: BatchSpec) -> dict[str, Tensor]:
    """Mean and deviation of each feature: every method of normalising here is an affine map, and so are they."""
    stats = {}
    for feature, name, constant in ((STATE, "state", _CONSTANT), (ACTION, "actions", 0.0)):
        scale = torch.from_numpy(norms[name].scale)
        stats[f"{feature}.mean"] = torch.from_numpy(norms[name].offset)
        stats[f"{feature}.std"] = torch.where(scale > 0, 1 / scale, constant)
    for camera in spec.cameras if made.image else ():
        for name, values in zip(("mean", "std"), made.image or (), strict=True):
            stats[f"{IMAGES}{camera}.{name}"] = torch.tensor(values)[:, None, None]
    return stats


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _write(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=4) + "\n")
