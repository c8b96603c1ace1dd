"""What a policy's random numbers cost: `Draws`, keyed by sample, against torch's own generator.

    python benchmarks/draws.py [--repeats 9] [--device cuda]

The noise of 256 chunks of 50 x 32 and of 32 chunks of 16 x 8, drawn as a policy draws it, in interleaved turns on one
thread: CPU milliseconds (on a card: by the clock, the device waited for).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from support.program import machine

from opentau_train.models.draws import Draws

SHAPES = ((256, 50, 32), (32, 16, 8))
CALLS = 10
"""Calls a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="once, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, repeats = torch.device(options.device), 1 if options.quick else options.repeats
    print(f"{machine()}; ms, medians (means) of {repeats} interleaved turns of {CALLS} calls\n")
    print("| numbers | shape | `Draws` | torch | ratio |\n|---|---|---|---|---|")
    for shape in SHAPES:
        for name in ("normal", "uniform"):
            print(row(name, shape, device, repeats), flush=True)


def row(name: str, shape: tuple[int, ...], device: torch.device, repeats: int) -> str:
    """A line of the table."""
    keys, plain = torch.arange(shape[0], device=device), torch.randn if name == "normal" else torch.rand
    ways: dict[str, Callable[[int], object]] = {
        "draws": lambda i: getattr(Draws(keys, i), name)("noise", shape[1:]),
        "torch": lambda _: plain(shape, device=device),
    }
    ways["draws"](0)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, call in ways.items():
            times[way].append(spent(call, device))
    cells = [f"{statistics.median(found):.3f} ({statistics.mean(found):.3f})" for found in times.values()]
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    return f"| {name} | {' x '.join(map(str, shape))} | {' | '.join(cells)} | {ratio:.2f} |"


def spent(call: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds of a call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    for i in range(CALLS):
        call(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - started) / CALLS


if __name__ == "__main__":
    main()
