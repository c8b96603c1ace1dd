"""What hashing costs a save: the whole save of a policy on one process, with hashes of every file and without them.

python benchmarks/checksums.py --megabytes 1500 --repeat 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from support.program import machine
from torch import nn

from opentau_train.checkpoints import manifest
from opentau_train.checkpoints.card import Pretrained
from opentau_train.checkpoints.saver import Saver
from opentau_train.config.settings import CheckpointSettings
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.world import launch
from opentau_train.step import TrainState

SIDE = 2048


class Matrices(nn.Module):
    """`num` matrices of 16 MiB, in place of a policy."""

    borrowed: tuple[str, ...] = ()

    def __init__(self, num: int):
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(SIDE, SIDE) for _ in range(num))


def main() -> None:
    """Print the seconds of a save with and without hashes, medians and means, and their share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=1500, help="of parameters and moments in a checkpoint (1500)")
    parser.add_argument("--repeat", type=int, default=7, help="saves of each kind, one after the other in turn (7)")
    options = parser.parse_args()
    policy = Matrices(max(1, options.megabytes // (4 * 16)))  # parameters, two moments, and the policy by itself
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    sum(m.sum() for m in policy.matrices).backward()
    optimizer.step()
    state = TrainState(policy, Replicas(policy, False), optimizer, None)  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {"with": [], "without": [], "hashing": []}
    real = manifest.digest

    def timed(path: Path) -> str:
        begun = time.perf_counter()
        made = real(path)
        seconds["hashing"][-1] += time.perf_counter() - begun
        return made

    with launch(device="cpu", precision="no", timeout=600, identity={}) as world, tempfile.TemporaryDirectory() as root:
        settings = CheckpointSettings(asynchronous=False, keep_last=1)
        saver = Saver(Path(root), world, settings, Pretrained({}, {}, {}))
        for number in range(2 * options.repeat + 2):
            kind = ("with", "without")[number % 2]
            state.step = number + 1
            seconds["hashing"] += [0.0] if kind == "with" else []
            digest = timed if kind == "with" else (lambda path: "")
            begun = time.perf_counter()
            with mock.patch.object(manifest, "digest", digest):
                saver.save(state, stream={}, counters={})
            seconds[kind].append(time.perf_counter() - begun)
        size = sum(f.size for f in manifest.read(Path(root) / "checkpoints" / "last").values())
    for kind, values in seconds.items():
        kept = values[1:]  # the first pays for fresh memory
        print(f"{kind:8} median {statistics.median(kept):6.2f} s  mean {statistics.mean(kept):6.2f} s")
    ratios = [one / other for one, other in zip(seconds["with"][1:], seconds["without"][1:], strict=True)]
    busy = statistics.median(seconds["hashing"][1:]) / statistics.median(seconds["without"][1:])
    print(f"{size / 1e6:,.0f} MB a checkpoint; a save with hashes takes {statistics.median(ratios):.3f} of one without")
    print(
        f"(median of {len(ratios)} pairs); the hashing itself takes {busy:.1%} of a save, beside the disk. {machine()}"
    )


if __name__ == "__main__":
    main()
