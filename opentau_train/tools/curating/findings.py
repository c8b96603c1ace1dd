"""All that is known of a run's sources and episodes, the worst first, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.split import ranges
from opentau_train.tools.curating import judge
from opentau_train.tools.curating.gradients import Gradients
from opentau_train.tools.curating.judge import UNKNOWN, Estimate
from opentau_train.tools.curating.losses import EpisodeLoss

Losses = Mapping[tuple[str, int], EpisodeLoss]


@dataclass(frozen=True)
class EpisodeFinding:
    """One episode: its `loss`, its modified z-score `outlier` (NaN: not known), the `noise` of its labels, and whether
    these are wrong as far as both tell."""

    dataset: str
    episode: int
    held_out: bool
    loss: float
    outlier: float
    noise: Estimate
    is_wrong: bool


@dataclass(frozen=True)
class SourceFinding:
    """One dataset: its `share` of the samples, its mean losses in training and held out (NaN: none), its alignment with
    the groups that judge it (`score`), and with each group, by tag; the median label `noise` of its episodes (NaN: not
    known)."""

    dataset: str
    share: float
    loss: float
    held_out: float
    score: Estimate
    noise: float
    alignment: dict[str, Estimate]


@dataclass(frozen=True)
class Suggestion:
    """`overrides` to train once more with, and `why`."""

    overrides: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Findings:
    sources: tuple[SourceFinding, ...]
    episodes: tuple[EpisodeFinding, ...]
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]


def find(mixture: Mixture, gradients: Gradients, training: Losses, held_out: Losses, targets: set[int]) -> Findings:
    """Rank the sources and episodes, and say what to try; `targets`: groups that judge all, none: each other."""
    names = [d.name for d in mixture.datasets]
    groups = mixture.groups
    found = judge.alignments(gradients, len(names), range(len(groups)))
    of = [names.index(group.dataset) for group in groups]
    scores = judge.source_scores(found, of, [group.share for group in groups], targets)
    noise = judge.label_noise(gradients, targets)
    scores += [UNKNOWN] * (len(names) - len(scores))
    shares = [n / max(1, sum(mixture.draws)) for n in mixture.draws]
    sources = [
        SourceFinding(
            name,
            shares[d],
            _mean([one.loss for key, one in training.items() if key[0] == name]),
            _mean([one.loss for key, one in held_out.items() if key[0] == name]),
            scores[d],
            float(np.median([e.value for key, e in noise.items() if key[0] == d] or [math.nan])),
            {groups[g].tag: estimate for (own, g), estimate in found.items() if own == d},
        )
        for d, name in enumerate(names)
    ]
    episodes = _episodes(names, training, held_out, noise)
    trains = [d for d, share in enumerate(shares) if share > 0]
    weights = judge.suggested_weights([shares[d] for d in trains], [scores[d] for d in trains])
    dropped = {names[d] for d, w in zip(trains, weights or [], strict=False) if w == 0}
    suggestions = _exclusions(mixture, episodes, dropped)
    if weights is not None:
        new = tuple(f"data.sources.{names[d]}.weight={w:.3g}" for d, w in zip(trains, weights, strict=True))
        against = [names[d] for d, w in zip(trains, weights, strict=True) if w == 0]
        most = [names[d] for d in trains if scores[d].is_positive]
        why = f"what {' and '.join(against)} teaches is against the held-out data"
        if not against:
            why = f"what {' and '.join(most)} teaches is what the held-out data ask for, more than the others"
        suggestions = [Suggestion(new, why), *suggestions]
    notes = _notes(mixture, found, [scores[d] for d in trains], noise, bool(targets))
    sources.sort(key=lambda s: (math.isnan(s.score.value), s.score.value, -s.loss))
    return Findings(tuple(sources), tuple(episodes), tuple(suggestions), tuple(notes))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _episodes(
    names: Sequence[str], training: Losses, held_out: Losses, noise: Mapping[tuple[int, int], Estimate]
) -> list[EpisodeFinding]:
    """Those of which anything is known, noisy ones first, then by their outlier score."""
    keys = list(noise)
    noisy = {(names[keys[i][0]], keys[i][1]) for i, bad in enumerate(judge.noisy([noise[k] for k in keys])) if bad}
    findings = []
    for losses, is_held_out in ((training, False), (held_out, True)):
        for d, name in enumerate(names):
            own = [key for key in losses if key[0] == name]
            scores = judge.outliers(np.array([losses[key].excess for key in own], float))
            for key, z in zip(own, scores, strict=True):
                estimate, is_wrong = noise.get((d, key[1]), UNKNOWN), key in noisy and z > judge.OUTLIER
                findings.append(EpisodeFinding(*key, is_held_out, losses[key].loss, float(z), estimate, bool(is_wrong)))
    return sorted(findings, key=_rank)


def _rank(finding: EpisodeFinding) -> tuple[Any, ...]:
    noise = finding.noise.value if finding.is_wrong else 0.0
    return (-noise, -(0.0 if math.isnan(finding.outlier) else finding.outlier), finding.dataset, finding.episode)


def _exclusions(mixture: Mixture, episodes: Sequence[EpisodeFinding], dropped: set[str]) -> list[Suggestion]:
    """The noisy episodes of each source that stays, on top of those that are excluded already."""
    suggestions = []
    for dataset in mixture.datasets:
        wrong = {e.episode for e in episodes if e.dataset == dataset.name and e.is_wrong}
        if wrong and dataset.name not in dropped:
            listed = sorted({*dataset.settings.exclude_episodes, *wrong})
            text = f"data.sources.{dataset.name}.exclude_episodes=[{','.join(map(str, listed))}]"
            why = f"the labels of {dataset.name}'s episodes {ranges(wrong)} contradict those of the others"
            suggestions.append(Suggestion((text,), why))
    return suggestions


def _notes(
    mixture: Mixture,
    found: Mapping[tuple[int, int], Estimate],
    scores: Sequence[Estimate],
    noise: Mapping[tuple[int, int], Estimate],
    has_targets: bool,
) -> list[str]:
    """What could not be told, and why."""
    notes = []
    judged = {g for _, g in found}
    few = [group.tag for g, group in enumerate(mixture.groups) if g not in judged]
    if few:
        notes.append(
            f"too few episodes to judge by: {', '.join(few)} (two held-out ones are needed); raise val_split_ratio"
        )
    if not has_targets and scores and all(score.is_negative for score in scores):
        notes.append("the sources contradict each other: name the one that you trust, --target DATASET")
    silent = [d.name for d in mixture.datasets if d.index not in {of for of, _ in noise}]
    if silent:
        notes.append(
            f"no label noise is told of {', '.join(silent)}: this checkpoint's gradients are too few or too alike; "
            "take an earlier one, RUN/checkpoints/STEP, or more --windows"
        )
    return notes
