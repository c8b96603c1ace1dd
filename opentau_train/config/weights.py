"""Where a policy's first weights come from: keys of `model` that the program reads, not the policy's class."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentau_train.config.resuming import Meaning
from opentau_train.config.typed import build
from opentau_train.errors import UserError


@dataclass(frozen=True)
class WeightSettings:
    """A path is a file, a directory, or a name on the Hugging Face Hub, OWNER/NAME or OWNER/NAME@REVISION."""

    pretrained_path: str | None = None
    """The whole policy's."""
    vlm_path: str | None = None
    """Those of the vision-language model inside alone; also `VLM_SAFETENSORS_PATH` in the environment."""
    backbone_path: str | None = None
    """Those of the image encoder inside alone."""
    resize_dims: bool = False
    """true = where state or actions have other dimensions than the weights, projections are cut, or filled with 0."""

    @property
    def paths(self) -> dict[str, str]:
        """{key: what it names}, of the paths that are set."""
        return {key: value for key in PATHS if (value := getattr(self, key)) is not None}

    def check(self, path: str) -> None:
        if len(self.paths) > 1:
            keys = ", ".join(f"{path}.{key}" for key in self.paths)
            raise UserError(
                f"{keys}: the policy's first weights come from one place, and {len(self.paths)} are named",
                remedy=f"keep one of them: {path}.vlm_path=null drops VLM_SAFETENSORS_PATH for this run",
            )
        for key, value in self.paths.items():
            if not value:
                raise UserError(f"{path}.{key} is empty", remedy=f"name a file or directory, or set {path}.{key}=null")


WEIGHT_KEYS = tuple(field.name for field in dataclasses.fields(WeightSettings))
PATHS = tuple(key for key in WEIGHT_KEYS if key.endswith("_path"))
ON_RESUME = {
    key: Meaning("safe", "a resume takes the checkpoint's weights, and frozen ones only where they are the same")
    for key in WEIGHT_KEYS
}


def _other_place(old: Any, new: Any, now: Mapping[str, Any]) -> Meaning:
    return Meaning("refused", "the policy has other parameters") if old is None or new is None else ON_RESUME[PATHS[0]]


ENCODER_ON_RESUME = Meaning("refused", judge=_other_place)
"""Of an option that names an encoder's weights."""


def weight_settings(model: Mapping[str, Any]) -> WeightSettings:
    """Those of the settings `model`. Raises `UserError`."""
    return build(WeightSettings, {key: model[key] for key in WEIGHT_KEYS if key in model}, "model")


VLM = "VLM_SAFETENSORS_PATH"
"""The environment's name for `model.vlm_path`; a key that is given, null too, comes first."""
TOKENIZER = "tokenizer.json"
CONFIG = "config.json"


def completed(model: Any, environ: Mapping[str, str]) -> Any:
    """The settings `model` with the path that the environment gives, and, where they have a `tokenizer_path` that isn't
    set, with the tokenizer beside weights in a local directory; with the `text_config` of a `text_encoder` in one. What
    is no mapping stays as it is. Raises `UserError` for a config.json that can't be read."""
    if not isinstance(model, Mapping):
        return model
    model = {**({"vlm_path": environ[VLM]} if environ.get(VLM) else {}), **model}
    if model.get("tokenizer_path", "") is None:
        places = [Path(str(model[key])).expanduser() for key in PATHS if model.get(key)]
        folders = [place if place.is_dir() else place.parent for place in places]
        model["tokenizer_path"] = next((str(f) for f in folders if (f / TOKENIZER).is_file()), None)
    if model.get("text_encoder") and model.get("text_config", "") is None:
        model["text_config"] = _config(Path(str(model["text_encoder"])).expanduser() / CONFIG)
    return model


def _config(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} can't be read: {error!r}", where="model.text_encoder", remedy="download it again"
        ) from error
