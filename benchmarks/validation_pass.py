"""One balanced validation pass against one prepared dataloader per dataset, on the same mixture, model and ranks.

    python benchmarks/validation_pass.py [--cases a b c] [--ranks 1 2 4] [--repeats 5]

(a) 64 datasets of one window, (b) 60 of one to four windows and 4 of 128, (c) 4 of 192. Both sides read the same files
through the same sample builder, in the main process of each rank, with batches of 8; their passes take turns in one
run. The last line is the time to group 1,000,000 samples into 3,240 groups. Prints the tables of docs/validation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

BATCH = 8
CASES = {
    "a": ("64 datasets of 1 window", [1] * 64),
    "b": ("60 of 1 to 4 windows, 4 of 128", [1 + i % 4 for i in range(60)] + [128] * 4),
    "c": ("4 datasets of 192 windows", [192] * 4),
}
FPS, SIZE = 10, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        run_rank(arguments.rank_of, arguments.repeats)
        return
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before; one thread a rank, medians of {arguments.repeats} passes\n")
    print("| case | ranks | way | seconds | forwards a rank | busy | collectives | times faster |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases:
            write_case(Path(folder) / case, CASES[case][1])
        for case in arguments.cases:
            for ranks in arguments.ranks:
                print_case(case, ranks, Path(folder), arguments.repeats)
    print(f"\ngrouping 1,000,000 samples into 3,240 groups: {time_grouping():.3f} s")


def print_case(case: str, ranks: int, folder: Path, repeats: int) -> None:
    """Run one case on `ranks` processes and print its two rows."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, __file__, "--rank-of", str(folder / case), "--repeats", str(repeats)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    gain = found["per_dataset"]["seconds"] / found["balanced"]["seconds"]
    for side, label in (("per_dataset", "one loader a dataset"), ("balanced", "one pass")):
        x = found[side]
        forwards = "/".join(map(str, x["forwards"]))
        busy = "/".join(f"{share:.0%}" for share in x["busy"])
        last = f"{gain:.1f}" if side == "balanced" else ""
        what = f"({case}) {CASES[case][0]}" if side == "per_dataset" else ""
        print(
            f"| {what} | {ranks} | {label} | {x['seconds']:.3f} | {forwards} | {busy} | {x['collectives']} | {last} |"
        )


# -- the mixture -------------------------------------------------------------------------------------------------------


