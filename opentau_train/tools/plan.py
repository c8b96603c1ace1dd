"""What a configuration would do, before it does: shares, epochs, repeats, the shuffle's quality, decoders, memory.

    python -m opentau_train.tools.plan +recipe=droid_policy trainer.steps=1000 [--ranks 1,8] [--batches 64]
        [--device-memory 80] [--read 512 [--step-ms 250]]

Takes the arguments of `python -m opentau_train`. Reads metadata and the videos' indices: no video is decoded but with
`--read`, the policy has no weights, and nothing is written but to the cache.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from opentau_train import cli
from opentau_train.checkpoints.start import new_policy
from opentau_train.config.bounds import at_least, positive
from opentau_train.config.data import CorrelationSettings
from opentau_train.config.settings import Settings
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.mixture.keyframes import with_keyframes
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture, open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.data.mixture.table import align, modes_table, weight_cell
from opentau_train.data.order import quality
from opentau_train.data.order.tape import Tape
from opentau_train.distributed import memory
from opentau_train.distributed.parallel import check_batch
from opentau_train.distributed.rehearsal import Rehearsal, rehearse
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.models.packing.limits import check_cap, prompts_of, sketched
from opentau_train.models.policy import Policy
from opentau_train.tools.decoding import decode_lines, num_lanes, proposed_gop
from opentau_train.tools.options import Parser
from opentau_train.tools.reading import reading_lines

EPOCH_WARNING = 100
MOST_VIF = 3.0
"""Over a momentum of 0.9: the optimizer moves by gradients as noisy as those of a third of the windows."""
TOKEN_WINDOWS = 1024
"""Windows whose tokens are counted."""


@dataclass(frozen=True)
class BatchQuality:
    """What the batches looked at are like: distinct episodes a batch (`mean_episodes`, `min_episodes`), the predicted
    variance inflation of a batch (`vif`, `max_vif`) and over a momentum of 0.9 (`momentum_vif`)."""

    num_batches: int
    mean_episodes: float
    min_episodes: int
    vif: float
    max_vif: float
    momentum_vif: float


def batch_quality(tape: Tape, steps: int, rho: CorrelationSettings, num_batches: int) -> BatchQuality:
    """The quality of `num_batches` batches, evenly spread over `steps`."""
    chosen = np.unique(np.linspace(0, steps - 1, num_batches).astype(np.int64)).tolist()
    batches = [tape.batch(step) for step in chosen]
    episodes = [quality.distinct_episodes(batch) for batch in batches]
    shuffle = quality.ShuffleQuality(tape, rho)
    vifs = [shuffle.of_batch(batch) for batch in batches]
    momentum = [shuffle.of_momentum(step) for step in chosen]
    numbers = float(np.mean(episodes)), min(episodes), float(np.mean(vifs)), max(vifs)
    return BatchQuality(len(chosen), *numbers, float(np.mean(momentum)))


def lanes_a_rank(mixture: Mixture, tape: Tape, num_ranks: int) -> int:
    """Lanes that a rank reads: its share of the tape's, or one a worker where the tape reads in order."""
    return max(1, mixture.settings.num_workers) if tape.in_order else -(-num_lanes(tape) // num_ranks)


def decoders_a_rank(mixture: Mixture, tape: Tape, num_ranks: int) -> OpenDecoders:
    """The decoders that a rank holds once all its lanes are open. A phase gives each dataset its share of the lanes,
    and any rank may have the largest ones; lanes that read in order are in one dataset at a time, here the
    costliest."""
    lanes = lanes_a_rank(mixture, tape, num_ranks)
    held = [d.decoders(d.window(mixture.spec)) for d in mixture.datasets]
    decoders, num_bytes = np.array([h.num for h in held]), np.array([h.num_bytes for h in held])
    share = tape.draws / tape.draws.sum()
    if tape.in_order:
        return OpenDecoders(lanes * int(decoders.max()), lanes * int(num_bytes.max()))
    return OpenDecoders(round(float(lanes * share @ decoders)), round(float(lanes * share @ num_bytes)))


def describe(settings: Settings, mixture: Mixture, num_ranks: Sequence[int], num_batches: int) -> str:
    """The report on the data, for launches of each of `num_ranks`."""
    trainer = settings.trainer
    tape = mixture.tape(trainer.global_batch_size)
    samples = trainer.steps * tape.batch_size
    epochs = tape.epoch_of(samples)
    batches = batch_quality(tape, trainer.steps, mixture.settings.correlation, num_batches)
    rho = mixture.settings.correlation
    return "\n".join(
        [
            *align(sources_table(mixture, tape, epochs)),
            *modes_table(mixture),
            "",
            f"training   {trainer.steps} steps x {tape.batch_size} = {samples} samples, {epochs:.2f} epochs of "
            f"{tape.epoch_size} windows, {tape.num_phases} phase{'s' * (tape.num_phases > 1)} each",
            f"batches    {batches.mean_episodes:.1f} distinct episodes of {tape.batch_size} samples on average, "
            f"at least {batches.min_episodes} ({batches.num_batches} batches looked at)",
            f"VIF        {batches.vif:.2f} a batch (at most {batches.max_vif:.2f}), {batches.momentum_vif:.2f} over "
            f"a momentum of {quality.MOMENTUM}; 1 = drawn at random "
            f"(correlation {rho.episode:g} + {rho.neighbours:g} exp(-d/{rho.frames:g}))",
            *decode_lines(mixture, tape),
            *(_decoders(mixture, tape, ranks) for ranks in num_ranks),
            *_warnings(mixture, tape, epochs, batches),
        ]
    )


def _decoders(mixture: Mixture, tape: Tape, num_ranks: int) -> str:
    decoders = decoders_a_rank(mixture, tape, num_ranks)
    workers = max(1, mixture.settings.num_workers)
    lanes = f"{lanes_a_rank(mixture, tape, num_ranks)} lanes of {num_lanes(tape)}"
    if tape.in_order:
        lanes = "in order: one lane a worker"
    return (
        f"decoders   {decoders.num} a rank ({lanes}), about {decoders.num_bytes / 2**20:.0f} MB; "
        f"{decoders.num // workers} in each of {workers} workers; {num_ranks} ranks"
    )


def describe_tokens(mixture: Mixture, policy: Policy, tape: Tape, steps: int) -> list[str]:
    """How many tokens a step has, and which part of what padding makes of them; nothing of policies that don't count.
    Of `TOKEN_WINDOWS` windows, evenly spread over `steps`, each with a prompt of its dataset: which one a window has,
    isn't in the metadata."""
    if not policy.padded_tokens:
        return []
    looked_at = np.unique(np.linspace(0, steps - 1, max(1, TOKEN_WINDOWS // tape.batch_size)).astype(np.int64))
    batches = [tape.batch(step) for step in looked_at.tolist()]
    chosen = [np.concatenate(columns) for columns in zip(*((b.dataset, b.episode, b.frame) for b in batches))]
    total = 0
    for dataset in mixture.datasets:
        episode, frame = (column[chosen[0] == dataset.index] for column in chosen[1:])
        last = dataset.source.episodes.length[episode] - 1
        real = (frame[:, None] + dataset.chunk_offsets <= last[:, None]).sum(1).tolist()
        shares = dataset.settings.modes
        modes = [mode for mode, share in shares.items() for _ in range(max(1, round(100 * share)))]
        windows = list(zip(itertools.cycle(prompts_of(dataset)), real, itertools.cycle(modes), strict=False))
        if windows:
            total += int(policy.num_tokens(sketched(policy, dataset, mixture.spec, windows)).sum())
    mean = total / len(chosen[0])
    efficiency, packs = mean / policy.padded_tokens, "" if policy.packing else "; model.packing=true computes no others"
    return [
        f"tokens     {mean * tape.batch_size:,.0f} a step: {mean:.0f} of {policy.padded_tokens} a sample, packing "
        f"efficiency {efficiency:.2f}{packs}. Over Timing/Step they are Training/TokensPerSecond"
    ]


def rehearsed(settings: Settings, mixture: Mixture) -> Rehearsal:
    """The policy of the settings without memory, on a card where the run would be on one."""
    on_cuda = torch.cuda.is_available() and settings.trainer.device != "cpu"
    make = partial(new_policy, settings.model, mixture.spec, settings.finetune, settings.trainer.precision)
    return rehearse(make, mixture, "cuda" if on_cuda else "cpu")


def describe_memory(
    settings: Settings, rehearsal: Rehearsal, num_ranks: Sequence[int], device_bytes: int | None
) -> str:
    """A table of what a rank's device holds in launches of each of `num_ranks`, and what to do where a device of
    `device_bytes` hasn't as much."""
    rows: list[tuple[str, ...]] = [("memory", "ranks", "samples", *memory.PARTS, "a rank")]
    lines = []
    for ranks in num_ranks:
        footprint = memory.footprint(rehearsal, settings, ranks)
        sizes = [memory.text(size) for size in footprint.parts.values()]
        rows.append(("", str(ranks), str(footprint.samples), *sizes, memory.text(footprint.total)))
        warning = None if device_bytes is None else memory.shortage(rehearsal, settings, ranks, device_bytes)
        lines += [f"warning    --ranks {ranks}: {warning}"] if warning is not None else []
    return "\n".join([*align(rows), *(f"note       {note}" for note in rehearsal.notes.values()), *lines])


def sources_table(mixture: Mixture, tape: Tape, epochs: float) -> list[tuple[str, ...]]:
    """A row for each source, of what an epoch takes of it and how often `epochs` do, below a row of names."""
    rows: list[tuple[str, ...]] = [
        ("source", "episodes", "windows", "blocks", "weight", "share", "windows/epoch", "repeats")
    ]
    for dataset, drawn, repeats in zip(mixture.datasets, tape.draws.tolist(), _repeats(tape, epochs), strict=True):
        rows.append(
            (
                dataset.name,
                str(len(np.unique(dataset.train.episode))),
                str(dataset.train.num_windows),
                str(len(dataset.train.length)),
                weight_cell(dataset, drawn),
                f"{drawn / tape.epoch_size:.1%}",
                str(drawn),
                f"{repeats:.2f}",
            )
        )
    return rows


def _repeats(tape: Tape, epochs: float) -> list[float]:
    """How often `epochs` take each dataset's windows; 0 where none are drawn, of a dataset for validation only."""
    return (epochs * tape.draws / np.maximum(tape.sizes, 1)).tolist()


def _warnings(mixture: Mixture, tape: Tape, epochs: float, batches: BatchQuality) -> list[str]:
    lines = []
    for dataset, repeats in zip(mixture.datasets, _repeats(tape, epochs), strict=True):
        if repeats > EPOCH_WARNING:
            lines.append(f"warning    '{dataset.name}' is repeated {repeats:.0f} times: lower its weight")
    if tape.in_order:
        lines.append("warning    iterable_shuffle=false: windows are read in order, for debugging only")
    elif batches.momentum_vif > MOST_VIF:
        remedy = "raise data.lanes_per_sample, or add episodes"
        if num_lanes(tape) < tape.num_lanes // 2:
            remedy = (
                f"shorten the videos' groups of pictures (tools.reencode --gop {proposed_gop(tape)}), or add episodes"
            )
        lines.append(f"warning    the windows are correlated: {remedy}")
    return lines


def whole_numbers(argument: str) -> list[int]:
    return [int(part) for part in argument.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("plan", __doc__)
    parser.add_argument(
        "--ranks", type=whole_numbers, default=[1], help="processes that will train (1); several: 1,8,64"
    )
    parser.add_argument("--batches", type=int, default=64, help="batches to look at, spread over the run (64)")
    parser.add_argument("--device-memory", type=float, help="GiB of a device that a rank trains on")
    parser.add_argument("--read", type=int, help="read as many windows, to say what reading takes of a core")
    parser.add_argument("--step-ms", type=float, help="of a device a step, to say what a step waits for (with --read)")
    options, composed = parser.parse_known_args(arguments)

    def work() -> int:
        at_least("--ranks", min(options.ranks), 1)
        at_least("--batches", options.batches, 1)
        positive("--device-memory", options.device_memory)
        positive("--step-ms", options.step_ms)
        if options.read is not None:
            at_least("--read", options.read, 2)
        elif options.step_ms is not None:
            raise UserError("what a step waits for is known from reading", where="--step-ms", remedy="add --read 512")
        settings = cli.checked(cli.compose(composed))
        for ranks in options.ranks:
            check_batch(settings.trainer.global_batch_size, ranks)
        device_bytes = None if options.device_memory is None else int(options.device_memory * 2**30)
        mixture = with_keyframes(open_plan(settings, resolve_sources(settings)), settings.paths.cache)
        print(describe(settings, mixture, options.ranks, options.batches))
        rehearsal, trainer = rehearsed(settings, mixture), settings.trainer
        cap = settings.data.max_num_tokens_after_packing
        check_cap(rehearsal.policy, mixture.datasets, mixture.spec, cap)
        tape = mixture.tape(trainer.global_batch_size)
        for line in describe_tokens(mixture, rehearsal.policy, tape, trainer.steps):
            print(line)
        print(describe_memory(settings, rehearsal, options.ranks, device_bytes))
        if options.read is not None:
            readable = open_mixture(settings).for_policy(rehearsal.policy.wants())
            for line in reading_lines(settings, readable, options.ranks, options.read, options.step_ms):
                print(line)
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    cli.end(main())
