"""The trained policy by itself: weights, settings, statistics and the convention of inputs and outputs.

A checkpoint holds it as the directory `pretrained_model/`, `tools.export` writes it as one file. `load_policy` reads
either:

    loaded = load_policy("runs/droid/checkpoints/last")
    batch = loaded.observe([{"images": {"wrist": picture}, "state": q, "prompt": "open the drawer"}], norm_head)
    chunk = loaded.policy.sample_actions(batch, Draws(batch.key))
    actions = loaded.units(chunk, batch)            # [B, T, A'] in the dataset's units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from opentau_train import strangers
from opentau_train.checkpoints import assets, commit, manifest
from opentau_train.checkpoints import base as bases
from opentau_train.checkpoints.card import FOLDER, FORMAT, PARTS, WEIGHTS, Pretrained, card_in, read_card, unreadable
from opentau_train.checkpoints.weights import FirstWeights
from opentau_train.config import typed
from opentau_train.config.finetune import FinetuneSettings
from opentau_train.config.trust import check_targets
from opentau_train.config.weights import TOKENIZER
from opentau_train.data.batch import Batch
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.transforms.pipeline import Pipeline, with_fields
from opentau_train.errors import UserError, check_machine, did_you_mean
from opentau_train.models.finetune import prepare_finetune
from opentau_train.models.policy import Policy, build_policy
from opentau_train.types import BatchSpec

OF_CARD = "what the policy says of itself"


@dataclass(frozen=True)
class Loaded:
    """`policy` in eval mode; `stats` {norm head: statistics}; `meta`: the convention (`actions`, `normalization`,
    `norm_heads`, `fps`, ...) and the run's settings under `config`; `datasets` {norm head: {dataset: the transforms of
    its windows}}; `spec`, the shape of a batch for the policy.

    Datasets that share a norm head may have had other units, references or columns before they were converted: where
    they differ, `observe` and `units` must be told which of them the robot speaks as. They raise `UserError` else.
    """

    policy: Policy
    stats: dict[str, HeadStats]
    meta: dict[str, Any]
    datasets: dict[str, dict[str, Pipeline]]
    spec: BatchSpec

    @property
    def pipelines(self) -> dict[str, Pipeline]:
        """{norm head: the transforms of the first of its datasets}."""
        return {head: next(iter(of_head.values())) for head, of_head in self.datasets.items()}

    def as_dataset(self, dataset: str) -> Loaded:
        """The same policy for robots that speak as one of its datasets. Raises `UserError` where there is none of this
        name."""
        known = {name for of_head in self.datasets.values() for name in of_head}
        if dataset not in known:
            raise UserError(
                f"the policy has no dataset '{dataset}'{did_you_mean(dataset, known)}",
                where="dataset",
                remedy=f"it was trained on {', '.join(sorted(known))}",
            )
        own = {head: {dataset: of_head[dataset]} for head, of_head in self.datasets.items() if dataset in of_head}
        return replace(self, datasets=own)

    def observe(self, observations: Sequence[Mapping[str, Any]], norm_head: str, dataset: str | None = None) -> Batch:
        """A batch of what robots of one kind see, as the training made its samples: see `Pipeline.observe`."""
        return self._pipeline(norm_head, dataset).observe(observations, norm_head, self.spec)

    def units(self, actions: torch.Tensor, batch: Batch, dataset: str | None = None) -> NDArray[np.float32]:
        """Predicted chunks [B, T, A] of a batch of one norm head -> [B, T, A'] in the robot's units and dimensions."""
        (norm_head,) = set(batch.norm_head)
        pipeline, chunks = self._pipeline(norm_head, dataset), actions.float().cpu().numpy()
        states = batch.state.cpu().numpy()
        return np.stack([pipeline.units(c, norm_head, state=s) for c, s in zip(chunks, states, strict=True)])

    def _pipeline(self, norm_head: str, dataset: str | None) -> Pipeline:
        if norm_head not in self.datasets:
            raise UserError(
                f"the policy has no norm head '{norm_head}'{did_you_mean(norm_head, self.datasets)}",
                where="norm_head",
                remedy=f"it knows {', '.join(self.datasets) or 'none: it was saved by an older version'}",
            )
        return of_dataset(norm_head, self.datasets[norm_head], dataset)


def load_policy(
    path: str | Path,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
    trust: Sequence[str] = (),
) -> Loaded:
    """The policy of an exported file, a `pretrained_model/` directory, a checkpoint, or a run's newest checkpoint.
    `base`: where frozen weights that it leaves out lie now, if they have been moved; `trust`: modules of others whose
    classes it may name.

    Raises `UserError` where there is none, where its class and its weights don't fit, or where it names code that
    nobody has vouched for.
    """
    path = Path(path).expanduser()
    folder = None if path.is_file() else pretrained_folder(path)
    file = path if folder is None else folder / WEIGHTS
    if folder is not None and (folder.parent / manifest.MANIFEST).is_file():  # else it was copied out of a checkpoint
        manifest.check(folder.parent, FOLDER)
    try:
        strangers.check_plain(file)
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it isn't a mapping)
            texts = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        check_machine(error, file)
        raise unreadable(file, error) from error
    if folder is None and texts.get("format") != FORMAT:
        raise unreadable(file, f"its format is {texts.get('format')}, not {FORMAT}")
    card = card_in(texts, file, trust) if folder is None else read_card(folder, trust)
    with strangers.understood("the policy", file):
        policy = build(with_base(card, base))
        borrowed = {n: v for n, v in policy.state_dict().items() if n in policy.borrowed}
        try:
            policy.load_state_dict(borrowed | weights)
        except RuntimeError as error:
            raise unreadable(file, strangers.in_a_line(error)) from error
        loaded = loaded_as(card, policy.eval())
    policy.to(device)
    return loaded


def loaded_as(card: Pretrained, policy: Policy) -> Loaded:
    """`policy` with what its `card` says of it."""
    stats = {head: HeadStats.from_json(tree) for head, tree in card.stats.items()}
    meta = {**card.policy, "config": card.config}
    datasets = datasets_of(card)
    transforms = [t for of_head in datasets.values() for p in of_head.values() for t in p.transforms.values()]
    spec = with_fields(BatchSpec.from_json(card.policy["spec"]), transforms)
    return Loaded(policy, stats, meta, datasets, spec)


def datasets_of(card: Pretrained) -> dict[str, dict[str, Pipeline]]:
    """{norm head: {dataset that has it: its transforms}}; none where an older version wrote the card."""
    made: dict[str, dict[str, Pipeline]] = {}
    check_targets({"transforms": card.policy.get("transforms", {})}, OF_CARD, card.trust)
    transforms = assets.unpack(card.policy.get("transforms", {}), card.policy.get(assets.KEY, {}))
    for name, tree in transforms.items():
        pipeline = Pipeline.from_json(tree)
        for head in card.policy["datasets"][name]:
            made.setdefault(head, {})[name] = pipeline
    return made


def of_dataset(norm_head: str, pipelines: Mapping[str, Pipeline], dataset: str | None) -> Pipeline:
    """The transforms of a `dataset` of the norm head {dataset: transforms}; None: of any, where all have the same.
    Raises `UserError` where they haven't, or there is none of that name."""
    first = next(iter(pipelines))
    known = ", ".join(pipelines)
    if dataset is not None and dataset not in pipelines:
        raise UserError(
            f"norm head '{norm_head}' has no dataset '{dataset}'{did_you_mean(dataset, pipelines)}",
            where="dataset",
            remedy=f"it was trained on {known}",
        )
    own = {name: _own_transforms(pipeline) for name, pipeline in pipelines.items()}
    other = next((name for name in pipelines if own[name] != own[first]), None)
    if dataset is None and other is not None:
        raise UserError(
            f"datasets '{first}' and '{other}' share norm head '{norm_head}', and aren't converted alike: they differ "
            "in the robot's units or dimensions",
            where="dataset",
            remedy=f"say which one the robot speaks as, dataset='{first}' or another of {known}",
        )
    return pipelines[dataset or first]


def _own_transforms(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What one dataset has and another may not have: statistics are of the norm head, and padding of the batch."""
    return [tree for tree in pipeline.to_json() if tree["name"] not in ("normalize", "pad")]


def carried_tokenizer(path: Path) -> str | None:
    """The tokenizer that comes with the weights at `path`: beside them, or kept in the card of a policy of this
    program, from which it is written into this machine's cache. None: none does."""
    folder = path.parent if path.is_file() else path
    if (folder / TOKENIZER).is_file():
        return str(folder)
    card = _card_beside(path, folder)
    given = None if card is None else card.config.get("model", {}).get("tokenizer_path")
    kept = {} if card is None else card.policy.get(assets.KEY, {})
    return assets.unpack(given, kept) if given in kept else None


def _card_beside(path: Path, folder: Path) -> Pretrained | None:
    """The card of the weights at `path`, which `open_weights` can read, where they are a policy of this program."""
    if path.is_file():
        with safe_open(path, framework="pt") as opened:
            texts = opened.metadata() or {}
        if texts.get("format") == FORMAT:
            return card_in(texts, path)
    places = (folder, folder / FOLDER, folder / "checkpoints" / "last" / FOLDER)
    return next((read_card(place) for place in places if all((place / f"{n}.json").is_file() for n in PARTS)), None)


def pretrained_folder(path: Path) -> Path:
    """The `pretrained_model/` directory that `path` is, or holds."""
    if (path / WEIGHTS).is_file():
        return path
    return commit.at(str(path)) / FOLDER


def build(card: Pretrained) -> Policy:
    """The policy of the settings, untrained, with the adapters that it has. Torch's random state stays as it is."""
    check_targets({"model": card.config["model"]}, OF_CARD, card.trust)
    with torch.random.fork_rng(devices=[]):
        model = assets.unpack(card.config["model"], card.policy.get(assets.KEY, {}))
        policy = build_policy(model, BatchSpec.from_json(card.policy["spec"]))
        prepare_finetune(policy, finetune_of(card))
    first = first_of(card)
    if first is not None:
        bases.fill_base(policy, bases.plan_base(policy, first))
    return policy


def first_of(card: Pretrained) -> FirstWeights | None:
    """The frozen weights that lie elsewhere; None where the checkpoint holds all. Raises `UserError` where they aren't
    there."""
    entry = card.policy.get(bases.KEY)
    return None if entry is None else bases.base_of(entry, {**card.config["model"], entry["key"]: None}, "base")


def with_base(card: Pretrained, path: str | Path | None) -> Pretrained:
    """The card of a checkpoint whose frozen weights lie at `path` now; None: where they lay. Raises `UserError` where
    it has none elsewhere."""
    if path is None:
        return card
    if bases.KEY not in card.policy:
        raise UserError(
            "the checkpoint holds all of its weights, and none elsewhere", where=f"base={path}", remedy="leave out base"
        )
    return replace(card, policy={**card.policy, bases.KEY: {**card.policy[bases.KEY], "path": str(path)}})


def finetune_of(card: Pretrained) -> FinetuneSettings:
    """What of the policy trained; all of it where an older version wrote the card."""
    return typed.build(FinetuneSettings, card.config.get("finetune", {}), "finetune")


def whole(card: Pretrained) -> Pretrained:
    """The card of the same policy as one piece: no adapters, and all weights beside it."""
    config = {key: value for key, value in card.config.items() if key != "finetune"}
    return replace(card, config=config, policy={k: v for k, v in card.policy.items() if k != bases.KEY})
