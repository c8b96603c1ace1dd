"""What a step of each policy takes on one device: samples a second, the share of its peak, and memory.

    python benchmarks/one_card.py [--rows flow_tiny,flow_base,act,pi0] [--steps 30] [--device cuda]

Each row is a run of the program as a user starts it, in a process of its own, on the small datasets of the tests with
pictures as large as the policy's own. Medians over the last two thirds of the steps; nothing is validated or saved.
*foreseen* is what `tools.plan` says a rank holds, *held* the most that the allocator had in use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from support.program import settings_of

from opentau_train import cli, loop
from opentau_train.checkpoints.start import Start, sketch_policy
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.distributed.memory import footprint
from opentau_train.distributed.rehearsal import Rehearsal
from opentau_train.job import Job

DATA = Path(__file__).parent.parent / "tests" / "data"
MIXTURE = [
    "+recipe=lerobot",
    f"data.sources.main.root={DATA / 'lerobot_v30'}",
    f"data.sources.old.root={DATA / 'lerobot_v21'}",
    "data.sources.old.robot_type=toy6",  # six joints: not the other toy's norm head
    "logger=none",
    "trainer.log_every=1",
    "validation.every=0",
    "checkpoint.every=0",
]
BF16, AGAIN = "trainer.precision=bf16", "parallelism.activation_checkpointing=true"
SMALL, PI0 = ["data.image_size=[96,96]"], ["data.image_size=[224,224]", "model=pi0"]
ROWS = {
    "flow_tiny": ["model=flow_tiny", *SMALL, "trainer.global_batch_size=64"],
    "flow_small": ["model=flow_small", *SMALL, "trainer.global_batch_size=64"],
    "flow_base": ["model=flow_base", *SMALL, "trainer.global_batch_size=256", BF16],
    "flow_base compiled": ["model=flow_base", *SMALL, "trainer.global_batch_size=256", BF16, "trainer.compile=true"],
    "act": ["model=act", "data.image_size=[224,224]", "trainer.global_batch_size=32", BF16],
    "diffusion": ["model=diffusion", *SMALL, "trainer.global_batch_size=64", BF16],
    "pi0_tiny": ["model=pi0_tiny", *SMALL, "trainer.global_batch_size=4"],
    "pi0_tiny lora": ["model=pi0_tiny", *SMALL, "trainer.global_batch_size=4", "finetune=lora"],
    "pi0": [*PI0, "trainer.global_batch_size=16", BF16, AGAIN],
    "pi0 kept": [*PI0, "trainer.global_batch_size=4", BF16],
    "pi0 bf16_params": [*PI0, "trainer.global_batch_size=32", "trainer.precision=bf16_params", AGAIN],
    "pi0 lora": [*PI0, "trainer.global_batch_size=32", "trainer.precision=bf16_params", AGAIN, "finetune=lora"],
}
ON_CPU = ("flow_tiny", "pi0_tiny", "pi0_tiny lora")
ON_CARD = (
    "flow_tiny",
    "flow_small",
    "flow_base",
    "flow_base compiled",
    "act",
    "diffusion",
    "pi0",
    "pi0 bf16_params",
    "pi0 lora",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="a list with commas; without it, those that the device is large enough for")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = [] if options.device == "cuda" else [f"trainer.device={options.device}"]
    given = [*device, f"trainer.steps={options.steps}", f"data.num_workers={options.workers}"]
    if options.row is not None:
        print(json.dumps(one(options.row, given, options.device)))
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.workers} workers, {options.steps} steps\n")
    print("| policy | parameters | batch | samples/s | of peak | data wait | foreseen | held |")
    print("|---|---|---|---|---|---|---|---|")
    for row in options.rows.split(",") if options.rows else ON_CARD if options.device == "cuda" else ON_CPU:
        command = [sys.executable, __file__, "--row", row, "--device", options.device]
        command += ["--steps", str(options.steps), "--workers", str(options.workers)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {row} | failed |\n{done.stderr}", flush=True)
            continue
        print(f"| {row} | {json.loads(done.stdout.splitlines()[-1])['cells']} |", flush=True)


def one(row: str, given: list[str], device: str) -> dict[str, str]:
    """The cells of a row, from a run in this process."""
    Job.must_save = lambda job, stop: False  # type: ignore[method-assign]  # a pi0's state has 53 GB
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"paths.run_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
        arguments = [*MIXTURE, *ROWS[row], *given, *paths]
        settings = settings_of(arguments)
        tree = cli.compose(arguments)
        assert loop.run(settings, tree) == 0
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        mixture = open_plan(settings, resolve_sources(settings))
        start = Start(finetune=settings.finetune)
        policy = sketch_policy(settings.model, mixture.spec, start, settings.trainer.precision)
        foreseen = footprint(Rehearsal(policy, mixture.for_policy(policy.wants()).spec, device), settings, 1).total
    parameters = sum(p.numel() for p in policy.parameters())
    rows = [json.loads(line) for line in lines][-max(1, 2 * len(lines) // 3) :]

    def median(tag: str) -> float | None:
        values = [row[tag] for row in rows if tag in row]
        return statistics.median(values) if values else None

    held, used = median("Memory/DeviceAllocatedPeak"), median("Timing/MFU")
    cells = [
        f"{parameters / 1e6:,.1f} M",
        str(settings.trainer.global_batch_size),
        f"{median('Training/SamplesPerSecond'):,.1f}",
        "" if used is None else f"{used:.0%}",
        f"{median('Timing/DataWait') / median('Timing/Step'):.0%}",
        f"{foreseen / 2**30:.2f} GiB",
        "" if held is None else f"{held / 2**10:.2f} GiB",
    ]
    return {"cells": " | ".join(cells)}


if __name__ == "__main__":
    main()
