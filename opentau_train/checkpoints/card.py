"""The card of a policy: what stands beside its weights, without which their outputs mean nothing. JSON, of whoever
wrote it: what classes it names is for `config.trust` to judge, where they are called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opentau_train import strangers
from opentau_train.checkpoints.weight_files import write_tensors
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.errors import UserError, check_machine

FORMAT = "opentau_train.policy/1"
FOLDER = "pretrained_model"
WEIGHTS = "model.safetensors"
PARTS = {"config": "configuration", "stats": "statistics", "policy": "action convention"}
"""The parts of `Pretrained`, as error messages call them."""
CARD_BYTES = 256 * 2**20
"""Of one part, with the tokenizers that a policy keeps."""


@dataclass(frozen=True)
class Pretrained:
    """What stands beside the weights: the settings tree, the statistics of each norm head, the convention. `trust`: the
    modules whose classes it may name, besides this package's (`config.trust`)."""

    config: dict[str, Any]
    stats: dict[str, dict]
    policy: dict[str, Any]
    trust: tuple[str, ...] = ()


def write_folder(folder: Path, weights: dict[str, torch.Tensor], card: Pretrained) -> None:
    """Write `pretrained_model/`: the weights as one safetensors file, and a JSON file for each of `PARTS`."""
    write_tensors(folder / WEIGHTS, weights)
    for name in PARTS:
        (folder / f"{name}.json").write_text(json.dumps(getattr(card, name), indent=1) + "\n")


def write_file(path: Path, weights: dict[str, torch.Tensor], card: Pretrained) -> None:
    """One safetensors file; config, stats and policy are JSON in its metadata."""
    texts = {name: json.dumps(getattr(card, name)) for name in PARTS}
    write_tensors(path, weights, {"format": FORMAT, **texts})


def read_card(folder: Path, trust: Sequence[str] = ()) -> Pretrained:
    """What stands beside the weights in a `pretrained_model/` directory: without it their outputs mean nothing. Raises
    `UserError`."""
    parts = {part: _read(folder / f"{part}.json", words) for part, words in PARTS.items()}
    return Pretrained(**parts, trust=tuple(trust))


def _read(path: Path, words: str) -> dict[str, Any]:
    try:
        return strangers.read_mapping(path, CARD_BYTES)
    except (OSError, ValueError) as error:
        check_machine(error, path)
        raise UserError(
            f"the checkpoint has no readable {words}, without which its outputs mean nothing: {error}",
            where=str(path),
            remedy="give a checkpoint that opentau_train wrote, with its pretrained_model/ directory",
        ) from error


def card_in(texts: Mapping[str, str], file: Path, trust: Sequence[str] = ()) -> Pretrained:
    """The card in the metadata of an exported file. Raises `UserError`."""
    try:
        return Pretrained(
            **{name: strangers.mapping(strangers.parse(texts[name])) for name in PARTS}, trust=tuple(trust)
        )
    except (KeyError, OSError, ValueError) as error:
        raise unreadable(file, f"its card is none: {error}") from error


def read_stats(folder: Path) -> dict[str, HeadStats]:
    """{norm head: statistics} of a `pretrained_model/` directory. Raises `UserError`."""
    with strangers.understood("the statistics", folder):
        return {head: HeadStats.from_json(tree) for head, tree in read_card(folder).stats.items()}


def unreadable(path: Path, cause: object) -> UserError:
    """The error of a file or directory that is to hold a policy."""
    return UserError(
        f"no policy can be read: {cause}",
        where=str(path),
        remedy="give a run, a checkpoint, its pretrained_model/, or a file that tools.export wrote",
    )
