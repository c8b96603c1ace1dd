"""What a policy server answers: requests a second and how long they take, by the number of clients.

    python benchmarks/serve.py [--checkpoint RUN] [--clients 1 4 16] [--seconds 5] [--repeats 3]

Each client is a thread of one process that sends an observation (pictures of 480x640) as soon as it has the last
answer, to `tools.serve` in a process of its own, with batches of one and of up to 8. Beside them, in the same turn,
`act` in this process, one observation at a time. Without a checkpoint it trains one step of `flow_tiny` on two cameras
of 180x320. Turns are interleaved, and every answer is compared with `act`'s for the seed that its client sent.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.datasets import write_dataset
from support.program import machine

from opentau_train import cli, load_policy, loop
from opentau_train.deploy.latency import noise
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.serving.client import Client

SEEDS = 4
"""Different answers that are told apart."""


@dataclass(frozen=True)
class Turn:
    """Seconds of each request, and how many were asked and answered otherwise than they should be."""

    seconds: list[float]
    spent: float
    wrong: int
    lost: int

    @property
    def rate(self) -> float:
        return len(self.seconds) / self.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = options.checkpoint or trained(Path(folder))
        policy = load_policy(checkpoint)
        observation = noise(policy, policy.robot())
        expected = [policy.act(observation, seed=seed) for seed in range(SEEDS)]
        servers = {size: stack.enter_context(server(checkpoint, size)) for size in (1, 8)}
        turns: dict[tuple[int, int], list[Turn]] = {}
        own: list[Turn] = []
        cases = [(size, num) for num in options.clients for size in servers]
        for repeat in range(options.repeats):
            own.append(alone(policy, observation, options.seconds))
            first = repeat % len(cases)
            for size, num in cases[first:] + cases[:first]:  # the machine's other work falls on each of them alike
                turn = asked(servers[size], num, observation, expected, options.seconds)
                turns.setdefault((size, num), []).append(turn)
    print(f"{machine()}; medians of {options.repeats} interleaved turns of {options.seconds:g} s\n")
    print("| max_batch | clients | requests/s | to `act` | p50, ms | p99, ms | lost | wrong |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("`act`", 1, own, own))
    for (size, num), of_turns in sorted(turns.items()):
        print(row(str(size), num, of_turns, own))


def row(name: str, num: int, turns: list[Turn], own: list[Turn]) -> str:
    seconds = np.concatenate([turn.seconds for turn in turns])
    ratio = statistics.median(turn.rate / other.rate for turn, other in zip(turns, own, strict=True))
    p50, p99 = 1000 * np.percentile(seconds, [50, 99])
    rate = statistics.median(turn.rate for turn in turns)
    lost, wrong = sum(turn.lost for turn in turns), sum(turn.wrong for turn in turns)
    return f"| {name} | {num} | {rate:.1f} | {ratio:.2f} | {p50:.0f} | {p99:.0f} | {lost} | {wrong} |"


def alone(policy: RobotPolicy, observation: dict, duration: float) -> Turn:
    seconds, begin = [], time.perf_counter()
    while time.perf_counter() - begin < duration:
        start = time.perf_counter()
        policy.act(observation, seed=len(seconds) % SEEDS)
        seconds.append(time.perf_counter() - start)
    return Turn(seconds, time.perf_counter() - begin, 0, 0)


def asked(url: str, num: int, observation: dict, expected: list, duration: float) -> Turn:
    """`num` clients ask for `duration` seconds. Of a batch the numbers may differ in their last digits."""
    clients = [Client(url) for _ in range(num)]
    seconds: list[list[float]] = [[] for _ in range(num)]
    wrong, lost = [0] * num, [0] * num
    begin = time.perf_counter()

    def ask(number: int) -> None:
        turn = 0
        while time.perf_counter() - begin < duration:
            seed, start = (number + turn) % SEEDS, time.perf_counter()
            turn += 1
            try:
                actions = clients[number].act({**observation, "seed": seed})
            except ValueError:  # a `UserError`: the server's answer, or that it is gone
                lost[number] += 1
                return
            seconds[number].append(time.perf_counter() - start)
            scale = np.abs(expected[seed]).max()
            wrong[number] += not np.allclose(actions, expected[seed], rtol=0, atol=1e-4 * scale)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - begin
    for client in clients:
        client.close()
    return Turn([s for of_client in seconds for s in of_client], spent, sum(wrong), sum(lost))


@contextmanager
def server(checkpoint: str, max_batch: int) -> Iterator[str]:
    """The URL of a server."""
    words = ["-m", "opentau_train.tools.serve", f"checkpoint={checkpoint}", "port=0", f"max_batch={max_batch}"]
    process = subprocess.Popen([sys.executable, *words, "device=cpu"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"at (ws://\S+)", process.stdout.readline())
        assert found is not None, "the server didn't begin"
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def trained(folder: Path) -> str:
    """A run of one step."""
    root = write_dataset(folder / "set", [60] * 4, cameras=2, episodes_per_file=2)
    words = ["+recipe=lerobot", f"data.sources.main.root={root}", "trainer.steps=1", "scheduler.warmup_steps=0"]
    words += ["data.num_workers=0", "trainer.global_batch_size=2", "validation.every=0"]
    words += [f"paths.run_dir={folder / 'run'}", f"paths.cache_dir={folder / 'cache'}"]
    tree = cli.compose(words)
    assert loop.run(cli.checked(tree), tree) == 0
    return str(folder / "run")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