def write_case(root: Path, lengths: list[int]) -> None:
    """One dataset for each length, of one episode and one camera."""
    from opentau_train.data.builtin import video, writer

    rng = np.random.default_rng(0)
    features = {name: writer.Feature("float32", (7,)) for name in ("observation.state", "action")}
    camera = video.Camera("libx264", (SIZE, SIZE), options=video.X264)
    layout = writer.Layout(features, {"observation.images.front": camera}, FPS, "arm")
    for number, length in enumerate(lengths):
        place = root / f"d{number:02d}"
        columns = {k: rng.normal(size=(length, 7)).cumsum(0) for k in features}
        writer.write_tables(place, layout, [writer.Episode("lift the cube", length, columns)])
        frames = rng.integers(0, 255, (length, SIZE // 8, SIZE // 8, 3), np.uint8)
        path = place / layout.path(0, "observation.images.front")
        pictures = (np.kron(f, np.ones((8, 8, 1), np.uint8)) for f in frames)
        video.write_video(path, camera, FPS, enumerate(pictures))


def open_case(root: Path, world):
    """(settings, mixture, policy, replicas): every dataset wholly held out, the tiny policy with random weights."""
    import hydra
    import torch

    from opentau_train import composing
    from opentau_train.config.settings import load_settings
    from opentau_train.config.typed import instantiate
    from opentau_train.distributed.opening import normalise_together, open_together
    from opentau_train.distributed.parallel import spread
    from opentau_train.distributed.watchdog import Progress

    names = sorted(p.name for p in root.iterdir() if (p / "meta").is_dir())
    source = "data/source@data.sources"
    overrides = [f"+{source}.{name}=lerobot" for name in names]
    overrides += [f"data.sources.{n}.root={root / n}" for n in names]
    overrides += [f"data.sources.{n}.val_split_ratio=1.0" for n in names]
    overrides += [f"data.image_size=[{SIZE},{SIZE}]", "data.num_workers=0", f"paths.cache_dir={root / 'cache'}"]
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        tree = composing.plain(hydra.compose("train", overrides))
    settings = load_settings(tree)
    mixture = normalise_together(open_together(settings, world), settings, world, Progress())
    torch.manual_seed(0)
    policy = instantiate(settings.model, "model", spec=mixture.spec)
    mixture = mixture.for_policy(policy.wants())
    return settings, mixture, policy, spread(policy, policy.blocks(), world, None)


# -- the two sides -----------------------------------------------------------------------------------------------------


class Counted:
    """The policy, counting its forwards."""

    def __init__(self, policy):
        self.policy, self.forwards, self.hook = policy, 0, None
        policy.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.forwards += 1


def per_dataset(mixture, policy, accelerator, clock) -> dict[str, float]:
    """Accelerate's own way: a map-style dataset and a prepared dataloader for each, one after the other."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from opentau_train.data.batch import stack
    from opentau_train.data.load.samples import SampleBuilder
    from opentau_train.models.draws import Draws
    from opentau_train.types import Address
    from opentau_train.validation.plan import validation_windows

    builder = SampleBuilder(mixture, training=False)

    class Windows(Dataset):
        def __init__(self, index: int):
            dataset = mixture.datasets[index]
            self.index, (_, self.episode, self.frame) = index, validation_windows([dataset.validation], [], None)

        def __len__(self):
            return len(self.frame)

        def __getitem__(self, i):
            return builder.build(self.index, Address(self.index, int(self.episode[i]), int(self.frame[i]), 0))

    report = {}
    policy.eval()
    with torch.no_grad():
        for index, dataset in enumerate(mixture.datasets):
            loader = DataLoader(Windows(index), BATCH, collate_fn=lambda samples: stack(samples, mixture.spec))
            losses = []
            for batch in accelerator.prepare(loader):
                sums, counts = policy(batch, Draws(batch.key))["mse"]
                with clock.waiting():
                    losses.append(accelerator.gather_for_metrics(torch.stack([sums, counts], dim=1)))
            total = torch.cat(losses).double().sum(0)
            report[dataset.name] = float(total[0] / total[1])
    policy.train()
    builder.close()
    return report


def balanced(mixture, settings, policy, replicas, world) -> dict[str, float]:
    """The one pass."""
    from opentau_train.validation.passes import Validation, open_evaluators

    evaluators = open_evaluators(settings.validation)
    with closing(Validation(mixture, settings.validation, evaluators, world, BATCH)) as validation:
        row = validation.run(policy, replicas, None).row
    return {d.name: row[f"Validation/{d.name}/default/MSE"] for d in mixture.datasets}


class Clock:
    """Seconds spent waiting for other ranks, and how many collectives that were."""

    def __init__(self):
        self.waited, self.collectives = 0.0, 0

    def waiting(self):
        from contextlib import contextmanager

        @contextmanager
        def around():
            started = time.perf_counter()
            yield
            self.waited += time.perf_counter() - started
            self.collectives += 1

        return around()


def run_rank(root: Path, repeats: int) -> None:
    """One rank's part; rank 0 prints the medians as JSON."""
    from opentau_train.distributed.world import World, launch

    with launch(device="cpu", precision="no", timeout=600, identity={}) as world:
        settings, mixture, policy, replicas = open_case(root, world)
        clock, counted, plain_sum = Clock(), Counted(policy), World.sum

        def timed_sum(self, tensor):
            with clock.waiting():
                return plain_sum(self, tensor)

        World.sum = timed_sum
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "per_dataset": lambda: per_dataset(mixture, policy, world.accelerator, clock),
            "balanced": lambda: balanced(mixture, settings, policy, replicas, world),
        }
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        losses = {}
        for _ in range(repeats + 1):  # the first of each warms up
            for side, work in sides.items():
                clock.waited, clock.collectives, counted.forwards = 0.0, 0, 0
                world.barrier()
                started = time.perf_counter()
                losses[side] = work()
                own = time.perf_counter() - started
                busy = world.gather((counted.forwards, 1 - clock.waited / own))
                forwards, shares = zip(*busy, strict=True)
                seconds = max(world.gather(own))
                found = {"seconds": seconds, "forwards": forwards, "busy": shares, "collectives": clock.collectives}
                runs[side].append(found)
        for name, value in losses["balanced"].items():
            assert abs(losses["per_dataset"][name] - value) < 1e-4, name  # the same work was done
        if world.is_main:
            print(json.dumps({side: median(found[1:]) for side, found in runs.items()}))
    sys.stdout.flush()
    os._exit(0)


def median(runs: list[dict]) -> dict:
    return {
        **runs[-1],
        "seconds": statistics.median(r["seconds"] for r in runs),
        "busy": [statistics.median(shares) for shares in zip(*(r["busy"] for r in runs), strict=True)],
    }


def time_grouping(samples: int = 1_000_000, groups: int = 3_240, episodes: int = 100_000, batch: int = 1_000) -> float:
    """Seconds to add samples of three terms to their episodes in batches and to make the row of all groups."""
    import torch

    from opentau_train.metrics.sums import Sums, exact, validation_row
    from opentau_train.types import Group

    rng = np.random.default_rng(0)
    terms = ("mse", "ce", "vision_mse")
    group_of = np.arange(episodes) % groups
    known = [Group(f"d{g // 2}", f"m{g % 2}", f"r::{g % 7}", 1.0) for g in range(groups)]
    items = torch.from_numpy(rng.integers(0, episodes, samples)).split(batch)
    values = {t: (torch.rand(batch), torch.full((batch,), 112.0)) for t in terms}
    started = time.perf_counter()
    sums = Sums(episodes, terms)
    for item in items:
        sums.add(item, exact(values))
    windows = np.bincount(torch.cat(items).numpy(), minlength=episodes).astype(float)
    row = validation_row(sums.values.numpy(), group_of, windows, known, terms, dict.fromkeys(terms, 1.0))
    seconds = time.perf_counter() - started
    assert len(row) >= groups * 3 * 3
    return seconds


if __name__ == "__main__":
    main()
