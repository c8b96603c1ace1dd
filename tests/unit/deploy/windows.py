"""The windows of a run's own validation, as its evaluator samples chunks for them, and as a robot would see them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opentau_train.checkpoints.card import read_card
from opentau_train.config.settings import load_settings
from opentau_train.data.batch import Batch, stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.open import open_mixture
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.types import Address, RawWindow
from opentau_train.validation.actions import ActionEvaluator


@dataclass(frozen=True)
class Window:
    """As the reader gives it (`raw`), as a sample, and the key of what is drawn for it."""

    raw: RawWindow
    sample: dict[str, Any]
    norm_head: str

    @property
    def key(self) -> int:
        return int(self.sample["key"])

    @property
    def seen(self) -> dict[str, Any]:
        """What a robot gives; of several texts the validation's."""
        return {**self.raw.images, "state": self.raw.state, "task": self.sample["prompt"]}


@dataclass(frozen=True)
class Windows:
    windows: list[Window]
    batch: Batch
    expected: list[np.ndarray]
    """Chunks [T, A'] that the evaluator compares with the dataset's."""


def validated(run: Path, policy: RobotPolicy, num: int | None = None) -> Windows:
    settings = load_settings(read_card(run / "checkpoints" / "last" / "pretrained_model").config)
    mixture = open_mixture(settings, policy.loaded.stats).for_policy(policy.loaded.policy.wants())
    plan = ActionEvaluator().plan(mixture, settings.validation, 4, 1)
    builder = SampleBuilder(mixture, training=False)
    windows = []
    columns = (plan.windows.dataset, plan.windows.episode, plan.windows.frame)
    for dataset, episode, frame in list(zip(*(column.tolist() for column in columns), strict=True))[:num]:
        sample = builder.build(0, Address(dataset, episode, frame, 0))
        raw = builder.cursor(0, dataset).read(episode, frame)
        windows.append(Window(raw, sample, sample["norm_head"]))
    builder.close()
    batch = stack([window.sample for window in windows], mixture.spec)
    sampled = policy.loaded.policy.sample_actions(batch, Draws(batch.key, ACTION_DRAW)).numpy()
    expected = []
    for i, window in enumerate(windows):
        pipeline = mixture.pipelines[int(batch.dataset_index[i])]
        expected.append(pipeline.units(sampled[i], window.norm_head, state=batch.state[i].numpy()))
    return Windows(windows, batch, expected)
