"""Packed tokens against padded ones: CPU time and memory of a forward and backward pass.

    python benchmarks/packing.py [--models flow_tiny,wam_tiny,pi0_tiny,pi05_tiny] [--samples 32] [--repeats 5]
        [--history 1]

A batch of samples with 1 to 4 cameras and prompts of 5 to 60 tokens, as a mixture of robots has, goes through a policy;
for wam_tiny, half of them have one or two future frames of a camera, too

    maximum    padded to the mixture's maximum: what the program does with model.packing=false
    longest    padded to the batch's longest: as many cameras and prompt tokens as its largest sample has
    sorted     the same, in micro-batches of 8 samples that are sorted by their tokens
    packed     model.packing=true
    capped     the same, in micro-batches of at most as many tokens as 8 padded samples have

in turn, on one thread. Memory is what autograd keeps for the backward pass of a micro-batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opentau_train import cli
from opentau_train.config.bounds import at_least
from opentau_train.config.settings import load_settings
from opentau_train.data.batch import Batch, stack
from opentau_train.data.mixture.table import align
from opentau_train.data.transforms.pipeline import Pipeline, meet
from opentau_train.distributed.rehearsal import kept_for_backward
from opentau_train.errors import EXIT_OK
from opentau_train.models.draws import Draws
from opentau_train.models.packing.cut import micro_batches
from opentau_train.models.policy import Policy, build_policy
from opentau_train.types import BatchSpec

CAMERAS = ("front", "left", "right", "wrist")
SHARES = (0.25, 0.35, 0.3, 0.1)
"""Of samples with one to four cameras."""
PROMPT = 5, 60
"""Fewest and most tokens of a prompt."""
FUTURE = 2
"""Future frames of the first camera that a sample may have, where the policy foresees them."""
MICRO_BATCH = 8
FLOW = ["model.max_prompt_bytes=240", "model.patch_size=8"]  # 60 tokens of 4 bytes; 64 tokens a picture
PI = ["model.max_prompt_tokens=60", "model.vision.image_size=64", "model.vision.patch_size=8"]
MODELS = {
    "flow_tiny": FLOW,
    "flow_small": FLOW,
    "wam_tiny": [*FLOW, "model.future_patch_size=8"],
    "pi0_tiny": [*PI, "model.action_tokens=binned"],
    "pi05_tiny": [*PI, "model.max_prompt_tokens=120", "model.action_tokens=binned"],  # the state's numbers, too
}


@dataclass(frozen=True)
class Drawn:
    """The samples of a batch: how many cameras, prompt tokens and future frames each has."""

    cameras: list[int]
    prompts: list[int]
    futures: list[int]

    def rows(self, rows: Sequence[int]) -> Drawn:
        return Drawn(*([column[row] for row in rows] for column in (self.cameras, self.prompts, self.futures)))


def draw(num: int, seed: int = 0) -> Drawn:
    """`num` samples of the mixture."""
    g = np.random.default_rng(seed)
    cameras, prompts = 1 + g.choice(4, num, p=SHARES), g.integers(PROMPT[0], PROMPT[1] + 1, num)
    futures = g.choice(FUTURE + 1, num, p=(0.5, 0.125, 0.375))
    return Drawn(cameras.tolist(), prompts.tolist(), futures.tolist())


@dataclass(frozen=True)
class Setup:
    """A model by its name in conf/model, and the pictures before the present one that it is shown."""

    model: str
    history: int

    @property
    def is_flow(self) -> bool:
        """Whether it is the small flow policy, or has its parts."""
        return self.model.startswith(("flow", "wam"))

    def policy(self, drawn: Drawn | None = None) -> Policy:
        """For the whole mixture, or with room for the samples `drawn` alone."""
        num, words = len(CAMERAS), list(MODELS[self.model])
        if drawn is not None:
            num, longest = max(drawn.cameras), max(drawn.prompts)
            if self.is_flow:
                words.append(f"model.max_prompt_bytes={4 * longest}")
            else:
                room = 60 if self.model.startswith("pi05") else 0
                words.append(f"model.max_prompt_tokens={longest + room}")
        tree = cli.compose(["+recipe=lerobot", "data.sources.main.root=unused", f"model={self.model}", *words])
        spec = BatchSpec(CAMERAS[:num], (64, 64), self.history, state_dim=8, action_dim=8, chunk_length=16)
        if self.model.startswith("wam"):
            frames = FUTURE if drawn is None else max(drawn.futures)
            spec = replace(spec, modes=("policy", "wam"), future=frames, future_cameras=CAMERAS[:1] if frames else ())
        torch.manual_seed(0)
        return build_policy(load_settings(tree).model, spec)

    def batch(self, policy: Policy, drawn: Drawn) -> Batch:
        """The samples as the policy takes them; pictures, states and actions are noise."""
        wants, g = policy.wants(), np.random.default_rng(0)
        spec, made = meet(policy.spec, wants), Pipeline(wants.transforms)
        letters = 4 if self.is_flow else 1
        samples = []
        for key, (cameras, tokens, ahead) in enumerate(zip(drawn.cameras, drawn.prompts, drawn.futures, strict=True)):
            record = {
                "images": {c: pictures(g, spec.history + 1, spec) for c in CAMERAS[:cameras]},
                "state": g.standard_normal(spec.state_dim).astype(np.float32),
                "state_dim_mask": np.ones(spec.state_dim, bool),
                "actions": g.standard_normal((spec.chunk_length, spec.action_dim)).astype(np.float32),
                "action_is_pad": np.zeros(spec.chunk_length, bool),
                "action_dim_mask": np.ones(spec.action_dim, bool),
                "prompt": "x" * (tokens * letters - (0 if letters == 4 else 2)),  # a start and an end token
                "mode": "wam" if ahead and spec.future else "policy",
                "key": key,
                "weight": 1.0,
            }
            future = {c: pictures(g, spec.future, spec) for c in spec.future_cameras[: bool(ahead)]}
            sample = made(record, key, training=True)
            samples.append({**sample, "future": future, "future_is_pad": np.arange(spec.future) >= ahead})
        return stack(samples, spec)


def pictures(g: np.random.Generator, num: int, spec: BatchSpec) -> np.ndarray:
    return g.integers(0, 256, (num, *spec.image_size, 3)).astype(np.uint8)


Pass = list[tuple[Policy, Batch]]
"""Micro-batches, each with the policy that it goes through."""


def passes(setup: Setup, drawn: Drawn) -> dict[str, Pass]:
    """{way: what a forward and backward pass of the samples is made of}"""

    def padded(parts: Sequence[Drawn]) -> Pass:
        return [(policy := setup.policy(part), setup.batch(policy, part)) for part in parts]

    whole = setup.policy()
    batch = setup.batch(whole, drawn)
    counts = whole.num_tokens(batch).numpy()
    order = np.argsort(counts.sum(1), kind="stable").tolist()
    by_length = [drawn.rows(order[i : i + MICRO_BATCH]) for i in range(0, len(order), MICRO_BATCH)]
    packed = batch.counted(counts)
    capped = micro_batches(packed, len(batch), MICRO_BATCH * whole.padded_tokens)
    return {
        "maximum": [(whole, batch)],
        "longest": padded([drawn]),
        "sorted": padded(by_length),
        "packed": [(whole, packed)],
        "capped": [(whole, packed.rows(rows)) for rows in capped],
    }


def forward_backward(parts: Pass) -> None:
    for policy, batch in parts:
        policy.zero_grad()
        sum(sums.sum() for sums, _ in policy(batch, Draws(batch.key)).values()).backward()  # type: ignore[union-attr]


def cpu_seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def tokens(parts: Pass) -> int:
    """That the pass computes."""
    counted = [(policy, batch, "num_tokens" in batch.values) for policy, batch in parts]
    return sum(int(b.num_tokens.sum()) if packs else len(b) * p.padded_tokens for p, b, packs in counted)


def table(setup: Setup, num_samples: int, repeats: int) -> list[str]:
    """The ways of one model, the first one being the baseline."""
    ways = passes(setup, draw(num_samples))
    for parts in ways.values():
        forward_backward(parts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, parts in ways.items():
            seconds[name].append(cpu_seconds(lambda parts=parts: forward_backward(parts)))  # type: ignore[misc]
    real = tokens(ways["packed"])
    rows: list[tuple[str, ...]] = [
        (setup.model, "micro-batches", "tokens", "used", "CPU ms, median", "mean", "x", "kept MiB")
    ]
    first = float(np.median(seconds["maximum"]))
    for name, parts in ways.items():
        median, mean = float(np.median(seconds[name])), float(np.mean(seconds[name]))
        kept = max(kept_for_backward(policy, batch, Draws(batch.key))[0] for policy, batch in parts)
        numbers = f"{1e3 * median:.0f}", f"{1e3 * mean:.0f}", f"{first / median:.2f}", f"{kept / 2**20:.0f}"
        computed = tokens(parts)
        rows.append((name, str(len(parts)), f"{computed:,}", f"{real / computed:.2f}", *numbers))
    return align(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="flow_tiny,wam_tiny,pi0_tiny,pi05_tiny", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--history", type=int, default=1, help="earlier pictures of each camera; pi looks at none")
    options = parser.parse_args(arguments)

    def work() -> int:
        for name in ("samples", "repeats"):
            at_least(f"--{name}", getattr(options, name), 1)
        torch.set_num_threads(1)
        for model in options.models.split(","):
            print("\n".join(table(Setup(model, options.history), options.samples, options.repeats)), flush=True)
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
