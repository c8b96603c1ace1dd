"""Training steps of a linear policy written down once more, in NumPy and float64, from the datasets' files alone.

It shares no line with the program: the split is given, statistics are taken of the training episodes' rows, chunks are
cut from their arrays, and loss, gradient, clipping, AdamW and the average of the weights stand as their papers have
them (Loshchilov & Hutter 2019, algorithm 2; Pascanu et al. 2013).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from opentau_train.models.policy import Policy

T, A, S = 4, 7, 7
"""Steps of the longer chunk, and the larger robot's dimensions."""


def initial() -> list[np.ndarray]:
    """The weights [T A, S] and bias [T A] that training begins with."""
    g = np.random.default_rng(0)
    return [g.standard_normal((T * A, S)).astype(np.float32), g.standard_normal(T * A).astype(np.float32)]


class LinearPolicy(Policy):
    """Actions as a linear function of the state, trained on the squared error."""

    def __init__(self, spec):
        super().__init__()
        self.loss_weights, self.spec = {"mse": 2.0}, spec
        self.out = nn.Linear(spec.state_dim, spec.chunk_length * spec.action_dim)
        for parameter, values in zip(self.out.parameters(), initial(), strict=True):
            parameter.data = torch.from_numpy(values).float()

    def blocks(self):
        return [self.out]

    def _mask(self, batch):
        steps = ~batch.action_is_pad & (batch.weight != 0)[:, None]
        return steps[:, :, None] & batch.action_dim_mask[:, None, :]

    def term_counts(self, batch):
        return {"mse": self._mask(batch).sum((1, 2), dtype=torch.float32)}

    def forward(self, batch, draws):
        error = torch.where(self._mask(batch), self.sample_actions(batch, draws) - batch.actions, 0.0)
        return {"mse": (error.square().sum((1, 2)), self.term_counts(batch)["mse"])}

    def sample_actions(self, batch, draws):
        return self.out(batch.state).view(len(batch), self.spec.chunk_length, self.spec.action_dim)


@dataclass
class Robot:
    """A dataset's rows by episode, the episodes held out, and the steps of its chunks."""

    root: Path
    held_out: tuple[int, ...]
    chunk: int

    def __post_init__(self):
        tables = [pq.read_table(file).to_pydict() for file in sorted(self.root.glob("data/*/*.parquet"))]
        number = np.concatenate([t["episode_index"] for t in tables])
        read = {k: np.concatenate([np.array(t[k], float) for t in tables]) for k in ("observation.state", "action")}
        self.episodes = {e: tuple(rows[number == e] for rows in read.values()) for e in np.unique(number).tolist()}
        trained = [rows for e, rows in self.episodes.items() if e not in self.held_out]
        pooled = [np.concatenate([rows[k] for rows in trained]) for k in range(2)]
        self.stats = [(rows.mean(0), rows.std(0)) for rows in pooled]

    def sample(self, episode: int, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State [S], actions [T, A], which of them are real [T, A]; normalised, 0 where nothing is."""
        state, actions = ((x - mean) / std for x, (mean, std) in zip(self.episodes[episode], self.stats, strict=True))
        wide_state, wide, real = np.zeros(S), np.zeros((T, A)), np.zeros((T, A), bool)
        rows = actions[frame : frame + self.chunk]
        wide_state[: state.shape[1]], wide[: len(rows), : rows.shape[1]] = state[frame], rows
        real[: len(rows), : rows.shape[1]] = True
        return wide_state, wide, real


class Reference:
    """The policy's weights, their moments and average, step by step."""

    def __init__(self, **options):
        self.parameters = [values.astype(float) for values in initial()]
        self.moments = [[np.zeros_like(p), np.zeros_like(p)] for p in self.parameters]
        self.average = [p.copy() for p in self.parameters]
        self.clip, self.decay, self.betas, self.eps, self.ema, self.term_weight = (
            options[k] for k in ("clip", "weight_decay", "betas", "eps", "ema", "term_weight")
        )
        self.taken = 0

    def errors(self, samples, average: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(errors [B, T, A], 0 where nothing is real; how many of each sample are [B]), of the weights or their
        `average`."""
        (weight, bias), states = self.average if average else self.parameters, np.stack([s for s, _, _ in samples])
        predicted = (states @ weight.T + bias).reshape(len(samples), T, A)
        real = np.stack([mask for _, _, mask in samples])
        return np.where(real, predicted - np.stack([a for _, a, _ in samples]), 0.0), real.sum((1, 2))

    def step(self, samples, rate: float) -> tuple[float, float]:
        """One update; returns the mean squared error and the gradient's norm, both before it."""
        errors, counts = self.errors(samples)
        by_output = self.term_weight * 2 * errors.reshape(len(samples), -1) / counts.sum()
        gradients = [by_output.T @ np.stack([s for s, _, _ in samples]), by_output.sum(0)]
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients)))
        self.taken += 1
        for k, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, self.clip / (norm + 1e-6))
            one, two = self.moments[k]
            one[:] = self.betas[0] * one + (1 - self.betas[0]) * gradient
            two[:] = self.betas[1] * two + (1 - self.betas[1]) * gradient**2
            if self.parameters[k].ndim > 1:  # vectors don't decay
                self.parameters[k] -= rate * self.decay * self.parameters[k]
            steady = [m / (1 - beta**self.taken) for m, beta in zip((one, two), self.betas, strict=True)]
            self.parameters[k] -= rate * steady[0] / (np.sqrt(steady[1]) + self.eps)
            self.average[k] = self.ema * self.average[k] + (1 - self.ema) * self.parameters[k]
        return float((errors**2).sum() / counts.sum()), norm
