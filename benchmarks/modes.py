"""What the modes of a sample are worth on the built-in DROID sample.

    python benchmarks/modes.py [--steps 400] [--seeds 0 1 2] [--modes policy wam ...]

`model=wam_tiny`, narrower, is trained once in each mode, with equal steps, samples and seeds, three cameras of 48x80
and, but for `policy`, the frames of one of them (`--cameras`) after 8 and 16 steps. Reported are numbers of held-out
windows after each quarter of the run: of the modes that predict actions the mean absolute error of sampled chunks, of
those that predict the future the PSNR of sampled frames beside that of the copied present one; means over seeds with
the standard deviation, and in how many seeds a mode is better than *policy*, or than the copy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from support.program import machine

from opentau_train import cli, loop

MODES = ("policy", "wam", "forward_dynamics", "inverse_dynamics")
SIZE = ["model.width=64", "model.depth=3", "model.stem_channels=16", "model.max_prompt_bytes=32"]
FUTURE = ["data.future.num_frames=2", "data.future.stride=8"]
ERRORS = {
    "joints, rad": "Validation-Action/droid/joint/MAE_rad",
    "gripper (joint)": "Validation-Action/droid/joint/MAE_gripper",
    "position, m": "Validation-Action/droid_ee/ee/MAE_m",
    "rotation, rad": "Validation-Action/droid_ee/ee/MAE_rad",
    "gripper (ee)": "Validation-Action/droid_ee/ee/MAE_gripper",
    "loss `mse`": "Validation/MSE",
}
VIDEO = {"joint": "Validation-Video/droid/joint", "ee": "Validation-Video/droid_ee/ee"}

Curve = dict[int, dict[str, float]]
"""{step: {tag: value}}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--cameras", nargs="+", default=["exterior_1"], help="whose future frames there are")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    before, started = machine(), time.perf_counter()
    runs: dict[str, list[Curve]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for mode in options.modes:
                curve = trained(Path(folder) / f"{mode}-{seed}", mode, seed, options)
                runs.setdefault(mode, []).append(curve)
                print(json.dumps([mode, seed, curve]), file=sys.stderr, flush=True)
    print(f"{before}; {options.steps} steps of {options.batch}, seeds {options.seeds}\n")
    if "policy" in runs:
        print_errors(runs)
    print_video(runs)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def trained(run_dir: Path, mode: str, seed: int, options: argparse.Namespace) -> Curve:
    """The validations of a run in `mode`."""
    every = options.steps // 4
    predicts = [*(["action"] if mode != "forward_dynamics" else []), *(["video"] if mode in MODES[1:3] else [])]
    words = ["+recipe=droid_policy", "model=wam_tiny", "data.expect_mode=null", f"data.sources.droid.mode={mode}"]
    words += [
        *SIZE,
        *([*FUTURE, f"data.future.cameras=[{','.join(options.cameras)}]"] if mode != "policy" else []),
        "data.num_workers=0",
        "logger=none",
        "optimizer.lr=2e-3",
        f"seed={seed}",
    ]
    words += [
        f"trainer.steps={options.steps}",
        f"trainer.global_batch_size={options.batch}",
        f"checkpoint.every={options.steps}",
    ]
    words += [f"validation.every={every}", f"validation.evaluators=[loss,{','.join(predicts)}]"]
    words += ["validation.max_samples_per_group=16", f"paths.run_dir={run_dir}"]
    tree = cli.compose(words)
    if loop.run(cli.checked(tree), tree):
        sys.exit(f"stopped: {' '.join(words)}")
    curve: Curve = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        tags = {
            tag: value
            for tag, value in row.items()
            if tag.startswith("Validation") and not tag.endswith(("/N", "/StdErr"))
        }
        if any(tag in tags for tag in ("Validation/MSE", "Validation/VISION_MSE")):
            curve[int(row["step"])] = tags
    return curve


def cell(values: list[float], others: list[float], digits: int, *, less: bool) -> str:
    """Mean and deviation of `values`, and of how many `others` they are better."""
    mine, other = np.array(values), np.array(others)
    spread = mine.std(ddof=1) if len(mine) > 1 else 0.0
    return f"{mine.mean():.{digits}f} ± {spread:.{digits}f} ({((mine < other) == less).sum()} of {len(mine)})"


def print_errors(runs: dict[str, list[Curve]]) -> None:
    print(f"| mode | step | {' | '.join(ERRORS)} |\n|{'---|' * (len(ERRORS) + 2)}")
    for mode in (m for m in runs if m != "forward_dynamics"):
        for step in runs[mode][0]:
            columns = ([[run[step][tag] for run in runs[m]] for m in (mode, "policy")] for tag in ERRORS.values())
            print(f"| {mode} | {step} | {' | '.join(cell(*pair, 4, less=True) for pair in columns)} |")


def print_video(runs: dict[str, list[Curve]]) -> None:
    print(f"\n| mode | step | {' | '.join(f'PSNR ({k}), dB | copy' for k in VIDEO)} |\n|{'---|' * 6}")
    for mode in (m for m in MODES[1:3] if m in runs):
        for step in runs[mode][0]:
            cells = []
            for tag in VIDEO.values():
                sampled, copied = ([run[step][tag + name] for run in runs[mode]] for name in ("/PSNR", "/Copy/PSNR"))
                cells += [cell(sampled, copied, 2, less=False), f"{np.mean(copied):.2f}"]
            print(f"| {mode} | {step} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
