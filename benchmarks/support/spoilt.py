"""What is done to generated sources so that they are no longer what they seem: the mistakes that a linter must find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opentau_train.data.lint.sample import EpisodeSample


def one_in_degrees(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """One joint of the state and of the actions in degrees."""
    factor = np.ones(len(sample.state_names))
    factor[rng.integers(7)] = 180 / np.pi
    return replace(sample, state=[s * factor for s in sample.state], actions=[a * factor for a in sample.actions])


def flipped(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Quaternions of the state of either sign, step by step or episode by episode."""
    by_step = rng.random() < 0.5
    state = []
    for s in sample.state:
        sign = rng.choice([-1.0, 1.0], size=len(s) if by_step else 1)
        state.append(np.concatenate([s[:, :3], s[:, 3:7] * sign[:, None], s[:, 7:]], axis=1))
    return replace(sample, state=state)


def real_part_positive(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Quaternions x, y, z, w of the state with w >= 0, as many libraries return them."""
    state = []
    for s in sample.state:
        sign = np.where(s[:, 6:7] < 0, -1.0, 1.0)
        state.append(np.concatenate([s[:, :3], s[:, 3:7] * sign, s[:, 7:]], axis=1))
    return replace(sample, state=state)


def moved_real_part(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """The actions' quaternions with their real part at the other end."""
    return replace(sample, actions=[_moved(a, 1) for a in sample.actions])


def rolled(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Of a hand that points down and turns about the vertical, one that turns about the base's x axis."""
    return replace(sample, state=[_moved(s, -1) for s in sample.state], actions=[_moved(a, -1) for a in sample.actions])


def _moved(values: np.ndarray, by: int) -> np.ndarray:
    return np.concatenate([values[:, :3], np.roll(values[:, 3:7], by, axis=1), values[:, 7:]], axis=1)


def no_rotations(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Four numbers that are no rotation in place of the state's quaternions."""
    state = [np.concatenate([s[:, :3], 2.5 * s[:, 3:7] - 0.8, s[:, 7:]], axis=1) for s in sample.state]
    return replace(sample, state=state)


def copied(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Some episode once more: the same, cut by up to 20 rows at each end, or with other noise."""
    which, how = rng.integers(len(sample.state)), rng.integers(3)
    pair = [np.concatenate([v[which]]) for v in (sample.state, sample.actions)]
    if how == 1:
        start, end = rng.integers(0, 20), rng.integers(1, 20)
        pair = [v[start:-end] for v in pair]
    if how == 2:
        pair = [v + 1e-4 * v.std(axis=0) * rng.normal(size=v.shape) for v in pair]
    return replace(
        sample,
        numbers=(*sample.numbers, len(sample.numbers)),
        state=[*sample.state, pair[0]],
        actions=[*sample.actions, pair[1]],
        seconds=[*sample.seconds, sample.seconds[which][: len(pair[0])]],
    )


def resting(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    """Three seconds of rest in the middle of each episode."""
    num = round(3 * sample.fps)

    def rest(values: list[np.ndarray]) -> list[np.ndarray]:
        middle = [len(v) // 2 for v in values]
        return [np.concatenate([v[:m], np.repeat(v[m : m + 1], num, axis=0), v[m:]]) for v, m in zip(values, middle)]

    return replace(sample, state=rest(list(sample.state)), actions=rest(list(sample.actions)), seconds=())


def cameras(sample: EpisodeSample, rng: np.random.Generator, swapped: bool = False) -> EpisodeSample:
    """Histograms of two cameras whose scenes differ, with light and objects of each episode's own; `swapped` in a few
    episodes. How much they differ is drawn too: two views of one table may look alike."""
    num, apart = len(sample.state), rng.uniform(0.1, 2.0)
    base = rng.gamma(0.4, size=64)
    scenes = [base * np.exp(apart * rng.normal(size=64)) for _ in range(2)]
    light = np.exp(rng.uniform(0.05, 0.3) * rng.normal(size=(num, 2, 64)))
    pictures = np.stack(scenes)[None] * light + 0.02 * rng.gamma(0.3, size=(num, 2, 64))
    if swapped:
        which = rng.choice(num, rng.integers(1, num // 3 + 1), replace=False)
        pictures[which] = pictures[which][:, ::-1]
    shares = pictures / pictures.sum(axis=2, keepdims=True)
    return replace(sample, histograms={"left": shares[:, 0], "right": shares[:, 1]})


def swapped_cameras(sample: EpisodeSample, rng: np.random.Generator) -> EpisodeSample:
    return cameras(sample, rng, swapped=True)
